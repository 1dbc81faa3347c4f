//! CUDA variants of `causal_conv1d`.

use golden::{Variant, ops::causal_conv1d::CausalConv1d};

use super::{
    entry::{Launch, threads},
    kernel::{CUT_ANYWHERE, Cuda, any, chosen},
};
use crate::cpu::causal_conv1d::{PLANTS, plan};

/// Every CUDA variant, plainest first.
#[inline(never)]
pub fn variants() -> &'static [&'static dyn Variant<CausalConv1d>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<CausalConv1d>] = &[&Cuda {
    name: "cuda/naive",
    source: kernels::CAUSAL_CONV1D,
    launches: &[
        Launch::blocks("causal_conv1d_naive", |n| threads(n.of("N") * n.of("C"))),
        Launch::blocks("causal_conv1d_state_naive", |n| threads(n.of("S") * n.of("C"))),
    ],
    scratch: &[],
    unfit: any,
    plan,
    claims: CUT_ANYWHERE,
    plants: &chosen(
        PLANTS,
        [
            "taps-flipped",
            "silu-missing",
            "boundaries-ignored",
            "state-ignored",
            "state-off-by-one",
            "short-step-state-lost",
            "oldest-column-dropped",
            "sum-in-storage-type",
        ],
    ),
}];
