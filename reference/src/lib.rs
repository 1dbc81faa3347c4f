//! What is the answer, plainly?
//!
//! One function per op, the formula above it, in the order of the paper. Generic over
//! [`Real`]: `f32` is the plain reference, `f64` the oracle. No SIMD, no threads, no tolerance.

pub mod real;

mod attention;
mod attention_layer;
mod causal_conv1d;
mod delta_rule;
mod embedding;
mod emulated;
mod fp8_dequant;
mod gated_delta_rule;
mod gdn_gates;
mod gdn_layer;
mod l2_norm;
mod linear;
mod lm_head;
mod load;
mod model;
mod moe_experts;
mod moe_layer;
mod moe_router;
mod mtp;
mod plants;
mod probe;
mod rms_norm;
mod rms_norm_gated;
mod rope;
mod sampling;
mod shared_expert;

pub use crate::{
    attention::attention,
    attention_layer::{attention_layer, attention_layer_seen},
    causal_conv1d::causal_conv1d,
    delta_rule::delta_rule,
    embedding::embedding,
    emulated::Emulated,
    fp8_dequant::fp8_dequant,
    gated_delta_rule::{Gates, gated_delta_rule, gated_delta_rule_chunked},
    gdn_gates::gdn_gates,
    gdn_layer::{gdn_layer, gdn_layer_seen},
    l2_norm::l2_norm,
    linear::linear,
    lm_head::lm_head,
    model::{Model, model_op, model_op_forced},
    moe_experts::{Expert, moe_experts, moe_experts_from},
    moe_layer::{moe_layer, moe_layer_forced, moe_layer_seen},
    moe_router::{moe_router, moe_router_forced},
    mtp::mtp,
    plants::{Place, Plant},
    probe::Probe,
    real::Real,
    rms_norm::rms_norm,
    rms_norm_gated::rms_norm_gated,
    rope::rope,
    sampling::sampling,
    shared_expert::{shared_expert, swiglu},
};

/// The text of everything that an answer depends on.
const SOURCES: &[&str] = &[
    include_str!("attention.rs"),
    include_str!("attention_layer.rs"),
    include_str!("causal_conv1d.rs"),
    include_str!("delta_rule.rs"),
    include_str!("embedding.rs"),
    include_str!("emulated.rs"),
    include_str!("fp8_dequant.rs"),
    include_str!("gated_delta_rule.rs"),
    include_str!("gdn_gates.rs"),
    include_str!("gdn_layer.rs"),
    include_str!("l2_norm.rs"),
    include_str!("linear.rs"),
    include_str!("lm_head.rs"),
    include_str!("load.rs"),
    include_str!("model.rs"),
    include_str!("moe_experts.rs"),
    include_str!("moe_layer.rs"),
    include_str!("moe_router.rs"),
    include_str!("mtp.rs"),
    include_str!("plants.rs"),
    include_str!("probe.rs"),
    include_str!("real.rs"),
    include_str!("rms_norm.rs"),
    include_str!("rms_norm_gated.rs"),
    include_str!("rope.rs"),
    include_str!("sampling.rs"),
    include_str!("shared_expert.rs"),
    include_str!("real/planned.rs"),
    include_str!("real/planned/truncated.rs"),
];

/// blake3 of the text of the reference and of the contracts: an answer that was kept is still that
/// of this code if this is the same.
pub fn source_hash() -> &'static str {
    static HASH: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    HASH.get_or_init(|| {
        let mut hasher = blake3::Hasher::new();
        for text in golden::ops::SOURCES.iter().chain(SOURCES) {
            hasher.update(text.as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_source_is_hashed() {
        let mut folders = vec![
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src"),
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../golden/src/ops"),
        ];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
                let path = entry.path();
                if path.is_dir() {
                    folders.push(path);
                } else if !path.ends_with("lib.rs") && !path.ends_with("tests.rs") {
                    let text = std::fs::read_to_string(&path).unwrap();
                    let known = SOURCES.iter().chain(golden::ops::SOURCES);
                    assert!(known.into_iter().any(|source| *source == text), "{path:?}");
                }
            }
        }
    }
}
