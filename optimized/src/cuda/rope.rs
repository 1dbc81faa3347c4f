//! CUDA variants of `rope`.

use golden::{Plan, Variant, ops::rope::Rope};

use super::{
    entry::{Launch, threads},
    kernel::{CLAIMS, Cuda, any, chosen},
};
use crate::cpu::rope::PLANTS;

/// Every CUDA variant, plainest first.
#[inline(never)]
pub fn variants() -> &'static [&'static dyn Variant<Rope>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<Rope>] = &[&Cuda {
    name: "cuda/naive",
    source: kernels::ROPE,
    launches: &[Launch::blocks("rope_naive", |n| threads(n.of("N") * n.of("HQ") * n.of("H")))],
    scratch: &[],
    unfit: any,
    plan: |spec| Plan::stored(spec.dtype),
    claims: CLAIMS,
    plants: &chosen(
        PLANTS,
        [
            "interleaved-pairs",
            "turned-backwards",
            "yarn-factor-dropped",
            "yarn-factor-on-all-channels",
            "positions-in-bf16",
            "frequencies-in-bf16",
            "angle-in-bf16",
            "positions-from-one",
            "table-in-storage-type",
        ],
    ),
}];
