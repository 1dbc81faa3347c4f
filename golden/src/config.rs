//! What a `config.json` says about the arithmetic, with every default made explicit.

use crate::Dtype;

/// The model's sizes and switches, validated: code that holds one need not check again.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Rows of the embedding and of `lm_head`.
    pub vocab_size: usize,
    /// `D`, width of the residual stream.
    pub hidden_size: usize,
    /// What mixes tokens in each layer; its length is `num_hidden_layers`.
    pub layer_types: Vec<Mixer>,
    /// What follows the mixer in each layer.
    pub mlp_types: Vec<Mlp>,
    /// `HQ`, query heads of an attention layer.
    pub num_attention_heads: usize,
    /// `HKV`, key/value heads of an attention layer; divides `HQ`.
    pub num_key_value_heads: usize,
    /// `H`, width of one attention head.
    pub head_dim: usize,
    /// Rotary position embedding.
    pub rope: Rope,
    /// Positions that the model was made for (times the `YaRN` factor, if the file says so).
    pub max_position_embeddings: usize,
    /// `HK`, key heads of a linear-attention layer.
    pub linear_num_key_heads: usize,
    /// `HV`, value heads of a linear-attention layer; a multiple of `HK`.
    pub linear_num_value_heads: usize,
    /// `K`, width of one linear-attention key.
    pub linear_key_head_dim: usize,
    /// `V`, width of one linear-attention value.
    pub linear_value_head_dim: usize,
    /// `W`, taps of the causal convolution.
    pub linear_conv_kernel_dim: usize,
    /// `E`, routed experts of a sparse layer.
    pub num_experts: usize,
    /// `A`, experts that one token uses.
    pub num_experts_per_tok: usize,
    /// Whether the weights of the chosen experts are divided by their sum.
    pub norm_topk_prob: bool,
    /// `F`, width of one routed expert.
    pub moe_intermediate_size: usize,
    /// Width of the shared expert.
    pub shared_expert_intermediate_size: usize,
    /// Width of the MLP of a dense layer.
    pub intermediate_size: usize,
    /// `rms_norm_eps`, of every norm.
    pub rms_norm_eps: f64,
    /// Whether `lm_head` is the embedding.
    pub tie_word_embeddings: bool,
    /// Tokens that end a generation.
    pub eos_token_ids: Vec<u32>,
    /// The dtype the checkpoint declares.
    pub dtype: Dtype,
    /// FP8 block quantisation, if the checkpoint has it.
    pub fp8: Option<Fp8>,
}

/// What mixes tokens in a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mixer {
    /// `linear_attention`: causal convolution and gated delta rule.
    Linear,
    /// `full_attention`: gated attention.
    Full,
}

/// What follows the mixer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mlp {
    /// Router, routed experts and shared expert.
    Sparse,
    /// One `SwiGLU` of `intermediate_size`.
    Dense,
}

/// Rotary position embedding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// `rope_theta`.
    pub theta: f64,
    /// `R`, leading channels of a head that are rotated: `head_dim * partial_rotary_factor`, rounded
    /// down. The official frequencies are those of `0, 2, … < R`, so an odd `R` rotates `R + 1`.
    pub rotary_dim: usize,
    /// Context extension, if any.
    pub yarn: Option<Yarn>,
}

/// `YaRN`, static: it applies at every length.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Yarn {
    /// By how much the context is extended.
    pub factor: f64,
    /// Context length of the original training.
    pub original_max_position_embeddings: usize,
    /// Rotations above which a channel is left alone (32).
    pub beta_fast: f64,
    /// Rotations below which a channel is interpolated entirely (1).
    pub beta_slow: f64,
    /// Whether the correction range is widened to whole channels.
    pub truncate: bool,
    /// Factor on cosine and sine: the file's `attention_factor`, or what follows from `mscale`,
    /// `mscale_all_dim` and `factor`.
    pub attention_factor: f64,
}

/// FP8 block quantisation of linear weights: `weight = code * weight_scale_inv[block]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fp8 {
    /// Rows and columns of a block.
    pub weight_block_size: [usize; 2],
    /// Modules that stay in the declared dtype.
    pub modules_to_not_convert: Vec<String>,
}

impl Config {
    /// `L`, decoder layers.
    pub fn num_hidden_layers(&self) -> usize {
        self.layer_types.len()
    }

    /// Channels of the convolution: queries, keys and values of a linear-attention layer.
    pub fn conv_dim(&self) -> usize {
        2 * self.linear_num_key_heads * self.linear_key_head_dim + self.linear_value_dim()
    }

    /// All values of a linear-attention layer, `HV * V`.
    pub fn linear_value_dim(&self) -> usize {
        self.linear_num_value_heads * self.linear_value_head_dim
    }
}

impl Yarn {
    /// What the official model card says of longer contexts.
    pub fn of(factor: f64, original_max_position_embeddings: usize) -> Yarn {
        Yarn {
            factor,
            original_max_position_embeddings,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
            attention_factor: 0.1 * factor.ln() + 1.0,
        }
    }
}

impl Rope {
    /// The frequencies `[rotary_dim / 2]` (rounded up), in torch's own f32 steps: input of
    /// [`rope`](crate::ops::rope), defined in f32 for every number type.
    ///
    /// `1 / f32(theta^(f32(2 i) / f32(R)))`; with `YaRN`
    /// `inv_i / factor * ramp_i + inv_i * (1 - ramp_i)`, `ramp_i = clamp((i - low) / (high - low), 0, 1)`
    /// where `low` and `high` are the channels that turn `beta_fast` and `beta_slow` times over the
    /// original context: `R ln(original / (2 pi turns)) / (2 ln theta)`.
    /// Source: `_compute_default_rope_parameters`, `_compute_yarn_parameters`, transformers 5.23.0.
    pub fn inv_freq(&self) -> Vec<f32> {
        let dim = self.rotary_dim;
        let pos_freqs: Vec<f32> = (0..dim.div_ceil(2))
            .map(|i| {
                let power = (2 * i) as f32 / dim as f32;
                // Rounded once: this is what torch's `pow` returns for every index of every config seen.
                self.theta.powf(f64::from(power)) as f32
            })
            .collect();
        let Some(yarn) = self.yarn else {
            return pos_freqs.iter().map(|p| 1.0 / p).collect();
        };
        let channel = |turns: f64| {
            let original = yarn.original_max_position_embeddings as f64;
            dim as f64 * (original / (turns * 2.0 * std::f64::consts::PI)).ln()
                / (2.0 * self.theta.ln())
        };
        let (mut low, mut high) = (channel(yarn.beta_fast), channel(yarn.beta_slow));
        if yarn.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, mut high) = (low.max(0.0), high.min(dim as f64 - 1.0));
        if low == high {
            // The official code widens an empty ramp so that it can be divided by.
            high += 0.001;
        }
        let (low32, width) = (low as f32, (high - low) as f32);
        pos_freqs
            .iter()
            .enumerate()
            .map(|(i, &p)| {
                let ramp = ((i as f32 - low32) / width).clamp(0.0, 1.0);
                let extrapolated = 1.0 - ramp;
                let (alone, divided) = (1.0 / p, 1.0 / (yarn.factor as f32 * p));
                divided * (1.0 - extrapolated) + alone * extrapolated
            })
            .collect()
    }

    /// `partial_rotary_factor`, for which `head_dim * factor` rounds down to [`Rope::rotary_dim`].
    pub fn partial_rotary_factor(&self, head_dim: usize) -> f64 {
        let factor = self.rotary_dim as f64 / head_dim as f64;
        // 2 / 98 * 98 is below 2.
        if ((head_dim as f64 * factor) as usize) < self.rotary_dim {
            factor.next_up()
        } else {
            factor
        }
    }
}

impl Config {
    /// Positions the model can be asked for: the declared ones, or what `YaRN` extends them to.
    pub fn context_limit(&self) -> usize {
        let yarn = self.rope.yarn.map_or(0, |yarn| {
            (yarn.factor * yarn.original_max_position_embeddings as f64) as usize
        });
        self.max_position_embeddings.max(yarn)
    }
}

mod parse;
mod preset;
#[cfg(test)]
mod tests;

pub use parse::ConfigError;
pub use preset::Preset;
