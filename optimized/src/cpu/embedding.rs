//! CPU variants of `embedding`.

use golden::{Variant, ops::embedding::Embedding};

/// Every CPU variant, plainest first.
pub static VARIANTS: &[&dyn Variant<Embedding>] = &[];
