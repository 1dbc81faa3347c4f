//! Problems for which a dozen runs are too dear: the rule is relative.
//!
//! The error against the oracle, of the whole and of the worst row, is at most twice that of the reference
//! when it rounds to the nearest as the plan says, outputs rounded to what they are stored in: one run
//! instead of twelve, and of no single element is anything known.
//!
//! One run that adds in the order of the reference is a thin yardstick, so that an answer which is over is
//! held against up to twelve more, in stochastic arithmetic, before it is accused.
//!
//! - Of the whole, the reference's sixteen partial sums err less than the one chain of an honest kernel.
//!   Half of the runs add in one chain, which no order exceeds, and rounding at random has twice the
//!   variance of rounding to the nearest (`f (1 - f)` of a uniform `f` is `1/6`, of the nearest `1/12`):
//!   the whole may be as far off as the worst of them, not twice as far.
//! - A row that nearly cancels has few independent errors, in the worst case one, and of two honest
//!   runs of one normal error one is more than twice the other in 30 % of all cases (`2 atan(1/2) / pi`).
//!   The worst row may be twice the worst row of all runs. An honest one is over with the odds that one
//!   normal number exceeds `2 sqrt(2)` times the largest of twelve: 2.3e-4 if the row has one
//!   independent error, 7.9e-6 with two, 3.5e-8 with four.
//!
//! The worst over more runs only grows, so that stopping at the first that acquits gives the verdict of
//! all.

use std::convert::Infallible;

use golden::{
    Dtype, Op, Spec, Tensors, View,
    compare::{self, Bound, Finding},
    plan::{Form, Grid},
};
use ndarray::{ArrayD, Axis};
use reference::real::{Planned, Rounding, under};

use crate::{
    answer::Answer,
    judge::{Case, routes, same_experts},
};

/// Operations from which on a problem is too dear for runs in stochastic arithmetic: at some 10^8 of its
/// operations a second, a dozen runs of that many take minutes, and the 256 that decide an hour.
pub const TOO_DEAR: u64 = 1 << 31;

/// Runs in stochastic arithmetic that may follow.
const RUNS: u32 = 12;

/// Whether a problem takes so many operations, or more.
pub(crate) fn is<O: Op>(spec: &Spec<O::Case>, threshold: u64) -> bool {
    threshold <= O::cost(spec).flops
}

/// Every output of `got` by the relative rule.
pub(crate) fn judge<O: Answer>(case: &Case<'_, O>, got: &O::Outputs<f32>) -> Vec<Finding> {
    let got = got.tensors();
    let ids = |outputs: &[(&'static str, View<'_>)]| {
        outputs.iter().find_map(|(name, view)| match view {
            View::I64(ids) if *name == "ids" && 1 < ids.ndim() => Some(ids.to_owned()),
            _ => None,
        })
    };
    let wide = O::wide::<f64>(case.inputs);
    let plain = O::answer(&wide, Form::Plain, None);
    let (own, chosen) = (ids(&plain.tensors()), ids(&got));
    let chosen = chosen.filter(|ids| routes(&ids.view(), O::experts(case.inputs)));
    let swapped = matches!((&own, &chosen), (Some(own), Some(chosen)) if own != chosen);
    // Everything else has to be right with the experts that were chosen.
    let experts = if swapped { chosen.as_ref() } else { own.as_ref() };
    let forced = swapped.then(|| O::answer(&wide, Form::Plain, experts));
    let want = forced.as_ref().unwrap_or(&plain);
    let margins = if swapped { margins(case, &plain) } else { Margins::default() };
    let mut yardstick = Yardstick::default();
    let mut emulate = |rounding| {
        let emulated = emulated(case, experts, rounding);
        let pairs = want.tensors().into_iter().zip(emulated.tensors());
        let off = |((name, want), (_, run))| Off::new(name, &want, &run, O::grid(name, case.plan));
        Ok(pairs.map(off).collect())
    };
    let against = |yardstick: &Yardstick| {
        let mut findings = Vec::new();
        for (i, (name, want)) in want.tensors().iter().enumerate() {
            if O::TOLD.contains(name) {
                continue;
            }
            let nothing =
                View::F64(ndarray::ArrayViewD::from_shape(vec![0], &[]).expect("nothing"));
            let got =
                got.iter().find(|(other, _)| other == name).map_or(&nothing, |(_, view)| view);
            findings.push(if *name == "ids" && swapped {
                swaps(want, got, own.as_ref(), &margins)
            } else {
                compare::views(name, want, got, yardstick.bound(i))
            });
        }
        findings
    };
    let judged: Result<_, Infallible> = held(&mut yardstick, &mut emulate, &against);
    judged.unwrap_or_else(|never| match never {})
}

/// The reference as it rounds under the plan of a case.
fn emulated<O: Answer>(
    case: &Case<'_, O>,
    experts: Option<&ArrayD<i64>>,
    rounding: Rounding,
) -> O::Outputs<Planned> {
    under(case.plan, None, rounding, || {
        O::answer(&O::wide::<Planned>(case.inputs), case.plan.form, experts)
    })
}

/// How far emulations of a plan are from the oracle.
#[derive(Default)]
pub(crate) struct Yardstick {
    nearest: Option<Vec<Off>>,
    /// The most of any stochastic run.
    worst: Vec<Off>,
    stochastic: u32,
}

impl Yardstick {
    fn add(&mut self, run: Vec<Off>) {
        self.stochastic += 1;
        self.worst.resize(run.len(), Off::default());
        for (worst, run) in self.worst.iter_mut().zip(run) {
            worst.whole = worst.whole.max(run.whole);
            worst.row = worst.row.max(run.row);
        }
    }

    /// What output `i` is allowed; where no emulation has it, nothing is.
    pub(crate) fn bound(&self, i: usize) -> Bound {
        let of = |runs: &[Off]| runs.get(i).copied().unwrap_or_default();
        let nearest = of(self.nearest.as_deref().unwrap_or_default());
        let worst = of(&self.worst);
        Bound::Twice {
            rel_rms: (2.0 * nearest.whole).max(worst.whole),
            worst_token: 2.0 * nearest.row.max(worst.row),
            runs: 1 + self.stochastic,
        }
    }
}

/// The relative error of one output.
#[derive(Clone, Copy, Default)]
pub(crate) struct Off {
    whole: f64,
    row: f64,
}

impl Off {
    /// That of an emulation, as it is stored.
    pub(crate) fn new(name: &str, want: &View<'_>, run: &View<'_>, grid: Grid) -> Off {
        let dtype = match grid {
            Grid::Bf16 => Dtype::Bf16,
            Grid::F16 => Dtype::F16,
            Grid::Fp8 => Dtype::Fp8,
            Grid::F32 | Grid::Tf32 => Dtype::F32,
        };
        let stored = run.to_f64().into_iter().map(|x| f64::from(dtype.round(x as f32))).collect();
        let stored = ArrayD::from_shape_vec(want.shape(), stored).unwrap_or_default();
        let none = Bound::Relative { rel_rms: f64::MAX, worst_token: f64::MAX };
        let own = compare::views(name, want, &View::F64(stored.view()), none);
        Off { whole: own.rel_rms, row: own.worst_token }
    }
}

/// Holds an answer against the yardstick, and draws as many more runs as may acquit it.
///
/// # Errors
/// Those of `emulate`.
pub(crate) fn held<E>(
    yardstick: &mut Yardstick,
    emulate: &mut dyn FnMut(Rounding) -> Result<Vec<Off>, E>,
    against: &dyn Fn(&Yardstick) -> Vec<Finding>,
) -> Result<Vec<Finding>, E> {
    if yardstick.nearest.is_none() {
        yardstick.nearest = Some(emulate(Rounding::Nearest)?);
    }
    loop {
        let findings = against(yardstick);
        let acquitted = findings.iter().all(|finding| finding.ok);
        let hopeless = findings.iter().any(|finding| !finding.ok && hopeless(finding));
        if acquitted || hopeless || RUNS <= yardstick.stochastic {
            return Ok(findings);
        }
        yardstick.add(emulate(Rounding::Random(u64::from(yardstick.stochastic)))?);
    }
}

/// Whether no run of the plan will acquit it: one chain errs at most sixteen times as much as sixteen
/// partial sums do, rounding at random less than twice as much, and a thousandfold is beyond both.
fn hopeless(finding: &Finding) -> bool {
    !matches!(finding.bound, Bound::Twice { .. })
        || 0 < finding.not_finite
        || finding.unbounded
        || 1000.0 < finding.budget
}

/// The oracle's margins, and the most that the emulation has one of them off.
#[derive(Default)]
struct Margins {
    want: Vec<f64>,
    off: f64,
}

fn margins<O: Answer>(case: &Case<'_, O>, plain: &O::Outputs<f64>) -> Margins {
    let of = |outputs: &[(&'static str, View<'_>)]| {
        let found = outputs.iter().find(|(name, _)| *name == "margins");
        found.map(|(_, view)| view.to_f64()).unwrap_or_default()
    };
    let want = of(&plain.tensors());
    let emulated = emulated(case, None, Rounding::Nearest);
    let pairs = want.iter().zip(of(&emulated.tensors()));
    let off = pairs.map(|(want, got)| if *want == got { 0.0 } else { (want - got).abs() });
    Margins { off: off.fold(0.0, f64::max), want }
}

/// Experts that differ from the oracle's: legal where its margin is at most twice what the emulation is
/// off on either side.
fn swaps(
    forced: &View<'_>,
    got: &View<'_>,
    own: Option<&ArrayD<i64>>,
    margins: &Margins,
) -> Finding {
    let mut finding = compare::views("ids", forced, got, Bound::Exact);
    let (View::I64(got), Some(own)) = (got, own) else { return finding };
    let last = Axis(own.ndim() - 1);
    let (mut legal, mut illegal) = (0, 0);
    let rows = got.lanes(last).into_iter().zip(own.lanes(last));
    for ((got, own), &margin) in rows.zip(&margins.want) {
        if same_experts(&got, &own) {
            continue;
        }
        if margin <= 4.0 * margins.off {
            legal += 1;
        } else {
            illegal += 1;
        }
    }
    finding.over = illegal;
    finding.ok &= illegal == 0;
    finding.budget = if illegal == 0 { finding.budget } else { f64::INFINITY };
    finding.pattern = Some(format!("{legal} legal swaps, {illegal} illegal"));
    finding
}

#[cfg(test)]
mod tests {
    use golden::{
        Op, Plan, Rng, Spec, Variant, View,
        compare::{self, Finding},
        ops,
    };
    use ndarray::{Array2, array};
    use reference::real::Rounding;

    use super::{Off, RUNS, TOO_DEAR, Yardstick, held, is};
    use crate::{answer::Answer, guard, judge};

    /// What the relative rule says of a variant, and of one with each of its faults.
    fn judged<O: Answer>(
        variant: &dyn Variant<O>,
        spec: &str,
    ) -> (bool, Vec<(&'static str, bool)>) {
        let spec: Spec<O::Case> = spec.parse().unwrap();
        let inputs = O::inputs(&spec, &mut Rng::keyed(&format!("{}/{spec}", O::NAME), spec.seed));
        let ok = |variant: &dyn Variant<O>| {
            let got = guard::once(variant, &spec, &inputs).unwrap();
            let plan: Plan = variant.plan(&spec);
            let case = judge::Case::<O> { spec: &spec, inputs: &inputs, plan: &plan };
            let findings = case.judged_above(0, &got).0;
            let told = |finding: &golden::compare::Finding| {
                matches!(
                    finding.bound,
                    golden::compare::Bound::Twice { .. } | golden::compare::Bound::Exact
                )
            };
            assert!(findings.iter().all(told));
            findings.iter().all(|finding| finding.ok)
        };
        let planted =
            |plant: &golden::Plant| (plant.name, ok(&*variant.planted(plant.name).unwrap()));
        (ok(variant), variant.plants().iter().map(planted).collect())
    }

    /// The findings on rows that should be all ones, where emulations have the second row off by
    /// `emulated` of the rounding, and how many emulations there were.
    fn rows(got: &Array2<f64>, emulated: &dyn Fn(Rounding) -> f64) -> (Vec<Finding>, u32) {
        let want = Array2::ones((100, 2)).into_dyn();
        let mut all = Array2::ones((100, 2));
        all.slice_mut(ndarray::s![..2, ..]).assign(got);
        let (want, got) = (View::F64(want.view()), all.into_dyn());
        let mut emulate = |rounding| {
            let mut run = Array2::ones((100, 2));
            run.row_mut(0).fill(1.25);
            run.row_mut(1).fill(1.0 + emulated(rounding));
            let run = run.into_dyn();
            Ok::<_, String>(vec![Off::new(
                "out",
                &want,
                &View::F64(run.view()),
                golden::plan::Grid::F32,
            )])
        };
        let mut yardstick = Yardstick::default();
        let findings = held(&mut yardstick, &mut emulate, &|yardstick| {
            vec![compare::views("out", &want, &View::F64(got.view()), yardstick.bound(0))]
        });
        (findings.unwrap(), 1 + yardstick.stochastic)
    }

    #[test]
    fn a_row_is_held_against_as_many_runs_as_acquit_it() {
        let off = |x: f64| array![[1.0, 1.0], [1.0, 1.0 + x]];
        let late = |rounding| if rounding == Rounding::Random(2) { 0.6 } else { 0.125 };
        let (findings, runs) = rows(&off(0.6), &late);
        assert_eq!((findings[0].ok, runs), (true, 1));
        // Of one row, the root of half the square of 0.75 is above twice 0.25; the whole is not over.
        let (findings, runs) = rows(&off(0.75), &late);
        assert_eq!((findings[0].ok, runs), (true, 4));
        let (findings, runs) = rows(&off(0.75), &|_| 0.125);
        assert_eq!((findings[0].ok, runs), (false, 1 + RUNS));
        // The whole too: it may be as far off as the worst run, not twice as far.
        let (findings, runs) = rows(&off(0.9), &late);
        assert_eq!((findings[0].ok, runs), (true, 4));
        let (findings, runs) = rows(&off(1.0), &late);
        assert_eq!((findings[0].ok, runs), (false, 1 + RUNS));
        for wrong in [f64::NAN, 1e6] {
            let (findings, runs) = rows(&off(wrong), &late);
            assert_eq!((findings[0].ok, runs), (false, 1));
        }
    }

    #[test]
    fn honest_variants_pass_and_faults_do_not() {
        use optimized::cpu::{gated_delta_rule, linear, moe_router};
        // Odd sizes, so that what a fault does to a tail is there to be seen.
        for ((honest, planted), faults) in [
            (
                judged(linear::variants()[0], "N64-M48-D509"),
                &["ragged-tail-dropped", "split-k-in-bf16", "last-row-shifted", "uniform-scale"][..],
            ),
            (
                judged(moe_router::variants()[0], "N64-D128-E32-A4"),
                &["softmax-twice", "renormalise-flipped"],
            ),
            (
                judged(gated_delta_rule::variants()[0], "B1-T130-HK2-HV4-K32-V32;dtype=bf16"),
                &["not-normed", "no-delta-rule"],
            ),
        ] {
            assert!(honest);
            for fault in faults {
                assert!(planted.contains(&(fault, false)), "{fault}: {planted:?}");
            }
        }
    }

    #[test]
    fn a_problem_of_the_model_is_too_dear() {
        type Linear = ops::linear::Linear;
        let spec: Spec<<Linear as Op>::Case> = "N1-M2048-D2048".parse().unwrap();
        assert!(!is::<Linear>(&spec, TOO_DEAR));
    }
}
