//! What variants for Hopper share: the pipeline of products in `kernels/src/common/gemm.cuh`.

use golden::{Case, Dtype, Narrow, Plan, Plant, Spec, plan::Sums};

use super::entry::{
    ACTIVATION_BYTES, Launch, MULTIPROCESSORS, Scratch, Sizes, WEIGHT_BYTES, pieces, threads,
};

/// Bytes of shared memory of a block of the pipeline.
pub(super) const TILE_SHARED: i64 = 231_424;

/// Threads of a block of the pipeline; where weights are codes, two more warps in four write them out.
pub(super) fn tile_threads(n: &Sizes) -> i64 {
    if n.of(WEIGHT_BYTES) == 1 { 512 } else { 384 }
}

/// Whether activations are f32: tensor cores read them as three pieces in bf16.
pub(super) fn in_pieces(n: &Sizes) -> bool {
    n.of(ACTIVATION_BYTES) == 4
}

/// Those pieces, `[3, N, D]`.
pub(super) const PIECES: Scratch =
    Scratch::new("pieces", |n| if in_pieces(n) { 6 * n.of("N") * n.of("D") } else { 0 });

/// The kernel that makes them.
pub(super) const fn split(entry: &'static str) -> Launch {
    Launch::blocks(entry, |n| threads(n.of("N") * n.of("D"))).of(|build| build.activations == "f32")
}

/// A plan on tensor cores, which multiply 16 channels in a step. Activations in f32 are three pieces of one
/// sum: three steps for 16 channels.
pub(super) fn on_tensor_cores(plan: Plan, spec: &Spec<impl Case>) -> Plan {
    plan.truncated(if spec.dtype == Dtype::F32 { 5 } else { 16 })
}

/// Codes of activations, `[N, D]`.
pub(super) const X_CODES: Scratch = Scratch::new("x_codes", |n| n.of("N") * n.of("D"));

/// Scales of their groups of 128 channels.
pub(super) const X_SCALES: Scratch =
    Scratch::new("x_scales", |n| 4 * n.of("N") * groups(n.of("D")));

/// Groups of so many channels.
pub(super) fn groups(channels: i64) -> i64 {
    pieces(channels, 128)
}

/// The kernel that makes codes, half a warp for a group.
pub(super) const fn quantise(entry: &'static str) -> Launch {
    Launch::blocks(entry, |n| [pieces(n.of("N") * groups(n.of("D")), 16), 1, 1])
}

/// A kernel of tiles of codes.
pub(super) const fn tiles_of_codes(entry: &'static str) -> Launch {
    Launch::blocks(entry, |n| [n.of(MULTIPROCESSORS), 1, 1])
        .threads(|_| 384)
        .sharing(|_| TILE_SHARED)
}

/// A plan of activations in FP8 on tensor cores.
pub(super) fn on_fp8_cores(spec: &Spec<impl Case>) -> Plan {
    Plan { sums: Sums::Fp22, ..Plan::stored(spec.dtype).w8a8() }
}

/// Why products of so many channels are not those of codes, if so.
pub(super) fn uncoded(spec: &Spec<impl Case>, channels: &[usize]) -> Option<&'static str> {
    match spec.weights {
        Some(Narrow::Fp8) => unread(spec, channels),
        _ => Some("is for weights in FP8"),
    }
}

/// Why products of so many channels are not those that the pipeline reads, if so.
pub(super) fn unread(spec: &Spec<impl Case>, channels: &[usize]) -> Option<&'static str> {
    let whole = |by: usize| channels.iter().all(|n| n.is_multiple_of(by));
    match spec.weights {
        None if spec.dtype == Dtype::Bf16 => {
            (!whole(8)).then_some("is for channels in multiples of 8")
        }
        Some(Narrow::Fp8) if spec.dtype != Dtype::F16 => {
            (!whole(16)).then_some("is for channels in multiples of 16")
        }
        _ => Some("is for weights in bf16 or FP8"),
    }
}

pub(super) const LAST_BLOCK_DROPPED: Plant = Plant {
    name: "last-block-dropped",
    what: "the last 64 input channels are not summed",
    cite: "https://github.com/huggingface/transformers/issues/40963",
};

pub(super) const SCALE_OF_NEIGHBOUR: Plant = Plant {
    name: "scale-of-neighbour",
    what: "a block of 128 rows of codes is scaled as the next one",
    cite: "https://github.com/ROCm/aiter/issues/5233",
};
