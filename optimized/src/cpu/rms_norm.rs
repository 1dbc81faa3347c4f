//! CPU variants of `rms_norm`.

use golden::{
    Plan, Plant, Spec, Variant,
    ops::rms_norm::{Case, Inputs, Outputs, RmsNorm},
    plan::Site,
};
use ndarray::Ix2;
use rayon::prelude::*;

use super::vector::variants;
use super::{
    portable::{Kernel, Planted, Portable, pack, packed, unpacked},
    stored::Stored,
};

pub(crate) mod fast;

/// Every CPU variant, plainest first.
#[inline(never)]
pub fn variants() -> &'static [&'static dyn Variant<RmsNorm>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<RmsNorm>] =
    variants!([&Portable::new("cpu/portable", pack!(Loaded), plan, PLANTS)], plan, VECTOR_PLANTS);

/// The sum is stored before it is normed.
pub(crate) fn plan(spec: &Spec<Case>) -> Plan {
    let plan = Plan::stored(spec.dtype);
    let output = plan.output;
    plan.round(Site::Residual, output)
}

/// Those that the fast kernels can be told to have.
#[cfg(target_arch = "x86_64")]
const VECTOR_PLANTS: &[Plant] = &[PLANTS[0], PLANTS[3]];

pub(crate) const PLANTS: &[Plant] = &[
    Plant {
        name: "missing-plus-one",
        what: "the weight multiplies as it is stored, without the one it is short of",
        cite: "https://github.com/kekzl/imp/issues/1289",
    },
    Plant {
        name: "eps-outside-root",
        what: "eps is added after the square root",
        cite: "https://github.com/vllm-project/vllm/issues/25365",
    },
    Plant {
        name: "one-plus-weight-in-bf16",
        what: "1 + weight is rounded to bf16 first, so that small weights vanish",
        cite: "https://github.com/InternLM/lmdeploy/issues/4790",
    },
    Plant {
        name: "residual-not-returned",
        what: "the sum is normed, but the residual stream keeps its old value",
        cite: "https://github.com/gittensor-ai-lab/sparkinfer/issues/987",
    },
];

/// A problem in memory.
struct Loaded<E> {
    case: Case,
    x: Vec<E>,
    residual: Option<Vec<E>>,
    weight: Vec<f32>,
    eps: f64,
    o: Vec<E>,
    h: Option<Vec<E>>,
}

impl<E: Stored> Loaded<E> {
    fn new(spec: &Spec<Case>, x: &Inputs) -> Self {
        let n = x.x.len();
        Loaded {
            case: spec.case.clone(),
            x: packed(&x.x),
            residual: x.residual.as_ref().map(packed),
            weight: x.weight.to_vec(),
            eps: x.eps,
            o: vec![E::NAN; n],
            h: x.residual.as_ref().map(|_| vec![E::NAN; n]),
        }
    }
}

impl<E: Stored> Kernel<RmsNorm> for Loaded<E> {
    fn poison(&mut self) {
        self.o.fill(E::NAN);
        if let Some(h) = &mut self.h {
            h.fill(E::NAN);
        }
    }

    fn run(&mut self, plant: Planted) {
        let eps = self.eps as f32;
        match (&self.residual, &mut self.h) {
            (Some(residual), Some(h)) => {
                for ((h, &x), &r) in h.iter_mut().zip(&self.x).zip(residual) {
                    *h = E::store(x.load() + r.load());
                }
                rms_norm(&mut self.o, h, &self.weight, eps, plant);
                if plant.is("residual-not-returned") {
                    h.copy_from_slice(&self.x);
                }
            }
            _ => rms_norm(&mut self.o, &self.x, &self.weight, eps, plant),
        }
    }

    fn inputs(&self) -> Inputs {
        let shape = Ix2(self.case.n, self.case.d);
        Inputs {
            x: unpacked(&self.x, shape),
            residual: self.residual.as_ref().map(|r| unpacked(r, shape)),
            weight: self.weight.iter().copied().collect(),
            eps: self.eps,
        }
    }

    fn outputs(&self) -> Outputs {
        let shape = Ix2(self.case.n, self.case.d);
        Outputs { o: unpacked(&self.o, shape), h: self.h.as_ref().map(|h| unpacked(h, shape)) }
    }
}

/// One row per task.
///
/// `o`, `x`: `[N, D]`; `weight`: `[D]`, zero-centred.
pub(crate) fn rms_norm<E: Stored>(o: &mut [E], x: &[E], weight: &[f32], eps: f32, plant: Planted) {
    let d = weight.len();
    let one = if plant.is("missing-plus-one") { 0.0 } else { 1.0 };
    let rounded = plant.is("one-plus-weight-in-bf16");
    let outside = plant.is("eps-outside-root");
    o.par_chunks_mut(d).zip(x.par_chunks(d)).for_each(|(o, x)| {
        let mean = x.iter().map(|x| x.load() * x.load()).sum::<f32>() / d as f32;
        let scale = if outside { 1.0 / (mean.sqrt() + eps) } else { 1.0 / (mean + eps).sqrt() };
        for ((o, x), &w) in o.iter_mut().zip(x).zip(weight) {
            let gain = if rounded { golden::Dtype::Bf16.round(one + w) } else { one + w };
            *o = E::store(x.load() * scale * gain);
        }
    });
}
