//! What is the answer, plainly?
//!
//! One function per op, the formula above it, in the order of the paper. Generic over
//! [`Real`]: `f32` is the plain reference, `f64` the oracle. No SIMD, no threads, no tolerance.

pub mod real;

mod causal_conv1d;
mod embedding;
mod fp8_dequant;
mod gated_delta_rule;
mod gdn_gates;
mod gdn_layer;
mod l2_norm;
mod linear;
mod rms_norm;
mod rms_norm_gated;

pub use crate::{
    causal_conv1d::causal_conv1d,
    embedding::embedding,
    fp8_dequant::fp8_dequant,
    gated_delta_rule::{gated_delta_rule, gated_delta_rule_chunked},
    gdn_gates::gdn_gates,
    gdn_layer::gdn_layer,
    l2_norm::l2_norm,
    linear::linear,
    real::Real,
    rms_norm::rms_norm,
    rms_norm_gated::rms_norm_gated,
};
