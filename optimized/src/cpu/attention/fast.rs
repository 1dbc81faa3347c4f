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

use half::bf16;

use super::paired::Paired;
use crate::cpu::{
    aligned::{Aligned, LINE},
    linear::activations::Reads,
    pool,
    portable::Planted,
    room::room,
    simd::{self, Factor, LANES, Simd, Wide, map, padded},
    vector::{Fast, flat, flat_mut},
};

/// Keys of a block; pages hold whole blocks, and stretches whole pages.
const KEYS: usize = 64;

/// Keys that share a softmax.
const STRETCH: usize = 2048;

/// Tokens that read a block together: a long cache is walked once for so many.
const TOKENS: usize = 16;

/// Rows (of tokens and their heads) up to which memory sets the pace, and is asked for what comes next.
const FEW: usize = 16;

/// Keys and values of one sequence in one layer; pages are shared with snapshots until they are
/// written to.
#[derive(Clone)]
pub(crate) struct Pages<P> {
    len: usize,
    all: Vec<Arc<P>>,
    pub(super) heads: usize,
    pub(super) h: usize,
}

/// Keys and values of so many tokens.
pub(crate) trait Paged: Clone {
    /// How many: those of the model fill a huge page.
    const TOKENS: usize;
}

impl<P: Paged> Pages<P> {
    /// Tokens of a page.
    pub(super) const TOKENS: usize = P::TOKENS;

    pub(crate) fn new(heads: usize, h: usize) -> Self {
        Pages { len: 0, all: Vec::new(), heads, h }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Drops all but the first `len` tokens.
    pub(super) fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        self.all.truncate(self.len.div_ceil(Self::TOKENS));
    }

    /// The page of a token.
    pub(super) fn of(&self, token: usize) -> &P {
        &self.all[token / Self::TOKENS]
    }

    /// Changes every page.
    pub(super) fn each(&mut self, change: impl Fn(&mut P)) {
        self.all.iter_mut().for_each(|page| change(Arc::make_mut(page)));
    }

    #[cfg(test)]
    pub(super) fn first(&self) -> Option<&P> {
        self.all.first().map(|page| &**page)
    }

    /// Room for one more token: its page, and which token of the page it is.
    pub(super) fn next(&mut self, fresh: impl FnOnce(&Self) -> P) -> (&mut P, usize) {
        let at = self.len % Self::TOKENS;
        if at == 0 {
            let page = Arc::new(fresh(self));
            self.all.push(page);
        }
        self.len += 1;
        (Arc::make_mut(self.all.last_mut().expect("a page with room")), at)
    }
}

/// Keys and values as they come, in f32 or bf16.
pub(crate) type Cache<C> = Pages<Page<C>>;

/// `[HKV, TOKENS, H]` each.
pub(crate) struct Page<C> {
    k: Aligned<C>,
    v: Aligned<C>,
}

impl<C: Wide> Paged for Page<C> {
    const TOKENS: usize = 1024;
}

impl<C: Wide> Clone for Page<C> {
    fn clone(&self) -> Self {
        Page { k: self.k.clone(), v: self.v.clone() }
    }
}

/// Keys and values of one sequence in one layer, in some type and layout.
pub(crate) trait Cached: Clone + Send + Sync {
    /// Tokens of a page, and its bytes.
    fn page(&self) -> [usize; 2];

    /// Tokens that it holds.
    fn len(&self) -> usize;

    /// Drops all but the first `len` tokens.
    fn truncate(&mut self, len: usize);

    /// Adds a token: `k` and `v` are `[HKV, H]`.
    fn push(&mut self, k: &[f32], v: &[f32]);

    /// Numbers that a row is summed in, the channels of a head at least.
    fn wide(&self) -> usize;

    /// Adds some keys, which begin at a block, to the softmax of a task's rows.
    fn stretch<S: Simd>(&self, s: S, task: &Task<'_>, keys: Range<usize>, softmax: Softmax<'_>);
}

impl<C: Wide> Cache<C> {
    /// Bytes of the first page, as it was allocated.
    #[cfg(test)]
    pub(crate) fn held(&self) -> usize {
        self.first().map_or(0, |page| size_of::<C>() * (page.k.len() + page.v.len()))
    }

    /// Keys and values of some tokens of one page, `[keys, H]` each.
    fn block(&self, head: usize, keys: &Range<usize>) -> (&[C], &[C]) {
        let page = self.of(keys.start);
        let from = (head * Self::TOKENS + keys.start % Self::TOKENS) * self.h;
        let place = from..from + keys.len() * self.h;
        (&page.k[place.clone()], &page.v[place])
    }
}

impl<C: Wide> Cached for Cache<C> {
    fn page(&self) -> [usize; 2] {
        let tokens = Self::TOKENS;
        [tokens, 2 * self.heads * tokens * self.h * size_of::<C>()]
    }

    fn len(&self) -> usize {
        self.len()
    }

    fn truncate(&mut self, len: usize) {
        self.truncate(len);
    }

    fn push(&mut self, k: &[f32], v: &[f32]) {
        let h = self.h;
        let (page, at) = self.next(|own| {
            let room = || Aligned::new(C::NAN, own.heads * Self::TOKENS * h);
            Page { k: room(), v: room() }
        });
        for (to, from) in [(&mut page.k, k), (&mut page.v, v)] {
            for (head, from) in from.chunks_exact(h).enumerate() {
                let to = &mut to[(head * Self::TOKENS + at) * h..][..h];
                for (to, from) in to.iter_mut().zip(from) {
                    *to = C::store(*from);
                }
            }
        }
    }

    fn wide(&self) -> usize {
        self.h
    }

    #[inline(always)]
    fn stretch<S: Simd>(
        &self,
        s: S,
        task: &Task<'_>,
        keys: Range<usize>,
        mut softmax: Softmax<'_>,
    ) {
        let (h, rows) = (self.h, task.rows());
        let q: Vec<f32> = task.queries().flatten().copied().collect();
        let mut scores = Aligned::zeros(rows * KEYS);
        // Few rows leave memory time: while a block's scores are made, its values come nearer.
        let few = rows <= FEW;
        let share = (h * size_of::<C>() / LINE).div_ceil(rows);
        for start in keys.clone().step_by(KEYS) {
            let block = start..(start + KEYS).min(keys.end);
            let (k, v) = self.block(task.head, &block);
            let n = block.len();
            let next = block.end..(block.end + KEYS).min(keys.end);
            let later = if few && !next.is_empty() { self.block(task.head, &next).0 } else { &[] };
            let mut asked = 0;
            s.products(
                simd::Rows::whole(k, h),
                simd::Rows::whole(&q, h),
                #[inline(always)]
                |key, row, x| {
                    scores[row * n + key] = x;
                    if few {
                        for _ in 0..share {
                            s.ahead(v, asked);
                            asked += LINE / size_of::<C>();
                        }
                    }
                },
            );
            let visible = |row| task.seen(row).saturating_sub(start).min(n);
            let scores = &mut scores[..rows * n];
            for (row, scores) in scores.chunks_exact_mut(n).enumerate() {
                softmax.add(s, row, scores, visible(row), (task.scale, None));
            }
            if few {
                for at in (0..later.len()).step_by(LINE / size_of::<C>()) {
                    s.ahead(later, at);
                }
            }
            // What a token does not see is not multiplied by zero, which would let a NaN through:
            // tokens that see different keys are summed apart.
            let together = if visible(0) == n { rows } else { task.group };
            for (i, sum) in softmax.sum.chunks_mut(together * h).enumerate() {
                let p = Factor { data: &scores[i * together * n..], row: n, column: 1 };
                s.accumulate(sum, p, &v[..visible(i * together) * h], h);
            }
        }
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
/// `o`: `[N, HQ H]`; `q`, `gate`: `[N, HQ, H]`; `cu_seqlens`: rows of the sequences.
pub(crate) fn attention<S: Simd, C: Cached>(
    s: S,
    o: &mut [f32],
    (q, gate): (&[f32], &[f32]),
    caches: &[&C],
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
    let wide = caches.first().map_or(0, |cache| cache.wide());
    debug_assert!(caches.iter().all(|cache| cache.wide() == wide), "caches of one kind");
    let tokens = blocks.windows(2).map(|block| block[1] - block[0]).max().unwrap_or(0);
    let shape = Shape { rows: tokens * group, wide };
    // All that a task has to know, side by side: every line of memory that another thread wrote is waited for.
    let mut stretches = 0;
    let mut walk = |block: usize, head: usize| {
        let cache = caches[of[block]];
        let task = Task {
            q,
            tokens: blocks[block]..blocks[block + 1],
            before: cache.len().wrapping_sub(cu_seqlens[of[block] + 1]),
            head,
            group,
            hq,
            h,
            scale: 1.0 / (h as f32).sqrt(),
        };
        let first = stretches;
        stretches += task.seen(task.rows() - 1).div_ceil(STRETCH);
        Walk { task, cache, stretches: first..stretches }
    };
    let each = (0..of.len()).flat_map(|block| (0..hkv).map(move |head| (block, head)));
    let walks: Vec<_> = each.map(|(block, head)| walk(block, head)).collect();
    // Where each has one stretch at the most, nothing is left to spread.
    let spread = walks.len() < stretches.min(4 * rayon::current_num_threads());
    let mut partial = room(if spread { stretches * shape.len() } else { 0 });
    pool::pieces(&mut partial, shape.len(), |i, place| {
        let walk = &walks[walks.partition_point(|walk| walk.stretches.end <= i)];
        walk.stretch(s, i - walk.stretches.start, shape, place);
    });
    pool::parts(o, &blocks, group * h, |block, mut part| {
        let head = part.columns.start / (group * h);
        let walk = &walks[block * hkv + head];
        let mut own = room(if spread { 0 } else { walk.stretches.len() * shape.len() });
        for (i, place) in own.chunks_exact_mut(shape.len()).enumerate() {
            walk.stretch(s, i, shape, place);
        }
        let softmaxes = if spread {
            &partial[walk.stretches.start * shape.len()..walk.stretches.end * shape.len()]
        } else {
            &own
        };
        s.run(
            #[inline(always)]
            || {
                for (i, token) in part.rows.clone().enumerate() {
                    let o = part.row(i);
                    for (g, o) in o.chunks_exact_mut(h).enumerate() {
                        join(s, o, softmaxes, shape, i * group + g);
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
#[derive(Clone)]
pub(crate) struct Task<'a> {
    /// `[N, HQ, H]`.
    q: &'a [f32],
    tokens: Range<usize>,
    /// The position of token `n` is `before + n`; wraps.
    before: usize,
    /// The key/value head.
    pub(crate) head: usize,
    /// Query heads of a key/value head.
    pub(crate) group: usize,
    hq: usize,
    h: usize,
    /// What scores are multiplied by.
    pub(crate) scale: f32,
}

impl Task<'_> {
    pub(crate) fn rows(&self) -> usize {
        self.tokens.len() * self.group
    }

    /// Keys that a row sees.
    pub(crate) fn seen(&self, row: usize) -> usize {
        self.before.wrapping_add(self.tokens.start + row / self.group + 1)
    }

    /// `[rows][H]`.
    pub(crate) fn queries(&self) -> impl Iterator<Item = &[f32]> {
        let rows = self.tokens.clone().flat_map(|token| {
            let first = token * self.hq + self.head * self.group;
            first..first + self.group
        });
        rows.map(|row| &self.q[row * self.h..][..self.h])
    }
}

/// A task, the cache that it reads, and which of all stretches of keys are its.
struct Walk<'a, C> {
    task: Task<'a>,
    cache: &'a C,
    stretches: Range<usize>,
}

impl<C: Cached> Walk<'_, C> {
    /// Fills the place of a softmax, that of the walk's `stretch`.
    fn stretch<S: Simd>(&self, s: S, stretch: usize, shape: Shape, place: &mut [f32]) {
        // A copy: read through the reference, 1024 keys take 3 % longer.
        let task = &self.task.clone();
        let end = task.seen(task.rows() - 1).min((stretch + 1) * STRETCH);
        s.run(
            #[inline(always)]
            || {
                let softmax = Softmax::new(shape, place, task.rows());
                self.cache.stretch(s, task, stretch * STRETCH..end, softmax);
            },
        );
    }
}

/// Rows of a softmax at the most, and numbers that each is summed in.
#[derive(Clone, Copy)]
struct Shape {
    rows: usize,
    wide: usize,
}

impl Shape {
    /// Numbers of a softmax, whole lines of memory.
    fn len(self) -> usize {
        (self.rows * (self.wide + 2)).next_multiple_of(LINE / size_of::<f32>()).max(1)
    }

    /// The sums, the largest scores and the totals.
    fn split<T>(self, place: T, at: impl Fn(T, usize) -> (T, T)) -> [T; 3] {
        let (sum, rest) = at(place, self.rows * self.wide);
        let (max, total) = at(rest, self.rows);
        [sum, max, total]
    }
}

/// What is known of the softmax of some rows over a stretch of keys.
///
/// Powers are those of two, `2^(c score - c max)` with `c = log2(e) scale`: a score is scaled and shifted in one
/// step, and rounded once.
pub(crate) struct Softmax<'a> {
    /// Largest scores, times `c`.
    max: &'a mut [f32],
    /// Sums of powers.
    total: &'a mut [f32],
    /// `[rows, H]` sums of powers times `v`; rows may be filled up.
    pub(crate) sum: &'a mut [f32],
}

impl<'a> Softmax<'a> {
    /// Of no key yet.
    fn new(shape: Shape, place: &'a mut [f32], rows: usize) -> Softmax<'a> {
        let [sum, max, total] = shape.split(place, <[f32]>::split_at_mut);
        let (sum, max, total) =
            (&mut sum[..rows * shape.wide], &mut max[..rows], &mut total[..rows]);
        sum.fill(0.0);
        max.fill(f32::NEG_INFINITY);
        total.fill(0.0);
        Softmax { max, total, sum }
    }

    /// Scores of a block of keys become probabilities beside the largest score so far; what was summed before is
    /// scaled down to it. Of the block the first `visible` keys count; `scale` is above zero.
    ///
    /// Where keys and values count steps, scores are scaled by those of keys as well, and what is left in place of
    /// scores are probabilities scaled by those of values; returned is their largest size, without steps zero.
    #[inline(always)]
    pub(crate) fn add<S: Simd>(
        &mut self,
        s: S,
        row: usize,
        scores: &mut [f32],
        visible: usize,
        (scale, steps): (f32, Option<[&[f32]; 2]>),
    ) -> f32 {
        let (scores, hidden) = scores.split_at_mut(visible);
        hidden.fill(0.0);
        let steps = steps.map(|steps| steps.map(|steps| steps[..visible].as_chunks()));
        let (whole, rest) = scores.as_chunks_mut::<LANES>();
        let mut most = s.splat(f32::NEG_INFINITY);
        for (i, x) in whole.iter().enumerate() {
            most = s.max(most, score(s, x, steps, i));
        }
        if let Some([(_, keys), _]) = steps {
            rest.iter_mut().zip(keys).for_each(|(x, step)| *x *= step);
        }
        let c = std::f32::consts::LOG2_E * scale;
        let before = self.max[row];
        let max = before.max(c * rest.iter().copied().fold(s.largest(most), f32::max));
        // Of the first block nothing is kept: 2^-inf = 0. As a rule the largest stays the largest.
        if before != max {
            let (h, kept) = (self.sum.len() / self.max.len(), (before - max).exp2());
            self.max[row] = max;
            self.total[row] *= kept;
            let kept = s.splat(kept);
            map(
                s,
                &mut self.sum[row * h..][..h],
                #[inline(always)]
                |x| s.mul(x, kept),
            );
        }
        let (c, shift) = (s.splat(c), s.splat(-max));
        let (mut total, mut most) = (s.splat(0.0), s.splat(0.0));
        for (i, x) in whole.iter_mut().enumerate() {
            let mut p = s.exp2(s.fma(score(s, x, steps, i), c, shift));
            total = s.add(total, p);
            if let Some([_, (values, _)]) = steps {
                p = s.mul(p, s.load::<f32>(&values[i]));
                most = s.sizes(most, p);
            }
            s.store(x, p);
        }
        map(
            s,
            rest,
            #[inline(always)]
            |x| s.exp2(s.fma(x, c, shift)),
        );
        self.total[row] += s.sum(total) + rest.iter().sum::<f32>();
        let Some([_, (_, values)]) = steps else { return 0.0 };
        rest.iter_mut().zip(values).for_each(|(x, step)| *x *= step);
        s.size(s.sizes(most, s.load(&padded(rest))))
    }
}

/// Whole vectors of steps of keys and of values, and what is left of each.
type Steps<'a> = Option<[(&'a [[f32; LANES]], &'a [f32]); 2]>;

/// The `i`-th vector of scores, scaled by the steps of its keys. That it is scaled twice takes less than to write it.
#[inline(always)]
fn score<S: Simd>(s: S, x: &[f32; LANES], steps: Steps<'_>, i: usize) -> S::F {
    let x = s.load::<f32>(x);
    match steps {
        Some([(keys, _), _]) => s.mul(x, s.load::<f32>(&keys[i])),
        None => x,
    }
}

/// One row of all stretches, joined in their order.
#[inline(always)]
fn join<S: Simd>(s: S, o: &mut [f32], softmaxes: &[f32], shape: Shape, row: usize) {
    let h = o.len();
    let softmaxes = || {
        softmaxes.chunks_exact(shape.len()).map(
            #[inline(always)]
            |place| {
                let [sum, max, total] = shape.split(place, <[f32]>::split_at);
                (max[row], total[row], &sum[row * shape.wide..][..h])
            },
        )
    };
    let max = softmaxes().map(|(max, ..)| max).fold(f32::NEG_INFINITY, f32::max);
    let seen = || softmaxes().filter(|(own, ..)| *own != f32::NEG_INFINITY);
    let scale = |own: f32| if own == max { 1.0 } else { (own - max).exp2() };
    let sum: f32 = seen().map(|(own, total, _)| scale(own) * total).sum();
    // No score was a number above -inf: neither is the answer one.
    o.fill(if sum == 0.0 { f32::NAN } else { 0.0 });
    for (own, _, x) in seen() {
        crate::cpu::simd::add_scaled(s, o, scale(own) / sum, x);
    }
}

/// A gate whose sigmoid is one.
const OPEN: f32 = 100.0;

/// A problem of the op: queries, caches of keys and values in `E`, or for products of pairs.
pub(crate) struct Packed<E> {
    q: Vec<f32>,
    gate: Vec<f32>,
    caches: Caches<E>,
    cu_seqlens: Vec<usize>,
    sizes: Sizes,
}

enum Caches<E> {
    Plain(Vec<Cache<E>>),
    Paired(Vec<Paired<bf16>>),
    Int8(Vec<Paired<i8>>),
}

/// One cache per sequence.
fn caches<C: Cached>(x: &Inputs, new: impl Fn() -> C) -> Vec<C> {
    let (k, v) = (flat(&x.k), flat(&x.v));
    let width = k.len() / x.k.dim().0.max(1);
    let cache = |keys: &Range<usize>| {
        let mut cache = new();
        for row in keys.clone() {
            let at = row * width..(row + 1) * width;
            cache.push(&k[at.clone()], &v[at]);
        }
        cache
    };
    rows(&x.cu_seqlens_k).iter().map(cache).collect()
}

impl Fast for Attention {
    type Packed<E: Wide> = Packed<E>;

    fn pack<E: Wide>(spec: &Spec<Case>, x: &Inputs, reads: Reads) -> Packed<E> {
        let Case { hq, hkv, h, .. } = spec.case;
        Packed {
            q: flat(&x.q),
            gate: x.gate.as_ref().map_or_else(|| vec![OPEN; x.q.len()], flat),
            caches: match reads {
                Reads::Bf16 => Caches::Paired(caches(x, || Paired::new(hkv, h))),
                Reads::Int8 => Caches::Int8(caches(x, || Paired::new(hkv, h))),
                Reads::F32 => Caches::Plain(caches(x, || Cache::new(hkv, h))),
            },
            cu_seqlens: x.cu_seqlens_q.iter().map(|&at| at as usize).collect(),
            sizes: Sizes { hq, hkv, h },
        }
    }

    fn run<S: Simd, E: Wide>(s: S, x: &Packed<E>, o: &mut Outputs, plant: Planted) {
        let q: &Vec<f32> = if plant.is("scale-one-over-h") {
            &x.q.iter().map(|q| q / (x.sizes.h as f32).sqrt()).collect()
        } else {
            &x.q
        };
        let gate = if plant.is("gate-missing") { &vec![OPEN; x.gate.len()] } else { &x.gate };
        let (o, qg) = (flat_mut(&mut o.o), (&q[..], &gate[..]));
        let (cu, sizes) = (&x.cu_seqlens, x.sizes);
        match &x.caches {
            Caches::Plain(caches) => attention(s, o, qg, &each(caches), cu, sizes),
            Caches::Paired(caches) => attention(s, o, qg, &each(caches), cu, sizes),
            Caches::Int8(caches) => {
                let wrong: Vec<_> = match plant.0 {
                    Some("step-of-neighbour") => caches.iter().map(Paired::misplaced).collect(),
                    Some("value-step-missing") => caches.iter().map(Paired::unscaled).collect(),
                    _ => return attention(s, o, qg, &each(caches), cu, sizes),
                };
                attention(s, o, qg, &each(&wrong), cu, sizes);
            }
        }
    }
}

fn each<C>(caches: &[C]) -> Vec<&C> {
    caches.iter().collect()
}
