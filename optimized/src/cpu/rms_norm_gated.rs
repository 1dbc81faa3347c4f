//! CPU variants of `rms_norm_gated`.

use golden::{Variant, ops::rms_norm_gated::RmsNormGated};

/// Every CPU variant, plainest first.
pub static VARIANTS: &[&dyn Variant<RmsNormGated>] = &[];
