//! One file per op: what it is asked, with which letters, shapes and fills.

pub mod attention;
pub mod attention_layer;
pub mod causal_conv1d;
pub mod embedding;
pub mod fp8_dequant;
pub mod gated_delta_rule;
pub mod gdn_gates;
pub mod gdn_layer;
pub mod l2_norm;
pub mod linear;
pub mod lm_head;
pub mod model;
pub mod moe_experts;
pub mod moe_layer;
pub mod moe_router;
pub mod mtp;
pub mod rms_norm;
pub mod rms_norm_gated;
pub mod rope;
pub mod sampling;
pub mod shared_expert;

/// The text of everything that inputs are drawn by.
pub const SOURCES: &[&str] = &[
    include_str!("op.rs"),
    include_str!("packed.rs"),
    include_str!("plan.rs"),
    include_str!("rng.rs"),
    include_str!("synthetic.rs"),
    include_str!("ops/attention.rs"),
    include_str!("ops/attention_layer.rs"),
    include_str!("ops/causal_conv1d.rs"),
    include_str!("ops/embedding.rs"),
    include_str!("ops/fp8_dequant.rs"),
    include_str!("ops/gated_delta_rule.rs"),
    include_str!("ops/gdn_gates.rs"),
    include_str!("ops/gdn_layer.rs"),
    include_str!("ops/l2_norm.rs"),
    include_str!("ops/linear.rs"),
    include_str!("ops/lm_head.rs"),
    include_str!("ops/model.rs"),
    include_str!("ops/moe_experts.rs"),
    include_str!("ops/moe_layer.rs"),
    include_str!("ops/moe_router.rs"),
    include_str!("ops/mtp.rs"),
    include_str!("ops/rms_norm.rs"),
    include_str!("ops/rms_norm_gated.rs"),
    include_str!("ops/rope.rs"),
    include_str!("ops/sampling.rs"),
    include_str!("ops/shared_expert.rs"),
];
