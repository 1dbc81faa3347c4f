//! CPU variants of `fp8_dequant`.

use golden::{Variant, ops::fp8_dequant::Fp8Dequant};

/// Every CPU variant, plainest first.
pub static VARIANTS: &[&dyn Variant<Fp8Dequant>] = &[];
