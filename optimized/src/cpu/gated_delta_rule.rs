//! CPU variants of `gated_delta_rule`, parallel over sequences and value heads.

use std::{marker::PhantomData, ops::Range};

use golden::{
    Dtype, Plan, Spec, Tensor1, Variant,
    ops::gated_delta_rule::{Case, GatedDeltaRule, Inputs, Outputs},
    plan::Form,
};
use half::bf16;
use ndarray::{Ix2, Ix3, Ix4};
use rayon::prelude::*;

use super::vector::variants;
use super::{
    l2_norm::l2_norm,
    portable::{Kernel, Only, Planted, Portable, as_stored, pack, packed, unpacked},
    stored::Stored,
};
use chunked::Chunked;
use recurrent::Recurrent;

mod chunked;
pub(crate) mod fast;
pub(crate) mod plants;
pub(crate) mod recurrent;

/// Every CPU variant, plainest first.
#[inline(never)]
pub fn variants() -> &'static [&'static dyn Variant<GatedDeltaRule>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<GatedDeltaRule>] = variants!(
    [
        &Portable::new("cpu/portable", pack!(TokenByToken), as_stored, plants::RECURRENT),
        &Portable::new(
            "cpu/portable-chunk64",
            pack!(InChunks),
            |spec| Plan::stored(spec.dtype).form(Form::Chunked(CHUNK)),
            plants::CHUNKED,
        ),
        &Only {
            lacks: || None,
            unfit: |spec| {
                let other = || format!("computes bf16 problems, not {}", spec.dtype);
                (spec.dtype != Dtype::Bf16).then(other)
            },
            of: Portable::new(
                "cpu/portable-chunk64-bf16",
                pack!(InNarrowChunks),
                // Its decays are sums between tokens, which round less than differences of prefix sums.
                |_| Plan::fla_bf16(CHUNK).form(Form::Chunked(CHUNK)),
                plants::CHUNKED_BF16,
            ),
        }
    ],
    |spec| Plan::stored(spec.dtype).form(Form::Chunked(fast::CHUNK)),
    plants::VECTOR
);

/// Tokens of a chunk.
const CHUNK: usize = 64;

type TokenByToken<E> = Loaded<E, Recurrent>;
type InChunks<E> = Loaded<E, Chunked<f32>>;
type InNarrowChunks<E> = Loaded<E, Chunked<bf16>>;

/// A problem in memory.
struct Loaded<E, A> {
    case: Case,
    q: Vec<E>,
    k: Vec<E>,
    v: Vec<E>,
    g: Vec<f32>,
    beta: Vec<f32>,
    state: Vec<f32>,
    cu_seqlens: Vec<i64>,
    eps: f64,
    scratch: Scratch,
    o: Vec<E>,
    after: Vec<f32>,
    algorithm: PhantomData<A>,
}

impl<E: Stored, A: Algorithm> Loaded<E, A> {
    fn new(spec: &Spec<Case>, x: &Inputs) -> Self {
        Loaded {
            case: spec.case.clone(),
            q: packed(&x.q),
            k: packed(&x.k),
            v: packed(&x.v),
            g: packed(&x.g),
            beta: packed(&x.beta),
            state: packed(&x.state),
            cu_seqlens: x.cu_seqlens.to_vec(),
            eps: x.eps,
            scratch: Scratch {
                q: vec![f32::NAN; x.q.len()],
                k: vec![f32::NAN; x.k.len()],
                o: vec![f32::NAN; x.v.len()],
            },
            o: vec![E::NAN; x.v.len()],
            after: vec![f32::NAN; x.state.len()],
            algorithm: PhantomData,
        }
    }
}

impl<E: Stored, A: Algorithm> Kernel<GatedDeltaRule> for Loaded<E, A> {
    fn poison(&mut self) {
        self.o.fill(E::NAN);
        let Scratch { q, k, o } = &mut self.scratch;
        for x in [q, k, o, &mut self.after] {
            x.fill(f32::NAN);
        }
    }

    fn run(&mut self, plant: Planted) {
        let Case { hk, hv, k, v, .. } = self.case;
        let problem = Problem {
            q: &self.q,
            k: &self.k,
            v: &self.v,
            g: &self.g,
            beta: &self.beta,
            state: &self.state,
            cu_seqlens: &self.cu_seqlens,
            sizes: Sizes { hk, hv, k, v },
            eps: self.eps as f32,
        };
        gated_delta_rule::<E, A>(&mut self.o, &mut self.after, &mut self.scratch, &problem, plant);
    }

    fn inputs(&self) -> Inputs {
        let Case { b, t, hk, hv, k, v } = self.case;
        Inputs {
            q: unpacked(&self.q, Ix3(b * t, hk, k)),
            k: unpacked(&self.k, Ix3(b * t, hk, k)),
            v: unpacked(&self.v, Ix3(b * t, hv, v)),
            g: unpacked(&self.g, Ix2(b * t, hv)),
            beta: unpacked(&self.beta, Ix2(b * t, hv)),
            state: unpacked(&self.state, Ix4(b, hv, k, v)),
            cu_seqlens: Tensor1::from_vec(self.cu_seqlens.clone()),
            eps: self.eps,
        }
    }

    fn outputs(&self) -> Outputs {
        let Case { b, t, hv, k, v, .. } = self.case;
        Outputs {
            o: unpacked(&self.o, Ix3(b * t, hv, v)),
            state: unpacked(&self.after, Ix4(b, hv, k, v)),
        }
    }
}

/// Heads and their channels.
#[derive(Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) hk: usize,
    pub(crate) hv: usize,
    pub(crate) k: usize,
    pub(crate) v: usize,
}

/// What the kernels read.
pub(crate) struct Problem<'a, E> {
    /// `[N, HK, K]`.
    pub(crate) q: &'a [E],
    /// `[N, HK, K]`.
    pub(crate) k: &'a [E],
    /// `[N, HV, V]`.
    pub(crate) v: &'a [E],
    /// `[N, HV]`.
    pub(crate) g: &'a [f32],
    /// `[N, HV]`.
    pub(crate) beta: &'a [f32],
    /// `[S, HV, K, V]`.
    pub(crate) state: &'a [f32],
    /// `[S + 1]`.
    pub(crate) cu_seqlens: &'a [i64],
    pub(crate) sizes: Sizes,
    pub(crate) eps: f32,
}

/// Between input and output.
pub(crate) struct Scratch {
    /// `[N, HK, K]`, normed.
    pub(crate) q: Vec<f32>,
    /// `[N, HK, K]`, normed.
    pub(crate) k: Vec<f32>,
    /// Per sequence `[HV, T, V]`, so that every head writes in one place.
    pub(crate) o: Vec<f32>,
}

/// How the tokens of one head are taken.
pub(crate) trait Algorithm: Send + 'static {
    /// What normed queries and keys are stored in.
    type Normed: Stored;
    /// Room for the intermediates of a head.
    type Workspace;
    /// That room.
    fn workspace(sizes: Sizes) -> Self::Workspace;
    /// Outputs and state of one head. Its state holds the one before the first token.
    fn head<E: Stored>(
        head: Head<'_>,
        x: &Normed<'_, E>,
        room: &mut Self::Workspace,
        plant: Planted,
    );
}

/// One value head of one sequence.
pub(crate) struct Head<'a> {
    /// Which.
    h: usize,
    /// Rows of its tokens.
    tokens: Range<usize>,
    /// `[T, V]`.
    o: &'a mut [f32],
    /// `[K, V]`.
    state: &'a mut [f32],
}

/// What a head reads.
pub(crate) struct Normed<'a, E> {
    x: &'a Problem<'a, E>,
    q: &'a [f32],
    k: &'a [f32],
}

impl<E: Stored> Normed<'_, E> {
    /// Query and key of token `n` for value head `h`, `[K]` each.
    fn query_key(&self, n: usize, h: usize, plant: Planted) -> (&[f32], &[f32]) {
        let Sizes { hk, hv, k, .. } = self.x.sizes;
        let group = if plant.is("heads-interleaved") { h % hk } else { h / (hv / hk) };
        let at = (n * hk + group) * k;
        (&self.q[at..][..k], &self.k[at..][..k])
    }

    /// `[V]`.
    fn value(&self, n: usize, h: usize) -> &[E] {
        let Sizes { hv, v, .. } = self.x.sizes;
        &self.x.v[(n * hv + h) * v..][..v]
    }

    /// Log decay and write strength of the `t`-th token of a head.
    fn gates(&self, head: &Head<'_>, t: usize, plant: Planted) -> (f32, f32) {
        let at = (head.tokens.start + t) * self.x.sizes.hv + head.h;
        let (g, beta) = (self.x.g[at], self.x.beta[at]);
        match plant.0 {
            Some("g-in-bf16") => (Dtype::Bf16.round(g), beta),
            Some("beta-in-bf16") => (g, Dtype::Bf16.round(beta)),
            Some("gate-off-by-one") if t == 0 => (0.0, beta),
            Some("gate-off-by-one") => (self.x.g[at - self.x.sizes.hv], beta),
            _ => (g, beta),
        }
    }
}

/// Norms queries and keys, runs every head of every sequence as a task of its own, and puts the
/// outputs in the order of tokens.
///
/// `o`: `[N, HV, V]`; `after`: `[S, HV, K, V]`.
pub(crate) fn gated_delta_rule<E: Stored, A: Algorithm>(
    o: &mut [E],
    after: &mut [f32],
    scratch: &mut Scratch,
    x: &Problem<'_, E>,
    plant: Planted,
) {
    let Sizes { hv, k, v, .. } = x.sizes;
    let eps = match plant.0 {
        Some("eps-one") => 1.0,
        Some("eps-ten-times") => 10.0 * x.eps,
        _ => x.eps,
    };
    for (to, from) in [(&mut scratch.q, x.q), (&mut scratch.k, x.k)] {
        l2_norm(to, from, k, eps, plant);
        if plant.is("not-normed") {
            to.iter_mut().zip(from).for_each(|(to, from)| *to = from.load());
        }
        to.par_iter_mut().with_min_len(4096).for_each(|x| *x = A::Normed::store(*x).load());
    }
    let one_sequence;
    let mut cu_seqlens = x.cu_seqlens;
    if plant.is("boundaries-ignored") {
        one_sequence = std::iter::once(0)
            .chain(std::iter::repeat_n(o.len() as i64 / (hv * v) as i64, cu_seqlens.len() - 1))
            .collect::<Vec<_>>();
        cu_seqlens = &one_sequence;
    }
    match plant.0 {
        Some("initial-state-ignored") => after.fill(0.0),
        Some("state-transposed") => {
            for (after, state) in after.chunks_mut(k * v).zip(x.state.chunks(k * v)) {
                (0..k * v).for_each(|i| after[i] = state[i % v * k + i / v]);
            }
        }
        _ => after.copy_from_slice(x.state),
    }
    let normed = Normed { x, q: &scratch.q, k: &scratch.k };
    heads(cu_seqlens, x.sizes, &mut scratch.o, after)
        .into_par_iter()
        .for_each_init(|| A::workspace(x.sizes), |room, head| A::head(head, &normed, room, plant));
    let stretch = if plant.is("scaled") { 1.004 } else { 1.0 };
    o.par_chunks_mut(hv * v).enumerate().for_each(|(n, o)| {
        let sequence = cu_seqlens.partition_point(|&begin| begin as usize <= n) - 1;
        let (begin, end) = (cu_seqlens[sequence] as usize, cu_seqlens[sequence + 1] as usize);
        let (mut t, tokens) = (n - begin, end - begin);
        let swapped = plant.is("heads-swapped-at-one-token") && t == tokens / 2 && 1 < hv;
        if plant.is("stale-last-token") && 1 < tokens && t == tokens - 1 {
            t -= 1;
        }
        for (h, o) in o.chunks_exact_mut(v).enumerate() {
            let h = if swapped && h < 2 { 1 - h } else { h };
            let from = &scratch.o[begin * hv * v + (h * tokens + t) * v..][..v];
            o.iter_mut().zip(from).for_each(|(o, x)| *o = E::store(stretch * x));
        }
    });
    if plant.is("state-in-storage-type") {
        for x in after {
            *x = E::store(*x).load();
        }
    }
}

/// Every head of every sequence, with its share of outputs and states.
fn heads<'a>(
    cu_seqlens: &[i64],
    Sizes { hv, k, v, .. }: Sizes,
    mut o: &'a mut [f32],
    state: &'a mut [f32],
) -> Vec<Head<'a>> {
    let mut heads = Vec::with_capacity(state.len() / (k * v));
    for (i, state) in state.chunks_exact_mut(k * v).enumerate() {
        let sequence = i / hv;
        let tokens = cu_seqlens[sequence] as usize..cu_seqlens[sequence + 1] as usize;
        let (own, rest) = o.split_at_mut(tokens.len() * v);
        o = rest;
        heads.push(Head { h: i % hv, tokens, o: own, state });
    }
    heads
}
