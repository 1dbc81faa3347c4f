//! Activations as the products of a weight matrix read them.

use half::bf16;

use crate::cpu::{
    pool,
    quantised::BLOCK,
    room::{Room, room},
    simd::{LANES, PAIRS, Simd, filled, lanes, lanes_mut},
};

/// What the products of a matrix read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reads {
    /// Activations as they are.
    F32,
    /// Rounded to bf16.
    Bf16,
    /// In eight bits, blocks of 32 along a row.
    Int8,
}

/// Rows of activations, made ready once for all the rows of a weight.
pub(crate) struct Activations<'a> {
    d: usize,
    kept: Kept<'a>,
}

enum Kept<'a> {
    F32(&'a [f32]),
    Gathered(Room<f32>),
    Bf16(Room<bf16>),
    Int8(Blocks),
}

/// Activations in eight bits: `x = scale code`.
struct Blocks {
    /// `[N, blocks, 32]`; the last block of a row is filled up with zeros.
    codes: Room<i8>,
    /// `[N, blocks]`.
    parts: Room<BlockPart>,
}

/// What a block of activations says beside its codes.
#[derive(Clone, Copy, zerocopy::FromZeros)]
pub(crate) struct BlockPart {
    pub(crate) scale: f32,
    /// `scale` times the sum of the codes.
    pub(crate) total: f32,
    /// `-128` times the sum of the codes: what weights that are stored 128 too large must start from.
    pub(crate) offset: i32,
}

/// Some rows of [`Activations`].
#[derive(Clone, Copy)]
pub(crate) enum View<'a> {
    /// `[N, D]`.
    F32(&'a [f32]),
    /// `[N, D]`, rows [`stride`] apart.
    Bf16(&'a [bf16]),
    /// `[N, blocks, 32]` and `[N, blocks]`.
    Int8(&'a [i8], &'a [BlockPart]),
}

/// Distance of rows in bf16: rows a power of two apart would fall on the same lines of a cache.
pub(crate) fn stride(d: usize) -> usize {
    d + PAIRS
}

/// Rows of a task.
const ROWS: usize = 8;

impl<'a> Activations<'a> {
    /// `x`: `[N, D]`.
    pub(crate) fn new<S: Simd>(s: S, reads: Reads, x: &'a [f32], d: usize) -> Activations<'a> {
        let kept = match reads {
            Reads::F32 => Kept::F32(x),
            Reads::Bf16 => {
                let mut rows = room(x.len() / d * stride(d));
                pool::rows(
                    s,
                    &mut rows,
                    (stride(d), ROWS),
                    #[inline(always)]
                    |i, row| narrow(s, &mut row[..d], &x[i * d..][..d]),
                );
                Kept::Bf16(rows)
            }
            Reads::Int8 => {
                let (n, blocks) = (x.len() / d, d.div_ceil(BLOCK));
                let mut codes = room(n * blocks * BLOCK);
                let mut parts = room(n * blocks);
                let rows =
                    ((&mut codes[..], ROWS * blocks * BLOCK), (&mut parts[..], ROWS * blocks));
                pool::pieces2(rows.0, rows.1, |i, codes, parts| {
                    s.run(
                        #[inline(always)]
                        || {
                            let codes = codes.chunks_exact_mut(blocks * BLOCK);
                            let rows = codes.zip(parts.chunks_exact_mut(blocks));
                            for ((codes, parts), x) in rows.zip(x[i * ROWS * d..].chunks_exact(d)) {
                                eight(s, codes, parts, x);
                            }
                        },
                    );
                });
                Kept::Int8(Blocks { codes, parts })
            }
        };
        Activations { d, kept }
    }

    /// The same rows in another order, or some of them, or some twice.
    pub(crate) fn gathered(&self, rows: &[usize]) -> Activations<'static> {
        let (d, blocks) = (self.d, self.d.div_ceil(BLOCK));
        let kept = match &self.kept {
            Kept::F32(x) => Kept::Gathered(gather(x, rows, d)),
            Kept::Gathered(x) => Kept::Gathered(gather(x, rows, d)),
            Kept::Bf16(x) => Kept::Bf16(gather(x, rows, stride(d))),
            Kept::Int8(x) => Kept::Int8(Blocks {
                codes: gather(&x.codes, rows, blocks * BLOCK),
                parts: gather(&x.parts, rows, blocks),
            }),
        };
        Activations { d, kept }
    }

    /// Rows `from..to`.
    pub(crate) fn rows(&self, from: usize, to: usize) -> View<'_> {
        let (d, blocks) = (self.d, self.d.div_ceil(BLOCK));
        match &self.kept {
            Kept::F32(x) => View::F32(&x[from * d..to * d]),
            Kept::Gathered(x) => View::F32(&x[from * d..to * d]),
            Kept::Bf16(x) => View::Bf16(&x[from * stride(d)..to * stride(d)]),
            Kept::Int8(x) => View::Int8(
                &x.codes[from * blocks * BLOCK..to * blocks * BLOCK],
                &x.parts[from * blocks..to * blocks],
            ),
        }
    }
}

/// Rows of `width` elements, those that `rows` says.
fn gather<T: crate::cpu::room::Kept + Send + Sync>(
    x: &[T],
    rows: &[usize],
    width: usize,
) -> Room<T> {
    let mut gathered = room(rows.len() * width);
    pool::pieces(&mut gathered, ROWS * width, |i, to| {
        for (to, &row) in to.chunks_exact_mut(width).zip(&rows[i * ROWS..]) {
            to.copy_from_slice(&x[row * width..][..width]);
        }
    });
    gathered
}

/// Rounds to bf16.
#[inline(always)]
pub(crate) fn narrow<S: Simd>(s: S, o: &mut [bf16], x: &[f32]) {
    let ((o, o_rest), (x, x_rest)) = (o.as_chunks_mut::<LANES>(), x.as_chunks::<LANES>());
    for (o, x) in o.iter_mut().zip(x) {
        s.narrow(o, s.load(x));
    }
    for (o, x) in o_rest.iter_mut().zip(x_rest) {
        *o = bf16::from_f32(*x);
    }
}

/// A row in eight bits.
#[inline(always)]
fn eight<S: Simd>(s: S, codes: &mut [i8], parts: &mut [BlockPart], x: &[f32]) {
    let (whole, rest) = x.as_chunks::<BLOCK>();
    let last = filled(rest, 0.0);
    let blocks = codes.as_chunks_mut::<BLOCK>().0.iter_mut().zip(parts).enumerate();
    for (i, (codes, part)) in blocks {
        let [a, b] = whole.get(i).unwrap_or(&last).as_chunks().0 else { unreachable!("halves") };
        let (a, b) = (s.load::<f32>(a), s.load::<f32>(b));
        let most = s.max(s.max(a, s.sub(s.splat(0.0), a)), s.max(b, s.sub(s.splat(0.0), b)));
        let mut scale = s.largest(most) / 127.0;
        let inverse = s.splat(if scale == 0.0 { 0.0 } else { 1.0 / scale });
        let (a, b) = (s.round(s.mul(a, inverse)), s.round(s.mul(b, inverse)));
        // Whole numbers: exact in any order.
        let total = s.sum(s.add(a, b));
        let [low, high] = codes.as_chunks_mut().0 else { unreachable!("halves") };
        s.eights(low, a);
        s.eights(high, b);
        // What is no number says so of its block, although no code could.
        if total.is_nan() {
            scale = f32::NAN;
        }
        *part = BlockPart { scale, total: scale * total, offset: -128 * total as i32 };
    }
}

/// A vector of a row.
#[inline(always)]
pub(crate) fn put_lanes<S: Simd>(s: S, o: &mut [f32], x: S::F) {
    if LANES <= o.len() {
        return s.store(lanes_mut(o), x);
    }
    let mut all = [0.0; LANES];
    s.store(&mut all, x);
    o.copy_from_slice(&lanes(&all)[..o.len()]);
}
