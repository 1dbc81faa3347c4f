//! The words that fast kernels are written in: sixteen numbers at a time.
//!
//! A kernel is a safe function generic over [`Simd`]; the instruction sets ([`super::avx2`],
//! [`super::avx512`], and plain Rust here) say how its words are done. Sixteen lanes whatever the
//! machine has. A value of an instruction set's type is the
//! proof that the processor has it, and [`Simd::run`] is where code begins to be compiled for it;
//! what it calls must be inlined to be compiled so: everything here is `#[inline(always)]`, and so must be
//! the closures that it is given (a closure that is not runs a hundred times slower, and right).

use half::{bf16, f16};

use super::stored::Stored;

mod codes;
mod plain;

pub(crate) use self::{
    codes::{FP8, FP8_WIDE, Table, fp8_by_table},
    plain::Plain,
};

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// Neighbouring bf16 numbers that are multiplied at a time.
pub(crate) const PAIRS: usize = 2 * LANES;

/// Bytes of a vector: four for each lane.
pub(crate) const QUADS: usize = 4 * LANES;

/// What the instruction sets of this architecture can load.
#[cfg(target_arch = "x86_64")]
pub(crate) trait Load: super::avx2::Load + super::avx512::Load {}
#[cfg(target_arch = "x86_64")]
impl<T: super::avx2::Load + super::avx512::Load> Load for T {}
/// Here there is none but plain Rust.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) trait Load {}
#[cfg(not(target_arch = "x86_64"))]
impl<T> Load for T {}

/// A storage type that is widened as it is loaded.
pub(crate) trait Wide: Stored + Load + zerocopy::FromZeros {
    /// The same elements, if they are f32 already.
    fn as_f32(_: &[Self]) -> Option<&[f32]> {
        None
    }
}

impl Wide for f32 {
    fn as_f32(x: &[f32]) -> Option<&[f32]> {
        Some(x)
    }
}
impl Wide for bf16 {}
impl Wide for f16 {}

/// An instruction set.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// In variant names: `cpu/avx2`.
    const NAME: &'static str;
    /// How many [`Self::F`] it keeps at hand.
    const REGISTERS: usize;
    /// Sixteen numbers.
    type F: Copy;
    /// Thirty-two bf16 numbers, two neighbours in each lane.
    type H: Copy;
    /// Sixteen integers.
    type I: Copy;
    /// Thirty-two integers of 16 bits, two neighbours in each lane.
    type W: Copy;
    /// Sixty-four bytes, four for each lane.
    type B: Copy;

    /// This instruction set, if the processor has it.
    fn new() -> Option<Self>;
    /// Runs `job`, compiled for this instruction set.
    fn run<T>(self, job: impl FnOnce() -> T) -> T;

    /// The same number in every lane.
    fn splat(self, x: f32) -> Self::F;
    /// Sixteen numbers, widened.
    fn load<W: Wide>(self, x: &[W; LANES]) -> Self::F;
    /// Thirty-two bf16 numbers as they are.
    fn halves(self, x: &[bf16; PAIRS]) -> Self::H;
    /// The same numbers from FP8 codes.
    fn fp8(self, x: &[u8; QUADS]) -> [Self::H; 2];
    /// Writes the numbers of FP8 codes as bf16, which holds each of them.
    #[inline(always)]
    fn put_fp8(self, o: &mut [bf16; QUADS], x: &[u8; QUADS]) {
        o.copy_from_slice(fp8_by_table(x).as_flattened());
    }
    /// The numbers of FP8 codes.
    fn fp8_wide(self, x: &[u8; QUADS]) -> [Self::F; 4];
    /// The same two numbers in every lane.
    fn pair(self, x: [bf16; 2]) -> Self::H;
    /// `acc_r + a_2r b_2r + a_2r+1 b_2r+1`; whether numbers below the smallest normal count is the
    /// machine's matter.
    fn pairs(self, acc: Self::F, a: Self::H, b: Self::H) -> Self::F;
    /// Rounds sixteen numbers to bf16.
    fn narrow(self, o: &mut [bf16; LANES], x: Self::F);
    /// Rounds thirty-two factors of [`pairs`](Self::pairs) to bf16; of numbers below the smallest normal as there.
    #[inline(always)]
    fn narrow_factors(self, o: &mut [bf16; PAIRS], x: [Self::F; 2]) {
        for (o, x) in o.as_chunks_mut().0.iter_mut().zip(x) {
            self.narrow(o, x);
        }
    }
    /// The same integer in every lane.
    fn int(self, x: i32) -> Self::I;
    /// Integers as numbers.
    fn number(self, x: Self::I) -> Self::F;
    /// Sixty-four bytes.
    fn bytes(self, x: &[u8; QUADS]) -> Self::B;
    /// The low halves of sixty-four bytes, and the high ones.
    fn nibbles(self, x: &[u8; QUADS]) -> [Self::B; 2];
    /// `acc_r + sum_j w_rj x_j` over the four unsigned bytes of each lane.
    fn quads(self, acc: Self::I, w: Self::B, x: [i8; 4]) -> Self::I;
    /// Thirty-two bytes, widened.
    fn words(self, x: &[i8; PAIRS]) -> Self::W;
    /// The same two integers in every lane.
    fn word_pair(self, x: [i16; 2]) -> Self::W;
    /// `acc_r + a_r0 b_r0 + a_r1 b_r1`.
    fn word_pairs(self, acc: Self::I, a: Self::W, b: Self::W) -> Self::I;
    /// Asks for the line of memory that element `at` of `x` stands in, for the second cache; `x` may end
    /// before it.
    fn ahead<T>(self, x: &[T], at: usize);
    /// Writes sixteen numbers.
    fn store(self, o: &mut [f32; LANES], x: Self::F);
    /// `a + b`.
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a - b`.
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b`.
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a / b`.
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once where the machine can.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The larger one; of a NaN and a number, either.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// The smaller one; of a NaN and a number, either.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// The nearest integer.
    fn round(self, x: Self::F) -> Self::F;
    /// `2^n` of integers from -126 to 127.
    fn pow2(self, n: Self::F) -> Self::F;
    /// `2^n x` of integers from -252 to 254, in two factors: one of them alone may be no number although the
    /// result is.
    #[inline(always)]
    fn scaled(self, x: Self::F, n: Self::F) -> Self::F {
        let half = self.round(self.mul(n, self.splat(0.5)));
        self.mul(self.mul(x, self.pow2(half)), self.pow2(self.sub(n, half)))
    }
    /// `y` where `x` is a number, NaN elsewhere.
    fn unless_nan(self, x: Self::F, y: Self::F) -> Self::F;
    /// Integers from -128 to 127 as bytes.
    fn eights(self, o: &mut [i8; LANES], x: Self::F);
    /// The nearest integers to `by x`, of two the even one, where all have two bytes.
    fn sixteens(self, o: &mut [i16; PAIRS], x: [Self::F; 2], by: Self::F);
    /// The largest lane; of NaN among others, any.
    fn largest(self, x: Self::F) -> f32;
    /// The larger of `most`, which is a size, and `|x|`; infinity is larger than every number, and NaN than that.
    fn sizes(self, most: Self::F, x: Self::F) -> Self::F;
    /// The largest size of all lanes.
    fn size(self, x: Self::F) -> f32;
    /// The sum of all lanes, in one order: halves are added until one is left.
    fn sum(self, x: Self::F) -> f32;
    /// The sums of four, each in one order.
    fn sum4(self, x: [Self::F; 4]) -> [f32; 4];

    /// Inner products of `R` rows with `T` rows, `[R][T]`, each in the same partial sums along the
    /// row whatever `R` and `T` are. All rows have one length.
    fn dots<W: Wide, X: Wide, const R: usize, const T: usize>(
        self,
        w: [&[W]; R],
        x: [&[X]; T],
    ) -> [[f32; T]; R];

    /// Calls `put(r, t, product)` with the inner product of every row of `w` with every row of `x`,
    /// in tiles that fit the registers: `w x'`.
    fn products<W: Wide, X: Wide>(
        self,
        w: Rows<'_, W>,
        x: Rows<'_, X>,
        put: impl FnMut(usize, usize, f32),
    );

    /// `o += a b`, in tiles that fit the registers: `o` `[I, J]`, `a` `[I, L]`, `b` `[L, J]`.
    fn accumulate<B: Wide>(self, o: &mut [f32], a: Factor<'_>, b: &[B], j: usize);

    /// `e^x` within 2 units in the last place, also of results below the smallest normal number.
    ///
    /// `x = n ln 2 + r` with `|r| <= ln 2 / 2` (`ln 2` in two parts, so that `n` times the first is
    /// exact), a polynomial of degree 6 for `e^r` (coefficients of Cephes' `expf`), and `2^n`.
    #[inline(always)]
    fn exp(self, x: Self::F) -> Self::F {
        let c = |x| self.splat(x);
        let bounded = self.max(self.min(x, c(89.0)), c(-104.0));
        let n = self.round(self.mul(bounded, c(std::f32::consts::LOG2_E)));
        let r = self.fma(n, c(-0.693_359_4), bounded);
        let r = self.fma(n, c(2.121_944_4e-4), r);
        let mut p = c(1.987_569_1e-4);
        for term in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
            p = self.fma(p, r, c(term));
        }
        let p = self.fma(p, self.mul(r, r), self.add(r, c(1.0)));
        // A NaN was lost to min and max.
        self.unless_nan(x, self.scaled(p, n))
    }

    /// `2^t` within 2 units in the last place, also of results below the smallest normal number.
    ///
    /// `t = n + f` with `f` from 0 to 1, [`EXP2`] of `f`, and `2^n`.
    #[inline(always)]
    fn exp2(self, t: Self::F) -> Self::F {
        let c = |x| self.splat(x);
        let bounded = self.max(self.min(t, c(129.0)), c(-151.0));
        let n = self.round(self.sub(bounded, c(0.5)));
        // A NaN was lost to min and max.
        self.unless_nan(t, self.scaled(self.exp2_of_part(self.sub(bounded, n)), n))
    }

    /// [`EXP2`] of `f`.
    #[inline(always)]
    fn exp2_of_part(self, f: Self::F) -> Self::F {
        let mut p = self.splat(EXP2[0]);
        for term in &EXP2[1..] {
            p = self.fma(p, f, self.splat(*term));
        }
        p
    }

    /// `1 / (1 + e^-x)`.
    #[inline(always)]
    fn sigmoid(self, x: Self::F) -> Self::F {
        let one = self.splat(1.0);
        self.div(one, self.add(one, self.exp(self.sub(self.splat(0.0), x))))
    }

    /// `x / (1 + e^-x)`.
    #[inline(always)]
    fn silu(self, x: Self::F) -> Self::F {
        let one = self.splat(1.0);
        self.div(x, self.add(one, self.exp(self.sub(self.splat(0.0), x))))
    }
}

/// The polynomial of degree 6 for `2^f` with the least largest relative error from 0 to 1, 2.1e-9, of those that
/// are 1 at 0 (by Lawson's algorithm); highest power first.
const EXP2: [f32; 7] =
    [2.161_291_6e-4, 1.246_784_6e-3, 9.675_452e-3, 5.548_528_2e-2, 0.240_229_31, 0.693_147_06, 1.0];

/// Walks `$n` tokens in tiles, the widest as long as they fit: `$of` with the first token of each and, as a
/// constant, how many it has.
macro_rules! tiled {
    ($n:expr, [$($width:literal),+], |$t:ident, $T:ident| $of:expr) => {
        let mut done = 0;
        $(
            while $width <= $n - done {
                const $T: usize = $width;
                let $t = done;
                $of;
                done += $width;
            }
        )+
    };
}
pub(crate) use tiled;

/// `[f(0), f(1), …]`. Those of the standard library are calls of their own where the compiler thinks it has
/// inlined enough, and calls are compiled for no instruction set.
#[inline(always)]
pub(crate) fn each<T: Copy, const N: usize>(filler: T, mut f: impl FnMut(usize) -> T) -> [T; N] {
    let mut all = [filler; N];
    for (i, x) in all.iter_mut().enumerate() {
        *x = f(i);
    }
    all
}

/// Some columns of the rows of a matrix.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a, W> {
    /// The matrix.
    pub(crate) data: &'a [W],
    /// Columns of the matrix.
    pub(crate) stride: usize,
    /// First of the columns that count.
    pub(crate) from: usize,
    /// How many count.
    pub(crate) len: usize,
}

impl<'a, W> Rows<'a, W> {
    /// Whole rows of `d` columns.
    #[inline(always)]
    pub(crate) fn whole(data: &'a [W], d: usize) -> Self {
        Rows { data, stride: d, from: 0, len: d }
    }

    #[inline(always)]
    fn count(&self) -> usize {
        // The last row may end where its columns do.
        (self.data.len() + self.stride - self.from - self.len) / self.stride
    }

    #[inline(always)]
    fn row(&self, i: usize) -> &'a [W] {
        &self.data[i * self.stride + self.from..][..self.len]
    }

    #[inline(always)]
    fn rows<const N: usize>(&self, i: usize) -> [&'a [W]; N] {
        each(
            &[],
            #[inline(always)]
            |n| self.row(i + n),
        )
    }
}

/// The left factor of [`Simd::accumulate`]: element `(i, l)` lies at `i * row + l * column`.
#[derive(Clone, Copy)]
pub(crate) struct Factor<'a> {
    /// The elements.
    pub(crate) data: &'a [f32],
    /// Distance of rows.
    pub(crate) row: usize,
    /// Distance of columns.
    pub(crate) column: usize,
}

/// Columns after which an inner product of rows is put aside, so that a sum has one order whether or
/// not the rows are walked in blocks.
pub(crate) const DEPTH: usize = 512;

#[inline(always)]
fn deep<S: Simd, W: Wide, X: Wide, const R: usize, const T: usize>(
    s: S,
    w: [&[W]; R],
    x: [&[X]; T],
) -> [[f32; T]; R] {
    let len = x.first().map_or(0, |x| x.len());
    if len <= DEPTH {
        return s.dots(w, x);
    }
    // What is added to this is what it was, whatever the sign of a zero.
    let mut sums = [[-0.0; T]; R];
    for at in (0..len).step_by(DEPTH) {
        let block = at..(at + DEPTH).min(len);
        let (mut w_block, mut x_block) = (w, x);
        w_block.iter_mut().for_each(|w| *w = &w[block.clone()]);
        x_block.iter_mut().for_each(|x| *x = &x[block.clone()]);
        let parts = s.dots(w_block, x_block);
        for (sums, parts) in sums.iter_mut().zip(parts) {
            for (sum, part) in sums.iter_mut().zip(parts) {
                *sum += part;
            }
        }
    }
    sums
}

/// [`Simd::products`] in tiles of `R` by `T`, and of `ALONE` rows by what is left of `x`.
#[inline(always)]
pub(crate) fn tiles<
    S: Simd,
    W: Wide,
    X: Wide,
    const R: usize,
    const T: usize,
    const ALONE: usize,
>(
    s: S,
    w: Rows<'_, W>,
    x: Rows<'_, X>,
    mut put: impl FnMut(usize, usize, f32),
) {
    let (rows, columns) = (w.count(), x.count());
    let whole = columns - columns % T;
    let mut r = 0;
    while 0 < whole && r + R <= rows {
        for t in (0..whole).step_by(T) {
            hand(deep(s, w.rows::<R>(r), x.rows::<T>(t)), r, t, &mut put);
        }
        r += R;
    }
    while 0 < whole && r < rows {
        for t in (0..whole).step_by(T) {
            hand(deep(s, w.rows::<1>(r), x.rows::<T>(t)), r, t, &mut put);
        }
        r += 1;
    }
    for t in whole..columns {
        let mut r = 0;
        while r + ALONE <= rows {
            hand(deep(s, w.rows::<ALONE>(r), x.rows::<1>(t)), r, t, &mut put);
            r += ALONE;
        }
        while r < rows {
            hand(deep(s, w.rows::<1>(r), x.rows::<1>(t)), r, t, &mut put);
            r += 1;
        }
    }
}

#[inline(always)]
fn hand<const R: usize, const T: usize>(
    sums: [[f32; T]; R],
    r: usize,
    t: usize,
    put: &mut impl FnMut(usize, usize, f32),
) {
    for (i, sums) in sums.into_iter().enumerate() {
        for (j, sum) in sums.into_iter().enumerate() {
            put(r + i, t + j, sum);
        }
    }
}

/// [`Simd::accumulate`] in tiles of `R` rows by `C` vectors.
#[inline(always)]
pub(crate) fn outer<S: Simd, B: Wide, const R: usize, const C: usize>(
    s: S,
    o: &mut [f32],
    a: Factor<'_>,
    b: &[B],
    j: usize,
) {
    let rows = o.len() / j;
    let mut i = 0;
    while i < rows {
        let many = i + R <= rows;
        let mut at = 0;
        while many && at + C * LANES <= j {
            tile::<_, _, R, C>(s, o, a, b, j, i, at);
            at += C * LANES;
        }
        // One row has the registers to itself, and is walked as it lies in memory.
        while !many && S::REGISTERS == 32 && at + 8 * LANES <= j {
            tile::<_, _, 1, 8>(s, o, a, b, j, i, at);
            at += 8 * LANES;
        }
        while !many && at + 4 * LANES <= j {
            tile::<_, _, 1, 4>(s, o, a, b, j, i, at);
            at += 4 * LANES;
        }
        while at + LANES <= j {
            if many {
                tile::<_, _, R, 1>(s, o, a, b, j, i, at);
            } else {
                tile::<_, _, 1, 1>(s, o, a, b, j, i, at);
            }
            at += LANES;
        }
        let taken = if many { R } else { 1 };
        for i in i..i + taken {
            for at in at..j {
                let mut sum = o[i * j + at];
                for (l, b) in b.chunks_exact(j).enumerate() {
                    sum += a.data[i * a.row + l * a.column] * b[at].load();
                }
                o[i * j + at] = sum;
            }
        }
        i += taken;
    }
}

/// `R` rows by `C` vectors of `o`, from row `i` and column `at` on.
#[inline(always)]
fn tile<S: Simd, B: Wide, const R: usize, const C: usize>(
    s: S,
    o: &mut [f32],
    a: Factor<'_>,
    b: &[B],
    j: usize,
    i: usize,
    at: usize,
) {
    let place = |r: usize, c: usize| (i + r) * j + at + c * LANES;
    let mut sums: [[S::F; C]; R] = [[s.splat(0.0); C]; R];
    for (r, sums) in sums.iter_mut().enumerate() {
        for (c, sum) in sums.iter_mut().enumerate() {
            *sum = s.load(lanes(&o[place(r, c)..]));
        }
    }
    let factors: [&[f32]; R] = each(
        &[],
        #[inline(always)]
        |r| &a.data[(i + r) * a.row..],
    );
    for (l, b) in b.chunks_exact(j).enumerate() {
        let b: [S::F; C] = each(
            s.splat(0.0),
            #[inline(always)]
            |c| s.load(lanes(&b[at + c * LANES..])),
        );
        for r in 0..R {
            let factor = s.splat(factors[r][l * a.column]);
            for c in 0..C {
                sums[r][c] = s.fma(factor, b[c], sums[r][c]);
            }
        }
    }
    for (r, sums) in sums.into_iter().enumerate() {
        for (c, sum) in sums.into_iter().enumerate() {
            s.store(lanes_mut(&mut o[place(r, c)..]), sum);
        }
    }
}

/// The first sixteen.
#[inline(always)]
pub(crate) fn lanes<W>(x: &[W]) -> &[W; LANES] {
    x.first_chunk().expect("sixteen elements")
}

/// The first sixteen.
#[inline(always)]
pub(crate) fn lanes_mut<W>(x: &mut [W]) -> &mut [W; LANES] {
    x.first_chunk_mut().expect("sixteen elements")
}

/// `o_i = f(a_i, b_i)`.
#[inline(always)]
pub(crate) fn map2<S: Simd, A: Wide, B: Wide>(
    s: S,
    o: &mut [f32],
    a: &[A],
    b: &[B],
    f: impl Fn(S::F, S::F) -> S::F,
) {
    assert!(o.len() == a.len() && o.len() == b.len());
    let ((o, o_rest), (a, a_rest), (b, b_rest)) =
        (o.as_chunks_mut::<LANES>(), a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for ((o, a), b) in o.iter_mut().zip(a).zip(b) {
        s.store(o, f(s.load(a), s.load(b)));
    }
    if !o_rest.is_empty() {
        let mut last = [0.0; LANES];
        s.store(&mut last, f(s.load(&padded(a_rest)), s.load(&padded(b_rest))));
        o_rest.copy_from_slice(&last[..o_rest.len()]);
    }
}

/// `o_i = x_i`.
#[inline(always)]
pub(crate) fn widen<S: Simd, X: Wide>(s: S, o: &mut [f32], x: &[X]) {
    assert_eq!(o.len(), x.len());
    let ((o, o_rest), (x, x_rest)) = (o.as_chunks_mut::<LANES>(), x.as_chunks::<LANES>());
    for (o, x) in o.iter_mut().zip(x) {
        s.store(o, s.load(x));
    }
    for (o, x) in o_rest.iter_mut().zip(x_rest) {
        *o = x.load();
    }
}

/// `o_i = f(o_i)`.
#[inline(always)]
pub(crate) fn map<S: Simd>(s: S, o: &mut [f32], f: impl Fn(S::F) -> S::F) {
    let (o, rest) = o.as_chunks_mut::<LANES>();
    for o in o {
        let x = s.load(o);
        s.store(o, f(x));
    }
    if !rest.is_empty() {
        let mut last = padded(rest);
        let x = s.load(&last);
        s.store(&mut last, f(x));
        rest.copy_from_slice(&last[..rest.len()]);
    }
}

/// `o_i += factor * x_i`.
#[inline(always)]
pub(crate) fn add_scaled<S: Simd, X: Wide>(s: S, o: &mut [f32], factor: f32, x: &[X]) {
    let factor = s.splat(factor);
    let ((o, o_rest), (x, x_rest)) = (o.as_chunks_mut::<LANES>(), x.as_chunks::<LANES>());
    for (o, x) in o.iter_mut().zip(x) {
        let sum = s.fma(factor, s.load(x), s.load(o));
        s.store(o, sum);
    }
    if !o_rest.is_empty() {
        let mut last = padded(o_rest);
        let sum = s.fma(factor, s.load(&padded(x_rest)), s.load(&last));
        s.store(&mut last, sum);
        o_rest.copy_from_slice(&last[..o_rest.len()]);
    }
}

/// What is left of a row behind its last whole chunk, and fillers.
#[inline(always)]
pub(crate) fn filled<T: Copy, const N: usize>(row: &[T], filler: T) -> [T; N] {
    let mut last = [filler; N];
    let rest = row.as_chunks::<N>().1;
    last[..rest.len()].copy_from_slice(rest);
    last
}

/// Fewer than sixteen, widened, and zeros.
#[inline(always)]
pub(crate) fn padded<W: Wide>(x: &[W]) -> [f32; LANES] {
    let mut padded = [0.0; LANES];
    for (to, from) in padded.iter_mut().zip(x) {
        *to = from.load();
    }
    padded
}

#[cfg(test)]
mod tests;
