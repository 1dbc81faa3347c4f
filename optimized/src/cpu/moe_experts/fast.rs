//! Experts on vectors: tokens are grouped by expert, and every expert reads its weights once.
//!
//! The shared expert is one more group, of all tokens. Three regions read weights, those of all groups:
//! `gate_proj`, `up_proj`, then `down_proj`; each is cut into parts of some rows of a weight.

use std::ops::Range;

use golden::{
    Spec,
    ops::moe_experts::{Case, Inputs, MoeExperts, Outputs},
};
use ndarray::{ArcArray, Ix3};

use crate::cpu::{
    linear::{
        activations::{Activations, Reads},
        fast::{Source, rows_of},
    },
    pool,
    portable::Planted,
    room::room,
    simd::{Simd, Wide, add_scaled, map2},
    vector::{Fast, flat, flat_mut},
    weight::Weight,
};

/// The three projections of an expert, of one format.
#[expect(clippy::struct_field_names, reason = "as the checkpoint calls them")]
pub(crate) struct Expert<'a, M> {
    /// `[F, D]`.
    pub(crate) gate_proj: &'a M,
    /// `[F, D]`.
    pub(crate) up_proj: &'a M,
    /// `[D, F]`.
    pub(crate) down_proj: &'a M,
}

/// Slots (a token's use of an expert) sorted by expert, ascending within one.
pub(crate) struct Groups {
    /// First place of each group, and the end.
    pub(crate) starts: Vec<usize>,
    /// The token at each place.
    tokens: Vec<usize>,
    /// The place of each slot, `[N, A]`.
    places: Vec<usize>,
}

impl Groups {
    /// `ids`: `[N, A]`, each below `experts`.
    pub(crate) fn new(ids: &[i64], active: usize, experts: usize) -> Groups {
        let mut starts = vec![0; experts + 1];
        for &id in ids {
            starts[id as usize + 1] += 1;
        }
        for e in 0..experts {
            starts[e + 1] += starts[e];
        }
        let mut next = starts.clone();
        let (mut tokens, mut places) = (vec![0; ids.len()], vec![0; ids.len()]);
        for (slot, &id) in ids.iter().enumerate() {
            let place = &mut next[id as usize];
            (tokens[*place], places[slot]) = (slot / active, *place);
            *place += 1;
        }
        Groups { starts, tokens, places }
    }

    /// One group of all tokens.
    pub(crate) fn of_all(tokens: usize) -> Groups {
        Groups::new(&vec![0; tokens], 1, 1)
    }

    fn of(&self, group: usize) -> Range<usize> {
        self.starts[group]..self.starts[group + 1]
    }
}

/// `o_n += sum_a weights_na down(silu(gate x_n) * (up x_n))` of the expert that slot `(n, a)` is
/// grouped under. `o`, `x`: `[N, D]`; `weights`: `[N, A]`.
pub(crate) fn moe_experts<'a, S: Simd, M: Source + 'a>(
    s: S,
    o: &mut [f32],
    x: &[f32],
    groups: &Groups,
    weights: &[f32],
    expert: impl Fn(usize) -> Expert<'a, M> + Sync,
) {
    let Some(first) = (0..groups.starts.len() - 1).find(|&group| !groups.of(group).is_empty())
    else {
        return;
    };
    let first = expert(first);
    let (f, d) = (first.gate_proj.rows(), first.gate_proj.columns());
    let slots = groups.tokens.len();
    let most = groups.starts.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0);
    let all = Activations::new(s, first.gate_proj.reads(), x, d);
    // One token, which no expert has twice, is read where it is; of one group the tokens are in order already.
    let alone = x.len() == d && most == 1;
    let in_order = alone || groups.starts.len() == 2;
    let read = if in_order { all } else { all.gathered(&groups.tokens) };
    let mut gate = room(slots * f);
    let mut up = room(slots * f);
    let wide = first.gate_proj.width(most);
    for (to, second) in [(&mut gate, false), (&mut up, true)] {
        pool::parts(to, &groups.starts, wide, |group, part| {
            let expert = expert(group);
            let weight = if second { expert.up_proj } else { expert.gate_proj };
            let rows = if alone { 0..1 } else { part.rows.clone() };
            rows_of(s, part, read.rows(rows.start, rows.end), weight);
        });
    }
    let mut hidden = room(slots * f);
    pool::pieces(&mut hidden, 1 << 14, |i, hidden| {
        let range = (i << 14)..(i << 14) + hidden.len();
        s.run(
            #[inline(always)]
            || {
                map2(
                    s,
                    hidden,
                    &gate[range.clone()],
                    &up[range],
                    #[inline(always)]
                    |gate, up| s.mul(s.silu(gate), up),
                );
            },
        );
    });
    let read = Activations::new(s, first.down_proj.reads(), &hidden, f);
    let wide = first.down_proj.width(most);
    // [N A, D]
    let mut outputs = room(slots * d);
    pool::parts(&mut outputs, &groups.starts, wide, |group, part| {
        let rows = part.rows.clone();
        rows_of(s, part, read.rows(rows.start, rows.end), expert(group).down_proj);
    });
    let active = weights.len() * d / o.len();
    pool::rows(
        s,
        o,
        (d, 1),
        #[inline(always)]
        |token, o| {
            for slot in token * active..(token + 1) * active {
                let output = &outputs[groups.places[slot] * d..][..d];
                add_scaled(s, o, weights[slot], output);
            }
        },
    );
}

/// A problem of the op.
pub(crate) struct Packed {
    x: Vec<f32>,
    groups: Groups,
    weights: Vec<f32>,
    /// One per expert.
    gate_proj: Vec<Weight>,
    up_proj: Vec<Weight>,
    down_proj: Vec<Weight>,
}

impl Fast for MoeExperts {
    type Packed<E: Wide> = Packed;

    fn pack<E: Wide>(spec: &Spec<Case>, x: &Inputs, reads: Reads) -> Packed {
        let Case { d, e, a, f, .. } = spec.case;
        let ids: Vec<i64> = x.ids.iter().copied().collect();
        let matrices = |w: &ArcArray<f32, Ix3>, d| -> Vec<Weight> {
            flat(w).chunks_exact(w.len() / e).map(|w| Weight::of(spec, reads, w, d)).collect()
        };
        Packed {
            x: flat(&x.x),
            groups: Groups::new(&ids, a, e),
            weights: flat(&x.weights),
            gate_proj: matrices(&x.gate_proj, d),
            up_proj: matrices(&x.up_proj, d),
            down_proj: matrices(&x.down_proj, f),
        }
    }

    fn run<S: Simd, E: Wide>(s: S, x: &Packed, o: &mut Outputs, plant: Planted) {
        let (gate, up) = (&x.gate_proj, &x.up_proj);
        let (gate, up) = if plant.is("gate-up-swapped") { (up, gate) } else { (gate, up) };
        let weights =
            if plant.is("weights-not-applied") { &vec![1.0; x.weights.len()] } else { &x.weights };
        let o = flat_mut(&mut o.o);
        o.fill(0.0);
        moe_experts(s, o, &x.x, &x.groups, weights, |e| Expert {
            gate_proj: &gate[e],
            up_proj: &up[e],
            down_proj: &x.down_proj[e],
        });
    }
}
