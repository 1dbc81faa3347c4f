//! CUDA variants of `rms_norm`.

use golden::{Variant, ops::rms_norm::RmsNorm};

use super::{
    entry::Launch,
    kernel::{CLAIMS, Cuda, any, chosen},
};
use crate::cpu::rms_norm::{PLANTS, plan};

/// Every CUDA variant, plainest first.
#[inline(never)]
pub fn variants() -> &'static [&'static dyn Variant<RmsNorm>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<RmsNorm>] = &[&Cuda {
    name: "cuda/naive",
    source: kernels::RMS_NORM,
    launches: &[Launch::blocks("rms_norm_naive", |n| [n.of("N"), 1, 1])],
    scratch: &[],
    unfit: any,
    plan,
    claims: CLAIMS,
    plants: &chosen(
        PLANTS,
        [
            "missing-plus-one",
            "eps-outside-root",
            "one-plus-weight-in-bf16",
            "residual-not-returned",
        ],
    ),
}];
