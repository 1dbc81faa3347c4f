//! Weights out of nothing: each value is a pure function of tensor name, index and seed.
//!
//! So that a processor, a GPU and a reader with a pencil agree to the bit, integers decide
//! everything:
//!
//! 1. `key = first 8 bytes of blake3(name), little-endian, plus mix(seed)`;
//! 2. `h = mix(key + (i + 1) * 0x9e3779b97f4a7c15)` for the element of flat (row-major) index `i`,
//!    where `mix` is the finaliser of `SplitMix64`;
//! 3. `n = 2 * (sum of the four 16-bit parts of h) - 262140`, an even integer of at most 18 bits,
//!    nearly normal, with standard deviation `65536 * 2 / sqrt(3) = 75674`;
//! 4. `value = offset + n * 2^e` with offset and `e` of the tensor's role: exact in f32, rounded to
//!    nearest even in f16 and bf16.
//!
//! FP8 draws code and scale: the code is that of `n / 1024`, the scale of block `b` (flat) is
//! `2^(e + 10) * (4 + m) / 8` with `m` the low three bits of `mix(key' + (b + 1) * 0x9e…)`, `key'`
//! that of the scale's own name.
//!
//! Roles, with `D` the tensor's columns and `r = round(log2(sqrt(D)))`: embedding `e = -16`; what
//! reads the stream `-16 - r`; router the same; what writes to it `-18 - r`, so that 48 layers stay
//! within 1e-5 of the same model in f64; `lm_head` `-15 - r`; convolution `-17`; zero-centred norms
//! `-19` (0.14 around 0); gated norm `-19` around 1; `A_log` `-16` (1.15 around -1.5: rates from 0.01
//! to 4); `dt_bias` `-17` around 0.
//!
//! Known values of the official preset, in f32, computed apart from this code by the four steps above:
//!
//! | tensor | index | seed | bits | value |
//! |---|---|---|---|---|
//! | `model.embed_tokens.weight` | 0 | 0 | `3e8d0400` | 0.275421142578125 |
//! | `model.embed_tokens.weight` | 311164927 | 0 | `40020080` | 2.031280517578125 |
//! | `model.embed_tokens.weight` | 0 | 1 | `bfd3f400` | -1.6558837890625 |
//! | `lm_head.weight` | 12345 | 0 | `bd10c700` | -0.035346031188964844 |
//! | `model.norm.weight` | 2047 | 0 | `be0f6200` | -0.14002227783203125 |
//! | `model.layers.0.linear_attn.in_proj_qkvz.weight` | 0 | 0 | `bbe74c00` | -0.007058620452880859 |
//! | `model.layers.0.linear_attn.in_proj_ba.weight` | 131071 | 0 | `3ca62600` | 0.02028179168701172 |
//! | `model.layers.0.linear_attn.out_proj.weight` | 7 | 0 | `bbb76f00` | -0.005597949028015137 |
//! | `model.layers.0.linear_attn.A_log` | 31 | 0 | `bfd97200` | -1.69879150390625 |
//! | `model.layers.0.linear_attn.dt_bias` | 0 | 0 | `3f01d200` | 0.507110595703125 |
//! | `model.layers.0.linear_attn.norm.weight` | 5 | 0 | `3f816bc0` | 1.0111007690429688 |
//! | `model.layers.0.linear_attn.conv1d.weight` | 3 | 0 | `bfacdf80` | -1.3505706787109375 |
//! | `model.layers.47.mlp.experts.511.down_proj.weight` | 1048575 | 0 | `3ab0b800` | 0.001348257064819336 |
//! | `mtp.fc.weight` | 8388607 | 7 | `bce77c00` | -0.028257369995117188 |
//!
//! In FP8 `model.layers.0.mlp.experts.0.gate_proj.weight`, seed 0, has the codes of -78.6855 (index 0)
//! and -13.5977 (index 1048575), and the scales 2.74658203125e-4 (block 0) and 1.220703125e-4 (block
//! 63).

use std::{borrow::Cow, collections::HashMap, ops::Range, str::FromStr};

use crate::{
    Config, Dtype, Weights,
    config::{Preset, Yarn},
    fp8, names,
    names::{Entry, Role},
    weights::{Meta, RawTensor, Recipe, WeightError},
};

/// A synthetic checkpoint.
#[derive(Debug)]
pub struct Synthetic {
    config: Config,
    seed: u64,
    origin: String,
    entries: HashMap<String, Entry>,
    names: Vec<String>,
}

/// `SplitMix64`'s finaliser.
#[inline]
fn mix(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

const GOLDEN_RATIO: u64 = 0x9e37_79b9_7f4a_7c15;

fn key(name: &str, seed: u64) -> u64 {
    let hash = blake3::hash(name.as_bytes());
    let word = hash.as_bytes().first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    word.wrapping_add(mix(seed))
}

/// The nearly normal integer of an element.
#[inline]
fn draw(key: u64, index: u64) -> i32 {
    let h = mix(key.wrapping_add((index.wrapping_add(1)).wrapping_mul(GOLDEN_RATIO)));
    let sum = (h & 0xffff) + (h >> 16 & 0xffff) + (h >> 32 & 0xffff) + (h >> 48);
    2 * sum as i32 - 262_140
}

/// Offset and exponent of a role.
fn affine(role: Role, columns: usize) -> (f32, i32) {
    // round(log2(sqrt(D))) in integers: 4^r <= D, up where D is past 4^r * 2.
    let log = columns.max(1).ilog2();
    let r = log.div_ceil(2) as i32;
    match role {
        Role::Embedding | Role::ALog => (if role == Role::ALog { -1.5 } else { 0.0 }, -16),
        Role::In | Role::Router => (0.0, -16 - r),
        Role::Out => (0.0, -18 - r),
        Role::LmHead => (0.0, -15 - r),
        Role::Conv | Role::DtBias => (0.0, -17),
        Role::Norm => (0.0, -19),
        Role::GatedNorm => (1.0, -19),
    }
}

impl Synthetic {
    /// A checkpoint of this config with every tensor of the official list, MTP head included.
    /// `config.dtype` and `config.fp8` say how it is stored.
    pub fn new(config: Config, seed: u64) -> Synthetic {
        let list = names::entries(&config, true);
        let mut names = Vec::with_capacity(list.len());
        let fp8 = config.fp8.is_some();
        for entry in &list {
            names.push(entry.name.clone());
            if fp8 && entry.quantised {
                names.push(names::scale_of(&entry.name));
            }
        }
        let entries = list.into_iter().map(|entry| (entry.name.clone(), entry)).collect();
        Synthetic { config, seed, origin: format!("synthetic, seed {seed}"), entries, names }
    }

    fn block(&self) -> [usize; 2] {
        self.config.fp8.as_ref().map_or([1, 1], |fp8| fp8.weight_block_size)
    }

    /// The entry that a name belongs to, and whether the name is that of its scales.
    fn entry(&self, name: &str) -> Option<(&Entry, bool)> {
        if let Some(entry) = self.entries.get(name) {
            return Some((entry, false));
        }
        let entry = self.entries.get(name.strip_suffix("_scale_inv")?)?;
        (self.config.fp8.is_some() && entry.quantised).then_some((entry, true))
    }

    fn made(&self, name: &str, entry: &Entry, scales: bool) -> Recipe {
        let columns =
            if entry.role == Role::Conv { 1 } else { entry.shape.last().copied().unwrap_or(1) };
        let (offset, exponent) = affine(entry.role, columns);
        let unit = 2.0_f32.powi(if scales { exponent + 10 - 3 } else { exponent });
        Recipe { key: key(name, self.seed), offset, unit, columns: None }
    }
}

impl FromStr for Synthetic {
    type Err = String;

    /// `synthetic:PRESET[,layers=N][,experts=E][,dtype=D][,seed=S][,yarn=F]`: with `yarn` positions are those of a
    /// context that is `F` times as long.
    fn from_str(s: &str) -> Result<Synthetic, String> {
        let wrong = |what: &str| {
            format!(
                "{s}: {what}, expected \
                 synthetic:PRESET[,layers=N][,experts=E][,dtype=D][,seed=S][,yarn=F]"
            )
        };
        let rest = s.strip_prefix("synthetic:").ok_or_else(|| wrong("no synthetic model"))?;
        let mut parts = rest.split(',');
        let preset: Preset = parts.next().unwrap_or("").parse().map_err(|e: String| wrong(&e))?;
        let (mut layers, mut experts, mut seed, mut yarn) = (None, None, 0, None);
        let small = matches!(preset, Preset::Tiny | Preset::Ragged);
        let mut dtype = if small { Dtype::F32 } else { Dtype::Bf16 };
        for part in parts {
            let (key, value) = part.split_once('=').ok_or_else(|| wrong(&format!("{part:?}")))?;
            let number =
                || value.parse::<u64>().map_err(|_| wrong(&format!("{part:?} is no number")));
            match key {
                "layers" => layers = Some(number()? as usize),
                "experts" => experts = Some(number()? as usize),
                "seed" => seed = number()?,
                "yarn" => {
                    let factor = value.parse().ok().filter(|factor: &f64| *factor >= 1.0);
                    yarn = Some(factor.ok_or_else(|| wrong(&format!("{part:?} is no factor")))?);
                }
                "dtype" => {
                    dtype = value.parse().map_err(|e: String| wrong(&e))?;
                    if !matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::Bf16 | Dtype::Fp8) {
                        return Err(wrong(&format!("dtype {value}")));
                    }
                }
                _ => return Err(wrong(&format!("{key:?}"))),
            }
        }
        let mut config = preset.config(layers, experts).map_err(|e| wrong(&e))?.stored_as(dtype);
        if let Some(factor) = yarn {
            config.rope.yarn = Some(Yarn::of(factor, config.max_position_embeddings));
        }
        Ok(Synthetic { origin: s.to_owned(), ..Synthetic::new(config, seed) })
    }
}

impl Weights for Synthetic {
    fn config(&self) -> &Config {
        &self.config
    }

    fn origin(&self) -> String {
        self.origin.clone()
    }

    fn identity(&self) -> Option<String> {
        Some(format!("synthetic, seed {}, {:?}", self.seed, self.config))
    }

    fn meta(&self, name: &str) -> Option<Meta> {
        let (entry, scales) = self.entry(name)?;
        if scales {
            let shape =
                entry.shape.iter().zip(self.block()).map(|(n, block)| n.div_ceil(block)).collect();
            return Some(Meta { dtype: Dtype::F32, shape });
        }
        let fp8 = self.config.fp8.is_some() && entry.quantised;
        let dtype = if fp8 { Dtype::Fp8 } else { self.config.dtype };
        Some(Meta { dtype, shape: entry.shape.clone() })
    }

    fn fetch(&self, name: &str) -> Result<RawTensor<'_>, WeightError> {
        let rows = self.meta(name).and_then(|meta| meta.shape.first().copied());
        self.fetch_rows(name, 0..rows.unwrap_or(0))
    }

    fn fetch_rows(&self, name: &str, rows: Range<usize>) -> Result<RawTensor<'_>, WeightError> {
        let (Some((entry, scales)), Some(meta)) = (self.entry(name), self.meta(name)) else {
            return Err(WeightError(format!("{}: tensor {name}: there is none", self.origin)));
        };
        let mut shape = meta.shape;
        if shape[0] < rows.end {
            return Err(WeightError(format!(
                "{}: tensor {name}: rows {rows:?} of shape {shape:?}",
                self.origin
            )));
        }
        let row: usize = shape[1..].iter().product();
        shape[0] = rows.len();
        let made = self.made(name, entry, scales);
        let Recipe { key, unit, .. } = made;
        let indices = (rows.start * row) as u64..(rows.end * row) as u64;
        let data: Vec<u8> = if scales {
            let scale = |i: u64| {
                let m = mix(key.wrapping_add((i + 1).wrapping_mul(GOLDEN_RATIO))) & 7;
                (4 + m) as f32 * unit
            };
            indices.flat_map(|i| scale(i).to_le_bytes()).collect()
        } else {
            let value = |i: u64| made.element(i);
            match meta.dtype {
                Dtype::Fp8 => {
                    indices.map(|i| fp8::from_f32(draw(key, i) as f32 / 1024.0)).collect()
                }
                Dtype::Bf16 => bytes(indices, |i| half::bf16::from_f32(value(i)).to_le_bytes()),
                Dtype::F16 => bytes(indices, |i| half::f16::from_f32(value(i)).to_le_bytes()),
                _ => bytes(indices, |i| value(i).to_le_bytes()),
            }
        };
        Ok(RawTensor { dtype: meta.dtype, shape, data: Cow::Owned(data) })
    }

    fn recipe(&self, name: &str) -> Option<Recipe> {
        let (entry, scales) = self.entry(name)?;
        Some(self.made(name, entry, scales))
    }

    fn names(&self) -> Vec<String> {
        self.names.clone()
    }
}

impl Recipe {
    /// What makes the elements from this one on.
    #[must_use]
    pub fn after(self, first: u64) -> Recipe {
        Recipe { key: self.key.wrapping_add(first.wrapping_mul(GOLDEN_RATIO)), ..self }
    }

    /// An element, before it is rounded to the storage type.
    pub fn element(self, i: u64) -> f32 {
        self.offset + draw(self.key, i) as f32 * self.unit
    }
}

/// The bytes of all elements, through a buffer that the compiler can fill without growing.
fn bytes<const N: usize>(indices: Range<u64>, element: impl Fn(u64) -> [u8; N]) -> Vec<u8> {
    let mut data = vec![0; (indices.end - indices.start) as usize * N];
    for (chunk, i) in data.as_chunks_mut::<N>().0.iter_mut().zip(indices) {
        *chunk = element(i);
    }
    data
}

#[cfg(test)]
mod tests {
    use super::*;

    fn official(dtype: &str) -> Synthetic {
        format!("synthetic:official,dtype={dtype}").parse().unwrap()
    }

    /// One element, by way of the row that holds it.
    fn element(source: &Synthetic, name: &str, index: usize) -> Vec<u8> {
        let shape = source.meta(name).unwrap().shape;
        let row: usize = shape[1..].iter().product();
        let raw = source.fetch_rows(name, index / row..index / row + 1).unwrap();
        let size = raw.dtype.size();
        raw.data[index % row * size..(index % row + 1) * size].to_vec()
    }

    #[test]
    fn known_values() {
        let table = include_str!("synthetic.rs").lines().filter_map(|line| {
            let cells: Vec<&str> = line.strip_prefix("//! | `")?.split(" | ").collect();
            let [name, index, seed, bits, value] = cells[..] else { return None };
            let bits = u32::from_str_radix(bits.trim_matches('`'), 16).ok()?;
            let value = value.strip_suffix(" |")?;
            Some((name.trim_end_matches('`'), index, seed, bits, value))
        });
        let mut seen = 0;
        for (name, index, seed, bits, value) in table {
            let f32 = Synthetic { seed: seed.parse().unwrap(), ..official("f32") };
            let got = element(&f32, name, index.parse().unwrap());
            assert_eq!(got, bits.to_le_bytes(), "{name} {index}");
            assert_eq!(value.parse::<f32>().unwrap().to_bits(), bits, "{name} {index}");
            let bf16 = Synthetic { seed: f32.seed, ..official("bf16") };
            let narrow = half::bf16::from_f32(f32::from_bits(bits)).to_le_bytes();
            assert_eq!(element(&bf16, name, index.parse().unwrap()), narrow);
            seen += 1;
        }
        assert_eq!(seen, 14);
    }

    #[test]
    fn known_values_of_fp8() {
        let source = official("fp8");
        let name = "model.layers.0.mlp.experts.0.gate_proj.weight";
        for (index, value) in [(0, -78.685_55_f32), (1_048_575, -13.597_656)] {
            assert_eq!(element(&source, name, index), [fp8::from_f32(value)]);
        }
        for (block, scale) in [(0, 0.000_274_658_2_f32), (63, 0.000_122_070_31)] {
            assert_eq!(element(&source, &format!("{name}_scale_inv"), block), scale.to_le_bytes());
        }
    }
}
