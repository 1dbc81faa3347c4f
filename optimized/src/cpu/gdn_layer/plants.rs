//! Faults of the layer's wiring.

use std::borrow::Cow;

use golden::Plant;

use super::{Planted, Sizes, Stored};

pub(super) const PLANTS: &[Plant] = &[
    Plant {
        name: "b-a-swapped",
        what: "the two halves of a group of in_proj_ba change places",
        cite: "https://github.com/vllm-project/vllm/issues/36242",
    },
    Plant {
        name: "ungrouped-ba",
        what: "in_proj_ba is read as all b, then all a",
        cite: "https://github.com/vllm-project/vllm/issues/35504",
    },
    Plant {
        name: "ungrouped-qkvz",
        what: "in_proj_qkvz is read as all queries, all keys, all values, all gates",
        cite: "https://github.com/ggml-org/llama.cpp/issues/16095",
    },
    Plant {
        name: "v-z-swapped",
        what: "values and gates of a group of in_proj_qkvz change places",
        cite: "https://github.com/NVIDIA-NeMo/Megatron-Bridge/issues/1068",
    },
    Plant {
        name: "q-k-swapped",
        what: "queries and keys change places",
        cite: "https://github.com/huggingface/transformers/issues/40963",
    },
    Plant {
        name: "taps-grouped",
        what: "the convolution's taps are taken in the grouped order of in_proj_qkvz",
        cite: "https://github.com/ggml-org/llama.cpp/issues/16095",
    },
    Plant {
        name: "window-lost",
        what: "a continuation starts from an empty convolution window",
        cite: "https://github.com/vllm-project/vllm/issues/53051",
    },
    Plant {
        name: "window-convolved",
        what: "the convolution window keeps what came out, not what went in",
        cite: "https://github.com/vllm-project/vllm/issues/39273",
    },
    Plant {
        name: "state-lost",
        what: "a continuation starts from a zero recurrent state",
        cite: "https://github.com/huggingface/transformers/issues/45513",
    },
    Plant {
        name: "neighbours-leak",
        what: "window and state run on from one packed sequence into the next",
        cite: "https://github.com/huggingface/transformers/issues/46859",
    },
    Plant {
        name: "heads-interleaved",
        what: "value head h reads key head h mod HK in place of h / (HV / HK)",
        cite: "https://github.com/huggingface/transformers/issues/41036",
    },
    Plant {
        name: "dt-bias-dropped",
        what: "dt_bias is left out of the gates",
        cite: "https://github.com/huggingface/transformers/issues/47831",
    },
    Plant {
        name: "beta-in-bf16",
        what: "the write strength is rounded to bf16, whatever the plan says",
        cite: "https://github.com/sgl-project/sglang/issues/38975",
    },
    Plant {
        name: "decay-in-bf16",
        what: "the log decay is rounded to bf16",
        cite: "https://github.com/ml-explore/mlx-swift-lm/issues/317",
    },
    Plant {
        name: "state-in-bf16",
        what: "the recurrent state is kept in bf16",
        cite: "https://github.com/vllm-project/vllm/issues/34489",
    },
    Plant {
        name: "norm-zero-centred",
        what: "the gated norm's weight is taken as one less than it is",
        cite: "https://github.com/jundot/omlx/issues/1507",
    },
    Plant {
        name: "norm-over-all-heads",
        what: "the gated norm runs over all heads of a token, not over each",
        cite: "https://github.com/jundot/omlx/issues/3750",
    },
    Plant {
        name: "gate-before-norm",
        what: "the output is gated first and normed then",
        cite: "https://github.com/ggml-org/llama.cpp/issues/16095",
    },
    Plant {
        name: "heads-innermost",
        what: "out_proj is fed channel by channel, the heads of each side by side",
        cite: "https://github.com/huggingface/transformers/issues/40963",
    },
];

/// The fault of a kernel that a plant of the layer stands for. No two kernels of the layer know a
/// fault by the same name, but for the boundaries of sequences.
pub(super) fn inside(plant: Planted) -> Planted {
    Planted(match plant.0 {
        Some("window-lost") => Some("state-ignored"),
        Some("window-convolved") => Some("state-after-silu"),
        Some("state-lost") => Some("initial-state-ignored"),
        Some("neighbours-leak") => Some("boundaries-ignored"),
        Some("heads-interleaved") => Some("heads-interleaved"),
        Some("beta-in-bf16") => Some("beta-in-bf16"),
        Some("decay-in-bf16") => Some("g-in-bf16"),
        Some("state-in-bf16") => Some("state-in-bf16"),
        Some("gate-before-norm") => Some("gate-before-norm"),
        _ => None,
    })
}

/// Taps as the convolution reads them, `[W, C]`.
pub(super) fn taps(taps: &[f32], Sizes { hk, hv, k, v }: Sizes, plant: Planted) -> Cow<'_, [f32]> {
    if !plant.is("taps-grouped") {
        return Cow::Borrowed(taps);
    }
    let own = hv / hk * v;
    // Where each ungrouped channel stands among groups of [q K | k K | v (HV/HK) V].
    let part = |from: usize, width: usize| {
        (0..hk).flat_map(move |j| (0..width).map(move |i| j * (2 * k + own) + from + i))
    };
    let order: Vec<usize> = part(0, k).chain(part(k, k)).chain(part(2 * k, own)).collect();
    taps.chunks(order.len()).flat_map(|taps| order.iter().map(|&at| taps[at])).collect()
}

/// `dt_bias` as the gates read it, `[HV]`.
pub(super) fn dt_bias(dt_bias: &[f32], plant: Planted) -> Cow<'_, [f32]> {
    if plant.is("dt-bias-dropped") { vec![0.0; dt_bias.len()].into() } else { dt_bias.into() }
}

/// The weight of the gated norm: one head's, or (to norm over all of them) all heads'.
pub(super) fn norm(norm: &[f32], hv: usize, plant: Planted) -> Cow<'_, [f32]> {
    match plant.0 {
        Some("norm-zero-centred") => norm.iter().map(|w| 1.0 + w).collect(),
        Some("norm-over-all-heads") => norm.repeat(hv).into(),
        _ => Cow::Borrowed(norm),
    }
}

/// What goes into `out_proj`, `[N, HV, V]`.
pub(super) fn reorder<E: Stored>(gated: &mut [E], hv: usize, v: usize, plant: Planted) {
    if plant.is("heads-innermost") {
        for token in gated.chunks_mut(hv * v) {
            let before = token.to_vec();
            (0..hv * v).for_each(|i| token[i] = before[i % hv * v + i / hv]);
        }
    }
}
