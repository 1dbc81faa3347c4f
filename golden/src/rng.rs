//! A generator whose stream is ours: no dependency can change it.

use ndarray::{ArcArray, Dimension, ShapeBuilder};

/// `SplitMix64`, keyed by a case id so that every case owns its stream.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// A stream fixed by `key` (a case id) and `seed`.
    pub fn keyed(key: &str, seed: u64) -> Rng {
        let hash = blake3::hash(key.as_bytes());
        let word = hash.as_bytes().first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        Rng(word ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    /// Next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `[0, n)`; `n` is at least 1.
    pub fn below(&mut self, n: usize) -> usize {
        // The high word of a 128-bit product: the bias is below n / 2^64.
        ((u128::from(self.next_u64()) * n as u128) >> 64) as usize
    }

    /// Uniform in `[lo, hi)`, on a grid of 2^24 values.
    pub fn uniform(&mut self, lo: f32, hi: f32) -> f32 {
        let unit = (self.next_u64() >> 40) as f32 / (1_u64 << 24) as f32;
        lo + (hi - lo) * unit
    }

    /// Normal, by the sum of twelve uniforms: no libm, so the same on every machine.
    /// Tails end at six standard deviations.
    pub fn normal(&mut self, mean: f32, std: f32) -> f32 {
        let sum: f64 = (0..12).map(|_| (self.next_u64() >> 32) as f64 / (1_u64 << 32) as f64).sum();
        (f64::from(mean) + f64::from(std) * (sum - 6.0)) as f32
    }

    /// A tensor of [`normal`](Self::normal) values.
    pub fn normals<D: Dimension, S: ShapeBuilder<Dim = D>>(
        &mut self,
        shape: S,
        mean: f32,
        std: f32,
    ) -> ArcArray<f32, D> {
        ArcArray::from_shape_simple_fn(shape, || self.normal(mean, std))
    }

    /// A tensor of [`uniform`](Self::uniform) values.
    pub fn uniforms<D: Dimension, S: ShapeBuilder<Dim = D>>(
        &mut self,
        shape: S,
        lo: f32,
        hi: f32,
    ) -> ArcArray<f32, D> {
        ArcArray::from_shape_simple_fn(shape, || self.uniform(lo, hi))
    }
}
