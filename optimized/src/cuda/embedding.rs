//! CUDA variants of `embedding`.

use golden::{Plan, Variant, ops::embedding::Embedding};

use super::{
    entry::{Launch, threads},
    kernel::{CLAIMS, Cuda, any, chosen},
};
use crate::cpu::embedding::PLANTS;

/// Every CUDA variant, plainest first.
#[inline(never)]
pub fn variants() -> &'static [&'static dyn Variant<Embedding>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<Embedding>] = &[&Cuda {
    name: "cuda/naive",
    source: kernels::EMBEDDING,
    launches: &[Launch::blocks("embedding_naive", |n| threads(n.of("N") * n.of("D")))],
    scratch: &[],
    unfit: any,
    plan: |spec| Plan::stored(spec.dtype),
    claims: CLAIMS,
    plants: &chosen(
        PLANTS,
        ["row-off-by-one", "first-row-is-padding", "last-row-unwritten", "scaled"],
    ),
}];
