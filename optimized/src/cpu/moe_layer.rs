//! CPU variants of `moe_layer`.

use golden::{
    Plant, Spec, Variant,
    ops::moe_layer::{Case, Inputs, MoeLayer, Outputs},
    tap::Tap,
};
use ndarray::{ArcArray, Ix1, Ix2, Ix3};
use rayon::prelude::*;

use super::{
    linear::Projection,
    moe_experts::{Experts, Routes, moe_experts},
    moe_router::{Routed, Router, moe_router},
    portable::{HONEST, Kernel, Planted, Portable, as_stored, held, pack, packed, unpacked},
    shared_expert::{Mlp, Shared, shared_expert},
    stored::Stored,
};

/// Every CPU variant, plainest first.
#[inline(never)]
pub fn variants() -> &'static [&'static dyn Variant<MoeLayer>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<MoeLayer>] = &[&Portable::new(
    "cpu/portable",
    pack!(Loaded),
    // Nothing between the hidden states and the sum of all experts is stored narrower than f32.
    as_stored,
    PLANTS,
)];

const PLANTS: &[Plant] = &[
    Plant {
        name: "shared-dropped",
        what: "the shared expert is left out",
        cite: "https://github.com/NVIDIA-NeMo/Megatron-Bridge/issues/1068",
    },
    Plant {
        name: "shared-twice",
        what: "the shared expert is added once by the experts and once by the layer",
        cite: "https://github.com/ROCm/ATOM/issues/755",
    },
    Plant {
        name: "shared-renormalised",
        what: "the shared expert counts as one more chosen expert of weight one, and all are divided by the new sum",
        cite: "https://github.com/huggingface/transformers/issues/45315",
    },
    Plant {
        name: "shared-reads-routed",
        what: "the shared expert is fed the routed sum in place of the hidden states",
        cite: "https://github.com/gittensor-ai-lab/sparkinfer/issues/987",
    },
    Plant {
        name: "shared-gate-missing",
        what: "the shared expert is not gated",
        cite: "https://github.com/ROCm/ATOM/issues/755",
    },
    Plant {
        name: "renormalise-flipped",
        what: "weights are renormalised where they should not be, and not where they should",
        cite: "https://github.com/1bit-MONSTER/1bit-MONSTER/issues/2134",
    },
    Plant {
        name: "last-expert-dropped",
        what: "the least probable of the chosen experts is left out of the sum",
        cite: "https://github.com/vllm-project/vllm/issues/28202",
    },
    Plant {
        name: "routing-of-previous-token",
        what: "a token goes through the experts of the one before it, though it returns its own",
        cite: "https://github.com/vllm-project/vllm/issues/52942",
    },
    Plant {
        name: "router-logits-in-bf16",
        what: "router logits are rounded to bf16, whatever the plan says",
        cite: "https://github.com/NVIDIA-NeMo/Automodel/issues/3233",
    },
    Plant {
        name: "experts-off-by-one",
        what: "expert e's weights are those of expert e + 1, as if the shared one stood first",
        cite: "https://github.com/huggingface/transformers/issues/45315",
    },
];

/// A problem in memory.
struct Loaded<E> {
    case: Case,
    x: Vec<E>,
    router: Vec<E>,
    gate_proj: Vec<E>,
    up_proj: Vec<E>,
    down_proj: Vec<E>,
    shared_gate_proj: Vec<E>,
    shared_up_proj: Vec<E>,
    shared_down_proj: Vec<E>,
    shared_gate: Vec<E>,
    norm_topk_prob: bool,
    scratch: Scratch,
    o: Vec<E>,
    ids: Vec<i64>,
    margins: Vec<f32>,
}

impl<E: Stored> Loaded<E> {
    fn new(spec: &Spec<Case>, x: &Inputs) -> Self {
        let Case { n, d, e, a, .. } = spec.case;
        Loaded {
            case: spec.case.clone(),
            x: packed(&x.x),
            router: packed(&x.router),
            gate_proj: packed(&x.gate_proj),
            up_proj: packed(&x.up_proj),
            down_proj: packed(&x.down_proj),
            shared_gate_proj: packed(&x.shared_gate_proj),
            shared_up_proj: packed(&x.shared_up_proj),
            shared_down_proj: packed(&x.shared_down_proj),
            shared_gate: packed(&x.shared_gate),
            norm_topk_prob: x.norm_topk_prob,
            scratch: Scratch {
                logits: vec![f32::NAN; n * e],
                weights: vec![f32::NAN; n * a],
                routed: vec![f32::NAN; n * d],
                shared: vec![f32::NAN; n * d],
            },
            o: vec![E::NAN; n * d],
            ids: vec![i64::MIN; n * a],
            margins: vec![f32::NAN; n],
        }
    }
}

impl<E: Stored> Kernel<MoeLayer> for Loaded<E> {
    fn poison(&mut self) {
        let Scratch { logits, weights, routed, shared } = &mut self.scratch;
        for scratch in [logits, weights, routed, shared, &mut self.margins] {
            scratch.fill(f32::NAN);
        }
        self.o.fill(E::NAN);
        self.ids.fill(i64::MIN);
    }

    fn run(&mut self, plant: Planted) {
        let Case { d, f, .. } = self.case;
        let layer = Layer {
            router: Router {
                x: Projection { x: &self.x, weight: &self.router, d },
                norm_topk_prob: self.norm_topk_prob,
            },
            experts: Experts {
                gate_proj: &self.gate_proj,
                up_proj: &self.up_proj,
                down_proj: &self.down_proj,
                d,
                f,
            },
            shared: Shared {
                mlp: Mlp {
                    gate_proj: &self.shared_gate_proj,
                    up_proj: &self.shared_up_proj,
                    down_proj: &self.shared_down_proj,
                    d,
                },
                gate: &self.shared_gate,
            },
        };
        let out = Out { o: &mut self.o, ids: &mut self.ids, margins: &mut self.margins };
        layer.run(out, &mut self.scratch, plant);
    }

    fn inputs(&self) -> Inputs {
        let Case { n, d, e, a, f } = self.case;
        Inputs {
            x: unpacked(&self.x, Ix2(n, d)),
            router: unpacked(&self.router, Ix2(e, d)),
            gate_proj: unpacked(&self.gate_proj, Ix3(e, f, d)),
            up_proj: unpacked(&self.up_proj, Ix3(e, f, d)),
            down_proj: unpacked(&self.down_proj, Ix3(e, d, f)),
            shared_gate_proj: unpacked(&self.shared_gate_proj, Ix2(f, d)),
            shared_up_proj: unpacked(&self.shared_up_proj, Ix2(f, d)),
            shared_down_proj: unpacked(&self.shared_down_proj, Ix2(d, f)),
            shared_gate: unpacked(&self.shared_gate, Ix2(1, d)),
            top_k: a,
            norm_topk_prob: self.norm_topk_prob,
        }
    }

    fn outputs(&self) -> Outputs {
        let Case { n, d, a, .. } = self.case;
        Outputs {
            o: unpacked(&self.o, Ix2(n, d)),
            ids: ArcArray::from_shape_vec(Ix2(n, a), self.ids.clone()).expect("N A ids"),
            weights: unpacked(&self.scratch.weights, Ix2(n, a)),
            margins: unpacked(&self.margins, Ix1(n)),
        }
    }

    fn inside(&self) -> Vec<Tap> {
        let Case { n, d, e, a, .. } = self.case;
        let s = &self.scratch;
        vec![
            held("moe_router", "logits", &s.logits, &[n, e]),
            held("moe_router", "weights", &s.weights, &[n, a]),
            held("moe_experts", "o", &s.routed, &[n, d]),
            held("shared_expert", "o", &s.shared, &[n, d]),
            held("moe_layer", "o", &self.o, &[n, d]),
        ]
    }
}

/// What the layer reads. Router and experts share their hidden states.
pub(crate) struct Layer<'a, E> {
    pub(crate) router: Router<'a, E>,
    pub(crate) experts: Experts<'a, E>,
    pub(crate) shared: Shared<'a, E>,
}

/// What the layer writes.
pub(crate) struct Out<'a, E> {
    /// `[N, D]`.
    pub(crate) o: &'a mut [E],
    /// `[N, A]`.
    pub(crate) ids: &'a mut [i64],
    /// `[N]`.
    pub(crate) margins: &'a mut [f32],
}

/// Between input and output.
pub(crate) struct Scratch {
    /// `[N, E]`.
    pub(crate) logits: Vec<f32>,
    /// `[N, A]`.
    pub(crate) weights: Vec<f32>,
    /// `[N, D]`.
    pub(crate) routed: Vec<f32>,
    /// `[N, D]`.
    pub(crate) shared: Vec<f32>,
}

impl<E: Stored> Layer<'_, E> {
    /// `o = moe_experts(x, moe_router(x)) + shared_expert(x)`.
    pub(crate) fn run(&self, out: Out<'_, E>, scratch: &mut Scratch, plant: Planted) {
        let Out { o, ids, margins } = out;
        let Scratch { logits, weights, routed, shared } = scratch;
        let active = ids.len() / margins.len();
        let x = self.router.x.x;
        moe_router(Routed { ids, weights, logits, margins }, &self.router, inside(plant));
        let (mut used, mut shares) = (ids.to_vec(), weights.clone());
        match plant.0 {
            Some("last-expert-dropped") if 1 < active => {
                shares.iter_mut().skip(active - 1).step_by(active).for_each(|w| *w = 0.0);
            }
            Some("routing-of-previous-token") => {
                used.copy_within(..ids.len() - active, active);
            }
            Some("experts-off-by-one") => {
                let experts = logits.len() / margins.len();
                used.iter_mut().for_each(|id| *id = (*id + 1) % experts as i64);
            }
            _ => {}
        }
        let routes = Routes { ids: &used, weights: &shares, active };
        moe_experts(routed, x, &routes, &self.experts, HONEST);
        let fed: Vec<E>;
        let x = if plant.is("shared-reads-routed") {
            fed = routed.iter().map(|&x| E::store(x)).collect();
            &fed
        } else {
            x
        };
        shared_expert(shared, x, &self.shared, inside(plant));
        let share = match plant.0 {
            Some("shared-dropped") => 0.0,
            Some("shared-twice") => 2.0,
            _ => 1.0,
        };
        let sum = if plant.is("shared-renormalised") { 2.0 } else { 1.0 };
        o.par_iter_mut()
            .zip(routed)
            .zip(shared)
            .with_min_len(4096)
            .for_each(|((o, routed), shared)| *o = E::store((*routed + *shared * share) / sum));
    }
}

/// The fault of a part that a plant of the layer stands for.
fn inside(plant: Planted) -> Planted {
    Planted(match plant.0 {
        Some("shared-gate-missing") => Some("gate-missing"),
        Some("renormalise-flipped") => Some("renormalise-flipped"),
        Some("router-logits-in-bf16") => Some("logits-in-bf16"),
        _ => None,
    })
}
