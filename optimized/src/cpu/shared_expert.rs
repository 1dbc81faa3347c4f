//! CPU variants of `shared_expert`.

use golden::{
    Dtype, Plant, Spec, Variant,
    ops::shared_expert::{Case, Inputs, Outputs, SharedExpert},
};
use ndarray::Ix2;
use rayon::prelude::*;

use super::vector::variants;
use super::{
    activation::{overflowing_sigmoid, sigmoid, silu},
    linear::{self, Projection, linear},
    portable::{HONEST, Kernel, Planted, Portable, as_stored, pack, packed, unpacked},
    stored::Stored,
};

pub(crate) mod fast;

/// Every CPU variant, plainest first.
#[inline(never)]
pub fn variants() -> &'static [&'static dyn Variant<SharedExpert>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<SharedExpert>] = variants!(
    [&Portable::new(
        "cpu/portable",
        pack!(Loaded),
        as_stored,
        PLANTS,
    )],
    linear::fast::plan,
    VECTOR_PLANTS,
    paired: linear::fast::unpaired,
    linear::fast::paired_plan
);

/// Those that the fast kernels can be told to have: `gate-missing`, `gate-of-first-token`, `gate-up-swapped`.
#[cfg(target_arch = "x86_64")]
const VECTOR_PLANTS: &[Plant] = &[PLANTS[0], PLANTS[4], PLANTS[6]];

pub(crate) const PLANTS: &[Plant] = &[
    Plant {
        name: "gate-missing",
        what: "the output is not gated",
        cite: "https://github.com/ROCm/ATOM/issues/755",
    },
    Plant {
        name: "gate-on-input",
        what: "the gate multiplies what goes into the expert, not what comes out",
        cite: "https://github.com/NVIDIA-NeMo/Automodel/issues/3233",
    },
    Plant {
        name: "gate-without-sigmoid",
        what: "the raw gate multiplies",
        cite: "https://github.com/ggml-org/llama.cpp/issues/16095",
    },
    Plant {
        name: "gate-silu",
        what: "the gate goes through SiLU in place of the sigmoid",
        cite: "https://github.com/ggml-org/llama.cpp/issues/16095",
    },
    Plant {
        name: "gate-of-first-token",
        what: "every token is gated as the first one is",
        cite: "https://github.com/vllm-project/vllm/issues/42960",
    },
    Plant {
        name: "gate-overflows",
        what: "the sigmoid is taken as e^x / (1 + e^x)",
        cite: "https://github.com/ollama/ollama/issues/15865",
    },
    Plant {
        name: "gate-up-swapped",
        what: "gate_proj and up_proj change places",
        cite: "https://github.com/NVIDIA-NeMo/Megatron-Bridge/issues/1068",
    },
    Plant {
        name: "sigmoid-for-silu",
        what: "the hidden gate goes through the sigmoid in place of SiLU",
        cite: "https://github.com/ggml-org/llama.cpp/issues/16095",
    },
    Plant {
        name: "hidden-in-bf16",
        what: "the hidden activations are stored in bf16, whatever the plan says",
        cite: "https://github.com/huggingface/transformers/issues/46190",
    },
];

/// A problem in memory.
struct Loaded<E> {
    case: Case,
    x: Vec<E>,
    gate_proj: Vec<E>,
    up_proj: Vec<E>,
    down_proj: Vec<E>,
    gate: Vec<E>,
    o: Vec<E>,
}

impl<E: Stored> Loaded<E> {
    fn new(spec: &Spec<Case>, x: &Inputs) -> Self {
        Loaded {
            case: spec.case.clone(),
            x: packed(&x.x),
            gate_proj: packed(&x.gate_proj),
            up_proj: packed(&x.up_proj),
            down_proj: packed(&x.down_proj),
            gate: packed(&x.gate),
            o: vec![E::NAN; x.x.len()],
        }
    }
}

impl<E: Stored> Kernel<SharedExpert> for Loaded<E> {
    fn poison(&mut self) {
        self.o.fill(E::NAN);
    }

    fn run(&mut self, plant: Planted) {
        let Loaded { case, x, gate_proj, up_proj, down_proj, gate, o } = self;
        let mlp = Mlp { gate_proj, up_proj, down_proj, d: case.d };
        shared_expert(o, x, &Shared { mlp, gate }, plant);
    }

    fn inputs(&self) -> Inputs {
        let Case { n, d, f } = self.case;
        Inputs {
            x: unpacked(&self.x, Ix2(n, d)),
            gate_proj: unpacked(&self.gate_proj, Ix2(f, d)),
            up_proj: unpacked(&self.up_proj, Ix2(f, d)),
            down_proj: unpacked(&self.down_proj, Ix2(d, f)),
            gate: unpacked(&self.gate, Ix2(1, d)),
        }
    }

    fn outputs(&self) -> Outputs {
        Outputs { o: unpacked(&self.o, Ix2(self.case.n, self.case.d)) }
    }
}

/// The weights of one expert.
#[derive(Clone, Copy)]
pub(crate) struct Mlp<'a, E> {
    /// `[F, D]`.
    pub(crate) gate_proj: &'a [E],
    /// `[F, D]`.
    pub(crate) up_proj: &'a [E],
    /// `[D, F]`.
    pub(crate) down_proj: &'a [E],
    /// Channels that go in and come out.
    pub(crate) d: usize,
}

/// The shared expert's weights.
pub(crate) struct Shared<'a, E> {
    pub(crate) mlp: Mlp<'a, E>,
    /// `[1, D]`.
    pub(crate) gate: &'a [E],
}

/// `o = sigmoid(gate x) * down( silu(gate_proj x) * (up_proj x) )`.
///
/// `o`, `x`: `[N, D]`.
pub(crate) fn shared_expert<O: Stored, E: Stored>(
    o: &mut [O],
    x: &[E],
    weights: &Shared<'_, E>,
    plant: Planted,
) {
    let Shared { mlp, gate } = weights;
    let d = mlp.d;
    let mut gates = vec![f32::NAN; x.len() / d];
    linear(&mut gates, &Projection { x, weight: gate, d }, HONEST);
    if plant.is("gate-of-first-token") {
        let first = gates[0];
        gates.fill(first);
    }
    let open: fn(f32) -> f32 = match plant.0 {
        Some("gate-missing") => |_| 1.0,
        Some("gate-without-sigmoid") => |gate| gate,
        Some("gate-silu") => silu,
        Some("gate-overflows") => overflowing_sigmoid,
        _ => sigmoid,
    };
    gates.iter_mut().for_each(|gate| *gate = open(*gate));
    let mut out = vec![f32::NAN; x.len()];
    if plant.is("gate-on-input") {
        let gated = x.iter().enumerate().map(|(i, x)| E::store(x.load() * gates[i / d]));
        swiglu(&mut out, &gated.collect::<Vec<E>>(), mlp, plant);
        gates.fill(1.0);
    } else {
        swiglu(&mut out, x, mlp, plant);
    }
    o.par_chunks_mut(d).zip(out.par_chunks(d)).zip(&gates).for_each(|((o, out), gate)| {
        for (o, out) in o.iter_mut().zip(out) {
            *o = O::store(out * gate);
        }
    });
}

/// `down( silu(gate_proj x) * (up_proj x) )`.
///
/// The hidden activations stay in f32: of an outlier they are its square, which f16 cannot hold.
/// `o`, `x`: `[N, D]`.
pub(crate) fn swiglu<E: Stored>(o: &mut [f32], x: &[E], mlp: &Mlp<'_, E>, plant: Planted) {
    let d = mlp.d;
    let f = mlp.down_proj.len() / d;
    let mut gate = vec![f32::NAN; x.len() / d * f];
    let mut up = gate.clone();
    linear(&mut gate, &Projection { x, weight: mlp.gate_proj, d }, HONEST);
    linear(&mut up, &Projection { x, weight: mlp.up_proj, d }, HONEST);
    if plant.is("gate-up-swapped") {
        std::mem::swap(&mut gate, &mut up);
    }
    let product: fn(f32, f32) -> f32 = match plant.0 {
        Some("silu-on-product") => |gate, up| silu(gate * up),
        Some("sigmoid-for-silu") => |gate, up| sigmoid(gate) * up,
        Some("hidden-in-bf16") => |gate, up| Dtype::Bf16.round(silu(gate) * up),
        Some("hidden-in-f16") => |gate, up| Dtype::F16.round(silu(gate) * up),
        _ => |gate, up| silu(gate) * up,
    };
    let hidden: Vec<f32> = gate.par_iter().zip(&up).map(|(&gate, &up)| product(gate, up)).collect();
    linear(o, &Projection { x: &hidden, weight: mlp.down_proj, d: f }, HONEST);
}
