//! CUDA variants of `rms_norm_gated`.

use golden::{Plan, Variant, ops::rms_norm_gated::RmsNormGated};

use super::{
    entry::Launch,
    kernel::{CLAIMS, Cuda, any, chosen},
};
use crate::cpu::rms_norm_gated::PLANTS;

/// Every CUDA variant, plainest first.
#[inline(never)]
pub fn variants() -> &'static [&'static dyn Variant<RmsNormGated>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<RmsNormGated>] = &[&Cuda {
    name: "cuda/naive",
    source: kernels::RMS_NORM_GATED,
    launches: &[Launch::blocks("rms_norm_gated_naive", |n| [n.of("N"), 1, 1])],
    scratch: &[],
    unfit: any,
    plan: |spec| Plan::stored(spec.dtype),
    claims: CLAIMS,
    plants: &chosen(
        PLANTS,
        [
            "zero-centred",
            "gate-before-norm",
            "sigmoid-gate",
            "eps-outside-root",
            "sum-not-mean",
            "sigmoid-overflows",
            "norm-in-storage-type",
        ],
    ),
}];
