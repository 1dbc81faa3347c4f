//! Gates of the delta rule on vectors, some tokens of a value head at a time.

use golden::{
    Spec,
    ops::gdn_gates::{Case, GdnGates, Inputs, Outputs},
};

use crate::cpu::{
    linear::activations::Reads,
    pool,
    portable::Planted,
    simd::{Simd, Wide, map},
    vector::{Fast, flat, flat_mut},
};

/// `g = -rate softplus(a + dt_bias)` and `beta = sigmoid(b)`, in place of `a` and `b`. `g`, `beta`: `[T]`.
#[inline(always)]
pub(crate) fn gates<S: Simd>(s: S, g: &mut [f32], beta: &mut [f32], rate: f32, dt_bias: f32) {
    let (rate, dt_bias) = (s.splat(-rate), s.splat(dt_bias));
    map(
        s,
        g,
        #[inline(always)]
        |a| s.mul(rate, softplus(s, s.add(a, dt_bias))),
    );
    map(
        s,
        beta,
        #[inline(always)]
        |b| s.sigmoid(b),
    );
}

/// `ln(1 + e^x)`, which is `max(x, 0) + ln(1 + y)` with `y = e^-|x|`.
///
/// `ln(1 + y) = 2 artanh(t / 2)` with `t = y / (1 + y / 2)`, by its series: what is left out is below an
/// eighth of a unit in the last place. Small `y` loses nothing, and above 20 the result is `x`.
#[inline(always)]
fn softplus<S: Simd>(s: S, x: S::F) -> S::F {
    let zero = s.splat(0.0);
    let y = s.exp(s.min(x, s.sub(zero, x)));
    let t = s.div(y, s.fma(y, s.splat(0.5), s.splat(1.0)));
    let z = s.mul(t, t);
    let mut p = s.splat(1.0 / 53_248.0);
    for term in [1.0 / 11_264.0, 1.0 / 2_304.0, 1.0 / 448.0, 1.0 / 80.0, 1.0 / 12.0] {
        p = s.fma(p, z, s.splat(term));
    }
    let sum = s.add(s.max(x, zero), s.fma(s.mul(p, z), t, t));
    // A NaN was lost to min and max.
    s.unless_nan(x, sum)
}

/// A problem of the op, head by head.
pub(crate) struct Packed {
    /// `[HV, N]`.
    a: Vec<f32>,
    /// `[HV, N]`.
    b: Vec<f32>,
    /// `[HV]`.
    a_log: Vec<f32>,
    /// `[HV]`.
    dt_bias: Vec<f32>,
}

impl Fast for GdnGates {
    const KEPT: &'static [&'static str] = &["g", "beta"];
    type Packed<E: Wide> = Packed;

    fn pack<E: Wide>(_: &Spec<Case>, x: &Inputs, _: Reads) -> Packed {
        Packed {
            a: x.a.t().iter().copied().collect(),
            b: x.b.t().iter().copied().collect(),
            a_log: flat(&x.a_log),
            dt_bias: flat(&x.dt_bias),
        }
    }

    fn run<S: Simd, E: Wide>(s: S, x: &Packed, o: &mut Outputs, plant: Planted) {
        let hv = x.a_log.len();
        let n = x.a.len() / hv;
        // As an engine has them from its weights.
        let rate = |a_log: &f32| if plant.is("exp-missing") { *a_log } else { a_log.exp() };
        let mut rates: Vec<f32> = x.a_log.iter().map(rate).collect();
        if plant.is("heads-rotated") {
            rates.rotate_left(1);
        }
        let (mut g, mut beta) = (x.a.clone(), x.b.clone());
        if plant.is("a-b-swapped") {
            std::mem::swap(&mut g, &mut beta);
        }
        pool::pieces2((&mut g, n), (&mut beta, n), |head, g, beta| {
            s.run(
                #[inline(always)]
                || gates(s, g, beta, rates[head], x.dt_bias[head]),
            );
        });
        for (o, x) in [(&mut o.g, &g), (&mut o.beta, &beta)] {
            for (i, o) in flat_mut(o).iter_mut().enumerate() {
                *o = x[i % hv * n + i / hv];
            }
        }
    }
}
