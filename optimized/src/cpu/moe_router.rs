//! CPU variants of `moe_router`.

use golden::{Variant, ops::moe_router::MoeRouter};

/// Every CPU variant, plainest first.
pub static VARIANTS: &[&dyn Variant<MoeRouter>] = &[];
