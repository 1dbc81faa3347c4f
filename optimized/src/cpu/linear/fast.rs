//! Matrix products on blocks of rows.
//!
//! Few tokens: every row of the weight is read once from memory and meets all of them; memory sets
//! the pace. Many tokens: some rows of the weight are kept near while the tokens pass by in blocks;
//! arithmetic sets the pace. How an element is summed depends on `D` alone.

use std::{cell::RefCell, ops::Range};

use golden::{
    Dtype, Plan, Spec,
    ops::linear::{Case, Inputs, Linear, Outputs},
    plan,
};

use super::activations::{Activations, Reads, View};
use crate::cpu::{
    pool::{self, Part},
    portable::Planted,
    simd::{DEPTH, LANES, Rows, Simd, Wide, widen},
    vector::{Fast, flat, flat_mut},
    weight::Weight,
};

/// Rows of a weight matrix `[M, D]`, in whatever they are stored.
pub(crate) trait Source: Sync {
    /// Rows.
    fn rows(&self) -> usize;
    /// Columns.
    fn columns(&self) -> usize;
    /// What its products read.
    fn reads(&self) -> Reads;
    /// Rows of the weight in a task: a multiple of sixteen.
    fn width(&self, tokens: usize) -> usize;
    /// The columns of a part of `o` for its tokens `x`.
    fn products<S: Simd>(&self, s: S, x: View<'_>, part: &mut Part<'_, f32>, room: &mut Vec<f32>);
    /// Row `i` as f32.
    fn row<S: Simd>(&self, s: S, i: usize, o: &mut [f32]);
}

/// A matrix in a type that loads widen, for activations in f32.
pub(crate) struct Matrix<'a, W> {
    /// `[M, D]`.
    pub(crate) data: &'a [W],
    /// `D`.
    pub(crate) d: usize,
}

impl<W: Wide> Matrix<'_, W> {
    /// The columns of a part of `o` for its tokens `x`.
    #[inline(always)]
    pub(crate) fn products<S: Simd>(
        &self,
        s: S,
        x: &[f32],
        part: &mut Part<'_, f32>,
        room: &mut Vec<f32>,
    ) {
        let (d, columns) = (self.d, part.columns.clone());
        let own = Matrix { data: &self.data[columns.start * d..columns.end * d], d };
        if part.rows.len() <= FEW {
            own.few(s, x, part);
        } else {
            own.many(s, x, part, room);
        }
    }

    /// All rows, which are the columns of a part of `o`, for few tokens.
    #[inline(always)]
    pub(crate) fn few<S: Simd>(&self, s: S, x: &[f32], part: &mut Part<'_, f32>) {
        let (w, x) = (Rows::whole(self.data, self.d), Rows::whole(x, self.d));
        s.products(w, x, |r, t, sum| part.row(t)[r] = sum);
    }

    /// The same for many: some rows at a time, some columns of them, which lie together. Rows a power of two
    /// apart would fall on the same lines of a cache.
    #[inline(always)]
    pub(crate) fn many<S: Simd>(
        &self,
        s: S,
        x: &[f32],
        part: &mut Part<'_, f32>,
        room: &mut Vec<f32>,
    ) {
        let d = self.d;
        room.resize((PANEL + BLOCK) * DEPTH, 0.0);
        let (panel, block) = room.split_at_mut(PANEL * DEPTH);
        for (i, rows) in self.data.chunks(PANEL * d).enumerate() {
            for from in (0..d).step_by(DEPTH) {
                let columns = from..(from + DEPTH).min(d);
                let panel = &mut panel[..rows.len() / d * columns.len()];
                let near = panel.chunks_exact_mut(columns.len());
                for (near, row) in near.zip(rows.chunks_exact(d)) {
                    widen(s, near, &row[columns.clone()]);
                }
                meet(s, panel, (x, d, columns), part, i * PANEL, block);
            }
        }
    }
}

/// Some rows of a weight, of which some `columns` are at hand, with the tokens `x` `[N, D]`: adds to these
/// columns of a part of `o`, or begins them. Not inlined: it is the same for all that weights are stored in.
#[inline(never)]
fn meet<S: Simd>(
    s: S,
    panel: &[f32],
    (x, d, columns): (&[f32], usize, Range<usize>),
    part: &mut Part<'_, f32>,
    at: usize,
    near: &mut [f32],
) {
    let (len, first) = (columns.len(), columns.start == 0);
    s.run(
        #[inline(always)]
        || {
            for (block, x) in x.chunks(BLOCK * d).enumerate() {
                let near = &mut near[..x.len() / d * len];
                for (near, x) in near.chunks_exact_mut(len).zip(x.chunks_exact(d)) {
                    near.copy_from_slice(&x[columns.clone()]);
                }
                let mut sums = [[0.0; PANEL]; BLOCK];
                let (w, x) = (Rows::whole(panel, len), Rows::whole(near, len));
                s.products(w, x, |r, t, sum| sums[t][r] = sum);
                for (t, sums) in sums.iter().take(near.len() / len).enumerate() {
                    let o = &mut part.row(block * BLOCK + t)[at..][..panel.len() / len];
                    if first {
                        o.copy_from_slice(&sums[..o.len()]);
                    } else {
                        o.iter_mut().zip(sums).for_each(|(o, sum)| *o += sum);
                    }
                }
            }
        },
    );
}

/// Tokens that meet a row of the weight as it comes from memory.
pub(crate) const FEW: usize = 8;

/// Rows of the weight that are kept near.
pub(crate) const PANEL: usize = 64;

/// Tokens that meet a panel together: whole tiles on every instruction set.
const BLOCK: usize = 12;

/// A task of few tokens has a multiple of so many rows.
const STEP: usize = 32;

/// Bytes of a weight in a task of few tokens: fewer are not worth handing over, some five to ten microseconds;
/// more hold up the others at the end.
const GRAIN: [usize; 2] = [1 << 17, 1 << 20];

/// Tasks of a thread where there are bytes for so many: with each begins what memory has not been asked for.
const TASKS: usize = 32;

thread_local! {
    static ROOM: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// `o[n, m] = sum_d x[n, d] w[m, d]`. `o`: `[N, M]`; `x`: `[N, D]`.
pub(crate) fn linear<S: Simd>(s: S, o: &mut [f32], x: &[f32], w: &impl Source) {
    let d = w.columns();
    let tokens = x.len() / d;
    let x = Activations::new(s, w.reads(), x, d);
    let width = w.width(tokens);
    // Of few rows there are few tasks, unless tokens are cut too.
    let most = if w.rows() < 8 * width { 48 } else { 512 };
    pool::parts(o, &blocks(tokens, most), width, |_, part| {
        let rows = x.rows(part.rows.start, part.rows.end);
        rows_of(s, part, rows, w);
    });
}

/// Tokens in blocks of about equal length, of `most` at most.
fn blocks(tokens: usize, most: usize) -> Vec<usize> {
    let block = tokens.div_ceil(tokens.div_ceil(most).max(1)).next_multiple_of(6).max(1);
    (0..tokens).step_by(block).chain([tokens]).collect()
}

/// Rows of a weight in a task, of all `rows`, of `bytes` each.
pub(crate) fn width(tokens: usize, rows: usize, bytes: usize) -> usize {
    if tokens <= FEW {
        let [least, most] = GRAIN;
        let grain = (rows * bytes / (TASKS * rayon::current_num_threads())).clamp(least, most);
        grain.div_ceil(bytes.max(1)).next_multiple_of(STEP)
    } else {
        PANEL
    }
}

/// The columns of a part of `o`, for its tokens `x`.
pub(crate) fn rows_of<S: Simd>(s: S, mut part: Part<'_, f32>, x: View<'_>, w: &impl Source) {
    let mut room = ROOM.take();
    s.run(
        #[inline(always)]
        || w.products(s, x, &mut part, &mut room),
    );
    ROOM.set(room);
}

/// What fast variants read of activations, and how they round.
pub(crate) fn plan(spec: &Spec<impl golden::Case>) -> Plan {
    let activations = match spec.weights {
        Some(golden::Narrow::Int8 | golden::Narrow::Int4) => plan::Activations::Int8,
        Some(golden::Narrow::Fp8) | None => plan::Activations::F32,
    };
    Plan { activations, ..Plan::stored(spec.dtype) }
}

/// The same, where products are those of bf16 pairs.
pub(crate) fn paired_plan(spec: &Spec<impl golden::Case>) -> Plan {
    let activations = plan::Activations::Bf16;
    Plan { activations, flush_to_zero: true, ..Plan::stored(spec.dtype) }
}

/// Why a problem has no products of bf16 pairs, if so.
pub(crate) fn unpaired(spec: &Spec<impl golden::Case>) -> Option<String> {
    let paired = spec.dtype == Dtype::Bf16 || spec.weights == Some(golden::Narrow::Fp8);
    (!paired).then(|| "multiplies weights in bf16 or FP8, others not".to_owned())
}

/// A problem of the op.
pub(crate) struct Packed {
    x: Vec<f32>,
    weight: Weight,
}

impl Fast for Linear {
    type Packed<E: Wide> = Packed;

    fn pack<E: Wide>(spec: &Spec<Case>, x: &Inputs, reads: Reads) -> Packed {
        let weight = Weight::of(spec, reads, &flat(&x.weight), x.x.ncols());
        Packed { x: flat(&x.x), weight }
    }

    fn run<S: Simd, E: Wide>(s: S, x: &Packed, o: &mut Outputs, plant: Planted) {
        let (d, m) = (x.weight.columns(), o.o.ncols());
        let Some(fault) = plant.0 else {
            return linear(s, flat_mut(&mut o.o), &x.x, &x.weight);
        };
        let mut rows = x.x.clone();
        match fault {
            "ragged-tail-dropped" => {
                rows.chunks_exact_mut(d).for_each(|row| row[d / LANES * LANES..].fill(0.0));
            }
            "last-token-stale" if 2 * d <= rows.len() => {
                let last = rows.len() - d;
                rows.copy_within(last - d..last, last);
            }
            _ => {}
        }
        linear(s, flat_mut(&mut o.o), &rows, &x.weight);
        if fault == "last-row-shifted" && 1 < m {
            flat_mut(&mut o.o).chunks_exact_mut(m).for_each(|row| row[m - 1] = row[m - 2]);
        }
    }
}
