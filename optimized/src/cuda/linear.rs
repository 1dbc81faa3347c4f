//! CUDA variants of `linear`.

use golden::{Plan, Variant, ops::linear::Linear};

use super::kernel::{CLAIMS, Cuda, Launch, any, chosen, threads};
use crate::cpu::linear::PLANTS;

/// Every CUDA variant, plainest first.
#[inline(never)]
pub fn variants() -> &'static [&'static dyn Variant<Linear>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<Linear>] = &[&Cuda {
    name: "cuda/naive",
    source: kernels::LINEAR,
    launches: &[Launch::blocks("linear_naive", |n| threads(n.of("N") * n.of("M")))],
    scratch: &[],
    unfit: any,
    plan: |spec| Plan::stored(spec.dtype),
    claims: CLAIMS,
    plants: &chosen(
        PLANTS,
        [
            "ragged-tail-dropped",
            "split-k-in-bf16",
            "transposed-when-square",
            "last-row-shifted",
            "uniform-scale",
            "last-token-stale",
        ],
    ),
}];
