//! Products of bf16 activations with weights in bf16, or with FP8 codes, by dot products of pairs.
//!
//! Weights are read as the checkpoint has them, row by row: of one token one row after another, as memory
//! gives them fastest. Few tokens: some rows at a time. Many tokens: a few tokens stay in the nearest cache
//! while the rows of a panel pass by. How an element is summed depends on `D` alone.

use half::bf16;

use super::activations::stride;
use crate::cpu::{
    aligned::LINE,
    pool::Part,
    room::room,
    simd::{PAIRS, QUADS, Simd, each, filled, tiled},
};

/// Rows of a weight that are multiplied in pairs.
pub(crate) trait Pairs: Sync {
    /// Whether a sum is one register: of four rows and six tokens, sums and scaled sums have no room together.
    const PLAIN: bool;

    /// A row.
    type Row<'a>: Copy
    where
        Self: 'a;

    /// Row `i`.
    fn at(&self, i: usize) -> Self::Row<'_>;

    /// Rows.
    fn count(&self) -> usize;

    /// Bytes between what is multiplied and what memory is asked for, where rows come one after another. Where
    /// memory is fast twice as far costs a fifth of its pace.
    const NEAR: usize;

    /// Bytes of a row, as it comes from memory.
    fn bytes(&self) -> usize;

    /// Inner products of `R` rows with `T` rows of `x`.
    fn dots<S: Simd, const R: usize, const T: usize>(
        &self,
        s: S,
        w: [Self::Row<'_>; R],
        x: [&[bf16]; T],
        ahead: Ahead,
    ) -> [[S::F; T]; R];
}

/// What memory is asked for meanwhile: what lies so many bytes behind.
#[derive(Clone, Copy)]
pub(crate) enum Ahead {
    /// All of these rows.
    Each(usize),
    /// The first of them.
    First(usize),
    /// None.
    Nothing,
}

/// A matrix in bf16.
pub(crate) struct Halves<'a> {
    /// `[M, D]`.
    pub(crate) data: &'a [bf16],
    /// `D`.
    pub(crate) d: usize,
}

impl Pairs for Halves<'_> {
    const PLAIN: bool = true;
    const NEAR: usize = 1 << 12;

    type Row<'a>
        = &'a [bf16]
    where
        Self: 'a;

    #[inline(always)]
    fn count(&self) -> usize {
        self.data.len() / self.d
    }

    #[inline(always)]
    fn bytes(&self) -> usize {
        2 * self.d
    }

    #[inline(always)]
    fn at(&self, i: usize) -> &[bf16] {
        &self.data[i * self.d..][..self.d]
    }

    #[inline(always)]
    fn dots<S: Simd, const R: usize, const T: usize>(
        &self,
        s: S,
        w: [&[bf16]; R],
        x: [&[bf16]; T],
        ahead: Ahead,
    ) -> [[S::F; T]; R] {
        let (whole, rest) = (self.d / PAIRS, self.d % PAIRS);
        let mut sums = [[s.splat(0.0); T]; R];
        let w_chunks: [&[[bf16; PAIRS]]; R] = each(
            &[],
            #[inline(always)]
            |r| &w[r].as_chunks().0[..whole],
        );
        let x_chunks: [&[[bf16; PAIRS]]; T] = each(
            &[],
            #[inline(always)]
            |t| &x[t].as_chunks().0[..whole],
        );
        let filler = s.halves(&[bf16::ZERO; PAIRS]);
        for i in 0..whole {
            let own: [S::H; R] = each(
                filler,
                #[inline(always)]
                |r| s.halves(&w_chunks[r][i]),
            );
            match ahead {
                Ahead::Each(far) => (0..R).for_each(
                    #[inline(always)]
                    |r| s.ahead(w[r], far / size_of::<bf16>() + i * PAIRS),
                ),
                Ahead::First(far) => s.ahead(w[0], far / size_of::<bf16>() + i * PAIRS),
                Ahead::Nothing => {}
            }
            for t in 0..T {
                let x = s.halves(&x_chunks[t][i]);
                for r in 0..R {
                    sums[r][t] = s.pairs(sums[r][t], own[r], x);
                }
            }
        }
        if 0 < rest {
            for r in 0..R {
                let w = s.halves(&filled(w[r], bf16::ZERO));
                for t in 0..T {
                    sums[r][t] = s.pairs(sums[r][t], w, s.halves(&filled(x[t], bf16::ZERO)));
                }
            }
        }
        sums
    }
}

/// A matrix of FP8 codes whose scales stand for whole chunks of columns.
pub(crate) struct Codes<'a> {
    /// `[M, D]`.
    pub(crate) data: &'a [u8],
    /// `[M / block, D / block]`, rounded up.
    pub(crate) scales: &'a [f32],
    /// Rows and columns of a block; of columns a multiple of [`QUADS`].
    pub(crate) block: [usize; 2],
    /// `D`.
    pub(crate) d: usize,
}

impl Codes<'_> {
    /// The scales of row `i`, one per block of columns.
    #[inline(always)]
    fn scales(&self, i: usize) -> &[f32] {
        let across = self.d.div_ceil(self.block[1]);
        &self.scales[i / self.block[0] * across..][..across]
    }

    /// The sum over blocks of columns, `start .. end`, of what `part` says of one, scaled.
    #[inline(always)]
    fn by_block<S: Simd, const R: usize, const T: usize>(
        &self,
        s: S,
        scales: [&[f32]; R],
        part: impl Fn(usize, usize) -> [[S::F; T]; R],
    ) -> [[S::F; T]; R] {
        let mut sums = [[s.splat(0.0); T]; R];
        for (block, start) in (0..self.d).step_by(self.block[1]).enumerate() {
            let parts = part(start, (start + self.block[1]).min(self.d));
            for r in 0..R {
                let scale = s.splat(scales[r][block]);
                for t in 0..T {
                    sums[r][t] = s.fma(scale, parts[r][t], sums[r][t]);
                }
            }
        }
        sums
    }
}

impl Pairs for Codes<'_> {
    const PLAIN: bool = false;
    const NEAR: usize = 6 << 10;

    type Row<'a>
        = (&'a [u8], &'a [f32])
    where
        Self: 'a;

    #[inline(always)]
    fn count(&self) -> usize {
        self.data.len() / self.d
    }

    #[inline(always)]
    fn bytes(&self) -> usize {
        self.d
    }

    #[inline(always)]
    fn at(&self, i: usize) -> (&[u8], &[f32]) {
        (&self.data[i * self.d..][..self.d], self.scales(i))
    }

    #[inline(always)]
    fn dots<S: Simd, const R: usize, const T: usize>(
        &self,
        s: S,
        w: [(&[u8], &[f32]); R],
        x: [&[bf16]; T],
        ahead: Ahead,
    ) -> [[S::F; T]; R] {
        let (whole, rest) = (self.d / QUADS, self.d % QUADS);
        let w_chunks: [&[[u8; QUADS]]; R] = each(
            &[],
            #[inline(always)]
            |r| &w[r].0.as_chunks().0[..whole],
        );
        let x_chunks: [&[[bf16; QUADS]]; T] = each(
            &[],
            #[inline(always)]
            |t| &x[t].as_chunks().0[..whole],
        );
        let filler = pair_up(s, &[bf16::ZERO; QUADS]);
        self.by_block(
            s,
            each(
                &[],
                #[inline(always)]
                |r| w[r].1,
            ),
            #[inline(always)]
            |start, end| {
                let mut parts = [[s.splat(0.0); T]; R];
                for i in start / QUADS..end / QUADS {
                    let x: [[S::H; 2]; T] = each(
                        filler,
                        #[inline(always)]
                        |t| pair_up(s, &x_chunks[t][i]),
                    );
                    match ahead {
                        Ahead::Each(far) => (0..R).for_each(
                            #[inline(always)]
                            |r| s.ahead(w[r].0, far + i * QUADS),
                        ),
                        Ahead::First(far) => s.ahead(w[0].0, far + i * QUADS),
                        Ahead::Nothing => {}
                    }
                    for r in 0..R {
                        let w = s.fp8(&w_chunks[r][i]);
                        for t in 0..T {
                            parts[r][t] =
                                s.pairs(s.pairs(parts[r][t], w[0], x[t][0]), w[1], x[t][1]);
                        }
                    }
                }
                if 0 < rest && end == self.d {
                    for r in 0..R {
                        let w = s.fp8(&filled(w[r].0, 0));
                        for t in 0..T {
                            let x = pair_up(s, &filled(x[t], bf16::ZERO));
                            parts[r][t] = s.pairs(s.pairs(parts[r][t], w[0], x[0]), w[1], x[1]);
                        }
                    }
                }
                parts
            },
        )
    }
}

/// Rows of FP8 codes written out in bf16 for many tokens, the scales still apart. Summed as [`Codes`] are.
struct Written<'a> {
    /// `[rows, D]`.
    data: &'a [bf16],
    /// The row of the matrix that the first of them is.
    first: usize,
    codes: &'a Codes<'a>,
}

impl Pairs for Written<'_> {
    const PLAIN: bool = false;
    /// Never of one token alone.
    const NEAR: usize = 0;

    /// In bf16, its scales, and its codes.
    type Row<'a>
        = (&'a [bf16], &'a [f32], &'a [u8])
    where
        Self: 'a;

    #[inline(always)]
    fn count(&self) -> usize {
        self.codes.count()
    }

    #[inline(always)]
    fn bytes(&self) -> usize {
        self.codes.bytes()
    }

    #[inline(always)]
    fn at(&self, i: usize) -> Self::Row<'_> {
        let (codes, scales) = self.codes.at(i);
        let d = self.codes.d;
        (&self.data[(i - self.first) * d..][..d], scales, codes)
    }

    /// Rows of this part were written a moment ago; codes of the next one are asked for.
    #[inline(always)]
    fn dots<S: Simd, const R: usize, const T: usize>(
        &self,
        s: S,
        w: [(&[bf16], &[f32], &[u8]); R],
        x: [&[bf16]; T],
        ahead: Ahead,
    ) -> [[S::F; T]; R] {
        if let Ahead::First(far) = ahead {
            for at in (0..self.codes.d).step_by(LINE) {
                s.ahead(w[0].2, far + at);
            }
        }
        if self.codes.block[1] == BLOCK && self.codes.d.is_multiple_of(BLOCK) {
            return whole_blocks(s, w, x);
        }
        self.codes.by_block(
            s,
            each(
                &[],
                #[inline(always)]
                |r| w[r].1,
            ),
            #[inline(always)]
            |start, end| {
                let own = Halves { data: &[], d: end - start };
                let w_part: [&[bf16]; R] = each(
                    &[],
                    #[inline(always)]
                    |r| &w[r].0[start..end],
                );
                let x_part: [&[bf16]; T] = each(
                    &[],
                    #[inline(always)]
                    |t| &x[t][start..end],
                );
                own.dots::<S, R, T>(s, w_part, x_part, Ahead::Nothing)
            },
        )
    }
}

/// Columns of a block of the official checkpoints.
const BLOCK: usize = 128;

/// Inner products of rows of whole blocks with tokens: sums, scaled sums and factors in registers all the while.
#[inline(always)]
fn whole_blocks<S: Simd, const R: usize, const T: usize>(
    s: S,
    w: [(&[bf16], &[f32], &[u8]); R],
    x: [&[bf16]; T],
) -> [[S::F; T]; R] {
    type Block = [[bf16; PAIRS]; BLOCK / PAIRS];
    let count = w[0].1.len();
    let w_blocks: [&[Block]; R] = each(
        &[],
        #[inline(always)]
        |r| &w[r].0.as_chunks().0.as_chunks().0[..count],
    );
    let x_blocks: [&[Block]; T] = each(
        &[],
        #[inline(always)]
        |t| &x[t].as_chunks().0.as_chunks().0[..count],
    );
    let mut sums = [[s.splat(0.0); T]; R];
    for block in 0..count {
        let mut parts = [[s.splat(0.0); T]; R];
        for i in 0..BLOCK / PAIRS {
            let own: [S::H; R] = each(
                s.halves(&w_blocks[0][block][i]),
                #[inline(always)]
                |r| s.halves(&w_blocks[r][block][i]),
            );
            for t in 0..T {
                let x = s.halves(&x_blocks[t][block][i]);
                for r in 0..R {
                    parts[r][t] = s.pairs(parts[r][t], own[r], x);
                }
            }
        }
        for r in 0..R {
            let scale = s.splat(w[r].1[block]);
            for t in 0..T {
                sums[r][t] = s.fma(scale, parts[r][t], sums[r][t]);
            }
        }
    }
    sums
}

/// Tokens up to which a code is looked up anew for every token.
const LOOKED_UP: usize = 3;

/// [`products`] of FP8 codes. Of many tokens the rows of a part are written out in bf16 before: a code is
/// looked up once and not once for every few tokens.
#[inline(always)]
pub(crate) fn products_of_codes<S: Simd>(
    s: S,
    codes: &Codes<'_>,
    x: &[bf16],
    part: &mut Part<'_, f32>,
) {
    let d = codes.d;
    if part.rows.len() <= LOOKED_UP {
        return products(s, codes, x, d, part);
    }
    let (first, n) = (part.columns.start, part.columns.len());
    let mut data = room(n * d);
    let own = &codes.data[first * d..][..n * d];
    for (i, (o, own)) in data.chunks_exact_mut(d).zip(own.chunks_exact(d)).enumerate() {
        let (o, o_rest) = o.as_chunks_mut::<QUADS>();
        let (own, rest) = own.as_chunks::<QUADS>();
        for (at, (o, own)) in o.iter_mut().zip(own).enumerate() {
            s.ahead(codes.data, (first + i) * d + at * QUADS + AHEAD);
            s.put_fp8(o, own);
        }
        let mut last = [bf16::ZERO; QUADS];
        s.put_fp8(&mut last, &filled(rest, 0));
        o_rest.copy_from_slice(&last[..rest.len()]);
    }
    products(s, &Written { data: &data, first, codes }, x, d, part);
}

/// Sixty-four bf16 numbers.
#[inline(always)]
fn pair_up<S: Simd>(s: S, x: &[bf16; QUADS]) -> [S::H; 2] {
    let [low, high] = x.as_chunks().0 else { unreachable!("two halves") };
    [s.halves(low), s.halves(high)]
}

/// The columns of a part of `o` for its tokens, `x` `[rows of the part, D]`, [`stride`] apart.
#[inline(always)]
pub(crate) fn products<S: Simd, P: Pairs>(
    s: S,
    w: &P,
    x: &[bf16],
    d: usize,
    part: &mut Part<'_, f32>,
) {
    let tokens = x.len() / stride(d);
    if S::REGISTERS == 32 && P::PLAIN {
        tiled!(tokens, [6, 3, 2, 1], |t, T| rows::<S, P, 4, T>(s, w, x, d, t, part));
    } else if S::REGISTERS == 32 {
        tiled!(tokens, [3, 2, 1], |t, T| rows::<S, P, 4, T>(s, w, x, d, t, part));
    } else {
        tiled!(tokens, [2, 1], |t, T| rows::<S, P, 2, T>(s, w, x, d, t, part));
    }
}

/// Bytes between what is multiplied and what memory is asked for, where some rows are multiplied at a time.
const AHEAD: usize = 1 << 14;

/// All rows of a part with `T` tokens from `t` on. Not inlined: among the products of other formats and tokens its
/// loops had their addresses on the stack.
#[inline(never)]
fn rows<S: Simd, P: Pairs, const R: usize, const T: usize>(
    s: S,
    w: &P,
    x: &[bf16],
    d: usize,
    t: usize,
    part: &mut Part<'_, f32>,
) {
    s.run(
        #[inline(always)]
        || rows_here::<S, P, R, T>(s, w, x, d, t, part),
    );
}

#[inline(always)]
fn rows_here<S: Simd, P: Pairs, const R: usize, const T: usize>(
    s: S,
    w: &P,
    x: &[bf16],
    d: usize,
    t: usize,
    part: &mut Part<'_, f32>,
) {
    let (start, n) = (part.columns.start, part.columns.len());
    let x: [&[bf16]; T] = each(
        &[],
        #[inline(always)]
        |i| &x[(t + i) * stride(d)..][..d],
    );
    let bytes = w.bytes();
    let far = AHEAD.div_ceil(R * bytes.max(1)) * R;
    let mut r = 0;
    while r + R <= n {
        let own = each(
            w.at(start + r),
            #[inline(always)]
            |i| w.at(start + r + i),
        );
        // One token waits for memory. The first of some ask for rows after these; those after them have time to
        // ask, row by row, for the next part, which is this thread's as a rule.
        let sums = if T == 1 && t == 0 {
            each(
                [s.splat(0.0); T],
                #[inline(always)]
                |i| w.dots::<S, 1, T>(s, [own[i]], x, Ahead::First(P::NEAR))[0],
            )
        } else {
            let row = (t / T).saturating_sub(1) * n.div_ceil(R) + r / R;
            let rows = if t == 0 { far } else { n - r + row };
            let ahead = match t {
                _ if w.count() <= start + r + rows => Ahead::Nothing,
                0 => Ahead::Each(rows * bytes),
                _ if row < n => Ahead::First(rows * bytes),
                _ => Ahead::Nothing,
            };
            w.dots::<S, R, T>(s, own, x, ahead)
        };
        for i in 0..T {
            let o = &mut part.row(t + i)[r..r + R];
            for (j, o) in o.chunks_mut(4).enumerate() {
                let zero = s.splat(0.0);
                let four = each(
                    zero,
                    #[inline(always)]
                    |k| sums.get(4 * j + k).map_or(zero, |sums| sums[i]),
                );
                o.copy_from_slice(&s.sum4(four)[..o.len()]);
            }
        }
        r += R;
    }
    while r < n {
        let own = [w.at(start + r)];
        let [sums] = w.dots::<S, 1, T>(s, own, x, Ahead::Nothing);
        for (i, sum) in sums.into_iter().enumerate() {
            part.row(t + i)[r] = s.sum4([sum; 4])[0];
        }
        r += 1;
    }
}
