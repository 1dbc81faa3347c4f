//! L2 norms on vectors, a row at a time.

use golden::{
    Spec,
    ops::l2_norm::{Case, Inputs, L2Norm, Outputs},
};

use crate::cpu::{
    linear::activations::Reads,
    pool,
    portable::Planted,
    simd::{Simd, Wide, map},
    vector::{Fast, flat, flat_mut},
};

/// Rows of a task.
const ROWS: usize = 64;

/// `x <- x / sqrt(sum(x^2) + eps) scale`, one row.
#[inline(always)]
pub(crate) fn l2_norm_row<S: Simd>(s: S, x: &mut [f32], eps: f32, scale: f32) {
    let [[sum]] = s.dots([&*x], [&*x]);
    let scale = s.splat(scale / (sum + eps).sqrt());
    map(
        s,
        x,
        #[inline(always)]
        |x| s.mul(x, scale),
    );
}

/// The same of every row. `x`: `[N, D]`.
fn l2_norm<S: Simd>(s: S, x: &mut [f32], d: usize, eps: f32, scale: f32) {
    pool::rows(
        s,
        x,
        (d, ROWS),
        #[inline(always)]
        |_, x| l2_norm_row(s, x, eps, scale),
    );
}

/// A problem of the op.
pub(crate) struct Packed {
    x: Vec<f32>,
    d: usize,
    eps: f32,
}

impl Fast for L2Norm {
    type Packed<E: Wide> = Packed;

    fn pack<E: Wide>(spec: &Spec<Case>, x: &Inputs, _: Reads) -> Packed {
        Packed { x: flat(&x.x), d: spec.case.d, eps: x.eps as f32 }
    }

    fn run<S: Simd, E: Wide>(s: S, x: &Packed, o: &mut Outputs, plant: Planted) {
        let width = x.d as f32;
        let (eps, scale) = match plant.0 {
            Some("eps-on-mean") => (width * x.eps, 1.0),
            Some("eps-missing") => (0.0, 1.0),
            Some("mean-not-sum") => (width * x.eps, width.sqrt()),
            _ => (x.eps, 1.0),
        };
        let o = flat_mut(&mut o.o);
        o.copy_from_slice(&x.x);
        l2_norm(s, o, x.d, eps, scale);
    }
}
