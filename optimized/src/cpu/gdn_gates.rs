//! CPU variants of `gdn_gates`.

use golden::{
    Dtype, Plan, Plant, Spec, Variant,
    ops::gdn_gates::{Case, GdnGates, Inputs, Outputs},
};
use ndarray::Ix2;
use rayon::prelude::*;

use super::vector::variants;
use super::{
    activation::sigmoid,
    portable::{Kernel, Planted, Portable, pack, packed, unpacked},
    stored::Stored,
};

pub(crate) mod fast;

/// Every CPU variant, plainest first.
#[inline(never)]
pub fn variants() -> &'static [&'static dyn Variant<GdnGates>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<GdnGates>] = variants!(
    [&Portable::new(
        "cpu/portable",
        pack!(Loaded),
        // Gates are kept in f32, whatever the projections are stored in.
        |_| Plan::F32,
        PLANTS,
    )],
    |_| Plan::F32,
    VECTOR_PLANTS
);

/// Those that the fast kernels can be told to have: `exp-missing`, `a-b-swapped`, `heads-rotated`.
#[cfg(target_arch = "x86_64")]
const VECTOR_PLANTS: &[Plant] = &[PLANTS[7], PLANTS[8], PLANTS[9]];

pub(crate) const PLANTS: &[Plant] = &[
    Plant {
        name: "log-one-plus-exp",
        what: "softplus is log(1 + e^x), which is zero below -17",
        cite: "https://github.com/ml-explore/mlx-lm/issues/997",
    },
    Plant {
        name: "softplus-overflows",
        what: "softplus lacks its linear part: e^x is infinite above 88",
        cite: "https://github.com/ggml-org/llama.cpp/issues/19324",
    },
    Plant {
        name: "beta-in-bf16",
        what: "the write strength is rounded to bf16",
        cite: "https://github.com/sgl-project/sglang/issues/38975",
    },
    Plant {
        name: "g-in-bf16",
        what: "the log decay is rounded to bf16",
        cite: "https://github.com/ml-explore/mlx-swift-lm/issues/317",
    },
    Plant {
        name: "rate-in-bf16",
        what: "a_log is rounded to bf16 before its exponential",
        cite: "https://github.com/sgl-project/sglang/issues/20741",
    },
    Plant {
        name: "dt-bias-in-bf16",
        what: "dt_bias is rounded to bf16",
        cite: "https://github.com/NVIDIA-NeMo/Automodel/issues/2484",
    },
    Plant {
        name: "dt-bias-after-softplus",
        what: "dt_bias is added to the softplus instead of to what it is taken of",
        cite: "https://github.com/huggingface/transformers/issues/47831",
    },
    Plant {
        name: "exp-missing",
        what: "a_log is taken for the rate itself",
        cite: "https://github.com/huggingface/transformers/issues/47625",
    },
    Plant {
        name: "a-b-swapped",
        what: "the two projections change places",
        cite: "https://github.com/vllm-project/vllm/issues/36242",
    },
    Plant {
        name: "heads-rotated",
        what: "each head takes the rate of the next",
        cite: "https://github.com/vllm-project/vllm/issues/35504",
    },
];

/// A problem in memory.
struct Loaded<E> {
    case: Case,
    a: Vec<E>,
    b: Vec<E>,
    a_log: Vec<f32>,
    dt_bias: Vec<f32>,
    /// `[HV]`, `-exp(a_log)`.
    rates: Vec<f32>,
    g: Vec<f32>,
    beta: Vec<f32>,
}

impl<E: Stored> Loaded<E> {
    fn new(spec: &Spec<Case>, x: &Inputs) -> Self {
        let case = spec.case.clone();
        let elements = case.n * case.hv;
        Loaded {
            a: packed(&x.a),
            b: packed(&x.b),
            a_log: x.a_log.to_vec(),
            dt_bias: x.dt_bias.to_vec(),
            rates: vec![f32::NAN; case.hv],
            g: vec![f32::NAN; elements],
            beta: vec![f32::NAN; elements],
            case,
        }
    }
}

impl<E: Stored> Kernel<GdnGates> for Loaded<E> {
    fn poison(&mut self) {
        for x in [&mut self.rates, &mut self.g, &mut self.beta] {
            x.fill(f32::NAN);
        }
    }

    fn run(&mut self, plant: Planted) {
        rates(&mut self.rates, &self.a_log, plant);
        let (mut a, mut b) = (&self.a, &self.b);
        if plant.is("a-b-swapped") {
            std::mem::swap(&mut a, &mut b);
        }
        log_decay(&mut self.g, a, &self.rates, &self.dt_bias, plant);
        write_strength(&mut self.beta, b, plant);
    }

    fn inputs(&self) -> Inputs {
        let shape = Ix2(self.case.n, self.case.hv);
        Inputs {
            a: unpacked(&self.a, shape),
            b: unpacked(&self.b, shape),
            a_log: self.a_log.iter().copied().collect(),
            dt_bias: self.dt_bias.iter().copied().collect(),
        }
    }

    fn outputs(&self) -> Outputs {
        let shape = Ix2(self.case.n, self.case.hv);
        Outputs { g: unpacked(&self.g, shape), beta: unpacked(&self.beta, shape) }
    }
}

/// `rates = -exp(a_log)`, both `[HV]`.
pub(crate) fn rates(rates: &mut [f32], a_log: &[f32], plant: Planted) {
    let rate: fn(f32) -> f32 = match plant.0 {
        Some("rate-in-bf16") => |a_log| Dtype::Bf16.round(a_log).exp(),
        Some("exp-missing") => |a_log| a_log,
        _ => f32::exp,
    };
    for (to, &a_log) in rates.iter_mut().zip(a_log) {
        *to = -rate(a_log);
    }
    if plant.is("heads-rotated") {
        rates.rotate_left(1);
    }
}

/// `g = rates * softplus(a + dt_bias)`, one token per task.
///
/// `g`, `a`: `[N, HV]`; `rates`, `dt_bias`: `[HV]`.
pub(crate) fn log_decay<E: Stored>(
    g: &mut [f32],
    a: &[E],
    rates: &[f32],
    dt_bias: &[f32],
    plant: Planted,
) {
    let time: fn(f32, f32) -> f32 = match plant.0 {
        Some("log-one-plus-exp") => {
            |a, bias| if a + bias > 20.0 { a + bias } else { (1.0 + (a + bias).exp()).ln() }
        }
        Some("softplus-overflows") => |a, bias| (a + bias).exp().ln_1p(),
        Some("dt-bias-in-bf16") => |a, bias| softplus(a + Dtype::Bf16.round(bias)),
        Some("dt-bias-after-softplus") => |a, bias| softplus(a) + bias,
        _ => |a, bias| softplus(a + bias),
    };
    let narrow = plant.is("g-in-bf16");
    let hv = rates.len();
    g.par_chunks_mut(hv).zip(a.par_chunks(hv)).for_each(|(g, a)| {
        for (((g, a), rate), &bias) in g.iter_mut().zip(a).zip(rates).zip(dt_bias) {
            let exact = rate * time(a.load(), bias);
            *g = if narrow { Dtype::Bf16.round(exact) } else { exact };
        }
    });
}

/// `beta = sigmoid(b)`, both `[N, HV]`.
pub(crate) fn write_strength<E: Stored>(beta: &mut [f32], b: &[E], plant: Planted) {
    let narrow = plant.is("beta-in-bf16");
    beta.par_iter_mut().zip(b).with_min_len(1024).for_each(|(beta, b)| {
        let exact = sigmoid(b.load());
        *beta = if narrow { Dtype::Bf16.round(exact) } else { exact };
    });
}

/// `ln(1 + e^x)`; `x` itself above 20, as torch has it.
fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}
