//! Attention over a cache in pages, on vectors.
//!
//! All query heads of a key/value head read a block of keys together, so that the cache is walked
//! once per step and not once per head. Keys are taken in stretches of [`STRETCH`], each with a
//! softmax of its own, and stretches are joined in their order: a long context spreads over threads,
//! and how a query is summed depends on its position alone.

use std::{ops::Range, sync::Arc};

use golden::{
    Spec,
    ops::attention::{Attention, Case, Inputs, Outputs},
    packed::rows,
};

use crate::cpu::{
    linear::activations::Reads,
    pool,
    portable::Planted,
    simd::{Factor, Rows, Simd, Wide, map},
    vector::{Fast, flat, flat_mut},
};

/// Tokens of a page.
const PAGE: usize = 256;

/// Keys of a block; pages hold whole blocks.
const KEYS: usize = 64;

/// Keys that share a softmax; whole pages.
const STRETCH: usize = 2048;

/// Tokens that read a block together.
const TOKENS: usize = 8;

/// Keys and values of one sequence in one layer; pages are shared with snapshots until they are
/// written to.
#[derive(Clone)]
pub(crate) struct Cache<C> {
    len: usize,
    pages: Vec<Arc<Page<C>>>,
    heads: usize,
    h: usize,
}

/// `[HKV, PAGE, H]` each.
#[derive(Clone)]
struct Page<C> {
    k: Vec<C>,
    v: Vec<C>,
}

impl<C: Wide> Cache<C> {
    pub(crate) fn new(heads: usize, h: usize) -> Self {
        Cache { len: 0, pages: Vec::new(), heads, h }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Drops all but the first `len` tokens.
    pub(crate) fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        self.pages.truncate(self.len.div_ceil(PAGE));
    }

    /// Adds a token: `k` and `v` are `[HKV, H]`.
    pub(crate) fn push(&mut self, k: &[f32], v: &[f32]) {
        let at = self.len % PAGE;
        if at == 0 {
            let room = || vec![C::NAN; self.heads * PAGE * self.h];
            self.pages.push(Arc::new(Page { k: room(), v: room() }));
        }
        let page = self.pages.last_mut().expect("a page with room");
        let page = Arc::make_mut(page);
        for (to, from) in [(&mut page.k, k), (&mut page.v, v)] {
            for (head, from) in from.chunks_exact(self.h).enumerate() {
                let to = &mut to[(head * PAGE + at) * self.h..][..self.h];
                for (to, from) in to.iter_mut().zip(from) {
                    *to = C::store(*from);
                }
            }
        }
        self.len += 1;
    }

    /// Keys and values of some tokens of one page, `[keys, H]` each.
    fn block(&self, head: usize, keys: &Range<usize>) -> (&[C], &[C]) {
        let page = &self.pages[keys.start / PAGE];
        let from = (head * PAGE + keys.start % PAGE) * self.h;
        let place = from..from + keys.len() * self.h;
        (&page.k[place.clone()], &page.v[place])
    }
}

/// Heads and their channels.
#[derive(Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) hq: usize,
    pub(crate) hkv: usize,
    pub(crate) h: usize,
}

/// `o_i = softmax_j(q_i k_j / sqrt(H)) v_j sigmoid(gate_i)` of the new tokens, whose keys are in the
/// caches already.
///
/// `o`: `[N, HQ H]`; `q`, `gate`: `[N, HQ, H]`, the query scaled; `cu_seqlens`: rows of the sequences.
pub(crate) fn attention<S: Simd, C: Wide>(
    s: S,
    o: &mut [f32],
    (q, gate): (&[f32], &[f32]),
    caches: &[&Cache<C>],
    cu_seqlens: &[usize],
    sizes: Sizes,
) {
    let Sizes { hq, hkv, h } = sizes;
    let group = hq / hkv;
    // Blocks of tokens, and stretches of keys if there are few of those.
    let mut blocks = vec![0];
    let mut of = Vec::new();
    for (sequence, pair) in cu_seqlens.windows(2).enumerate() {
        for start in (pair[0]..pair[1]).step_by(TOKENS) {
            blocks.push((start + TOKENS).min(pair[1]));
            of.push(sequence);
        }
    }
    let stretches = |block: usize| {
        let sequence = of[block];
        let seen = caches[sequence].len() - (cu_seqlens[sequence + 1] - blocks[block + 1]);
        seen.div_ceil(STRETCH)
    };
    let query = |block: usize, head: usize| Query {
        s,
        cache: caches[of[block]],
        q,
        tokens: blocks[block]..blocks[block + 1],
        before: caches[of[block]].len().wrapping_sub(cu_seqlens[of[block] + 1]),
        head,
        sizes,
    };
    let parts: Vec<(usize, usize, usize)> = (0..of.len())
        .flat_map(|b| (0..hkv).flat_map(move |head| (0..stretches(b)).map(move |i| (b, head, i))))
        .collect();
    let spread = of.len() * hkv < 4 * rayon::current_num_threads();
    let mut partial: Vec<Option<Softmax>> = vec![];
    if spread {
        partial.resize_with(parts.len(), || None);
        pool::pieces(&mut partial, 1, |i, place| {
            let (block, head, stretch) = parts[i];
            place[0] = Some(query(block, head).stretch(stretch));
        });
    }
    let first: Vec<usize> = (0..of.len() * hkv)
        .scan(0, |next, i| {
            let first = *next;
            *next += stretches(i / hkv);
            Some(first)
        })
        .collect();
    pool::parts(o, &blocks, group * h, |block, mut part| {
        let head = part.columns.start / (group * h);
        let query = query(block, head);
        let fresh;
        let softmaxes = if spread {
            &partial[first[block * hkv + head]..][..stretches(block)]
        } else {
            fresh = (0..stretches(block)).map(|i| Some(query.stretch(i))).collect::<Vec<_>>();
            &fresh
        };
        s.run(
            #[inline(always)]
            || {
                for (i, token) in part.rows.clone().enumerate() {
                    let o = part.row(i);
                    for (g, o) in o.chunks_exact_mut(h).enumerate() {
                        join(s, o, softmaxes, i * group + g);
                        let gate = &gate[(token * hq + head * group + g) * h..][..h];
                        crate::cpu::rms_norm::fast::weigh(
                            s,
                            o,
                            gate,
                            #[inline(always)]
                            |o, gate| s.mul(o, s.sigmoid(gate)),
                        );
                    }
                }
            },
        );
    });
}

/// Queries of a few tokens in the heads of one key/value head.
struct Query<'a, S, C> {
    s: S,
    cache: &'a Cache<C>,
    q: &'a [f32],
    tokens: Range<usize>,
    /// The position of token `n` is `before + n`; wraps.
    before: usize,
    head: usize,
    sizes: Sizes,
}

/// What is known of the softmax of some rows over a stretch of keys.
struct Softmax {
    max: Vec<f32>,
    /// Sums of `exp(score - max)`.
    total: Vec<f32>,
    /// `[rows, H]` sums of `exp(score - max) v`.
    sum: Vec<f32>,
}

impl<S: Simd, C: Wide> Query<'_, S, C> {
    fn stretch(&self, stretch: usize) -> Softmax {
        self.s.run(
            #[inline(always)]
            || self.stretch_here(stretch),
        )
    }

    #[inline(always)]
    fn stretch_here(&self, stretch: usize) -> Softmax {
        let (s, Sizes { hq, hkv, h }) = (self.s, self.sizes);
        let group = hq / hkv;
        let rows = self.tokens.len() * group;
        let seen = |row: usize| self.before.wrapping_add(self.tokens.start + row / group + 1);
        let mut q = Vec::with_capacity(rows * h);
        for token in self.tokens.clone() {
            let from = (token * hq + self.head * group) * h;
            q.extend_from_slice(&self.q[from..from + group * h]);
        }
        let mut softmax = Softmax {
            max: vec![f32::NEG_INFINITY; rows],
            total: vec![0.0; rows],
            sum: vec![0.0; rows * h],
        };
        let mut scores = vec![0.0; rows * KEYS];
        let end = seen(rows - 1).min((stretch + 1) * STRETCH);
        for start in (stretch * STRETCH..end).step_by(KEYS) {
            let keys = start..(start + KEYS).min(end);
            let (k, v) = self.cache.block(self.head, &keys);
            let n = keys.len();
            s.products(Rows::whole(k, h), Rows::whole(&q, h), |key, row, x| {
                scores[row * n + key] = x;
            });
            let visible = |row| seen(row).saturating_sub(start).min(n);
            let scores = &mut scores[..rows * n];
            for (row, scores) in scores.chunks_exact_mut(n).enumerate() {
                softmax.add(s, row, scores, visible(row), h);
            }
            // What a token does not see is not multiplied by zero, which would let a NaN through:
            // tokens that see different keys are summed apart.
            let together = if visible(0) == n { rows } else { group };
            for (i, sum) in softmax.sum.chunks_mut(together * h).enumerate() {
                let p = Factor { data: &scores[i * together * n..], row: n, column: 1 };
                s.accumulate(sum, p, &v[..visible(i * together) * h], h);
            }
        }
        softmax
    }
}

impl Softmax {
    /// Scores of a block of keys become probabilities beside the largest score so far; what was
    /// summed before is scaled down to it. Of the block the first `visible` keys count.
    #[inline(always)]
    fn add<S: Simd>(&mut self, s: S, row: usize, scores: &mut [f32], visible: usize, h: usize) {
        let (scores, hidden) = scores.split_at_mut(visible);
        hidden.fill(0.0);
        let max = scores.iter().copied().fold(self.max[row], f32::max);
        if visible == 0 {
            return;
        }
        // Of the first block nothing is kept: exp(-inf) = 0.
        let kept = (self.max[row] - max).exp();
        self.max[row] = max;
        let shift = s.splat(max);
        map(
            s,
            scores,
            #[inline(always)]
            |x| s.exp(s.sub(x, shift)),
        );
        self.total[row] = self.total[row] * kept + scores.iter().sum::<f32>();
        if kept != 1.0 {
            let kept = s.splat(kept);
            map(
                s,
                &mut self.sum[row * h..][..h],
                #[inline(always)]
                |x| s.mul(x, kept),
            );
        }
    }
}

/// One row of all stretches, joined in their order.
#[inline(always)]
fn join<S: Simd>(s: S, o: &mut [f32], softmaxes: &[Option<Softmax>], row: usize) {
    let h = o.len();
    let softmaxes = || softmaxes.iter().flatten();
    let max = softmaxes().map(|x| x.max[row]).fold(f32::NEG_INFINITY, f32::max);
    let mut total = 0.0;
    o.fill(0.0);
    for x in softmaxes().filter(|x| x.max[row] != f32::NEG_INFINITY) {
        let scale = (x.max[row] - max).exp();
        total += scale * x.total[row];
        crate::cpu::simd::add_scaled(s, o, scale, &x.sum[row * h..][..h]);
    }
    let total = s.splat(total);
    map(
        s,
        o,
        #[inline(always)]
        |x| s.div(x, total),
    );
}

/// A gate whose sigmoid is one.
const OPEN: f32 = 100.0;

/// A problem of the op: scaled queries, caches of keys and values in `E`.
pub(crate) struct Packed<E> {
    q: Vec<f32>,
    gate: Vec<f32>,
    caches: Vec<Cache<E>>,
    cu_seqlens: Vec<usize>,
    sizes: Sizes,
}

impl Fast for Attention {
    type Packed<E: Wide> = Packed<E>;

    fn pack<E: Wide>(spec: &Spec<Case>, x: &Inputs, _: Reads) -> Packed<E> {
        let Case { hq, hkv, h, .. } = spec.case;
        let scale = 1.0 / (h as f32).sqrt();
        let (k, v) = (flat(&x.k), flat(&x.v));
        let cache = |keys: &Range<usize>| {
            let mut cache = Cache::new(hkv, h);
            for row in keys.clone() {
                let at = row * hkv * h..(row + 1) * hkv * h;
                cache.push(&k[at.clone()], &v[at]);
            }
            cache
        };
        Packed {
            q: x.q.iter().map(|q| q * scale).collect(),
            gate: x.gate.as_ref().map_or_else(|| vec![OPEN; x.q.len()], flat),
            caches: rows(&x.cu_seqlens_k).iter().map(cache).collect(),
            cu_seqlens: x.cu_seqlens_q.iter().map(|&at| at as usize).collect(),
            sizes: Sizes { hq, hkv, h },
        }
    }

    fn run<S: Simd, E: Wide>(s: S, x: &Packed<E>, o: &mut Outputs, plant: Planted) {
        let caches: Vec<_> = x.caches.iter().collect();
        let q: &Vec<f32> = if plant.is("scale-one-over-h") {
            &x.q.iter().map(|q| q / (x.sizes.h as f32).sqrt()).collect()
        } else {
            &x.q
        };
        let gate = if plant.is("gate-missing") { &vec![OPEN; x.gate.len()] } else { &x.gate };
        attention(s, flat_mut(&mut o.o), (q, gate), &caches, &x.cu_seqlens, x.sizes);
    }
}
