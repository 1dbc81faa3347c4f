//! CUDA variants of `sampling`.

use golden::{Plan, Variant, ops::sampling::Sampling};

use super::{
    entry::Launch,
    kernel::{CLAIMS, Cuda, any, chosen},
};
use crate::cpu::sampling::PLANTS;

/// Every CUDA variant, plainest first.
#[inline(never)]
pub fn variants() -> &'static [&'static dyn Variant<Sampling>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<Sampling>] = &[&Cuda {
    name: "cuda/naive",
    source: kernels::SAMPLING,
    launches: &[Launch::blocks("sampling_naive", |n| [n.of("N"), 1, 1])],
    scratch: &[],
    unfit: any,
    plan: |_| Plan::F32,
    claims: CLAIMS,
    plants: &chosen(
        PLANTS,
        [
            "temperature-multiplied",
            "top-k-one-more",
            "top-p-one-less",
            "top-p-one-more",
            "not-renormalised",
        ],
    ),
}];
