//! Where weights come from: by checkpoint name, lazily.

use std::{borrow::Cow, fmt, ops::Range, sync::Arc};

use crate::{Config, Dtype, Narrow, names};

mod one_layer;
mod part;

pub use one_layer::OneLayer;
pub use part::Part;

/// A source of tensors under the official checkpoint names.
///
/// Tensors are fetched when they are needed and not kept: the operating system's page cache (for
/// files) or the generator (for the synthetic source) is the cache. Expert tensors are always asked
/// for one expert at a time under the per-expert names
/// (`model.layers.0.mlp.experts.7.gate_proj.weight`), also where the file holds them fused.
pub trait Weights: Send + Sync {
    /// The model that these weights belong to.
    fn config(&self) -> &Config;
    /// Where they come from, for messages: a path or `synthetic:…`.
    fn origin(&self) -> String;
    /// Dtype and shape of a tensor, or `None` if there is none of that name.
    fn meta(&self, name: &str) -> Option<Meta>;
    /// A whole tensor.
    fn fetch(&self, name: &str) -> Result<RawTensor<'_>, WeightError>;
    /// Some rows (indices of the first dimension) of a tensor.
    fn fetch_rows(&self, name: &str, rows: Range<usize>) -> Result<RawTensor<'_>, WeightError>;
    /// A whole tensor that outlives this source's borrow. Files share their memory map; what is
    /// generated is copied.
    fn keep(&self, name: &str) -> Result<Kept, WeightError> {
        let RawTensor { dtype, shape, data } = self.fetch(name)?;
        let data = data.into_owned();
        Ok(Kept { meta: Meta { dtype, shape }, bytes: 0..data.len(), owner: Arc::new(data) })
    }
    /// A whole tensor to be read once and let go: of files, a memory map of its own, so that the pages that
    /// were read do not stay with the process.
    fn pass(&self, name: &str) -> Result<Kept, WeightError> {
        self.keep(name)
    }
    /// Whether [`keep`](Self::keep) shares a memory map for this tensor, at an address that is a
    /// multiple of `align` bytes: then it costs no memory that must be there.
    fn is_mapped(&self, _name: &str, _align: usize) -> bool {
        false
    }
    /// What tells these weights from all others, without reading them: what is made of them is kept under
    /// it. `None` if nothing does.
    fn identity(&self) -> Option<String> {
        None
    }
    /// How a tensor is made, of a source that computes it: then it can be made where it is wanted.
    fn recipe(&self, _name: &str) -> Option<Recipe> {
        None
    }
    /// Every tensor name that [`fetch`](Self::fetch) answers, sorted as the checkpoint lists them.
    fn names(&self) -> Vec<String>;
}

/// What makes a synthetic tensor, in the words of [`crate::synthetic`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Recipe {
    /// Of its name and the seed.
    pub key: u64,
    /// What is added to every element.
    pub offset: f32,
    /// A power of two: of elements `2^e`, of scales `2^(e + 7)`.
    pub unit: f32,
    /// Where only some columns are made: how many of how many.
    pub columns: Option<[usize; 2]>,
}

impl Recipe {
    /// What makes `count` elements, one run of them after another: a recipe of all columns, where the run's first
    /// element stands, and how many it has.
    pub fn runs(self, count: usize) -> impl Iterator<Item = (Recipe, usize, usize)> {
        let [own, all] = self.columns.unwrap_or([count, count]);
        let whole = Recipe { columns: None, ..self };
        let runs = count.checked_div(own).unwrap_or(0);
        (0..runs).map(move |run| (whole.after((run * all) as u64), run * own, own))
    }
}

/// The same weights, each rounded to a narrower float type: a checkpoint as a model holds it that was
/// cast. FP8 codes, which mean nothing without their scales, stay as they are.
pub struct Rounded {
    weights: Arc<dyn Weights>,
    dtype: Dtype,
}

impl Rounded {
    /// Rounds what is fetched.
    pub fn new(weights: Arc<dyn Weights>, dtype: Dtype) -> Rounded {
        Rounded { weights, dtype }
    }

    fn round<'a>(&self, raw: RawTensor<'a>) -> RawTensor<'a> {
        let Some(wide) = raw.widen() else { return raw };
        let data = wide.iter().flat_map(|&x| self.dtype.round(x).to_le_bytes()).collect();
        RawTensor { dtype: Dtype::F32, shape: raw.shape, data: Cow::Owned(data) }
    }
}

impl Weights for Rounded {
    fn config(&self) -> &Config {
        self.weights.config()
    }

    fn origin(&self) -> String {
        format!("{} in {}", self.weights.origin(), self.dtype)
    }

    fn meta(&self, name: &str) -> Option<Meta> {
        self.weights.meta(name)
    }

    fn fetch(&self, name: &str) -> Result<RawTensor<'_>, WeightError> {
        self.weights.fetch(name).map(|raw| self.round(raw))
    }

    fn fetch_rows(&self, name: &str, rows: Range<usize>) -> Result<RawTensor<'_>, WeightError> {
        self.weights.fetch_rows(name, rows).map(|raw| self.round(raw))
    }

    fn names(&self) -> Vec<String> {
        self.weights.names()
    }
}

/// The same weights, projections as an engine keeps them that narrows them: what the reference is given
/// when such an engine is judged, so that what is asked of both is the same.
pub struct NarrowedWeights {
    weights: Arc<dyn Weights>,
    to: Option<Narrow>,
}

impl NarrowedWeights {
    /// Projections in a format ([`Narrow::of_tensor`] says which), `None` for bf16.
    ///
    /// # Errors
    /// If the weights are FP8 codes and not wanted as such.
    pub fn new(weights: Arc<dyn Weights>, to: Option<Narrow>) -> Result<NarrowedWeights, String> {
        if weights.config().fp8.is_some() && to.is_some() {
            let origin = weights.origin();
            return Err(format!(
                "{origin}: weights in FP8 that are narrowed further are not judged"
            ));
        }
        Ok(NarrowedWeights { weights, to })
    }

    fn narrow<'a>(&self, name: &str, raw: RawTensor<'a>) -> RawTensor<'a> {
        if !names::is_projection(name) {
            return raw;
        }
        let Some(mut wide) = raw.widen() else { return raw };
        let d = raw.shape.last().copied().unwrap_or(1).max(1);
        match self.to.and_then(|to| to.of_tensor(name)) {
            None => wide.iter_mut().for_each(|w| *w = Dtype::Bf16.round(*w)),
            Some(narrow) => narrow.round(&mut wide, d),
        }
        let data = wide.iter().flat_map(|x| x.to_le_bytes()).collect();
        RawTensor { dtype: Dtype::F32, shape: raw.shape, data: Cow::Owned(data) }
    }
}

impl Weights for NarrowedWeights {
    fn config(&self) -> &Config {
        self.weights.config()
    }

    fn origin(&self) -> String {
        format!("{} in {}", self.weights.origin(), self.to.map_or("bf16", Narrow::name))
    }

    fn meta(&self, name: &str) -> Option<Meta> {
        self.weights.meta(name)
    }

    fn fetch(&self, name: &str) -> Result<RawTensor<'_>, WeightError> {
        self.weights.fetch(name).map(|raw| self.narrow(name, raw))
    }

    fn fetch_rows(&self, name: &str, rows: Range<usize>) -> Result<RawTensor<'_>, WeightError> {
        // Blocks of FP8 are of many rows, but those are not narrowed here.
        self.weights.fetch_rows(name, rows).map(|raw| self.narrow(name, raw))
    }

    fn names(&self) -> Vec<String> {
        self.weights.names()
    }
}

/// Dtype and shape of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Meta {
    /// Storage type.
    pub dtype: Dtype,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
}

/// A tensor as it is stored, together with the memory that it lies in.
#[derive(Clone)]
pub struct Kept {
    /// Dtype and shape.
    pub meta: Meta,
    pub(crate) owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    pub(crate) bytes: Range<usize>,
}

impl Kept {
    /// Some bytes of memory that is shared.
    ///
    /// # Panics
    /// If it does not have them.
    pub fn new(meta: Meta, owner: Arc<dyn AsRef<[u8]> + Send + Sync>, bytes: Range<usize>) -> Kept {
        assert!(bytes.end <= (*owner).as_ref().len(), "bytes {bytes:?} of what is shared");
        Kept { meta, owner, bytes }
    }

    /// Some of these bytes, as bytes.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn part(&self, bytes: Range<usize>) -> Kept {
        let meta = Meta { dtype: Dtype::U8, shape: vec![bytes.len()] };
        let own = self.bytes.start + bytes.start..self.bytes.start + bytes.end;
        assert!(own.end <= self.bytes.end, "bytes {bytes:?} of {:?}", self.meta);
        Kept { meta, owner: self.owner.clone(), bytes: own }
    }

    /// Little-endian elements in row-major order.
    pub fn data(&self) -> &[u8] {
        &(*self.owner).as_ref()[self.bytes.clone()]
    }
}

impl fmt::Debug for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kept").field("meta", &self.meta).finish_non_exhaustive()
    }
}

/// A tensor as it is stored: little-endian elements in row-major order.
#[derive(Clone, Debug)]
pub struct RawTensor<'a> {
    /// Storage type.
    pub dtype: Dtype,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// The elements.
    pub data: Cow<'a, [u8]>,
}

impl RawTensor<'_> {
    /// The elements as `f32`, exactly; `None` for FP8 codes, which mean nothing without their
    /// scales, and for integers.
    pub fn widen(&self) -> Option<Vec<f32>> {
        let halves = || self.data.as_chunks::<2>().0.iter().copied();
        match self.dtype {
            Dtype::F32 => {
                Some(self.data.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect())
            }
            Dtype::F16 => Some(halves().map(|b| half::f16::from_le_bytes(b).to_f32()).collect()),
            Dtype::Bf16 => Some(halves().map(|b| half::bf16::from_le_bytes(b).to_f32()).collect()),
            Dtype::F64 | Dtype::Fp8 | Dtype::I64 | Dtype::U8 => None,
        }
    }
}

/// Why a tensor could not be had; every message names file and tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightError(pub String);

impl fmt::Display for WeightError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for WeightError {}
