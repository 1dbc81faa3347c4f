//! Tests that look at the order of samples alone: an outlier weighs no more than any other.

use super::above;

/// How likely samples are to lie as far to one side by chance.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ranks {
    /// If they are not above.
    pub above: f64,
    /// If they are not below.
    pub below: f64,
}

impl Ranks {
    /// To either side.
    pub fn either(self) -> f64 {
        (2.0 * self.above.min(self.below)).min(1.0)
    }
}

/// Differences up to this many are counted exactly, more by the normal law.
const EXACT: usize = 25;

/// Wilcoxon's test of whether samples lie about a value. Those that are equal to it say nothing.
pub fn signed_rank(samples: &[f64], about: f64) -> Ranks {
    let mut off: Vec<f64> = samples.iter().map(|x| x - about).filter(|&x| x != 0.0).collect();
    off.sort_by(|a, b| a.abs().total_cmp(&b.abs()));
    let sizes: Vec<f64> = off.iter().map(|x| x.abs()).collect();
    let (ranks, ties) = ranks(&sizes);
    let up: f64 = off.iter().zip(&ranks).filter(|(x, _)| 0.0 < **x).map(|(_, rank)| rank).sum();
    let n = off.len();
    if n == 0 {
        return Ranks { above: 1.0, below: 1.0 };
    }
    if n <= EXACT && ties == 0.0 {
        return exactly(n, up as usize);
    }
    let n = n as f64;
    let mean = n * (n + 1.0) / 4.0;
    let spread = (n * (n + 1.0) * (2.0 * n + 1.0) / 24.0 - ties / 48.0).sqrt();
    two(up - mean, spread)
}

/// Both sides of the normal law, half a step nearer to the middle.
fn two(off: f64, spread: f64) -> Ranks {
    if spread <= 0.0 || spread.is_nan() {
        return Ranks { above: 1.0, below: 1.0 };
    }
    Ranks { above: above((off - 0.5) / spread), below: above((-off - 0.5) / spread) }
}

/// Of all ways to give ranks `1..=n` a sign, the share whose sum of those above is as far off.
fn exactly(n: usize, up: usize) -> Ranks {
    let most = n * (n + 1) / 2;
    let mut ways = vec![0.0_f64; most + 1];
    ways[0] = 1.0;
    for rank in 1..=n {
        for sum in (rank..=most).rev() {
            ways[sum] += ways[sum - rank];
        }
    }
    let all = (n as f64).exp2();
    Ranks {
        above: ways[up..].iter().sum::<f64>() / all,
        below: ways[..=up].iter().sum::<f64>() / all,
    }
}

/// Mann and Whitney's test of whether samples of `b` lie where those of `a` do.
pub fn rank_sum(a: &[f64], b: &[f64]) -> Ranks {
    let mut all: Vec<(f64, bool)> = a.iter().map(|&x| (x, false)).collect();
    all.extend(b.iter().map(|&x| (x, true)));
    all.sort_by(|x, y| x.0.total_cmp(&y.0));
    let values: Vec<f64> = all.iter().map(|(x, _)| *x).collect();
    let (ranks, ties) = ranks(&values);
    let of_b: f64 = all.iter().zip(&ranks).filter(|((_, b), _)| *b).map(|(_, rank)| rank).sum();
    let (m, n) = (a.len() as f64, b.len() as f64);
    let wins = of_b - n * (n + 1.0) / 2.0;
    let whole = m + n;
    let spread = (m * n / 12.0 * (whole + 1.0 - ties / (whole * (whole - 1.0)))).sqrt();
    two(wins - m * n / 2.0, spread)
}

/// Ranks of sorted values, equal ones sharing theirs, and the sum of `t^3 - t` over ties of `t`.
fn ranks(sorted: &[f64]) -> (Vec<f64>, f64) {
    let mut ranks = Vec::with_capacity(sorted.len());
    let mut ties = 0.0;
    for equal in sorted.chunk_by(|a, b| a == b) {
        let (first, t) = (ranks.len() as f64, equal.len() as f64);
        ranks.extend(equal.iter().map(|_| first + f64::midpoint(1.0, t)));
        ties += t * t * t - t;
    }
    (ranks, ties)
}

/// How likely logarithms of ratios are to lie so surely within a margin of none if they do not: the
/// larger of two tests, one against each end.
pub fn equivalence(logs: &[f64], margin: f64) -> f64 {
    let from_below = signed_rank(logs, -margin.ln_1p()).above;
    let from_above = signed_rank(logs, margin.ln_1p()).below;
    from_below.max(from_above)
}
