//! Norms on vectors, a row at a time.

use golden::{
    Spec,
    ops::rms_norm::{Case, Inputs, Outputs, RmsNorm},
};

use crate::cpu::{
    linear::activations::Reads,
    pool,
    portable::Planted,
    simd::{LANES, Simd, Wide, map2, padded},
    vector::{Fast, flat, flat_mut},
};

/// Rows of a task.
const ROWS: usize = 16;

/// `1 / sqrt(mean(x^2) + eps)`.
#[inline(always)]
pub(crate) fn inverse_rms<S: Simd>(s: S, x: &[f32], eps: f32) -> f32 {
    let [[sum]] = s.dots([x], [x]);
    1.0 / (sum / x.len() as f32 + eps).sqrt()
}

/// `x <- x / rms(x) (1 + weight)`, one row.
#[inline(always)]
pub(crate) fn rms_norm_row<S: Simd>(s: S, x: &mut [f32], weight: &[f32], eps: f32) {
    let scale = s.splat(inverse_rms(s, x, eps));
    weigh(
        s,
        x,
        weight,
        #[inline(always)]
        |x, w| s.mul(s.mul(x, scale), s.add(s.splat(1.0), w)),
    );
}

/// `x <- f(x, weight)`.
#[inline(always)]
pub(crate) fn weigh<S: Simd>(s: S, x: &mut [f32], weight: &[f32], f: impl Fn(S::F, S::F) -> S::F) {
    let ((x, x_rest), (w, w_rest)) = (x.as_chunks_mut::<LANES>(), weight.as_chunks::<LANES>());
    for (x, w) in x.iter_mut().zip(w) {
        let o = f(s.load(x), s.load(w));
        s.store(x, o);
    }
    if !x_rest.is_empty() {
        let mut last = padded(x_rest);
        let o = f(s.load(&last), s.load(&padded(w_rest)));
        s.store(&mut last, o);
        x_rest.copy_from_slice(&last[..x_rest.len()]);
    }
}

/// `o = x / rms(x) (1 + weight)`. `o`, `x`: `[N, D]`.
pub(crate) fn rms_norm<S: Simd>(s: S, o: &mut [f32], x: &[f32], weight: &[f32], eps: f32) {
    let d = weight.len();
    pool::rows(
        s,
        o,
        (d, ROWS),
        #[inline(always)]
        |i, o| {
            let x = &x[i * d..][..d];
            let scale = s.splat(inverse_rms(s, x, eps));
            map2(
                s,
                o,
                x,
                weight,
                #[inline(always)]
                |x, w| s.mul(s.mul(x, scale), s.add(s.splat(1.0), w)),
            );
        },
    );
}

/// `h <- h + x`, `o = h / rms(h) (1 + weight)`. `o`, `h`, `x`: `[N, D]`.
pub(crate) fn add_rms_norm<S: Simd>(
    s: S,
    o: &mut [f32],
    h: &mut [f32],
    x: &[f32],
    weight: &[f32],
    eps: f32,
) {
    let d = weight.len();
    pool::pieces2((o, ROWS * d), (h, ROWS * d), |i, o, h| {
        s.run(
            #[inline(always)]
            || {
                let rows = o.chunks_exact_mut(d).zip(h.chunks_exact_mut(d));
                for ((o, h), x) in rows.zip(x[i * ROWS * d..].chunks_exact(d)) {
                    weigh(
                        s,
                        h,
                        x,
                        #[inline(always)]
                        |h, x| s.add(h, x),
                    );
                    let scale = s.splat(inverse_rms(s, h, eps));
                    map2(
                        s,
                        o,
                        h,
                        weight,
                        #[inline(always)]
                        |x, w| s.mul(s.mul(x, scale), s.add(s.splat(1.0), w)),
                    );
                }
            },
        );
    });
}

/// `o += x`. `[N, D]`.
pub(crate) fn add<S: Simd>(s: S, o: &mut [f32], x: &[f32]) {
    const LEN: usize = 1 << 15;
    pool::pieces(o, LEN, |i, o| {
        s.run(
            #[inline(always)]
            || {
                weigh(
                    s,
                    o,
                    &x[i * LEN..][..o.len()],
                    #[inline(always)]
                    |o, x| s.add(o, x),
                );
            },
        );
    });
}

/// A problem of the op.
pub(crate) struct Packed<E> {
    x: Vec<f32>,
    residual: Option<Vec<f32>>,
    weight: Vec<f32>,
    eps: f32,
    /// The sum is stored before it is normed.
    stored: std::marker::PhantomData<E>,
}

impl Fast for RmsNorm {
    type Packed<E: Wide> = Packed<E>;

    fn pack<E: Wide>(_: &Spec<Case>, x: &Inputs, _: Reads) -> Packed<E> {
        Packed {
            x: flat(&x.x),
            residual: x.residual.as_ref().map(flat),
            weight: flat(&x.weight),
            eps: x.eps as f32,
            stored: std::marker::PhantomData,
        }
    }

    fn run<S: Simd, E: Wide>(s: S, x: &Packed<E>, o: &mut Outputs, plant: Planted) {
        let weight: &Vec<f32> = if plant.is("missing-plus-one") {
            &x.weight.iter().map(|w| w - 1.0).collect()
        } else {
            &x.weight
        };
        let out = flat_mut(&mut o.o);
        let (Some(residual), Some(h)) = (&x.residual, &mut o.h) else {
            return rms_norm(s, out, &x.x, weight, x.eps);
        };
        let h = flat_mut(h);
        h.copy_from_slice(residual);
        if E::as_f32(&[]).is_some() {
            add_rms_norm(s, out, h, &x.x, weight, x.eps);
        } else {
            add(s, h, &x.x);
            h.iter_mut().for_each(|h| *h = E::store(*h).load());
            rms_norm(s, out, h, weight, x.eps);
        }
        if plant.is("residual-not-returned") {
            h.copy_from_slice(&x.x);
        }
    }
}
