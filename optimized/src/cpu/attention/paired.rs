//! Keys and values in bf16 or in eight bits, laid out for products of pairs.
//!
//! Sixteen keys stand together, two channels of each in a lane: scores of sixteen keys come out side by
//! side. Of values two keys stand together in a lane per channel: what the probabilities of two keys
//! weigh is added in one word. Nothing is added across lanes in either product, and both walk columns
//! of a block that lie one after another: two of them stay in the nearest cache while rows pass by.
//!
//! In eight bits a row of keys or values (a token in a head) is 127 steps of its largest number. What multiplies
//! them is counted as well, in steps of 16 bits: products and their sums over a block are whole numbers, which are
//! exact, and codes are widened as they are read. The step of a key scales its score, and that of a value its
//! probability.

use std::ops::Range;

use golden::{narrow::int8_code, plan::Cache};
use half::bf16;
use zerocopy::FromZeros;

use super::fast::{Cached, Paged, Pages, Softmax, Task};
use crate::cpu::{
    aligned::{Aligned, LINE},
    linear::activations::narrow,
    room::{Kept, room},
    simd::{LANES, PAIRS, Simd, each, filled, lanes, lanes_mut, padded},
};

/// Keys and values in pairs.
pub(crate) type Paired<C> = Pages<Page<C>>;

pub(crate) struct Page<C> {
    /// Keys `[HKV, TOKENS / 16, H / 2, 16, 2]`, then values `[HKV, TOKENS / KEYS, H' / 16, KEYS / 2, 16, 2]`, `H'`
    /// filled up to whole vectors.
    data: Aligned<C>,
    /// Where values begin.
    keys: usize,
    /// Steps of keys, then of values, `[2, HKV, TOKENS]`, where numbers are counted in such.
    steps: Aligned<f32>,
}

impl<C: Code> Paged for Page<C> {
    const TOKENS: usize = 2048 / size_of::<C>();
}

impl<C: Code> Clone for Page<C> {
    fn clone(&self) -> Self {
        Page { data: self.data.clone(), keys: self.keys, steps: self.steps.clone() }
    }
}

/// What a number is kept as.
pub(crate) trait Code: Copy + FromZeros + Into<f32> + Send + Sync + 'static {
    /// Whether it counts steps, which every row has one of: then it is a number whatever is kept, and so is what
    /// it is multiplied by where that is zero.
    const STEPS: bool;

    /// Pairs of which sums are exact, or as exact as they get.
    const DEEP: usize;

    /// What it is multiplied by.
    type Factor: Kept + Into<f32>;

    /// Of thirty-two products, in pairs, sums.
    type Sums<S: Simd>: Copy;

    /// Thirty-two codes or factors.
    type Pairs<S: Simd>: Copy;

    /// A row as it is kept, handed out number by number, and its step.
    fn row(x: &[f32], put: impl FnMut(usize, Self)) -> f32;

    /// The largest size in a row of factors, where they count steps.
    fn largest<S: Simd>(s: S, x: &[f32]) -> f32;

    /// A row of factors of which the largest size is `most`, and their step.
    fn factors<S: Simd>(s: S, to: &mut [Self::Factor], from: &[f32], most: f32) -> f32;

    /// Codes, ready to be multiplied.
    fn codes<S: Simd>(s: S, x: &[Self; PAIRS]) -> Self::Pairs<S>;

    /// The same two factors in every lane.
    fn pair<S: Simd>(s: S, x: [Self::Factor; 2]) -> Self::Pairs<S>;

    /// Sums that go on from those there are, if they can and there are such: not where they are `fresh`.
    fn begin<S: Simd>(s: S, o: &[f32; LANES], fresh: bool) -> Self::Sums<S>;

    /// With two more products each.
    fn add<S: Simd>(
        s: S,
        sums: Self::Sums<S>,
        a: Self::Pairs<S>,
        b: Self::Pairs<S>,
    ) -> Self::Sums<S>;

    /// What was summed, in steps of the factors, to where it belongs.
    fn end<S: Simd>(s: S, o: &mut [f32; LANES], sums: Self::Sums<S>, step: f32, fresh: bool);
}

impl Code for bf16 {
    const STEPS: bool = false;
    const DEEP: usize = usize::MAX;
    type Factor = bf16;
    type Sums<S: Simd> = S::F;
    type Pairs<S: Simd> = S::H;

    #[inline(always)]
    fn row(x: &[f32], mut put: impl FnMut(usize, bf16)) -> f32 {
        x.iter().enumerate().for_each(|(i, &x)| put(i, bf16::from_f32(x)));
        1.0
    }

    #[inline(always)]
    fn largest<S: Simd>(_: S, _: &[f32]) -> f32 {
        0.0
    }

    #[inline(always)]
    fn factors<S: Simd>(s: S, to: &mut [bf16], from: &[f32], _: f32) -> f32 {
        let ((to, to_rest), (from, from_rest)) = (to.as_chunks_mut(), from.as_chunks::<PAIRS>());
        for (to, from) in to.iter_mut().zip(from) {
            s.narrow_factors(to, two(s, from));
        }
        narrow(s, to_rest, from_rest);
        1.0
    }

    #[inline(always)]
    fn codes<S: Simd>(s: S, x: &[bf16; PAIRS]) -> S::H {
        s.halves(x)
    }

    #[inline(always)]
    fn pair<S: Simd>(s: S, x: [bf16; 2]) -> S::H {
        s.pair(x)
    }

    #[inline(always)]
    fn begin<S: Simd>(s: S, o: &[f32; LANES], fresh: bool) -> S::F {
        if fresh { s.splat(0.0) } else { s.load(o) }
    }

    #[inline(always)]
    fn add<S: Simd>(s: S, sums: S::F, a: S::H, b: S::H) -> S::F {
        s.pairs(sums, a, b)
    }

    #[inline(always)]
    fn end<S: Simd>(s: S, o: &mut [f32; LANES], sums: S::F, _: f32, _: bool) {
        s.store(o, sums);
    }
}

/// What a row counts in whose largest number is so many steps. Below the smallest normal number a step would have
/// too few digits to count in, and is none.
#[inline(always)]
fn step(most: f32, many: f32) -> f32 {
    let step = most / many;
    if step < f32::MIN_POSITIVE { 0.0 } else { step }
}

impl Code for i8 {
    const STEPS: bool = true;
    /// 512 products of 127 and 32767 stay below 2^31.
    const DEEP: usize = 256;
    type Factor = i16;
    type Sums<S: Simd> = S::I;
    type Pairs<S: Simd> = S::W;

    /// A row in which something is no number, or infinite, has no step: whoever sees it gets NaN.
    #[inline(always)]
    fn row(x: &[f32], mut put: impl FnMut(usize, i8)) -> f32 {
        let most = x.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
        let finite = x.iter().all(|x| x.is_finite());
        let step = step(most, 127.0);
        if !finite || step == 0.0 {
            (0..x.len()).for_each(|i| put(i, 0));
            return if finite { 0.0 } else { f32::NAN };
        }
        for (i, &x) in x.iter().enumerate() {
            put(i, int8_code(x, step));
        }
        step
    }

    #[inline(always)]
    fn largest<S: Simd>(s: S, x: &[f32]) -> f32 {
        let (whole, rest) = x.as_chunks::<LANES>();
        let mut most = s.sizes(s.splat(0.0), s.load(&padded(rest)));
        for x in whole {
            most = s.sizes(most, s.load(x));
        }
        s.size(most)
    }

    /// Factors of which one is no number, or infinite, are NaN together.
    #[inline(always)]
    fn factors<S: Simd>(s: S, to: &mut [i16], from: &[f32], most: f32) -> f32 {
        let step = step(most, MOST);
        if step == 0.0 || !most.is_finite() {
            to.fill(0);
            return if most.is_finite() { 0.0 } else { f32::NAN };
        }
        let by = s.splat(MOST / most);
        let from_last = filled(from, 0.0);
        let (whole, rest) = to.as_chunks_mut::<PAIRS>();
        let mut last = [0; PAIRS];
        let places = whole.iter_mut().chain((!rest.is_empty()).then_some(&mut last));
        for (to, x) in places.zip(from.as_chunks().0.iter().chain([&from_last])) {
            s.sixteens(to, two(s, x), by);
        }
        rest.copy_from_slice(&last[..rest.len()]);
        step
    }

    #[inline(always)]
    fn codes<S: Simd>(s: S, x: &[i8; PAIRS]) -> S::W {
        s.words(x)
    }

    #[inline(always)]
    fn pair<S: Simd>(s: S, x: [i16; 2]) -> S::W {
        s.word_pair(x)
    }

    #[inline(always)]
    fn begin<S: Simd>(s: S, _: &[f32; LANES], _: bool) -> S::I {
        s.int(0)
    }

    #[inline(always)]
    fn add<S: Simd>(s: S, sums: S::I, a: S::W, b: S::W) -> S::I {
        s.word_pairs(sums, a, b)
    }

    #[inline(always)]
    fn end<S: Simd>(s: S, o: &mut [f32; LANES], sums: S::I, step: f32, fresh: bool) {
        let (sum, step) = (s.number(sums), s.splat(step));
        s.store(o, if fresh { s.mul(sum, step) } else { s.fma(sum, step, s.load(o)) });
    }
}

/// Thirty-two numbers.
#[inline(always)]
fn two<S: Simd>(s: S, x: &[f32; PAIRS]) -> [S::F; 2] {
    [s.load(lanes(&x[..LANES])), s.load(lanes(&x[LANES..]))]
}

/// Steps of the largest factor.
const MOST: f32 = 32767.0;

/// What a block of keys and values holds of a head.
struct Block<'a, C> {
    /// `[KEYS / 16, H / 2, 16, 2]`.
    k: &'a [C],
    /// `[H' / 16, KEYS / 2, 16, 2]`.
    v: &'a [C],
    /// Steps of keys and of values, `[KEYS]` each, where numbers are counted in such.
    steps: Option<[&'a [f32]; 2]>,
}

/// Faults that only steps can have.
impl Paired<i8> {
    /// Every step is that of the token before it in its page.
    pub(super) fn misplaced(&self) -> Self {
        self.with(|steps| {
            steps.chunks_exact_mut(Self::TOKENS).for_each(|steps| steps.rotate_right(1));
        })
    }

    /// Values are taken for the whole numbers that they are kept as.
    pub(super) fn unscaled(&self) -> Self {
        self.with(|steps| {
            let keys = steps.len() / 2;
            steps[keys..].fill(1.0);
        })
    }

    fn with(&self, change: impl Fn(&mut [f32])) -> Self {
        let mut other = self.clone();
        other.each(|page| change(&mut page.steps));
        other
    }
}

/// Keys of a block: what is done once a row and block, beside its products, is done for so many.
const KEYS: usize = 128;

// Weights of a block are counted in the same steps, as plans say.
const _: () = assert!(KEYS == Cache::COUNTED);

/// Rows of the left factor in a tile: the query heads of a key/value head, so that keys and values are
/// read once for one token.
const ROWS: usize = 8;

/// Vectors of columns in a tile.
const COLUMNS: usize = 2;

/// Rows of a tile of one vector where registers are few.
const FEWER: usize = 4;

impl<C: Code> Paired<C> {
    /// Bytes of the first page, as it was allocated.
    #[cfg(test)]
    pub(crate) fn held(&self) -> usize {
        self.first().map_or(0, |page| size_of::<C>() * page.data.len() + 4 * page.steps.len())
    }

    /// Channels in pairs.
    fn pairs(&self) -> usize {
        self.h.div_ceil(2)
    }

    /// Channels in whole vectors.
    fn padded(&self) -> usize {
        self.h.next_multiple_of(LANES)
    }

    /// The block that begins with a token.
    fn block(&self, head: usize, start: usize) -> Block<'_, C> {
        let page = self.of(start);
        let (keys, values) = page.data.split_at(page.keys);
        let at = head * Self::TOKENS + start % Self::TOKENS;
        let (k, v) = (2 * KEYS * self.pairs(), KEYS * self.padded());
        let steps = |which| &page.steps[which * self.heads * Self::TOKENS + at..][..KEYS];
        Block {
            k: &keys[at / KEYS * k..][..k],
            v: &values[at / KEYS * v..][..v],
            steps: C::STEPS.then(|| [0, 1].map(steps)),
        }
    }

    /// Steps of a page.
    fn steps(&self) -> usize {
        if C::STEPS { 2 * self.heads * Self::TOKENS } else { 0 }
    }
}

impl<C: Code> Cached for Paired<C> {
    fn page(&self) -> [usize; 2] {
        let numbers = self.heads * Self::TOKENS * (2 * self.pairs() + self.padded());
        [Self::TOKENS, numbers * size_of::<C>() + self.steps() * size_of::<f32>()]
    }

    fn len(&self) -> usize {
        self.len()
    }

    fn truncate(&mut self, len: usize) {
        self.truncate(len);
    }

    fn push(&mut self, k: &[f32], v: &[f32]) {
        let (pairs, padded, heads, h) = (self.pairs(), self.padded(), self.heads, self.h);
        let steps = self.steps();
        let (page, at) = self.next(|_| {
            // Fillers are multiplied: they must be numbers.
            let keys = heads * Self::TOKENS * 2 * pairs;
            let data = Aligned::zeros(keys + heads * Self::TOKENS * padded);
            Page { data, keys, steps: Aligned::zeros(steps) }
        });
        let (keys, values) = page.data.split_at_mut(page.keys);
        for head in 0..heads {
            let group = head * Self::TOKENS / LANES + at / LANES;
            let to = &mut keys[group * pairs * PAIRS..][..pairs * PAIRS];
            let k_step = C::row(&k[head * h..][..h], |i, x| {
                to[i / 2 * PAIRS + at % LANES * 2 + i % 2] = x;
            });
            let block = head * Self::TOKENS / KEYS + at / KEYS;
            let to = &mut values[block * KEYS * padded..][..KEYS * padded];
            let v_step = C::row(&v[head * h..][..h], |i, x| {
                to[of_pair(i, at % KEYS / 2) + at % 2] = x;
            });
            if C::STEPS {
                page.steps[head * Self::TOKENS + at] = k_step;
                page.steps[(heads + head) * Self::TOKENS + at] = v_step;
            }
        }
    }

    fn wide(&self) -> usize {
        self.padded()
    }

    #[inline(always)]
    fn stretch<S: Simd>(
        &self,
        s: S,
        task: &Task<'_>,
        keys: Range<usize>,
        mut softmax: Softmax<'_>,
    ) {
        let (h, pairs, padded) = (self.h, self.pairs(), self.padded());
        let rows = task.rows();
        // Nobody has asked for the first keys yet.
        let first = self.block(task.head, keys.start).k;
        for at in (0..first.len()).step_by(LINE / size_of::<C>()) {
            s.ahead(first, at);
        }
        let mut q = room::<C::Factor>(rows * 2 * pairs);
        let mut q_steps = room(rows);
        for (i, (to, from)) in q.chunks_exact_mut(2 * pairs).zip(task.queries()).enumerate() {
            let (to, filler) = to.split_at_mut(h);
            q_steps[i] = C::factors(s, to, from, C::largest(s, from));
            filler.zero();
        }
        let mut scores = room(rows * KEYS);
        let mut p = room::<C::Factor>(rows * KEYS);
        let mut p_steps = room(rows);
        for start in keys.clone().step_by(KEYS) {
            let n = KEYS.min(keys.end - start);
            let Block { k, v, steps } = self.block(task.head, start);
            // While scores are made, values come nearer, and the next keys while these are weighed; those of the
            // next stretch too, which is this thread's as well.
            let next = start + KEYS;
            let later = if next < self.len() { self.block(task.head, next).k } else { &[] };
            let q = Left { rows: &q, stride: 2 * pairs, steps: &q_steps };
            // The first keys that fill vectors, if not all are there.
            let k = &k[..2 * pairs * n.next_multiple_of(LANES)];
            product(s, (&mut scores, KEYS, true), q, pairs, (k, pairs * PAIRS), v);
            let visible = |row| task.seen(row).saturating_sub(start).min(n);
            for (row, scores) in scores.chunks_exact_mut(KEYS).enumerate() {
                // In place of what is not seen there may be a NaN.
                let seen = visible(row);
                let most = softmax.add(s, row, scores, seen, (task.scale, steps));
                p_steps[row] = C::factors(s, &mut p[row * KEYS..][..KEYS], scores, most);
            }
            // What a token does not see is not multiplied by zero, which would let a NaN through:
            // tokens that see different keys are summed apart, and a key whose partner is not seen
            // alone.
            let together = if C::STEPS || visible(0) == n { rows } else { task.group };
            for (i, sum) in softmax.sum.chunks_mut(together * padded).enumerate() {
                let row = i * together;
                let p = Left { rows: &p[row * KEYS..], stride: KEYS, steps: &p_steps[row..] };
                let seen = if C::STEPS { n.next_multiple_of(2) } else { visible(row) };
                product(s, (sum, padded, false), p, seen / 2, (v, KEYS / 2 * PAIRS), later);
                if !seen.is_multiple_of(2) {
                    for (row, sum) in sum.chunks_exact_mut(padded).enumerate() {
                        let p: f32 = p.rows[row * KEYS + seen - 1].into();
                        for (i, sum) in sum.iter_mut().enumerate() {
                            *sum += p * v[of_pair(i, seen / 2)].into();
                        }
                    }
                }
            }
        }
    }
}

/// The left factor of a product: rows `stride` apart, and the steps in which each is counted.
#[derive(Clone, Copy)]
struct Left<'a, F> {
    rows: &'a [F],
    stride: usize,
    steps: &'a [f32],
}

/// Where channel `i` of a pair of keys stands in a block of values.
#[inline(always)]
fn of_pair(i: usize, pair: usize) -> usize {
    (i / LANES * KEYS / 2 + pair) * PAIRS + i % LANES * 2
}

/// `o += x panel`, or `o = x panel` where it is `fresh`. `o`: rows of `width`, of which one vector counts for every
/// `column` of the panel; of `x` so many `pairs` count; the panel: `[columns, KP, 16, 2]`. Meanwhile memory is asked
/// for `ahead`, line by line as the panel is read.
#[inline(always)]
fn product<S: Simd, K: Code>(
    s: S,
    (o, width, fresh): (&mut [f32], usize, bool),
    x: Left<'_, K::Factor>,
    pairs: usize,
    (panel, column): (&[K], usize),
    ahead: &[K],
) {
    let (rows, vectors) = (o.len() / width, panel.len() / column);
    let (high, wide) = if S::REGISTERS == 32 { (ROWS, COLUMNS) } else { (FEWER, 1) };
    let mut j = 0;
    while j < vectors {
        let whole = j + wide <= vectors;
        let taken = if whole { wide } else { 1 };
        let place = j * column..(j + taken) * column;
        let panel = (&panel[place.clone()], column);
        // The first rows ask. Others ask for what they read, which is there.
        let mut ahead = ahead.get(place).unwrap_or(panel.0);
        let mut i = 0;
        while i < rows {
            let x = Left { rows: &x.rows[i * x.stride..], steps: &x.steps[i..], ..x };
            let many = i + high <= rows;
            let o = (&mut o[i * width + j * LANES..], width, fresh);
            match (S::REGISTERS, many, whole) {
                (32, true, true) => tile::<_, _, ROWS, COLUMNS>(s, o, x, pairs, panel, ahead),
                (32, false, true) => tile::<_, _, 1, COLUMNS>(s, o, x, pairs, panel, ahead),
                (32, true, false) => tile::<_, _, ROWS, 1>(s, o, x, pairs, panel, ahead),
                (_, true, _) => tile::<_, _, FEWER, 1>(s, o, x, pairs, panel, ahead),
                (_, false, _) => tile::<_, _, 1, 1>(s, o, x, pairs, panel, ahead),
            }
            ahead = panel.0;
            i += if many { high } else { 1 };
        }
        j += taken;
    }
}

#[inline(always)]
fn tile<S: Simd, K: Code, const R: usize, const C: usize>(
    s: S,
    (o, width, fresh): (&mut [f32], usize, bool),
    x: Left<'_, K::Factor>,
    pairs: usize,
    (panel, column): (&[K], usize),
    ahead: &[K],
) {
    let rows: [&[[K::Factor; 2]]; R] = each(
        &[],
        #[inline(always)]
        |r| &x.rows[r * x.stride..].as_chunks().0[..pairs],
    );
    let columns: [&[[K; PAIRS]]; C] = each(
        &[],
        #[inline(always)]
        |c| &panel[c * column..][..column].as_chunks().0[..pairs],
    );
    for start in (0..pairs).step_by(K::DEEP) {
        let fresh = fresh && start == 0;
        let mut sums = [[K::begin(s, &[0.0; LANES], fresh); C]; R];
        for (r, sums) in sums.iter_mut().enumerate() {
            for (c, sum) in sums.iter_mut().enumerate() {
                *sum = K::begin(s, lanes(&o[r * width + c * LANES..]), fresh);
            }
        }
        for l in start..pairs.min(start.saturating_add(K::DEEP)) {
            for c in (0..C).step_by(LINE / (PAIRS * size_of::<K>())) {
                s.ahead(ahead, (l * C + c) * PAIRS);
            }
            let mut w = [K::codes(s, &columns[0][l]); C];
            for c in 1..C {
                w[c] = K::codes(s, &columns[c][l]);
            }
            for r in 0..R {
                let x = K::pair(s, rows[r][l]);
                for c in 0..C {
                    sums[r][c] = K::add(s, sums[r][c], w[c], x);
                }
            }
        }
        for (r, sums) in sums.into_iter().enumerate() {
            for (c, sum) in sums.into_iter().enumerate() {
                K::end(s, lanes_mut(&mut o[r * width + c * LANES..]), sum, x.steps[r], fresh);
            }
        }
    }
}

#[cfg(test)]
mod tests;
