//! CUDA variants of `gated_delta_rule`.

use golden::{
    Claims, Dtype, Plan, Plant, Spec, Variant,
    ops::gated_delta_rule::{Case, GatedDeltaRule},
    plan::{Form, Grid, Site},
};

use super::{
    entry::{Launch, MULTIPROCESSORS, Scratch, Sizes},
    kernel::{CLAIMS, CUT_ANYWHERE, Cuda, any, chosen},
};
use crate::cpu::gated_delta_rule::plants::RECURRENT;

/// Every CUDA variant, plainest first.
#[inline(never)]
pub fn variants() -> &'static [&'static dyn Variant<GatedDeltaRule>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<GatedDeltaRule>] = &[
    &Cuda {
        name: "cuda/naive",
        source: kernels::GATED_DELTA_RULE,
        launches: &[Launch::blocks("gated_delta_rule_naive", |n| {
            [n.of("S") * n.of("HV"), n.of("V").div_euclid(64) + i64::from(n.of("V") % 64 != 0), 1]
        })
        .threads(|_| 64)
        .sharing(|n| 4 * 2 * n.of("K"))],
        scratch: &[],
        unfit: any,
        plan: |spec| Plan::stored(spec.dtype),
        claims: CUT_ANYWHERE,
        plants: &chosen(
            RECURRENT,
            [
                "decay-dropped-at-each-chunk",
                "gate-off-by-one",
                "no-delta-rule",
                "beta-on-value-only",
                "heads-interleaved",
                "eps-on-mean",
                "eps-outside-root",
                "not-normed",
                "query-not-scaled",
                "state-in-bf16",
                "beta-in-bf16",
                "initial-state-ignored",
                "prediction-before-decay",
                "answer-before-write",
            ],
        ),
    },
    &Cuda {
        name: "cuda/chunk",
        source: kernels::hopper::GATED_DELTA_RULE,
        launches: &[
            Launch::blocks("gated_delta_rule_chunk_prepare", |n| {
                let pairs = (n.of("HV") / n.of("HK") + 1) / 2;
                if ahead(n) == 0 { [n.of("HK"), slots(n), pairs] } else { [0; 3] }
            })
            .sharing(|_| 66_560),
            Launch::blocks("gated_delta_rule_chunk_ahead", |n| [ahead(n), 1, 1])
                .threads(|_| 768)
                .sharing(|_| 199_680),
            Launch::blocks("gated_delta_rule_chunk_walk", |n| [n.of("S") * n.of("HV"), 2, 1])
                .threads(|_| 384)
                .sharing(|_| 185_344)
                .passing(&[("along", |n| i64::from(ahead(n) != 0))])
                .early(),
        ],
        scratch: &[
            Scratch::new("work", |n| slots(n) * n.of("HV") * 17_408),
            Scratch::zero("ready", |n| slots(n) * n.of("HV") * 4),
        ],
        unfit,
        plan: in_chunks,
        claims: Claims { cuts: Some(64), ..CLAIMS },
        plants: &HOPPER_PLANTS,
    },
    &Cuda {
        name: "cuda/fused",
        source: kernels::hopper::GATED_DELTA_RULE_FUSED,
        launches: &[Launch::blocks("gated_delta_rule_fused", |n| [n.of("S") * n.of("HV"), 1, 1])
            .threads(|_| 512)
            .sharing(|_| 228_352)],
        scratch: &[],
        unfit,
        plan: in_chunks,
        claims: Claims { cuts: Some(64), ..CLAIMS },
        plants: &HOPPER_PLANTS,
    },
    &Cuda {
        name: "cuda/few",
        source: kernels::hopper::GATED_DELTA_RULE_FEW,
        launches: &[Launch::blocks("gated_delta_rule_few", |n| [n.of("S") * n.of("HV"), 4, 1])
            .threads(|_| 128)],
        scratch: &[],
        unfit: |spec: &Spec<Case>| {
            let fits = (spec.case.k, spec.case.v) == (128, 128);
            (!fits).then_some("is for K = V = 128")
        },
        plan: |spec| Plan::stored(spec.dtype),
        claims: CUT_ANYWHERE,
        plants: &HOPPER_PLANTS,
    },
];

/// Faults that `kernels/src/common/delta_rule.cuh` knows.
const HOPPER_PLANTS: [Plant; 12] = chosen(
    RECURRENT,
    [
        "decay-dropped-at-each-chunk",
        "gate-off-by-one",
        "no-delta-rule",
        "beta-on-value-only",
        "eps-on-mean",
        "eps-outside-root",
        "not-normed",
        "query-not-scaled",
        "state-in-bf16",
        "initial-state-ignored",
        "prediction-before-decay",
        "answer-before-write",
    ],
);

/// Chunks in all, at the most.
fn slots(n: &Sizes) -> i64 {
    n.of("N") / 64 + n.of("S")
}

/// Blocks that prepare while the walk goes on, each on a multiprocessor of its own.
fn ahead(n: &Sizes) -> i64 {
    preparing(n.of(MULTIPROCESSORS), n.of("S") * n.of("HV"))
}

/// Of so many multiprocessors those that `gated_delta_rule_chunk_ahead` gets beside the walk of so many heads,
/// which takes two each. Where there are few, none: all is prepared before. On an H200 a chunk of a head takes one of
/// those that stay 1.7 µs, one of all 1.5, and its walk 1.03, so that both ways are as long at 1.15 to a head.
pub(super) fn preparing(multiprocessors: i64, heads: i64) -> i64 {
    let left = multiprocessors - 2 * heads;
    if 8 * heads <= 7 * left { left } else { 0 }
}

/// Chunks whose blocks of tokens are inverted and multiplied before the state is known.
fn in_chunks(_: &Spec<Case>) -> Plan {
    let sites = [Site::WyInverse, Site::WyValues, Site::WyScores];
    let plan = Plan { form: Form::Prefixed(64), dot: Grid::Bf16, output: Grid::Bf16, ..Plan::F32 };
    let plan = plan.truncated(16);
    sites.into_iter().fold(plan, |plan, site| plan.round(site, Grid::Bf16))
}

fn unfit(spec: &Spec<Case>) -> Option<&'static str> {
    let fits = spec.dtype == Dtype::Bf16 && (spec.case.k, spec.case.v) == (128, 128);
    (!fits).then_some("is for bf16, K = V = 128")
}
