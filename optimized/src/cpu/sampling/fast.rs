//! The choice of a token on vectors.
//!
//! Few tokens of a vocabulary decide: those are sorted, and the others only where a draw falls beyond them.

use golden::{
    Spec,
    ops::sampling::{Case, Inputs, Outputs, Sampling},
};

use super::{How, first, place};
use crate::cpu::{
    linear::activations::Reads,
    moe_router::fast::{largest, powers},
    pool,
    portable::Planted,
    simd::{Simd, Wide, map},
    vector::{Fast, flat},
};

/// Tokens that are kept in order while a row is walked.
const FEW: usize = 256;

/// One row per task. `ids`, `uniform`: `[N]`; `logits`: `[N, M]`.
pub(crate) fn sampling<S: Simd>(s: S, ids: &mut [i64], logits: &[f32], uniform: &[f32], how: &How) {
    let m = logits.len() / ids.len();
    pool::pieces(ids, 1, |i, id| {
        let row = &logits[i * m..][..m];
        s.run(
            #[inline(always)]
            || {
                let mut order = Vec::with_capacity(FEW + 1);
                if how.temperature == 0.0 {
                    largest(s, &mut order, row, 1);
                    id[0] = order[0] as i64;
                } else {
                    id[0] = draw(s, row, uniform[i], how, &mut order);
                }
            },
        );
    });
}

#[inline(always)]
fn draw<S: Simd>(s: S, row: &[f32], uniform: f32, how: &How, order: &mut Vec<usize>) -> i64 {
    let kept = if how.top_k == 0 { row.len() } else { how.top_k.min(row.len()) };
    let mut p = Vec::new();
    let mut found = None;
    if kept <= FEW {
        largest(s, order, row, kept);
        weigh(s, &mut p, row, order, how.temperature);
        found = place(how, &p, p.iter().sum(), uniform, Some(kept - 1));
    } else if kept == row.len() {
        largest(s, order, row, FEW);
        weigh(s, &mut p, row, order, how.temperature);
        let total = powers(s, row, row[order[0]], how.temperature);
        found = place(how, &p, total, uniform, None);
    }
    if found.is_none() {
        order.clear();
        order.extend(0..row.len());
        order.sort_unstable_by(|&a, &b| first(row, a, b));
        order.truncate(kept);
        weigh(s, &mut p, row, order, how.temperature);
        found = place(how, &p, p.iter().sum(), uniform, Some(kept - 1));
    }
    order[found.unwrap_or(kept - 1)] as i64
}

/// `p = e^((x - x_0) / temperature)` of these.
#[inline(always)]
fn weigh<S: Simd>(s: S, p: &mut Vec<f32>, row: &[f32], order: &[usize], temperature: f32) {
    let max = row[order[0]];
    p.clear();
    p.extend(order.iter().map(|&i| row[i] - max));
    let temperature = s.splat(temperature);
    map(
        s,
        p,
        #[inline(always)]
        |x| s.exp(s.div(x, temperature)),
    );
}

/// A problem of the op.
pub(crate) struct Packed {
    logits: Vec<f32>,
    uniform: Vec<f32>,
    how: How,
}

impl Fast for Sampling {
    type Packed<E: Wide> = Packed;

    fn pack<E: Wide>(_: &Spec<Case>, x: &Inputs, _: Reads) -> Packed {
        let how = How { temperature: x.temperature as f32, top_k: x.top_k, top_p: x.top_p as f32 };
        Packed { logits: flat(&x.logits), uniform: flat(&x.uniform), how }
    }

    fn run<S: Simd, E: Wide>(s: S, x: &Packed, o: &mut Outputs, plant: Planted) {
        let mut how = x.how;
        match plant.0 {
            Some("temperature-multiplied") if how.temperature != 0.0 => {
                how.temperature = 1.0 / how.temperature;
            }
            Some("top-k-one-more") if how.top_k != 0 => how.top_k += 1,
            _ => {}
        }
        let ids = o.ids.as_slice_mut().expect("an output of its own shape");
        sampling(s, ids, &x.logits, &x.uniform, &how);
    }
}
