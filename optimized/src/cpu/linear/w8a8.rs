//! Products of activations in FP8 with weights in FP8: `golden::plan::Activations::Fp8`, plainly.

use golden::{
    Narrow, Plan, Plant, Spec, fp8,
    narrow::{FP8_BLOCK, fp8_code, fp8_scales},
    ops::linear::{Case, Inputs, Linear, Outputs},
};
use rayon::prelude::*;

use super::{Loaded, PLANTS, dots};
use crate::cpu::{
    portable::{Kernel, Planted, as_stored},
    stored::Stored,
};

/// What all W8A8 variants can be told to have: what is wrong with scales.
pub(crate) const SCALES: [Plant; 4] = [
    Plant {
        name: "scale-of-next-group",
        what: "a group of activations is scaled as the next one",
        cite: "https://github.com/mlc-ai/TIRx-kernels/pull/5",
    },
    Plant {
        name: "activation-scale-forgotten",
        what: "sums of products of codes are not multiplied by the scale of activations",
        cite: "https://github.com/pytorch/FBGEMM/issues/6159",
    },
    Plant {
        name: "scaled-at-the-end",
        what: "products of codes are summed over all columns and scaled once, as the last group",
        cite: "https://github.com/vllm-project/vllm/pull/46593",
    },
    Plant {
        name: "largest-of-a-quarter",
        what: "the largest of a group is looked for in its first 32 columns, so that others saturate",
        cite: "https://github.com/AMD-AGI/Primus-Turbo/pull/306",
    },
];

pub(super) const W8A8_PLANTS: &[Plant] = {
    let [next, forgotten, end, quarter] = SCALES;
    &[next, forgotten, end, quarter, PLANTS[3], PLANTS[5]]
};

/// The plan of what reads both in FP8, and stores as a problem does.
pub(crate) fn plan<C: golden::Case>(spec: &Spec<C>) -> Plan {
    as_stored(spec).w8a8()
}

/// Why it does not compute a problem, if so.
pub(crate) fn unfit<C: golden::Case>(spec: &Spec<C>) -> Option<String> {
    (spec.weights != Some(Narrow::Fp8)).then(|| "is for weights in FP8".to_owned())
}

/// Rows of `d` columns in codes, as their values, and a scale for 128 of them: of each row, or of weights of
/// 128 rows.
pub(crate) struct Codes {
    values: Vec<f32>,
    scales: Vec<f32>,
    rows: usize,
    d: usize,
}

impl Codes {
    /// Of activations: the largest of a group is 448.
    pub(crate) fn activations(x: impl Iterator<Item = f32>, d: usize, plant: Planted) -> Codes {
        let counted = if plant.is("largest-of-a-quarter") { FP8_BLOCK / 4 } else { FP8_BLOCK };
        let (mut values, mut scales): (Vec<f32>, Vec<f32>) = (x.collect(), Vec::new());
        for group in values.chunks_mut(d).flat_map(|row| row.chunks_mut(FP8_BLOCK)) {
            let looked_at = group.iter().take(counted);
            let scale = looked_at.fold(0.0_f32, |most, x| most.max(x.abs())) / 448.0;
            // Of zeros they are zeros.
            let by = scale.max(1e-12);
            group.iter_mut().for_each(|x| *x = fp8::to_f32(fp8::from_f32(*x / by)));
            scales.push(scale);
        }
        Codes { values, scales, rows: 1, d }
    }

    /// Of weights that are such numbers already.
    pub(crate) fn weights(w: &[f32], d: usize) -> Codes {
        let mut scales = Vec::new();
        let mut values = Vec::with_capacity(w.len());
        for rows in w.chunks(FP8_BLOCK * d) {
            let own = fp8_scales(rows, d);
            let code = |(i, &w): (usize, &f32)| fp8::to_f32(fp8_code(w, own[i % d / FP8_BLOCK]));
            values.extend(rows.iter().enumerate().map(code));
            scales.extend(own);
        }
        Codes { values, scales, rows: FP8_BLOCK, d }
    }

    /// How many rows.
    pub(crate) fn len(&self) -> usize {
        self.values.len() / self.d
    }

    /// A row, group by group, and the scales of these.
    fn row(&self, i: usize) -> (impl Iterator<Item = &[f32]>, &[f32]) {
        let groups = self.d.div_ceil(FP8_BLOCK);
        let row = self.values[i * self.d..(i + 1) * self.d].chunks(FP8_BLOCK);
        (row, &self.scales[i / self.rows * groups..][..groups])
    }

    /// The product of one row of activations with one of weights.
    pub(crate) fn product(&self, n: usize, weights: &Codes, m: usize, plant: Planted) -> f32 {
        let ((x, x_scales), (w, w_scales)) = (self.row(n), weights.row(m));
        let last = x_scales.len() - 1;
        let scale = |g: usize| match plant.0 {
            Some("scale-of-next-group") => x_scales[if g < last { g + 1 } else { last.max(1) - 1 }],
            Some("activation-scale-forgotten") => 1.0,
            _ => x_scales[g],
        };
        let sums = x.zip(w).map(|(x, w)| {
            let [sum] = dots([x], w);
            sum
        });
        if plant.is("scaled-at-the-end") {
            return sums.sum::<f32>() * (x_scales[last] * w_scales[last]);
        }
        sums.enumerate().fold(0.0, |all, (g, sum)| all + sum * (scale(g) * w_scales[g]))
    }
}

/// A problem in memory, and its weights in codes.
pub(super) struct InCodes<E> {
    of: Loaded<E>,
    weight: Codes,
}

impl<E: Stored> InCodes<E> {
    pub(super) fn new(spec: &Spec<Case>, x: &Inputs) -> Self {
        let of = Loaded::new(spec, x);
        let weight: Vec<f32> = x.weight.iter().copied().collect();
        InCodes { of, weight: Codes::weights(&weight, spec.case.d) }
    }
}

impl<E: Stored> Kernel<Linear> for InCodes<E> {
    fn poison(&mut self) {
        self.of.poison();
    }

    fn run(&mut self, plant: Planted) {
        let InCodes { of: Loaded { case, x, o, .. }, weight } = self;
        let x = Codes::activations(x.iter().map(|x| x.load()), case.d, plant);
        let (last_n, last_m) = (x.len() - 1, weight.len() - 1);
        let before =
            |i: usize, last, plant: bool| if plant && i == last { i.max(1) - 1 } else { i };
        let (stale, shifted) = (plant.is("last-token-stale"), plant.is("last-row-shifted"));
        o.par_chunks_mut(case.m).enumerate().for_each(|(n, o)| {
            let n = before(n, last_n, stale);
            for (m, o) in o.iter_mut().enumerate() {
                *o = E::store(x.product(n, weight, before(m, last_m, shifted), plant));
            }
        });
    }

    fn inputs(&self) -> Inputs {
        self.of.inputs()
    }

    fn outputs(&self) -> Outputs {
        self.of.outputs()
    }
}
