//! CPU variants of `linear`.

use golden::{Variant, ops::linear::Linear};

/// Every CPU variant, plainest first.
pub static VARIANTS: &[&dyn Variant<Linear>] = &[];
