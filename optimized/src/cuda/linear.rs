//! CUDA variants of `linear`.

use golden::{
    Claims, Narrow, Plan, Plant, Spec, Variant,
    ops::linear::{Case, Linear},
};

use super::{
    entry::{Launch, MULTIPROCESSORS, Sizes, THREADS, WEIGHT_BYTES, pieces, threads},
    hopper::{
        LAST_BLOCK_DROPPED, PIECES, SCALE_OF_NEIGHBOUR, TILE_SHARED, X_CODES, X_SCALES, groups,
        on_fp8_cores, on_tensor_cores, quantise, split, tile_threads, tiles_of_codes, uncoded,
        unread,
    },
    kernel::{CLAIMS, Cuda, any, chosen},
};
use crate::cpu::linear::{PLANTS, w8a8::SCALES};

/// Every CUDA variant, plainest first.
#[inline(never)]
pub fn variants() -> &'static [&'static dyn Variant<Linear>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<Linear>] =
    &[&NAIVE, &NAIVE_W8A8, &GEMV, &GEMV_32, &GEMM, &GEMM_W8A8];

const NAIVE: Cuda<Linear> = Cuda {
    name: "cuda/naive",
    source: kernels::LINEAR,
    launches: &[Launch::blocks("linear_naive", |n| threads(n.of("N") * n.of("M")))],
    scratch: &[],
    unfit: any,
    plan: |spec| Plan::stored(spec.dtype),
    claims: CLAIMS,
    plants: &chosen(
        PLANTS,
        [
            "ragged-tail-dropped",
            "split-k-in-bf16",
            "transposed-when-square",
            "last-row-shifted",
            "uniform-scale",
            "last-token-stale",
        ],
    ),
};

/// Activations in FP8 as well.
const NAIVE_W8A8: Cuda<Linear> = Cuda {
    name: "cuda/naive-w8a8",
    source: kernels::LINEAR_W8A8,
    launches: &[
        Launch::blocks("linear_w8a8_groups", |n| threads(n.of("N") * groups(n.of("D")))),
        Launch::blocks("linear_w8a8_naive", |n| threads(n.of("N") * n.of("M"))),
    ],
    scratch: &[X_CODES, X_SCALES],
    unfit: |spec| (spec.weights != Some(Narrow::Fp8)).then_some("is for weights in FP8"),
    plan: |spec| Plan::stored(spec.dtype).w8a8(),
    plants: &{
        let [next, forgotten, end, quarter] = SCALES;
        let [row, token] = chosen(PLANTS, ["last-row-shifted", "last-token-stale"]);
        [next, forgotten, end, quarter, SCALE_OF_NEIGHBOUR, row, token]
    },
    ..NAIVE
};

/// Few rows: weights are read once for eight of them.
const GEMV: Cuda<Linear> = Cuda {
    name: "cuda/gemv",
    source: kernels::hopper::LINEAR,
    launches: &[Launch::blocks("linear_gemv", |n| {
        // Blocks of codes take twice as many rows where there are enough of these.
        let twice = n.of(WEIGHT_BYTES) == 1 && 12_288 <= n.of("M");
        [pieces(n.of("M"), if twice { 32 } else { 16 }), pieces(n.of("N"), 8), 1]
    })
    .threads(gemv_threads)
    // 128 bytes of weights a thread, and 16 of each of three pieces of activations.
    .sharing(|n| gemv_threads(n) * (128 + 3 * 16))],
    scratch: &[],
    unfit,
    plan: |spec| on_tensor_cores(Plan::stored(spec.dtype), spec),
    // Activations in f32 are summed in another order of one or two rows than of more.
    claims: Claims { batch_invariant: false, ..CLAIMS },
    plants: &HOPPER_PLANTS,
};

/// The same of 32 rows.
const GEMV_32: Cuda<Linear> = Cuda {
    name: "cuda/gemv32",
    launches: &[Launch::blocks("linear_gemv_32", |n| {
        [pieces(n.of("M"), 16), pieces(n.of("N"), 32), 1]
    })
    .sharing(|_| THREADS * (128 + 3 * 64))],
    claims: CLAIMS,
    ..GEMV
};

/// Many rows.
const GEMM: Cuda<Linear> = Cuda {
    name: "cuda/gemm",
    launches: &[
        split("linear_split"),
        Launch::blocks("linear_gemm", |n| [n.of(MULTIPROCESSORS), 1, 1])
            .threads(tile_threads)
            .sharing(|_| TILE_SHARED),
    ],
    scratch: &[PIECES],
    claims: CLAIMS,
    plants: {
        // Tiles do not shift a row.
        let [all @ .., _] = &HOPPER_PLANTS;
        all
    },
    ..GEMV
};

/// The same, activations in FP8 as well.
const GEMM_W8A8: Cuda<Linear> = Cuda {
    name: "cuda/gemm-w8a8",
    launches: &[quantise("linear_w8a8_quantise"), tiles_of_codes("linear_w8a8_gemm")],
    scratch: &[X_CODES, X_SCALES],
    unfit: |spec| uncoded(spec, &[spec.case.d]),
    plan: on_fp8_cores,
    plants: &{
        let [next, forgotten, end, quarter] = SCALES;
        let [token] = chosen(PLANTS, ["last-token-stale"]);
        [next, forgotten, end, quarter, LAST_BLOCK_DROPPED, SCALE_OF_NEIGHBOUR, token]
    },
    ..GEMM
};

const HOPPER_PLANTS: [Plant; 5] = {
    let [scale, token, row] =
        chosen(PLANTS, ["uniform-scale", "last-token-stale", "last-row-shifted"]);
    [LAST_BLOCK_DROPPED, SCALE_OF_NEIGHBOUR, scale, token, row]
};

/// Many rows of weights need few warps each.
fn gemv_threads(n: &Sizes) -> i64 {
    if 6400 <= n.of("M") { 128 } else { 512 }
}

fn unfit(spec: &Spec<Case>) -> Option<&'static str> {
    unread(spec, &[spec.case.d])
}
