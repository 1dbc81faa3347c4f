//! Do they agree, and how fast?

mod answer;
pub mod ask;
pub mod bound;
pub mod clock;
mod drawn;
pub mod evidence;
#[cfg(test)]
mod fake;
pub mod felt;
pub mod filter;
pub mod foreign;
pub mod generate;
mod guard;
mod host;
pub mod invariance;
pub mod judge;
pub mod mutate;
pub mod paths;
pub mod plan;
pub mod registry;
pub mod report;
pub mod sabotage;
mod same;
mod sequence;
pub mod shrink;
mod spread;
pub mod trace;
pub mod verify;
mod way;

pub use host::{host, peak_memory, use_threads};
pub use optimized::doors::World;

use std::sync::Arc;

use golden::{Engine, Error, Weights};

/// An engine by name: `reference` in `f32` or `f64`, with a fault planted in its wiring if one is
/// named.
///
/// # Errors
/// If there is none of that name.
pub fn engine(
    name: &str,
    number: &str,
    weights: Arc<dyn Weights>,
    plant: Option<&str>,
) -> Result<Box<dyn Engine>, Error> {
    let plant = match plant {
        None => None,
        Some(name) => Some(reference::Plant::by_name(name).ok_or_else(|| {
            let known: Vec<_> = plants().map(|(name, _)| name).collect();
            format!("plant {name:?}: expected one of {}", known.join(", "))
        })?),
    };
    match (name, number) {
        ("reference", "f32") => {
            Ok(Box::new(reference::Model::<f32>::new(weights).with_plant(plant)))
        }
        ("reference", "f64") => {
            Ok(Box::new(reference::Model::<f64>::new(weights).with_plant(plant)))
        }
        ("reference", _) => Err(format!("number {number:?}: expected f32 or f64").into()),
        _ => Err(format!("engine {name:?}: expected reference").into()),
    }
}

/// Whether a fault of that name can be planted in the reference model.
fn is_plant(name: &str) -> bool {
    reference::Plant::by_name(name).is_some()
}

/// Faults that can be planted in the reference model: name and public report.
pub fn plants() -> impl Iterator<Item = (&'static str, &'static str)> {
    reference::Plant::ALL.iter().map(|&(name, _, cite)| (name, cite))
}
