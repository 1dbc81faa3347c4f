use golden::ops::rms_norm_gated::{Inputs, Outputs};

use crate::real::{Real, Site, sum};

/// `o[n, v] = x[n, v] * rsqrt(mean_v(x[n, v]^2) + eps) * weight[v] * silu(z[n, v])`.
///
/// `x`, `z`, `o`: `[N, V]`; `weight`: `[V]`, as it multiplies.
pub fn rms_norm_gated<R: Real>(Inputs { x, z, weight, eps }: &Inputs<R>) -> Outputs<R> {
    let mut o = x.to_owned();
    for (mut row, z) in o.rows_mut().into_iter().zip(z.rows()) {
        let v = row.len();
        let mean = sum(v, |i| row[i] * row[i]) / R::of(v as f64);
        let scale = (mean + R::of(*eps)).rsqrt();
        for ((x, &w), z) in row.iter_mut().zip(weight).zip(z) {
            let normed = (*x * scale).at(Site::Norm);
            *x = ((R::cast(w) * normed).at(Site::Norm) * z.silu()).at(Site::GateOut);
        }
    }
    Outputs { o: o.into_shared() }
}
