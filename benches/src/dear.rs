//! Problems for which a dozen runs are too dear: the rule is relative.
//!
//! The error against the oracle, of the whole and of the worst row, is at most twice that of the reference
//! when it rounds to the nearest as the plan says, outputs rounded to what they are stored in. Two runs
//! instead of thirteen, and of no single element is anything known.

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
    let emulated = under(case.plan, None, Rounding::Nearest, || {
        O::answer(&O::wide::<Planned>(case.inputs), case.plan.form, experts)
    });
    let emulated = emulated.tensors();
    let mut findings = Vec::new();
    for ((name, want), (_, emulated)) in want.tensors().iter().zip(&emulated) {
        if O::TOLD.contains(name) {
            continue;
        }
        let nothing = View::F64(ndarray::ArrayViewD::from_shape(vec![0], &[]).expect("nothing"));
        let got = got.iter().find(|(other, _)| other == name).map_or(&nothing, |(_, view)| view);
        if *name == "ids" && swapped {
            findings.push(swaps(want, got, own.as_ref(), &margins(case, &plain)));
            continue;
        }
        let bound = twice(name, want, emulated, O::grid(name, case.plan));
        findings.push(compare::views(name, want, got, bound));
    }
    findings
}

/// Twice the error of the emulation, as it is stored.
pub(crate) fn twice(name: &str, want: &View<'_>, emulated: &View<'_>, grid: Grid) -> Bound {
    let dtype = match grid {
        Grid::Bf16 => Dtype::Bf16,
        Grid::F16 => Dtype::F16,
        Grid::Fp8 => Dtype::Fp8,
        Grid::F32 | Grid::Tf32 => Dtype::F32,
    };
    let stored = emulated.to_f64().into_iter().map(|x| f64::from(dtype.round(x as f32))).collect();
    let stored = ArrayD::from_shape_vec(want.shape(), stored).unwrap_or_default();
    let none = Bound::Relative { rel_rms: f64::MAX, worst_token: f64::MAX };
    let own = compare::views(name, want, &View::F64(stored.view()), none);
    Bound::Twice { rel_rms: 2.0 * own.rel_rms, worst_token: 2.0 * own.worst_token }
}

/// The oracle's margins, and the most that the emulation has one of them off.
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
    let emulated = under(case.plan, None, Rounding::Nearest, || {
        O::answer(&O::wide::<Planned>(case.inputs), case.plan.form, None)
    });
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
    use golden::{Op, Plan, Rng, Spec, Variant, ops};

    use super::{TOO_DEAR, is};
    use crate::{answer::Answer, guard, judge, registry::OPS};

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

    #[test]
    fn honest_variants_pass_and_faults_do_not() {
        use optimized::cpu::{gated_delta_rule, linear, moe_router};
        // Odd sizes, so that what a fault does to a tail is there to be seen.
        for ((honest, planted), faults) in [
            (
                judged(linear::VARIANTS[0], "N64-M48-D509"),
                &["ragged-tail-dropped", "split-k-in-bf16", "last-row-shifted", "uniform-scale"][..],
            ),
            (
                judged(moe_router::VARIANTS[0], "N64-D128-E32-A4"),
                &["softmax-twice", "renormalise-flipped"],
            ),
            (
                judged(gated_delta_rule::VARIANTS[0], "B1-T130-HK2-HV4-K32-V32;dtype=bf16"),
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
        let dear = OPS.iter().flat_map(|op| {
            let specs = op.specs(golden::Set::Nightly).into_iter();
            specs.filter(|spec| op.parse(spec).is_ok_and(|parsed| TOO_DEAR <= parsed.cost.flops))
        });
        assert_ne!(dear.count(), 0);
    }
}
