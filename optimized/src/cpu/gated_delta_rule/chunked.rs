//! The chunked (WY) form: see [`golden::ops::gated_delta_rule`].
//!
//! `P` is what factors of products and kept intermediates are rounded to. With bf16 these are the
//! places where flash-linear-attention's Triton kernels round: normed queries and keys, `beta V`,
//! `beta exp(G) K`, the inverse, `W`, `U`, the corrected values, the scores and the state as a product
//! reads it. Sums, gates, the state itself and the scale of the query are f32.

use std::marker::PhantomData;

use golden::Dtype;

use super::{Algorithm, CHUNK, Head, Normed, Planted, Sizes};
use crate::cpu::{
    stored::Stored,
    sums::{add_scaled, dot},
};

/// In chunks of 64 tokens.
pub(crate) struct Chunked<P>(PhantomData<P>);

/// The intermediates of one chunk of `C` tokens.
#[derive(Default)]
pub(crate) struct Room {
    /// `[C]`, log decay.
    g: Vec<f32>,
    /// `[C]`, write strength.
    beta: Vec<f32>,
    /// `[C]`: `G_i`, the gates up to and with token `i`.
    sums: Vec<f32>,
    /// `[C, K]`, normed.
    q: Vec<f32>,
    /// `[C, K]`, normed.
    k: Vec<f32>,
    /// `[C, C]`: `exp(G_i - G_j)` on and below the diagonal.
    decay: Vec<f32>,
    /// `[C, C]`, strictly lower.
    a: Vec<f32>,
    /// `[C, C]`: `(I + A)^-1`.
    inverse: Vec<f32>,
    /// `[C, K]`: keys times what their place says.
    keys: Vec<f32>,
    /// `[C, K]`.
    w: Vec<f32>,
    /// `[C, V]`: `beta V`.
    values: Vec<f32>,
    /// `[C, V]`.
    u: Vec<f32>,
    /// `[C, V]`: `U - W S`.
    corrected: Vec<f32>,
    /// `[C, C]`.
    scores: Vec<f32>,
    /// `[K, V]`: the state as products read it.
    state: Vec<f32>,
    /// `[V]`.
    sum: Vec<f32>,
}

/// Rounded to what `P` holds.
fn narrow<P: Stored>(x: f32) -> f32 {
    P::store(x).load()
}

impl<P: Stored> Algorithm for Chunked<P> {
    type Normed = P;
    type Workspace = Room;

    fn workspace(_: Sizes) -> Room {
        Room::default()
    }

    fn head<E: Stored>(mut head: Head<'_>, x: &Normed<'_, E>, room: &mut Room, plant: Planted) {
        for start in (0..head.tokens.len()).step_by(CHUNK) {
            let c = CHUNK.min(head.tokens.len() - start);
            if start == CHUNK && plant.is("state-reset-at-one-chunk") {
                head.state.fill(0.0);
            }
            room.load::<E, P>(&head, x, start, c, plant);
            room.solve::<P>(plant);
            room.answer::<P>(&mut head, x.x.sizes, start, plant);
            if !(c < CHUNK && plant.is("partial-chunk-not-written")) {
                room.advance::<P>(head.state, start, plant);
            }
        }
    }
}

/// As many elements, whatever they are: each is written before it is read.
fn sized(x: &mut Vec<f32>, len: usize) -> &mut [f32] {
    x.resize(len, f32::NAN);
    x
}

impl Room {
    /// Gates, queries, keys, values and decays of `c` tokens from `start` on.
    fn load<E: Stored, P: Stored>(
        &mut self,
        head: &Head<'_>,
        x: &Normed<'_, E>,
        start: usize,
        c: usize,
        plant: Planted,
    ) {
        let Sizes { k, v, .. } = x.x.sizes;
        let (g, beta) = (sized(&mut self.g, c), sized(&mut self.beta, c));
        let (q, key) = (sized(&mut self.q, c * k), sized(&mut self.k, c * k));
        let (sums, values) = (sized(&mut self.sums, c), sized(&mut self.values, c * v));
        let mut sum = 0.0;
        for i in 0..c {
            (g[i], beta[i]) = x.gates(head, start + i, plant);
            sum += g[i];
            sums[i] = sum;
            let n = head.tokens.start + start + i;
            let (query, own) = x.query_key(n, head.h, plant);
            q[i * k..][..k].copy_from_slice(query);
            key[i * k..][..k].copy_from_slice(own);
            for (to, from) in values[i * v..][..v].iter_mut().zip(x.value(n, head.h)) {
                *to = narrow::<P>(beta[i] * from.load());
            }
        }
        // G_i - G_j as the sum of the gates between: a difference of two large sums has lost what a
        // small gate said. Nothing is exponentiated above the diagonal.
        let decay = sized(&mut self.decay, c * c);
        decay.fill(0.0);
        for j in 0..c {
            let mut between = 0.0;
            decay[j * c + j] = 1.0;
            for i in j + 1..c {
                between += g[i];
                decay[i * c + j] = between.exp();
            }
        }
        if plant.is("masked-after-exponential") {
            for (i, row) in decay.chunks_exact_mut(c).enumerate() {
                for (j, decay) in row.iter_mut().enumerate().skip(i + 1) {
                    *decay = (sums[i] - sums[j]).exp() * 0.0;
                }
            }
        }
    }

    /// `Tm = (I + A)^-1`, `W = Tm (beta exp(G) K)`, `U = Tm (beta V)`.
    fn solve<P: Stored>(&mut self, plant: Planted) {
        let Room { g, beta, sums, k: key, decay, a, inverse, keys, w, values, u, .. } = self;
        let c = g.len();
        let (k, v) = (key.len() / c, values.len() / c);
        // How strongly what the state says already is taken off.
        let strength = |i: usize| match plant.0 {
            Some("no-delta-rule") => 0.0,
            Some("beta-on-value-only") => 1.0,
            _ => beta[i],
        };
        let a = sized(a, c * c);
        for i in 0..c {
            let own = &key[i * k..][..k];
            for j in 0..i {
                a[i * c + j] = strength(i) * dot(own, &key[j * k..][..k]) * decay[i * c + j];
            }
        }
        // By forward substitution: row i is e_i - sum_{j < i} A_ij row j.
        let inverse = sized(inverse, c * c);
        inverse.fill(0.0);
        for i in 0..c {
            let (done, rest) = inverse.split_at_mut(i * c);
            let row = &mut rest[..c];
            row[i] = 1.0;
            for (j, earlier) in done.chunks_exact(c).enumerate() {
                if plant.is("inverse-of-first-order") {
                    row[j] = -a[i * c + j];
                } else if !(plant.is("inverse-blocks-not-merged") && i / 16 != j / 16) {
                    add_scaled(&mut row[..=j], -a[i * c + j], &earlier[..=j]);
                }
            }
        }
        let in_f16 = plant.is("inverse-in-f16");
        for x in inverse.iter_mut() {
            *x = narrow::<P>(if in_f16 { Dtype::F16.round(*x) } else { *x });
        }
        let keys = sized(keys, c * k);
        for (i, (to, from)) in keys.chunks_exact_mut(k).zip(key.chunks_exact(k)).enumerate() {
            let undecayed = plant.is("w-without-decay");
            let factor = strength(i) * if undecayed { 1.0 } else { sums[i].exp() };
            to.iter_mut().zip(from).for_each(|(to, from)| *to = narrow::<P>(factor * from));
        }
        let (w, u) = (sized(w, c * k), sized(u, c * v));
        product(w, inverse, keys, k, |i| i + 1);
        product(u, inverse, values, v, |i| i + 1);
        let in_bf16 = plant.is("w-u-in-bf16");
        for x in w.iter_mut().chain(u) {
            *x = narrow::<P>(if in_bf16 { Dtype::Bf16.round(*x) } else { *x });
        }
    }

    /// `Vn = U - W S`, `O = (exp(G) Q) S + (Q K' * D) Vn`.
    fn answer<P: Stored>(
        &mut self,
        head: &mut Head<'_>,
        Sizes { k, v, .. }: Sizes,
        start: usize,
        plant: Planted,
    ) {
        let Room { g, sums, q, k: key, decay, w, u, corrected, scores, state, .. } = self;
        let c = g.len();
        let state = sized(state, k * v);
        state.iter_mut().zip(&*head.state).for_each(|(to, &s)| *to = narrow::<P>(s));
        let corrected = sized(corrected, c * v);
        product(corrected, w, state, v, |_| k);
        corrected.iter_mut().zip(u).for_each(|(vn, u)| *vn = narrow::<P>(*u - *vn));
        // What stands above the diagonal is zero, and left out.
        let masked = !plant.is("masked-after-exponential");
        let reach = |i: usize| if masked { i + 1 } else { c };
        let scores = sized(scores, c * c);
        for (i, row) in scores.chunks_exact_mut(c).enumerate() {
            let query = &q[i * k..][..k];
            for (j, score) in row[..reach(i)].iter_mut().enumerate() {
                *score = narrow::<P>(dot(query, &key[j * k..][..k]) * decay[i * c + j]);
            }
            if plant.is("scores-without-diagonal") {
                row[i] = 0.0;
            }
        }
        let scale = if plant.is("query-not-scaled") { 1.0 } else { 1.0 / (k as f32).sqrt() };
        let o = &mut head.o[start * v..][..c * v];
        product(o, q, state, v, |_| k);
        for (i, o) in o.chunks_exact_mut(v).enumerate() {
            let decay = sums[i].exp();
            for o in o.iter_mut() {
                *o *= decay;
            }
            for (j, vn) in corrected.chunks_exact(v).enumerate().take(reach(i)) {
                add_scaled(o, scores[i * c + j], vn);
            }
            for o in o.iter_mut() {
                *o *= scale;
            }
        }
    }

    /// `S <- exp(G_last) S + (exp(G_last - G) K)' Vn`.
    fn advance<P: Stored>(&mut self, state: &mut [f32], start: usize, plant: Planted) {
        let c = self.g.len();
        let (k, v) = (self.k.len() / c, self.corrected.len() / c);
        for i in 0..c {
            let left = self.left(i, plant);
            let (to, from) = (&mut self.keys[i * k..][..k], &self.k[i * k..][..k]);
            to.iter_mut().zip(from).for_each(|(to, from)| *to = narrow::<P>(left * from));
        }
        let decay = match plant.0 {
            Some("decay-dropped-at-one-chunk") if start == CHUNK => 1.0,
            Some("decay-dropped-at-each-chunk") => 1.0,
            _ => self.last_gate(plant).exp(),
        };
        let in_bf16 = plant.is("state-in-bf16");
        let sum = sized(&mut self.sum, v);
        for (row, state) in state.chunks_exact_mut(v).enumerate() {
            sum.fill(0.0);
            for (i, vn) in self.corrected.chunks_exact(v).enumerate() {
                add_scaled(sum, self.keys[i * k + row], vn);
            }
            for (s, sum) in state.iter_mut().zip(&*sum) {
                *s = decay * *s + sum;
                if in_bf16 {
                    *s = Dtype::Bf16.round(*s);
                }
            }
        }
    }

    /// `G_last`.
    fn last_gate(&self, plant: Planted) -> f32 {
        let c = self.g.len();
        match plant.0 {
            // The row that padding fills was never summed.
            Some("last-gate-of-padding") if c < CHUNK => 0.0,
            Some("last-gate-of-another-row") => self.sums[c / 2],
            _ => self.sums[c - 1],
        }
    }

    /// `exp(G_last - G_i)`: what is left of token `i` at the end of the chunk.
    fn left(&self, i: usize, plant: Planted) -> f32 {
        let c = self.g.len();
        match plant.0 {
            Some("last-gate-of-padding" | "last-gate-of-another-row") => {
                (self.last_gate(plant) - self.sums[i]).exp()
            }
            Some("keys-undecayed") => 1.0,
            Some("keys-decayed-once-more") => (self.sums[c - 1] - self.sums[i] + self.g[i]).exp(),
            _ => self.decay[(c - 1) * c + i],
        }
    }
}

/// `o = a b`, of whose rows only the first `reach(i)` factors count.
///
/// `o`: `[I, J]`; `a`: `[I, L]`; `b`: `[L, J]`.
fn product(o: &mut [f32], a: &[f32], b: &[f32], cols: usize, reach: impl Fn(usize) -> usize) {
    o.fill(0.0);
    let inner = b.len() / cols;
    for (i, (o, a)) in o.chunks_exact_mut(cols).zip(a.chunks_exact(inner)).enumerate() {
        for (&a, b) in a[..reach(i)].iter().zip(b.chunks_exact(cols)) {
            add_scaled(o, a, b);
        }
    }
}
