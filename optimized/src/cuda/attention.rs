//! CUDA variants of `attention`.

use golden::{Plan, Variant, ops::attention::Attention};

use super::kernel::{CUT_ANYWHERE, Cuda, Launch, any, chosen};
use crate::cpu::attention::PLANTS;

/// Every CUDA variant, plainest first.
#[inline(never)]
pub fn variants() -> &'static [&'static dyn Variant<Attention>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<Attention>] = &[&Cuda {
    name: "cuda/naive",
    source: kernels::ATTENTION,
    launches: &[Launch::blocks("attention_naive", |n| [n.of("N") * n.of("HQ"), 1, 1])
        .threads(|_| 128)
        .sharing(|n| 4 * (2 * n.of("H") + 128))],
    scratch: &[],
    unfit: any,
    plan: |spec| Plan::stored(spec.dtype),
    claims: CUT_ANYWHERE,
    plants: &chosen(
        PLANTS,
        [
            "scale-missing",
            "scale-one-over-h",
            "mask-sees-next",
            "mask-hides-self",
            "cache-offset-ignored",
            "packed-as-one",
            "kv-head-modulo",
            "gate-missing",
            "gate-silu",
            "gate-overflows",
            "sum-not-rescaled",
            "maximum-not-subtracted",
            "probabilities-in-bf16",
            "scores-in-bf16",
        ],
    ),
}];
