use golden::{
    Tensor2,
    ops::embedding::{Inputs, Outputs},
};

use crate::real::Real;

/// `o[n, d] = table[ids[n], d]`.
///
/// `ids`: `[N]`; `table`: `[M, D]`; `o`: `[N, D]`.
pub fn embedding<R: Real>(Inputs { ids, table }: &Inputs) -> Outputs<R> {
    let o = Tensor2::from_shape_fn((ids.len(), table.ncols()), |(n, d)| {
        R::cast(table[[ids[n] as usize, d]])
    });
    Outputs { o }
}
