//! CUDA variants of `gated_delta_rule`.

use golden::{Plan, Variant, ops::gated_delta_rule::GatedDeltaRule};

use super::kernel::{CUT_ANYWHERE, Cuda, Launch, any, chosen};
use crate::cpu::gated_delta_rule::plants::RECURRENT;

/// Every CUDA variant, plainest first.
#[inline(never)]
pub fn variants() -> &'static [&'static dyn Variant<GatedDeltaRule>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<GatedDeltaRule>] = &[&Cuda {
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
}];
