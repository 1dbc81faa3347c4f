//! Weight matrices in fewer bits: which numbers a format can hold, and which of them stand for a matrix.
//!
//! | format | blocks | a weight is |
//! |---|---|---|
//! | `int8` | 32 columns of a row | `scale code`, codes `-127 ..= 127` |
//! | `int4` | 32 columns of a row | `minimum + scale code`, codes `0 ..= 15` |
//! | `fp8` | 128 rows by 128 columns | `scale value(code)`, codes of `float8_e4m3fn` |
//!
//! Blocks of `int8` and `int4` are those of llama.cpp's `Q8_0` and `Q4_1`; those of `fp8` are the official
//! FP8 checkpoint's. Scales and minima are bf16 here, so that `scale code` is exact in f32. Rounded to the
//! nearest, a scale is off by less than what a code at the end of its range is, and narrowing what was
//! narrowed changes nothing.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{Dtype, fp8, names};

/// Columns of a block of `int8` and `int4`.
pub const BLOCK: usize = 32;

/// Rows and columns of a block of `fp8`.
pub const FP8_BLOCK: usize = 128;

/// A format of weight matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Narrow {
    /// FP8 codes, a scale per 128 by 128.
    Fp8,
    /// Eight bits, a scale per 32.
    Int8,
    /// Four bits, a scale and a minimum per 32.
    Int4,
}

impl Narrow {
    /// All of them, widest first.
    pub const ALL: [Narrow; 3] = [Narrow::Fp8, Narrow::Int8, Narrow::Int4];

    /// The name in a case id.
    pub fn name(self) -> &'static str {
        match self {
            Narrow::Fp8 => "fp8",
            Narrow::Int8 => "int8",
            Narrow::Int4 => "int4",
        }
    }

    /// What a number of an engine narrows projections to; `None` where it narrows nothing.
    pub fn of_number(number: &str) -> Option<Narrow> {
        [Narrow::Int8, Narrow::Int4].into_iter().find(|narrow| narrow.name() == number)
    }

    /// What a tensor becomes where projections are narrowed to this: `None` stays. Routers and gates, which
    /// decide, are small; the output head, which chooses the token, keeps eight bits.
    pub fn of_tensor(self, name: &str) -> Option<Narrow> {
        match self {
            _ if !names::is_projection(name) => None,
            Narrow::Int4 if name == names::LM_HEAD => Some(Narrow::Int8),
            narrow => Some(narrow),
        }
    }

    /// Bytes of a matrix of `rows` rows of `d` columns.
    pub fn bytes(self, rows: u64, d: u64) -> u64 {
        let (block, own) = (BLOCK as u64, FP8_BLOCK as u64);
        match self {
            Narrow::Fp8 => rows * d + 2 * rows.div_ceil(own) * d.div_ceil(own),
            Narrow::Int8 => rows * d.div_ceil(block) * (block + 2),
            Narrow::Int4 => rows * d.div_ceil(block) * (block / 2 + 4),
        }
    }

    /// A matrix of rows of `d` columns becomes what stands for it.
    pub fn round(self, weight: &mut [f32], d: usize) {
        match self {
            Narrow::Fp8 => {
                for rows in weight.chunks_mut(FP8_BLOCK * d) {
                    let scales = fp8_scales(rows, d);
                    for row in rows.chunks_mut(d) {
                        for (part, scale) in row.chunks_mut(FP8_BLOCK).zip(&scales) {
                            part.iter_mut().for_each(|w| {
                                *w = fp8::to_f32(fp8_code(*w, *scale)) * scale;
                            });
                        }
                    }
                }
            }
            Narrow::Int8 => {
                for block in weight.chunks_mut(d).flat_map(|row| row.chunks_mut(BLOCK)) {
                    let scale = int8_scale(block);
                    block.iter_mut().for_each(|w| *w = f32::from(int8_code(*w, scale)) * scale);
                }
            }
            Narrow::Int4 => {
                for block in weight.chunks_mut(d).flat_map(|row| row.chunks_mut(BLOCK)) {
                    let ends = int4_ends(block);
                    block.iter_mut().for_each(|w| *w = ends.of(int4_code(*w, ends)));
                }
            }
        }
    }
}

impl fmt::Display for Narrow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Narrow {
    type Err = String;

    fn from_str(s: &str) -> Result<Narrow, String> {
        let known = Narrow::ALL.into_iter().find(|narrow| narrow.name() == s);
        known.ok_or_else(|| format!("weights {s:?}: expected fp8, int8 or int4"))
    }
}

/// The nearest integer, ties to even, of numbers below 2^22: by an addition after which the last place is a
/// whole one.
fn nearest(x: f32) -> f32 {
    (x + 12_582_912.0) - 12_582_912.0
}

/// The largest magnitude; NaN if one is no number, so that a block of which none could be kept says so.
fn largest(x: &[f32]) -> f32 {
    let nothing: f32 = x.iter().map(|x| x * 0.0).sum();
    x.iter().fold(0.0_f32, |most, x| most.max(x.abs())) + nothing
}

/// The scale of a block in eight bits.
pub fn int8_scale(block: &[f32]) -> f32 {
    Dtype::Bf16.round(largest(block) / 127.0)
}

/// The code of a weight under a scale.
pub fn int8_code(w: f32, scale: f32) -> i8 {
    // A cast saturates, at -128 as well; of a block of zeros it is NaN, which casts to zero.
    (nearest(w / scale) as i8).max(-127)
}

/// What the codes of a block in four bits count from, and in which steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ends {
    /// The weight of code 0.
    pub minimum: f32,
    /// From code to code.
    pub scale: f32,
}

impl Ends {
    /// The weight of a code.
    pub fn of(self, code: u8) -> f32 {
        self.minimum + f32::from(code) * self.scale
    }
}

/// Minimum and scale of a block in four bits.
pub fn int4_ends(block: &[f32]) -> Ends {
    let nothing: f32 = block.iter().map(|x| x * 0.0).sum();
    let least = block.iter().copied().fold(f32::INFINITY, f32::min) + nothing;
    let most = block.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let minimum = Dtype::Bf16.round(least);
    Ends { minimum, scale: Dtype::Bf16.round((most - minimum).max(0.0) / 15.0) }
}

/// The code of a weight between two ends.
pub fn int4_code(w: f32, ends: Ends) -> u8 {
    (nearest((w - ends.minimum) / ends.scale) as u8).min(15)
}

/// The scales of up to 128 rows, one per 128 columns.
pub fn fp8_scales(rows: &[f32], d: usize) -> Vec<f32> {
    let mut scales = vec![0.0_f32; d.div_ceil(FP8_BLOCK)];
    for row in rows.chunks(d) {
        for (scale, part) in scales.iter_mut().zip(row.chunks(FP8_BLOCK)) {
            let most = largest(part);
            // `max` would lose a NaN.
            *scale = if *scale >= most { *scale } else { most };
        }
    }
    scales.iter_mut().for_each(|scale| *scale = Dtype::Bf16.round(*scale / 448.0));
    scales
}

/// The code of a weight under a scale.
pub fn fp8_code(w: f32, scale: f32) -> u8 {
    if scale == 0.0 { 0 } else { fp8::from_f32(w / scale) }
}

#[cfg(test)]
mod tests {
    use super::{BLOCK, Narrow};
    use crate::Rng;

    #[test]
    fn what_was_narrowed_stays() {
        for (seed, d) in [1, 31, 32, 33, 129, 300].into_iter().enumerate() {
            let drawn = Rng::keyed("narrow", seed as u64).normals((130, d), 0.0, 0.02);
            for narrow in Narrow::ALL {
                let mut once: Vec<f32> = drawn.iter().copied().collect();
                narrow.round(&mut once, d);
                let mut twice = once.clone();
                narrow.round(&mut twice, d);
                assert_eq!(once, twice, "{narrow} {d}");
                let (error, all): (f64, f64) =
                    drawn.iter().zip(&once).fold((0.0, 0.0), |sums, (w, n)| {
                        let (w, n) = (f64::from(*w), f64::from(*n));
                        (sums.0 + (w - n) * (w - n), sums.1 + w * w)
                    });
                // Half a step is 1/254 of the largest of 32, 1/30 of their range, 1/32 of the weight.
                let most = [0.04, 0.02, 0.2][narrow as usize];
                assert!((error / all).sqrt() <= most, "{narrow} {d}: {}", (error / all).sqrt());
            }
        }
    }

    #[test]
    fn what_decides_stays_and_the_head_keeps_eight_bits() {
        for number in ["f32", "bf16", "fp8", "int3"] {
            assert_eq!(Narrow::of_number(number), None);
        }
        for (number, narrow) in [("int8", Narrow::Int8), ("int4", Narrow::Int4)] {
            assert_eq!(Narrow::of_number(number), Some(narrow));
            let of = |name: &str| narrow.of_tensor(name);
            assert_eq!(of("model.layers.3.mlp.experts.7.up_proj.weight"), Some(narrow));
            assert_eq!(of("lm_head.weight"), Some(Narrow::Int8));
            assert_eq!(of("model.embed_tokens.weight"), None);
            assert_eq!(of("model.layers.3.mlp.gate.weight"), None);
            assert_eq!(of("model.layers.0.linear_attn.in_proj_ba.weight"), None);
        }
    }

    #[test]
    fn a_block_of_one_number_keeps_it_to_bf16() {
        for narrow in [Narrow::Int8, Narrow::Int4] {
            for x in [0.0, 1.0, -1.0, 3.0] {
                let mut block = [x; BLOCK];
                narrow.round(&mut block, BLOCK);
                assert!(
                    block.iter().all(|w| (w - x).abs() <= x.abs() / 250.0),
                    "{narrow} {x} {block:?}"
                );
            }
        }
    }
}
