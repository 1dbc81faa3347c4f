//! CUDA variants of `moe_router`.

use golden::{Dtype, Plan, Plant, Variant, ops::moe_router::MoeRouter};

use super::{
    entry::{Launch, MULTIPROCESSORS, THREADS, pieces},
    hopper::{LAST_BLOCK_DROPPED, TILE_SHARED, on_tensor_cores},
    kernel::{CLAIMS, Cuda, any, chosen},
};
use crate::cpu::moe_router::PLANTS;

/// Every CUDA variant, plainest first.
#[inline(never)]
pub fn variants() -> &'static [&'static dyn Variant<MoeRouter>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<MoeRouter>] = &[&NAIVE, &GEMV, &GEMM];

const NAIVE: Cuda<MoeRouter> = Cuda {
    name: "cuda/naive",
    source: kernels::MOE_ROUTER,
    launches: &[
        Launch::blocks("moe_router_naive", |n| [n.of("N"), 1, 1]).sharing(|n| 4 * n.of("EXPERTS"))
    ],
    scratch: &[],
    unfit: any,
    plan: |_| Plan::F32,
    claims: CLAIMS,
    plants: &chosen(
        PLANTS,
        [
            "logits-in-bf16",
            "softmax-twice",
            "softmax-without-maximum",
            "softmax-over-chosen",
            "renormalise-flipped",
            "sigmoid-for-softmax",
            "weights-shifted",
            "experts-off-by-one",
            "expert-tail-unseen",
        ],
    ),
};

/// Few tokens.
const GEMV: Cuda<MoeRouter> = Cuda {
    name: "cuda/gemv",
    source: kernels::hopper::MOE_ROUTER,
    launches: &[
        Launch::blocks("moe_router_gemv", |n| {
            [pieces(n.of("EXPERTS"), 16), pieces(n.of("N"), 8), 1]
        })
        .sharing(|_| 144 * THREADS),
        CHOOSE,
    ],
    scratch: &[],
    unfit: |spec| {
        if spec.dtype != Dtype::Bf16 {
            Some("is for bf16")
        } else if !spec.case.d.is_multiple_of(8) {
            Some("is for channels in multiples of 8")
        } else {
            (1024 < spec.case.e || 32 <= spec.case.a)
                .then_some("is for 1024 experts at most, fewer than 32 of them for a token")
        }
    },
    plan: |spec| on_tensor_cores(Plan::F32, spec),
    claims: CLAIMS,
    plants: &HOPPER_PLANTS,
};

/// Many tokens.
const GEMM: Cuda<MoeRouter> = Cuda {
    name: "cuda/gemm",
    launches: &[
        Launch::blocks("moe_router_gemm", |n| [n.of(MULTIPROCESSORS), 1, 1])
            .threads(|_| 384)
            .sharing(|_| TILE_SHARED),
        CHOOSE,
    ],
    ..GEMV
};

const CHOOSE: Launch =
    Launch::blocks("moe_router_choose", |n| [pieces(n.of("N"), 4), 1, 1]).threads(|_| 128);

const HOPPER_PLANTS: [Plant; 5] = {
    let [a, b, c, d] = chosen(
        PLANTS,
        ["renormalise-flipped", "weights-shifted", "experts-off-by-one", "expert-tail-unseen"],
    );
    [LAST_BLOCK_DROPPED, a, b, c, d]
};
