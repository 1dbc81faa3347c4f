//! CPU variants of `lm_head`.

use golden::{Variant, ops::lm_head::LmHead};

/// Every CPU variant, plainest first.
pub static VARIANTS: &[&dyn Variant<LmHead>] = &[];
