//! Variants that run on the processor.
//!
//! `cpu/portable` is plain safe Rust without target features: the fallback on any machine, and the
//! first thing that is judged. It keeps activations in the storage type of the problem (f32, bf16 or
//! f16) and computes in f32.

mod activation;
mod aligned;
pub mod attention;
pub mod attention_layer;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
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
pub mod pin;
mod pool;
mod portable;
mod quantised;
pub mod rms_norm;
pub mod rms_norm_gated;
pub mod roof;
mod room;
pub mod rope;
pub mod sampling;
mod seen;
pub mod shared_expert;
mod simd;
mod stored;
mod sums;
pub mod timed;
mod vector;
mod weight;
