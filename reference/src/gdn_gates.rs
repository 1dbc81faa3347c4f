use golden::{
    Tensor2,
    ops::gdn_gates::{Inputs, Outputs},
};

use crate::real::{Real, Site};

/// `g[n, h] = -exp(a_log[h]) * softplus(a[n, h] + dt_bias[h])`, `beta[n, h] = sigmoid(b[n, h])`.
///
/// `a`, `b`, `g`, `beta`: `[N, HV]`; `a_log`, `dt_bias`: `[HV]`.
pub fn gdn_gates<R: Real>(Inputs { a, b, a_log, dt_bias }: &Inputs<R>) -> Outputs<R> {
    let g = Tensor2::from_shape_fn(a.dim(), |(n, h)| {
        let rate = R::cast(a_log[h]).exp();
        (-rate * (a[[n, h]] + R::cast(dt_bias[h])).softplus()).at(Site::Gate)
    });
    let beta = b.map(|b| b.sigmoid().at(Site::Beta)).into_shared();
    Outputs { g, beta }
}
