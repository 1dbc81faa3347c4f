//! What is the answer, plainly?
//!
//! One function per op, the formula above it, in the order of the paper. Generic over
//! [`Real`]: `f32` is the plain reference, `f64` the oracle. No SIMD, no threads, no tolerance.

pub mod real;

mod attention;
mod attention_layer;
mod causal_conv1d;
mod embedding;
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
mod rms_norm;
mod rms_norm_gated;
mod rope;
mod sampling;
mod shared_expert;

pub use crate::{
    attention::attention,
    attention_layer::attention_layer,
    causal_conv1d::causal_conv1d,
    embedding::embedding,
    fp8_dequant::fp8_dequant,
    gated_delta_rule::{gated_delta_rule, gated_delta_rule_chunked},
    gdn_gates::gdn_gates,
    gdn_layer::gdn_layer,
    l2_norm::l2_norm,
    linear::linear,
    lm_head::lm_head,
    model::{Model, model_op},
    moe_experts::{Expert, moe_experts, moe_experts_from},
    moe_layer::moe_layer,
    moe_router::{moe_router, moe_router_forced},
    mtp::mtp,
    plants::Plant,
    real::Real,
    rms_norm::rms_norm,
    rms_norm_gated::rms_norm_gated,
    rope::{inv_freq, rope},
    sampling::sampling,
    shared_expert::{shared_expert, swiglu},
};
