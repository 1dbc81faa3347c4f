//! Faults of the layer's wiring.

use std::borrow::Cow;

use golden::Plant;

use super::{HONEST, Planted, Stored, rope};

pub(super) const PLANTS: &[Plant] = &[
    Plant {
        name: "query-gate-ungrouped",
        what: "q_proj is read as all queries, then all gates",
        cite: "https://github.com/ggml-org/llama.cpp/issues/16095",
    },
    Plant {
        name: "gate-missing",
        what: "the output is not gated",
        cite: "https://github.com/NVIDIA-NeMo/Megatron-Bridge/issues/1068",
    },
    Plant {
        name: "norm-after-rope",
        what: "queries and keys are rotated first and normed then",
        cite: "https://github.com/ggml-org/llama.cpp/issues/16095",
    },
    Plant {
        name: "norm-over-all-heads",
        what: "the norms run over all heads of a token, not over each",
        cite: "https://github.com/huggingface/transformers/issues/40963",
    },
    Plant {
        name: "norm-missing-plus-one",
        what: "the norms multiply by their weights as they are stored",
        cite: "https://github.com/warpfront/hipfire/issues/228",
    },
    Plant {
        name: "norms-swapped",
        what: "queries get the norm of keys, and keys that of queries",
        cite: "https://github.com/NVIDIA-NeMo/Megatron-Bridge/issues/1068",
    },
    Plant {
        name: "rope-on-values",
        what: "values are rotated as keys are",
        cite: "https://github.com/ggml-org/llama.cpp/issues/16095",
    },
    Plant {
        name: "rope-interleaved",
        what: "neighbouring channels are turned together in place of the halves",
        cite: "https://github.com/NVIDIA-NeMo/Automodel/issues/3233",
    },
    Plant {
        name: "yarn-factor-dropped",
        what: "cosine and sine are not scaled",
        cite: "https://github.com/jundot/omlx/issues/3347",
    },
    Plant {
        name: "key-cached-before-rope",
        what: "keys are cached as they were before the rotation",
        cite: "https://github.com/ml-explore/mlx-lm/issues/846",
    },
    Plant {
        name: "positions-restart",
        what: "the first new token has position 0, whatever is cached",
        cite: "https://github.com/huggingface/transformers/issues/45513",
    },
    Plant {
        name: "positions-run-on",
        what: "positions count on from one packed sequence to the next",
        cite: "https://github.com/huggingface/transformers/issues/44867",
    },
    Plant {
        name: "cache-lost",
        what: "a continuation does not see the cached keys",
        cite: "https://github.com/vllm-project/vllm/issues/43559",
    },
    Plant {
        name: "kv-head-modulo",
        what: "query head h reads key/value head h mod HKV in place of h / (HQ / HKV)",
        cite: "https://github.com/huggingface/transformers/issues/41036",
    },
    Plant {
        name: "heads-innermost",
        what: "o_proj is fed channel by channel, the heads of each side by side",
        cite: "https://github.com/huggingface/transformers/issues/40963",
    },
];

/// The fault of a kernel that a plant of the layer stands for. No two kernels of the layer know a
/// fault by the same name.
pub(super) fn inside(plant: Planted) -> Planted {
    Planted(match plant.0 {
        Some("gate-missing") => Some("gate-missing"),
        Some("norm-missing-plus-one") => Some("missing-plus-one"),
        Some("rope-interleaved") => Some("interleaved-pairs"),
        Some("yarn-factor-dropped") => Some("yarn-factor-dropped"),
        Some("kv-head-modulo") => Some("kv-head-modulo"),
        _ => None,
    })
}

/// The weights of the norms of queries and keys: one head's, or (to norm over all of them) all
/// heads'.
pub(super) fn norms<'a>(
    q_norm: &'a [f32],
    k_norm: &'a [f32],
    hq: usize,
    hkv: usize,
    plant: Planted,
) -> (Cow<'a, [f32]>, Cow<'a, [f32]>) {
    match plant.0 {
        Some("norms-swapped") => (k_norm.into(), q_norm.into()),
        Some("norm-over-all-heads") => (q_norm.repeat(hq).into(), k_norm.repeat(hkv).into()),
        _ => (q_norm.into(), k_norm.into()),
    }
}

/// What becomes of values, `[N, HKV, H]`.
pub(super) fn values<E: Stored>(v: &mut [E], table: &[f32], hkv: usize, h: usize, plant: Planted) {
    if plant.is("rope-on-values") {
        let before = v.to_vec();
        rope(v, &before, table, hkv, h, HONEST);
    }
}

/// What goes into `o_proj`, `[N, HQ, H]`.
pub(super) fn reorder<E: Stored>(o: &mut [E], hq: usize, h: usize, plant: Planted) {
    if plant.is("heads-innermost") {
        for token in o.chunks_mut(hq * h) {
            let before = token.to_vec();
            (0..hq * h).for_each(|i| token[i] = before[i % hq * h + i / hq]);
        }
    }
}
