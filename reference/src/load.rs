//! Weights as the reference uses them: widened to `f32`, FP8 dequantised.

use std::ops::Range;

use golden::{Dtype, Error, Tensor1, Tensor2, Weights, ops, weights::RawTensor};
use ndarray::{Array1, Array2};

use crate::fp8_dequant;

/// Reading weights in `f32`.
pub(crate) trait Load {
    /// A vector.
    fn vector(&self, name: &str) -> Result<Tensor1<f32>, Error>;
    /// A matrix; inner dimensions of one (`conv1d.weight` is `[C, 1, W]`) are dropped.
    fn matrix(&self, name: &str) -> Result<Tensor2<f32>, Error>;
    /// Some rows of a matrix that is not quantised.
    fn matrix_rows(&self, name: &str, rows: Range<usize>) -> Result<Tensor2<f32>, Error>;
}

impl Load for dyn Weights {
    fn vector(&self, name: &str) -> Result<Tensor1<f32>, Error> {
        Ok(Array1::from(widen(name, &self.fetch(name)?)?).into_shared())
    }

    fn matrix(&self, name: &str) -> Result<Tensor2<f32>, Error> {
        let raw = self.fetch(name)?;
        let shape = matrix_shape(name, &raw)?;
        if raw.dtype != Dtype::Fp8 {
            return Ok(Array2::from_shape_vec(shape, widen(name, &raw)?)?.into_shared());
        }
        let scale_name = golden::names::scale_of(name);
        let scales = self.fetch(&scale_name)?;
        let [block_rows, block_cols] = self
            .config()
            .fp8
            .as_ref()
            .ok_or_else(|| {
                format!("{name}: FP8 codes, but config.json has no quantization_config")
            })?
            .weight_block_size;
        let inputs = ops::fp8_dequant::Inputs {
            codes: Array2::from_shape_vec(shape, raw.data.into_owned())?.into_shared(),
            scales: Array2::from_shape_vec(
                matrix_shape(&scale_name, &scales)?,
                widen(&scale_name, &scales)?,
            )?
            .into_shared(),
            block_rows,
            block_cols,
        };
        Ok(fp8_dequant::<f32>(&inputs).weight)
    }

    fn matrix_rows(&self, name: &str, rows: Range<usize>) -> Result<Tensor2<f32>, Error> {
        let raw = self.fetch_rows(name, rows)?;
        Ok(Array2::from_shape_vec(matrix_shape(name, &raw)?, widen(name, &raw)?)?.into_shared())
    }
}

fn widen(name: &str, raw: &RawTensor<'_>) -> Result<Vec<f32>, Error> {
    raw.widen()
        .ok_or_else(|| format!("{name}: {} where a float type was expected", raw.dtype).into())
}

fn matrix_shape(name: &str, raw: &RawTensor<'_>) -> Result<(usize, usize), Error> {
    match raw.shape[..] {
        [m, d] | [m, 1, d] => Ok((m, d)),
        _ => Err(format!("{name}: shape {:?} where a matrix was expected", raw.shape).into()),
    }
}
