//! Keys and values in bf16, laid out for products of pairs.
//!
//! Sixteen keys stand together, two channels of each in a lane: scores of sixteen keys come out side by
//! side. Of values two keys stand together in a lane per channel: what the probabilities of two keys
//! weigh is added in one word. Nothing is added across lanes in either product, and both walk columns
//! of a block that lie one after another: two of them stay in the nearest cache while rows pass by.

use std::ops::Range;

use half::bf16;

use super::fast::{Cached, KEYS, PAGE, Pages, Rows, Softmax, Task};
use crate::cpu::{
    aligned::Aligned,
    linear::activations::narrow,
    simd::{LANES, PAIRS, Simd, each},
};

/// Keys and values in pairs.
pub(crate) type Paired = Pages<Page>;

#[derive(Clone)]
pub(crate) struct Page {
    /// Keys `[HKV, PAGE / 16, H / 2, 16, 2]`, then values `[HKV, PAGE / KEYS, H' / 16, KEYS / 2, 16, 2]`, `H'`
    /// filled up to whole vectors.
    data: Aligned<bf16>,
    /// Where values begin.
    keys: usize,
}

/// Rows of the left factor in a tile: the query heads of a key/value head, so that keys and values are
/// read once for one token.
const ROWS: usize = 8;

/// Vectors of columns in a tile.
const COLUMNS: usize = 2;

/// Rows of a tile of one vector where registers are few.
const FEWER: usize = 4;

impl Paired {
    /// Bytes of the first page, as it was allocated.
    #[cfg(test)]
    pub(crate) fn held(&self) -> usize {
        self.first().map_or(0, |page| 2 * page.data.len())
    }

    /// Channels in pairs.
    fn pairs(&self) -> usize {
        self.h.div_ceil(2)
    }

    /// Channels in whole vectors.
    fn padded(&self) -> usize {
        self.h.next_multiple_of(LANES)
    }

    /// Keys and values of the block that begins with a token: `[KEYS / 16, H / 2, 16, 2]` and
    /// `[H' / 16, KEYS / 2, 16, 2]`.
    fn block(&self, head: usize, start: usize) -> (&[bf16], &[bf16]) {
        let page = self.of(start);
        let (keys, values) = page.data.split_at(page.keys);
        let block = (head * PAGE + start % PAGE) / KEYS;
        let (k, v) = (2 * KEYS * self.pairs(), KEYS * self.padded());
        (&keys[block * k..][..k], &values[block * v..][..v])
    }
}

impl Cached for Paired {
    fn page(&self) -> usize {
        self.heads * PAGE * (2 * self.pairs() + self.padded()) * size_of::<bf16>()
    }

    fn len(&self) -> usize {
        self.len()
    }

    fn truncate(&mut self, len: usize) {
        self.truncate(len);
    }

    fn push(&mut self, k: &[f32], v: &[f32]) {
        let (pairs, padded, heads, h) = (self.pairs(), self.padded(), self.heads, self.h);
        let (page, at) = self.next(|_| {
            // Fillers are multiplied: they must be numbers.
            let keys = heads * PAGE * 2 * pairs;
            Page { data: Aligned::zeros(keys + heads * PAGE * padded), keys }
        });
        let (keys, values) = page.data.split_at_mut(page.keys);
        for head in 0..heads {
            let group = head * PAGE / LANES + at / LANES;
            let to = &mut keys[group * pairs * PAIRS..][..pairs * PAIRS];
            for (i, &x) in k[head * h..][..h].iter().enumerate() {
                to[i / 2 * PAIRS + at % LANES * 2 + i % 2] = bf16::from_f32(x);
            }
            let block = head * PAGE / KEYS + at / KEYS;
            let to = &mut values[block * KEYS * padded..][..KEYS * padded];
            for (i, &x) in v[head * h..][..h].iter().enumerate() {
                to[of_pair(i, at % KEYS / 2) + at % 2] = bf16::from_f32(x);
            }
        }
    }

    #[inline(always)]
    fn stretch<S: Simd>(&self, s: S, task: &Task<'_>, keys: Range<usize>) -> Softmax {
        let (h, pairs, padded) = (self.h, self.pairs(), self.padded());
        let rows = task.rows();
        let mut q = Aligned::zeros(rows * 2 * pairs);
        for (to, from) in q.chunks_exact_mut(2 * pairs).zip(task.queries()) {
            narrow(s, &mut to[..h], from);
        }
        let mut softmax = Softmax::new(rows, padded);
        let mut scores = Aligned::zeros(rows * KEYS);
        let mut p = Aligned::zeros(rows * KEYS);
        for start in keys.clone().step_by(KEYS) {
            let n = KEYS.min(keys.end - start);
            let (k, v) = self.block(task.head, start);
            // While scores are made, values come nearer, and the next keys while these are weighed.
            let next = start + KEYS;
            let later = if next < keys.end { self.block(task.head, next).0 } else { &[] };
            scores.fill(0.0);
            product(s, &mut scores, KEYS, (&q, 2 * pairs), pairs, k, v);
            let visible = |row| task.seen(row).saturating_sub(start).min(n);
            for (row, scores) in scores.chunks_exact_mut(KEYS).enumerate() {
                softmax.add(s, row, scores, visible(row), task.scale);
            }
            narrow(s, &mut p, &scores);
            // What a token does not see is not multiplied by zero, which would let a NaN through:
            // tokens that see different keys are summed apart, and a key whose partner is not seen
            // alone.
            let together = if visible(0) == n { rows } else { task.group };
            for (i, sum) in softmax.sum.chunks_mut(together * padded).enumerate() {
                let seen = visible(i * together);
                let p = &p[i * together * KEYS..];
                product(s, sum, padded, (p, KEYS), seen / 2, v, later);
                if !seen.is_multiple_of(2) {
                    for (row, sum) in sum.chunks_exact_mut(padded).enumerate() {
                        let p = p[row * KEYS + seen - 1].to_f32();
                        for (i, sum) in sum.iter_mut().enumerate() {
                            *sum += p * v[of_pair(i, seen / 2)].to_f32();
                        }
                    }
                }
            }
        }
        softmax
    }
}

/// Where channel `i` of a pair of keys stands in a block of values.
#[inline(always)]
fn of_pair(i: usize, pair: usize) -> usize {
    (i / LANES * KEYS / 2 + pair) * PAIRS + i % LANES * 2
}

/// `o += x panel`. `o`: rows of `width`, whole vectors; `x`: rows `stride` apart, of which `pairs` pairs
/// count; `panel`: `[width / 16, KP, 16, 2]`, columns of pairs, `KP` of each. Meanwhile memory is asked
/// for `ahead`.
#[inline(always)]
fn product<S: Simd>(
    s: S,
    o: &mut [f32],
    width: usize,
    (x, stride): (&[bf16], usize),
    pairs: usize,
    panel: &[bf16],
    ahead: &[bf16],
) {
    let (rows, vectors) = (o.len() / width, width / LANES);
    let column = panel.len() / vectors;
    let (high, wide) = if S::REGISTERS == 32 { (ROWS, COLUMNS) } else { (FEWER, 1) };
    // Every tile asks for as many lines.
    let tiles = vectors.div_ceil(wide) * rows.div_ceil(high);
    let mut shares = ahead.chunks(ahead.len().div_ceil(tiles * PAIRS).max(1) * PAIRS);
    let mut j = 0;
    while j < vectors {
        let whole = j + wide <= vectors;
        let panel = &panel[j * column..];
        let mut i = 0;
        while i < rows {
            let x = Rows { data: x, stride, row: i };
            let many = i + high <= rows;
            let o = &mut o[i * width + j * LANES..];
            let ahead = shares.next().unwrap_or_default();
            match (S::REGISTERS, many, whole) {
                (32, true, true) => {
                    tile::<S, ROWS, COLUMNS>(s, o, width, x, pairs, (panel, column), ahead);
                }
                (32, false, true) => {
                    tile::<S, 1, COLUMNS>(s, o, width, x, pairs, (panel, column), ahead);
                }
                (32, true, false) => {
                    tile::<S, ROWS, 1>(s, o, width, x, pairs, (panel, column), ahead);
                }
                (_, true, _) => tile::<S, FEWER, 1>(s, o, width, x, pairs, (panel, column), ahead),
                (_, false, _) => tile::<S, 1, 1>(s, o, width, x, pairs, (panel, column), ahead),
            }
            i += if many { high } else { 1 };
        }
        j += if whole { wide } else { 1 };
    }
}

#[inline(always)]
fn tile<S: Simd, const R: usize, const C: usize>(
    s: S,
    o: &mut [f32],
    width: usize,
    x: Rows<'_>,
    pairs: usize,
    (panel, column): (&[bf16], usize),
    ahead: &[bf16],
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
    let columns: [&[[bf16; PAIRS]]; C] = each(
        &[],
        #[inline(always)]
        |c| &panel[c * column..].as_chunks().0[..pairs],
    );
    let filler = s.halves(&[bf16::ZERO; PAIRS]);
    let (lines, mut asked) = ((ahead.len() / PAIRS).div_ceil(pairs.max(1)), 0);
    for l in 0..pairs {
        for _ in 0..lines {
            s.ahead(ahead, asked);
            asked += PAIRS;
        }
        let w: [S::H; C] = each(
            filler,
            #[inline(always)]
            |c| s.halves(&columns[c][l]),
        );
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
