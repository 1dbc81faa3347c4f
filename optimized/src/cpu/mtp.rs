//! CPU variants of `mtp`.

use golden::{Variant, ops::mtp::Mtp};

/// Every CPU variant, plainest first.
pub static VARIANTS: &[&dyn Variant<Mtp>] = &[];
