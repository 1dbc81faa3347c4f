//! Activations as the products of a weight matrix read them.

use half::bf16;

use crate::cpu::{
    pool,
    quantised::BLOCK,
    room::{Room, room},
    simd::{LANES, Simd, lanes, lanes_mut},
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
#[derive(Clone, Copy)]
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
    /// `[N, D]`.
    Bf16(&'a [bf16]),
    /// `[N, blocks, 32]` and `[N, blocks]`.
    Int8(&'a [i8], &'a [BlockPart]),
}

/// Rows of a task.
const ROWS: usize = 8;

impl<'a> Activations<'a> {
    /// `x`: `[N, D]`.
    pub(crate) fn new<S: Simd>(s: S, reads: Reads, x: &'a [f32], d: usize) -> Activations<'a> {
        let kept = match reads {
            Reads::F32 => Kept::F32(x),
            Reads::Bf16 => {
                let mut rows = room(x.len());
                pool::pieces(&mut rows, ROWS * d, |i, rows| {
                    s.run(
                        #[inline(always)]
                        || narrow(s, rows, &x[i * ROWS * d..][..rows.len()]),
                    );
                });
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

    /// Rows `from..to`.
    pub(crate) fn rows(&self, from: usize, to: usize) -> View<'_> {
        let (d, blocks) = (self.d, self.d.div_ceil(BLOCK));
        match &self.kept {
            Kept::F32(x) => View::F32(&x[from * d..to * d]),
            Kept::Bf16(x) => View::Bf16(&x[from * d..to * d]),
            Kept::Int8(x) => View::Int8(
                &x.codes[from * blocks * BLOCK..to * blocks * BLOCK],
                &x.parts[from * blocks..to * blocks],
            ),
        }
    }
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
    let blocks = codes.as_chunks_mut::<BLOCK>().0.iter_mut().zip(parts).zip(x.chunks(BLOCK));
    for ((codes, part), x) in blocks {
        let mut wide = [0.0; BLOCK];
        wide[..x.len()].copy_from_slice(x);
        let most = wide.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
        // A number that is none says so of its block; max would have passed over it.
        let nothing: f32 = wide.iter().map(|x| x * 0.0).sum();
        let scale = most / 127.0 + nothing;
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        let inverse = s.splat(inverse);
        let mut total = 0;
        for (codes, x) in codes.as_chunks_mut::<LANES>().0.iter_mut().zip(wide.as_chunks().0) {
            let mut steps = [0.0; LANES];
            s.store(&mut steps, s.round(s.mul(s.load::<f32>(x), inverse)));
            *codes = steps.map(|x| x as i8);
            total += codes.iter().map(|&code| i32::from(code)).sum::<i32>();
        }
        *part = BlockPart { scale, total: scale * total as f32, offset: -128 * total };
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
