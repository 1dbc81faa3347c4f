//! Rotation on vectors, a head at a time.

use golden::{
    Spec,
    ops::rope::{Case, Inputs, Outputs, Rope},
};

use super::turns;
use crate::cpu::{
    linear::activations::Reads,
    pool,
    portable::Planted,
    simd::{LANES, Simd, Wide},
    vector::{Fast, flat, flat_mut},
};

/// Tokens of a task: of a table, whose cosines are dear, and of heads.
const TOKENS: (usize, usize) = (8, 4);

/// Cosines, then sines, of every token: `[N, R]`. `positions`: `[N]`; `inv_freq`: `[R / 2]`.
pub(crate) fn table(table: &mut [f32], positions: &[i64], inv_freq: &[f32], factor: f32) {
    let r = 2 * inv_freq.len();
    pool::pieces(table, TOKENS.0 * r, |i, table| {
        for (row, &position) in table.chunks_exact_mut(r).zip(&positions[i * TOKENS.0..]) {
            turns(row, position, inv_freq, factor, |p, f| p * f);
        }
    });
}

/// `(x_i, x_{i + R/2}) <- (x_i c_i - x_{i + R/2} s_i, x_{i + R/2} c_i + x_i s_i)`, one head.
///
/// `x`: `[H]`; `turns`: `[R]`, cosines first.
#[inline(always)]
pub(crate) fn rope_head<S: Simd>(s: S, x: &mut [f32], turns: &[f32]) {
    let half = turns.len() / 2;
    let (a, rest) = x.split_at_mut(half);
    let (cos, sin) = turns.split_at(half);
    let ((a, a_rest), (b, b_rest)) =
        (a.as_chunks_mut::<LANES>(), rest[..half].as_chunks_mut::<LANES>());
    let ((cos, cos_rest), (sin, sin_rest)) = (cos.as_chunks::<LANES>(), sin.as_chunks::<LANES>());
    for (((a, b), cos), sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
        let (x, y): (S::F, S::F) = (s.load(&*a), s.load(&*b));
        let (cos, sin) = (s.load(cos), s.load(sin));
        s.store(a, s.sub(s.mul(x, cos), s.mul(y, sin)));
        s.store(b, s.add(s.mul(y, cos), s.mul(x, sin)));
    }
    for (((a, b), cos), sin) in a_rest.iter_mut().zip(b_rest).zip(cos_rest).zip(sin_rest) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

/// The same of every head. `x`: `[N, HQ, H]`; `table`: `[N, R]`.
pub(crate) fn rope<S: Simd>(s: S, x: &mut [f32], table: &[f32], hq: usize, h: usize) {
    let tokens = x.len() / (hq * h);
    let r = table.len() / tokens;
    pool::rows(
        s,
        x,
        (hq * h, TOKENS.1),
        #[inline(always)]
        |token, x| {
            let turns = &table[token * r..][..r];
            for x in x.chunks_exact_mut(h) {
                rope_head(s, x, turns);
            }
        },
    );
}

/// A problem of the op.
pub(crate) struct Packed {
    case: Case,
    x: Vec<f32>,
    positions: Vec<i64>,
    inv_freq: Vec<f32>,
    factor: f32,
}

impl Fast for Rope {
    type Packed<E: Wide> = Packed;

    fn pack<E: Wide>(spec: &Spec<Case>, x: &Inputs, _: Reads) -> Packed {
        Packed {
            case: spec.case.clone(),
            x: flat(&x.x),
            positions: x.positions.to_vec(),
            inv_freq: flat(&x.inv_freq),
            factor: x.attention_factor as f32,
        }
    }

    fn run<S: Simd, E: Wide>(s: S, x: &Packed, o: &mut Outputs, plant: Planted) {
        let Case { n, hq, h, r } = x.case;
        let mut turns = vec![f32::NAN; n * r];
        let factor = if plant.is("yarn-factor-dropped") { 1.0 } else { x.factor };
        if plant.is("positions-from-one") {
            let positions: Vec<i64> = x.positions.iter().map(|at| at + 1).collect();
            table(&mut turns, &positions, &x.inv_freq, factor);
        } else {
            table(&mut turns, &x.positions, &x.inv_freq, factor);
        }
        if plant.is("turned-backwards") {
            let sines = turns.chunks_exact_mut(r).flat_map(|turns| &mut turns[r / 2..]);
            sines.for_each(|sin| *sin = -*sin);
        }
        let o = flat_mut(&mut o.o);
        o.copy_from_slice(&x.x);
        rope(s, o, &turns, hq, h);
    }
}
