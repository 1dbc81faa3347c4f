//! CPU variants of `gdn_layer`.

use golden::{Variant, ops::gdn_layer::GdnLayer};

/// Every CPU variant, plainest first.
pub static VARIANTS: &[&dyn Variant<GdnLayer>] = &[];
