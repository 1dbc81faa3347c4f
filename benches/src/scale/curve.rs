//! Curves through what was measured at some contexts, and how well they are known.

use crate::stats::median;

/// A number with its standard error.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Value {
    /// The number.
    pub of: f64,
    /// One standard error.
    pub error: f64,
}

/// What a linear system of more equations than unknowns comes to.
pub(super) struct Solved {
    /// The unknowns.
    pub(super) x: Vec<f64>,
    /// The sum of squares that is left.
    pub(super) left: f64,
    /// `(A' A)^-1`: errors and how they go together, in units of the variance of an equation.
    pub(super) inverse: Vec<Vec<f64>>,
}

impl Solved {
    /// An unknown, if an equation is off by `noise`.
    pub(super) fn value(&self, i: usize, noise: f64) -> Value {
        Value { of: self.x[i], error: noise * self.inverse[i][i].sqrt() }
    }
}

/// The `x` for which `sum_i x_i column_i` is nearest to `y`; `None` if that does not fix it.
pub(super) fn solve(columns: &[Vec<f64>], y: &[f64]) -> Option<Solved> {
    /// What is left of a column beside the ones before it, at the least.
    const APART: f64 = 1e-10;
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let n = columns.len();
    // Gram and Schmidt: columns = q r.
    let (mut q, mut r): (Vec<Vec<f64>>, _) = (Vec::new(), vec![vec![0.0; n]; n]);
    for (j, column) in columns.iter().enumerate() {
        let mut rest = column.clone();
        // Twice is enough.
        for _ in 0..2 {
            for (i, q) in q.iter().enumerate() {
                let along = dot(q, &rest);
                r[i][j] += along;
                rest.iter_mut().zip(q).for_each(|(rest, q)| *rest -= along * q);
            }
        }
        let size = dot(&rest, &rest).sqrt();
        if size.is_nan() || size <= APART * dot(column, column).sqrt() {
            return None;
        }
        r[j][j] = size;
        rest.iter_mut().for_each(|x| *x /= size);
        q.push(rest);
    }
    // r^-1, from below.
    let mut inverse = vec![vec![0.0; n]; n];
    #[expect(clippy::needless_range_loop, reason = "a triangle is walked by its indices")]
    for j in 0..n {
        for i in (0..=j).rev() {
            let own = if i == j { 1.0 } else { 0.0 };
            let later: f64 = (i + 1..=j).map(|k| r[i][k] * inverse[k][j]).sum();
            inverse[i][j] = (own - later) / r[i][i];
        }
    }
    let along: Vec<f64> = q.iter().map(|q| dot(q, y)).collect();
    let x: Vec<f64> = inverse.iter().map(|row| dot(row, &along)).collect();
    let mut left = y.to_vec();
    for (q, along) in q.iter().zip(&along) {
        left.iter_mut().zip(q).for_each(|(left, q)| *left -= along * q);
    }
    let inverse = inverse.iter().map(|a| inverse.iter().map(|b| dot(a, b)).collect()).collect();
    Some(Solved { x, left: dot(&left, &left), inverse })
}

/// What was measured at a context.
pub(super) type Measured = (usize, f64);

/// Powers of the context, each as a share of what was measured: an equation is `f(T) / y = 1`, so that every
/// context weighs the same.
pub(super) fn powers(points: &[Measured], most: i32) -> Vec<Vec<f64>> {
    let power = |k| points.iter().map(|&(t, y)| (t as f64).powi(k) / y).collect();
    (0..=most).map(power).collect()
}

/// By how much an equation is off: what is left says so, and what rounds differ by, whichever is more.
pub(super) fn off(left: f64, equations: usize, unknowns: usize, noise: f64) -> f64 {
    match equations.saturating_sub(unknowns) {
        0 => noise,
        free => (left / free as f64).sqrt().max(noise),
    }
}

/// A sum of powers of the context.
#[derive(Clone, Debug, PartialEq)]
pub struct Curve {
    /// Of the powers 0, 1, …
    pub factors: Vec<Value>,
    /// Root of the mean square of what is left, relative to the curve's points.
    pub residual: f64,
    /// The furthest that a point is off, relative to the curve, and its context: above it, more.
    pub furthest: (f64, usize),
}

impl Curve {
    /// `a + b T` (`most` is 1) or `a + b T + c T^2` (2); `None` through fewer contexts than it has factors.
    /// `noise`: what a point is off on its own, relative to itself.
    pub(super) fn through(points: &[Measured], most: i32, noise: f64) -> Option<Curve> {
        let solved = solve(&powers(points, most), &vec![1.0; points.len()])?;
        let n = points.len();
        let noise = off(solved.left, n, solved.x.len(), noise);
        let factors = (0..solved.x.len()).map(|i| solved.value(i, noise)).collect();
        let mut curve =
            Curve { factors, residual: (solved.left / n as f64).sqrt(), furthest: (0.0, 0) };
        let off = points.iter().map(|&(t, y)| (y / curve.at(t) - 1.0, t));
        curve.furthest = off.max_by(|a, b| a.0.abs().total_cmp(&b.0.abs()))?;
        Some(curve)
    }

    /// What it says of a context.
    pub fn at(&self, context: usize) -> f64 {
        self.factors.iter().rev().fold(0.0, |sum, factor| sum * context as f64 + factor.of)
    }
}

/// The power with which grows what grows: `p` in `a + d T^p`. `None` where nothing grows by more than three
/// errors, or through fewer than four contexts.
pub(super) fn exponent(points: &[Measured], noise: f64) -> Option<Value> {
    const LOW: f64 = 0.1;
    const HIGH: f64 = 4.0;
    const STEPS: usize = 78;
    if points.len() < 4 {
        return None;
    }
    let line = Curve::through(points, 1, noise)?;
    let grows = line.factors[1];
    if grows.of < 3.0 * grows.error {
        return None;
    }
    let most = points.iter().map(|point| point.0).max()? as f64;
    let ones = vec![1.0; points.len()];
    let columns = |p: f64| {
        let grown = |&(t, y): &Measured| (t as f64 / most).powf(p) / y;
        vec![points.iter().map(|point| 1.0 / point.1).collect(), points.iter().map(grown).collect()]
    };
    let left = |p: f64| solve(&columns(p), &ones).map_or(f64::INFINITY, |solved| solved.left);
    let step = (HIGH - LOW) / STEPS as f64;
    let coarse = (0..=STEPS).map(|i| LOW + step * i as f64);
    let p = coarse.min_by(|&a, &b| left(a).total_cmp(&left(b)))?;
    let p = least(left, p - step, p + step);
    // How it bends there says how well it is known.
    let mut columns = columns(p);
    let solved = solve(&columns, &ones)?;
    let slope = |&(t, y): &Measured| {
        let part = t as f64 / most;
        if t == 0 { 0.0 } else { solved.x[1] * part.powf(p) * part.ln() / y }
    };
    columns.push(points.iter().map(slope).collect());
    let bent = solve(&columns, &ones)?;
    let noise = off(solved.left, points.len(), 3, noise);
    Some(Value { of: p, error: bent.value(2, noise).error })
}

/// Where a function with one valley between two places is least.
fn least(f: impl Fn(f64) -> f64, mut low: f64, mut high: f64) -> f64 {
    let golden = 0.5 * (5.0_f64.sqrt() - 1.0);
    for _ in 0..60 {
        let (a, b) = (high - golden * (high - low), low + golden * (high - low));
        if f(a) < f(b) { high = b } else { low = a }
    }
    f64::midpoint(low, high)
}

/// What the middle of as many rounds is off, relative to itself: what is left of rounds when what a round has
/// in common is taken out. `rounds[r][i]` is of round `r` at context `i`.
pub(super) fn noise(rounds: &[Vec<f64>]) -> f64 {
    let contexts = rounds.first().map_or(0, Vec::len);
    if rounds.len() < 2 || contexts < 2 {
        return 0.0;
    }
    // What a round has in common, and what a context has, in turns: each is known better beside the other.
    let mut common = vec![1.0; rounds.len()];
    let mut middles = vec![1.0; contexts];
    for _ in 0..4 {
        for (i, middle) in middles.iter_mut().enumerate() {
            let own: Vec<_> = rounds.iter().zip(&common).map(|(round, c)| round[i] / c).collect();
            *middle = median(&own);
        }
        for (round, common) in rounds.iter().zip(&mut common) {
            let own: Vec<_> = round.iter().zip(&middles).map(|(x, middle)| x / middle).collect();
            *common = median(&own);
        }
    }
    let mut sum = 0.0;
    for (round, common) in rounds.iter().zip(&common) {
        let off = round.iter().zip(&middles).map(|(x, middle)| (x / middle / common - 1.0).powi(2));
        sum += off.sum::<f64>();
    }
    let free = (rounds.len() - 1) * (contexts - 1);
    // The median of many normal numbers is known less well than their mean.
    let median = (std::f64::consts::FRAC_PI_2 / rounds.len() as f64).sqrt();
    (sum / free as f64).sqrt() * median
}

/// Contexts from 1k to 1M.
#[cfg(test)]
pub(super) const LADDER: [usize; 11] = {
    let mut ladder = [1 << 10; 11];
    let mut i = 1;
    while i < ladder.len() {
        ladder[i] = 2 * ladder[i - 1];
        i += 1;
    }
    ladder
};

#[cfg(test)]
mod tests {
    use golden::Rng;

    use super::{Curve, LADDER, Measured, exponent, median, noise, solve};

    fn drawn(f: impl Fn(f64) -> f64, noise: f32, seed: u64) -> Vec<Measured> {
        let mut rng = Rng::keyed("a curve", seed);
        let one = |&t: &usize| (t, f(t as f64) * f64::from(rng.normal(1.0, noise)));
        LADDER.iter().map(one).collect()
    }

    #[test]
    fn equations_are_solved() {
        let solved = solve(&[vec![1.0, 1.0, 1.0], vec![0.0, 1.0, 2.0]], &[1.0, 3.0, 8.0]).unwrap();
        // By hand: slope 3.5, at none 0.5, off by 0.5, -1, 0.5; (A'A)^-1 = [5 -3; -3 3] / 6.
        for (got, want) in [(solved.x[0], 0.5), (solved.x[1], 3.5), (solved.left, 1.5)] {
            assert!((got - want).abs() < 1e-12, "{got} for {want}");
        }
        assert!((solved.inverse[0][0] - 5.0 / 6.0).abs() < 1e-12);
        assert!((solved.inverse[0][1] + 0.5).abs() < 1e-12);
        assert!(solve(&[vec![1.0, 1.0], vec![2.0, 2.0]], &[1.0, 2.0]).is_none());
        assert!(solve(&[vec![f64::NAN, 1.0]], &[1.0, 2.0]).is_none());
        assert!(solve(&[vec![1.0], vec![2.0]], &[1.0]).is_none());
    }

    #[test]
    fn exact_curves_come_back() {
        let points = drawn(|t| 0.02 + 6e-8 * t + 1e-15 * t * t, 0.0, 0);
        let curve = Curve::through(&points, 2, 0.0).unwrap();
        for (got, want) in curve.factors.iter().zip([0.02, 6e-8, 1e-15]) {
            assert!((got.of / want - 1.0).abs() < 1e-4, "{got:?} for {want}");
        }
        assert!(curve.residual < 1e-6 && curve.furthest.0.abs() < 1e-6);
        assert!(Curve::through(&points[..2], 2, 0.0).is_none());
        // As many contexts as factors: only rounds say how well they are known.
        let known = Curve::through(&points[..2], 1, 0.01).unwrap().factors[0];
        assert!(0.0 < known.error && known.error < 0.01);
        let powered = drawn(|t| 1e-3 + 1e-9 * t.powf(1.5), 0.0, 0);
        let p = exponent(&powered, 0.0).unwrap();
        assert!((p.of - 1.5).abs() < 1e-4 && p.error < 1e-3, "{p:?}");
    }

    /// Of normal numbers 95 % are within two errors; a few in a hundred more are granted here, where errors are
    /// themselves found from eleven points.
    #[test]
    fn errors_are_as_large_as_they_say() {
        const TRIALS: u64 = 400;
        let (a, b) = (0.02, 6e-8);
        let mut within = [0; 4];
        for seed in 0..TRIALS {
            let points = drawn(|t| a + b * t, 0.02, seed);
            let line = Curve::through(&points, 1, 0.0).unwrap();
            let square = Curve::through(&points, 2, 0.0).unwrap();
            let p = exponent(&points, 0.0).unwrap();
            let known =
                [(line.factors[0], a), (line.factors[1], b), (square.factors[2], 0.0), (p, 1.0)];
            for (within, (got, want)) in within.iter_mut().zip(known) {
                *within += u64::from((got.of - want).abs() <= 2.0 * got.error);
            }
        }
        assert!(
            within.iter().all(|&n| TRIALS * 88 / 100 < n && n < TRIALS),
            "{within:?} of {TRIALS}"
        );
    }

    #[test]
    fn what_does_not_grow_has_no_exponent() {
        let found = (0..100).filter(|&seed| exponent(&drawn(|_| 0.02, 0.02, seed), 0.0).is_some());
        assert!(found.count() < 5);
    }

    #[test]
    fn rounds_say_how_sure_a_middle_is() {
        let mut rng = Rng::keyed("rounds", 1);
        let mut all = Vec::new();
        for _ in 0..400 {
            // A round that a neighbour slows down is slow everywhere.
            let common = f64::from(rng.normal(1.0, 0.2)).abs();
            let one = |i: usize| common * (1 + i) as f64 * f64::from(rng.normal(1.0, 0.03));
            all.push((0..12).map(one).collect::<Vec<f64>>());
        }
        let of_five: Vec<f64> = all.chunks_exact(5).map(noise).collect();
        let want = 0.03 * (std::f64::consts::FRAC_PI_2 / 5.0).sqrt();
        let got = median(&of_five);
        assert!((0.8..1.2).contains(&(got / want)), "{got} for {want}");
        assert_eq!(noise(&all[..1]), 0.0);
    }
}
