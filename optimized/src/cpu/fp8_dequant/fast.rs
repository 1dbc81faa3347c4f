//! FP8 codes as numbers on vectors, a row at a time.

use golden::{
    Dtype, Spec,
    ops::fp8_dequant::{Case, Fp8Dequant, Inputs, Outputs},
};

use crate::cpu::{
    linear::activations::Reads,
    pool,
    portable::Planted,
    simd::{LANES, QUADS, Simd, Wide, filled},
    vector::{Fast, flat, flat_mut},
};

/// Rows of a task.
const ROWS: usize = 16;

/// `o = value(codes) scale` of one row, `block` columns with one scale.
#[inline(always)]
pub(crate) fn fp8_dequant_row<S: Simd>(
    s: S,
    o: &mut [f32],
    codes: &[u8],
    scales: &[f32],
    block: usize,
) {
    for ((o, codes), &scale) in o.chunks_mut(block).zip(codes.chunks(block)).zip(scales) {
        let scale = s.splat(scale);
        let ((o, o_rest), (codes, rest)) = (o.as_chunks_mut::<QUADS>(), codes.as_chunks::<QUADS>());
        for (o, codes) in o.iter_mut().zip(codes) {
            quads(s, o, codes, scale);
        }
        if !rest.is_empty() {
            let mut all = [0.0; QUADS];
            quads(s, &mut all, &filled(rest, 0), scale);
            o_rest.copy_from_slice(&all[..rest.len()]);
        }
    }
}

#[inline(always)]
fn quads<S: Simd>(s: S, o: &mut [f32; QUADS], codes: &[u8; QUADS], scale: S::F) {
    for (o, x) in o.as_chunks_mut::<LANES>().0.iter_mut().zip(s.fp8_wide(codes)) {
        s.store(o, s.mul(x, scale));
    }
}

/// `weight`, `codes`: `[M, D]`; `scales`: one per block of `bs` by `bs`, row by row.
fn fp8_dequant<S: Simd>(
    s: S,
    weight: &mut [f32],
    codes: &[u8],
    scales: &[f32],
    d: usize,
    bs: usize,
) {
    let across = d.div_ceil(bs);
    pool::rows(
        s,
        weight,
        (d, ROWS),
        #[inline(always)]
        |i, o| {
            let scales = &scales[i / bs * across..][..across];
            fp8_dequant_row(s, o, &codes[i * d..][..d], scales, bs);
        },
    );
}

/// A problem of the op.
pub(crate) struct Packed {
    case: Case,
    codes: Vec<u8>,
    scales: Vec<f32>,
}

impl Fast for Fp8Dequant {
    type Packed<E: Wide> = Packed;

    fn pack<E: Wide>(spec: &Spec<Case>, x: &Inputs, _: Reads) -> Packed {
        let codes = x.codes.iter().copied().collect();
        Packed { case: spec.case.clone(), codes, scales: flat(&x.scales) }
    }

    fn run<S: Simd, E: Wide>(s: S, x: &Packed, o: &mut Outputs, plant: Planted) {
        let Case { m, d, bs } = x.case;
        let (down, across) = (m.div_ceil(bs), d.div_ceil(bs));
        let scales = x.scales.iter().enumerate().map(|(i, &scale)| match plant.0 {
            Some("divides-by-the-scale") => 1.0 / scale,
            Some("scales-transposed") => x.scales[i % across * down + i / across],
            Some("scale-in-bf16") => Dtype::Bf16.round(scale),
            _ => scale,
        });
        let scales: Vec<f32> = scales.collect();
        fp8_dequant(s, flat_mut(&mut o.weight), &x.codes, &scales, d, bs);
    }
}
