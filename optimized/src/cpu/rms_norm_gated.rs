//! CPU variants of `rms_norm_gated`.

use golden::{
    Plant, Spec, Variant,
    ops::rms_norm_gated::{Case, Inputs, Outputs, RmsNormGated},
};
use ndarray::Ix2;
use rayon::prelude::*;

use super::vector::variants;
use super::{
    activation::{overflowing_sigmoid, sigmoid, silu},
    portable::{Kernel, Planted, Portable, as_stored, pack, packed, unpacked},
    stored::Stored,
    sums::dot,
};

pub(crate) mod fast;

/// Every CPU variant, plainest first.
#[inline(never)]
pub fn variants() -> &'static [&'static dyn Variant<RmsNormGated>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<RmsNormGated>] = variants!(
    [&Portable::new("cpu/portable", pack!(Loaded), as_stored, PLANTS)],
    as_stored,
    VECTOR_PLANTS
);

/// Those that the fast kernels can be told to have: `zero-centred`, `sum-not-mean`.
#[cfg(target_arch = "x86_64")]
const VECTOR_PLANTS: &[Plant] = &[PLANTS[0], PLANTS[4]];

pub(crate) const PLANTS: &[Plant] = &[
    Plant {
        name: "zero-centred",
        what: "the weight is taken for one that is stored minus one, as that of every other norm is",
        cite: "https://github.com/NeuraLegion/shainet/issues/176",
    },
    Plant {
        name: "gate-before-norm",
        what: "the gate multiplies first, and the product is normed",
        cite: "https://github.com/ggml-org/llama.cpp/pull/16095",
    },
    Plant {
        name: "sigmoid-gate",
        what: "the gate is its sigmoid, as in later models of the family, not its SiLU",
        cite: "https://github.com/1bit-MONSTER/1bit-MONSTER/issues/2134",
    },
    Plant {
        name: "eps-outside-root",
        what: "eps is added after the square root",
        cite: "https://github.com/vllm-project/vllm/issues/25365",
    },
    Plant {
        name: "sum-not-mean",
        what: "eps is added to the sum of squares, as the norm of queries and keys does",
        cite: "https://github.com/ml-explore/mlx-lm/issues/1624",
    },
    Plant {
        name: "sigmoid-overflows",
        what: "the sigmoid is e^x / (1 + e^x), which is infinity over infinity for an open gate",
        cite: "https://github.com/ollama/ollama/issues/15865",
    },
    Plant {
        name: "norm-in-storage-type",
        what: "the normed row is rounded to the storage type before the gate, and the plan does not say so",
        cite: "https://github.com/huggingface/transformers/issues/46190",
    },
];

/// A problem in memory.
struct Loaded<E> {
    case: Case,
    x: Vec<E>,
    z: Vec<E>,
    weight: Vec<f32>,
    eps: f64,
    o: Vec<E>,
}

impl<E: Stored> Loaded<E> {
    fn new(spec: &Spec<Case>, x: &Inputs) -> Self {
        Loaded {
            case: spec.case.clone(),
            x: packed(&x.x),
            z: packed(&x.z),
            weight: x.weight.to_vec(),
            eps: x.eps,
            o: vec![E::NAN; x.x.len()],
        }
    }
}

impl<E: Stored> Kernel<RmsNormGated> for Loaded<E> {
    fn poison(&mut self) {
        self.o.fill(E::NAN);
    }

    fn run(&mut self, plant: Planted) {
        rms_norm_gated(&mut self.o, &self.x, &self.z, &self.weight, self.eps as f32, plant);
    }

    fn inputs(&self) -> Inputs {
        let shape = Ix2(self.case.n, self.case.v);
        Inputs {
            x: unpacked(&self.x, shape),
            z: unpacked(&self.z, shape),
            weight: self.weight.iter().copied().collect(),
            eps: self.eps,
        }
    }

    fn outputs(&self) -> Outputs {
        Outputs { o: unpacked(&self.o, Ix2(self.case.n, self.case.v)) }
    }
}

/// One row per task; everything in f32 until it is stored.
///
/// `o`, `x`, `z`: `[N, V]`; `weight`: `[V]`, as it multiplies.
pub(crate) fn rms_norm_gated<E: Stored>(
    o: &mut [E],
    x: &[E],
    z: &[E],
    weight: &[f32],
    eps: f32,
    plant: Planted,
) {
    let v = weight.len();
    let gate: fn(f32) -> f32 = match plant.0 {
        Some("sigmoid-gate") => sigmoid,
        Some("sigmoid-overflows") => |z| z * overflowing_sigmoid(z),
        _ => silu,
    };
    let scale: fn(f32, f32, f32) -> f32 = match plant.0 {
        Some("eps-outside-root") => |sum, v, eps| 1.0 / ((sum / v).sqrt() + eps),
        Some("sum-not-mean") => |sum, v, eps| (v / (sum + eps)).sqrt(),
        _ => |sum, v, eps| 1.0 / (sum / v + eps).sqrt(),
    };
    let rounded = plant.is("norm-in-storage-type");
    let one = if plant.is("zero-centred") { 1.0 } else { 0.0 };
    let gate_first = plant.is("gate-before-norm");
    o.par_chunks_mut(v).zip(x.par_chunks(v)).zip(z.par_chunks(v)).for_each(|((o, x), z)| {
        let sum = if gate_first {
            x.iter().zip(z).map(|(x, z)| (x.load() * gate(z.load())).powi(2)).sum()
        } else {
            dot(x, x)
        };
        let scale = scale(sum, v as f32, eps);
        for (((o, x), z), &w) in o.iter_mut().zip(x).zip(z).zip(weight) {
            let normed = x.load() * scale;
            let normed = if rounded { E::store(normed).load() } else { normed };
            *o = E::store(normed * (one + w) * gate(z.load()));
        }
    });
}
