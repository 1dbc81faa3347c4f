use golden::ops::lm_head::{Inputs, Outputs};

use crate::{linear::project, real::Real};

/// `logits[n, m] = sum_d x[n, d] * weight[m, d]`.
///
/// `x`: `[N, D]`; `weight`: `[M, D]`; `logits`: `[N, M]`.
pub fn lm_head<R: Real>(Inputs { x, weight }: &Inputs<R>) -> Outputs<R> {
    Outputs { logits: project(x, weight) }
}
