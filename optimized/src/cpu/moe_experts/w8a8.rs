//! Routed experts over weights and activations in FP8, hidden ones too: plainly, token by token.

use golden::{
    Plant, Spec, Tensor3,
    ops::moe_experts::{Case, Inputs, MoeExperts, Outputs},
};
use ndarray::Axis;
use rayon::prelude::*;

use super::{Loaded, PLANTS};
use crate::cpu::{
    activation::silu,
    linear::w8a8::{Codes, SCALES},
    portable::{Kernel, Planted},
    stored::Stored,
};

pub(super) const W8A8_PLANTS: &[Plant] = {
    let [next, forgotten, end, quarter] = SCALES;
    &[next, forgotten, end, quarter, PLANTS[1], PLANTS[3], PLANTS[7], PLANTS[8]]
};

/// The weights of one expert.
struct Expert {
    gate: Codes,
    up: Codes,
    down: Codes,
}

/// A problem in memory, and its weights in codes.
pub(super) struct InCodes<E> {
    of: Loaded<E>,
    experts: Vec<Expert>,
}

impl<E: Stored> InCodes<E> {
    pub(super) fn new(spec: &Spec<Case>, x: &Inputs) -> Self {
        let of = Loaded::new(spec, x);
        let Case { d, f, .. } = spec.case;
        let codes = |w: &Tensor3<f32>, e: usize, d: usize| {
            Codes::weights(&w.index_axis(Axis(0), e).iter().copied().collect::<Vec<_>>(), d)
        };
        let expert = |e| Expert {
            gate: codes(&x.gate_proj, e, d),
            up: codes(&x.up_proj, e, d),
            down: codes(&x.down_proj, e, f),
        };
        let experts = (0..spec.case.e).map(expert).collect();
        InCodes { of, experts }
    }
}

impl Expert {
    /// `down( silu(gate x) * (up x) )` of row `n`.
    fn run(&self, x: &Codes, n: usize, plant: Planted) -> Vec<f32> {
        let hidden = (0..self.gate.len()).map(|f| {
            let gate = x.product(n, &self.gate, f, plant);
            let up = x.product(n, &self.up, f, plant);
            match plant.0 {
                Some("gate-up-swapped") => silu(up) * gate,
                Some("silu-on-product") => silu(gate * up),
                _ => silu(gate) * up,
            }
        });
        let hidden = Codes::activations(hidden, self.gate.len(), plant);
        (0..self.down.len()).map(|d| hidden.product(0, &self.down, d, plant)).collect()
    }
}

impl<E: Stored> Kernel<MoeExperts> for InCodes<E> {
    fn poison(&mut self) {
        self.of.poison();
    }

    fn run(&mut self, plant: Planted) {
        let InCodes { of: Loaded { case, x, ids, weights, o, .. }, experts } = self;
        let codes = Codes::activations(x.iter().map(|x| x.load()), case.d, plant);
        let slots = ids.chunks(case.a).zip(weights.chunks(case.a));
        o.par_chunks_mut(case.d).zip(slots.collect::<Vec<_>>()).enumerate().for_each(
            |(n, (o, (ids, weights)))| {
                let mut sum = vec![0.0_f32; case.d];
                for (&e, &weight) in ids.iter().zip(weights) {
                    let weight = match plant.0 {
                        Some("weights-not-applied") => 1.0,
                        Some("weight-of-first-slot") => weights[0],
                        _ => weight,
                    };
                    let out = experts[e as usize].run(&codes, n, plant);
                    for (sum, out) in sum.iter_mut().zip(out) {
                        *sum += weight * out;
                    }
                }
                for (o, sum) in o.iter_mut().zip(sum) {
                    *o = E::store(sum);
                }
            },
        );
    }

    fn inputs(&self) -> Inputs {
        self.of.inputs()
    }

    fn outputs(&self) -> Outputs {
        self.of.outputs()
    }
}
