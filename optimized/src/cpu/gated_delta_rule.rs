//! CPU variants of `gated_delta_rule`.

use golden::{Variant, ops::gated_delta_rule::GatedDeltaRule};

/// Every CPU variant, plainest first.
pub static VARIANTS: &[&dyn Variant<GatedDeltaRule>] = &[];
