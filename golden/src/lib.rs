//! What is asked, and what is the same answer?
//!
//! Shapes, inputs, costs, checkpoint files, recorded answers and comparison. Never the arithmetic
//! of an op, never time, never a device.

#[macro_use]
mod macros;

pub mod checkpoint;
pub mod compare;
pub mod config;
pub mod dtype;
pub mod engine;
pub mod file;
pub mod fp8;
pub mod inventory;
pub mod map;
pub mod names;
pub mod narrow;
pub mod op;
pub mod ops;
pub mod packed;
pub mod plan;
pub mod recording;
pub mod rng;
pub mod sketch;
pub mod split;
pub mod synth;
pub mod synthetic;
pub mod tap;
pub mod tensor;
pub mod weights;

pub use crate::{
    config::Config,
    dtype::Dtype,
    engine::Engine,
    narrow::Narrow,
    op::{
        Apart, Calls, Case, Claims, Clock, Clocked, Cost, DOMAIN, Error, Fill, Host, Op, Plant,
        Prepared, Set, Spec, Variant,
    },
    plan::Plan,
    rng::Rng,
    tensor::{Cast, Element, Number, Tensor1, Tensor2, Tensor3, Tensor4, Tensors, View, ViewMut},
    weights::Weights,
};

/// Opens a model by its name on the command line: a checkpoint folder, or `synthetic:…`.
///
/// # Errors
/// One line saying what is wrong with it.
pub fn open(model: &str) -> Result<std::sync::Arc<dyn Weights>, weights::WeightError> {
    if model.starts_with("synthetic:") {
        let source: synthetic::Synthetic = model.parse().map_err(weights::WeightError)?;
        return Ok(std::sync::Arc::new(source));
    }
    Ok(std::sync::Arc::new(checkpoint::Checkpoint::open(std::path::Path::new(model))?))
}
