//! What variants for Hopper share: the pipeline of products in `kernels/src/common/gemm.cuh`.

use golden::{Case, Dtype, Narrow, Plan, Plant, Spec};

use super::entry::{ACTIVATION_BYTES, Launch, Scratch, Sizes, WEIGHT_BYTES, threads};

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
