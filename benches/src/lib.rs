//! Do they agree, and how fast?

mod answer;
pub mod ask;
pub mod bisect;
pub mod bound;
pub mod ceilings;
pub mod clock;
pub mod dear;
mod drawn;
pub mod emulation;
pub mod evidence;
#[cfg(test)]
mod fake;
pub mod felt;
pub mod files;
pub mod filter;
pub mod foreign;
pub mod formats;
pub mod generate;
mod guard;
mod host;
pub mod invariance;
pub mod judge;
pub mod kernels;
pub mod mutate;
mod number;
pub mod pairs;
pub mod paths;
pub mod plan;
pub mod registry;
pub mod report;
pub mod roofline;
pub mod sabotage;
mod same;
pub mod scale;
mod sequence;
pub mod shrink;
pub mod speed;
mod spread;
pub mod stats;
pub mod timing;
pub mod trace;
pub mod turns;
pub mod verify;
mod way;

pub use host::{
    available_memory, caches, forget_peak, gpus, host, peak_memory, pin_threads, use_gpus,
    use_threads,
};
pub use number::Number;
pub use optimized::{
    Kept,
    cpu::model::{Loading, Store, StoreError},
    cuda::{Gpu, Trapped, gpu, model::Unfit, several},
    doors::World,
};

use std::sync::Arc;

use golden::{
    Engine, Error, Weights,
    engine::{Demand, Memory},
    weights::NarrowedWeights,
};

/// An engine by name: `reference` in `f32`, `f64` or (the official code in bf16, emulated) `bf16`, with a fault planted in its
/// wiring if one is named; or `cpu`, the fast kernels of this machine, over weights as they are
/// (`f32`: it computes in that) or narrowed (`int8`, `int4`); or `cuda`, one GPU of this machine or [as many as were asked
/// for](use_gpus), in `f32` or `bf16`; both keep keys and values as the number says.
///
/// # Errors
/// If there is none of that name.
pub fn engine<'a>(
    name: &str,
    number: impl Into<Number<'a>>,
    weights: Arc<dyn Weights>,
    plant: Option<&str>,
) -> Result<Box<dyn Engine>, Error> {
    let mut loading = Loading { tell: &mut |_, _| true, store: None };
    engine_with(name, number, weights, plant, &mut loading)
}

/// The same, told of weights that are narrowed, or given them narrowed.
///
/// # Errors
/// If there is none of that name, or who is told ends it.
pub fn engine_with<'a>(
    name: &str,
    number: impl Into<Number<'a>>,
    weights: Arc<dyn Weights>,
    plant: Option<&str>,
    loading: &mut Loading<'_>,
) -> Result<Box<dyn Engine>, Error> {
    let plant = wiring(plant)?;
    let Number { name: number, kept } = number.into();
    if let ("reference", Some(kept)) = (name, kept) {
        return Err(
            format!("kv-cache {kept}: the reference keeps keys and values as they are").into()
        );
    }
    match (name, number) {
        ("reference", "f32") => {
            Ok(Box::new(reference::Model::<f32>::new(weights).with_plant(plant)))
        }
        ("reference", "f64") => {
            Ok(Box::new(reference::Model::<f64>::new(weights).with_plant(plant)))
        }
        ("reference", "bf16") if weights.config().fp8.is_none() => {
            Ok(Box::new(reference::Emulated::hf_bf16(weights, plant)))
        }
        ("reference", "bf16") => {
            Err("number bf16: of weights in FP8 there is no official run in bf16 to emulate".into())
        }
        ("reference", _) => Err(format!("number {number:?}: expected f32, f64 or bf16").into()),
        ("cpu" | "cuda", _) if plant.is_some() => {
            Err("plants are of the reference's wiring".into())
        }
        ("cpu", format) => optimized::cpu::model::engine(&*weights, format, kept, loading),
        ("cuda", format) => {
            optimized::cuda::model::engine(&*weights, format, kept, gpus(), loading.tell)
        }
        _ => Err(format!("engine {name:?}: expected reference, cpu or cuda").into()),
    }
}

/// What [`engine`] would need of the machine's memory to be asked this, `cuda` of each GPU's; `None` of an engine
/// that does not say.
///
/// # Errors
/// If there is no such number, or a weight is missing.
pub fn memory<'a>(
    name: &str,
    number: impl Into<Number<'a>>,
    weights: &dyn Weights,
    demand: &Demand,
) -> Result<Option<Memory>, Error> {
    let Number { name: number, kept } = number.into();
    match name {
        "cpu" => optimized::cpu::model::memory(weights, number, kept, demand).map(Some),
        "cuda" => optimized::cuda::model::memory(weights, number, kept, gpus(), demand).map(Some),
        _ => Ok(None),
    }
}

/// Bytes of the memory that an engine of that name computes in and that nobody has; `None` if the machine
/// does not tell.
///
/// # Errors
/// [`Unfit`] if it is the GPU's, and there is none.
pub fn available(name: &str) -> Result<Option<u64>, Error> {
    match name {
        "cuda" => optimized::cuda::model::free(gpus()).map(Some),
        _ => Ok(available_memory()),
    }
}

/// Weights as an engine of that name and number keeps them: what the reference is given beside it.
///
/// # Errors
/// If no reference can be.
pub fn as_kept(
    engine: &str,
    number: &str,
    weights: Arc<dyn Weights>,
) -> Result<Arc<dyn Weights>, Error> {
    let to = golden::Narrow::of_number(number);
    if !["cpu", "cuda"].contains(&engine) || (to.is_none() && number != "bf16") {
        return Ok(weights);
    }
    Ok(Arc::new(NarrowedWeights::new(weights, to)?))
}

/// Bytes that are in use of the memory that an engine of that name computes in: the most that the process held
/// since [`forget_peak`], `cuda` of the fullest GPU now, other processes included. `None` where the machine does not tell.
pub fn held(name: &str) -> Option<u64> {
    match (name, gpu()) {
        ("cuda", Ok(gpu)) => {
            Some(gpu.memory.saturating_sub(optimized::cuda::model::free(gpus()).ok()?))
        }
        ("cuda", Err(_)) => None,
        _ => peak_memory(),
    }
}

/// The fault of that name.
fn wiring(plant: Option<&str>) -> Result<Option<reference::Plant>, Error> {
    let Some(name) = plant else { return Ok(None) };
    let known = || plants().map(|(name, _)| name).collect::<Vec<_>>().join(", ");
    let found = reference::Plant::by_name(name);
    Ok(Some(found.ok_or_else(|| format!("plant {name:?}: expected one of {}", known()))?))
}

/// The emulation of the official code in bf16, with a fault planted in its wiring or not.
///
/// # Errors
/// If there is no such fault.
pub fn emulated(
    weights: Arc<dyn Weights>,
    plant: Option<&str>,
) -> Result<reference::Emulated, Error> {
    Ok(reference::Emulated::hf_bf16(weights, wiring(plant)?))
}

/// Whether a fault of that name can be planted in the reference model.
fn is_plant(name: &str) -> bool {
    reference::Plant::by_name(name).is_some()
}

/// Faults that can be planted in the reference model: name and public report.
pub fn plants() -> impl Iterator<Item = (&'static str, &'static str)> {
    reference::Plant::ALL.iter().map(|&(name, _, cite)| (name, cite))
}
