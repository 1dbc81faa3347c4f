//! Weights in eight or four bits, blocks of 32 along a row, multiplied as integers.
//!
//! The numbers are those of [`golden::narrow`]. In memory sixteen rows stand together: four columns of
//! each are the four bytes of a lane, so that sums of a row stay in their lane and nothing is added
//! across. Activations are read in eight bits ([`super::linear::activations`]): integer sums of a block
//! are exact, and two factors make a number of them.

use std::sync::Arc;

use golden::narrow::{Ends, int4_code, int4_ends, int8_code, int8_scale};
use golden::weights::Kept;
use half::bf16;
use zerocopy::IntoBytes;

use super::{
    aligned::Arena,
    linear::activations::{BlockPart, put_lanes},
    pool::{self, Part},
    simd::{LANES, QUADS, Simd, each, tiled},
    weight::Data,
};

/// Columns that share a scale.
pub(crate) const BLOCK: usize = golden::narrow::BLOCK;

/// Blocks between what is multiplied and what memory is asked for, by vectors of a block and by groups that are
/// multiplied at a time: some KiB in all. Where memory is fast twice as far costs a sixth of its pace.
const fn ahead(vectors: usize, groups: usize) -> usize {
    match (vectors, groups) {
        // Of several tokens, whose products take longer.
        (4, 2) => 16,
        (_, 4) => 2,
        _ => 4,
    }
}

/// The same of scales and minima.
const ENDS_AHEAD: usize = 4;

/// Blocks of a row that is long.
const LONG: usize = 32;

/// Quads of columns of a block.
const COLUMNS: usize = BLOCK / 4;

/// How many bits a weight has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bits {
    Eight,
    Four,
}

/// A narrowed matrix `[M, D]`; the last group of rows and the last block of columns are filled up
/// with zeros.
#[derive(Clone)]
pub(crate) struct Quantised {
    bits: Bits,
    /// `[M / 16, blocks, 8, 16, 4]` codes, 128 too large, of eight bits. Of four bits
    /// `[M / 16, blocks, 4, 16, 4]`: the low halves are the first sixteen columns.
    codes: Data<u8>,
    /// `[M / 16, blocks, 1, 16]` scales; of four bits `[M / 16, blocks, 2, 16]`, scales and then minima.
    ends: Data<bf16>,
    rows: usize,
    d: usize,
}

impl Quantised {
    /// Narrows rows of `d` columns, which are asked for one by one, on all threads.
    pub(crate) fn new(
        bits: Bits,
        (rows, d): (usize, usize),
        arena: &Arena,
        row: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Quantised {
        let (groups, blocks) = (rows.div_ceil(LANES), d.div_ceil(BLOCK));
        let size = bits.bytes();
        let mut codes = arena.zeros::<u8>(groups * blocks * size);
        let mut ends = arena.zeros::<bf16>(groups * blocks * bits.ends());
        // In the shares in which they will be multiplied, so that memory lies near.
        let pieces = (
            (&mut codes[..], (blocks * size).max(1)),
            (&mut ends[..], (blocks * bits.ends()).max(1)),
        );
        pool::pieces2(pieces.0, pieces.1, |group, codes, ends| {
            let mut wide = vec![0.0; d];
            for lane in 0..LANES.min(rows - group * LANES) {
                row(group * LANES + lane, &mut wide);
                for (block, x) in wide.chunks(BLOCK).enumerate() {
                    let codes = &mut codes[block * size..][..size];
                    let own = &mut ends[block * bits.ends()..][..bits.ends()];
                    match bits {
                        Bits::Eight => {
                            let scale = int8_scale(x);
                            own[lane] = bf16::from_f32(scale);
                            for (j, &x) in x.iter().enumerate() {
                                codes[place(j, lane)] =
                                    (i32::from(int8_code(x, scale)) + 128) as u8;
                            }
                        }
                        Bits::Four => {
                            let between = int4_ends(x);
                            own[lane] = bf16::from_f32(between.scale);
                            own[LANES + lane] = bf16::from_f32(between.minimum);
                            for (j, &x) in x.iter().enumerate() {
                                let (half, shift) = (j % LANES, j / LANES * 4);
                                codes[place(half, lane)] |= int4_code(x, between) << shift;
                            }
                        }
                    }
                }
            }
        });
        let (codes, ends) = (Data::Placed(Arc::new(codes)), Data::Placed(Arc::new(ends)));
        Quantised { bits, codes, ends, rows, d }
    }

    /// A copy of its own.
    pub(crate) fn copied(&self, arena: &Arena) -> Quantised {
        Quantised { codes: self.codes.copied(arena), ends: self.ends.copied(arena), ..*self }
    }

    /// A matrix that somebody keeps: the bytes of [`parts`](Self::parts), one after another; `None` if
    /// these are not so many.
    pub(crate) fn kept(bits: Bits, rows: usize, d: usize, kept: &Kept) -> Option<Quantised> {
        if kept.data().len() != Quantised::size(bits, rows, d) {
            return None;
        }
        let blocks = rows.div_ceil(LANES) * d.div_ceil(BLOCK);
        let codes = blocks * bits.bytes();
        Some(Quantised {
            bits,
            codes: Data::new(kept.part(0..codes)),
            ends: Data::new(kept.part(codes..kept.data().len())),
            rows,
            d,
        })
    }

    /// Codes, and then scales and minima, as they lie in memory.
    pub(crate) fn parts(&self) -> [&[u8]; 2] {
        [self.codes.slice(), self.ends.slice().as_bytes()]
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn columns(&self) -> usize {
        self.d
    }

    /// Bytes of a matrix `[rows, d]`.
    pub(crate) fn size(bits: Bits, rows: usize, d: usize) -> usize {
        let blocks = rows.div_ceil(LANES) * d.div_ceil(BLOCK);
        blocks * (bits.bytes() + bits.ends() * size_of::<bf16>())
    }

    /// Bytes in memory.
    pub(crate) fn bytes(&self) -> usize {
        self.parts().iter().map(|part| part.len()).sum()
    }

    fn blocks(&self) -> usize {
        self.d.div_ceil(BLOCK)
    }

    /// Row `i`, widened.
    pub(crate) fn row(&self, i: usize, o: &mut [f32]) {
        let (group, lane) = (i / LANES, i % LANES);
        let (all, ends) = (self.codes.slice(), self.ends.slice());
        for (block, o) in o.chunks_mut(BLOCK).enumerate() {
            let at = group * self.blocks() + block;
            let codes = &all[at * self.bits.bytes()..][..self.bits.bytes()];
            let own = &ends[at * self.bits.ends()..][..self.bits.ends()];
            let scale = own[lane].to_f32();
            for (j, o) in o.iter_mut().enumerate() {
                *o = match self.bits {
                    Bits::Eight => (f32::from(codes[place(j, lane)]) - 128.0) * scale,
                    Bits::Four => {
                        let code = codes[place(j % LANES, lane)] >> (j / LANES * 4) & 15;
                        let minimum = own[LANES + lane].to_f32();
                        Ends { minimum, scale }.of(code)
                    }
                };
            }
        }
    }

    /// The columns of a part of `o`, for tokens `[rows of the part, blocks]` in eight bits. A part
    /// begins at a group.
    #[inline(always)]
    pub(crate) fn products<S: Simd>(
        &self,
        s: S,
        codes: &[i8],
        parts: &[BlockPart],
        part: &mut Part<'_, f32>,
    ) {
        let x = Tokens { codes, parts, blocks: self.blocks() };
        let tokens = part.rows.len();
        // Of one token memory sets the pace: rows of groups that are long come fastest from four places at a time,
        // others one after another.
        if S::REGISTERS == 32 && tokens == 1 && self.bits == Bits::Eight && LONG <= self.blocks() {
            self.groups::<S, 4, 1>(s, x, 0, part);
        } else if S::REGISTERS == 32 && tokens == 1 {
            self.groups::<S, 1, 1>(s, x, 0, part);
        } else if S::REGISTERS == 32 {
            tiled!(tokens, [6, 3, 2, 1], |t, T| self.groups::<S, 2, T>(s, x, t, part));
        } else {
            tiled!(tokens, [2, 1], |t, T| self.groups::<S, 1, T>(s, x, t, part));
        }
    }

    /// All groups of a part with `T` tokens from `t` on, `G` groups at a time.
    #[inline(always)]
    fn groups<S: Simd, const G: usize, const T: usize>(
        &self,
        s: S,
        x: Tokens<'_>,
        t: usize,
        part: &mut Part<'_, f32>,
    ) {
        let first = part.columns.start / LANES;
        let n = part.columns.len().div_ceil(LANES);
        let mut g = 0;
        while g + G <= n {
            let sums = self.sums::<S, G, T>(s, first + g, x, t);
            put(s, sums, g, t, part);
            g += G;
        }
        while g < n {
            let sums = self.sums::<S, 1, T>(s, first + g, x, t);
            put(s, sums, g, t, part);
            g += 1;
        }
    }

    #[inline(always)]
    fn sums<S: Simd, const G: usize, const T: usize>(
        &self,
        s: S,
        group: usize,
        x: Tokens<'_>,
        t: usize,
    ) -> [[S::F; T]; G] {
        match self.bits {
            Bits::Eight => self.sums_of::<S, G, T, 8>(s, group, x, t),
            Bits::Four => self.sums_of::<S, G, T, 4>(s, group, x, t),
        }
    }

    /// `Q`: vectors of a block of codes.
    #[inline(always)]
    fn sums_of<S: Simd, const G: usize, const T: usize, const Q: usize>(
        &self,
        s: S,
        group: usize,
        x: Tokens<'_>,
        t: usize,
    ) -> [[S::F; T]; G] {
        let blocks = self.blocks();
        let all = self.codes.slice();
        let codes: [&[[[u8; QUADS]; Q]]; G] = each(
            &[],
            #[inline(always)]
            |g| {
                let from = (group + g) * blocks * Q * QUADS;
                let own = &all[from..from + blocks * Q * QUADS];
                &own.as_chunks::<QUADS>().0.as_chunks().0[..blocks]
            },
        );
        // Scales, and of four bits minima.
        let kinds = if Q == 4 { 2 } else { 1 };
        let ends: [&[[bf16; LANES]]; G] = each(
            &[],
            #[inline(always)]
            |g| {
                let from = (group + g) * blocks * kinds * LANES;
                &self.ends.slice()[from..].as_chunks().0[..blocks * kinds]
            },
        );
        let tokens: [Token<'_>; T] = each(
            (&[][..], &[][..]),
            #[inline(always)]
            |i| x.row(t + i),
        );
        let mut sums = [[s.splat(0.0); T]; G];
        for block in 0..blocks {
            // Who reads these codes first asks memory for those some blocks on, at the end of a group for
            // those of the groups after these.
            let later = |block| if block < blocks { block } else { block + (G - 1) * blocks };
            let far = later(block + const { ahead(Q, G) });
            if t == 0 {
                let far = later(block + ENDS_AHEAD) * kinds * LANES;
                ends.iter().for_each(|ends| s.ahead(ends.as_flattened(), far));
            }
            let mut whole = [[s.int(0); T]; G];
            if Q != 4 {
                for t in 0..T {
                    let offset = s.int(tokens[t].1[block].offset);
                    for whole in &mut whole {
                        whole[t] = offset;
                    }
                }
            }
            for q in 0..Q {
                if t == 0 {
                    for codes in &codes {
                        s.ahead(codes.as_flattened(), far * Q + q);
                    }
                }
                if Q == 4 {
                    let filler = s.nibbles(&[0; QUADS]);
                    let w: [[S::B; 2]; G] = each(
                        filler,
                        #[inline(always)]
                        |g| s.nibbles(&codes[g][block][q]),
                    );
                    for t in 0..T {
                        let x = &tokens[t].0[block];
                        for g in 0..G {
                            whole[g][t] = s.quads(whole[g][t], w[g][0], x[q]);
                            whole[g][t] = s.quads(whole[g][t], w[g][1], x[q + 4]);
                        }
                    }
                } else {
                    let w: [S::B; G] = each(
                        s.bytes(&[0; QUADS]),
                        #[inline(always)]
                        |g| s.bytes(&codes[g][block][q]),
                    );
                    for t in 0..T {
                        let x = tokens[t].0[block][q];
                        for g in 0..G {
                            whole[g][t] = s.quads(whole[g][t], w[g], x);
                        }
                    }
                }
            }
            for g in 0..G {
                let scale = s.load(&ends[g][block * kinds]);
                for t in 0..T {
                    let factor = s.mul(scale, s.splat(tokens[t].1[block].scale));
                    sums[g][t] = s.fma(s.number(whole[g][t]), factor, sums[g][t]);
                }
                if Q == 4 {
                    let minimum = s.load(&ends[g][block * kinds + 1]);
                    for t in 0..T {
                        let total = s.splat(tokens[t].1[block].total);
                        sums[g][t] = s.fma(minimum, total, sums[g][t]);
                    }
                }
            }
        }
        sums
    }
}

/// Sums of groups from the `g`th of a part on, of tokens from `t` on.
#[inline(always)]
fn put<S: Simd, const G: usize, const T: usize>(
    s: S,
    sums: [[S::F; T]; G],
    g: usize,
    t: usize,
    part: &mut Part<'_, f32>,
) {
    for (i, sums) in sums.into_iter().enumerate() {
        for (j, sum) in sums.into_iter().enumerate() {
            let row = part.row(t + j);
            let end = row.len().min((g + i + 1) * LANES);
            put_lanes(s, &mut row[(g + i) * LANES..end], sum);
        }
    }
}

impl Bits {
    /// Scales of a block of sixteen rows, and minima if it has some.
    fn ends(self) -> usize {
        match self {
            Bits::Eight => LANES,
            Bits::Four => 2 * LANES,
        }
    }

    /// Bytes of the codes of a block of sixteen rows.
    fn bytes(self) -> usize {
        match self {
            Bits::Eight => COLUMNS * QUADS,
            Bits::Four => COLUMNS / 2 * QUADS,
        }
    }
}

/// Where column `j` of a lane stands in a block.
fn place(j: usize, lane: usize) -> usize {
    j / 4 * QUADS + lane * 4 + j % 4
}

/// Tokens in eight bits.
#[derive(Clone, Copy)]
struct Tokens<'a> {
    codes: &'a [i8],
    parts: &'a [BlockPart],
    blocks: usize,
}

/// Its codes and what its blocks say beside them.
type Token<'a> = (&'a [[[i8; 4]; COLUMNS]], &'a [BlockPart]);

impl<'a> Tokens<'a> {
    #[inline(always)]
    fn row(&self, t: usize) -> Token<'a> {
        let (from, blocks) = (t * self.blocks, self.blocks);
        let codes = &self.codes[from * BLOCK..(from + blocks) * BLOCK];
        (&codes.as_chunks::<4>().0.as_chunks().0[..blocks], &self.parts[from..from + blocks])
    }
}

#[cfg(test)]
mod tests;
