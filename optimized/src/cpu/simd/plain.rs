//! The words in plain Rust.

use half::bf16;

use super::{FP8_WIDE, Factor, LANES, PAIRS, QUADS, Rows, Simd, Wide, fp8_by_table, outer, tiles};
use crate::cpu::stored::Stored;

/// No instruction set beyond the machine's least: plain Rust.
#[derive(Clone, Copy)]
pub(crate) struct Plain;

impl Simd for Plain {
    const NAME: &'static str = "plain";
    const REGISTERS: usize = 8;
    type F = [f32; LANES];
    type H = [bf16; PAIRS];
    type I = [i32; LANES];
    type W = [i16; PAIRS];
    type B = [u8; QUADS];

    fn new() -> Option<Plain> {
        Some(Plain)
    }

    fn run<T>(self, job: impl FnOnce() -> T) -> T {
        job()
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        [x; LANES]
    }

    #[inline(always)]
    fn load<W: Wide>(self, x: &[W; LANES]) -> Self::F {
        x.map(Stored::load)
    }

    #[inline(always)]
    fn halves(self, x: &[bf16; PAIRS]) -> Self::H {
        *x
    }

    #[inline(always)]
    fn fp8(self, x: &[u8; QUADS]) -> [Self::H; 2] {
        fp8_by_table(x)
    }

    #[inline(always)]
    fn fp8_wide(self, x: &[u8; QUADS]) -> [Self::F; 4] {
        let wide = |i: usize, lane: usize| FP8_WIDE[usize::from(x[i * LANES + lane])];
        std::array::from_fn(|i| std::array::from_fn(|lane| wide(i, lane)))
    }

    #[inline(always)]
    fn pair(self, x: [bf16; 2]) -> Self::H {
        std::array::from_fn(|i| x[i % 2])
    }

    #[inline(always)]
    fn pairs(self, acc: Self::F, a: Self::H, b: Self::H) -> Self::F {
        let product = |i: usize| a[i].to_f32() * b[i].to_f32();
        std::array::from_fn(|i| acc[i] + (product(2 * i) + product(2 * i + 1)))
    }

    #[inline(always)]
    fn narrow(self, o: &mut [bf16; LANES], x: Self::F) {
        *o = x.map(bf16::from_f32);
    }

    #[inline(always)]
    fn int(self, x: i32) -> Self::I {
        [x; LANES]
    }

    #[inline(always)]
    fn number(self, x: Self::I) -> Self::F {
        x.map(|x| x as f32)
    }

    #[inline(always)]
    fn bytes(self, x: &[u8; QUADS]) -> Self::B {
        *x
    }

    #[inline(always)]
    fn nibbles(self, x: &[u8; QUADS]) -> [Self::B; 2] {
        [x.map(|x| x & 15), x.map(|x| x >> 4)]
    }

    #[inline(always)]
    fn quads(self, acc: Self::I, w: Self::B, x: [i8; 4]) -> Self::I {
        std::array::from_fn(|r| {
            (0..4).fold(acc[r], |sum, j| sum + i32::from(w[4 * r + j]) * i32::from(x[j]))
        })
    }

    #[inline(always)]
    fn words(self, x: &[i8; PAIRS]) -> Self::W {
        x.map(i16::from)
    }

    #[inline(always)]
    fn word_pair(self, x: [i16; 2]) -> Self::W {
        std::array::from_fn(|i| x[i % 2])
    }

    #[inline(always)]
    fn word_pairs(self, acc: Self::I, a: Self::W, b: Self::W) -> Self::I {
        let product = |i: usize| i32::from(a[i]) * i32::from(b[i]);
        std::array::from_fn(|r| acc[r] + product(2 * r) + product(2 * r + 1))
    }

    #[inline(always)]
    fn ahead<T>(self, _: &[T], _: usize) {}

    #[inline(always)]
    fn store(self, o: &mut [f32; LANES], x: Self::F) {
        *o = x;
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i] - b[i])
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i] / b[i])
    }

    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }

    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        std::array::from_fn(|i| if b[i] < a[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        std::array::from_fn(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }

    /// By an addition after which the last place is a whole one; for numbers below 2^22.
    #[inline(always)]
    fn round(self, x: Self::F) -> Self::F {
        x.map(|x| (x + 12_582_912.0) - 12_582_912.0)
    }

    #[inline(always)]
    fn pow2(self, n: Self::F) -> Self::F {
        n.map(|n| f32::from_bits(((n as i32 + 127) as u32) << 23))
    }

    #[inline(always)]
    fn unless_nan(self, x: Self::F, y: Self::F) -> Self::F {
        std::array::from_fn(|i| if x[i].is_nan() { x[i] } else { y[i] })
    }

    #[inline(always)]
    fn eights(self, o: &mut [i8; LANES], x: Self::F) {
        *o = x.map(|x| x as i8);
    }

    #[inline(always)]
    fn sixteens(self, o: &mut [i16; PAIRS], x: [Self::F; 2], by: Self::F) {
        for (o, x) in o.as_chunks_mut::<LANES>().0.iter_mut().zip(x) {
            *o = self.mul(x, by).map(|x| x.round_ties_even() as i16);
        }
    }

    #[inline(always)]
    fn sizes(self, most: Self::F, x: Self::F) -> Self::F {
        std::array::from_fn(|i| f32::from_bits(most[i].to_bits().max(x[i].abs().to_bits())))
    }

    #[inline(always)]
    fn size(self, x: Self::F) -> f32 {
        f32::from_bits(x.into_iter().fold(0, |most, x| most.max(x.abs().to_bits())))
    }

    #[inline(always)]
    fn largest(self, x: Self::F) -> f32 {
        x.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }

    #[inline(always)]
    fn sum4(self, x: [Self::F; 4]) -> [f32; 4] {
        x.map(|x| self.sum(x))
    }

    #[inline(always)]
    fn sum(self, x: Self::F) -> f32 {
        let x: [f32; 8] = std::array::from_fn(|i| x[i] + x[i + 8]);
        let x: [f32; 4] = std::array::from_fn(|i| x[i] + x[i + 4]);
        (x[0] + x[2]) + (x[1] + x[3])
    }

    #[inline(always)]
    fn dots<W: Wide, X: Wide, const R: usize, const T: usize>(
        self,
        w: [&[W]; R],
        x: [&[X]; T],
    ) -> [[f32; T]; R] {
        w.map(|w| {
            x.map(|x| {
                let ((w, w_rest), (x, x_rest)) = (w.as_chunks::<LANES>(), x.as_chunks::<LANES>());
                let mut sums = [0.0; LANES];
                for (w, x) in w.iter().zip(x) {
                    sums = self.fma(self.load(w), self.load(x), sums);
                }
                for ((sum, w), x) in sums.iter_mut().zip(w_rest).zip(x_rest) {
                    *sum += w.load() * x.load();
                }
                self.sum(sums)
            })
        })
    }

    #[inline(always)]
    fn products<W: Wide, X: Wide>(
        self,
        w: Rows<'_, W>,
        x: Rows<'_, X>,
        put: impl FnMut(usize, usize, f32),
    ) {
        tiles::<_, _, _, 1, 2, 1>(self, w, x, put);
    }

    #[inline(always)]
    fn accumulate<B: Wide>(self, o: &mut [f32], a: Factor<'_>, b: &[B], j: usize) {
        outer::<_, _, 2, 1>(self, o, a, b, j);
    }
}
