//! Keys and values in bf16 or in eight bits, laid out for products of bf16 pairs.
//!
//! Sixteen keys stand together, two channels of each in a lane: scores of sixteen keys come out side by
//! side. Of values two keys stand together in a lane per channel: what the probabilities of two keys
//! weigh is added in one word. Nothing is added across lanes in either product, and both walk columns
//! of a block that lie one after another: two of them stay in the nearest cache while rows pass by.
//!
//! In eight bits a row of keys or values (a token in a head) is 127 steps of its largest number. Whole
//! numbers as small as these are bf16 numbers: columns are written out as such where rows pass by, the step
//! of a key scales its score, and that of a value its probability.

use std::ops::Range;

use golden::narrow::int8_code;
use half::bf16;
use zerocopy::FromZeros;

use super::fast::{Cached, KEYS, PAGE, Pages, Rows, Softmax, Task};
use crate::cpu::{
    aligned::{Aligned, LINE},
    linear::{activations::narrow, halves::pair_up},
    simd::{LANES, PAIRS, QUADS, Simd, each, filled},
};

/// Keys and values in pairs.
pub(crate) type Paired<C> = Pages<Page<C>>;

pub(crate) struct Page<C> {
    /// Keys `[HKV, PAGE / 16, H / 2, 16, 2]`, then values `[HKV, PAGE / KEYS, H' / 16, KEYS / 2, 16, 2]`, `H'`
    /// filled up to whole vectors.
    data: Aligned<C>,
    /// Where values begin.
    keys: usize,
    /// Steps of keys, then of values, `[2, HKV, PAGE]`, where numbers are counted in such.
    steps: Aligned<f32>,
}

impl<C: Code> Clone for Page<C> {
    fn clone(&self) -> Self {
        Page { data: self.data.clone(), keys: self.keys, steps: self.steps.clone() }
    }
}

/// What a number is kept as.
pub(crate) trait Code: Copy + FromZeros + Send + Sync + 'static {
    /// Whether it counts steps, which every row has one of.
    const STEPS: bool;

    /// A row as it is kept, handed out number by number, and its step.
    fn row(x: &[f32], put: impl FnMut(usize, Self)) -> f32;

    /// As a factor.
    fn number(self) -> f32;

    /// Neighbouring columns as factors, in memory near at hand if they are not kept so.
    fn factors<'a, S: Simd>(s: S, x: &'a [Self], room: &'a mut [bf16]) -> &'a [bf16];
}

impl Code for bf16 {
    const STEPS: bool = false;

    #[inline(always)]
    fn row(x: &[f32], mut put: impl FnMut(usize, bf16)) -> f32 {
        x.iter().enumerate().for_each(|(i, &x)| put(i, bf16::from_f32(x)));
        1.0
    }

    #[inline(always)]
    fn number(self) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    fn factors<'a, S: Simd>(_: S, x: &'a [bf16], _: &'a mut [bf16]) -> &'a [bf16] {
        x
    }
}

impl Code for i8 {
    const STEPS: bool = true;

    /// A row in which something is no number, or infinite, has no step: whoever sees it gets NaN.
    #[inline(always)]
    fn row(x: &[f32], mut put: impl FnMut(usize, i8)) -> f32 {
        let most = x.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
        let finite = x.iter().all(|x| x.is_finite());
        let step = most / 127.0;
        // Below the smallest normal number it would have too few digits to count in.
        let step = if step < f32::MIN_POSITIVE { 0.0 } else { step };
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
    fn number(self) -> f32 {
        f32::from(self)
    }

    #[inline(always)]
    fn factors<'a, S: Simd>(s: S, x: &'a [i8], room: &'a mut [bf16]) -> &'a [bf16] {
        let room = &mut room[..x.len()];
        let (o, o_rest) = room.as_chunks_mut::<QUADS>();
        let (x, x_rest) = x.as_chunks::<QUADS>();
        for (o, x) in o.iter_mut().zip(x) {
            s.whole(o, x);
        }
        for (o, x) in o_rest.iter_mut().zip(x_rest) {
            *o = bf16::from_f32(f32::from(*x));
        }
        room
    }
}

/// What a block of keys and values holds of a head.
struct Block<'a, C> {
    /// `[KEYS / 16, H / 2, 16, 2]`.
    k: &'a [C],
    /// `[H' / 16, KEYS / 2, 16, 2]`.
    v: &'a [C],
    /// Steps of keys and of values, `[KEYS]` each, or none.
    steps: [&'a [f32]; 2],
}

/// Faults that only steps can have.
impl Paired<i8> {
    /// Every step is that of the token before it in its page.
    pub(super) fn misplaced(&self) -> Self {
        self.with(|steps| steps.chunks_exact_mut(PAGE).for_each(|steps| steps.rotate_right(1)))
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
        let at = head * PAGE + start % PAGE;
        let (k, v) = (2 * KEYS * self.pairs(), KEYS * self.padded());
        let steps = |which: usize| -> &[f32] {
            if C::STEPS { &page.steps[which * self.heads * PAGE + at..][..KEYS] } else { &[] }
        };
        Block {
            k: &keys[at / KEYS * k..][..k],
            v: &values[at / KEYS * v..][..v],
            steps: [steps(0), steps(1)],
        }
    }

    /// Steps of a page.
    fn steps(&self) -> usize {
        if C::STEPS { 2 * self.heads * PAGE } else { 0 }
    }
}

impl<C: Code> Cached for Paired<C> {
    fn page(&self) -> usize {
        let numbers = self.heads * PAGE * (2 * self.pairs() + self.padded());
        numbers * size_of::<C>() + self.steps() * size_of::<f32>()
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
            let keys = heads * PAGE * 2 * pairs;
            let data = Aligned::zeros(keys + heads * PAGE * padded);
            Page { data, keys, steps: Aligned::zeros(steps) }
        });
        let (keys, values) = page.data.split_at_mut(page.keys);
        for head in 0..heads {
            let group = head * PAGE / LANES + at / LANES;
            let to = &mut keys[group * pairs * PAIRS..][..pairs * PAIRS];
            let k_step = C::row(&k[head * h..][..h], |i, x| {
                to[i / 2 * PAIRS + at % LANES * 2 + i % 2] = x;
            });
            let block = head * PAGE / KEYS + at / KEYS;
            let to = &mut values[block * KEYS * padded..][..KEYS * padded];
            let v_step = C::row(&v[head * h..][..h], |i, x| {
                to[of_pair(i, at % KEYS / 2) + at % 2] = x;
            });
            if C::STEPS {
                page.steps[head * PAGE + at] = k_step;
                page.steps[(heads + head) * PAGE + at] = v_step;
            }
        }
    }

    #[inline(always)]
    fn stretch<S: Simd>(&self, s: S, task: &Task<'_>, keys: Range<usize>) -> Softmax {
        let (h, pairs, padded) = (self.h, self.pairs(), self.padded());
        let rows = task.rows();
        // Nobody has asked for the first keys yet.
        let first = self.block(task.head, keys.start).k;
        for at in (0..first.len()).step_by(LINE / size_of::<C>()) {
            s.ahead(first, at);
        }
        let mut q = Aligned::zeros(rows * 2 * pairs);
        for (to, from) in q.chunks_exact_mut(2 * pairs).zip(task.queries()) {
            narrow(s, &mut to[..h], from);
        }
        let mut softmax = Softmax::new(rows, padded);
        let mut scores = Aligned::zeros(rows * KEYS);
        let mut p = Aligned::zeros(rows * KEYS);
        let column = PAIRS * pairs.max(KEYS / 2);
        let mut room = Aligned::zeros(if C::STEPS { COLUMNS * column } else { 0 });
        for start in keys.clone().step_by(KEYS) {
            let n = KEYS.min(keys.end - start);
            let Block { k, v, steps } = self.block(task.head, start);
            // While scores are made, values come nearer, and the next keys while these are weighed; those of the
            // next stretch too, which is this thread's as well.
            let next = start + KEYS;
            let later = if next < self.len() { self.block(task.head, next).k } else { &[] };
            scores.fill(0.0);
            product(s, &mut scores, KEYS, (&q, 2 * pairs), pairs, (k, &mut room), v);
            let visible = |row| task.seen(row).saturating_sub(start).min(n);
            for (row, scores) in scores.chunks_exact_mut(KEYS).enumerate() {
                // In place of what is not seen there may be a NaN.
                let seen = visible(row);
                scale(scores, steps[0], seen);
                softmax.add(s, row, scores, seen, task.scale);
                scale(scores, steps[1], seen);
            }
            narrow(s, &mut p, &scores);
            // What a token does not see is not multiplied by zero, which would let a NaN through:
            // tokens that see different keys are summed apart, and a key whose partner is not seen
            // alone.
            let together = if visible(0) == n { rows } else { task.group };
            for (i, sum) in softmax.sum.chunks_mut(together * padded).enumerate() {
                let seen = visible(i * together);
                let p = &p[i * together * KEYS..];
                product(s, sum, padded, (p, KEYS), seen / 2, (v, &mut room), later);
                if !seen.is_multiple_of(2) {
                    for (row, sum) in sum.chunks_exact_mut(padded).enumerate() {
                        let p = p[row * KEYS + seen - 1].to_f32();
                        for (i, sum) in sum.iter_mut().enumerate() {
                            *sum += p * v[of_pair(i, seen / 2)].number();
                        }
                    }
                }
            }
        }
        softmax
    }
}

/// The first `seen` numbers in their steps, if they have such.
#[inline(always)]
fn scale(x: &mut [f32], steps: &[f32], seen: usize) {
    for (x, step) in x[..seen].iter_mut().zip(steps) {
        *x *= step;
    }
}

/// Where channel `i` of a pair of keys stands in a block of values.
#[inline(always)]
fn of_pair(i: usize, pair: usize) -> usize {
    (i / LANES * KEYS / 2 + pair) * PAIRS + i % LANES * 2
}

/// `o += x panel`. `o`: rows of `width`, whole vectors; `x`: rows `stride` apart, of which `pairs` pairs
/// count; `panel`: `[width / 16, KP, 16, 2]`, columns of pairs, `KP` of each, and room for two columns.
/// Meanwhile memory is asked for `ahead`.
#[inline(always)]
fn product<S: Simd, C: Code>(
    s: S,
    o: &mut [f32],
    width: usize,
    (x, stride): (&[bf16], usize),
    pairs: usize,
    (panel, room): (&[C], &mut [bf16]),
    ahead: &[C],
) {
    let line = LINE / size_of::<C>();
    let (rows, vectors) = (o.len() / width, width / LANES);
    let column = panel.len() / vectors;
    let (high, wide) = if S::REGISTERS == 32 { (ROWS, COLUMNS) } else { (FEWER, 1) };
    // Every tile asks for as many lines.
    let tiles = vectors.div_ceil(wide) * rows.div_ceil(high);
    let mut shares = ahead.chunks(ahead.len().div_ceil(tiles * line).max(1) * line);
    let mut j = 0;
    while j < vectors {
        let whole = j + wide <= vectors;
        let taken = if whole { wide } else { 1 };
        let panel = C::factors(s, &panel[j * column..][..taken * column], room);
        let mut i = 0;
        while i < rows {
            let x = Rows { data: x, stride, row: i };
            let many = i + high <= rows;
            let o = &mut o[i * width + j * LANES..];
            let ahead = shares.next().unwrap_or_default();
            match (S::REGISTERS, many, whole) {
                (32, true, true) => {
                    tile::<_, _, ROWS, COLUMNS>(s, o, width, x, pairs, (panel, column), ahead);
                }
                (32, false, true) => {
                    tile::<_, _, 1, COLUMNS>(s, o, width, x, pairs, (panel, column), ahead);
                }
                (32, true, false) => {
                    tile::<_, _, ROWS, 1>(s, o, width, x, pairs, (panel, column), ahead);
                }
                (_, true, _) => {
                    tile::<_, _, FEWER, 1>(s, o, width, x, pairs, (panel, column), ahead);
                }
                (_, false, _) => tile::<_, _, 1, 1>(s, o, width, x, pairs, (panel, column), ahead),
            }
            i += if many { high } else { 1 };
        }
        j += taken;
    }
}

#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "rows and columns are walked together")]
fn tile<S: Simd, A, const R: usize, const C: usize>(
    s: S,
    o: &mut [f32],
    width: usize,
    x: Rows<'_>,
    pairs: usize,
    (panel, column): (&[bf16], usize),
    ahead: &[A],
) {
    let mut sums = [[s.splat(0.0); C]; R];
    for (r, sums) in sums.iter_mut().enumerate() {
        for (c, sum) in sums.iter_mut().enumerate() {
            *sum = s.load::<f32>(crate::cpu::simd::lanes(&o[r * width + c * LANES..]));
        }
    }
    let rows: [&[[bf16; 2]]; R] = each(
        &[],
        #[inline(always)]
        |r| &x.data[(x.row + r) * x.stride..].as_chunks().0[..pairs],
    );
    let columns: [&[bf16]; C] = each(
        &[],
        #[inline(always)]
        |c| &panel[c * column..][..column],
    );
    let columns_of_two: [&[[bf16; QUADS]]; C] = each(
        &[],
        #[inline(always)]
        |c| columns[c].as_chunks().0,
    );
    let line = LINE / size_of::<A>();
    let (lines, mut asked) = ((ahead.len() / line).div_ceil(pairs.max(1)), 0);
    // Of a column two pairs are taken every second time, and one waits for its turn.
    let mut later = [s.halves(&[bf16::ZERO; PAIRS]); C];
    for l in 0..pairs {
        for _ in 0..lines {
            s.ahead(ahead, asked);
            asked += line;
        }
        let mut w = later;
        if l % 2 == 0 {
            for c in 0..C {
                let two = match columns_of_two[c].get(l / 2) {
                    Some(two) => pair_up(s, two),
                    None => pair_up(s, &filled(columns[c], bf16::ZERO)),
                };
                (w[c], later[c]) = (two[0], two[1]);
            }
        }
        for r in 0..R {
            let x = s.pair(rows[r][l]);
            for c in 0..C {
                sums[r][c] = s.pairs(sums[r][c], w[c], x);
            }
        }
    }
    for (r, sums) in sums.into_iter().enumerate() {
        for (c, sum) in sums.into_iter().enumerate() {
            s.store(crate::cpu::simd::lanes_mut(&mut o[r * width + c * LANES..]), sum);
        }
    }
}

#[cfg(test)]
mod tests;
