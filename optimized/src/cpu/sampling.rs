//! CPU variants of `sampling`.

use golden::{Variant, ops::sampling::Sampling};

/// Every CPU variant, plainest first.
pub static VARIANTS: &[&dyn Variant<Sampling>] = &[];
