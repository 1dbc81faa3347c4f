//! Reading `config.json`: what transformers 5.23.0 would compute with, or one line saying why not.

use std::path::Path;

use serde_json::{Map, Value};

use super::{Config, Fp8, Mixer, Mlp, Rope, Yarn};
use crate::{Dtype, file};

/// Why a config is refused: file, field, expected, got.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(pub String);

/// Keys that cannot change the arithmetic of a forward pass; what `save_pretrained` and the hub
/// write beside the model's own fields.
const HARMLESS: &[&str] = &[
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "attn_implementation",
    "_attn_implementation",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "experts_implementation",
    "id2label",
    "initializer_range",
    "is_encoder_decoder",
    "label2id",
    "max_window_layers",
    "model_type",
    "num_nextn_predict_layers",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "router_aux_loss_coef",
    "torch_dtype",
    "transformers_version",
    "use_cache",
];

/// Keys that must hold this value, because karat computes no other.
const FIXED: &[(&str, Fixed)] = &[
    ("hidden_act", Fixed::Text("silu")),
    ("attention_bias", Fixed::False),
    ("use_sliding_window", Fixed::False),
];

/// A value that a key must hold.
#[derive(Clone, Copy)]
enum Fixed {
    Text(&'static str),
    False,
}

/// Keys read below.
const READ: &[&str] = &[
    "decoder_sparse_step",
    "dtype",
    "eos_token_id",
    "full_attention_interval",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "layer_types",
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_value_head_dim",
    "max_position_embeddings",
    "mlp_only_layers",
    "moe_intermediate_size",
    "norm_topk_prob",
    "num_attention_heads",
    "num_experts",
    "num_experts_per_tok",
    "num_hidden_layers",
    "num_key_value_heads",
    "partial_rotary_factor",
    "quantization_config",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "shared_expert_intermediate_size",
    "tie_word_embeddings",
    "vocab_size",
];

/// No size of any model of the family is near this; products of four stay below 2^64 only if each
/// is bounded, so products are checked as well.
const MAX: usize = 1 << 24;

impl Config {
    /// Reads `config.json` of a checkpoint folder.
    pub fn load(dir: &Path) -> Result<Config, ConfigError> {
        let path = dir.join("config.json");
        let text =
            file::text(&path).map_err(|e| ConfigError(format!("{}: {e}", path.display())))?;
        Config::parse(&text, &path.display().to_string())
    }

    /// Reads a config from its text; `origin` is the file's name for messages.
    pub fn parse(text: &str, origin: &str) -> Result<Config, ConfigError> {
        let value: Value = serde_json::from_str(text)
            .map_err(|e| ConfigError(format!("{origin}: no JSON: {e}")))?;
        let Value::Object(object) = value else {
            return Err(ConfigError(format!("{origin}: expected a JSON object")));
        };
        Fields { origin, path: "", object: &object }.config()
    }
}

/// A JSON object with the way to it, for messages.
#[derive(Clone, Copy)]
struct Fields<'a> {
    origin: &'a str,
    path: &'a str,
    object: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    fn wrong<T>(&self, key: &str, expected: &str) -> Result<T, ConfigError> {
        let got = self.object.get(key).map_or("nothing".to_owned(), |value| {
            let text = value.to_string();
            if text.len() > 60 {
                format!("{}…", text.chars().take(60).collect::<String>())
            } else {
                text
            }
        });
        Err(ConfigError(format!(
            "{}: {}{key}: expected {expected}, got {got}",
            self.origin, self.path
        )))
    }

    /// The value of a key that is there and not null.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    /// A size in `1 ..= MAX`.
    fn size(&self, key: &str, default: usize) -> Result<usize, ConfigError> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
                Some(n) if (1..=MAX).contains(&n) => Ok(n),
                _ => self.wrong(key, &format!("an integer from 1 to {MAX}")),
            },
        }
    }

    fn float(
        &self,
        key: &str,
        default: f64,
        ok: fn(f64) -> bool,
        expected: &str,
    ) -> Result<f64, ConfigError> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => match value.as_f64().filter(|&x| x.is_finite() && ok(x)) {
                Some(x) => Ok(x),
                None => self.wrong(key, expected),
            },
        }
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool, ConfigError> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => self.wrong(key, "true or false"),
        }
    }

    fn nested(&self, key: &str, path: &'a str) -> Result<Option<Fields<'a>>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(object)) => Ok(Some(Fields { origin: self.origin, path, object })),
            Some(_) => self.wrong(key, "an object"),
        }
    }

    /// Refuses keys that nobody reads: they may change the arithmetic.
    fn only(&self, known: &[&[&str]]) -> Result<(), ConfigError> {
        let unknown = self.object.iter().find(|(key, value)| {
            !value.is_null() && !known.iter().any(|keys| keys.contains(&key.as_str()))
        });
        match unknown {
            None => Ok(()),
            Some((key, _)) => self
                .wrong(key, "no such field: karat does not know whether it changes the arithmetic"),
        }
    }

    fn config(&self) -> Result<Config, ConfigError> {
        if self.get("model_type").and_then(Value::as_str) != Some("qwen3_next") {
            return self.wrong("model_type", "\"qwen3_next\"");
        }
        if let Some(value) = self.get("architectures") {
            let ok = value.as_array().is_some_and(|names| {
                names.iter().all(|name| {
                    matches!(name.as_str(), Some("Qwen3NextForCausalLM" | "Qwen3NextModel"))
                })
            });
            if !ok {
                return self.wrong("architectures", "[\"Qwen3NextForCausalLM\"]");
            }
        }
        for (key, only) in FIXED {
            let (holds, only) = match only {
                Fixed::Text(text) => (
                    self.get(key).is_none_or(|value| value.as_str() == Some(text)),
                    format!("{text:?}"),
                ),
                Fixed::False => (
                    self.get(key).is_none_or(|value| value.as_bool() == Some(false)),
                    "false".to_owned(),
                ),
            };
            if !holds {
                return self.wrong(key, &format!("{only}: karat computes nothing else"));
            }
        }
        // The official code reads no window; a file that gives one says that it is not used.
        if self.get("sliding_window").is_some() && self.get("use_sliding_window").is_none() {
            return self.wrong("sliding_window", "null, or use_sliding_window false beside it");
        }
        let fixed: Vec<&str> = FIXED.iter().map(|(key, _)| *key).collect();
        self.only(&[HARMLESS, READ, &fixed, &["sliding_window"]])?;

        let layers = self.size("num_hidden_layers", 48)?;
        if 4096 < layers {
            return self.wrong("num_hidden_layers", "at most 4096");
        }
        let config = Config {
            vocab_size: self.size("vocab_size", 151_936)?,
            hidden_size: self.size("hidden_size", 2048)?,
            layer_types: self.layer_types(layers)?,
            mlp_types: self.mlp_types(layers)?,
            num_attention_heads: self.size("num_attention_heads", 16)?,
            num_key_value_heads: self.size("num_key_value_heads", 2)?,
            head_dim: self.size("head_dim", 256)?,
            rope: self.rope()?,
            max_position_embeddings: self.size("max_position_embeddings", 32_768)?,
            linear_num_key_heads: self.size("linear_num_key_heads", 16)?,
            linear_num_value_heads: self.size("linear_num_value_heads", 32)?,
            linear_key_head_dim: self.size("linear_key_head_dim", 128)?,
            linear_value_head_dim: self.size("linear_value_head_dim", 128)?,
            linear_conv_kernel_dim: self.size("linear_conv_kernel_dim", 4)?,
            num_experts: match self.get("num_experts").and_then(Value::as_u64) {
                Some(0) => 0,
                _ => self.size("num_experts", 512)?,
            },
            num_experts_per_tok: self.size("num_experts_per_tok", 10)?,
            norm_topk_prob: self.flag("norm_topk_prob", true)?,
            moe_intermediate_size: self.size("moe_intermediate_size", 512)?,
            shared_expert_intermediate_size: self.size("shared_expert_intermediate_size", 512)?,
            intermediate_size: self.size("intermediate_size", 5632)?,
            rms_norm_eps: self.float(
                "rms_norm_eps",
                1e-6,
                |x| 0.0 < x && x < 1.0,
                "a number between 0 and 1",
            )?,
            tie_word_embeddings: self.flag("tie_word_embeddings", false)?,
            eos_token_ids: self.eos()?,
            dtype: self.dtype()?,
            fp8: self.fp8()?,
        };
        self.consistent(&config)?;
        Ok(config)
    }

    /// Contradictions between fields.
    fn consistent(&self, c: &Config) -> Result<(), ConfigError> {
        if !c.num_attention_heads.is_multiple_of(c.num_key_value_heads) {
            return self.wrong(
                "num_key_value_heads",
                &format!("a divisor of num_attention_heads {}", c.num_attention_heads),
            );
        }
        if !c.linear_num_value_heads.is_multiple_of(c.linear_num_key_heads) {
            return self.wrong(
                "linear_num_key_heads",
                &format!("a divisor of linear_num_value_heads {}", c.linear_num_value_heads),
            );
        }
        if c.mlp_types.contains(&Mlp::Sparse) && c.num_experts < c.num_experts_per_tok {
            return self
                .wrong("num_experts_per_tok", &format!("at most num_experts {}", c.num_experts));
        }
        // An odd number of channels turns one channel more; the ramp of YaRN has no entry for it.
        let turned = c.rope.rotary_dim.next_multiple_of(2);
        let odd = turned != c.rope.rotary_dim;
        if turned == 0 || c.head_dim < turned || (odd && c.rope.yarn.is_some()) {
            let expected = format!(
                "a factor that rotates {} of the {} channels of a head, not {}",
                if c.rope.yarn.is_some() { "an even number" } else { "some" },
                c.head_dim,
                c.rope.rotary_dim
            );
            return self.wrong("partial_rotary_factor", &expected);
        }
        if 1 << 18 < c.num_experts * c.num_hidden_layers() {
            return self.wrong("num_experts", "at most 2^18 experts in all layers together");
        }
        let products = [
            ("hidden_size", vec![c.vocab_size, c.hidden_size]),
            ("head_dim", vec![2, c.num_attention_heads, c.head_dim, c.hidden_size]),
            (
                "linear_num_value_heads",
                vec![4, c.linear_num_value_heads, c.linear_value_head_dim, c.hidden_size],
            ),
            (
                "linear_num_key_heads",
                vec![4, c.linear_num_key_heads, c.linear_key_head_dim, c.hidden_size],
            ),
            (
                "linear_key_head_dim",
                vec![c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim],
            ),
            (
                "linear_conv_kernel_dim",
                vec![
                    4,
                    c.linear_num_value_heads,
                    c.linear_value_head_dim,
                    c.linear_conv_kernel_dim,
                ],
            ),
            ("num_experts", vec![2, c.num_experts, c.moe_intermediate_size, c.hidden_size]),
            (
                "shared_expert_intermediate_size",
                vec![c.shared_expert_intermediate_size, c.hidden_size],
            ),
            ("intermediate_size", vec![c.intermediate_size, c.hidden_size]),
        ];
        for (key, factors) in products {
            let product = factors.iter().map(|&n| n as f64).product::<f64>();
            if 2.0_f64.powi(38) < product {
                return self.wrong(
                    key,
                    &format!(
                        "a size with which one tensor has at most 2^38 elements, not {product:.1e}"
                    ),
                );
            }
        }
        Ok(())
    }

    fn layer_types(&self, layers: usize) -> Result<Vec<Mixer>, ConfigError> {
        let Some(value) = self.get("layer_types") else {
            let interval = self.size("full_attention_interval", 4)?;
            let full = |i: usize| (i + 1).is_multiple_of(interval);
            return Ok((0..layers)
                .map(|i| if full(i) { Mixer::Full } else { Mixer::Linear })
                .collect());
        };
        let types: Option<Vec<Mixer>> = value.as_array().and_then(|types| {
            let mixer = |name: &Value| match name.as_str()? {
                "linear_attention" => Some(Mixer::Linear),
                "full_attention" => Some(Mixer::Full),
                _ => None,
            };
            types.iter().map(mixer).collect()
        });
        match types {
            Some(types) if types.len() == layers => Ok(types),
            _ => self.wrong(
                "layer_types",
                &format!(
                    "{layers} (num_hidden_layers) of \"linear_attention\" or \"full_attention\""
                ),
            ),
        }
    }

    /// A layer is sparse unless `mlp_only_layers` names it or `decoder_sparse_step` skips it.
    fn mlp_types(&self, layers: usize) -> Result<Vec<Mlp>, ConfigError> {
        let step = self.size("decoder_sparse_step", 1)?;
        let experts = self.get("num_experts").and_then(Value::as_u64) != Some(0);
        let only: Option<Vec<u64>> = match self.get("mlp_only_layers") {
            None => Some(Vec::new()),
            Some(value) => {
                value.as_array().and_then(|list| list.iter().map(Value::as_u64).collect())
            }
        };
        let Some(only) = only.filter(|only| only.iter().all(|&i| i < layers as u64)) else {
            return self.wrong("mlp_only_layers", &format!("a list of layers below {layers}"));
        };
        let sparse =
            |i: usize| experts && !only.contains(&(i as u64)) && (i + 1).is_multiple_of(step);
        Ok((0..layers).map(|i| if sparse(i) { Mlp::Sparse } else { Mlp::Dense }).collect())
    }

    /// The newer `rope_parameters`, or the older `rope_scaling` with `rope_theta` and
    /// `partial_rotary_factor` beside it; `rope_scaling` goes first where both are given, values
    /// inside the object before values beside it, as in transformers 5.23.0.
    fn rope(&self) -> Result<Rope, ConfigError> {
        let empty = Map::new();
        let inner = match self.nested("rope_scaling", "rope_scaling.")? {
            Some(inner) if !inner.object.is_empty() => inner,
            _ => self.nested("rope_parameters", "rope_parameters.")?.unwrap_or(Fields {
                origin: self.origin,
                path: "rope_parameters.",
                object: &empty,
            }),
        };
        let positive: fn(f64) -> bool = |x| 0.0 < x;
        let theta = self.float("rope_theta", 10_000.0, |x| 1.0 < x, "a number above 1")?;
        let theta = inner.float("rope_theta", theta, |x| 1.0 < x, "a number above 1")?;
        // Left out it is 0.25; null hides that default from the official code, which then rotates all.
        let left_out = !self.object.contains_key("partial_rotary_factor");
        let part = self.float(
            "partial_rotary_factor",
            if left_out { 0.25 } else { 1.0 },
            |x| 0.0 < x && x <= 1.0,
            "a number in (0, 1]",
        )?;
        let part = inner.float(
            "partial_rotary_factor",
            part,
            |x| 0.0 < x && x <= 1.0,
            "a number in (0, 1]",
        )?;
        let rotary_dim = (self.size("head_dim", 256)? as f64 * part) as usize;
        let kind = inner.get("rope_type").or_else(|| inner.get("type"));
        match kind.map(Value::as_str) {
            None | Some(Some("default")) => {
                inner.only(&[&["rope_type", "type", "rope_theta", "partial_rotary_factor"]])?;
                Ok(Rope { theta, rotary_dim, yarn: None })
            }
            Some(Some("yarn")) => {
                inner.only(&[&[
                    "rope_type",
                    "type",
                    "rope_theta",
                    "partial_rotary_factor",
                    "factor",
                    "attention_factor",
                    "beta_fast",
                    "beta_slow",
                    "mscale",
                    "mscale_all_dim",
                    "original_max_position_embeddings",
                    "truncate",
                ]])?;
                let max = self.size("max_position_embeddings", 32_768)?;
                let original = inner.size("original_max_position_embeddings", max)?;
                if inner.object.get("factor").is_none() {
                    return inner.wrong("factor", "a number of at least 1");
                }
                let implied = max as f64 / original as f64;
                let factor =
                    inner.float("factor", implied, |x| 1.0 <= x, "a number of at least 1")?;
                let scale = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
                let any: fn(f64) -> bool = |_| true;
                let mscale = inner.float("mscale", 0.0, any, "a number")?;
                let mscale_all = inner.float("mscale_all_dim", 0.0, any, "a number")?;
                let derived = if mscale != 0.0 && mscale_all != 0.0 {
                    scale(mscale) / scale(mscale_all)
                } else {
                    scale(1.0)
                };
                // Zero means "the default" to the official code, as an absent value does.
                let or = |x: f64, default: f64| if x == 0.0 { default } else { x };
                let yarn = Yarn {
                    factor,
                    original_max_position_embeddings: original,
                    beta_fast: or(
                        inner.float("beta_fast", 32.0, |x| 0.0 <= x, "a number of at least 0")?,
                        32.0,
                    ),
                    beta_slow: or(
                        inner.float("beta_slow", 1.0, |x| 0.0 <= x, "a number of at least 0")?,
                        1.0,
                    ),
                    truncate: inner.flag("truncate", true)?,
                    attention_factor: inner.float(
                        "attention_factor",
                        derived,
                        positive,
                        "a number above 0",
                    )?,
                };
                if yarn.beta_fast < yarn.beta_slow {
                    return inner
                        .wrong("beta_fast", &format!("at least beta_slow {}", yarn.beta_slow));
                }
                Ok(Rope { theta, rotary_dim, yarn: Some(yarn) })
            }
            Some(_) => inner.wrong(
                if inner.get("rope_type").is_some() { "rope_type" } else { "type" },
                "\"default\" or \"yarn\"",
            ),
        }
    }

    fn eos(&self) -> Result<Vec<u32>, ConfigError> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = match self.get("eos_token_id") {
            None => Some(Vec::new()),
            Some(Value::Array(list)) => list.iter().map(id).collect(),
            Some(value) => id(value).map(|id| vec![id]),
        };
        ids.map_or_else(|| self.wrong("eos_token_id", "a token id or a list of them"), Ok)
    }

    fn dtype(&self) -> Result<Dtype, ConfigError> {
        let key = if self.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
        match self.get(key).map(Value::as_str) {
            None | Some(Some("float32")) => Ok(Dtype::F32),
            Some(Some("float16")) => Ok(Dtype::F16),
            Some(Some("bfloat16")) => Ok(Dtype::Bf16),
            Some(_) => self.wrong(key, "\"float32\", \"float16\" or \"bfloat16\""),
        }
    }

    fn fp8(&self) -> Result<Option<Fp8>, ConfigError> {
        let Some(inner) = self.nested("quantization_config", "quantization_config.")? else {
            return Ok(None);
        };
        inner.only(&[&[
            "quant_method",
            "fmt",
            "activation_scheme",
            "weight_block_size",
            "modules_to_not_convert",
            "dequantize",
            "ignored_layers",
            "scale_fmt",
            "expert_dtype",
        ]])?;
        for (key, only) in [
            ("quant_method", "fp8"),
            ("fmt", "e4m3"),
            ("activation_scheme", "dynamic"),
            ("expert_dtype", "fp8"),
        ] {
            let required = key == "quant_method";
            let got = inner.get(key).map(|value| value.as_str() == Some(only));
            if got == Some(false) || (required && got.is_none()) {
                return inner.wrong(key, &format!("{only:?}"));
            }
        }
        let block = match inner.get("weight_block_size") {
            None => Some(vec![128, 128]),
            Some(value) => {
                value.as_array().and_then(|list| list.iter().map(Value::as_u64).collect())
            }
        };
        let block =
            block.filter(|b| b.len() == 2 && b.iter().all(|b| (1..=MAX as u64).contains(b)));
        let Some(block) = block else {
            return inner.wrong("weight_block_size", "two sizes of at least 1");
        };
        let names = match inner.get("modules_to_not_convert") {
            None => Some(Vec::new()),
            Some(value) => value.as_array().and_then(|list| {
                list.iter().map(|name| name.as_str().map(str::to_owned)).collect()
            }),
        };
        let Some(modules_to_not_convert) = names else {
            return inner.wrong("modules_to_not_convert", "a list of module names");
        };
        Ok(Some(Fp8 {
            weight_block_size: [block[0] as usize, block[1] as usize],
            modules_to_not_convert,
        }))
    }
}
