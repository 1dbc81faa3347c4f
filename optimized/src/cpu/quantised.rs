//! Weights in eight or four bits, blocks of 32 along a row.
//!
//! Eight bits: `w = scale code`, codes `-127 ..= 127`. Four bits: `w = minimum + scale code`, codes
//! `0 ..= 15`. Blocks are those of llama.cpp's `Q8_0` and `Q4_1`, but scales and minima are f32: they are
//! used as they lie in memory. Activations stay f32: all that such a matrix adds to a product is the
//! error of its weights.

use rayon::prelude::*;

use super::{
    linear::fast::Source,
    simd::{LANES, Simd},
};

/// Columns that share a scale.
pub(crate) const BLOCK: usize = 32;

/// How a weight matrix is narrowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bits {
    Eight,
    Four,
}

impl Bits {
    /// Behind the name of an engine.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Bits::Eight => "-int8",
            Bits::Four => "-int4",
        }
    }
}

/// A narrowed matrix `[M, D]`; the last block of a row is filled up with zeros.
pub(crate) struct Quantised {
    codes: Codes,
    /// `[M, blocks]`.
    scales: Vec<f32>,
    /// `[M, blocks]`; empty in eight bits.
    minima: Vec<f32>,
    rows: usize,
    d: usize,
}

enum Codes {
    /// `[M, blocks, 32]`.
    Eight(Vec<i8>),
    /// `[M, blocks, 16]`: column `j` of a block in the low half of byte `j`, `16 + j` in its high half.
    Four(Vec<u8>),
}

impl Quantised {
    /// Narrows rows of `d` columns, which are asked for one by one, on all threads.
    pub(crate) fn new(
        bits: Bits,
        rows: usize,
        d: usize,
        row: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Quantised {
        let blocks = d.div_ceil(BLOCK);
        let mut scales = vec![0.0; rows * blocks];
        let wide = |i: usize| {
            let mut wide = vec![0.0; blocks * BLOCK];
            row(i, &mut wide[..d]);
            wide
        };
        // What fills a block up must not set its ends.
        let own = |block: usize| BLOCK.min(d - block * BLOCK);
        let (codes, minima) = match bits {
            Bits::Eight => {
                let mut codes = vec![0; rows * blocks * BLOCK];
                let rows = codes.par_chunks_mut(blocks * BLOCK).zip(scales.par_chunks_mut(blocks));
                rows.enumerate().for_each(|(i, (codes, scales))| {
                    let (wide, codes) = (wide(i), codes.as_chunks_mut::<BLOCK>().0);
                    for (block, x) in wide.as_chunks::<BLOCK>().0.iter().enumerate() {
                        scales[block] = eight(own(block), x, &mut codes[block]);
                    }
                });
                (Codes::Eight(codes), Vec::new())
            }
            Bits::Four => {
                let mut codes = vec![0; rows * blocks * LANES];
                let mut minima = vec![0.0; rows * blocks];
                let rows = codes.par_chunks_mut(blocks * LANES).zip(scales.par_chunks_mut(blocks));
                let rows = rows.zip(minima.par_chunks_mut(blocks));
                rows.enumerate().for_each(|(i, ((codes, scales), minima))| {
                    let (wide, codes) = (wide(i), codes.as_chunks_mut::<LANES>().0);
                    for (block, x) in wide.as_chunks::<BLOCK>().0.iter().enumerate() {
                        (scales[block], minima[block]) = four(own(block), x, &mut codes[block]);
                    }
                });
                (Codes::Four(codes), minima)
            }
        };
        Quantised { codes, scales, minima, rows, d }
    }

    fn blocks(&self) -> usize {
        self.d.div_ceil(BLOCK)
    }

    /// Block `at` of all, as two vectors of numbers.
    #[inline(always)]
    fn block<S: Simd>(&self, s: S, at: usize) -> [S::F; 2] {
        let scale = s.splat(self.scales[at]);
        match &self.codes {
            Codes::Eight(codes) => {
                let [low, high] = halves(&codes[at * BLOCK..][..BLOCK]);
                [s.mul(s.signed(low), scale), s.mul(s.signed(high), scale)]
            }
            Codes::Four(codes) => {
                let minimum = s.splat(self.minima[at]);
                let both = s.halves(halves::<u8, 1>(&codes[at * LANES..][..LANES])[0]);
                both.map(
                    #[inline(always)]
                    |code| s.fma(code, scale, minimum),
                )
            }
        }
    }
}

/// A slice as arrays of lanes.
#[inline(always)]
fn halves<T, const N: usize>(x: &[T]) -> [&[T; LANES]; N] {
    let chunks = x.as_chunks::<LANES>().0;
    std::array::from_fn(|i| &chunks[i])
}

/// Codes of a block of which `own` elements count, and its scale.
fn eight(own: usize, x: &[f32; BLOCK], codes: &mut [i8; BLOCK]) -> f32 {
    let most = x[..own].iter().fold(0.0_f32, |most, x| most.max(x.abs()));
    let inverse = if most == 0.0 { 0.0 } else { 127.0 / most };
    *codes = x.map(|x| (x * inverse).round_ties_even() as i8);
    most / 127.0
}

/// Codes of a block of which `own` elements count, its scale and its minimum.
fn four(own: usize, x: &[f32; BLOCK], codes: &mut [u8; LANES]) -> (f32, f32) {
    let least = x[..own].iter().copied().fold(f32::INFINITY, f32::min);
    let most = x[..own].iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let inverse = if most == least { 0.0 } else { 15.0 / (most - least) };
    let code = |x: f32| ((x - least) * inverse).round_ties_even().clamp(0.0, 15.0) as u8;
    *codes = std::array::from_fn(|j| code(x[j]) | code(x[LANES + j]) << 4);
    ((most - least) / 15.0, least)
}

/// Rows that are summed together, so that what is loaded of a token is used as often.
const TOGETHER: usize = 4;

impl Source for Quantised {
    fn rows(&self) -> usize {
        self.rows
    }

    fn columns(&self) -> usize {
        self.d
    }

    #[inline(always)]
    fn products<S: Simd>(
        &self,
        s: S,
        from: usize,
        to: usize,
        x: &[f32],
        mut put: impl FnMut(usize, usize, f32),
    ) {
        let blocks = self.blocks();
        let (whole, tail) = (self.d / BLOCK, self.d % BLOCK);
        for (t, x) in x.chunks_exact(self.d).enumerate() {
            let mut last = [0.0; BLOCK];
            last[..tail].copy_from_slice(&x[whole * BLOCK..]);
            let x = x.as_chunks::<BLOCK>().0;
            for start in (from..to).step_by(TOGETHER) {
                // Rows past the end are the last one again.
                let row: [usize; TOGETHER] =
                    std::array::from_fn(|r| (start + r).min(to - 1) * blocks);
                let mut sums = [[s.splat(0.0); 2]; TOGETHER];
                for block in 0..blocks {
                    let [a, b] = halves(x.get(block).unwrap_or(&last));
                    let (a, b) = (s.load(a), s.load(b));
                    for (sums, row) in sums.iter_mut().zip(row) {
                        let [w_a, w_b] = self.block(s, row + block);
                        sums[0] = s.fma(w_a, a, sums[0]);
                        sums[1] = s.fma(w_b, b, sums[1]);
                    }
                }
                for (r, [a, b]) in sums.into_iter().enumerate().take(to - start) {
                    put(start - from + r, t, s.sum(s.add(a, b)));
                }
            }
        }
    }

    #[inline(always)]
    fn row<S: Simd>(&self, s: S, i: usize, o: &mut [f32]) {
        for (block, o) in o.chunks_mut(BLOCK).enumerate() {
            let mut wide = [0.0; BLOCK];
            let parts = self.block(s, i * self.blocks() + block);
            for (to, part) in wide.as_chunks_mut::<LANES>().0.iter_mut().zip(parts) {
                s.store(to, part);
            }
            o.copy_from_slice(&wide[..o.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{BLOCK, Bits, Quantised};
    use crate::cpu::{
        linear::fast::{Source, linear},
        simd::{Plain, Simd},
    };

    fn number(i: usize) -> f32 {
        ((i * 2_654_435_761) % 1000) as f32 / 500.0 - 1.0
    }

    fn products<S: Simd>(bits: Bits) {
        let Some(s) = S::new() else { return };
        for (rows, d, tokens) in [(1, 1, 1), (5, 31, 2), (9, 70, 3), (16, 128, 20)] {
            let w: Vec<f32> = (0..rows * d).map(number).collect();
            let x: Vec<f32> = (0..tokens * d).map(|i| number(i + 77)).collect();
            let narrow = Quantised::new(bits, rows, d, |i, o| o.copy_from_slice(&w[i * d..][..d]));
            let mut wide = vec![0.0; d];
            let mut o = vec![0.0; tokens * rows];
            linear(s, &mut o, &x, &narrow);
            for r in 0..rows {
                narrow.row(s, r, &mut wide);
                for (j, wide) in wide.iter().enumerate() {
                    let block = &w[r * d..][j / BLOCK * BLOCK..d.min((j / BLOCK + 1) * BLOCK)];
                    let most = block.iter().copied().fold(f32::MIN, f32::max);
                    let least = block.iter().copied().fold(f32::MAX, f32::min);
                    let step = match bits {
                        Bits::Eight => most.abs().max(least.abs()) / 127.0,
                        Bits::Four => (most - least) / 15.0,
                    };
                    // Half a step, and the roundings of f32.
                    let allowed = 0.5 * step + 1e-6;
                    assert!((wide - w[r * d + j]).abs() <= allowed, "{bits:?} {r} {j}");
                }
                for t in 0..tokens {
                    let terms =
                        wide.iter().zip(&x[t * d..]).map(|(w, x)| f64::from(*w) * f64::from(*x));
                    let (want, size) =
                        terms.fold((0.0, 0.0), |(sum, size), x| (sum + x, size + x.abs()));
                    let got = f64::from(o[t * rows + r]);
                    assert!((got - want).abs() <= 1e-6 * size, "{bits:?} {r} {t}: {got} {want}");
                }
            }
            assert_eq!((narrow.rows(), narrow.columns()), (rows, d));
        }
    }

    #[test]
    fn a_product_is_that_of_the_narrowed_weights() {
        for bits in [Bits::Eight, Bits::Four] {
            products::<Plain>(bits);
            #[cfg(target_arch = "x86_64")]
            products::<crate::cpu::avx2::Avx2>(bits);
            #[cfg(target_arch = "x86_64")]
            products::<crate::cpu::avx512::Avx512>(bits);
        }
    }
}
