//! CPU variants of `shared_expert`.

use golden::{Variant, ops::shared_expert::SharedExpert};

/// Every CPU variant, plainest first.
pub static VARIANTS: &[&dyn Variant<SharedExpert>] = &[];
