//! CUDA variants of `shared_expert`.

use golden::{Plan, Variant, ops::shared_expert::SharedExpert};

use super::{
    entry::Launch,
    kernel::{CLAIMS, Cuda, any, chosen},
};
use crate::cpu::shared_expert::PLANTS;

/// Every CUDA variant, plainest first.
#[inline(never)]
pub fn variants() -> &'static [&'static dyn Variant<SharedExpert>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<SharedExpert>] = &[&Cuda {
    name: "cuda/naive",
    source: kernels::SHARED_EXPERT,
    launches: &[
        Launch::blocks("shared_expert_naive", |n| [n.of("N"), 1, 1]).sharing(|n| 4 * n.of("F"))
    ],
    scratch: &[],
    unfit: any,
    plan: |spec| Plan::stored(spec.dtype),
    claims: CLAIMS,
    plants: &chosen(
        PLANTS,
        [
            "gate-missing",
            "gate-on-input",
            "gate-without-sigmoid",
            "gate-silu",
            "gate-of-first-token",
            "gate-overflows",
            "gate-up-swapped",
            "sigmoid-for-silu",
            "hidden-in-bf16",
        ],
    ),
}];
