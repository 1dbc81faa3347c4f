//! CUDA variants of `fp8_dequant`.

use golden::{Plan, Variant, ops::fp8_dequant::Fp8Dequant};

use super::{
    entry::{Launch, threads},
    kernel::{CLAIMS, Cuda, any, chosen},
};
use crate::cpu::fp8_dequant::PLANTS;

/// Every CUDA variant, plainest first.
#[inline(never)]
pub fn variants() -> &'static [&'static dyn Variant<Fp8Dequant>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<Fp8Dequant>] = &[&Cuda {
    name: "cuda/naive",
    source: kernels::FP8_DEQUANT,
    launches: &[Launch::blocks("fp8_dequant_naive", |n| threads(n.of("M") * n.of("D")))],
    scratch: &[],
    unfit: any,
    plan: |spec| Plan::stored(spec.dtype),
    claims: CLAIMS,
    plants: &chosen(
        PLANTS,
        [
            "divides-by-the-scale",
            "scales-transposed",
            "edge-takes-its-neighbour",
            "subnormals-flushed",
            "fnuz-bias",
            "scale-in-bf16",
        ],
    ),
}];
