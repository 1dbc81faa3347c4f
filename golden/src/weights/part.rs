//! What one device of several keeps of a checkpoint.

use std::{borrow::Cow, ops::Range};

use super::{Meta, RawTensor, Recipe, WeightError, Weights};
use crate::{
    Config,
    split::{Cut, Share},
};

/// A share of weights: tensors have their names and the shapes that the share has of them.
pub struct Part<'a> {
    weights: &'a dyn Weights,
    share: Share,
}

impl<'a> Part<'a> {
    /// A share of these.
    pub fn new(weights: &'a dyn Weights, share: Share) -> Part<'a> {
        Part { weights, share }
    }

    /// Which one.
    pub fn share(&self) -> &Share {
        &self.share
    }

    /// A tensor of the whole, and what is had of it.
    fn cut(&self, name: &str) -> Option<(Meta, Cut)> {
        let meta = self.weights.meta(name)?;
        let cut = self.share.cut(name, &meta.shape);
        Some((meta, cut))
    }
}

impl Weights for Part<'_> {
    fn config(&self) -> &Config {
        &self.share.config
    }

    fn origin(&self) -> String {
        let Share { rank, ranks, .. } = self.share;
        format!("part {rank} of {ranks} of {}", self.weights.origin())
    }

    fn meta(&self, name: &str) -> Option<Meta> {
        let (mut meta, cut) = self.cut(name)?;
        match cut {
            Cut::Whole => {}
            Cut::Rows(runs) => meta.shape[0] = runs.iter().map(Range::len).sum(),
            Cut::Columns(columns) => *meta.shape.last_mut()? = columns.len(),
            Cut::Elsewhere => return None,
        }
        Some(meta)
    }

    fn fetch(&self, name: &str) -> Result<RawTensor<'_>, WeightError> {
        match self.cut(name) {
            Some((_, Cut::Rows(runs))) => {
                if let [run] = &runs[..] {
                    return self.weights.fetch_rows(name, run.clone());
                }
                let mut all: Option<RawTensor<'_>> = None;
                for run in runs {
                    let more = self.weights.fetch_rows(name, run)?;
                    match &mut all {
                        None => all = Some(more),
                        Some(all) => {
                            all.shape[0] += more.shape[0];
                            all.data.to_mut().extend_from_slice(&more.data);
                        }
                    }
                }
                all.ok_or_else(|| WeightError(format!("{}: no rows of {name}", self.origin())))
            }
            Some((meta, Cut::Columns(columns))) => {
                let raw = self.weights.fetch(name)?;
                let mut shape = meta.shape;
                let all = shape.last().copied().unwrap_or(1);
                let size = meta.dtype.size();
                let own = size * columns.start..size * columns.end;
                let rows = raw.data.chunks_exact((size * all).max(1));
                let data = rows.flat_map(|row| row[own.clone()].iter().copied()).collect();
                if let Some(last) = shape.last_mut() {
                    *last = columns.len();
                }
                Ok(RawTensor { dtype: raw.dtype, shape, data: Cow::Owned(data) })
            }
            Some((_, Cut::Elsewhere)) => {
                Err(WeightError(format!("{}: no tensor {name}", self.origin())))
            }
            Some((_, Cut::Whole)) | None => self.weights.fetch(name),
        }
    }

    fn fetch_rows(&self, name: &str, rows: Range<usize>) -> Result<RawTensor<'_>, WeightError> {
        if let Some((_, Cut::Whole)) | None = self.cut(name) {
            return self.weights.fetch_rows(name, rows);
        }
        let RawTensor { dtype, mut shape, data } = self.fetch(name)?;
        if shape[0] < rows.end {
            return Err(WeightError(format!(
                "{}: tensor {name}: rows {rows:?} of shape {shape:?}",
                self.origin()
            )));
        }
        let row = data.len() / shape[0].max(1);
        shape[0] = rows.len();
        let data = data[rows.start * row..rows.end * row].to_vec();
        Ok(RawTensor { dtype, shape, data: Cow::Owned(data) })
    }

    /// None of rows that are no single run.
    fn recipe(&self, name: &str) -> Option<Recipe> {
        let recipe = self.weights.recipe(name)?;
        let (meta, cut) = self.cut(name)?;
        let row: usize = meta.shape[1..].iter().product();
        match cut {
            Cut::Whole => Some(recipe),
            Cut::Rows(runs) => {
                let [run] = &runs[..] else { return None };
                Some(recipe.after((run.start * row) as u64))
            }
            Cut::Columns(own) => {
                let columns = Some([own.len(), row]);
                Some(Recipe { columns, ..recipe.after(own.start as u64) })
            }
            Cut::Elsewhere => None,
        }
    }

    fn names(&self) -> Vec<String> {
        let mut names = self.weights.names();
        names.retain(|name| self.meta(name).is_some());
        names
    }
}
