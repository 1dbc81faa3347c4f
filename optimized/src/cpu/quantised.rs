//! Weights in eight or four bits, blocks of 32 along a row.
//!
//! Eight bits: `w = scale code`, codes `-127 ..= 127`. Four bits: `w = minimum + scale code`, codes
//! `0 ..= 15`. Scales and minima are f16, as llama.cpp's `Q8_0` and `Q4_1` have them. Activations stay
//! f32: all that such a matrix adds to a product is the error of its weights.

use half::f16;

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
    scales: Vec<f16>,
    /// `[M, blocks]`; empty in eight bits.
    minima: Vec<f16>,
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
    /// Narrows rows of `d` columns, which are asked for one by one.
    pub(crate) fn new(
        bits: Bits,
        rows: usize,
        d: usize,
        mut row: impl FnMut(usize, &mut [f32]),
    ) -> Quantised {
        let blocks = d.div_ceil(BLOCK);
        let mut codes = match bits {
            Bits::Eight => Codes::Eight(Vec::with_capacity(rows * blocks * BLOCK)),
            Bits::Four => Codes::Four(Vec::with_capacity(rows * blocks * BLOCK / 2)),
        };
        let (mut scales, mut minima) = (Vec::with_capacity(rows * blocks), Vec::new());
        let mut wide = vec![0.0; blocks * BLOCK];
        for i in 0..rows {
            row(i, &mut wide[..d]);
            for (block, x) in wide.as_chunks::<BLOCK>().0.iter().enumerate() {
                // What fills a block up must not set its ends.
                let own = &x[..BLOCK.min(d - block * BLOCK)];
                match &mut codes {
                    Codes::Eight(codes) => scales.push(eight(own, x, codes)),
                    Codes::Four(codes) => {
                        let (scale, minimum) = four(own, x, codes);
                        scales.push(scale);
                        minima.push(minimum);
                    }
                }
            }
        }
        Quantised { codes, scales, minima, rows, d }
    }

    fn blocks(&self) -> usize {
        self.d.div_ceil(BLOCK)
    }

    /// Block `at` of all, as two vectors of numbers.
    #[inline(always)]
    fn block<S: Simd>(&self, s: S, at: usize) -> [S::F; 2] {
        let scale = s.splat(self.scales[at].to_f32());
        match &self.codes {
            Codes::Eight(codes) => {
                let [low, high] = halves(&codes[at * BLOCK..][..BLOCK]);
                [s.mul(s.signed(low), scale), s.mul(s.signed(high), scale)]
            }
            Codes::Four(codes) => {
                let minimum = s.splat(self.minima[at].to_f32());
                let both = s.halves(halves::<u8, 1>(&codes[at * LANES..][..LANES])[0]);
                both.map(
                    #[inline(always)]
                    |code| s.fma(code, scale, minimum),
                )
            }
        }
    }

    /// Row `i`, widened.
    pub(crate) fn row<S: Simd>(&self, s: S, i: usize, o: &mut [f32]) {
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

/// A slice as arrays of lanes.
#[inline(always)]
fn halves<T, const N: usize>(x: &[T]) -> [&[T; LANES]; N] {
    let chunks = x.as_chunks::<LANES>().0;
    std::array::from_fn(|i| &chunks[i])
}

fn eight(own: &[f32], x: &[f32; BLOCK], codes: &mut Vec<i8>) -> f16 {
    let most = own.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
    let scale = f16::from_f32(most / 127.0);
    let inverse = if scale.to_f32() == 0.0 { 0.0 } else { 1.0 / scale.to_f32() };
    codes.extend(x.iter().map(|x| (x * inverse).round_ties_even().clamp(-127.0, 127.0) as i8));
    scale
}

fn four(own: &[f32], x: &[f32; BLOCK], codes: &mut Vec<u8>) -> (f16, f16) {
    let least = own.iter().copied().fold(f32::INFINITY, f32::min);
    let most = own.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let minimum = f16::from_f32(least);
    let scale = f16::from_f32((most - minimum.to_f32()) / 15.0);
    let inverse = if scale.to_f32() == 0.0 { 0.0 } else { 1.0 / scale.to_f32() };
    let code = |x: f32| ((x - minimum.to_f32()) * inverse).round_ties_even().clamp(0.0, 15.0) as u8;
    codes.extend((0..LANES).map(|j| code(x[j]) | code(x[LANES + j]) << 4));
    (scale, minimum)
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
    fn widened<'a, S: Simd>(
        &'a self,
        s: S,
        from: usize,
        to: usize,
        room: &'a mut Vec<f32>,
    ) -> &'a [f32] {
        room.resize((to - from) * self.d, 0.0);
        for (i, row) in room.chunks_exact_mut(self.d).enumerate() {
            self.row(s, from + i, row);
        }
        room
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
                    // Half a step, and what f16 does to scale and minimum.
                    let allowed = 0.5 * step + 2.0_f32.powi(-10);
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
