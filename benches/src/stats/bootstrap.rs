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

/// Where the median of all groups together lies. Each group is drawn from itself: none gains by
/// chance on another.
pub fn median_interval(groups: &[Vec<f64>], level: f64, seed: u64) -> Interval {
    let mut rng = Rng::keyed("median_interval", seed);
    let mut all = Vec::with_capacity(groups.iter().map(Vec::len).sum());
    let drawn: Vec<f64> = (0..AGAIN)
        .map(|_| {
            all.clear();
            groups.iter().for_each(|group| again(group, &mut rng, &mut all));
            median(&all)
        })
        .collect();
    Interval::of(&drawn, level)
}

/// Where the ratio of two medians lies, of `b` over that of `a`: samples that are not paired. Groups
/// are drawn too, as one start of a program is not another.
pub fn ratio_interval(a: &[Vec<f64>], b: &[Vec<f64>], level: f64, seed: u64) -> Interval {
    let mut rng = Rng::keyed("ratio_interval", seed);
    let mut side = |groups: &[Vec<f64>]| {
        let mut all = Vec::new();
        for _ in groups {
            again(&groups[rng.below(groups.len())], &mut rng, &mut all);
        }
        median(&all)
    };
    let drawn: Vec<f64> = (0..AGAIN).map(|_| side(b) / side(a)).collect();
    Interval::of(&drawn, level)
}

fn again(group: &[f64], rng: &mut Rng, into: &mut Vec<f64>) {
    into.extend(group.iter().map(|_| group[rng.below(group.len())]));
}
