//! CUDA variants of `lm_head`.

use golden::{Plan, Variant, ops::lm_head::LmHead};

use super::{
    entry::{Launch, threads},
    kernel::{CLAIMS, Cuda, any, chosen},
};
use crate::cpu::lm_head::PLANTS;

/// Every CUDA variant, plainest first.
#[inline(never)]
pub fn variants() -> &'static [&'static dyn Variant<LmHead>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<LmHead>] = &[&Cuda {
    name: "cuda/naive",
    source: kernels::LM_HEAD,
    launches: &[Launch::blocks("lm_head_naive", |n| threads(n.of("N") * n.of("M")))],
    scratch: &[],
    unfit: any,
    plan: |_| Plan::F32,
    claims: CLAIMS,
    plants: &chosen(
        PLANTS,
        [
            "logits-in-bf16",
            "ragged-tail-dropped",
            "vocabulary-tail-zero",
            "shard-shifted",
            "last-token-stale",
            "activations-in-bf16",
        ],
    ),
}];
