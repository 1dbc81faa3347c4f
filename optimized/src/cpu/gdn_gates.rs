//! CPU variants of `gdn_gates`.

use golden::{Variant, ops::gdn_gates::GdnGates};

/// Every CPU variant, plainest first.
pub static VARIANTS: &[&dyn Variant<GdnGates>] = &[];
