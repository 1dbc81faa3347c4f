//! CPU variants of `attention_layer`.

use golden::{Variant, ops::attention_layer::AttentionLayer};

/// Every CPU variant, plainest first.
pub static VARIANTS: &[&dyn Variant<AttentionLayer>] = &[];
