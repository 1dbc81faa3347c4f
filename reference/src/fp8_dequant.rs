use golden::{
    Tensor2, fp8,
    ops::fp8_dequant::{Inputs, Outputs},
};

use crate::real::Real;

/// `weight[m, d] = value(codes[m, d]) * scales[m / block_rows, d / block_cols]`.
///
/// `codes`, `weight`: `[M, D]`; `scales`: one per block, ragged at the edges.
pub fn fp8_dequant<R: Real>(
    Inputs { codes, scales, block_rows, block_cols }: &Inputs,
) -> Outputs<R> {
    let values: Vec<f32> = (0..=255).map(fp8::to_f32).collect();
    let weight = Tensor2::from_shape_fn(codes.dim(), |(m, d)| {
        R::cast(values[usize::from(codes[[m, d]])])
            * R::cast(scales[[m / block_rows, d / block_cols]])
    });
    Outputs { weight }
}
