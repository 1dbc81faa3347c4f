//! Tensors and scalars on their way from one process to the other.

use golden::{
    Tensors, View,
    recording::{Recorded, serialize},
    tensor::Source,
};
use safetensors::SafeTensors;

use crate::evidence::held;

/// Tensors as they are sent, scalars as the metadata of the file: to the bit, as text.
pub(super) fn bundled(tensors: &impl Tensors) -> Result<Vec<u8>, golden::Error> {
    sent(tensors.tensors(), &tensors.scalars())
}

fn sent(
    tensors: Vec<(&'static str, View<'_>)>,
    scalars: &[(&'static str, f64)],
) -> Result<Vec<u8>, golden::Error> {
    let named: Vec<_> =
        tensors.into_iter().map(|(name, view)| (name.to_owned(), held(view))).collect();
    let scalars: Vec<_> =
        scalars.iter().map(|(name, value)| (*name, value.to_bits().to_string())).collect();
    let scalars: Vec<_> = scalars.iter().map(|(name, value)| (*name, value.as_str())).collect();
    Ok(serialize(&named, &scalars)?)
}

/// What came, as a source of named tensors; under a prefix, where several answers came in one file.
pub(super) struct Bundle<'a> {
    tensors: SafeTensors<'a>,
    scalars: std::collections::HashMap<String, String>,
    prefix: String,
}

impl<'a> Bundle<'a> {
    /// # Errors
    /// If the bytes are no safetensors.
    pub(super) fn open(bytes: &'a [u8]) -> Result<Bundle<'a>, String> {
        let text = |e: safetensors::SafeTensorError| format!("answers: {e}");
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(text)?;
        let tensors = SafeTensors::deserialize(bytes).map_err(text)?;
        let scalars = header.metadata().clone().unwrap_or_default();
        Ok(Bundle { tensors, scalars, prefix: String::new() })
    }

    /// The same under a prefix.
    pub(super) fn under(&mut self, prefix: &str) -> &Bundle<'a> {
        prefix.clone_into(&mut self.prefix);
        self
    }
}

impl Source for Bundle<'_> {
    fn tensor(&self, name: &str) -> Option<Recorded> {
        Recorded::of(&self.tensors.tensor(&format!("{}{name}", self.prefix)).ok()?)
    }

    fn scalar(&self, name: &str) -> Option<f64> {
        Some(f64::from_bits(self.scalars.get(name)?.parse().ok()?))
    }
}
