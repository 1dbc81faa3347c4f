//! CPU variants of `causal_conv1d`.

use golden::{Variant, ops::causal_conv1d::CausalConv1d};

/// Every CPU variant, plainest first.
pub static VARIANTS: &[&dyn Variant<CausalConv1d>] = &[];
