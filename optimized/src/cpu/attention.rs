//! CPU variants of `attention`.

use golden::{Variant, ops::attention::Attention};

/// Every CPU variant, plainest first.
pub static VARIANTS: &[&dyn Variant<Attention>] = &[];
