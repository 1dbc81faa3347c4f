//! CUDA variants of `moe_experts`.

use golden::{
    Dtype, Narrow, Plan, Plant, Variant,
    ops::moe_experts::MoeExperts,
    plan::{Grid, Site},
};

use super::{
    entry::{ACTIVATION_BYTES, Launch, MULTIPROCESSORS, Scratch, Sizes, pieces},
    hopper::{
        LAST_BLOCK_DROPPED, PIECES, SCALE_OF_NEIGHBOUR, TILE_SHARED, X_CODES, X_SCALES, groups,
        in_pieces, on_fp8_cores, on_tensor_cores, quantise, split, tile_threads, tiles_of_codes,
        uncoded, unread,
    },
    kernel::{CLAIMS, Cuda, any, chosen},
};
use crate::cpu::{linear::w8a8::SCALES, moe_experts::PLANTS};

/// Every CUDA variant, plainest first.
#[inline(never)]
pub fn variants() -> &'static [&'static dyn Variant<MoeExperts>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<MoeExperts>] = &[&NAIVE, &NAIVE_W8A8, &GEMV, &GEMM, &GEMM_W8A8];

const NAIVE: Cuda<MoeExperts> = Cuda {
    name: "cuda/naive",
    source: kernels::MOE_EXPERTS,
    launches: &[Launch::blocks("moe_experts_naive", |n| [n.of("N"), 1, 1])
        .sharing(|n| 4 * (n.of("F") + n.of("D")))],
    scratch: &[],
    unfit: any,
    plan: |spec| Plan::stored(spec.dtype),
    claims: CLAIMS,
    plants: &chosen(
        PLANTS,
        [
            "weight-on-input",
            "weights-not-applied",
            "weight-of-first-slot",
            "renormalised-again",
            "weights-in-bf16",
            "sum-in-bf16",
            "gate-up-swapped",
            "silu-on-product",
            "hidden-in-bf16",
            "hidden-in-f16",
        ],
    ),
};

/// Activations in FP8 as well, hidden ones too.
const NAIVE_W8A8: Cuda<MoeExperts> = Cuda {
    name: "cuda/naive-w8a8",
    source: kernels::MOE_EXPERTS_W8A8,
    launches: &[Launch::blocks("moe_experts_w8a8_naive", |n| [n.of("N"), 1, 1]).sharing(|n| {
        let (d, f) = (n.of("D"), n.of("F"));
        5 * (d + f) + 4 * (groups(d) + groups(f))
    })],
    unfit: |spec| (spec.weights != Some(Narrow::Fp8)).then_some("is for weights in FP8"),
    plan: |spec| Plan::stored(spec.dtype).w8a8(),
    plants: &{
        let [next, forgotten, end, quarter] = SCALES;
        let [applied, slot, swapped, silu] = chosen(
            PLANTS,
            ["weights-not-applied", "weight-of-first-slot", "gate-up-swapped", "silu-on-product"],
        );
        [next, forgotten, end, quarter, applied, slot, swapped, silu]
    },
    ..NAIVE
};

/// Few tokens: the experts of each are read for it.
const GEMV: Cuda<MoeExperts> = Cuda {
    name: "cuda/gemv",
    source: kernels::hopper::MOE_EXPERTS,
    launches: &[
        Launch::blocks("moe_experts_gemv_up", |n| [pieces(n.of("F"), 8), pairs(n), 1])
            .threads(|_| 128)
            .sharing(|_| 16_384),
        Launch::blocks("moe_experts_gemv_down", |n| [pieces(n.of("D"), 16), n.of("N"), 1])
            .threads(down_threads)
            .sharing(|n| 128 * (down_threads(n) + n.of("A"))),
    ],
    scratch: &[Scratch::new("hidden", |n| 6 * pairs(n) * n.of("F"))],
    unfit: |spec| unread(spec, &[spec.case.d, spec.case.f]),
    plan: |spec| on_tensor_cores(Plan::stored(spec.dtype), spec),
    claims: CLAIMS,
    plants: &HOPPER_PLANTS,
};

// What sorts slots by their experts, and what adds up those of a token.
const COUNT: Launch = Launch::blocks("moe_experts_count", |n| [chunks(n), 1, 1])
    .threads(|_| 512)
    .sharing(|n| 4 * n.of("EXPERTS"));
const OFFSETS: Launch = Launch::blocks("moe_experts_offsets", |_| [1, 1, 1]).threads(|_| 1024);
const PLACE: Launch = Launch::blocks("moe_experts_place", |n| [chunks(n), 1, 1]).threads(|_| 512);
const COMBINE: Launch = Launch::blocks("moe_experts_combine", |n| [n.of("N"), 1, 1]);

const COUNTS: Scratch = Scratch::new("counts", |n| 4 * chunks(n) * n.of("EXPERTS"));
const STARTS: Scratch = Scratch::new("offsets", |n| 4 * (n.of("EXPERTS") + 1));
const TILES: Scratch = Scratch::new("tiles", |n| 8 * (pieces(pairs(n), 128) + n.of("EXPERTS")));
const N_TILES: Scratch = Scratch::new("n_tiles", |_| 4);
const ORDER: Scratch = Scratch::new("order", |n| 4 * pairs(n));
const PARTS: Scratch = Scratch::new("parts", |n| n.of(ACTIVATION_BYTES) * pairs(n) * n.of("D"));

/// Many tokens: sorted by their experts.
const GEMM: Cuda<MoeExperts> = Cuda {
    name: "cuda/gemm",
    launches: &[
        COUNT,
        OFFSETS,
        PLACE,
        split("moe_experts_split"),
        Launch::blocks("moe_experts_gemm_up", |n| [n.of(MULTIPROCESSORS), 1, 1])
            .threads(tile_threads)
            .sharing(|_| TILE_SHARED),
        Launch::blocks("moe_experts_gemm_down", |n| [n.of(MULTIPROCESSORS), 1, 1])
            .threads(tile_threads)
            .sharing(|_| TILE_SHARED),
        COMBINE,
    ],
    scratch: &[
        COUNTS,
        STARTS,
        TILES,
        N_TILES,
        ORDER,
        PIECES,
        // In pieces too, where activations are.
        Scratch::new("passed", |n| 2 * if in_pieces(n) { 3 } else { 1 } * pairs(n) * n.of("F")),
        PARTS,
    ],
    unfit: |spec| {
        let many = (1024 < spec.case.e).then_some("is for 1024 experts at most");
        many.or(unread(spec, &[spec.case.d, spec.case.f]))
    },
    plan: |spec| {
        let plan = on_tensor_cores(Plan::stored(spec.dtype), spec);
        if spec.dtype == Dtype::Bf16 {
            plan.round(Site::ExpertHidden, Grid::Bf16).round(Site::ExpertOut, Grid::Bf16)
        } else {
            plan
        }
    },
    ..GEMV
};

/// The same, activations in FP8 as well, hidden ones too.
const GEMM_W8A8: Cuda<MoeExperts> = Cuda {
    name: "cuda/gemm-w8a8",
    launches: &[
        COUNT,
        OFFSETS,
        PLACE,
        quantise("moe_experts_w8a8_quantise"),
        tiles_of_codes("moe_experts_w8a8_up"),
        tiles_of_codes("moe_experts_w8a8_down"),
        COMBINE,
    ],
    scratch: &[
        COUNTS,
        STARTS,
        TILES,
        N_TILES,
        ORDER,
        X_CODES,
        X_SCALES,
        Scratch::new("hidden_codes", |n| pairs(n) * n.of("F")),
        Scratch::new("hidden_scales", |n| 4 * pairs(n) * groups(n.of("F"))),
        PARTS,
    ],
    unfit: |spec| {
        let many = (1024 < spec.case.e).then_some("is for 1024 experts at most");
        many.or(uncoded(spec, &[spec.case.d, spec.case.f]))
    },
    plan: |spec| {
        let plan = Plan { exp_ulps: 64.0, root_ulps: 4.0, ..on_fp8_cores(spec) };
        if spec.dtype == Dtype::Bf16 { plan.round(Site::ExpertOut, Grid::Bf16) } else { plan }
    },
    plants: &{
        let [next, forgotten, end, quarter] = SCALES;
        let [applied, dropped, shifted, neighbour, swapped] = HOPPER_PLANTS;
        [next, forgotten, end, quarter, applied, dropped, shifted, neighbour, swapped]
    },
    ..GEMM
};

const HOPPER_PLANTS: [Plant; 5] = {
    let [a, b] = chosen(PLANTS, ["weights-not-applied", "gate-up-swapped"]);
    let shifted = Plant {
        name: "rows-of-expert-shifted",
        what: "some experts' rows are read one off",
        cite: "https://github.com/meta-pytorch/applied-ai/issues/25",
    };
    [a, LAST_BLOCK_DROPPED, shifted, SCALE_OF_NEIGHBOUR, b]
};

/// Slots of all tokens.
fn pairs(n: &Sizes) -> i64 {
    n.of("N") * n.of("A")
}

/// Pairs are sorted so many together.
fn chunks(n: &Sizes) -> i64 {
    pieces(pairs(n), 1024)
}

fn down_threads(n: &Sizes) -> i64 {
    let experts = if n.of("N") == 1 { 64 } else { 32 };
    (experts * n.of("A")).min(704)
}
