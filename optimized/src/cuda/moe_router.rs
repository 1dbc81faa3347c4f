//! CUDA variants of `moe_router`.

use golden::{Plan, Variant, ops::moe_router::MoeRouter};

use super::kernel::{CLAIMS, Cuda, Launch, any, chosen};
use crate::cpu::moe_router::PLANTS;

/// Every CUDA variant, plainest first.
#[inline(never)]
pub fn variants() -> &'static [&'static dyn Variant<MoeRouter>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<MoeRouter>] = &[&Cuda {
    name: "cuda/naive",
    source: kernels::MOE_ROUTER,
    launches: &[
        Launch::blocks("moe_router_naive", |n| [n.of("N"), 1, 1]).sharing(|n| 4 * n.of("EXPERTS"))
    ],
    scratch: &[],
    unfit: any,
    plan: |_| Plan::F32,
    claims: CLAIMS,
    plants: &chosen(
        PLANTS,
        [
            "logits-in-bf16",
            "softmax-twice",
            "softmax-without-maximum",
            "softmax-over-chosen",
            "renormalise-flipped",
            "sigmoid-for-softmax",
            "weights-shifted",
            "experts-off-by-one",
            "expert-tail-unseen",
        ],
    ),
}];
