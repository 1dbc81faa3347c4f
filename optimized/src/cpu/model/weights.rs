//! The weights of the model, by layer.

use golden::{
    Config, Error, Weights,
    config::{Mixer, Mlp},
};

use crate::cpu::{
    moe_experts::fast::Expert,
    quantised::Bits,
    weight::{Weight, matrix, vector},
};

/// The weights of a decoder layer.
pub(super) struct Layer {
    pub(super) input_norm: Vec<f32>,
    pub(super) mixer: MixerWeights,
    pub(super) post_norm: Vec<f32>,
    pub(super) mlp: MlpWeights,
}

pub(super) enum MixerWeights {
    Linear {
        qkvz: Weight,
        ba: Weight,
        /// `[HK, W, 2 K + R V]`.
        taps: Vec<f32>,
        rates: Vec<f32>,
        dt_bias: Vec<f32>,
        norm: Vec<f32>,
        out: Weight,
    },
    Full {
        q: Weight,
        k: Weight,
        v: Weight,
        o: Weight,
        q_norm: Vec<f32>,
        k_norm: Vec<f32>,
    },
}

/// Gate, up and down projection.
pub(super) struct Swiglu([Weight; 3]);

impl Swiglu {
    pub(super) fn expert(&self) -> Expert<'_, Weight> {
        let [gate_proj, up_proj, down_proj] = &self.0;
        Expert { gate_proj, up_proj, down_proj }
    }
}

#[expect(clippy::large_enum_variant, reason = "there is one per layer")]
pub(super) enum MlpWeights {
    Dense(Swiglu),
    Sparse { router: Weight, experts: Vec<Swiglu>, shared: Swiglu, shared_gate: Weight },
}

pub(super) struct Mtp {
    pub(super) norm_embedding: Vec<f32>,
    pub(super) norm_hidden: Vec<f32>,
    pub(super) fc: Weight,
    pub(super) layer: Layer,
    pub(super) norm: Vec<f32>,
}

/// Reads the weights of one layer.
pub(super) struct Loader<'a> {
    pub(super) weights: &'a dyn Weights,
    pub(super) config: &'a Config,
    /// How projections are narrowed, if they are.
    pub(super) bits: Option<Bits>,
}

impl Loader<'_> {
    /// A projection as it is kept. Gates and the router decide, and are small: they stay as they are.
    pub(super) fn narrowed(&self, weight: Weight) -> Weight {
        match self.bits {
            None => weight,
            Some(bits) => weight.narrowed(bits),
        }
    }

    pub(super) fn layer(&self, prefix: &str, mixer: Mixer, mlp: Mlp) -> Result<Layer, Error> {
        let vector = |name: &str| vector(self.weights, &format!("{prefix}.{name}"));
        let whole = |name: &str| matrix(self.weights, &format!("{prefix}.{name}.weight"));
        let matrix = |name: &str| whole(name).map(|weight| self.narrowed(weight));
        let mixer = match mixer {
            Mixer::Linear => MixerWeights::Linear {
                qkvz: matrix("linear_attn.in_proj_qkvz")?,
                ba: whole("linear_attn.in_proj_ba")?,
                taps: self.taps(&vector("linear_attn.conv1d.weight")?),
                rates: vector("linear_attn.A_log")?.iter().map(|a| a.exp()).collect(),
                dt_bias: vector("linear_attn.dt_bias")?,
                norm: vector("linear_attn.norm.weight")?,
                out: matrix("linear_attn.out_proj")?,
            },
            Mixer::Full => MixerWeights::Full {
                q: matrix("self_attn.q_proj")?,
                k: matrix("self_attn.k_proj")?,
                v: matrix("self_attn.v_proj")?,
                o: matrix("self_attn.o_proj")?,
                q_norm: vector("self_attn.q_norm.weight")?,
                k_norm: vector("self_attn.k_norm.weight")?,
            },
        };
        let swiglu = |of: &str| -> Result<Swiglu, Error> {
            let one = |name: &str| matrix(&format!("mlp.{of}{name}"));
            Ok(Swiglu([one("gate_proj")?, one("up_proj")?, one("down_proj")?]))
        };
        let mlp = match mlp {
            Mlp::Dense => MlpWeights::Dense(swiglu("")?),
            Mlp::Sparse => MlpWeights::Sparse {
                router: whole("mlp.gate")?,
                experts: (0..self.config.num_experts)
                    .map(|e| swiglu(&format!("experts.{e}.")))
                    .collect::<Result<_, _>>()?,
                shared: swiglu("shared_expert.")?,
                shared_gate: whole("mlp.shared_expert_gate")?,
            },
        };
        Ok(Layer {
            input_norm: vector("input_layernorm.weight")?,
            mixer,
            post_norm: vector("post_attention_layernorm.weight")?,
            mlp,
        })
    }

    /// `conv1d.weight` `[C, 1, W]`, whose channels are all queries, all keys, all values, as
    /// `[HK, W, 2 K + R V]`.
    fn taps(&self, conv: &[f32]) -> Vec<f32> {
        let w = self.config.linear_conv_kernel_dim;
        let channels = channels(self.config);
        channels
            .iter()
            .flat_map(|head| (0..w).flat_map(|j| head.iter().map(move |c| conv[c * w + j])))
            .collect()
    }
}

/// The convolution's channels of each key head: its query, its key, the values of its group.
pub(super) fn channels(c: &Config) -> Vec<Vec<usize>> {
    let (hk, k) = (c.linear_num_key_heads, c.linear_key_head_dim);
    let width = c.linear_value_dim() / hk;
    let head = |j: usize| {
        let (query, key, value) = (j * k, hk * k + j * k, 2 * hk * k + j * width);
        (query..query + k).chain(key..key + k).chain(value..value + width).collect()
    };
    (0..hk).map(head).collect()
}
