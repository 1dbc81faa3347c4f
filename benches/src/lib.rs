//! Do they agree, and how fast?

pub mod ask;
pub mod clock;
pub mod filter;
pub mod plan;
pub mod registry;
pub mod report;
pub mod verify;

use std::sync::Arc;

use golden::{Engine, Error, Weights};

/// An engine by name: `reference` in `f32` or `f64`.
///
/// # Errors
/// If there is none of that name.
pub fn engine(
    name: &str,
    number: &str,
    weights: Arc<dyn Weights>,
) -> Result<Box<dyn Engine>, Error> {
    match (name, number) {
        ("reference", "f32") => Ok(Box::new(reference::Model::<f32>::new(weights))),
        ("reference", "f64") => Ok(Box::new(reference::Model::<f64>::new(weights))),
        ("reference", _) => Err(format!("number {number:?}: expected f32 or f64").into()),
        _ => Err(format!("engine {name:?}: expected reference").into()),
    }
}
