//! Intervals by drawing the samples again from themselves.

use golden::Rng;

use super::{median, quantile};

/// How often samples are drawn again.
const AGAIN: usize = 2000;

/// Where a number lies.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Interval {
    /// Not below this.
    pub lo: f64,
    /// Nor above this.
    pub hi: f64,
}

impl Interval {
    /// The middle of what was drawn.
    fn of(drawn: &[f64], level: f64) -> Interval {
        let tail = (1.0 - level) / 2.0;
        Interval { lo: quantile(drawn, tail), hi: quantile(drawn, 1.0 - tail) }
    }
}

/// Where the median of all groups together lies. Groups are drawn again, then samples of each: one start
/// of a program is not another, and many samples of few starts do not make it sure.
pub fn median_interval(groups: &[Vec<f64>], level: f64, seed: u64) -> Interval {
    let mut rng = Rng::keyed("median_interval", seed);
    let drawn: Vec<f64> = (0..AGAIN).map(|_| median(&drawn_again(groups, &mut rng))).collect();
    Interval::of(&drawn, level)
}

/// Where the ratio of two medians lies, of `b` over that of `a`: samples that are not paired.
pub fn ratio_interval(a: &[Vec<f64>], b: &[Vec<f64>], level: f64, seed: u64) -> Interval {
    let mut rng = Rng::keyed("ratio_interval", seed);
    let drawn: Vec<f64> = (0..AGAIN)
        .map(|_| median(&drawn_again(b, &mut rng)) / median(&drawn_again(a, &mut rng)))
        .collect();
    Interval::of(&drawn, level)
}

/// As many groups, and as many samples of each.
fn drawn_again(groups: &[Vec<f64>], rng: &mut Rng) -> Vec<f64> {
    let mut all = Vec::new();
    for _ in groups {
        let group = &groups[rng.below(groups.len())];
        all.extend(group.iter().map(|_| group[rng.below(group.len())]));
    }
    all
}
