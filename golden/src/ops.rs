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
