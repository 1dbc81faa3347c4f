//! CPU variants of `fp8_dequant`.

use golden::{
    Dtype, Plant, Spec, Variant,
    ops::fp8_dequant::{Case, Fp8Dequant, Inputs, Outputs},
};
use ndarray::Ix2;
use rayon::prelude::*;

use super::vector::variants;
use super::{
    portable::{Kernel, Planted, Portable, as_stored, pack, unpacked},
    stored::Stored,
};

pub(crate) mod fast;

/// Every CPU variant, plainest first.
#[inline(never)]
pub fn variants() -> &'static [&'static dyn Variant<Fp8Dequant>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<Fp8Dequant>] = variants!(
    [&Portable::new("cpu/portable", pack!(Loaded), as_stored, PLANTS)],
    as_stored,
    VECTOR_PLANTS
);

/// Those that the fast kernels can be told to have: `divides-by-the-scale`, `scales-transposed`, `scale-in-bf16`.
#[cfg(target_arch = "x86_64")]
const VECTOR_PLANTS: &[Plant] = &[PLANTS[0], PLANTS[1], PLANTS[6]];

pub(crate) const PLANTS: &[Plant] = &[
    Plant {
        name: "divides-by-the-scale",
        what: "`weight_scale_inv` is taken at its word, and divides",
        cite: "https://github.com/vllm-project/vllm/issues/25079",
    },
    Plant {
        name: "scales-transposed",
        what: "the grid of scales is read column by column",
        cite: "https://github.com/vllm-project/vllm/issues/36242",
    },
    Plant {
        name: "edge-takes-its-neighbour",
        what: "the ragged block at the edge has no scale of its own and takes that of the last whole one",
        cite: "https://github.com/HabanaAI/vllm-fork/issues/2071",
    },
    Plant {
        name: "subnormals-normal",
        what: "codes of exponent zero are decoded as normal ones",
        cite: "https://github.com/vllm-project/vllm/issues/25079",
    },
    Plant {
        name: "subnormals-flushed",
        what: "codes of exponent zero are zero",
        cite: "https://github.com/HabanaAI/vllm-fork/issues/2071",
    },
    Plant {
        name: "fnuz-bias",
        what: "codes are read as e4m3fnuz, whose exponents are biased by one more",
        cite: "https://github.com/ROCm/ATOM/issues/406",
    },
    Plant {
        name: "scale-in-bf16",
        what: "the scale is rounded to bf16",
        cite: "https://github.com/ROCm/ATOM/issues/755",
    },
];

/// A problem in memory.
struct Loaded<E> {
    case: Case,
    codes: Vec<u8>,
    scales: Vec<f32>,
    weight: Vec<E>,
}

impl<E: Stored> Loaded<E> {
    fn new(spec: &Spec<Case>, x: &Inputs) -> Self {
        Loaded {
            case: spec.case.clone(),
            codes: x.codes.iter().copied().collect(),
            scales: x.scales.iter().copied().collect(),
            weight: vec![E::NAN; x.codes.len()],
        }
    }
}

impl<E: Stored> Kernel<Fp8Dequant> for Loaded<E> {
    fn poison(&mut self) {
        self.weight.fill(E::NAN);
    }

    fn run(&mut self, plant: Planted) {
        let Case { d, bs, .. } = self.case;
        fp8_dequant(&mut self.weight, &self.codes, &self.scales, d, bs, plant);
    }

    fn inputs(&self) -> Inputs {
        let Case { m, d, bs } = self.case;
        let codes = ndarray::ArcArray2::from_shape_vec((m, d), self.codes.clone());
        Inputs {
            codes: codes.expect("as many codes as the shape says"),
            scales: unpacked(&self.scales, Ix2(m.div_ceil(bs), d.div_ceil(bs))),
            block_rows: bs,
            block_cols: bs,
        }
    }

    fn outputs(&self) -> Outputs {
        Outputs { weight: unpacked(&self.weight, Ix2(self.case.m, self.case.d)) }
    }
}

/// One row per task.
///
/// `weight`, `codes`: `[M, D]`; `scales`: one per block of `bs` by `bs`, row by row.
pub(crate) fn fp8_dequant<E: Stored>(
    weight: &mut [E],
    codes: &[u8],
    scales: &[f32],
    d: usize,
    bs: usize,
    plant: Planted,
) {
    let values = values(plant);
    let (down, across) = (codes.len() / d, d.div_ceil(bs));
    let (rows, whole) = (down.div_ceil(bs), |size: usize| (size / bs).max(1) - 1);
    let scale = |i: usize, j: usize| {
        let scale = match plant.0 {
            Some("scales-transposed") => scales[j * rows + i],
            Some("edge-takes-its-neighbour") => {
                scales[i.min(whole(down)) * across + j.min(whole(d))]
            }
            _ => scales[i * across + j],
        };
        match plant.0 {
            Some("divides-by-the-scale") => 1.0 / scale,
            Some("scale-in-bf16") => Dtype::Bf16.round(scale),
            _ => scale,
        }
    };
    weight.par_chunks_mut(d).zip(codes.par_chunks(d)).enumerate().for_each(|(row, (o, codes))| {
        for (block, (o, codes)) in o.chunks_mut(bs).zip(codes.chunks(bs)).enumerate() {
            let scale = scale(row / bs, block);
            for (o, &code) in o.iter_mut().zip(codes) {
                *o = E::store(values[usize::from(code)] * scale);
            }
        }
    });
}

/// The value of every code: sign, 4 bits of exponent (bias 7), 3 of mantissa, no infinities.
fn values(plant: Planted) -> [f32; 256] {
    // The bits of exponent and mantissa stand in the same order in an f32, whose bias is 127: what is
    // missing is a power of two, which turns subnormals into what they are as well.
    let bias = if plant.is("fnuz-bias") { 119 } else { 120 };
    let lift = 2.0_f32.powi(bias);
    std::array::from_fn(|code| {
        let magnitude = code as u32 & 0x7f;
        let value = match magnitude {
            0x7f => f32::NAN,
            0..8 if plant.is("subnormals-flushed") => 0.0,
            0..8 if plant.is("subnormals-normal") => {
                (1.0 + magnitude as f32 / 8.0) * 2.0_f32.powi(-7)
            }
            _ => f32::from_bits(magnitude << 20) * lift,
        };
        if code < 128 { value } else { -value }
    })
}
