//! CUDA variants of `l2_norm`.

use golden::{Plan, Variant, ops::l2_norm::L2Norm};

use super::{
    entry::Launch,
    kernel::{CLAIMS, Cuda, any, chosen},
};
use crate::cpu::l2_norm::PLANTS;

/// Every CUDA variant, plainest first.
#[inline(never)]
pub fn variants() -> &'static [&'static dyn Variant<L2Norm>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<L2Norm>] = &[&Cuda {
    name: "cuda/naive",
    source: kernels::L2_NORM,
    launches: &[Launch::blocks("l2_norm_naive", |n| [n.of("N"), 1, 1])],
    scratch: &[],
    unfit: any,
    plan: |spec| Plan::stored(spec.dtype),
    claims: CLAIMS,
    plants: &chosen(
        PLANTS,
        [
            "eps-on-mean",
            "eps-outside-root",
            "max-of-norm-and-eps",
            "eps-missing",
            "mean-not-sum",
            "factor-in-storage-type",
        ],
    ),
}];
