use golden::ops::l2_norm::{Inputs, Outputs};

use crate::real::{Real, Site, sum};

/// `o[n, d] = x[n, d] * rsqrt(sum_d(x[n, d]^2) + eps)`.
///
/// `x`, `o`: `[N, D]`.
///
/// ```
/// use golden::ops::l2_norm::Inputs;
/// use ndarray::arr2;
///
/// let x = arr2(&[[3.0, 4.0]]).into_shared();
/// let o = reference::l2_norm::<f64>(&Inputs { x, eps: 0.0 }).o;
/// assert!((o[[0, 0]] - 0.6).abs() < 1e-15 && (o[[0, 1]] - 0.8).abs() < 1e-15);
/// ```
pub fn l2_norm<R: Real>(Inputs { x, eps }: &Inputs<R>) -> Outputs<R> {
    let mut o = x.to_owned();
    for mut row in o.rows_mut() {
        let scale = (sum(row.len(), |i| row[i] * row[i]) + R::of(*eps)).rsqrt();
        row.mapv_inplace(|x| (x * scale).at(Site::QkNorm));
    }
    Outputs { o: o.into_shared() }
}
