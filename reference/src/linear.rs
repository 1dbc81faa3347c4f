use golden::{
    Tensor2,
    narrow::{FP8_BLOCK, fp8_scales},
    ops::linear::{Inputs, Outputs},
};
use ndarray::{Array2, ArrayView1};

use crate::real::{Real, Site, dot_weight, sum};

/// `o[n, m] = sum_d x[n, d] * weight[m, d]`.
///
/// `x`: `[N, D]`; `weight`: `[M, D]`; `o`: `[N, M]`.
///
/// ```
/// use golden::ops::linear::Inputs;
/// use ndarray::arr2;
///
/// let x = arr2(&[[1.0, 2.0]]).into_shared();
/// let weight = arr2(&[[3.0, 4.0], [0.0, -1.0]]).into_shared();
/// assert_eq!(reference::linear::<f64>(&Inputs { x, weight }).o, arr2(&[[11.0, -2.0]]));
/// ```
pub fn linear<R: Real>(Inputs { x, weight }: &Inputs<R>) -> Outputs<R> {
    Outputs { o: project(x, weight) }
}

/// [`linear`] without the names.
pub(crate) fn project<R: Real>(x: &Tensor2<R>, weight: &Tensor2<f32>) -> Tensor2<R> {
    project_at(Site::Linear, x, weight)
}

/// A projection whose result is stored at a site.
pub(crate) fn project_at<R: Real>(site: Site, x: &Tensor2<R>, weight: &Tensor2<f32>) -> Tensor2<R> {
    let rows = x.as_standard_layout();
    let coded = |row: ArrayView1<'_, R>| R::codes(row.to_slice()?);
    if let Some(coded) = rows.rows().into_iter().map(coded).collect::<Option<Vec<_>>>() {
        return products_of_codes(site, &coded, weight);
    }
    let read = |row: ArrayView1<'_, R>| R::activations(row.to_slice()?);
    match rows.rows().into_iter().map(read).collect::<Option<Vec<_>>>() {
        Some(read) => {
            let read = Array2::from_shape_vec(x.dim(), read.concat()).expect("rows of one length");
            products(site, &read.into_shared(), weight)
        }
        None => products(site, x, weight),
    }
}

/// A projection that decides: the router's, a gate's. It reads its activations as they are, whatever a
/// plan says of others.
pub(crate) fn decide<R: Real>(x: &Tensor2<R>, weight: &Tensor2<f32>) -> Tensor2<R> {
    products(Site::Decision, x, weight)
}

fn products<R: Real>(site: Site, x: &Tensor2<R>, weight: &Tensor2<f32>) -> Tensor2<R> {
    let (x, weight) = (x.as_standard_layout(), weight.as_standard_layout());
    let mut o = Array2::from_elem((x.nrows(), weight.nrows()), R::zero());
    // Each row of the weight is read once and meets every token while it is at hand.
    for (w, mut column) in weight.rows().into_iter().zip(o.columns_mut()) {
        let w = w.to_slice().expect("standard layout");
        for (x, o) in x.rows().into_iter().zip(&mut column) {
            *o = dot_weight(x.to_slice().expect("standard layout"), w).at(site);
        }
    }
    o.into_shared()
}

/// `o[n, m] = sum_g x_scale[n, g] * weight_scale[m, g] * (sum of products of codes in g)`, groups of 128
/// columns.
///
/// `x`: of each of `N` rows the scales of its groups, and its codes. Scales of weights are those that their
/// values tell.
fn products_of_codes<R: Real>(
    site: Site,
    x: &[(Vec<R>, Vec<R>)],
    weight: &Tensor2<f32>,
) -> Tensor2<R> {
    let (weight, d) = (weight.as_standard_layout(), weight.ncols());
    let rows = weight.as_slice().expect("standard layout");
    let scales: Vec<_> = rows.chunks(FP8_BLOCK * d).map(|block| fp8_scales(block, d)).collect();
    let mut o = Array2::from_elem((x.len(), weight.nrows()), R::zero());
    for (m, (w, mut column)) in rows.chunks(d).zip(o.columns_mut()).enumerate() {
        let scales = &scales[m / FP8_BLOCK];
        let code = |(i, &w): (usize, &f32)| match scales[i / FP8_BLOCK] {
            0.0 => R::zero(),
            scale => R::of(f64::from(w) / f64::from(scale)),
        };
        let w: Vec<R> = w.iter().enumerate().map(code).collect();
        for ((x_scales, x), o) in x.iter().zip(&mut column) {
            let group = |g: usize| {
                let columns = g * FP8_BLOCK..d.min((g + 1) * FP8_BLOCK);
                let scale = x_scales[g] * R::cast(scales[g]);
                R::of_codes(&x[columns.clone()], &w[columns]) * scale
            };
            *o = sum(scales.len(), group).at(site);
        }
    }
    o.into_shared()
}
