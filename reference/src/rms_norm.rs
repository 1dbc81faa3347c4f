use golden::{
    Tensor2,
    ops::rms_norm::{Inputs, Outputs},
};

use crate::real::{Real, Site, sum};

/// `h = x + residual`, `o[n, d] = h[n, d] * rsqrt(mean_d(h[n, d]^2) + eps) * (1 + weight[d])`.
///
/// `x`, `residual`, `o`, `h`: `[N, D]`; `weight`: `[D]`, zero-centred.
///
/// ```
/// use golden::ops::rms_norm::Inputs;
/// use ndarray::{arr1, arr2};
///
/// let x = arr2(&[[1.0, -2.0, 3.0, -4.0]]).into_shared();
/// let weight = arr1(&[0.5, 0.0, -0.25, 1.0]).into_shared();
/// let o = reference::rms_norm(&Inputs { x, residual: None, weight, eps: 1e-6 }).o;
/// // mean of squares 7.5; 1 * 1.5 / sqrt(7.5) = 0.5477…
/// assert!((o[[0, 0]] - 0.547722520990333_f64).abs() < 1e-15);
/// ```
pub fn rms_norm<R: Real>(Inputs { x, residual, weight, eps }: &Inputs<R>) -> Outputs<R> {
    let h: Tensor2<R> = match residual {
        None => x.clone(),
        Some(residual) => ndarray::Zip::from(x)
            .and(residual)
            .map_collect(|&x, &r| (x + r).at(Site::Residual))
            .into_shared(),
    };
    let mut o = h.to_owned();
    for mut row in o.rows_mut() {
        let d = row.len();
        let mean = sum(d, |i| row[i] * row[i]) / R::of(d as f64);
        let scale = (mean + R::of(*eps)).rsqrt();
        row.zip_mut_with(weight, |x, &w| {
            *x = (*x * scale * (R::one() + R::cast(w))).at(Site::Norm);
        });
    }
    Outputs { o: o.into_shared(), h: residual.as_ref().map(|_| h) }
}
