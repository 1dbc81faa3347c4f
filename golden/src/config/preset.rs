//! Configs that are known by name, and the way back from a [`Config`] to `config.json`.

use std::str::FromStr;

use serde_json::{Value, json};

use super::{Config, Fp8, Mixer, Mlp, Rope, Yarn};
use crate::Dtype;

/// A model known by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preset {
    /// Every layer kind at sizes for a test: 4 layers, 64 wide, 16 experts.
    Tiny,
    /// What `Tiny` has equal or in step is not: 5 layers out of step, one of them dense, value heads
    /// three to a key head, K != V, three taps, `YaRN` beyond the original context.
    Ragged,
    /// `Tiny` with heads of the official sizes, in bf16: what kernels that are for these compute in a second.
    Heads,
    /// The official sizes and vocabulary; 4 layers, 64 experts unless said otherwise.
    Slice,
    /// Qwen3-Next-80B-A3B-Instruct: 48 layers, 512 experts.
    Official,
}

impl FromStr for Preset {
    type Err = String;

    fn from_str(s: &str) -> Result<Preset, String> {
        match s {
            "tiny" => Ok(Preset::Tiny),
            "ragged" => Ok(Preset::Ragged),
            "heads" => Ok(Preset::Heads),
            "slice" => Ok(Preset::Slice),
            "official" => Ok(Preset::Official),
            _ => Err(format!("preset {s:?}: expected tiny, ragged, heads, slice or official")),
        }
    }
}

impl Preset {
    /// Its config, with other numbers of layers and experts if given.
    ///
    /// # Errors
    /// If there are no layers, or fewer experts than a token uses.
    pub fn config(self, layers: Option<usize>, experts: Option<usize>) -> Result<Config, String> {
        let mut config = match self {
            Preset::Official | Preset::Slice => official(),
            Preset::Tiny => tiny(),
            Preset::Ragged => ragged(),
            Preset::Heads => heads(),
        };
        let (few_layers, few_experts) = if self == Preset::Slice {
            (4, 64)
        } else {
            (config.num_hidden_layers(), config.num_experts)
        };
        let layers = layers.unwrap_or(few_layers);
        config.num_experts = experts.unwrap_or(few_experts);
        if !(1..=4096).contains(&layers) {
            return Err(format!("layers={layers}: expected 1 to 4096"));
        }
        if !(config.num_experts_per_tok..=1 << 16).contains(&config.num_experts) {
            return Err(format!(
                "experts={}: expected {} to 65536",
                config.num_experts, config.num_experts_per_tok
            ));
        }
        if 1 << 18 < layers * config.num_experts {
            return Err(format!(
                "layers={layers}, experts={}: more than 2^18 experts in all",
                config.num_experts
            ));
        }
        if self == Preset::Ragged {
            config.layer_types = config.layer_types.into_iter().cycle().take(layers).collect();
            config.mlp_types = config.mlp_types.into_iter().cycle().take(layers).collect();
        } else {
            config.layer_types = every_fourth(layers);
            config.mlp_types = vec![Mlp::Sparse; layers];
        }
        Ok(config)
    }
}

fn every_fourth(layers: usize) -> Vec<Mixer> {
    (1..=layers).map(|i| if i.is_multiple_of(4) { Mixer::Full } else { Mixer::Linear }).collect()
}

fn official() -> Config {
    Config {
        vocab_size: 151_936,
        hidden_size: 2048,
        layer_types: every_fourth(48),
        mlp_types: vec![Mlp::Sparse; 48],
        num_attention_heads: 16,
        num_key_value_heads: 2,
        head_dim: 256,
        rope: Rope { theta: 1e7, rotary_dim: 64, yarn: None },
        max_position_embeddings: 262_144,
        linear_num_key_heads: 16,
        linear_num_value_heads: 32,
        linear_key_head_dim: 128,
        linear_value_head_dim: 128,
        linear_conv_kernel_dim: 4,
        num_experts: 512,
        num_experts_per_tok: 10,
        norm_topk_prob: true,
        moe_intermediate_size: 512,
        shared_expert_intermediate_size: 512,
        intermediate_size: 5120,
        rms_norm_eps: 1e-6,
        tie_word_embeddings: false,
        eos_token_ids: vec![151_645],
        dtype: Dtype::Bf16,
        fp8: None,
    }
}

fn tiny() -> Config {
    Config {
        vocab_size: 256,
        hidden_size: 64,
        layer_types: every_fourth(4),
        mlp_types: vec![Mlp::Sparse; 4],
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 32,
        rope: Rope { theta: 10_000.0, rotary_dim: 8, yarn: None },
        max_position_embeddings: 4096,
        linear_num_key_heads: 2,
        linear_num_value_heads: 4,
        linear_key_head_dim: 16,
        linear_value_head_dim: 16,
        linear_conv_kernel_dim: 4,
        num_experts: 16,
        num_experts_per_tok: 3,
        norm_topk_prob: true,
        moe_intermediate_size: 32,
        shared_expert_intermediate_size: 32,
        intermediate_size: 128,
        rms_norm_eps: 1e-6,
        tie_word_embeddings: false,
        eos_token_ids: Vec::new(),
        dtype: Dtype::F32,
        fp8: None,
    }
}

fn ragged() -> Config {
    Config {
        layer_types: vec![Mixer::Linear, Mixer::Full, Mixer::Linear, Mixer::Linear, Mixer::Full],
        mlp_types: vec![Mlp::Sparse, Mlp::Sparse, Mlp::Dense, Mlp::Sparse, Mlp::Sparse],
        linear_num_value_heads: 6,
        linear_value_head_dim: 12,
        linear_conv_kernel_dim: 3,
        rope: Rope { yarn: Some(Yarn::of(8.0, 64)), ..tiny().rope },
        max_position_embeddings: 64,
        ..tiny()
    }
}

fn heads() -> Config {
    let official = official();
    Config {
        num_attention_heads: official.num_attention_heads,
        num_key_value_heads: official.num_key_value_heads,
        head_dim: official.head_dim,
        rope: official.rope,
        linear_key_head_dim: official.linear_key_head_dim,
        linear_value_head_dim: official.linear_value_head_dim,
        dtype: Dtype::Bf16,
        ..tiny()
    }
}

impl Config {
    /// The same config in another storage type; FP8 gets the official blocks of 128 and the
    /// official list of modules that stay as they are.
    #[must_use]
    pub fn stored_as(mut self, dtype: Dtype) -> Config {
        if dtype == Dtype::Fp8 {
            let block = self.fp8.as_ref().map_or([128, 128], |fp8| fp8.weight_block_size);
            let modules_to_not_convert = crate::names::not_quantised(&self);
            self.fp8 = Some(Fp8 { weight_block_size: block, modules_to_not_convert });
            self.dtype = Dtype::Bf16;
        } else {
            self.fp8 = None;
            self.dtype = dtype;
        }
        self
    }

    /// `config.json` as the official files have it; [`Config::parse`] reads it back to the same
    /// config, and transformers loads it.
    pub fn to_json(&self) -> Value {
        let layers = self.num_hidden_layers();
        let mut json = json!({
            "architectures": ["Qwen3NextForCausalLM"],
            "attention_bias": false,
            "attention_dropout": 0.0,
            "decoder_sparse_step": 1,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "linear_conv_kernel_dim": self.linear_conv_kernel_dim,
            "linear_key_head_dim": self.linear_key_head_dim,
            "linear_num_key_heads": self.linear_num_key_heads,
            "linear_num_value_heads": self.linear_num_value_heads,
            "linear_value_head_dim": self.linear_value_head_dim,
            "max_position_embeddings": self.max_position_embeddings,
            "model_type": "qwen3_next",
            "moe_intermediate_size": self.moe_intermediate_size,
            "norm_topk_prob": self.norm_topk_prob,
            "num_attention_heads": self.num_attention_heads,
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.num_experts_per_tok,
            "num_hidden_layers": layers,
            "num_key_value_heads": self.num_key_value_heads,
            "output_router_logits": false,
            "partial_rotary_factor": self.rope.partial_rotary_factor(self.head_dim),
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope.theta,
            "router_aux_loss_coef": 0.001,
            "shared_expert_intermediate_size": self.shared_expert_intermediate_size,
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": match self.dtype {
                Dtype::F16 => "float16",
                Dtype::Bf16 => "bfloat16",
                _ => "float32",
            },
            "use_cache": true,
            "vocab_size": self.vocab_size,
        });
        let dense: Vec<usize> = (0..layers).filter(|&i| self.mlp_types[i] == Mlp::Dense).collect();
        json["mlp_only_layers"] = json!(dense);
        if self.layer_types == every_fourth(layers) {
            json["full_attention_interval"] = json!(4);
        } else {
            let name = |mixer: &Mixer| match mixer {
                Mixer::Linear => "linear_attention",
                Mixer::Full => "full_attention",
            };
            json["layer_types"] = self.layer_types.iter().map(name).collect();
        }
        json["rope_scaling"] = self.rope.yarn.map_or(Value::Null, |yarn| {
            json!({
                "rope_type": "yarn",
                "factor": yarn.factor,
                "original_max_position_embeddings": yarn.original_max_position_embeddings,
                "beta_fast": yarn.beta_fast,
                "beta_slow": yarn.beta_slow,
                "truncate": yarn.truncate,
                "attention_factor": yarn.attention_factor,
                "rope_theta": self.rope.theta,
                "partial_rotary_factor": self.rope.partial_rotary_factor(self.head_dim),
            })
        });
        json["eos_token_id"] = match self.eos_token_ids[..] {
            [] => Value::Null,
            [id] => json!(id),
            _ => json!(self.eos_token_ids),
        };
        if let Some(fp8) = &self.fp8 {
            json["quantization_config"] = json!({
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": fp8.weight_block_size,
                "modules_to_not_convert": fp8.modules_to_not_convert,
            });
        }
        json
    }
}
