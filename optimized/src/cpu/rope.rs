//! CPU variants of `rope`.

use golden::{Variant, ops::rope::Rope};

/// Every CPU variant, plainest first.
pub static VARIANTS: &[&dyn Variant<Rope>] = &[];
