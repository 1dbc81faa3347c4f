//! CUDA variants of `gdn_gates`.

use golden::{Plan, Variant, ops::gdn_gates::GdnGates};

use super::{
    entry::{Launch, threads},
    kernel::{CLAIMS, Cuda, any, chosen},
};
use crate::cpu::gdn_gates::PLANTS;

/// Every CUDA variant, plainest first.
#[inline(never)]
pub fn variants() -> &'static [&'static dyn Variant<GdnGates>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<GdnGates>] = &[&Cuda {
    name: "cuda/naive",
    source: kernels::GDN_GATES,
    launches: &[Launch::blocks("gdn_gates_naive", |n| threads(n.of("N") * n.of("HV")))],
    scratch: &[],
    unfit: any,
    plan: |_| Plan::F32,
    claims: CLAIMS,
    plants: &chosen(
        PLANTS,
        [
            "log-one-plus-exp",
            "softplus-overflows",
            "beta-in-bf16",
            "g-in-bf16",
            "rate-in-bf16",
            "dt-bias-after-softplus",
            "exp-missing",
            "a-b-swapped",
            "heads-rotated",
        ],
    ),
}];
