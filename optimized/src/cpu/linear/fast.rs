//! Matrix products on blocks of rows.
//!
//! Few tokens: every row of the weight is read once from memory and meets all of them; memory sets
//! the pace. Many tokens: some rows of the weight are kept near while the tokens pass by in blocks;
//! arithmetic sets the pace. How an element is summed depends on `D` alone.

use std::cell::RefCell;

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
            panel(s, wide(s, own.data, room), d, x, part);
        }
    }

    /// All rows, which are the columns of a part of `o`, for few tokens.
    #[inline(always)]
    pub(crate) fn few<S: Simd>(&self, s: S, x: &[f32], part: &mut Part<'_, f32>) {
        let (w, x) = (Rows::whole(self.data, self.d), Rows::whole(x, self.d));
        s.products(w, x, |r, t, sum| part.row(t)[r] = sum);
    }
}

/// Elements as f32: borrowed, or widened into `room`.
#[inline(always)]
fn wide<'a, S: Simd, W: Wide>(s: S, data: &'a [W], room: &'a mut Vec<f32>) -> &'a [f32] {
    if let Some(data) = W::as_f32(data) {
        return data;
    }
    room.resize(data.len(), 0.0);
    widen(s, room, data);
    room
}

/// Rows of a panel `[columns of the part, D]` with many tokens, in blocks.
#[inline(always)]
pub(crate) fn panel<S: Simd>(s: S, panel: &[f32], d: usize, x: &[f32], part: &mut Part<'_, f32>) {
    // A part of few tokens may have as many columns as it likes.
    for (i, panel) in panel.chunks(PANEL * d).enumerate() {
        let width = panel.len() / d;
        for (block, x) in x.chunks(BLOCK * d).enumerate() {
            let mut sums = [[0.0; BLOCK]; PANEL];
            for from in (0..d).step_by(DEPTH) {
                let len = DEPTH.min(d - from);
                let columns = |data| Rows { data, stride: d, from, len };
                s.products(columns(panel), columns(x), |r, t, sum| sums[r][t] += sum);
            }
            for t in 0..x.len() / d {
                let o = &mut part.row(block * BLOCK + t)[i * PANEL..][..width];
                for (o, sums) in o.iter_mut().zip(&sums) {
                    *o = sums[t];
                }
            }
        }
    }
}

/// Tokens that meet a row of the weight as it comes from memory.
pub(crate) const FEW: usize = 8;

/// Rows of the weight that are kept widened.
pub(crate) const PANEL: usize = 32;

/// Tokens that meet a panel together.
const BLOCK: usize = 8;

/// Bytes of a weight that make a task worth handing over: some ten microseconds.
const GRAIN: usize = 1 << 17;

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

/// Rows of a weight in a task, of `bytes` each: of few tokens those that are worth handing over, of
/// many tokens `panel`.
pub(crate) fn width(tokens: usize, bytes: usize, panel: usize) -> usize {
    if tokens <= FEW { GRAIN.div_ceil(bytes.max(1)).next_multiple_of(PANEL) } else { panel }
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
