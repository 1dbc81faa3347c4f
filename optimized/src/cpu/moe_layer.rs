//! CPU variants of `moe_layer`.

use golden::{Variant, ops::moe_layer::MoeLayer};

/// Every CPU variant, plainest first.
pub static VARIANTS: &[&dyn Variant<MoeLayer>] = &[];
