//! What can be said of an engine that lists some log-probabilities of each row.
//!
//! Either side may list: the candidate (a server that returns the most likely tokens), the reference
//! (a recording of the tier `topk`). Compared are the log-probabilities that both have. One of them
//! is `d - sum_j p_j d_j` off, with `d` the errors of the logits: independent errors of relative size
//! `r` in a row of mean square `s` make that at most `r sqrt(2 s)`, and this is what their RMS may be.
//!
//! Not known from a list, and so not told: NMSE, the relative RMS of the logits, a shift that all
//! logits share, and the divergence among the tokens that are not listed.

use super::logits::{Allowed, Check, Distance, Flip, Flips, Listed, Spread, TOP, log_sum_exp, top};

/// One row of one side.
#[derive(Clone, Debug, PartialEq)]
pub enum Row {
    /// Every logit.
    Logits(Vec<f64>),
    /// Some tokens and their log-probabilities, the most likely first.
    Listed(Vec<(u32, f64)>),
}

impl Row {
    /// From tokens in any order.
    pub fn listed(mut entries: Vec<(u32, f64)>) -> Row {
        entries.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        Row::Listed(entries)
    }

    fn known(&self) -> Known<'_> {
        match self {
            Row::Logits(x) => Known::All { logits: x, log_sum: log_sum_exp(x) },
            Row::Listed(ranked) => {
                let mut by_id = ranked.clone();
                by_id.sort_unstable_by_key(|(id, _)| *id);
                Known::Some { ranked, by_id }
            }
        }
    }
}

/// A row that can be asked.
enum Known<'a> {
    All { logits: &'a [f64], log_sum: f64 },
    Some { ranked: &'a [(u32, f64)], by_id: Vec<(u32, f64)> },
}

impl Known<'_> {
    fn logprob(&self, id: u32) -> Option<f64> {
        match self {
            Known::All { logits, log_sum } => logits.get(id as usize).map(|x| x - log_sum),
            Known::Some { by_id, .. } => {
                let at = by_id.binary_search_by_key(&id, |(id, _)| *id).ok()?;
                Some(by_id[at].1)
            }
        }
    }

    fn top(&self, k: usize) -> Vec<u32> {
        match self {
            Known::All { logits, .. } => top(logits, k).into_iter().map(|id| id as u32).collect(),
            Known::Some { ranked, .. } => ranked.iter().take(k).map(|(id, _)| *id).collect(),
        }
    }

    /// How many it knows.
    fn len(&self) -> usize {
        match self {
            Known::All { logits, .. } => logits.len(),
            Known::Some { ranked, .. } => ranked.len(),
        }
    }

    /// Tokens it lists; none where it knows all.
    fn ids(&self) -> Vec<u32> {
        match self {
            Known::All { .. } => Vec::new(),
            Known::Some { ranked, .. } => ranked.iter().map(|(id, _)| *id).collect(),
        }
    }

    fn finite(&self) -> bool {
        match self {
            Known::All { logits, .. } => logits.iter().all(|x| x.is_finite()),
            Known::Some { ranked, .. } => ranked.iter().all(|(_, x)| x.is_finite()),
        }
    }
}

/// Compares rows of which at least one side lists; `scales` are the mean squares of the reference's
/// logits, `next` the tokens that followed each row, where known.
///
/// # Panics
/// If there are not as many rows on both sides, or a row lists nothing.
pub fn distance(
    want: &[Row],
    got: &[Row],
    scales: &[f64],
    next: &[Option<u32>],
    allowed: Allowed,
) -> Distance {
    assert_eq!(want.len(), got.len(), "rows of different engines");
    let least = |rows: &[Row]| rows.iter().map(|row| row.known().len()).min().unwrap_or(0);
    let k = TOP.min(least(want)).min(least(got));
    assert!(0 < k, "a row lists nothing");
    let (mut kl, mut nll, mut covered) = (Vec::new(), Vec::new(), Vec::new());
    let (mut top1, mut topk) = (Vec::new(), Vec::new());
    let mut flips = Flips::default();
    let (mut not_finite, mut first_not_finite) = (0, None);
    let (mut n, mut err2, mut scale_sum) = (0, 0.0, 0.0);
    let mut worst =
        Check { what: "log-probabilities of a row", value: 0.0, allowed: f64::INFINITY };
    let mut worst_row_at = 0;
    for (i, ((want, got), &scale)) in want.iter().zip(got).zip(scales).enumerate() {
        let (w, g) = (want.known(), got.known());
        if !g.finite() {
            not_finite += 1;
            first_not_finite = first_not_finite.or(Some(i));
        }
        let both = pairs(&w, &g);
        covered.push(both.iter().map(|(w, _)| w.exp()).sum::<f64>().min(1.0));
        kl.push(coarse(&both));
        let row_err2 = both.iter().map(|(w, g)| (g - w) * (g - w)).sum::<f64>();
        n += both.len();
        err2 += row_err2;
        scale_sum += scale * both.len() as f64;
        let rms = if both.is_empty() { 0.0 } else { (row_err2 / both.len() as f64).sqrt() };
        let rms = if rms.is_nan() { f64::INFINITY } else { rms };
        let may = allowed.worst_row * (2.0 * scale).sqrt();
        if worst.value / worst.allowed <= rms / may {
            (worst.value, worst.allowed, worst_row_at) = (rms, may, i);
        }

        let (top_w, top_g) = (w.top(k.max(2)), g.top(k));
        topk.push(top_w.iter().take(k).filter(|id| top_g.contains(id)).count() as f64 / k as f64);
        let lead = |id: u32| Some(w.logprob(top_w[0])? - w.logprob(id)?);
        if let Some(margin) = top_w.get(1).and_then(|&second| lead(second)) {
            flips.smallest_margin = flips.smallest_margin.min(margin);
        }
        top1.push(f64::from(u8::from(top_w[0] == top_g[0])));
        if top_w[0] != top_g[0] {
            // What the reference does not list is no more likely than the last it does.
            let last = w.ids().last().copied();
            let margin = lead(top_g[0]).or_else(|| lead(last?)).unwrap_or(f64::INFINITY);
            let allowed = 2.0 * allowed.worst_row * scale.sqrt();
            flips.add(Flip { row: i, want: top_w[0], got: top_g[0], margin, allowed });
        }
        if let Some(Some(token)) = next.get(i)
            && let (Some(w), Some(g)) = (w.logprob(*token), g.logprob(*token))
        {
            nll.push(w - g);
        }
    }
    let rms = if n == 0 { 0.0 } else { (err2 / n as f64).sqrt() };
    let may = allowed.rel_rms * (2.0 * scale_sum / n.max(1) as f64).sqrt();
    let checks = vec![
        Check { what: "log-probabilities", value: rms, allowed: may },
        worst,
        Check { what: "illegal flips", value: flips.illegal as f64, allowed: 0.0 },
        Check { what: "rows not finite", value: f64::from(not_finite), allowed: 0.0 },
    ];
    Distance {
        rows: want.len(),
        kl: Spread::of(kl),
        top1: Spread::of(top1),
        topk: Spread::of(topk),
        k,
        flips,
        delta_nll: (!nll.is_empty()).then(|| Spread::of(nll)),
        whole: None,
        listed: Some(Listed {
            n,
            rms,
            worst_row: worst.value,
            worst_row_at,
            covered: Spread::of(covered),
        }),
        not_finite: not_finite as usize,
        first_not_finite,
        checks,
    }
}

/// Log-probabilities of the tokens that both know.
fn pairs(want: &Known<'_>, got: &Known<'_>) -> Vec<(f64, f64)> {
    // The shorter list: the other side may not know all of it.
    let (short, long) = if matches!(got, Known::Some { .. }) && got.len() <= want.len() {
        (got, want)
    } else {
        (want, got)
    };
    let turned = !std::ptr::eq(short, got);
    let of = |id: u32| {
        let (a, b) = (short.logprob(id)?, long.logprob(id)?);
        Some(if turned { (a, b) } else { (b, a) })
    };
    short.ids().into_iter().filter_map(of).collect()
}

/// The divergence of these tokens and of all others taken together. Taking outcomes together never
/// raises a divergence, so this is a lower bound of the true one.
fn coarse(both: &[(f64, f64)]) -> f64 {
    let rest =
        |at: fn(&(f64, f64)) -> f64| 1.0 - both.iter().map(|pair| at(pair).exp()).sum::<f64>();
    let (p, q) = (rest(|pair| pair.0), rest(|pair| pair.1));
    let listed = both.iter().map(|(w, g)| w.exp() * (w - g)).sum::<f64>();
    // Rounded log-probabilities may leave nothing for the rest: the term is then left out, which only
    // lowers the bound, since it is negative only where `q` is the larger.
    let others = if 0.0 < p && 0.0 < q { p * (p / q).ln() } else { 0.0 };
    let sum = listed + others;
    if sum.is_nan() { f64::INFINITY } else { sum.max(0.0) }
}
