//! Two engines on the same tokens: how far apart are the models they are?
//!
//! The reference speaks first: divergences are `KL(want || got)`. What decides follows from what logits
//! may be off, [`Allowed`], and from nothing else:
//!
//! - the relative RMS error of all rows, and that of every row;
//! - the divergence. To second order `KL = Var_p(d) / 2` with `d = got - want` and `p` the reference's
//!   distribution. Errors of relative size `r` that are spread over a row of mean square `s` have the
//!   variance `r^2 s`, so the mean may be `r^2 s / 2` with the share of all rows, and that of one row
//!   the same with the share of a row. Where errors sit on the likely tokens they pass the first rule
//!   and fail this one. (The official bf16 runs of the committed recordings use 0.8 to 1.8 times what
//!   their own noise gives here, 0.6 to 1.7 times in their worst row.)
//! - no row's most likely token may change, unless the reference leads by no more than the two logits
//!   may be off together: twice the allowed share of the RMS of the row.
//!
//! Where an engine lists some log-probabilities only, [`listed`](super::listed) says what remains.

use ndarray::ArrayView2;

/// What logits may be off.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Allowed {
    /// `sqrt(sum (got - want)^2 / sum want^2)` over all rows.
    pub rel_rms: f64,
    /// The same of any one row.
    pub worst_row: f64,
}

/// A mean with its standard error, and the tail. Rows count as independent.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Spread {
    /// Values.
    pub n: usize,
    /// Their mean.
    pub mean: f64,
    /// Its standard error; `None` of a single value.
    pub error: Option<f64>,
    /// 99th percentile.
    pub p99: f64,
    /// Largest.
    pub max: f64,
}

impl Spread {
    /// Of these values.
    pub fn of(mut values: Vec<f64>) -> Spread {
        let n = values.len();
        if n == 0 {
            return Spread::default();
        }
        let mean = values.iter().sum::<f64>() / n as f64;
        let squares = values.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>();
        let error = (1 < n).then(|| (squares / ((n - 1) * n) as f64).sqrt());
        values.sort_by(f64::total_cmp);
        let p99 = values[(n * 99).div_ceil(100) - 1];
        Spread { n, mean, error, p99, max: values[n - 1] }
    }
}

/// `sum a / sum b` with its standard error, each row one draw of both.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Ratio {
    /// The ratio.
    pub value: f64,
    /// Its standard error; `None` of a single row.
    pub error: Option<f64>,
}

impl Ratio {
    fn of(a: &[f64], b: &[f64]) -> Ratio {
        let n = a.len();
        let (sum_a, sum_b) = (a.iter().sum::<f64>(), b.iter().sum::<f64>());
        let value = if sum_a == 0.0 { 0.0 } else { sum_a / sum_b };
        let residual2 = a.iter().zip(b).map(|(a, b)| (a - value * b).powi(2)).sum::<f64>();
        let error = |residual2: f64| (residual2 / ((n - 1) * n) as f64).sqrt() / (sum_b / n as f64);
        let error = (1 < n).then(|| if residual2 == 0.0 { 0.0 } else { error(residual2) });
        Ratio { value, error }
    }

    /// Its root: the error follows to first order.
    fn sqrt(self) -> Ratio {
        let value = self.value.sqrt();
        let error = |error| if value == 0.0 { 0.0 } else { error / (2.0 * value) };
        Ratio { value, error: self.error.map(error) }
    }
}

/// A row whose most likely token differs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Flip {
    /// The row.
    pub row: usize,
    /// The reference's token.
    pub want: u32,
    /// The candidate's.
    pub got: u32,
    /// By how much the reference prefers its own.
    pub margin: f64,
    /// By how much it may, for the swap to be legal.
    pub allowed: f64,
}

/// Rows whose most likely token differs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Flips {
    /// Inside the margin.
    pub legal: usize,
    /// Beyond it.
    pub illegal: usize,
    /// The smallest lead of the reference's first token over its second, over all rows: how near to a
    /// tie the text comes.
    pub smallest_margin: f64,
    /// The flip that uses most of its allowance.
    pub widest: Option<Flip>,
}

impl Default for Flips {
    fn default() -> Flips {
        Flips { legal: 0, illegal: 0, smallest_margin: f64::INFINITY, widest: None }
    }
}

impl Flips {
    /// Counts one.
    pub(super) fn add(&mut self, flip: Flip) {
        if flip.margin <= flip.allowed {
            self.legal += 1;
        } else {
            self.illegal += 1;
        }
        let used = |flip: &Flip| flip.margin / flip.allowed;
        if self.widest.is_none_or(|widest| used(&widest) < used(&flip)) {
            self.widest = Some(flip);
        }
    }
}

/// One condition that decides.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Check {
    /// Of what.
    pub what: &'static str,
    /// How much there is.
    pub value: f64,
    /// How much there may be.
    pub allowed: f64,
}

impl Check {
    /// Whether it holds.
    pub fn ok(&self) -> bool {
        self.value <= self.allowed
    }
}

/// What only whole rows of logits tell.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Whole {
    /// `sum (got - want)^2 / sum (want - mean of the row)^2`.
    pub nmse: Ratio,
    /// `sqrt(sum (got - want)^2 / sum want^2)`.
    pub rel_rms: Ratio,
    /// The largest `|got - want| / |want|` of a row.
    pub worst_row: f64,
    /// That row.
    pub worst_row_at: usize,
}

/// What listed log-probabilities tell.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Listed {
    /// Log-probabilities that both sides have.
    pub n: usize,
    /// RMS of their differences, nats.
    pub rms: f64,
    /// The largest RMS of a row.
    pub worst_row: f64,
    /// That row.
    pub worst_row_at: usize,
    /// Probability, under the reference, of what is listed.
    pub covered: Spread,
}

/// How two engines differ.
#[derive(Clone, Debug, PartialEq)]
pub struct Distance {
    /// Rows compared.
    pub rows: usize,
    /// `KL(want || got)` per row, nats; where only some tokens are listed, the divergence of these
    /// and of all others taken together, which the true one is never below.
    pub kl: Spread,
    /// One for a row with the same most likely token, else zero.
    pub top1: Spread,
    /// Share of the `k` most likely tokens that are common.
    pub topk: Spread,
    /// That `k`: ten, or as many as are listed.
    pub k: usize,
    /// Rows whose most likely token differs.
    pub flips: Flips,
    /// Change of the negative log-likelihood of the tokens that follow, nats per token; `None` where
    /// no such token is known on both sides.
    pub delta_nll: Option<Spread>,
    /// Of whole rows.
    pub whole: Option<Whole>,
    /// Of listed tokens.
    pub listed: Option<Listed>,
    /// Rows with a NaN or infinity.
    pub not_finite: usize,
    /// The first of them.
    pub first_not_finite: Option<usize>,
    /// What decides.
    pub checks: Vec<Check>,
}

impl Distance {
    /// Whether everything holds.
    pub fn ok(&self) -> bool {
        self.checks.iter().all(Check::ok)
    }
}

/// How many of the most likely tokens are compared as a set.
pub const TOP: usize = 10;

/// Compares `[N, V]` logits; `next` are the tokens that followed each row, where known.
///
/// # Panics
/// If the shapes differ or there are no logits.
pub fn distance(
    want: &ArrayView2<'_, f32>,
    got: &ArrayView2<'_, f32>,
    next: &[Option<u32>],
    allowed: Allowed,
) -> Distance {
    assert_eq!(want.dim(), got.dim(), "logits of different shapes");
    let (rows, vocabulary) = want.dim();
    let k = TOP.min(vocabulary);
    let (mut kl, mut nll) = (Vec::new(), Vec::new());
    let (mut top1, mut topk) = (Vec::new(), Vec::new());
    let mut flips = Flips::default();
    let (mut not_finite, mut first_not_finite) = (0, None);
    let (mut err2, mut centred2, mut want2) = (Vec::new(), Vec::new(), Vec::new());
    // The divergence of the row that uses most of its allowance, and that allowance.
    let mut worst_kl = Check { what: "KL of a row", value: 0.0, allowed: f64::INFINITY };
    let (mut worst_row, mut worst_row_at) = (0.0_f64, 0);
    for (i, (w, g)) in want.rows().into_iter().zip(got.rows()).enumerate() {
        let w: Vec<f64> = w.iter().map(|&x| f64::from(x)).collect();
        let g: Vec<f64> = g.iter().map(|&x| f64::from(x)).collect();
        if g.iter().any(|x| !x.is_finite()) {
            not_finite += 1;
            first_not_finite = first_not_finite.or(Some(i));
        }
        let n = w.len() as f64;
        let mean = w.iter().sum::<f64>() / n;
        err2.push(w.iter().zip(&g).map(|(w, g)| (g - w) * (g - w)).sum::<f64>());
        centred2.push(w.iter().map(|w| (w - mean) * (w - mean)).sum::<f64>());
        want2.push(w.iter().map(|w| w * w).sum::<f64>());
        let mean_square = want2[i] / n;
        let relative = if err2[i] == 0.0 { 0.0 } else { (err2[i] / want2[i]).sqrt() };
        let relative = if relative.is_nan() { f64::INFINITY } else { relative };
        if worst_row < relative {
            (worst_row, worst_row_at) = (relative, i);
        }

        let (log_w, log_g) = (log_sum_exp(&w), log_sum_exp(&g));
        let divergence = w
            .iter()
            .zip(&g)
            .map(|(w, g)| (w - log_w).exp() * ((w - log_w) - (g - log_g)))
            .sum::<f64>();
        // Rounding may leave it a hair below zero.
        let divergence = if divergence.is_nan() { f64::INFINITY } else { divergence.max(0.0) };
        kl.push(divergence);
        let may = 0.5 * allowed.worst_row * allowed.worst_row * mean_square;
        if worst_kl.value / worst_kl.allowed <= divergence / may {
            (worst_kl.value, worst_kl.allowed) = (divergence, may);
        }

        let (top_w, top_g) = (top(&w, k.max(2)), top(&g, k));
        topk.push(top_w[..k].iter().filter(|id| top_g.contains(id)).count() as f64 / k as f64);
        if let [first, second, ..] = top_w[..] {
            flips.smallest_margin = flips.smallest_margin.min(w[first] - w[second]);
        }
        top1.push(f64::from(u8::from(top_w[0] == top_g[0])));
        if top_w[0] != top_g[0] {
            flips.add(Flip {
                row: i,
                want: top_w[0] as u32,
                got: top_g[0] as u32,
                margin: w[top_w[0]] - w[top_g[0]],
                allowed: 2.0 * allowed.worst_row * mean_square.sqrt(),
            });
        }
        if let Some(Some(token)) = next.get(i)
            && let (Some(w), Some(g)) = (w.get(*token as usize), g.get(*token as usize))
        {
            nll.push((log_g - g) - (log_w - w));
        }
    }
    let mean_square = want2.iter().sum::<f64>() / (rows * vocabulary) as f64;
    let whole = Whole {
        nmse: Ratio::of(&err2, &centred2),
        rel_rms: Ratio::of(&err2, &want2).sqrt(),
        worst_row,
        worst_row_at,
    };
    let kl = Spread::of(kl);
    let mean_kl = 0.5 * allowed.rel_rms * allowed.rel_rms * mean_square;
    let checks = vec![
        Check { what: "relative RMS", value: whole.rel_rms.value, allowed: allowed.rel_rms },
        Check { what: "worst row", value: worst_row, allowed: allowed.worst_row },
        Check { what: "mean KL", value: kl.mean, allowed: mean_kl },
        worst_kl,
        Check { what: "illegal flips", value: flips.illegal as f64, allowed: 0.0 },
        Check { what: "rows not finite", value: f64::from(not_finite), allowed: 0.0 },
    ];
    Distance {
        rows,
        kl,
        top1: Spread::of(top1),
        topk: Spread::of(topk),
        k,
        flips,
        delta_nll: (!nll.is_empty()).then(|| Spread::of(nll)),
        whole: Some(whole),
        listed: None,
        not_finite: not_finite as usize,
        first_not_finite,
        checks,
    }
}

/// What the tokens that follow cost an engine that said these `[N, V]` logits, nats per token; `None` where
/// no such token is known.
pub fn nll(logits: &ArrayView2<'_, f32>, next: &[Option<u32>]) -> Option<Spread> {
    let mut all = Vec::new();
    for (row, next) in logits.rows().into_iter().zip(next) {
        let row: Vec<f64> = row.iter().map(|&x| f64::from(x)).collect();
        if let Some(logit) = next.and_then(|token| row.get(token as usize)) {
            all.push(log_sum_exp(&row) - logit);
        }
    }
    (!all.is_empty()).then(|| Spread::of(all))
}

/// `ln sum exp x`.
pub(super) fn log_sum_exp(x: &[f64]) -> f64 {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    max + x.iter().map(|x| (x - max).exp()).sum::<f64>().ln()
}

/// The `k` largest, ties to the lowest index.
pub(super) fn top(x: &[f64], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..x.len()).collect();
    let largest_first = |&a: &usize, &b: &usize| x[b].total_cmp(&x[a]).then(a.cmp(&b));
    if k < order.len() {
        order.select_nth_unstable_by(k, largest_first);
        order.truncate(k);
    }
    order.sort_unstable_by(largest_first);
    order
}
