//! One file per op: what it is asked, with which letters, shapes and fills.

pub mod causal_conv1d;
pub mod embedding;
pub mod fp8_dequant;
pub mod gated_delta_rule;
pub mod gdn_gates;
pub mod gdn_layer;
pub mod l2_norm;
pub mod linear;
pub mod rms_norm;
pub mod rms_norm_gated;
