use proptest::prelude::*;
use serde_json::{Value, json};

use super::{Config, Mixer, Mlp, Preset, Rope};
use crate::Dtype;

fn tiny() -> Value {
    Preset::Tiny.config(None, None).unwrap().to_json()
}

fn with(key: &str, value: Value) -> Value {
    let mut json = tiny();
    json[key] = value;
    json
}

fn parse(json: &Value) -> Result<Config, String> {
    Config::parse(&json.to_string(), "config.json").map_err(|e| e.0)
}

#[test]
fn presets_survive_the_round_trip() {
    for preset in [Preset::Tiny, Preset::Ragged, Preset::Heads, Preset::Slice, Preset::Official] {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::Fp8] {
            let config = preset.config(Some(5), Some(32)).unwrap().stored_as(dtype);
            assert_eq!(parse(&config.to_json()).unwrap(), config);
        }
    }
}

#[test]
fn defaults_are_those_of_the_official_class() {
    let c = parse(&json!({"model_type": "qwen3_next"})).unwrap();
    assert_eq!(
        (c.num_hidden_layers(), c.max_position_embeddings, c.intermediate_size),
        (48, 32_768, 5632)
    );
    assert_eq!((c.rope.theta, c.rope.rotary_dim), (10_000.0, 64));
    assert_eq!(c.layer_types[3], Mixer::Full);
    assert_eq!(c.layer_types.iter().filter(|m| **m == Mixer::Full).count(), 12);
}

#[test]
fn both_rope_dialects_say_the_same() {
    let old = with(
        "rope_scaling",
        json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}),
    );
    let mut new = tiny();
    let object = new.as_object_mut().unwrap();
    for key in ["rope_scaling", "rope_theta", "partial_rotary_factor"] {
        object.remove(key);
    }
    new["rope_parameters"] = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024,
        "rope_theta": 10000.0, "partial_rotary_factor": 0.25});
    let (old, new) = (parse(&old).unwrap(), parse(&new).unwrap());
    assert_eq!(old, new);
    let yarn = old.rope.yarn.unwrap();
    assert!((yarn.attention_factor - 1.138_629_436_111_989).abs() < 1e-15);
    assert_eq!(old.context_limit(), 4096);
}

#[test]
fn dense_layers_follow_both_fields() {
    let mut json = with("mlp_only_layers", json!([1]));
    json["decoder_sparse_step"] = json!(2);
    json["num_hidden_layers"] = json!(6);
    let types = parse(&json).unwrap().mlp_types;
    assert_eq!(
        types.iter().map(|t| *t == Mlp::Sparse).collect::<Vec<_>>(),
        [false, false, false, true, false, true]
    );
}

#[test]
fn every_bad_field_is_named() {
    let bad = [
        ("model_type", json!("llama"), "expected \"qwen3_next\", got \"llama\""),
        ("architectures", json!(["LlamaForCausalLM"]), "expected [\"Qwen3NextForCausalLM\"]"),
        ("hidden_size", json!(0), "expected an integer from 1"),
        ("hidden_size", json!(-1), "got -1"),
        ("hidden_size", json!(1e300), "got 1e+300"),
        ("hidden_size", json!("64"), "got \"64\""),
        ("num_hidden_layers", json!(1_000_000), "expected at most 4096"),
        ("num_key_value_heads", json!(3), "a divisor of num_attention_heads 4"),
        ("linear_num_key_heads", json!(3), "a divisor of linear_num_value_heads 4"),
        ("num_experts_per_tok", json!(17), "at most num_experts 16"),
        ("partial_rotary_factor", json!(0.01), "rotates some of the 32 channels of a head, not 0"),
        ("sliding_window", json!(128), "expected null, or use_sliding_window false"),
        ("layer_types", json!(["full_attention"]), "expected 4 (num_hidden_layers)"),
        (
            "layer_types",
            json!(["sliding_attention", "full_attention", "full_attention", "full_attention"]),
            "linear_attention",
        ),
        ("mlp_only_layers", json!([4]), "layers below 4"),
        ("hidden_act", json!("gelu"), "expected \"silu\""),
        ("attention_bias", json!(true), "expected false"),
        ("use_sliding_window", json!(true), "expected false"),
        ("rms_norm_eps", json!(0), "between 0 and 1"),
        ("rope_theta", json!(-1.0), "above 1"),
        (
            "rope_scaling",
            json!({"rope_type": "llama3", "factor": 8.0}),
            "rope_scaling.rope_type: expected \"default\" or \"yarn\"",
        ),
        ("rope_scaling", json!({"rope_type": "yarn"}), "rope_scaling.factor"),
        ("rope_scaling", json!({"rope_type": "yarn", "factor": 0.5}), "rope_scaling.factor"),
        ("rope_scaling", json!({"mrope_section": [11, 11, 10]}), "rope_scaling.mrope_section"),
        ("attn_logit_softcapping", json!(50.0), "attn_logit_softcapping"),
        (
            "quantization_config",
            json!({"quant_method": "gptq"}),
            "quantization_config.quant_method: expected \"fp8\"",
        ),
        (
            "quantization_config",
            json!({"quant_method": "fp8", "weight_block_size": [0, 1]}),
            "weight_block_size",
        ),
        ("torch_dtype", json!("int8"), "torch_dtype"),
        ("eos_token_id", json!(-3), "eos_token_id"),
        ("vocab_size", json!(16_777_217), "vocab_size"),
    ];
    for (key, value, expected) in bad {
        let message = parse(&with(key, value.clone())).expect_err(&format!("{key} = {value}"));
        assert!(
            message.starts_with("config.json: ") && message.contains(expected),
            "{key}: {message}"
        );
        assert!(!message.contains('\n'));
    }
}

#[test]
fn rotated_channels_are_those_of_the_official_code() {
    let rotary = |key, value| parse(&with(key, value)).map(|c| c.rope.rotary_dim);
    // int(32 * 0.1): three channels have two frequencies, and four are turned.
    assert_eq!(rotary("partial_rotary_factor", json!(0.1)), Ok(3));
    assert_eq!(rotary("partial_rotary_factor", Value::Null), Ok(32));
    assert!(rotary("head_dim", json!(1)).is_err());
    let mut yarn = with("rope_scaling", json!({"rope_type": "yarn", "factor": 4.0}));
    yarn["partial_rotary_factor"] = json!(0.1);
    assert!(parse(&yarn).unwrap_err().contains("even number"));
}

#[test]
fn every_rotary_width_survives_the_round_trip() {
    let mut config = Preset::Tiny.config(None, None).unwrap();
    for head_dim in 2..=256 {
        for rotary_dim in 1..=head_dim / 2 * 2 {
            config.head_dim = head_dim;
            config.rope.rotary_dim = rotary_dim;
            assert_eq!(
                parse(&config.to_json()).unwrap().rope,
                config.rope,
                "{rotary_dim}/{head_dim}"
            );
        }
    }
}

#[test]
fn a_window_that_is_not_used_is_accepted() {
    let mut json = with("sliding_window", json!(4096));
    json["use_sliding_window"] = json!(false);
    assert!(parse(&json).is_ok());
}

#[test]
fn what_the_official_fp8_config_writes_is_accepted() {
    let mut fp8 = json!({"quant_method": "fp8", "modules_to_not_convert": null, "modules_to_convert": null,
        "activation_scheme": "dynamic", "weight_block_size": [128, 128], "dequantize": false,
        "scale_fmt": "float", "expert_dtype": "fp8"});
    assert!(parse(&with("quantization_config", fp8.clone())).is_ok());
    fp8["expert_dtype"] = json!("fp4");
    let message = parse(&with("quantization_config", fp8)).unwrap_err();
    assert!(message.contains("quantization_config.expert_dtype: expected \"fp8\""), "{message}");
}

#[test]
fn what_save_pretrained_writes_is_accepted() {
    let json = with("transformers_version", json!("5.23.0"));
    assert!(parse(&json).is_ok());
    assert!(parse(&with("some_future_field", Value::Null)).is_ok());
}

proptest! {
    #[test]
    fn no_text_panics(text in ".{0,200}") {
        let _ = Config::parse(&text, "x");
    }

    #[test]
    fn no_value_panics(key in "[a-z_]{1,12}|hidden_size|layer_types|rope_scaling|num_experts|mlp_only_layers",
                       number in any::<f64>(), integer in any::<i64>(), text in ".{0,12}") {
        for value in [json!(number), json!(integer), json!(text), json!([integer, text]), json!({ text.clone(): number })] {
            let _ = parse(&with(&key, value));
        }
    }
}

/// `int(20 * 0.25)` is odd; values of `Qwen3NextRotaryEmbedding`, transformers 5.23.0.
#[test]
fn an_odd_number_of_rotated_channels_turns_one_more() {
    let rope = Rope { theta: 10_000.0, rotary_dim: 5, yarn: None };
    assert_eq!(rope.inv_freq(), [1.0, 0.025_118_863, 0.000_630_957_3]);
}
