//! The inputs of a problem as others read them: bytes of storage types.

use golden::{Dtype, View};
use half::{bf16, f16};

/// The inputs of a problem.
#[derive(Clone, Debug)]
pub struct Drawn {
    /// Tensors; optional ones where they are given.
    pub tensors: Vec<Stored>,
    /// Scalars.
    pub scalars: Vec<(&'static str, f64)>,
}

/// A tensor as it is stored.
#[derive(Clone, Debug)]
pub struct Stored {
    /// Its name.
    pub name: &'static str,
    /// What its elements are.
    pub dtype: safetensors::Dtype,
    /// Its sizes.
    pub shape: Vec<usize>,
    /// Little-endian elements, the last axis fastest.
    pub data: Vec<u8>,
}

impl Stored {
    pub(crate) fn new(name: &'static str, view: &View<'_>, dtype: Dtype) -> Stored {
        let (dtype, data) = match (view, dtype) {
            (View::F32(x), Dtype::Bf16) => {
                let bytes = x.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes());
                (safetensors::Dtype::BF16, bytes.collect())
            }
            (View::F32(x), Dtype::F16) => {
                let bytes = x.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes());
                (safetensors::Dtype::F16, bytes.collect())
            }
            (View::I64(x), _) => {
                let bytes = x.iter().flat_map(|x| x.to_le_bytes());
                (safetensors::Dtype::I64, bytes.collect())
            }
            (View::U8(x), _) => (safetensors::Dtype::U8, x.iter().copied().collect()),
            (view, _) => {
                let bytes = view.to_f64().into_iter().flat_map(|x| (x as f32).to_le_bytes());
                (safetensors::Dtype::F32, bytes.collect())
            }
        };
        Stored { name, dtype, shape: view.shape().to_vec(), data }
    }
}
