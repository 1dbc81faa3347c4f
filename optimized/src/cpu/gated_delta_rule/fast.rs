//! The delta rule of one value head, token by token and in chunks, on vectors.
//!
//! Queries and keys come normed, the query scaled. In chunks there is one right-hand side to solve
//! for: `Vn = (I + A)^-1 beta (V - exp(G) K S)` by forward substitution, so that neither the inverse
//! nor `W` and `U` are formed. See [`golden::ops::gated_delta_rule`].

use std::sync::{Mutex, PoisonError};

use golden::{
    Spec,
    ops::gated_delta_rule::{Case, GatedDeltaRule, Inputs, Outputs},
};
use ndarray::s;

use super::{
    Sizes,
    plants::{INITIAL_STATE_IGNORED, STATE_RESET_AT_ONE_CHUNK},
};
use crate::cpu::{
    gdn_layer::fast::STEPS,
    l2_norm::fast::l2_norm_row,
    linear::activations::Reads,
    pool,
    portable::Planted,
    simd::{Factor, LANES, Simd, Wide, add_scaled, each, lanes, lanes_mut, map, outer, padded},
    vector::{Fast, flat, flat_mut},
};

/// Tokens of a chunk: products with the state are shared by so many, and what a chunk adds (scores
/// and the triangle) is a sixth of the work.
pub(crate) const CHUNK: usize = 32;

/// Up to [`CHUNK`] tokens of one value head; rows of `q`, `k` and `v` lie `stride` apart.
#[derive(Clone, Copy)]
pub(crate) struct Chunk<'a> {
    /// `[C, K]`, normed and scaled.
    pub(crate) q: &'a [f32],
    /// `[C, K]`, normed.
    pub(crate) k: &'a [f32],
    /// `[C, V]`.
    pub(crate) v: &'a [f32],
    /// Distance of their rows.
    pub(crate) stride: usize,
    /// `[C]` log decay.
    pub(crate) g: &'a [f32],
    /// `[C]` write strength.
    pub(crate) beta: &'a [f32],
    /// Channels of a key.
    pub(crate) key: usize,
    /// Channels of a value.
    pub(crate) value: usize,
}

/// Room for the intermediates of a chunk.
#[derive(Default)]
pub(crate) struct Room {
    decay: Vec<f32>,
    a: Vec<f32>,
    scores: Vec<f32>,
    read: Vec<f32>,
    values: Vec<f32>,
    keys: Vec<f32>,
}

/// Inner products of a chunk's keys and queries with its keys, which the value heads of a key head share.
#[derive(Default)]
pub(crate) struct Pairs {
    /// `[K, C']`, `C'` filled up to whole vectors: keys the other way round.
    turned: Vec<f32>,
    /// `[C, C']`: each key with each key.
    with_keys: Vec<f32>,
    /// `[C, C']`: each query with each key.
    with_queries: Vec<f32>,
}

/// As many elements, whatever they are: each is written before it is read.
fn sized(x: &mut Vec<f32>, len: usize) -> &mut [f32] {
    x.resize(len, f32::NAN);
    &mut x[..len]
}

/// What is held of a value head: its state, `[K, V]`, but for what the last token writes, and that write,
/// `S <- decay S + k d'`. The next token puts it in as it walks through the state. A state of 64 KiB has left
/// the nearest cache when `d` is known; two walks a token would bring it there twice.
struct Held<'a> {
    /// `[K, V]`.
    state: &'a mut [f32],
    /// `[V]`.
    d: &'a mut [f32],
    /// `[K]`.
    k: &'a mut [f32],
    decay: &'a mut f32,
}

/// Numbers that are held of a head, filled up to whole vectors.
pub(crate) const fn held_len(key: usize, value: usize) -> usize {
    (key * value + value + key + 1).next_multiple_of(LANES)
}

impl Held<'_> {
    fn of(held: &mut [f32], key: usize, value: usize) -> Held<'_> {
        let (state, write) = held.split_at_mut(key * value);
        let (d, write) = write.split_at_mut(value);
        let (k, write) = write.split_at_mut(key);
        Held { state, d, k, decay: &mut write[0] }
    }

    /// What was to be written is.
    #[inline(always)]
    fn settle<S: Simd>(&mut self, s: S) {
        if *self.decay == 1.0 && self.d.iter().chain(&*self.k).all(|&x| x == 0.0) {
            return;
        }
        let decay = s.splat(*self.decay);
        for (row, &k) in self.state.chunks_exact_mut(self.d.len()).zip(&*self.k) {
            map(
                s,
                row,
                #[inline(always)]
                |x| s.mul(decay, x),
            );
            add_scaled(s, row, k, self.d);
        }
        self.write_nothing();
    }

    fn write_nothing(&mut self) {
        self.d.fill(0.0);
        self.k.fill(0.0);
        *self.decay = 1.0;
    }
}

/// Heads hold a state, and nothing is to be written. `held`: `[HV, held]`; `state`: `[HV, K, V]`.
pub(crate) fn hold(held: &mut [f32], state: impl Iterator<Item = f32>, key: usize, value: usize) {
    let mut state = state;
    for held in held.chunks_exact_mut(held_len(key, value)) {
        let mut held = Held::of(held, key, value);
        held.state.iter_mut().zip(&mut state).for_each(|(to, from)| *to = from);
        held.write_nothing();
    }
}

/// The state of a head, with all that was written. `held`: `[held]`; the state: `[K, V]`.
#[inline(always)]
pub(crate) fn settled<S: Simd>(s: S, held: &mut [f32], key: usize, value: usize) -> &mut [f32] {
    let mut held = Held::of(held, key, value);
    held.settle(s);
    held.state
}

/// One token after the other. `o`: `[C, V]`; `held`: `[held]`. Heads lie one after another and are walked through
/// as they lie, which processors foresee: asking memory ahead takes a quarter longer where it is fast.
#[inline(always)]
pub(crate) fn steps<S: Simd>(s: S, o: &mut [f32], held: &mut [f32], x: &Chunk<'_>) {
    let mut held = Held::of(held, x.key, x.value);
    for (i, o) in o.chunks_exact_mut(x.value).enumerate() {
        let v = &x.v[i * x.stride..][..x.value];
        let (k, q) = (&x.k[i * x.stride..][..x.key], &x.q[i * x.stride..][..x.key]);
        let [[score]] = s.dots([q], [k]);
        let x = Step { decay: x.g[i].exp(), beta: x.beta[i], k, q, score };
        if S::REGISTERS == 32 {
            step::<S, 8>(s, o, &mut held, v, &x);
        } else {
            step::<S, 2>(s, o, &mut held, v, &x);
        }
    }
}

/// What there is of a token beside its value.
struct Step<'a> {
    decay: f32,
    beta: f32,
    k: &'a [f32],
    q: &'a [f32],
    /// `q . k`.
    score: f32,
}

impl Step<'_> {
    /// Of each channel the key of the token `before`, this one's, and its query.
    #[inline(always)]
    fn channels<S: Simd>(&self, s: S, before: &[f32]) -> impl Iterator<Item = [S::F; 3]> {
        let all = before.iter().zip(self.k).zip(self.q);
        all.map(
            #[inline(always)]
            move |((&before, &k), &q)| [s.splat(before), s.splat(k), s.splat(q)],
        )
    }

    /// `d = beta (v - decay S' k)` and `o = decay S' q + (q . k) d`, of what the state says of key and query.
    #[inline(always)]
    fn answers<S: Simd>(&self, s: S, key: S::F, query: S::F, v: S::F) -> [S::F; 2] {
        let d = s.mul(s.splat(self.beta), s.fma(s.splat(-self.decay), key, v));
        [d, s.fma(s.splat(self.score), d, s.mul(s.splat(self.decay), query))]
    }
}

/// `S <- decay S + k d'` of the token before, and `d` and `o` of this one, in one walk through the state, or in
/// several of `C` vectors.
#[inline(always)]
fn step<S: Simd, const C: usize>(
    s: S,
    o: &mut [f32],
    held: &mut Held<'_>,
    v: &[f32],
    x: &Step<'_>,
) {
    let (mut at, j) = (0, o.len());
    while at + C * LANES <= j {
        columns::<S, C>(s, at, o, held, v, x);
        at += C * LANES;
    }
    while at + LANES <= j {
        columns::<S, 1>(s, at, o, held, v, x);
        at += LANES;
    }
    if at < j {
        let d = s.load(&padded(&held.d[at..]));
        let (mut keys, mut queries) = (s.splat(0.0), s.splat(0.0));
        for (row, [was, k, q]) in held.state.chunks_exact_mut(j).zip(x.channels(s, held.k)) {
            let mut last = padded(&row[at..]);
            let new = s.fma(was, d, s.mul(s.splat(*held.decay), s.load(&last)));
            s.store(&mut last, new);
            row[at..].copy_from_slice(&last[..j - at]);
            keys = s.fma(k, new, keys);
            queries = s.fma(q, new, queries);
        }
        let answers = x.answers(s, keys, queries, s.load(&padded(&v[at..])));
        for (to, x) in [&mut held.d[at..], &mut o[at..]].into_iter().zip(answers) {
            let mut last = [0.0; LANES];
            s.store(&mut last, x);
            to.copy_from_slice(&last[..j - at]);
        }
    }
    held.k.copy_from_slice(x.k);
    *held.decay = x.decay;
}

/// The same of `C` vectors of columns, but for the key and the decay that it leaves.
#[inline(always)]
fn columns<S: Simd, const C: usize>(
    s: S,
    at: usize,
    o: &mut [f32],
    held: &mut Held<'_>,
    v: &[f32],
    x: &Step<'_>,
) {
    let place = |c: usize| at + c * LANES;
    let d: [S::F; C] = each(
        s.splat(0.0),
        #[inline(always)]
        |c| s.load(lanes(&held.d[place(c)..])),
    );
    let decay = s.splat(*held.decay);
    let (mut keys, mut queries) = ([s.splat(0.0); C], [s.splat(0.0); C]);
    for (row, [was, k, q]) in held.state.chunks_exact_mut(o.len()).zip(x.channels(s, held.k)) {
        let row = &mut row[at..at + C * LANES];
        for c in 0..C {
            let place = lanes_mut(&mut row[c * LANES..]);
            let new = s.fma(was, d[c], s.mul(decay, s.load(place)));
            s.store(place, new);
            keys[c] = s.fma(k, new, keys[c]);
            queries[c] = s.fma(q, new, queries[c]);
        }
    }
    for c in 0..C {
        let [d, answer] = x.answers(s, keys[c], queries[c], s.load(lanes(&v[place(c)..])));
        s.store(lanes_mut(&mut held.d[place(c)..]), d);
        s.store(lanes_mut(&mut o[place(c)..]), answer);
    }
}

/// `o += a b`, in tiles that whole chunks and states are cut into without a rest.
#[inline(always)]
fn product<S: Simd>(s: S, o: &mut [f32], a: Factor<'_>, b: &[f32], columns: usize) {
    if S::REGISTERS == 32 {
        outer::<_, _, 8, 2>(s, o, a, b, columns);
    } else {
        s.accumulate(o, a, b, columns);
    }
}

impl Pairs {
    /// Those of a chunk, in place of another's.
    #[inline(always)]
    pub(crate) fn of<S: Simd>(&mut self, s: S, x: &Chunk<'_>) {
        let (c, key) = (x.g.len(), x.key);
        let wide = c.next_multiple_of(LANES);
        // Sums stay in their lanes.
        let turned = sized(&mut self.turned, key * wide);
        turned.fill(0.0);
        for (j, k) in x.k.chunks(x.stride).take(c).enumerate() {
            for (to, from) in turned.chunks_exact_mut(wide).zip(k) {
                to[j] = *from;
            }
        }
        for (o, rows) in [(&mut self.with_keys, x.k), (&mut self.with_queries, x.q)] {
            let o = sized(o, c * wide);
            o.fill(0.0);
            product(s, o, Factor { data: rows, row: x.stride, column: 1 }, turned, wide);
        }
    }
}

/// A chunk at once, with its pairs. `o`: `[C, V]`; `held`: `[held]`.
#[inline(always)]
pub(crate) fn chunk<S: Simd>(
    s: S,
    o: &mut [f32],
    held: &mut [f32],
    x: &Chunk<'_>,
    Pairs { with_keys, with_queries, .. }: &Pairs,
    room: &mut Room,
) {
    let (c, key, value) = (x.g.len(), x.key, x.value);
    let state = settled(s, held, key, value);
    let Room { decay, a, scores, read, values, keys } = room;
    // [C, C]: exp(G_i - G_j) on and below the diagonal. G_i - G_j is the sum of the gates between: a
    // difference of two large sums has lost what a small gate said.
    let decay = sized(decay, c * c);
    for i in 0..c {
        let (done, row) = decay.split_at_mut(i * c);
        row[..c].fill(f32::NEG_INFINITY);
        row[i] = 0.0;
        if 0 < i {
            for (to, from) in row[..i].iter_mut().zip(&done[(i - 1) * c..]) {
                *to = from + x.g[i];
            }
        }
    }
    map(
        s,
        decay,
        #[inline(always)]
        |x| s.exp(x),
    );
    // [C, C]: the first strictly lower.
    let wide = c.next_multiple_of(LANES);
    let (a, scores) = (sized(a, c * c), sized(scores, c * c));
    for i in 0..c {
        let decay = &decay[i * c..][..c];
        let beta = -x.beta[i];
        let (own, above) = a[i * c..][..c].split_at_mut(i);
        for ((a, sum), decay) in own.iter_mut().zip(&with_keys[i * wide..]).zip(decay) {
            *a = beta * sum * decay;
        }
        above.fill(0.0);
        let (own, above) = scores[i * c..][..c].split_at_mut(i + 1);
        for ((score, sum), decay) in own.iter_mut().zip(&with_queries[i * wide..]).zip(decay) {
            *score = sum * decay;
        }
        above.fill(0.0);
    }
    // [C, V]: what the state says of each key, then of each query.
    let read = sized(read, c * value);
    let strided = |data| Factor { data, row: x.stride, column: 1 };
    read.fill(0.0);
    product(s, read, strided(x.k), state, value);
    let values = sized(values, c * value);
    let mut sum = 0.0;
    for i in 0..c {
        let new = &mut values[i * value..][..value];
        sum += x.g[i];
        let (decay, beta) = (sum.exp(), x.beta[i]);
        let v = &x.v[i * x.stride..][..value];
        for ((new, v), read) in new.iter_mut().zip(v).zip(&read[i * value..]) {
            *new = beta * (v - decay * read);
        }
    }
    solve(s, values, a, value);
    o.fill(0.0);
    product(s, o, strided(x.q), state, value);
    let mut sum = 0.0;
    for (o, g) in o.chunks_exact_mut(value).zip(x.g) {
        sum += g;
        let decay = s.splat(sum.exp());
        map(
            s,
            o,
            #[inline(always)]
            |x| s.mul(x, decay),
        );
    }
    add_lower(s, o, scores, values, value);
    // S <- exp(G_last) S + (exp(G_last - G) K)' Vn
    let last = s.splat(sum.exp());
    map(
        s,
        state,
        #[inline(always)]
        |x| s.mul(x, last),
    );
    let keys = sized(keys, c * key);
    for (i, keys) in keys.chunks_exact_mut(key).enumerate() {
        let left = decay[(c - 1) * c + i];
        for (to, from) in keys.iter_mut().zip(&x.k[i * x.stride..]) {
            *to = left * from;
        }
    }
    product(s, state, Factor { data: keys, row: 1, column: key }, values, value);
}

/// Rows that are taken together where one row depends on those before it.
const TOGETHER: usize = 8;

/// `x_i += sum_{j < i} a_ij x_j`, in the order of `i`. `x`: `[C, V]`; `a`: `[C, C]`.
#[inline(always)]
fn solve<S: Simd>(s: S, x: &mut [f32], a: &[f32], v: usize) {
    let c = x.len() / v;
    for start in (0..c).step_by(TOGETHER) {
        let end = (start + TOGETHER).min(c);
        let (done, rest) = x.split_at_mut(start * v);
        let now = &mut rest[..(end - start) * v];
        product(s, now, Factor { data: &a[start * c..], row: c, column: 1 }, done, v);
        for i in start + 1..end {
            let (done, new) = now.split_at_mut((i - start) * v);
            let factor = Factor { data: &a[i * c + start..], row: c, column: 1 };
            s.accumulate(&mut new[..v], factor, done, v);
        }
    }
}

/// `o_i += sum_{j <= i} a_ij x_j`. What stands above the diagonal is left out, not multiplied by
/// zero: a later token that is NaN is nothing to an earlier one. `o`, `x`: `[C, V]`; `a`: `[C, C]`.
#[inline(always)]
fn add_lower<S: Simd>(s: S, o: &mut [f32], a: &[f32], x: &[f32], v: usize) {
    let c = x.len() / v;
    for start in (0..c).step_by(TOGETHER) {
        let end = (start + TOGETHER).min(c);
        let now = &mut o[start * v..end * v];
        product(s, now, Factor { data: &a[start * c..], row: c, column: 1 }, &x[..start * v], v);
        for i in start..end {
            let factor = Factor { data: &a[i * c + start..], row: c, column: 1 };
            s.accumulate(&mut now[(i - start) * v..][..v], factor, &x[start * v..(i + 1) * v], v);
        }
    }
}

/// A problem of the op: of each key head and value head a row `[q | k | v]` per token.
pub(crate) struct Packed {
    /// `[HV, N, 2 K + V]`, queries and keys as they come.
    rows: Vec<f32>,
    /// `[HV, N]`.
    g: Vec<f32>,
    /// `[HV, N]`.
    beta: Vec<f32>,
    /// `[S, HV, K, V]`.
    state: Vec<f32>,
    cu_seqlens: Vec<usize>,
    sizes: Sizes,
    eps: f32,
}

impl Fast for GatedDeltaRule {
    type Packed<E: Wide> = Packed;

    fn pack<E: Wide>(spec: &Spec<Case>, x: &Inputs, _: Reads) -> Packed {
        let Case { hk, hv, k, v, .. } = spec.case;
        let n = x.v.dim().0;
        let mut packed = Packed {
            rows: Vec::with_capacity(hv * n * (2 * k + v)),
            g: x.g.t().iter().copied().collect(),
            beta: x.beta.t().iter().copied().collect(),
            state: flat(&x.state),
            cu_seqlens: x.cu_seqlens.iter().map(|&at| at as usize).collect(),
            sizes: Sizes { hk, hv, k, v },
            eps: x.eps as f32,
        };
        for head in 0..hv {
            let key = head / (hv / hk);
            for t in 0..n {
                packed.rows.extend(x.q.slice(s![t, key, ..]));
                packed.rows.extend(x.k.slice(s![t, key, ..]));
                packed.rows.extend(x.v.slice(s![t, head, ..]));
            }
        }
        packed
    }

    fn run<S: Simd, E: Wide>(s: S, x: &Packed, o: &mut Outputs, plant: Planted) {
        let Sizes { hv, k, v, .. } = x.sizes;
        let (stride, n) = (2 * k + v, x.g.len() / hv);
        let (out, state) = (flat_mut(&mut o.o), flat_mut(&mut o.state));
        state.copy_from_slice(&x.state);
        if plant.is(INITIAL_STATE_IGNORED.name) {
            state.fill(0.0);
        }
        let states: Vec<_> = state.chunks_exact_mut(k * v).map(Mutex::new).collect();
        let scale = 1.0 / (k as f32).sqrt();
        pool::parts(out, &x.cu_seqlens, v, |sequence, mut part| {
            let head = part.columns.start / v;
            let state = states[sequence * hv + head].lock();
            let mut state = state.unwrap_or_else(PoisonError::into_inner);
            let tokens = head * n + part.rows.start..head * n + part.rows.end;
            let mut held = vec![0.0; held_len(k, v)];
            hold(&mut held, state.iter().copied(), k, v);
            let mut rows = x.rows[tokens.start * stride..tokens.end * stride].to_vec();
            let mut answer = vec![f32::NAN; tokens.len() * v];
            s.run(
                #[inline(always)]
                || {
                    for row in rows.chunks_exact_mut(stride) {
                        l2_norm_row(s, &mut row[..k], x.eps, scale);
                        l2_norm_row(s, &mut row[k..2 * k], x.eps, 1.0);
                    }
                    let (mut pairs, mut room) = (Pairs::default(), Room::default());
                    for (i, o) in answer.chunks_mut(CHUNK * v).enumerate() {
                        let c = o.len() / v;
                        if plant.is(STATE_RESET_AT_ONE_CHUNK.name) && i == 1 {
                            settled(s, &mut held, k, v).fill(0.0);
                        }
                        let from = &rows[i * CHUNK * stride..];
                        let at = tokens.start + i * CHUNK;
                        let x = Chunk {
                            q: from,
                            k: &from[k..],
                            v: &from[2 * k..],
                            stride,
                            g: &x.g[at..at + c],
                            beta: &x.beta[at..at + c],
                            key: k,
                            value: v,
                        };
                        if tokens.len() <= STEPS {
                            steps(s, o, &mut held, &x);
                        } else {
                            pairs.of(s, &x);
                            chunk(s, o, &mut held, &x, &pairs, &mut room);
                        }
                    }
                    state.copy_from_slice(settled(s, &mut held, k, v));
                },
            );
            for (i, o) in answer.chunks_exact(v).enumerate() {
                part.row(i).copy_from_slice(o);
            }
        });
    }
}
