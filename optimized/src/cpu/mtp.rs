//! CPU variants of `mtp`.

use golden::{
    Dtype, Plan, Plant, Spec, Variant,
    ops::mtp::{Case, Inputs, Mtp, Outputs},
    plan::Site,
};
use ndarray::Ix2;
use rayon::prelude::*;

use super::{
    portable::{Kernel, Planted, Portable, pack, packed, unpacked},
    rms_norm::rms_norm,
    stored::Stored,
    sums::dot,
};

/// Every CPU variant, plainest first.
#[inline(never)]
pub fn variants() -> &'static [&'static dyn Variant<Mtp>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<Mtp>] = &[&Portable::new(
    "cpu/portable",
    pack!(Loaded),
    |spec| Plan::stored(spec.dtype).round(Site::Norm, Plan::stored(spec.dtype).output),
    PLANTS,
)];

const PLANTS: &[Plant] = &[
    Plant {
        name: "hidden-first",
        what: "the hidden state stands before the embedding",
        cite: "https://github.com/ModelTC/LightLLM/issues/1402",
    },
    Plant {
        name: "norms-swapped",
        what: "each half takes the norm of the other",
        cite: "https://github.com/ggml-org/llama.cpp/issues/24025",
    },
    Plant {
        name: "missing-plus-one",
        what: "the norms' weights multiply as they are stored",
        cite: "https://github.com/jundot/omlx/issues/3750",
    },
    Plant {
        name: "one-added-twice",
        what: "the one that the norms' weights are short of is added by the loader and again by the norm",
        cite: "https://github.com/jundot/omlx/issues/1507",
    },
    Plant {
        name: "embedding-not-normed",
        what: "only the hidden state is normed",
        cite: "https://github.com/ROCm/ATOM/issues/1764",
    },
    Plant {
        name: "hidden-not-normed",
        what: "only the embedding is normed, as if the final norm were the same one",
        cite: "https://github.com/kekzl/imp/issues/1800",
    },
    Plant {
        name: "embedding-of-this-token",
        what: "the embedding is that of the row before: of this token, not of the next",
        cite: "https://github.com/raullenchai/Rapid-MLX/issues/3371",
    },
    Plant {
        name: "fc-in-fp8",
        what: "the projection was quantised with the rest of the checkpoint",
        cite: "https://github.com/ROCm/ATOM/issues/755",
    },
];

/// A problem in memory.
struct Loaded<E> {
    case: Case,
    embedding: Vec<E>,
    hidden: Vec<E>,
    norm_embedding: Vec<f32>,
    norm_hidden: Vec<f32>,
    fc: Vec<E>,
    eps: f64,
    /// `[N, D]` each: the halves of what `fc` reads.
    normed: [Vec<E>; 2],
    o: Vec<E>,
}

impl<E: Stored> Loaded<E> {
    fn new(spec: &Spec<Case>, x: &Inputs) -> Self {
        let n = x.hidden.len();
        Loaded {
            case: spec.case.clone(),
            embedding: packed(&x.embedding),
            hidden: packed(&x.hidden),
            norm_embedding: x.norm_embedding.to_vec(),
            norm_hidden: x.norm_hidden.to_vec(),
            fc: packed(&x.fc),
            eps: x.eps,
            normed: [vec![E::NAN; n], vec![E::NAN; n]],
            o: vec![E::NAN; n],
        }
    }
}

impl<E: Stored> Kernel<Mtp> for Loaded<E> {
    fn poison(&mut self) {
        let [embedding, hidden] = &mut self.normed;
        for x in [embedding, hidden, &mut self.o] {
            x.fill(E::NAN);
        }
    }

    fn run(&mut self, plant: Planted) {
        let mut weights = [&self.norm_embedding, &self.norm_hidden];
        if plant.is("norms-swapped") {
            weights.swap(0, 1);
        }
        let [embedding, hidden] = &mut self.normed;
        // The plant of a missing one is the norm's own.
        rms_norm(embedding, &self.embedding, weights[0], self.eps as f32, plant);
        rms_norm(hidden, &self.hidden, weights[1], self.eps as f32, plant);
        match plant.0 {
            Some("embedding-not-normed") => embedding.copy_from_slice(&self.embedding),
            Some("hidden-not-normed") => hidden.copy_from_slice(&self.hidden),
            Some("embedding-of-this-token") => embedding.rotate_right(self.case.d),
            Some("one-added-twice") => {
                let twice: [Vec<f32>; 2] =
                    weights.map(|weight| weight.iter().map(|w| 1.0 + w).collect());
                rms_norm(embedding, &self.embedding, &twice[0], self.eps as f32, plant);
                rms_norm(hidden, &self.hidden, &twice[1], self.eps as f32, plant);
            }
            Some("hidden-first") => std::mem::swap(embedding, hidden),
            Some("fc-in-fp8") => {
                let narrow: Vec<E> = self.fc.iter().map(|&w| in_fp8(w, self.case.d)).collect();
                return project(&mut self.o, embedding, hidden, &narrow, self.case.d);
            }
            _ => {}
        }
        project(&mut self.o, embedding, hidden, &self.fc, self.case.d);
    }

    fn inputs(&self) -> Inputs {
        let Case { n, d } = self.case;
        Inputs {
            embedding: unpacked(&self.embedding, Ix2(n, d)),
            hidden: unpacked(&self.hidden, Ix2(n, d)),
            norm_embedding: self.norm_embedding.iter().copied().collect(),
            norm_hidden: self.norm_hidden.iter().copied().collect(),
            fc: unpacked(&self.fc, Ix2(d, 2 * d)),
            eps: self.eps,
        }
    }

    fn outputs(&self) -> Outputs {
        Outputs { o: unpacked(&self.o, Ix2(self.case.n, self.case.d)) }
    }
}

/// `o = fc concat[embedding, hidden]`, without building the concatenation.
///
/// `o`, `embedding`, `hidden`: `[N, D]`; `fc`: `[D, 2 D]`.
fn project<E: Stored>(o: &mut [E], embedding: &[E], hidden: &[E], fc: &[E], d: usize) {
    o.par_iter_mut().enumerate().with_min_len(16).for_each(|(i, o)| {
        let token = i / d * d..(i / d + 1) * d;
        let (first, second) = fc[i % d * 2 * d..][..2 * d].split_at(d);
        *o = E::store(dot(&embedding[token.clone()], first) + dot(&hidden[token], second));
    });
}

/// A weight of `fc` as FP8 with a scale that its largest values need: a plant.
fn in_fp8<E: Stored>(weight: E, d: usize) -> E {
    // Four standard deviations of a projection of 2 D channels, at the largest code.
    let scale = 4.0 / (2.0 * d as f32).sqrt() / 448.0;
    E::store(Dtype::Fp8.round(weight.load() / scale) * scale)
}
