//! Bounds of answers that no spec alone describes: fed in pieces, from a whole model, on inputs that
//! were changed.
//!
//! As [`bound`](crate::bound): the oracle, and runs of the reference in stochastic arithmetic, along
//! the same path as the candidate. Twelve runs screen, 256 decide.

use std::sync::Arc;

use golden::{
    Error, View,
    compare::{Finding, derived::Derived, views},
    plan::Grid,
};
use ndarray::ArrayD;
use rayon::prelude::*;
use reference::real::Rounding;

use crate::{
    bound::{DECIDE, SCREEN},
    dear::{self, Off, Yardstick},
    same::{Tap, Taps},
};

/// Bounds by output.
pub(crate) type Bounds = Vec<(String, Derived)>;

/// A run's tensors, widened, in the order of the oracle.
pub(crate) type Run = Vec<Vec<f64>>;

/// The bounds that so many runs give around the oracle's answer. `grid` says what each output is
/// stored in.
pub(crate) fn derive(
    oracle: &Taps,
    grid: &dyn Fn(&str) -> Grid,
    runs: u32,
    run: &(dyn Fn(Rounding) -> Result<Run, Error> + Sync),
) -> Result<Bounds, Error> {
    let mut bounds: Bounds = oracle
        .iter()
        .map(|(name, tap)| {
            let view = tap.view();
            (name.clone(), Derived::new(view.shape(), view.to_f64(), grid(name)))
        })
        .collect();
    // The screen and the verdict must not share a run.
    let first = if runs == SCREEN { 0 } else { 1 << 20 };
    let seeds: Vec<u64> = (0..runs).map(|i| u64::from(first + i)).collect();
    for window in seeds.chunks(2 * rayon::current_num_threads()) {
        let all: Vec<_> = window.par_iter().map(|&seed| run(Rounding::Random(seed))).collect();
        for run in all {
            for ((_, bound), run) in bounds.iter_mut().zip(run?) {
                bound.add(&run);
            }
        }
    }
    Ok(bounds)
}

/// Holds an answer against the bounds that `derive` gives for a number of runs.
pub(crate) fn judge(
    got: &Taps,
    derive: &mut dyn FnMut(u32) -> Result<Arc<Bounds>, Error>,
) -> Result<Vec<Finding>, Error> {
    let findings = against(&*derive(SCREEN)?, got);
    if findings.iter().all(|finding| finding.ok) || findings.iter().any(beyond_doubt) {
        return Ok(findings);
    }
    Ok(against(&*derive(DECIDE)?, got))
}

/// Whether more runs cannot acquit: NaN is never right, and for twelve runs to have seen a hundredth of
/// the true spread, a chi-square of twelve degrees of freedom has to be below a ten-thousandth of its
/// mean, which has a probability below 1e-22. Where no run saw any spread the share is infinite, and
/// nothing is known yet.
fn beyond_doubt(finding: &Finding) -> bool {
    0 < finding.not_finite || (100.0 < finding.budget && finding.budget.is_finite())
}

fn against(bounds: &Bounds, got: &Taps) -> Vec<Finding> {
    let nothing = Tap::F64(ArrayD::zeros(vec![0]));
    let got = |name: &str| {
        got.iter().find(|(other, _)| other == name).map_or(&nothing, |(_, tap)| tap).view()
    };
    bounds.iter().map(|(name, bound)| bound.compare(name, &got(name))).collect()
}

/// Where a dozen runs are too dear: by the rule of [`dear`]. `emulate` gives the reference's answer, as
/// it rounds under the plan.
pub(crate) fn twice(
    oracle: &Taps,
    grid: &dyn Fn(&str) -> Grid,
    yardstick: &mut Yardstick,
    emulate: &dyn Fn(Rounding) -> Result<Run, Error>,
    got: &Taps,
) -> Result<Vec<Finding>, Error> {
    let mut off = |rounding| {
        let off = |((name, want), own): (&(String, Tap), Vec<f64>)| {
            let want = want.view();
            let own = ArrayD::from_shape_vec(want.shape(), own).unwrap_or_default();
            Off::new(name, &want, &View::F64(own.view()), grid(name))
        };
        Ok(oracle.iter().zip(emulate(rounding)?).map(off).collect())
    };
    dear::held(yardstick, &mut off, &|yardstick| {
        let mut findings = Vec::new();
        for (i, (name, want)) in oracle.iter().enumerate() {
            if let Some((_, got)) = got.iter().find(|(other, _)| other == name) {
                findings.push(views(name, &want.view(), &got.view(), yardstick.bound(i)));
            }
        }
        findings
    })
}
