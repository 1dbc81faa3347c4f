use golden::{
    ops::causal_conv1d::{Inputs, Outputs},
    packed::rows,
};
use ndarray::{Array2, Array3, Axis, concatenate, s};

use crate::real::{Real, Site};

/// `o[t, c] = silu(sum_j weight[c, j] * x[t - (W - 1) + j, c])`, each sequence preceded by its
/// `state`; the new state is the last `W - 1` rows of old state and tokens together.
///
/// `x`, `o`: `[N, C]`; `weight`: `[C, W]`; `state`: `[S, C, W - 1]`.
pub fn causal_conv1d<R: Real>(Inputs { x, weight, state, cu_seqlens }: &Inputs<R>) -> Outputs<R> {
    let (c, w) = weight.dim();
    // Taps as rows, so that the inner loop runs over channels.
    let taps = weight.t().as_standard_layout().map(|&w| R::cast(w));
    let mut o = Array2::from_elem(x.dim(), R::zero());
    let mut after = Array3::from_elem(state.dim(), R::zero());
    for (i, range) in rows(cu_seqlens).into_iter().enumerate() {
        // [W - 1 + T, C]: the window, then the tokens.
        let before = state.index_axis(Axis(0), i).reversed_axes();
        let all = concatenate(Axis(0), &[before, x.slice(s![range.clone(), ..])])
            .expect("C columns each");
        for (t, mut row) in o.slice_mut(s![range, ..]).rows_mut().into_iter().enumerate() {
            for j in 0..w {
                for ((o, &x), &tap) in row.iter_mut().zip(all.row(t + j)).zip(taps.row(j)) {
                    *o += tap * x;
                }
            }
            row.mapv_inplace(|sum| sum.at(Site::Conv).silu().at(Site::ConvOut));
        }
        let last = all.slice(s![all.nrows() - (w - 1).., ..]);
        after.index_axis_mut(Axis(0), i).assign(&last.t());
    }
    assert_eq!(c, x.ncols(), "causal_conv1d: x and weight differ in channels");
    Outputs { o: o.into_shared(), state: after.into_shared() }
}
