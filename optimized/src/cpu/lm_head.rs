//! CPU variants of `lm_head`.

use golden::{
    Dtype, Plan, Plant, Spec, Variant,
    ops::lm_head::{Case, Inputs, LmHead, Outputs},
};
use ndarray::Ix2;

use super::vector::variants;
use super::{
    linear::{self, Projection},
    portable::{Kernel, Planted, Portable, pack, packed, unpacked},
    stored::Stored,
};

pub(crate) mod fast;

/// Every CPU variant, plainest first.
#[inline(never)]
pub fn variants() -> &'static [&'static dyn Variant<LmHead>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<LmHead>] = variants!(
    [&Portable::new(
        "cpu/portable",
        pack!(Loaded),
        // Logits stay in f32 whatever activations and weights are stored in.
        |_| Plan::F32,
        PLANTS,
    )],
    |_| Plan::F32,
    VECTOR_PLANTS,
    paired: linear::fast::unpaired,
    |spec| Plan { output: Plan::F32.output, ..linear::fast::paired_plan(spec) }
);

/// Those that the fast kernels can be told to have: `logits-in-bf16`, `vocabulary-tail-zero`, `shard-shifted`.
#[cfg(target_arch = "x86_64")]
const VECTOR_PLANTS: &[Plant] = &[PLANTS[0], PLANTS[2], PLANTS[3]];

pub(crate) const PLANTS: &[Plant] = &[
    Plant {
        name: "logits-in-bf16",
        what: "logits pass through bf16, whose steps near 16 are 0.125",
        cite: "https://github.com/sgl-project/sglang/issues/13708",
    },
    Plant {
        name: "ragged-tail-dropped",
        what: "input channels past the last whole vector are not summed",
        cite: "https://github.com/huggingface/transformers/issues/40963",
    },
    Plant {
        name: "vocabulary-tail-zero",
        what: "logits past the last whole group of 32 tokens of the vocabulary are zero",
        cite: "https://github.com/vllm-project/vllm/issues/28182",
    },
    Plant {
        name: "shard-shifted",
        what: "the second half of the vocabulary starts one row early",
        cite: "https://github.com/vllm-project/vllm/issues/35504",
    },
    Plant {
        name: "last-token-stale",
        what: "the last token's activations are those of the token before it",
        cite: "https://github.com/vllm-project/vllm/issues/28202",
    },
    Plant {
        name: "activations-in-bf16",
        what: "activations are rounded to bf16 on their way into the product, whatever they are stored in",
        cite: "https://github.com/vllm-project/vllm/issues/42960",
    },
];

/// A problem in memory.
struct Loaded<E> {
    case: Case,
    x: Vec<E>,
    weight: Vec<E>,
    logits: Vec<f32>,
}

impl<E: Stored> Loaded<E> {
    fn new(spec: &Spec<Case>, x: &Inputs) -> Self {
        let case = spec.case.clone();
        let logits = vec![f32::NAN; case.n * case.m];
        Loaded { case, x: packed(&x.x), weight: packed(&x.weight), logits }
    }
}

impl<E: Stored> Kernel<LmHead> for Loaded<E> {
    fn poison(&mut self) {
        self.logits.fill(f32::NAN);
    }

    fn run(&mut self, plant: Planted) {
        let Case { m, d, .. } = self.case;
        linear::linear(
            &mut self.logits,
            &Projection { x: &self.x, weight: &self.weight, d },
            plant,
        );
        spoil(&mut self.logits, m, plant);
    }

    fn inputs(&self) -> Inputs {
        let Case { n, m, d } = self.case;
        Inputs { x: unpacked(&self.x, Ix2(n, d)), weight: unpacked(&self.weight, Ix2(m, d)) }
    }

    fn outputs(&self) -> Outputs {
        Outputs { logits: unpacked(&self.logits, Ix2(self.case.n, self.case.m)) }
    }
}

/// Faults in what is returned. `logits`: `[N, M]`.
fn spoil(logits: &mut [f32], m: usize, plant: Planted) {
    for logits in logits.chunks_mut(m) {
        match plant.0 {
            Some("logits-in-bf16") => logits.iter_mut().for_each(|x| *x = Dtype::Bf16.round(*x)),
            Some("vocabulary-tail-zero") => logits[m - m % 32..].fill(0.0),
            Some("shard-shifted") if 1 < m => logits.copy_within(m / 2 - 1..m - 1, m / 2),
            _ => {}
        }
    }
}
