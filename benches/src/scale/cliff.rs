//! Contexts from which on, or at which alone, tokens take longer than the others let expect.
//!
//! Each place is tried: a smooth curve `a + b T + c T^2` through all points, and beside it one factor for the
//! points from there on, or for that one. What the factor takes from the squares that are left, beside what stays,
//! says how much speaks for it. The place for which most speaks is a cliff if it says more than the best place
//! does in 199 of 200 ladders of the same contexts that are drawn without a cliff, with as much noise as was found,
//! and if the factor is further from one than [`FLOOR`] with two errors taken off. If there is none, pairs of
//! places are tried in the same way: each of two cliffs looks like noise to the other. A place that is faster is
//! no cliff, but is taken out as well: it would make its neighbours look slow.

use golden::Rng;

use super::curve::{Curve, Measured, Value, off, powers, solve};

/// A place where tokens begin to take longer, or do so once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cliff {
    /// The first context that is slower.
    pub context: usize,
    /// How many times slower than the curve through the others.
    pub factor: Value,
    /// Whether all that follow are as well.
    pub lasting: bool,
}

/// Contexts that it takes to tell a cliff from a curve.
pub const CONTEXTS: usize = 6;

/// What nobody minds: also what the gate calls the same.
const FLOOR: f64 = 0.02;

/// Ladders that are drawn, and how many of them may say as much: one of 200, for single places and for pairs.
const DRAWN: usize = 1000;
const ALARMS: usize = 5;

/// Which points are slower: all from one on, or one.
#[derive(Clone, Copy, Debug)]
struct Place {
    at: usize,
    lasting: bool,
}

impl Place {
    fn all(points: usize) -> impl Iterator<Item = Place> {
        // Of the last point both are the same; if all were slower, nobody could tell.
        let lasting = (1..points.saturating_sub(1)).map(|at| Place { at, lasting: true });
        lasting.chain((0..points).map(|at| Place { at, lasting: false }))
    }

    fn holds(self, i: usize) -> bool {
        if self.lasting { self.at <= i } else { self.at == i }
    }
}

/// What speaks for some places.
struct Tried {
    /// With how many times slower points are there.
    places: Vec<(Place, Value)>,
    /// Root of the squares that a factor takes away, in units of what points are off.
    says: f64,
    /// By how much points are off beside it.
    off: f64,
}

impl Tried {
    /// Whether every factor is further from one than anybody minds, two errors taken off.
    fn is_clear(&self) -> bool {
        self.places.iter().all(|(_, Value { of, error })| {
            1.0 + FLOOR < of - 2.0 * error || (1.0 + FLOOR) * (of + 2.0 * error) < 1.0
        })
    }
}

/// Tries places alone, or in pairs. Points are in the order of their contexts, `taken` factors of which are known
/// already.
fn best(points: &[Measured], noise: f64, taken: usize, together: usize) -> Option<Tried> {
    let (smooth, ones) = (powers(points, 2), vec![1.0; points.len()]);
    let before = solve(&smooth, &ones)?.left;
    let all: Vec<Place> = Place::all(points.len()).collect();
    let mut best: Option<Tried> = None;
    let mut attempt = |places: &[Place]| {
        // Where points are k times slower, f / y = 1 / k: the unknown is 1 - 1 / k.
        let mask = |place: &Place| {
            (0..points.len()).map(|i| if place.holds(i) { 1.0 } else { 0.0 }).collect()
        };
        let mut columns = smooth.clone();
        columns.extend(places.iter().map(mask));
        let Some(solved) = solve(&columns, &ones) else { return };
        let off = off(solved.left, points.len(), columns.len() + taken, noise);
        let says = ((before - solved.left) / places.len() as f64).sqrt() / off;
        // Nothing is faster than no time; without any noise nothing can be said.
        let unknowns = smooth.len()..columns.len();
        if !says.is_finite() || unknowns.clone().any(|i| 1.0 <= solved.x[i]) {
            return;
        }
        if best.as_ref().is_none_or(|best| best.says < says) {
            let factor = |i| {
                let v = solved.value(i, off);
                let k = 1.0 / (1.0 - v.of);
                Value { of: k, error: k * k * v.error }
            };
            let places = places.iter().copied().zip(unknowns.map(factor)).collect();
            best = Some(Tried { places, says, off });
        }
    };
    for (i, &place) in all.iter().enumerate() {
        if together == 1 {
            attempt(&[place]);
        } else {
            all[i + 1..].iter().for_each(|&other| attempt(&[place, other]));
        }
    }
    best
}

/// What cliffs leave behind: the same points without them.
pub(super) struct Smooth {
    pub(super) points: Vec<Measured>,
    pub(super) cliffs: Vec<Cliff>,
}

/// Finds cliffs in points in the order of their contexts; through fewer than [`CONTEXTS`] none can be told.
/// `noise`: what a point is off on its own, relative to itself.
pub(super) fn smooth(points: &[Measured], noise: f64) -> Smooth {
    let mut smooth = Smooth { points: points.to_vec(), cliffs: Vec::new() };
    let mut taken = 0;
    while let Some(found) = find(&smooth.points, noise, taken) {
        for (place, factor) in found.places {
            taken += 1;
            for (i, point) in smooth.points.iter_mut().enumerate() {
                if place.holds(i) {
                    point.1 /= factor.of;
                }
            }
            if 1.0 < factor.of {
                let (context, lasting) = (points[place.at].0, place.lasting);
                smooth.cliffs.push(Cliff { context, factor, lasting });
            }
        }
    }
    smooth.cliffs.sort_by_key(|cliff| cliff.context);
    smooth
}

/// One place that speaks for itself, or two.
fn find(points: &[Measured], noise: f64, taken: usize) -> Option<Tried> {
    (1..=2).find_map(|together| {
        // Two points more than unknowns, at the least.
        let enough = CONTEXTS - 1 + together + taken <= points.len();
        let found = enough.then(|| best(points, noise, taken, together))??;
        let usual = || usual(points, (noise.max(found.off), noise), taken, together);
        (found.is_clear() && usual() < found.says).then_some(found)
    })
}

/// What the best place, or pair, says in 199 of 200 ladders without a cliff. `own`: what points are off in them.
fn usual(points: &[Measured], (own, noise): (f64, f64), taken: usize, together: usize) -> f64 {
    let Some(curve) = Curve::through(points, 2, noise) else { return f64::INFINITY };
    let mut rng = Rng::keyed("ladders without a cliff", 1);
    let mut said: Vec<f64> = (0..DRAWN)
        .map(|_| {
            let mut one = |&(t, _): &Measured| {
                (t, curve.at(t) * (1.0 + own * f64::from(rng.normal(0.0, 1.0))))
            };
            let drawn: Vec<_> = points.iter().map(&mut one).collect();
            best(&drawn, noise, taken, together).map_or(0.0, |tried| tried.says)
        })
        .collect();
    said.sort_by(f64::total_cmp);
    said[DRAWN - ALARMS]
}

#[cfg(test)]
mod tests {
    use golden::Rng;

    use super::{
        super::curve::{LADDER, Measured},
        smooth,
    };

    const TRIALS: u64 = 60;
    const NOISE: f32 = 0.01;

    /// A token of the model: some of it grows. `slower(i)` is what a point is slowed down by.
    fn drawn(key: &str, seed: u64, slower: impl Fn(usize) -> f64) -> Vec<Measured> {
        let mut rng = Rng::keyed(key, seed);
        let one = |(i, &t): (usize, &usize)| {
            (t, slower(i) * (0.02 + 6e-8 * t as f64) * f64::from(rng.normal(1.0, NOISE)))
        };
        LADDER.iter().enumerate().map(one).collect()
    }

    #[test]
    fn planted_cliffs_are_found_where_they_are() {
        for (at, lasting, factor) in
            [(4, true, 1.25), (6, true, 1.25), (8, true, 1.4), (7, false, 1.15)]
        {
            let (mut found, mut known) = (0, 0);
            for seed in 0..TRIALS {
                let slower = |i| if i == at || (lasting && at < i) { factor } else { 1.0 };
                let smooth = smooth(&drawn("cliff", seed, slower), f64::from(NOISE));
                let own = smooth.cliffs.iter().find(|cliff| cliff.context == LADDER[at]);
                if let Some(own) = own.filter(|own| own.lasting == lasting) {
                    found += 1;
                    known += u64::from((own.factor.of - factor).abs() <= 2.0 * own.factor.error);
                }
            }
            assert!(TRIALS * 95 / 100 <= found, "x{factor} at {}: {found} of {TRIALS}", LADDER[at]);
            assert!(TRIALS * 85 / 100 <= known, "x{factor} at {}: {known} of {found}", LADDER[at]);
        }
    }

    #[test]
    fn smooth_ladders_alarm_in_one_of_a_hundred() {
        let trials = 4 * TRIALS;
        // Noise as it is, none known, and what a curve of higher power leaves over.
        for noise in [f64::from(NOISE), 0.0] {
            let alarms = (0..trials)
                .filter(|&seed| !smooth(&drawn("smooth", seed, |_| 1.0), noise).cliffs.is_empty());
            // One of a hundred is expected; of 240, eight or more are seen once in 500.
            assert!(alarms.count() < 8, "noise {noise}");
        }
    }

    #[test]
    fn two_cliffs_are_found_where_they_are() {
        let slower = |i| if 6 <= i { 1.5 } else { 1.0 };
        let found = smooth(&drawn("two", 1, |i| slower(i) * if i == 9 { 1.3 } else { 1.0 }), 0.01);
        let places: Vec<_> =
            found.cliffs.iter().map(|cliff| (cliff.context, cliff.lasting)).collect();
        assert_eq!(places, [(LADDER[6], true), (LADDER[9], false)]);
        // With two in so few places the curve takes some of them for its own: how much they cost is told too
        // roughly yet, where they are is not.
        let [lasting, alone] = &found.cliffs[..] else { panic!("{:?}", found.cliffs) };
        assert!((lasting.factor.of - 1.5).abs() < 3.0 * lasting.factor.error, "{lasting:?}");
        assert!(1.0 + 3.0 * alone.factor.error < alone.factor.of, "{alone:?}");
    }

    #[test]
    fn faster_and_too_few_are_no_cliff() {
        let faster =
            |seed| smooth(&drawn("faster", seed, |i| if i == 5 { 0.8 } else { 1.0 }), 0.01);
        assert!((0..10).all(|seed| faster(seed).cliffs.is_empty()));
        let few = &drawn("few", 1, |i| if i == 2 { 3.0 } else { 1.0 })[..5];
        assert!(smooth(few, 0.01).cliffs.is_empty());
        // Without any noise, too: a curve is a curve.
        let exact: Vec<_> = LADDER.map(|t| (t, 0.02 + 6e-8 * t as f64)).to_vec();
        assert!(smooth(&exact, 0.0).cliffs.is_empty());
    }
}
