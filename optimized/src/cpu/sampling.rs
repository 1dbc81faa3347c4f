//! CPU variants of `sampling`.

use std::cmp::Ordering;

use golden::{
    Plan, Plant, Spec, Variant,
    ops::sampling::{Case, Inputs, Outputs, Sampling},
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
pub fn variants() -> &'static [&'static dyn Variant<Sampling>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<Sampling>] = variants!(
    [&Portable::new("cpu/portable", pack!(Loaded), |_| Plan::F32, PLANTS)],
    |_| Plan::F32,
    VECTOR_PLANTS
);

/// Those that the fast kernels can be told to have: `temperature-multiplied`, `top-k-one-more`.
#[cfg(target_arch = "x86_64")]
const VECTOR_PLANTS: &[Plant] = &[PLANTS[1], PLANTS[2]];

pub(crate) const PLANTS: &[Plant] = &[
    Plant {
        name: "ties-to-the-last",
        what: "of equal logits the highest id wins",
        cite: "https://github.com/vllm-project/vllm/issues/42960",
    },
    Plant {
        name: "temperature-multiplied",
        what: "logits are multiplied by the temperature",
        cite: "https://github.com/sgl-project/sglang/issues/27869",
    },
    Plant {
        name: "top-k-one-more",
        what: "one token more than top_k is kept",
        cite: "https://github.com/vllm-project/vllm/issues/48613",
    },
    Plant {
        name: "top-p-one-less",
        what: "the token with which top_p is reached is left out",
        cite: "https://github.com/vllm-project/vllm/issues/48613",
    },
    Plant {
        name: "top-p-one-more",
        what: "the token after the one with which top_p is reached is kept",
        cite: "https://github.com/vllm-project/vllm/issues/48613",
    },
    Plant {
        name: "top-p-of-all",
        what: "top_p is measured against all tokens in place of those that top_k kept",
        cite: "https://github.com/sgl-project/sglang/issues/27869",
    },
    Plant {
        name: "not-renormalised",
        what: "the draw is measured against what there was before top_p cut",
        cite: "https://github.com/sgl-project/sglang/issues/27869",
    },
    Plant {
        name: "temperature-after-truncation",
        what: "top_p looks at probabilities of temperature 1",
        cite: "https://github.com/vllm-project/vllm/issues/45819",
    },
];

/// A problem in memory.
struct Loaded<E> {
    case: Case,
    logits: Vec<E>,
    uniform: Vec<f32>,
    temperature: f64,
    top_k: usize,
    top_p: f64,
    ids: Vec<i64>,
}

impl<E: Stored> Loaded<E> {
    fn new(spec: &Spec<Case>, x: &Inputs) -> Self {
        Loaded {
            case: spec.case.clone(),
            logits: packed(&x.logits),
            uniform: x.uniform.to_vec(),
            temperature: x.temperature,
            top_k: x.top_k,
            top_p: x.top_p,
            ids: vec![i64::MIN; spec.case.n],
        }
    }
}

impl<E: Stored> Kernel<Sampling> for Loaded<E> {
    fn poison(&mut self) {
        self.ids.fill(i64::MIN);
    }

    fn run(&mut self, plant: Planted) {
        let how = How {
            temperature: self.temperature as f32,
            top_k: self.top_k,
            top_p: self.top_p as f32,
        };
        sampling(&mut self.ids, &self.logits, &self.uniform, &how, plant);
    }

    fn inputs(&self) -> Inputs {
        Inputs {
            logits: unpacked(&self.logits, Ix2(self.case.n, self.case.m)),
            uniform: self.uniform.iter().copied().collect(),
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
        }
    }

    fn outputs(&self) -> Outputs {
        Outputs { ids: self.ids.iter().copied().collect() }
    }
}

/// How a token is chosen.
#[derive(Clone, Copy)]
pub(crate) struct How {
    /// 0 is greedy.
    pub(crate) temperature: f32,
    /// 0 keeps all.
    pub(crate) top_k: usize,
    /// 1 keeps all.
    pub(crate) top_p: f32,
}

/// One row per task.
///
/// `ids`, `uniform`: `[N]`; `logits`: `[N, M]`.
pub(crate) fn sampling<E: Stored>(
    ids: &mut [i64],
    logits: &[E],
    uniform: &[f32],
    how: &How,
    plant: Planted,
) {
    let m = logits.len() / ids.len();
    ids.par_iter_mut().zip(logits.par_chunks(m)).zip(uniform).for_each_init(
        || (Vec::with_capacity(m), Vec::with_capacity(m)),
        |(order, p), ((id, row), &uniform)| {
            *id = if how.temperature == 0.0 {
                greedy(row, plant)
            } else {
                how.draw(row, uniform, order, p, plant)
            };
        },
    );
}

/// The largest, ties to the lowest id.
fn greedy<E: Stored>(row: &[E], plant: Planted) -> i64 {
    let last = plant.is("ties-to-the-last");
    let mut best = 0;
    for (i, x) in row.iter().enumerate() {
        if row[best].load() < x.load() || (last && row[best].load() == x.load()) {
            best = i;
        }
    }
    best as i64
}

/// Larger first, then lower ids. A zero has no sign.
fn first<E: Stored>(row: &[E], a: usize, b: usize) -> Ordering {
    (row[b].load() + 0.0).total_cmp(&(row[a].load() + 0.0)).then(a.cmp(&b))
}

impl How {
    fn draw<E: Stored>(
        &self,
        row: &[E],
        uniform: f32,
        order: &mut Vec<usize>,
        p: &mut Vec<f32>,
        plant: Planted,
    ) -> i64 {
        let kept = match self.top_k {
            0 => row.len(),
            k => (k + usize::from(plant.is("top-k-one-more"))).min(row.len()),
        };
        order.clear();
        order.extend(0..row.len());
        if kept < row.len() {
            order.select_nth_unstable_by(kept, |&a, &b| first(row, a, b));
            order.truncate(kept);
        }
        order.sort_unstable_by(|&a, &b| first(row, a, b));
        let max = row[order[0]].load();
        let temperature = match plant.0 {
            Some("temperature-multiplied") => 1.0 / self.temperature,
            Some("temperature-after-truncation") => 1.0,
            _ => self.temperature,
        };
        let weight = |x: &E, temperature: f32| ((x.load() - max) / temperature).exp();
        p.clear();
        p.extend(order.iter().map(|&i| weight(&row[i], temperature)));
        let mut total: f32 = p.iter().sum();
        if self.top_p < 1.0 {
            let of = if plant.is("top-p-of-all") {
                row.iter().map(|x| weight(x, temperature)).sum()
            } else {
                total
            };
            let reached = reach(p, |sum| self.top_p * of <= sum);
            let cut = match plant.0 {
                Some("top-p-one-less") => reached.max(1),
                Some("top-p-one-more") => reached + 2,
                _ => reached + 1,
            };
            p.truncate(cut);
            if !plant.is("not-renormalised") {
                total = p.iter().sum();
            }
        }
        if plant.is("temperature-after-truncation") {
            p.iter_mut().zip(&*order).for_each(|(p, &i)| *p = weight(&row[i], self.temperature));
            total = p.iter().sum();
        }
        order[reach(p, |sum| uniform * total < sum)] as i64
    }
}

/// The place that a draw falls on among weights `p`, largest first, of which those that may be kept have
/// this total; `last` if it falls on none, where these are all.
fn place(
    how: &How,
    mut p: &[f32],
    mut total: f32,
    uniform: f32,
    mut last: Option<usize>,
) -> Option<usize> {
    if how.top_p < 1.0 {
        last = Some(reached(p, |sum| how.top_p * total <= sum).or(last)?);
        p = &p[..=last?];
        total = p.iter().sum();
    }
    reached(p, |sum| uniform * total < sum).or(last)
}

/// The first place where the running sum is enough, or the last.
fn reach(p: &[f32], enough: impl Fn(f32) -> bool) -> usize {
    reached(p, enough).unwrap_or(p.len() - 1)
}

/// The first place where the running sum is enough.
fn reached(p: &[f32], enough: impl Fn(f32) -> bool) -> Option<usize> {
    let mut sum = 0.0;
    p.iter().position(|p| {
        sum += p;
        enough(sum)
    })
}
