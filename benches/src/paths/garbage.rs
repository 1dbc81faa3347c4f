//! Weights under which one token means NaN.
//!
//! Feeding it turns every state of its sequence into NaN, in any engine: what a released slot, a
//! neighbour or a draft that was taken back leaves behind shows wherever it is read again.

use std::{borrow::Cow, ops::Range, sync::Arc};

use golden::{
    Config, Dtype, Weights,
    names::EMBED_TOKENS,
    weights::{Meta, RawTensor, WeightError},
};

/// Other weights, but for the embedding of the last token of the vocabulary.
pub(crate) struct Garbage(pub(crate) Arc<dyn Weights>);

impl Garbage {
    /// The token whose embedding is NaN.
    pub(crate) fn token(config: &Config) -> u32 {
        config.vocab_size as u32 - 1
    }

    fn spoiled<'a>(&self, rows: &Range<usize>, mut tensor: RawTensor<'a>) -> RawTensor<'a> {
        let id = Garbage::token(self.config()) as usize;
        if !rows.contains(&id) {
            return tensor;
        }
        let nan: &[u8] = match tensor.dtype {
            Dtype::F32 => &0x7fc0_0000_u32.to_le_bytes(),
            Dtype::F16 => &0x7e00_u16.to_le_bytes(),
            Dtype::Bf16 => &0x7fc0_u16.to_le_bytes(),
            // FP8's code of NaN; embeddings are never quantised.
            _ => &[0x7f],
        };
        let row: usize = tensor.shape[1..].iter().product::<usize>() * nan.len();
        let mut data = tensor.data.into_owned();
        let start = (id - rows.start) * row;
        data[start..start + row].chunks_mut(nan.len()).for_each(|x| x.copy_from_slice(nan));
        tensor.data = Cow::Owned(data);
        tensor
    }
}

impl Weights for Garbage {
    fn config(&self) -> &Config {
        self.0.config()
    }

    fn origin(&self) -> String {
        self.0.origin()
    }

    fn meta(&self, name: &str) -> Option<Meta> {
        self.0.meta(name)
    }

    fn fetch(&self, name: &str) -> Result<RawTensor<'_>, WeightError> {
        let tensor = self.0.fetch(name)?;
        let all = 0..tensor.shape.first().copied().unwrap_or(0);
        Ok(if name == EMBED_TOKENS { self.spoiled(&all, tensor) } else { tensor })
    }

    fn fetch_rows(&self, name: &str, rows: Range<usize>) -> Result<RawTensor<'_>, WeightError> {
        let tensor = self.0.fetch_rows(name, rows.clone())?;
        Ok(if name == EMBED_TOKENS { self.spoiled(&rows, tensor) } else { tensor })
    }

    fn names(&self) -> Vec<String> {
        self.0.names()
    }
}
