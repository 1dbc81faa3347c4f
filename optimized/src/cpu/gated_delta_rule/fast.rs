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
    simd::{Factor, LANES, Simd, Wide, each, lanes, lanes_mut, map, outer},
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

/// One token after the other. `o`: `[C, V]`; `state`: `[K, V]`. While this state is at hand, memory is asked for
/// as much behind it: the state of the next head, if there is `more`.
#[inline(always)]
pub(crate) fn steps<S: Simd>(
    s: S,
    o: &mut [f32],
    state: &mut [f32],
    more: bool,
    x: &Chunk<'_>,
    room: &mut Room,
) {
    let d = sized(&mut room.values, x.value);
    for (i, o) in o.chunks_exact_mut(x.value).enumerate() {
        let v = &x.v[i * x.stride..][..x.value];
        let x = Step {
            decay: x.g[i].exp(),
            beta: x.beta[i],
            k: &x.k[i * x.stride..][..x.key],
            q: &x.q[i * x.stride..][..x.key],
            more: more && i == 0,
        };
        if S::REGISTERS == 32 {
            read::<S, 8>(s, d, state, v, x);
            write_and_answer::<S, 8>(s, o, state, d, x);
        } else {
            read::<S, 2>(s, d, state, v, x);
            write_and_answer::<S, 2>(s, o, state, d, x);
        }
    }
}

/// What there is of a token beside its value.
#[derive(Clone, Copy)]
struct Step<'a> {
    decay: f32,
    beta: f32,
    k: &'a [f32],
    q: &'a [f32],
    /// Whether memory is asked for what lies behind the state.
    more: bool,
}

/// `d <- beta (v - decay S' k)`, in one walk through the state, or in several of `C` vectors.
#[inline(always)]
fn read<S: Simd, const C: usize>(s: S, d: &mut [f32], state: &[f32], v: &[f32], x: Step<'_>) {
    let j = d.len();
    let (decay, beta) = (s.splat(-x.decay), s.splat(x.beta));
    let mut at = 0;
    while at + C * LANES <= j {
        let mut sums = [s.splat(0.0); C];
        // The first half of what lies behind.
        let mut asked = state.len() + at * x.k.len() / 2;
        for (row, &k) in state.chunks_exact(j).zip(x.k) {
            let k = s.splat(k);
            for c in 0..C {
                if x.more && c % 2 == 0 {
                    s.ahead(state, asked);
                    asked += LANES;
                }
                sums[c] = s.fma(k, s.load(lanes(&row[at + c * LANES..])), sums[c]);
            }
        }
        for (c, sum) in sums.into_iter().enumerate() {
            let at = at + c * LANES;
            let new = s.mul(beta, s.fma(decay, sum, s.load(lanes(&v[at..]))));
            s.store(lanes_mut(&mut d[at..]), new);
        }
        at += C * LANES;
    }
    if at < j {
        d[at..].fill(0.0);
        for (row, &k) in state.chunks_exact(j).zip(x.k) {
            for (d, s) in d[at..].iter_mut().zip(&row[at..]) {
                *d += k * s;
            }
        }
        for (d, v) in d[at..].iter_mut().zip(&v[at..]) {
            *d = x.beta * (v - x.decay * *d);
        }
    }
}

/// `S <- decay S + k d'`, `o = S' q`, in one walk through the state, or in several of `C` vectors. The walk is
/// backwards: what was read last is nearest.
#[inline(always)]
fn write_and_answer<S: Simd, const C: usize>(
    s: S,
    o: &mut [f32],
    state: &mut [f32],
    d: &[f32],
    x: Step<'_>,
) {
    let (j, len) = (o.len(), state.len());
    let decay = s.splat(x.decay);
    let mut at = 0;
    while at + C * LANES <= j {
        let d: [S::F; C] = each(
            s.splat(0.0),
            #[inline(always)]
            |c| s.load(lanes(&d[at + c * LANES..])),
        );
        let mut sums = [s.splat(0.0); C];
        // The second half of what lies behind.
        let mut asked = len / 2 + at * x.k.len() / 2;
        for (i, (&k, &q)) in x.k.iter().zip(x.q).enumerate().rev() {
            let row = &mut state[i * j..];
            let (k, q) = (s.splat(k), s.splat(q));
            for c in 0..C {
                if x.more && c % 2 == 0 {
                    s.ahead(row, len - i * j + asked);
                    asked += LANES;
                }
                let place = lanes_mut(&mut row[at + c * LANES..]);
                let new = s.fma(k, d[c], s.mul(decay, s.load(place)));
                s.store(place, new);
                sums[c] = s.fma(q, new, sums[c]);
            }
        }
        for (c, sum) in sums.into_iter().enumerate() {
            s.store(lanes_mut(&mut o[at + c * LANES..]), sum);
        }
        at += C * LANES;
    }
    if at < j {
        o[at..].fill(0.0);
        for ((row, &k), &q) in state.chunks_exact_mut(j).zip(x.k).zip(x.q).rev() {
            for ((s, d), o) in row[at..].iter_mut().zip(&d[at..]).zip(&mut o[at..]) {
                *s = x.decay * *s + k * d;
                *o += q * *s;
            }
        }
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

/// A chunk at once, with its pairs. `o`: `[C, V]`; `state`: `[K, V]`.
#[inline(always)]
pub(crate) fn chunk<S: Simd>(
    s: S,
    o: &mut [f32],
    state: &mut [f32],
    x: &Chunk<'_>,
    Pairs { with_keys, with_queries, .. }: &Pairs,
    room: &mut Room,
) {
    let (c, key, value) = (x.g.len(), x.key, x.value);
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
                            state.fill(0.0);
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
                            steps(s, o, &mut state, false, &x, &mut room);
                        } else {
                            pairs.of(s, &x);
                            chunk(s, o, &mut state, &x, &pairs, &mut room);
                        }
                    }
                },
            );
            for (i, o) in answer.chunks_exact(v).enumerate() {
                part.row(i).copy_from_slice(o);
            }
        });
    }
}
