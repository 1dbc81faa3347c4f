//! Which experts a token goes to, on vectors.

use std::sync::{Mutex, PoisonError};

use golden::{
    Dtype, Spec,
    ops::moe_router::{Case, Inputs, MoeRouter, Outputs},
};
use ndarray::Array2;

use crate::cpu::{
    linear::{activations::Reads, fast::linear},
    pool,
    portable::Planted,
    simd::{LANES, Simd, Wide, filled, lanes, map},
    vector::{Fast, flat, flat_mut},
    weight::Weight,
};

/// How a sparse layer routes.
pub(crate) struct Routed {
    /// `[N, A]`.
    pub(crate) ids: Vec<i64>,
    /// `[N, A]`.
    pub(crate) weights: Vec<f32>,
    /// `[N]`.
    pub(crate) margins: Vec<f32>,
}

/// Tokens of a task.
const TOKENS: usize = 16;

/// The `active` largest of each row of `logits` `[N, E]`, ties to the lowest index, or the experts
/// given; their weights are the softmax of these, or of all if they are not renormalised.
pub(crate) fn route<S: Simd>(
    s: S,
    logits: &[f32],
    experts: usize,
    active: usize,
    renormalise: bool,
    forced: Option<&Array2<i64>>,
) -> Routed {
    let n = logits.len() / experts;
    let mut routed = Routed {
        ids: vec![0; n * active],
        weights: vec![f32::NAN; n * active],
        margins: vec![f32::NAN; n],
    };
    let ids = routed.ids.chunks_mut(TOKENS * active);
    let weights = routed.weights.chunks_mut(TOKENS * active);
    let tasks = ids.zip(weights).zip(routed.margins.chunks_mut(TOKENS)).map(Mutex::new);
    let tasks: Vec<_> = tasks.collect();
    pool::each(tasks.len(), |i| {
        let mut task = tasks[i].lock().unwrap_or_else(PoisonError::into_inner);
        let ((ids, weights), margins) = &mut *task;
        let rows = ids.chunks_exact_mut(active).zip(weights.chunks_exact_mut(active));
        s.run(
            #[inline(always)]
            || {
                let mut best = Vec::with_capacity(active + 2);
                for (t, ((ids, weights), margin)) in rows.zip(margins.iter_mut()).enumerate() {
                    let n = i * TOKENS + t;
                    let row = &logits[n * experts..][..experts];
                    // One more than are chosen: the first left out.
                    largest(s, &mut best, row, active + 1);
                    let left = best.get(active).map(|&left| row[best[active - 1]] - row[left]);
                    *margin = left.unwrap_or(f32::INFINITY);
                    match forced {
                        Some(forced) => {
                            ids.iter_mut().zip(forced.row(n)).for_each(|(to, from)| *to = *from);
                        }
                        None => ids.iter_mut().zip(&best).for_each(|(to, &j)| *to = j as i64),
                    }
                    let max = row[best[0]];
                    for (weight, &id) in weights.iter_mut().zip(&*ids) {
                        *weight = row[id as usize] - max;
                    }
                    map(
                        s,
                        weights,
                        #[inline(always)]
                        |x| s.exp(x),
                    );
                    let total: f32 =
                        if renormalise { weights.iter().sum() } else { powers(s, row, max, 1.0) };
                    weights.iter_mut().for_each(|weight| *weight /= total);
                }
            },
        );
    });
    drop(tasks);
    routed
}

/// Vectors that are looked at together.
const TOGETHER: usize = 4;

/// Indices of the `count` largest of a row (or all), largest first, ties to the lowest index.
#[inline(always)]
pub(crate) fn largest<S: Simd>(s: S, best: &mut Vec<usize>, row: &[f32], count: usize) {
    best.clear();
    for (block, x) in row.chunks(TOGETHER * LANES).enumerate() {
        // Most blocks hold nothing that is larger than what there is.
        if let (Some(&least), true) = (best.get(count - 1), x.len() == TOGETHER * LANES) {
            let part = |i: usize| s.load(lanes(&x[i * LANES..]));
            let most = s.max(s.max(part(0), part(1)), s.max(part(2), part(3)));
            if s.largest(most) <= row[least] {
                continue;
            }
        }
        for (i, &x) in x.iter().enumerate() {
            if best.get(count - 1).is_none_or(|&least| row[least] < x) {
                best.insert(best.partition_point(|&j| x <= row[j]), block * TOGETHER * LANES + i);
                best.truncate(count);
            }
        }
    }
}

/// `sum_i e^((x_i - max) / temperature)`.
#[inline(always)]
pub(crate) fn powers<S: Simd>(s: S, x: &[f32], max: f32, temperature: f32) -> f32 {
    let (max, temperature) = (s.splat(max), s.splat(temperature));
    let (whole, rest) = x.as_chunks::<LANES>();
    // To whom nothing is added.
    let last = filled(rest, f32::NEG_INFINITY);
    let mut sum = s.splat(0.0);
    for x in whole.iter().chain([&last]) {
        sum = s.add(sum, s.exp(s.div(s.sub(s.load(x), max), temperature)));
    }
    s.sum(sum)
}

/// A problem of the op.
pub(crate) struct Packed {
    x: Vec<f32>,
    weight: Weight,
    active: usize,
    norm_topk_prob: bool,
}

impl Fast for MoeRouter {
    const KEPT: &'static [&'static str] = &["weights", "logits", "margins"];
    type Packed<E: Wide> = Packed;

    fn pack<E: Wide>(spec: &Spec<Case>, x: &Inputs, _: Reads) -> Packed {
        Packed {
            x: flat(&x.x),
            weight: Weight::of(spec, Reads::F32, &flat(&x.weight), spec.case.d),
            active: x.top_k,
            norm_topk_prob: x.norm_topk_prob,
        }
    }

    fn run<S: Simd, E: Wide>(s: S, x: &Packed, o: &mut Outputs, plant: Planted) {
        let experts = o.logits.ncols();
        let logits = flat_mut(&mut o.logits);
        linear(s, logits, &x.x, &x.weight);
        if plant.is("logits-in-bf16") {
            logits.iter_mut().for_each(|l| *l = Dtype::Bf16.round(*l));
        }
        let renormalise = x.norm_topk_prob != plant.is("renormalise-flipped");
        let mut routed = route(s, logits, experts, x.active, renormalise, None);
        if plant.is("weights-shifted") {
            routed.weights.chunks_exact_mut(x.active).for_each(|weights| weights.rotate_right(1));
        }
        o.ids.as_slice_mut().expect("an output of its own shape").copy_from_slice(&routed.ids);
        flat_mut(&mut o.weights).copy_from_slice(&routed.weights);
        flat_mut(&mut o.margins).copy_from_slice(&routed.margins);
    }
}
