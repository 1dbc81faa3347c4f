//! Where a series changes: E-divisive means, after Matteson and James.
//!
//! The point that parts a stretch best is the one whose two sides are furthest apart, in the sense of
//! the energy distance. It is believed if few shuffles of the stretch can be parted as well, and then
//! both sides are looked at in turn.

use golden::Rng;

use super::median;

/// Samples on either side of a change, at the least.
const LEAST: usize = 3;

/// Shuffles that a change is held against.
const SHUFFLES: usize = 499;

/// A place where a series changes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Change {
    /// The first sample after it.
    pub at: usize,
    /// Median from the change before to this one.
    pub before: f64,
    /// Median from here to the next one.
    pub after: f64,
    /// The share of shuffles that can be parted as well.
    pub p: f64,
}

/// Every change of a series that fewer than `level` of the shuffles have, in the order of the series.
pub fn change_points(series: &[f64], level: f64, seed: u64) -> Vec<Change> {
    let mut rng = Rng::keyed("change_points", seed);
    let mut found = Vec::new();
    let mut stretches = vec![(0, series.len())];
    while let Some((from, to)) = stretches.pop() {
        let mut stretch = series[from..to].to_vec();
        let Some((parted, best)) = parted(&stretch) else { continue };
        let as_well = (0..SHUFFLES)
            .filter(|_| {
                shuffle(&mut stretch, &mut rng);
                self::parted(&stretch).is_some_and(|(_, other)| best <= other)
            })
            .count();
        let p = (as_well + 1) as f64 / (SHUFFLES + 1) as f64;
        if p <= level {
            found.push((from + parted, p));
            stretches.extend([(from, from + parted), (from + parted, to)]);
        }
    }
    found.sort_by_key(|(at, _)| *at);
    // A point that was found first parted several changes at once: now each has its own stretch.
    for i in 0..found.len() {
        let from = i.checked_sub(1).map_or(0, |before| found[before].0);
        let to = found.get(i + 1).map_or(series.len(), |after| after.0);
        if let Some((parted, _)) = parted(&series[from..to]) {
            found[i].0 = from + parted;
        }
    }
    let ends: Vec<usize> =
        found.iter().map(|(at, _)| *at).chain(std::iter::once(series.len())).collect();
    let mut start = 0;
    let told = found.iter().zip(&ends[1..]).map(|(&(at, p), &end)| {
        let (before, after) = (median(&series[start..at]), median(&series[at..end]));
        start = at;
        Change { at, before, after, p }
    });
    told.collect()
}

/// Where a stretch is parted best, and how far apart the sides are.
fn parted(x: &[f64]) -> Option<(usize, f64)> {
    let n = x.len();
    if n < 2 * LEAST {
        return None;
    }
    let apart = |i: usize, j: usize| (x[i] - x[j]).abs();
    // Sums of distances within the left, within the right, and between, as the cut moves on.
    let (mut left, mut right, mut between) = (0.0, 0.0, 0.0);
    for i in 0..n {
        right += (i + 1..n).map(|j| apart(i, j)).sum::<f64>();
    }
    let mut best = None;
    for cut in 1..=n - LEAST {
        let moved = cut - 1;
        let to_left: f64 = (0..moved).map(|j| apart(moved, j)).sum();
        let to_right: f64 = (cut..n).map(|j| apart(moved, j)).sum();
        left += to_left;
        right -= to_right;
        between += to_right - to_left;
        if cut < LEAST {
            continue;
        }
        let (a, b) = (cut as f64, (n - cut) as f64);
        let pairs = |n: f64| n * (n - 1.0) / 2.0;
        let energy = 2.0 * between / (a * b) - left / pairs(a) - right / pairs(b);
        let scaled = energy * a * b / (a + b);
        if best.is_none_or(|(_, most)| most < scaled) {
            best = Some((cut, scaled));
        }
    }
    best
}

fn shuffle(x: &mut [f64], rng: &mut Rng) {
    for i in (1..x.len()).rev() {
        x.swap(i, rng.below(i + 1));
    }
}
