//! Matrix products on blocks of rows.
//!
//! Few tokens: every row of the weight is read once from memory and meets all of them; memory sets
//! the pace. Many tokens: some rows of the weight are widened at a time and kept near while the
//! tokens pass by in blocks; arithmetic sets the pace. How an element is summed depends on `D` alone.

use std::cell::RefCell;

use golden::{
    Spec,
    ops::linear::{Case, Inputs, Linear, Outputs},
};

use crate::cpu::{
    pool::{self, Part},
    portable::{Planted, packed},
    simd::{DEPTH, LANES, Rows, Simd, Wide, widen},
    vector::{Fast, flat, flat_mut},
};

/// Rows of a weight matrix `[M, D]`, in whatever they are stored.
pub(crate) trait Source: Sync {
    /// Rows.
    fn rows(&self) -> usize;
    /// Columns.
    fn columns(&self) -> usize;
    /// `put(r, t, product)` of rows `from..to` with every row of `x` `[T, D]`.
    fn products<S: Simd>(
        &self,
        s: S,
        from: usize,
        to: usize,
        x: &[f32],
        put: impl FnMut(usize, usize, f32),
    );
    /// Row `i` as f32.
    fn row<S: Simd>(&self, s: S, i: usize, o: &mut [f32]);
    /// Rows `from..to` as f32: borrowed, or widened into `room`.
    #[inline(always)]
    fn widened<'a, S: Simd>(
        &'a self,
        s: S,
        from: usize,
        to: usize,
        room: &'a mut Vec<f32>,
    ) -> &'a [f32] {
        let d = self.columns();
        room.resize((to - from) * d, 0.0);
        for (i, row) in room.chunks_exact_mut(d).enumerate() {
            self.row(s, from + i, row);
        }
        room
    }
}

/// A matrix in a type that loads widen.
pub(crate) struct Matrix<'a, W> {
    /// `[M, D]`.
    pub(crate) data: &'a [W],
    /// `D`.
    pub(crate) d: usize,
}

impl<W: Wide> Source for Matrix<'_, W> {
    fn rows(&self) -> usize {
        self.data.len() / self.d
    }

    fn columns(&self) -> usize {
        self.d
    }

    #[inline(always)]
    fn products<S: Simd>(
        &self,
        s: S,
        from: usize,
        to: usize,
        x: &[f32],
        put: impl FnMut(usize, usize, f32),
    ) {
        let d = self.d;
        s.products(Rows::whole(&self.data[from * d..to * d], d), Rows::whole(x, d), put);
    }

    #[inline(always)]
    fn row<S: Simd>(&self, s: S, i: usize, o: &mut [f32]) {
        widen(s, o, &self.data[i * self.d..(i + 1) * self.d]);
    }

    #[inline(always)]
    fn widened<'a, S: Simd>(
        &'a self,
        s: S,
        from: usize,
        to: usize,
        room: &'a mut Vec<f32>,
    ) -> &'a [f32] {
        wide(s, &self.data[from * self.d..to * self.d], room)
    }
}

/// Elements as f32: borrowed, or widened into `room`.
#[inline(always)]
pub(crate) fn wide<'a, S: Simd, W: Wide>(s: S, data: &'a [W], room: &'a mut Vec<f32>) -> &'a [f32] {
    if let Some(data) = W::as_f32(data) {
        return data;
    }
    room.resize(data.len(), 0.0);
    widen(s, room, data);
    room
}

/// Tokens that meet a row of the weight as it comes from memory.
const FEW: usize = 8;

/// Rows of the weight that are kept widened.
const PANEL: usize = 24;

/// Tokens that meet a panel together.
const BLOCK: usize = 8;

/// Elements of a weight that make a task worth handing over: some ten microseconds.
const GRAIN: usize = 1 << 16;

thread_local! {
    static ROOM: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// `o[n, m] = sum_d x[n, d] w[m, d]`, summed in f32. `o`: `[N, M]`; `x`: `[N, D]`.
pub(crate) fn linear<S: Simd>(s: S, o: &mut [f32], x: &[f32], w: &impl Source) {
    let tokens = x.len() / w.columns();
    pool::parts(o, &[0, tokens], width(tokens, w), |_, part| rows_of(s, part, x, w));
}

/// Rows of the weight in a task.
pub(crate) fn width(tokens: usize, w: &impl Source) -> usize {
    if tokens <= FEW { GRAIN.div_ceil(w.columns()).next_multiple_of(8) } else { PANEL }
}

/// The columns of a part of `o`, for the tokens `x` `[rows of the part, D]`.
pub(crate) fn rows_of<S: Simd>(s: S, mut part: Part<'_, f32>, x: &[f32], w: &impl Source) {
    if part.rows.len() <= FEW {
        s.run(
            #[inline(always)]
            || few(s, &mut part, x, w),
        );
    } else {
        let mut room = ROOM.take();
        s.run(
            #[inline(always)]
            || many(s, &mut part, x, w, &mut room),
        );
        ROOM.set(room);
    }
}

#[inline(always)]
fn few<S: Simd>(s: S, part: &mut Part<'_, f32>, x: &[f32], w: &impl Source) {
    let columns = part.columns.clone();
    w.products(s, columns.start, columns.end, x, |r, t, sum| part.row(t)[r] = sum);
}

#[inline(always)]
fn many<S: Simd>(s: S, part: &mut Part<'_, f32>, x: &[f32], w: &impl Source, room: &mut Vec<f32>) {
    let (d, columns) = (w.columns(), part.columns.clone());
    let width = columns.len();
    let panel = w.widened(s, columns.start, columns.end, room);
    for (block, x) in x.chunks(BLOCK * d).enumerate() {
        let mut sums = [[0.0; BLOCK]; PANEL];
        for from in (0..d).step_by(DEPTH) {
            let len = DEPTH.min(d - from);
            let part = |data| Rows { data, stride: d, from, len };
            s.products(part(&panel[..width * d]), part(x), |r, t, sum| sums[r][t] += sum);
        }
        for t in 0..x.len() / d {
            for (o, sums) in part.row(block * BLOCK + t).iter_mut().zip(&sums) {
                *o = sums[t];
            }
        }
    }
}

/// A problem of the op.
pub(crate) struct Packed<E> {
    x: Vec<f32>,
    weight: Vec<E>,
    d: usize,
}

impl Fast for Linear {
    type Packed<E: Wide> = Packed<E>;

    fn pack<E: Wide>(_: &Spec<Case>, x: &Inputs) -> Packed<E> {
        Packed { x: flat(&x.x), weight: packed(&x.weight), d: x.x.ncols() }
    }

    fn run<S: Simd, E: Wide>(s: S, x: &Packed<E>, o: &mut Outputs, plant: Planted) {
        let (d, m) = (x.d, o.o.ncols());
        let weight = Matrix { data: &x.weight, d };
        let Some(fault) = plant.0 else {
            return linear(s, flat_mut(&mut o.o), &x.x, &weight);
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
        linear(s, flat_mut(&mut o.o), &rows, &weight);
        if fault == "last-row-shifted" && 1 < m {
            flat_mut(&mut o.o).chunks_exact_mut(m).for_each(|row| row[m - 1] = row[m - 2]);
        }
    }
}
