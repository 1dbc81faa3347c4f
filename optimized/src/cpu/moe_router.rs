//! CPU variants of `moe_router`.

use golden::{
    Dtype, Plan, Plant, Spec, Variant,
    ops::moe_router::{Case, Inputs, MoeRouter, Outputs},
};
use ndarray::{ArcArray, Ix1, Ix2};
use rayon::prelude::*;

use super::vector::variants;
use super::{
    activation::sigmoid,
    linear::{Projection, linear},
    portable::{HONEST, Kernel, Planted, Portable, pack, packed, unpacked},
    stored::Stored,
};

pub(crate) mod fast;

/// Every CPU variant, plainest first.
#[inline(never)]
pub fn variants() -> &'static [&'static dyn Variant<MoeRouter>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<MoeRouter>] = variants!(
    [&Portable::new(
        "cpu/portable",
        pack!(Loaded),
        // Logits and weights stay in f32 whatever activations are stored in: a choice hangs on them.
        |_| Plan::F32,
        PLANTS,
    )],
    |_| Plan::F32,
    VECTOR_PLANTS
);

/// Those that the fast kernels can be told to have: `logits-in-bf16`, `renormalise-flipped`, `weights-shifted`.
#[cfg(target_arch = "x86_64")]
const VECTOR_PLANTS: &[Plant] = &[PLANTS[0], PLANTS[5], PLANTS[8]];

pub(crate) const PLANTS: &[Plant] = &[
    Plant {
        name: "logits-in-bf16",
        what: "logits are rounded to bf16 before the softmax",
        cite: "https://github.com/NVIDIA-NeMo/Automodel/issues/3233",
    },
    Plant {
        name: "logits-overwritten",
        what: "the probabilities are returned as logits",
        cite: "https://github.com/huggingface/transformers/issues/45131",
    },
    Plant {
        name: "softmax-twice",
        what: "the softmax is taken of the probabilities again",
        cite: "https://github.com/huggingface/transformers/issues/43542",
    },
    Plant {
        name: "softmax-without-maximum",
        what: "logits are exponentiated as they are",
        cite: "https://github.com/huggingface/transformers/issues/45120",
    },
    Plant {
        name: "softmax-over-chosen",
        what: "the softmax runs over the chosen experts only, whether or not weights are renormalised",
        cite: "https://github.com/huggingface/transformers/issues/45315",
    },
    Plant {
        name: "renormalise-flipped",
        what: "weights are renormalised where they should not be, and not where they should",
        cite: "https://github.com/1bit-MONSTER/1bit-MONSTER/issues/2134",
    },
    Plant {
        name: "sigmoid-for-softmax",
        what: "an expert's score is the sigmoid of its logit",
        cite: "https://github.com/huggingface/transformers/issues/45120",
    },
    Plant {
        name: "ties-to-last",
        what: "of equal logits the highest index is chosen",
        cite: "https://github.com/vllm-project/vllm/issues/48613",
    },
    Plant {
        name: "weights-shifted",
        what: "each chosen expert gets the weight of the one chosen before it",
        cite: "https://github.com/huggingface/transformers/issues/43542",
    },
    Plant {
        name: "experts-off-by-one",
        what: "ids count from one",
        cite: "https://github.com/huggingface/transformers/issues/45315",
    },
    Plant {
        name: "expert-tail-unseen",
        what: "experts past the last whole group of 16 are never chosen",
        cite: "https://github.com/huggingface/transformers/issues/40963",
    },
    Plant {
        name: "ascending-experts",
        what: "experts come in ascending order, their weights in the order of probability",
        cite: "https://github.com/vllm-project/vllm/issues/45819",
    },
];

/// A problem in memory.
struct Loaded<E> {
    case: Case,
    x: Vec<E>,
    weight: Vec<E>,
    norm_topk_prob: bool,
    ids: Vec<i64>,
    weights: Vec<f32>,
    logits: Vec<f32>,
    margins: Vec<f32>,
}

impl<E: Stored> Loaded<E> {
    fn new(spec: &Spec<Case>, x: &Inputs) -> Self {
        let Case { n, e, a, .. } = spec.case;
        Loaded {
            case: spec.case.clone(),
            x: packed(&x.x),
            weight: packed(&x.weight),
            norm_topk_prob: x.norm_topk_prob,
            ids: vec![i64::MIN; n * a],
            weights: vec![f32::NAN; n * a],
            logits: vec![f32::NAN; n * e],
            margins: vec![f32::NAN; n],
        }
    }
}

impl<E: Stored> Kernel<MoeRouter> for Loaded<E> {
    fn poison(&mut self) {
        self.ids.fill(i64::MIN);
        self.weights.fill(f32::NAN);
        self.logits.fill(f32::NAN);
        self.margins.fill(f32::NAN);
    }

    fn run(&mut self, plant: Planted) {
        let Loaded { ids, weights, logits, margins, .. } = self;
        let routed = Routed { ids, weights, logits, margins };
        let x = Projection { x: &self.x, weight: &self.weight, d: self.case.d };
        moe_router(routed, &Router { x, norm_topk_prob: self.norm_topk_prob }, plant);
    }

    fn inputs(&self) -> Inputs {
        let Case { n, d, e, a } = self.case;
        Inputs {
            x: unpacked(&self.x, Ix2(n, d)),
            weight: unpacked(&self.weight, Ix2(e, d)),
            top_k: a,
            norm_topk_prob: self.norm_topk_prob,
        }
    }

    fn outputs(&self) -> Outputs {
        let Case { n, e, a, .. } = self.case;
        Outputs {
            ids: ArcArray::from_shape_vec(Ix2(n, a), self.ids.clone()).expect("N A ids"),
            weights: unpacked(&self.weights, Ix2(n, a)),
            logits: unpacked(&self.logits, Ix2(n, e)),
            margins: unpacked(&self.margins, Ix1(n)),
        }
    }
}

/// What a router reads.
pub(crate) struct Router<'a, E> {
    /// Hidden states and `[E, D]` weight.
    pub(crate) x: Projection<'a, E, E>,
    /// Whether the chosen weights are divided by their sum.
    pub(crate) norm_topk_prob: bool,
}

/// What a router writes.
pub(crate) struct Routed<'a> {
    /// `[N, A]` experts, most probable first.
    pub(crate) ids: &'a mut [i64],
    /// `[N, A]` their weights.
    pub(crate) weights: &'a mut [f32],
    /// `[N, E]`.
    pub(crate) logits: &'a mut [f32],
    /// `[N]` logit of the last chosen expert less that of the first left out, infinite if there is
    /// none.
    pub(crate) margins: &'a mut [f32],
}

/// `logits = weight x`, the `A` largest, ties to the lowest index; `weights = softmax(logits)` of
/// these, over their sum if `norm_topk_prob`. All in f32.
pub(crate) fn moe_router<E: Stored>(routed: Routed<'_>, router: &Router<'_, E>, plant: Planted) {
    let Routed { ids, weights, logits, margins } = routed;
    let experts = router.x.weight.len() / router.x.d;
    let active = ids.len() / margins.len();
    linear(logits, &router.x, HONEST);
    if plant.is("logits-in-bf16") {
        logits.iter_mut().for_each(|l| *l = Dtype::Bf16.round(*l));
    }
    ids.par_chunks_mut(active)
        .zip(weights.par_chunks_mut(active))
        .zip(logits.par_chunks_mut(experts))
        .zip(margins)
        .for_each(|(((ids, weights), logits), margin)| {
            // One more than are chosen: the first left out.
            let largest = largest(logits, active + 1, plant);
            let (chosen, left) = largest.split_at(active.min(largest.len()));
            *margin = left
                .first()
                .map_or(f32::INFINITY, |&left| logits[chosen[active - 1]] - logits[left]);
            weigh(weights, logits, chosen, router.norm_topk_prob, plant);
            for (id, &expert) in ids.iter_mut().zip(chosen) {
                *id = expert as i64;
            }
            spoil(ids, logits, plant);
        });
}

/// Indices of the `count` largest of a row (or all), largest first, ties to the lowest index.
fn largest(row: &[f32], count: usize, plant: Planted) -> Vec<usize> {
    let seen = if plant.is("expert-tail-unseen") && 16 <= row.len() {
        row.len() / 16 * 16
    } else {
        row.len()
    };
    let last_wins = plant.is("ties-to-last");
    let mut best: Vec<usize> = Vec::with_capacity(count + 1);
    for (i, &logit) in row[..seen].iter().enumerate() {
        let at =
            best.partition_point(|&j| if last_wins { logit < row[j] } else { logit <= row[j] });
        if at < count {
            best.insert(at, i);
            best.truncate(count);
        }
    }
    best
}

/// The softmax of the chosen logits of a row, as weights.
fn weigh(weights: &mut [f32], row: &[f32], chosen: &[usize], norm_topk_prob: bool, plant: Planted) {
    let max = if plant.is("softmax-without-maximum") { 0.0 } else { row[chosen[0]] };
    let score = |logit: f32| {
        if plant.is("sigmoid-for-softmax") { sigmoid(logit) } else { (logit - max).exp() }
    };
    let over_chosen =
        plant.is("softmax-over-chosen") || norm_topk_prob != plant.is("renormalise-flipped");
    let total: f32 = if over_chosen {
        chosen.iter().map(|&j| score(row[j])).sum()
    } else {
        row.iter().map(|&logit| score(logit)).sum()
    };
    for (weight, &j) in weights.iter_mut().zip(chosen) {
        *weight = score(row[j]) / total;
    }
    match plant.0 {
        Some("softmax-twice") => {
            let total: f32 = weights.iter().map(|w| w.exp()).sum();
            weights.iter_mut().for_each(|w| *w = w.exp() / total);
        }
        Some("weights-shifted") => weights.rotate_right(1),
        _ => {}
    }
}

/// Faults in what is returned.
fn spoil(ids: &mut [i64], logits: &mut [f32], plant: Planted) {
    match plant.0 {
        Some("logits-overwritten") => {
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let total: f32 = logits.iter().map(|l| (l - max).exp()).sum();
            logits.iter_mut().for_each(|l| *l = (*l - max).exp() / total);
        }
        Some("experts-off-by-one") => ids.iter_mut().for_each(|id| *id += 1),
        Some("ascending-experts") => ids.sort_unstable(),
        _ => {}
    }
}
