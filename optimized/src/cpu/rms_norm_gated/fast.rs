//! Gated norms on vectors, a row at a time.

use golden::{
    Spec,
    ops::rms_norm_gated::{Case, Inputs, Outputs, RmsNormGated},
};

use crate::cpu::{
    linear::activations::Reads,
    pool,
    portable::Planted,
    rms_norm::fast::inverse_rms,
    simd::{LANES, Simd, Wide, padded},
    vector::{Fast, flat, flat_mut},
};

/// Rows of a task.
const ROWS: usize = 64;

/// `x <- x / rms(x) weight silu(z)`, one row.
#[inline(always)]
pub(crate) fn rms_norm_gated_row<S: Simd>(
    s: S,
    x: &mut [f32],
    z: &[f32],
    weight: &[f32],
    eps: f32,
) {
    let scale = s.splat(inverse_rms(s, x, eps));
    let ((x, x_rest), (z, z_rest), (w, w_rest)) =
        (x.as_chunks_mut::<LANES>(), z.as_chunks::<LANES>(), weight.as_chunks::<LANES>());
    for ((x, z), w) in x.iter_mut().zip(z).zip(w) {
        let o = gated(s, s.mul(s.load(&*x), scale), s.load(z), s.load(w));
        s.store(x, o);
    }
    if !x_rest.is_empty() {
        let mut last = padded(x_rest);
        let (z, w) = (s.load(&padded(z_rest)), s.load(&padded(w_rest)));
        let o = gated(s, s.mul(s.load(&last), scale), z, w);
        s.store(&mut last, o);
        x_rest.copy_from_slice(&last[..x_rest.len()]);
    }
}

/// `normed weight silu(z)`.
#[inline(always)]
fn gated<S: Simd>(s: S, normed: S::F, z: S::F, weight: S::F) -> S::F {
    s.mul(s.mul(normed, weight), s.silu(z))
}

/// The same of every row. `x`, `z`: `[N, V]`; `weight`: `[V]`.
pub(crate) fn rms_norm_gated<S: Simd>(s: S, x: &mut [f32], z: &[f32], weight: &[f32], eps: f32) {
    let v = weight.len();
    pool::rows(
        s,
        x,
        (v, ROWS),
        #[inline(always)]
        |i, x| rms_norm_gated_row(s, x, &z[i * v..][..v], weight, eps),
    );
}

/// A problem of the op.
pub(crate) struct Packed {
    x: Vec<f32>,
    z: Vec<f32>,
    weight: Vec<f32>,
    eps: f32,
}

impl Fast for RmsNormGated {
    type Packed<E: Wide> = Packed;

    fn pack<E: Wide>(_: &Spec<Case>, x: &Inputs, _: Reads) -> Packed {
        Packed { x: flat(&x.x), z: flat(&x.z), weight: flat(&x.weight), eps: x.eps as f32 }
    }

    fn run<S: Simd, E: Wide>(s: S, x: &Packed, o: &mut Outputs, plant: Planted) {
        let one = if plant.is("zero-centred") { 1.0 } else { 0.0 };
        let weight: Vec<f32> = x.weight.iter().map(|w| one + w).collect();
        let eps = if plant.is("sum-not-mean") { x.eps / weight.len() as f32 } else { x.eps };
        let o = flat_mut(&mut o.o);
        o.copy_from_slice(&x.x);
        rms_norm_gated(s, o, &x.z, &weight, eps);
    }
}
