//! CPU variants of `moe_experts`.

use golden::{
    Dtype, Plant, Spec, Variant,
    ops::moe_experts::{Case, Inputs, MoeExperts, Outputs},
};
use ndarray::{ArcArray, Ix2, Ix3};
use rayon::prelude::*;

use super::vector::variants;
use super::{
    linear,
    portable::{Kernel, Only, Planted, Portable, as_stored, pack, packed, unpacked},
    shared_expert::{Mlp, swiglu},
    stored::Stored,
};
use w8a8::{InCodes, W8A8_PLANTS};

pub(crate) mod fast;
mod w8a8;

/// Every CPU variant, plainest first.
#[inline(never)]
pub fn variants() -> &'static [&'static dyn Variant<MoeExperts>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<MoeExperts>] = variants!(
    // Hidden activations, expert outputs and their sum stay in f32.
    [
        &Portable::new("cpu/portable", pack!(Loaded), as_stored, PLANTS),
        &Only {
            lacks: || None,
            unfit: linear::w8a8::unfit,
            of: Portable::new("cpu/portable-w8a8", pack!(InCodes), linear::w8a8::plan, W8A8_PLANTS),
        },
    ],
    linear::fast::plan,
    VECTOR_PLANTS,
    paired: linear::fast::unpaired,
    linear::fast::paired_plan
);

/// Those that the fast kernels can be told to have: `weights-not-applied`, `gate-up-swapped`.
#[cfg(target_arch = "x86_64")]
const VECTOR_PLANTS: &[Plant] = &[PLANTS[1], PLANTS[7]];

pub(crate) const PLANTS: &[Plant] = &[
    Plant {
        name: "weight-on-input",
        what: "the routing weight multiplies what goes into the expert, not what comes out",
        cite: "https://github.com/NVIDIA-NeMo/Automodel/issues/3233",
    },
    Plant {
        name: "weights-not-applied",
        what: "expert outputs are added up as they are",
        cite: "https://github.com/huggingface/transformers/issues/43542",
    },
    Plant {
        name: "weights-unpermuted",
        what: "after the tokens are sorted by expert their weights are still in the order of the tokens",
        cite: "https://github.com/huggingface/transformers/issues/45315",
    },
    Plant {
        name: "weight-of-first-slot",
        what: "every expert of a token gets the weight of its most probable one",
        cite: "https://github.com/huggingface/transformers/issues/45131",
    },
    Plant {
        name: "renormalised-again",
        what: "weights are divided by their sum, whatever the router did",
        cite: "https://github.com/1bit-MONSTER/1bit-MONSTER/issues/2134",
    },
    Plant {
        name: "weights-in-bf16",
        what: "weights are rounded to bf16",
        cite: "https://github.com/huggingface/transformers/issues/45120",
    },
    Plant {
        name: "sum-in-bf16",
        what: "the routed sum is rounded to bf16 after every expert",
        cite: "https://github.com/huggingface/transformers/issues/46190",
    },
    Plant {
        name: "gate-up-swapped",
        what: "gate_proj and up_proj change places",
        cite: "https://github.com/NVIDIA-NeMo/Megatron-Bridge/issues/1068",
    },
    Plant {
        name: "silu-on-product",
        what: "SiLU is taken of the product of gate and up",
        cite: "https://github.com/ggml-org/llama.cpp/issues/16095",
    },
    Plant {
        name: "hidden-in-bf16",
        what: "the hidden activations are stored in bf16, whatever the plan says",
        cite: "https://github.com/huggingface/transformers/issues/46190",
    },
    Plant {
        name: "hidden-in-f16",
        what: "the hidden activations are stored in f16, whatever the plan says: an outlier's overflow",
        cite: "https://github.com/ollama/ollama/issues/15865",
    },
    Plant {
        name: "group-tail-dropped",
        what: "of the tokens of one expert those past the first tile of 64 are left out",
        cite: "https://github.com/sgl-project/sglang/issues/33515",
    },
    Plant {
        name: "empty-groups-shift",
        what: "an expert without tokens hands its weights to the next one that has some",
        cite: "https://github.com/vllm-project/vllm/issues/28202",
    },
];

/// A problem in memory.
struct Loaded<E> {
    case: Case,
    x: Vec<E>,
    ids: Vec<i64>,
    weights: Vec<f32>,
    gate_proj: Vec<E>,
    up_proj: Vec<E>,
    down_proj: Vec<E>,
    o: Vec<E>,
}

impl<E: Stored> Loaded<E> {
    fn new(spec: &Spec<Case>, x: &Inputs) -> Self {
        Loaded {
            case: spec.case.clone(),
            x: packed(&x.x),
            ids: x.ids.iter().copied().collect(),
            weights: packed(&x.weights),
            gate_proj: packed(&x.gate_proj),
            up_proj: packed(&x.up_proj),
            down_proj: packed(&x.down_proj),
            o: vec![E::NAN; x.x.len()],
        }
    }
}

impl<E: Stored> Kernel<MoeExperts> for Loaded<E> {
    fn poison(&mut self) {
        self.o.fill(E::NAN);
    }

    fn run(&mut self, plant: Planted) {
        let Loaded { case, x, ids, weights, gate_proj, up_proj, down_proj, o } = self;
        let experts = Experts { gate_proj, up_proj, down_proj, d: case.d, f: case.f };
        moe_experts(o, x, &Routes { ids, weights, active: case.a }, &experts, plant);
    }

    fn inputs(&self) -> Inputs {
        let Case { n, d, e, a, f } = self.case;
        Inputs {
            x: unpacked(&self.x, Ix2(n, d)),
            ids: ArcArray::from_shape_vec(Ix2(n, a), self.ids.clone()).expect("N A ids"),
            weights: unpacked(&self.weights, Ix2(n, a)),
            gate_proj: unpacked(&self.gate_proj, Ix3(e, f, d)),
            up_proj: unpacked(&self.up_proj, Ix3(e, f, d)),
            down_proj: unpacked(&self.down_proj, Ix3(e, d, f)),
        }
    }

    fn outputs(&self) -> Outputs {
        Outputs { o: unpacked(&self.o, Ix2(self.case.n, self.case.d)) }
    }
}

/// The weights of all experts.
pub(crate) struct Experts<'a, E> {
    /// `[E, F, D]`.
    pub(crate) gate_proj: &'a [E],
    /// `[E, F, D]`.
    pub(crate) up_proj: &'a [E],
    /// `[E, D, F]`.
    pub(crate) down_proj: &'a [E],
    /// Channels of a token.
    pub(crate) d: usize,
    /// Hidden channels of an expert.
    pub(crate) f: usize,
}

impl<'a, E> Experts<'a, E> {
    fn count(&self) -> usize {
        self.gate_proj.len() / (self.f * self.d)
    }

    fn one(&self, e: usize) -> Mlp<'a, E> {
        let range = e * self.f * self.d..(e + 1) * self.f * self.d;
        Mlp {
            gate_proj: &self.gate_proj[range.clone()],
            up_proj: &self.up_proj[range.clone()],
            down_proj: &self.down_proj[range],
            d: self.d,
        }
    }
}

/// Which experts a token goes through. A *slot* is one token's use of one expert: `token * A + a`.
pub(crate) struct Routes<'a> {
    /// `[N, A]`.
    pub(crate) ids: &'a [i64],
    /// `[N, A]`.
    pub(crate) weights: &'a [f32],
    /// `A`.
    pub(crate) active: usize,
}

/// Tokens of one expert that a planted fault still sees.
const TILE: usize = 64;

/// `o = sum_a weights_a * down_e( silu(gate_e x) * (up_e x) )`, `e = ids_a`: tokens are sorted by
/// expert, every expert runs once over all of its tokens, and the sum runs in the order of the slots.
///
/// `o`, `x`: `[N, D]`.
pub(crate) fn moe_experts<O: Stored, E: Stored>(
    o: &mut [O],
    x: &[E],
    routes: &Routes<'_>,
    experts: &Experts<'_, E>,
    plant: Planted,
) {
    let (d, active) = (experts.d, routes.active);
    let groups = Groups::new(routes.ids, experts.count());
    let weights = weights(routes, &groups, plant);
    let on_input = plant.is("weight-on-input");
    let row = |slot: usize| &x[slot / active * d..(slot / active + 1) * d];
    // [N A, D], sorted by expert.
    let mut outputs = vec![f32::NAN; routes.ids.len() * d];
    groups.split(&mut outputs, d).into_par_iter().enumerate().for_each(
        |(i, (e, slots, outputs))| {
            let e = if plant.is("empty-groups-shift") { i } else { e };
            let tokens: Vec<E> = if on_input {
                let scaled = |&slot: &usize| row(slot).iter().map(move |x| (x.load(), slot));
                slots.iter().flat_map(scaled).map(|(x, slot)| E::store(x * weights[slot])).collect()
            } else {
                slots.iter().flat_map(|&slot| row(slot)).copied().collect()
            };
            swiglu(outputs, &tokens, &experts.one(e), plant);
            if plant.is("group-tail-dropped") && TILE < slots.len() {
                outputs[TILE * d..].fill(0.0);
            }
        },
    );
    let keep: fn(f32) -> f32 =
        if plant.is("sum-in-bf16") { |sum| Dtype::Bf16.round(sum) } else { |sum| sum };
    o.par_chunks_mut(d).enumerate().for_each(|(token, o)| {
        let mut sum = vec![0.0_f32; d];
        let slots = token * active..(token + 1) * active;
        for (&weight, &place) in weights[slots.clone()].iter().zip(&groups.places[slots]) {
            let weight = if on_input { 1.0 } else { weight };
            for (sum, out) in sum.iter_mut().zip(&outputs[place * d..(place + 1) * d]) {
                *sum = keep(*sum + weight * out);
            }
        }
        for (o, sum) in o.iter_mut().zip(sum) {
            *o = O::store(sum);
        }
    });
}

/// Slots sorted by expert, ascending within one.
struct Groups {
    /// `[E + 1]` first sorted place of each expert, then `N A`.
    starts: Vec<usize>,
    /// `[N A]` the slot at each sorted place.
    slots: Vec<usize>,
    /// `[N A]` the sorted place of each slot.
    places: Vec<usize>,
}

impl Groups {
    fn new(ids: &[i64], experts: usize) -> Groups {
        let mut starts = vec![0; experts + 1];
        for &id in ids {
            starts[id as usize + 1] += 1;
        }
        for e in 0..experts {
            starts[e + 1] += starts[e];
        }
        let mut next = starts.clone();
        let (mut slots, mut places) = (vec![0; ids.len()], vec![0; ids.len()]);
        for (slot, &id) in ids.iter().enumerate() {
            let place = &mut next[id as usize];
            (slots[*place], places[slot]) = (slot, *place);
            *place += 1;
        }
        Groups { starts, slots, places }
    }

    /// Each expert that has slots, with these and with their rows of `[N A, D]`.
    fn split<'a>(
        &'a self,
        mut rows: &'a mut [f32],
        d: usize,
    ) -> Vec<(usize, &'a [usize], &'a mut [f32])> {
        let mut groups = Vec::new();
        for (e, pair) in self.starts.windows(2).enumerate() {
            let slots = &self.slots[pair[0]..pair[1]];
            let (own, rest) = rows.split_at_mut(slots.len() * d);
            rows = rest;
            if !slots.is_empty() {
                groups.push((e, slots, own));
            }
        }
        groups
    }
}

/// The weight of each slot, `[N, A]`.
fn weights(routes: &Routes<'_>, groups: &Groups, plant: Planted) -> Vec<f32> {
    let mut weights = routes.weights.to_vec();
    match plant.0 {
        Some("weights-not-applied") => weights.fill(1.0),
        Some("weights-unpermuted") => {
            weights = groups.places.iter().map(|&place| routes.weights[place]).collect();
        }
        Some("weights-in-bf16") => weights.iter_mut().for_each(|w| *w = Dtype::Bf16.round(*w)),
        _ => {}
    }
    for weights in weights.chunks_mut(routes.active) {
        if plant.is("weight-of-first-slot") {
            weights.fill(weights[0]);
        }
        if plant.is("renormalised-again") {
            let sum: f32 = weights.iter().sum();
            weights.iter_mut().for_each(|w| *w /= sum);
        }
    }
    weights
}
