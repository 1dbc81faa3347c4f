//! Experts on vectors: tokens are grouped by expert, and every expert reads its weights once.
//!
//! The shared expert is one more group, of all tokens. Two regions do all of it: hidden activations
//! of every group, then outputs of every group; each is cut into parts of some rows of a weight.

use std::ops::Range;

use golden::{
    Spec,
    ops::moe_experts::{Case, Inputs, MoeExperts, Outputs},
};

use crate::cpu::{
    linear::fast::{Matrix, Source, rows_of, width},
    pool,
    portable::{Planted, packed},
    simd::{Simd, Wide, add_scaled, map2},
    vector::{Fast, flat, flat_mut},
};

/// The three projections of an expert.
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
    let (f, d) = (expert(first).gate_proj.rows(), expert(first).gate_proj.columns());
    let slots = groups.tokens.len();
    let most = groups.starts.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0);
    // [N A, D]: the tokens of each group.
    let mut gathered = vec![0.0; slots * d];
    pool::pieces(&mut gathered, 8 * d, |i, rows| {
        for (row, &token) in rows.chunks_exact_mut(d).zip(&groups.tokens[8 * i..]) {
            row.copy_from_slice(&x[token * d..][..d]);
        }
    });
    let mut gate = vec![0.0; slots * f];
    let mut up = vec![0.0; slots * f];
    let wide = width(most, expert(first).gate_proj);
    for (to, second) in [(&mut gate, false), (&mut up, true)] {
        pool::parts(to, &groups.starts, wide, |group, part| {
            let expert = expert(group);
            let weight = if second { expert.up_proj } else { expert.gate_proj };
            let rows = part.rows.clone();
            rows_of(s, part, &gathered[rows.start * d..rows.end * d], weight);
        });
    }
    let mut hidden = vec![0.0; slots * f];
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
    let wide = width(most, expert(first).down_proj);
    // [N A, D]
    let mut outputs = gathered;
    pool::parts(&mut outputs, &groups.starts, wide, |group, part| {
        let rows = part.rows.clone();
        rows_of(s, part, &hidden[rows.start * f..rows.end * f], expert(group).down_proj);
    });
    let active = weights.len() * d / o.len();
    pool::pieces(o, d, |token, o| {
        s.run(
            #[inline(always)]
            || {
                for slot in token * active..(token + 1) * active {
                    let output = &outputs[groups.places[slot] * d..][..d];
                    add_scaled(s, o, weights[slot], output);
                }
            },
        );
    });
}

/// A problem of the op.
pub(crate) struct Packed<E> {
    x: Vec<f32>,
    groups: Groups,
    weights: Vec<f32>,
    gate_proj: Vec<E>,
    up_proj: Vec<E>,
    down_proj: Vec<E>,
    d: usize,
    f: usize,
}

impl<E> Packed<E> {
    /// One per expert, `d` columns each.
    fn matrices<'a>(&self, data: &'a [E], d: usize) -> Vec<Matrix<'a, E>> {
        data.chunks_exact(self.d * self.f).map(|data| Matrix { data, d }).collect()
    }
}

impl Fast for MoeExperts {
    type Packed<E: Wide> = Packed<E>;

    fn pack<E: Wide>(spec: &Spec<Case>, x: &Inputs) -> Packed<E> {
        let Case { d, e, a, f, .. } = spec.case;
        let ids: Vec<i64> = x.ids.iter().copied().collect();
        Packed {
            x: flat(&x.x),
            groups: Groups::new(&ids, a, e),
            weights: flat(&x.weights),
            gate_proj: packed(&x.gate_proj),
            up_proj: packed(&x.up_proj),
            down_proj: packed(&x.down_proj),
            d,
            f,
        }
    }

    fn run<S: Simd, E: Wide>(s: S, x: &Packed<E>, o: &mut Outputs, plant: Planted) {
        let Packed { d, f, .. } = *x;
        let (gate, up) = (x.matrices(&x.gate_proj, d), x.matrices(&x.up_proj, d));
        let (gate, up) = if plant.is("gate-up-swapped") { (up, gate) } else { (gate, up) };
        let down = x.matrices(&x.down_proj, f);
        let weights =
            if plant.is("weights-not-applied") { &vec![1.0; x.weights.len()] } else { &x.weights };
        let o = flat_mut(&mut o.o);
        o.fill(0.0);
        moe_experts(s, o, &x.x, &x.groups, weights, |e| Expert {
            gate_proj: &gate[e],
            up_proj: &up[e],
            down_proj: &down[e],
        });
    }
}
