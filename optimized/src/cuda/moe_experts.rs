//! CUDA variants of `moe_experts`.

use golden::{Plan, Variant, ops::moe_experts::MoeExperts};

use super::kernel::{CLAIMS, Cuda, Launch, any, chosen};
use crate::cpu::moe_experts::PLANTS;

/// Every CUDA variant, plainest first.
#[inline(never)]
pub fn variants() -> &'static [&'static dyn Variant<MoeExperts>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<MoeExperts>] = &[&Cuda {
    name: "cuda/naive",
    source: kernels::MOE_EXPERTS,
    launches: &[Launch::blocks("moe_experts_naive", |n| [n.of("N"), 1, 1])
        .sharing(|n| 4 * (n.of("F") + n.of("D")))],
    scratch: &[],
    unfit: any,
    plan: |spec| Plan::stored(spec.dtype),
    claims: CLAIMS,
    plants: &chosen(
        PLANTS,
        [
            "weight-on-input",
            "weights-not-applied",
            "weight-of-first-slot",
            "renormalised-again",
            "weights-in-bf16",
            "sum-in-bf16",
            "gate-up-swapped",
            "silu-on-product",
            "hidden-in-bf16",
            "hidden-in-f16",
        ],
    ),
}];
