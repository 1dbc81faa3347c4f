//! Wiring faults that can be planted in the model by name, to show that a check catches them.
//!
//! Each is a mistake that a public port of this model has made. A plant changes what the model
//! hands to an op, never the op.

use std::mem;

use golden::ops::{attention_layer, gdn_layer, mtp, rms_norm, shared_expert};
use ndarray::{Axis, concatenate, s};

use crate::{moe_experts::Expert, real::Real};

/// One planted fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plant {
    /// The rows of `b` and `a` change places in `in_proj_ba`.
    SwapBA,
    /// `in_proj_qkvz` is read as all queries, all keys, all values, all gates.
    UngroupedQkvz,
    /// Value head `h` reads key head `h mod HK` instead of `h / (HV / HK)`.
    InterleavedValueHeads,
    /// The continuation of a sequence starts from a zero recurrent state.
    RecurrentStateLost,
    /// The continuation of a sequence starts from an empty convolution window.
    ConvStateLost,
    /// The convolution window is off by one column.
    ConvStateShifted,
    /// The gated norm is taken for zero-centred.
    GatedNormPlusOne,
    /// `dt_bias` is left out of the gates.
    DtBiasDropped,
    /// The convolution's taps are applied in reverse (convolution for cross-correlation).
    ConvFlipped,
    /// `q_proj` is read as all queries, then all gates.
    UngroupedQueryGate,
    /// The factor of `YaRN` on cosine and sine is left out.
    YarnScaleDropped,
    /// Query and key norms lack the one that zero-centred weights are short of.
    QkNormMissingPlusOne,
    /// The continuation of a sequence sees neither cached keys nor its position.
    KvCacheLost,
    /// The final norm lacks the one that zero-centred weights are short of.
    MissingPlusOne,
    /// The chosen experts' weights are not divided by their sum (or are, where they should not).
    RenormaliseFlipped,
    /// The shared expert is left out.
    SharedExpertDropped,
    /// Gate and up projections of the experts change places.
    SwapGateUp,
    /// The MTP head is fed the hidden state from before the final norm.
    PreNormMtpHidden,
    /// The MTP head concatenates the hidden state first.
    MtpConcatOrder,
}

/// Which parts of a model a fault touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Every layer with linear attention.
    Linear,
    /// Every layer with full attention.
    Full,
    /// Every layer with experts.
    Sparse,
    /// The final norm.
    Head,
    /// The MTP head, or what it is fed.
    Mtp,
}

impl Plant {
    /// Where the fault is, and the ops that answer wrong because of it though they are fed what is right.
    ///
    /// A lost cache is two: tokens are turned by positions that start anew, and they miss their past.
    pub fn place(self) -> (Place, &'static [&'static str]) {
        match self {
            Plant::SwapBA | Plant::UngroupedQkvz | Plant::InterleavedValueHeads => {
                (Place::Linear, &["linear"])
            }
            Plant::RecurrentStateLost => (Place::Linear, &["gated_delta_rule"]),
            Plant::ConvStateLost | Plant::ConvStateShifted | Plant::ConvFlipped => {
                (Place::Linear, &["causal_conv1d"])
            }
            Plant::GatedNormPlusOne => (Place::Linear, &["rms_norm_gated"]),
            Plant::DtBiasDropped => (Place::Linear, &["gdn_gates"]),
            Plant::UngroupedQueryGate => (Place::Full, &["linear"]),
            Plant::YarnScaleDropped => (Place::Full, &["rope"]),
            Plant::QkNormMissingPlusOne => (Place::Full, &["rms_norm"]),
            Plant::KvCacheLost => (Place::Full, &["rope", "attention"]),
            Plant::MissingPlusOne => (Place::Head, &["rms_norm"]),
            Plant::RenormaliseFlipped => (Place::Sparse, &["moe_router"]),
            Plant::SwapGateUp => (Place::Sparse, &["moe_experts"]),
            Plant::SharedExpertDropped => (Place::Sparse, &["shared_expert"]),
            Plant::PreNormMtpHidden | Plant::MtpConcatOrder => (Place::Mtp, &["mtp"]),
        }
    }

    /// Whether the fault is in the keeping of states: it shows in continuations alone.
    pub fn keeps_states_wrong(self) -> bool {
        matches!(
            self,
            Plant::RecurrentStateLost
                | Plant::ConvStateLost
                | Plant::ConvStateShifted
                | Plant::KvCacheLost
        )
    }

    /// Every plant: its name, what it does, and a public report of the same mistake.
    pub const ALL: &[(&str, Plant, &str)] = &[
        ("swap-b-a", Plant::SwapBA, "https://github.com/vllm-project/vllm/issues/36242"),
        (
            "ungrouped-qkvz",
            Plant::UngroupedQkvz,
            "https://github.com/vllm-project/vllm/issues/35504",
        ),
        (
            "interleaved-value-heads",
            Plant::InterleavedValueHeads,
            "https://github.com/huggingface/transformers/issues/41036",
        ),
        (
            "recurrent-state-lost",
            Plant::RecurrentStateLost,
            "https://github.com/huggingface/transformers/issues/45513",
        ),
        (
            "conv-state-lost",
            Plant::ConvStateLost,
            "https://github.com/vllm-project/vllm/issues/53051",
        ),
        (
            "conv-state-shifted",
            Plant::ConvStateShifted,
            "https://github.com/vllm-project/vllm/issues/39273",
        ),
        (
            "gated-norm-plus-one",
            Plant::GatedNormPlusOne,
            "https://github.com/jundot/omlx/issues/1507",
        ),
        (
            "dt-bias-dropped",
            Plant::DtBiasDropped,
            "https://github.com/huggingface/transformers/issues/47831",
        ),
        ("conv-flipped", Plant::ConvFlipped, "https://github.com/ggml-org/llama.cpp/issues/16095"),
        (
            "ungrouped-query-gate",
            Plant::UngroupedQueryGate,
            "https://github.com/ggml-org/llama.cpp/issues/16095",
        ),
        (
            "yarn-scale-dropped",
            Plant::YarnScaleDropped,
            "https://github.com/jundot/omlx/issues/3347",
        ),
        (
            "qk-norm-missing-plus-one",
            Plant::QkNormMissingPlusOne,
            "https://github.com/warpfront/hipfire/issues/228",
        ),
        ("kv-cache-lost", Plant::KvCacheLost, "https://github.com/ml-explore/mlx-lm/issues/846"),
        ("missing-plus-one", Plant::MissingPlusOne, "https://github.com/kekzl/imp/issues/1289"),
        (
            "renormalise-flipped",
            Plant::RenormaliseFlipped,
            "https://github.com/1bit-MONSTER/1bit-MONSTER/issues/2134",
        ),
        (
            "shared-expert-dropped",
            Plant::SharedExpertDropped,
            "https://github.com/ggml-org/llama.cpp/issues/16095",
        ),
        (
            "swap-gate-up",
            Plant::SwapGateUp,
            "https://github.com/huggingface/transformers/issues/45131",
        ),
        (
            "pre-norm-mtp-hidden",
            Plant::PreNormMtpHidden,
            "https://github.com/ggml-org/llama.cpp/issues/24025",
        ),
        (
            "mtp-concat-order",
            Plant::MtpConcatOrder,
            "https://github.com/LightLLM/LightLLM/issues/1402",
        ),
    ];

    /// The plant of a name.
    pub fn by_name(name: &str) -> Option<Plant> {
        Plant::ALL.iter().find(|(n, ..)| *n == name).map(|&(_, plant, _)| plant)
    }

    pub(crate) fn gdn<R: Real>(self, x: &mut gdn_layer::Inputs<R>) {
        let (hk, hv) = (x.hk, x.hv);
        let (k, v) = (x.state.dim().2, x.state.dim().3);
        let group = hv / hk;
        match self {
            Plant::SwapBA => {
                let rows = (0..hk).flat_map(|g| {
                    let at = 2 * group * g;
                    (at + group..at + 2 * group).chain(at..at + group)
                });
                x.in_proj_ba =
                    x.in_proj_ba.select(Axis(0), &rows.collect::<Vec<_>>()).into_shared();
            }
            Plant::UngroupedQkvz => {
                // The official order of rows that a reader of the plain order would have meant.
                let (qk, all_v) = (hk * k, hv * v);
                let rows = (0..hk).flat_map(|g| {
                    let q = g * k..(g + 1) * k;
                    let key = qk + g * k..qk + (g + 1) * k;
                    let value = 2 * qk + g * group * v..2 * qk + (g + 1) * group * v;
                    let gate = 2 * qk + all_v + g * group * v..2 * qk + all_v + (g + 1) * group * v;
                    q.chain(key).chain(value).chain(gate)
                });
                x.in_proj_qkvz =
                    x.in_proj_qkvz.select(Axis(0), &rows.collect::<Vec<_>>()).into_shared();
            }
            Plant::InterleavedValueHeads => {
                // Queries and keys of group g come from the group that h mod HK would have picked.
                let block = 2 * k + 2 * group * v;
                let mut wrong = x.in_proj_qkvz.to_owned();
                for g in 0..hk {
                    let from = (g * group) % hk;
                    let rows = x.in_proj_qkvz.slice(s![from * block..from * block + 2 * k, ..]);
                    wrong.slice_mut(s![g * block..g * block + 2 * k, ..]).assign(&rows);
                }
                x.in_proj_qkvz = wrong.into_shared();
            }
            Plant::RecurrentStateLost => x.state.fill(R::zero()),
            Plant::ConvStateLost => x.conv_state.fill(R::zero()),
            Plant::ConvStateShifted => {
                let w = x.conv_state.dim().2;
                let mut shifted = x.conv_state.to_owned();
                shifted.fill(R::zero());
                if 1 < w {
                    shifted.slice_mut(s![.., .., 1..]).assign(&x.conv_state.slice(s![
                        ..,
                        ..,
                        ..w - 1
                    ]));
                }
                x.conv_state = shifted.into_shared();
            }
            Plant::GatedNormPlusOne => x.norm.mapv_inplace(|w| w + 1.0),
            Plant::DtBiasDropped => x.dt_bias.fill(0.0),
            Plant::ConvFlipped => x.conv1d = x.conv1d.slice(s![.., ..;-1]).to_owned().into_shared(),
            _ => {}
        }
    }

    pub(crate) fn attention<R: Real>(self, x: &mut attention_layer::Inputs<R>) {
        match self {
            Plant::UngroupedQueryGate => {
                let h = x.q_proj.nrows() / (2 * x.hq);
                let all = x.hq * h;
                let rows = (0..x.hq)
                    .flat_map(|i| (i * h..(i + 1) * h).chain(all + i * h..all + (i + 1) * h));
                x.q_proj = x.q_proj.select(Axis(0), &rows.collect::<Vec<_>>()).into_shared();
            }
            Plant::YarnScaleDropped => x.attention_factor = 1.0,
            Plant::QkNormMissingPlusOne => {
                x.q_norm.mapv_inplace(|w| w - 1.0);
                x.k_norm.mapv_inplace(|w| w - 1.0);
            }
            Plant::KvCacheLost => {
                x.k_cache = x.k_cache.slice(s![..0, .., ..]).to_owned().into_shared();
                x.v_cache = x.v_cache.slice(s![..0, .., ..]).to_owned().into_shared();
                x.cu_seqlens_cache.fill(0);
            }
            _ => {}
        }
    }

    pub(crate) fn norm<R: Real>(self, x: &mut rms_norm::Inputs<R>) {
        if self == Plant::MissingPlusOne {
            x.weight.mapv_inplace(|w| w - 1.0);
        }
    }

    pub(crate) fn norm_topk_prob(self, given: bool) -> bool {
        given != (self == Plant::RenormaliseFlipped)
    }

    pub(crate) fn expert(self, x: &mut Expert) {
        if self == Plant::SwapGateUp {
            mem::swap(&mut x.gate_proj, &mut x.up_proj);
        }
    }

    pub(crate) fn shared_expert<R: Real>(self, x: &mut shared_expert::Inputs<R>) {
        if self == Plant::SharedExpertDropped {
            x.down_proj.fill(0.0);
        }
    }

    pub(crate) fn mtp<R: Real>(self, x: &mut mtp::Inputs<R>) {
        if self == Plant::MtpConcatOrder {
            let d = x.fc.ncols() / 2;
            let halves = [x.fc.slice(s![.., d..]), x.fc.slice(s![.., ..d])];
            x.fc = concatenate(Axis(1), &halves)
                .map_or_else(|_| x.fc.clone(), ndarray::ArrayBase::into_shared);
        }
    }
}
