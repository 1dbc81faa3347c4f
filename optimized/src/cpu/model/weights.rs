//! The weights of the model, by layer.

use std::cell::RefCell;

use golden::{
    Config, Dtype, Error, Narrow, Weights,
    config::{Mixer, Mlp},
    engine::INTERRUPTED,
    plan::Activations,
};

use super::store::Store;
use crate::cpu::{
    aligned::Arena,
    attention::kept::Kept,
    moe_experts::fast::Expert,
    quantised::Bits,
    weight::{Weight, matrix, passing, vector},
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

impl MixerWeights {
    /// Calls `f` with every projection.
    pub(super) fn each<'a>(&'a self, f: &mut impl FnMut(&'a Weight)) {
        match self {
            MixerWeights::Linear { qkvz, ba, out, .. } => [qkvz, ba, out].into_iter().for_each(f),
            MixerWeights::Full { q, k, v, o, .. } => [q, k, v, o].into_iter().for_each(f),
        }
    }
}

impl MlpWeights {
    /// Calls `f` with every projection that a token meets, and how many of its kind.
    pub(super) fn each(&self, active: usize, f: &mut impl FnMut(&Weight, usize)) {
        let mut mlp = |Swiglu(all): &Swiglu, times| all.iter().for_each(|weight| f(weight, times));
        match self {
            MlpWeights::Dense(dense) => mlp(dense, 1),
            MlpWeights::Sparse { router, experts, shared, shared_gate } => {
                mlp(shared, 1);
                experts.iter().take(1).for_each(|expert| mlp(expert, active));
                f(router, 1);
                f(shared_gate, 1);
            }
        }
    }

    /// Bytes that a token reads.
    pub(super) fn read(&self, active: usize) -> u64 {
        let mut bytes = 0;
        self.each(active, &mut |weight, times| bytes += weight.bytes() * times);
        bytes as u64
    }
}

/// Gate, up and down projection.
pub(super) struct Swiglu(pub(super) [Weight; 3]);

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

/// What projections are kept in, and with it what they read of their activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// As the checkpoint has them; activations as they are.
    F32,
    /// In bf16 or FP8; activations in bf16.
    Bf16,
    /// In eight bits; activations in eight bits.
    Int8,
    /// In four bits; activations in eight bits.
    Int4,
}

impl Format {
    pub(super) const ALL: [Format; 4] = [Format::F32, Format::Bf16, Format::Int8, Format::Int4];

    /// That of a name on the command line.
    ///
    /// # Errors
    /// If there is none.
    pub(super) fn of(name: &str) -> Result<Format, Error> {
        let known = || Format::ALL.map(Format::name).join(", ");
        let found = Format::ALL.into_iter().find(|format| format.name() == name);
        found.ok_or_else(|| format!("number {name:?}: the cpu engine has {}", known()).into())
    }

    /// Its name on the command line.
    pub(super) fn name(self) -> &'static str {
        match self {
            Format::F32 => "f32",
            Format::Bf16 => "bf16",
            Format::Int8 => "int8",
            Format::Int4 => "int4",
        }
    }

    pub(super) fn activations(self) -> Activations {
        match self {
            Format::F32 => Activations::F32,
            Format::Bf16 => Activations::Bf16,
            Format::Int8 | Format::Int4 => Activations::Int8,
        }
    }

    /// What keys and values are kept in, unless it is said otherwise.
    pub(super) fn kept(self) -> Kept {
        if self == Format::F32 { Kept::F32 } else { Kept::Bf16 }
    }

    /// What a tensor is narrowed to, if it is.
    pub(super) fn bits(self, name: &str) -> Option<Bits> {
        match Narrow::of_number(self.name())?.of_tensor(name)? {
            Narrow::Int8 => Some(Bits::Eight),
            Narrow::Int4 => Some(Bits::Four),
            Narrow::Fp8 => None,
        }
    }
}

/// Who is told of bytes that are done, of all, and says whether to go on.
pub(super) type Tell<'a> = dyn FnMut(u64, u64) -> bool + 'a;

/// Reads the weights of one layer.
pub(super) struct Loader<'a> {
    pub(super) weights: &'a dyn Weights,
    pub(super) config: &'a Config,
    /// What projections are kept in.
    pub(super) format: Format,
    /// Narrowed weights that are there already.
    pub(super) store: Option<&'a Store>,
    /// Where what is narrowed lies.
    pub(super) arena: Arena,
    /// Bytes narrowed, of all; who is told of them, and says whether to go on.
    pub(super) done: RefCell<(u64, u64, &'a mut Tell<'a>)>,
}

impl Loader<'_> {
    /// A projection as it is kept. Gates and the router decide, and are small: they stay as they are.
    pub(super) fn projection(&self, name: &str) -> Result<Weight, Error> {
        if let (Some(store), Some(_)) = (self.store, self.format.bits(name)) {
            return store.weight(self.format, self.weights, name);
        }
        let Some(bits) = self.format.bits(name) else {
            if self.format != Format::Bf16 {
                return matrix(self.weights, name);
            }
            // What is rounded is let go, what is in bf16 or FP8 stays in the map.
            let wide =
                self.weights.meta(name).is_some_and(|m| matches!(m.dtype, Dtype::F32 | Dtype::F16));
            let weight = if wide { passing } else { matrix }(self.weights, name)?;
            return Ok(weight.paired());
        };
        let weight = passing(self.weights, name)?.narrowed(bits, &self.arena);
        let mut done = self.done.borrow_mut();
        let (bytes, all, tell) = &mut *done;
        *bytes += weight.bytes() as u64;
        if tell(*bytes, *all) { Ok(weight) } else { Err(INTERRUPTED.into()) }
    }

    pub(super) fn layer(&self, prefix: &str, mixer: Mixer, mlp: Mlp) -> Result<Layer, Error> {
        let vector = |name: &str| vector(self.weights, &format!("{prefix}.{name}"));
        let whole = |name: &str| matrix(self.weights, &format!("{prefix}.{name}.weight"));
        let matrix = |name: &str| self.projection(&format!("{prefix}.{name}.weight"));
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
