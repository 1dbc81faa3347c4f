//! What is the answer, plainly?
//!
//! One function per op, the formula above it, in the order of the paper. Generic over
//! [`Real`]: `f32` is the plain reference, `f64` the oracle. No SIMD, no threads, no tolerance.

pub mod real;
mod rms_norm;

pub use crate::{real::Real, rms_norm::rms_norm};
