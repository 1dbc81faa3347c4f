//! Logits of two engines on the same tokens: how far apart are the models they are?

use ndarray::ArrayView2;

/// A mean with its standard error, and the tail.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Spread {
    /// Values.
    pub n: usize,
    /// Their mean.
    pub mean: f64,
    /// Its standard error.
    pub error: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Largest.
    pub max: f64,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Spread {
        let n = values.len();
        if n == 0 {
            return Spread::default();
        }
        let mean = values.iter().sum::<f64>() / n as f64;
        let variance =
            values.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / (n.max(2) - 1) as f64;
        values.sort_by(f64::total_cmp);
        let p99 = values[(n * 99).div_ceil(100) - 1];
        Spread { n, mean, error: (variance / n as f64).sqrt(), p99, max: values[n - 1] }
    }
}

/// How two sets of logits differ.
#[derive(Clone, Debug, PartialEq)]
pub struct Distance {
    /// Rows compared.
    pub rows: usize,
    /// `KL(want || got)` per row, nats.
    pub kl: Spread,
    /// Share of rows with the same largest logit.
    pub top1: f64,
    /// Mean share of the ten largest that are common.
    pub top10: f64,
    /// Rows where the largest logit differs although `want` leads by more than twice the row's
    /// largest error could explain if every error were an independent draw of the row's RMS error:
    /// six times that RMS.
    pub illegal_flips: usize,
    /// Rows where it differs within that margin.
    pub legal_flips: usize,
    /// Change of the negative log-likelihood of the given next tokens, nats per token.
    pub delta_nll: Option<Spread>,
    /// `sum (got - want)^2 / sum (want - mean of the row)^2`.
    pub nmse: f64,
    /// `sqrt(sum (got - want)^2 / sum want^2)`.
    pub rel_rms: f64,
    /// Rows with a NaN or infinity.
    pub not_finite: usize,
}

/// Compares `[N, V]` logits; `next` are the tokens that followed each row, where known.
///
/// # Panics
/// If the shapes differ or there are no logits.
pub fn distance(
    want: &ArrayView2<'_, f32>,
    got: &ArrayView2<'_, f32>,
    next: &[Option<u32>],
) -> Distance {
    assert_eq!(want.dim(), got.dim(), "logits of different shapes");
    let (mut kl, mut nll) = (Vec::new(), Vec::new());
    let (mut same, mut common) = (0, 0.0);
    let (mut legal_flips, mut illegal_flips, mut not_finite) = (0, 0, 0);
    let (mut err2, mut centred2, mut want2) = (0.0, 0.0, 0.0);
    for (i, (w, g)) in want.rows().into_iter().zip(got.rows()).enumerate() {
        let w: Vec<f64> = w.iter().map(|&x| f64::from(x)).collect();
        let g: Vec<f64> = g.iter().map(|&x| f64::from(x)).collect();
        if g.iter().any(|x| !x.is_finite()) {
            not_finite += 1;
        }
        let (log_w, log_g) = (log_sum_exp(&w), log_sum_exp(&g));
        let divergence = w
            .iter()
            .zip(&g)
            .map(|(w, g)| (w - log_w).exp() * ((w - log_w) - (g - log_g)))
            .sum::<f64>();
        // Rounding may leave it a hair below zero.
        kl.push(if divergence.is_nan() { f64::INFINITY } else { divergence.max(0.0) });
        let mean = w.iter().sum::<f64>() / w.len() as f64;
        let row_err2 = w.iter().zip(&g).map(|(w, g)| (g - w) * (g - w)).sum::<f64>();
        err2 += row_err2;
        centred2 += w.iter().map(|w| (w - mean) * (w - mean)).sum::<f64>();
        want2 += w.iter().map(|w| w * w).sum::<f64>();
        let (top_w, top_g) = (top(&w, 10), top(&g, 10));
        common += top_w.iter().filter(|id| top_g.contains(id)).count() as f64 / top_w.len() as f64;
        if top_w[0] == top_g[0] {
            same += 1;
        } else {
            let margin = w[top_w[0]] - w[top_g[0]];
            let rms = (row_err2 / w.len() as f64).sqrt();
            if margin <= 6.0 * rms { legal_flips += 1 } else { illegal_flips += 1 }
        }
        if let Some(Some(token)) = next.get(i)
            && let (Some(w), Some(g)) = (w.get(*token as usize), g.get(*token as usize))
        {
            nll.push((log_g - g) - (log_w - w));
        }
    }
    let rows = want.nrows();
    Distance {
        rows,
        kl: Spread::of(kl),
        top1: f64::from(same) / rows as f64,
        top10: common / rows as f64,
        illegal_flips,
        legal_flips,
        delta_nll: (!nll.is_empty()).then(|| Spread::of(nll)),
        nmse: err2 / centred2,
        rel_rms: (err2 / want2).sqrt(),
        not_finite,
    }
}

fn log_sum_exp(x: &[f64]) -> f64 {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    max + x.iter().map(|x| (x - max).exp()).sum::<f64>().ln()
}

/// The `k` largest, ties to the lowest index.
fn top(x: &[f64], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..x.len()).collect();
    order.sort_by(|&a, &b| x[b].total_cmp(&x[a]));
    order.truncate(k);
    order
}
