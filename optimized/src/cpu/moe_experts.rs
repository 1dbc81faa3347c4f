//! CPU variants of `moe_experts`.

use golden::{Variant, ops::moe_experts::MoeExperts};

/// Every CPU variant, plainest first.
pub static VARIANTS: &[&dyn Variant<MoeExperts>] = &[];
