//! What a file of another engine holds, one prompt and one tap at a time.

use std::{
    collections::HashMap,
    fmt,
    ops::Deref,
    path::{Path, PathBuf},
};

use golden::compare::listed::Row;
use ndarray::{Array2, Array3};
use safetensors::{Dtype, SafeTensors};

use crate::{
    exit::refuse,
    logits::{Prompt, integers},
};

/// A safetensors file, its bytes where they were.
pub(crate) struct File {
    path: PathBuf,
    data: Box<dyn Deref<Target = [u8]>>,
}

/// The tensors of one prompt in it.
pub(crate) struct Part<'a> {
    path: &'a Path,
    file: SafeTensors<'a>,
    /// What the names begin with: nothing, or `P/`.
    prefix: String,
    said: Option<HashMap<String, String>>,
}

/// Answers to one tap, before they are held against anything: `[B, R]` rows.
pub(crate) enum Said {
    /// `[B, R, V]`.
    Logits(Array3<f32>),
    /// Per sequence and row, what is listed of it.
    Listed(Vec<Vec<Row>>),
}

impl Said {
    /// Sequences and rows.
    pub(crate) fn dim(&self) -> (usize, usize) {
        match self {
            Said::Logits(x) => (x.dim().0, x.dim().1),
            Said::Listed(rows) => (rows.len(), rows.first().map_or(0, Vec::len)),
        }
    }
}

impl File {
    /// Opens one.
    pub(crate) fn open(path: &Path) -> anyhow::Result<File> {
        let data =
            golden::map::map(path).map_err(|e| refuse(format!("{}: {e}", path.display())))?;
        Ok(File { path: path.to_owned(), data: Box::new(data) })
    }

    /// Its tensors whose names begin with `P/` if there are any, else those whose names do not.
    pub(crate) fn part(&self, prompt: Option<&str>) -> anyhow::Result<Part<'_>> {
        let wrong = |e: &dyn fmt::Display| refuse(format!("{}: {e}", self.path.display()));
        let file = SafeTensors::deserialize(&self.data).map_err(|e| wrong(&e))?;
        let prefix = prompt.map(|id| format!("{id}/")).unwrap_or_default();
        let names = file.names();
        let named = names.iter().any(|name| name.starts_with(&prefix));
        let nameless = names.iter().any(|name| !name.contains('/'));
        let prefix = if !named && nameless { String::new() } else { prefix };
        let (_, header) = SafeTensors::read_metadata(&self.data).map_err(|e| wrong(&e))?;
        Ok(Part { path: &self.path, file, prefix, said: header.metadata().clone() })
    }

    /// Refuses a file in which no prompt has an answer, before anything is asked of a recording.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        let part = self.part(None)?;
        let last = |name: &str| {
            name.rsplit('/').next().is_some_and(|name| {
                name.ends_with("logits")
                    || name.ends_with("topk_ids")
                    || name.ends_with("topk_logprobs")
            })
        };
        if part.file.names().iter().any(|name| last(name)) {
            return Ok(());
        }
        part.said("logits").map(|_| ())
    }

    /// Whether it holds the tap `logits` of no named prompt.
    pub(crate) fn is_plain(&self) -> anyhow::Result<bool> {
        let part = self.part(None)?;
        Ok(part.has("logits"))
    }
}

impl Part<'_> {
    /// A refusal that names the file.
    pub(crate) fn wrong(&self, what: impl fmt::Display) -> anyhow::Error {
        refuse(format!("{}: {what}", self.path.display()))
    }

    /// The full name of a tensor.
    pub(crate) fn name(&self, tensor: &str) -> String {
        format!("{}{tensor}", self.prefix)
    }

    /// Whether it holds a tap, in either layout.
    pub(crate) fn has(&self, tap: &str) -> bool {
        [tap, &listed("ids", tap), &listed("logprobs", tap)]
            .iter()
            .any(|name| self.file.tensor(&self.name(name)).is_ok())
    }

    /// The prompt it was made of, if it says so.
    pub(crate) fn prompt(&self) -> anyhow::Result<Option<Prompt>> {
        Prompt::within(&self.file, &self.prefix).map_err(|e| self.wrong(e))
    }

    /// `[B, N]` integers, if they are there.
    pub(crate) fn integers(&self, tensor: &str) -> anyhow::Result<Option<Array2<i64>>> {
        integers(&self.file, &self.name(tensor)).map_err(|e| self.wrong(e))
    }

    /// `[B, R, N]` floats, if they are there.
    pub(crate) fn floats(&self, tensor: &str) -> anyhow::Result<Option<Array3<f32>>> {
        let name = self.name(tensor);
        let Ok(found) = self.file.tensor(&name) else { return Ok(None) };
        let (dtype, shape) = (found.dtype(), found.shape());
        let (Dtype::F32, &[b, t, v]) = (dtype, shape) else {
            return Err(self.wrong(format!(
                "tensor {name}: expected F32 with three axes, got {dtype:?} {shape:?}"
            )));
        };
        if b * t * v == 0 {
            return Err(self.wrong(format!("tensor {name}: empty, shape {shape:?}")));
        }
        let values =
            found.data().as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
        Array3::from_shape_vec((b, t, v), values).map(Some).map_err(|e| self.wrong(e))
    }

    /// What is said of the file beside its tensors.
    pub(crate) fn metadata(&self, key: &str) -> Option<&str> {
        self.said.as_ref()?.get(key).map(String::as_str)
    }

    /// The answers to a tap: logits, or a list of log-probabilities.
    pub(crate) fn said(&self, tap: &str) -> anyhow::Result<Said> {
        if let Some(logits) = self.floats(tap)? {
            return Ok(Said::Logits(logits));
        }
        let (ids, logprobs) = (listed("ids", tap), listed("logprobs", tap));
        match (self.ids(&ids)?, self.floats(&logprobs)?) {
            (Some(i), Some(p)) => self.rows(&ids, &i, &logprobs, &p).map(Said::Listed),
            (None, None) => Err(self.wrong(format!(
                "tensor {}: missing, expected F32 [B, T, V], or {ids} I64 [B, T, K] with {logprobs} F32 [B, T, K]",
                self.name(tap)
            ))),
            (None, Some(_)) => Err(self.wrong(format!(
                "tensor {}: missing, though there are {logprobs}",
                self.name(&ids)
            ))),
            (Some(_), None) => Err(self.wrong(format!(
                "tensor {}: missing, though there are {ids}",
                self.name(&logprobs)
            ))),
        }
    }

    /// `[B, T, K]` integers, if they are there.
    pub(crate) fn ids(&self, tensor: &str) -> anyhow::Result<Option<Array3<i64>>> {
        let name = self.name(tensor);
        let Ok(found) = self.file.tensor(&name) else { return Ok(None) };
        let (dtype, shape) = (found.dtype(), found.shape());
        let (Dtype::I64, &[b, t, k]) = (dtype, shape) else {
            return Err(self
                .wrong(format!("tensor {name}: expected I64 [B, T, K], got {dtype:?} {shape:?}")));
        };
        let values =
            found.data().as_chunks::<8>().0.iter().map(|&b| i64::from_le_bytes(b)).collect();
        Array3::from_shape_vec((b, t, k), values).map(Some).map_err(|e| self.wrong(e))
    }

    /// Rows of a list; an id of -1 is a place that holds nothing.
    fn rows(
        &self,
        ids_name: &str,
        ids: &Array3<i64>,
        name: &str,
        logprobs: &Array3<f32>,
    ) -> anyhow::Result<Vec<Vec<Row>>> {
        let (ids_name, name) = (self.name(ids_name), self.name(name));
        if ids.dim() != logprobs.dim() {
            return Err(self.wrong(format!(
                "tensor {name}: expected shape {:?}, as {ids_name} has, got {:?}",
                ids.shape(),
                logprobs.shape()
            )));
        }
        let (b, t, _) = ids.dim();
        let mut all = Vec::new();
        for i in 0..b {
            let mut rows = Vec::new();
            for at in 0..t {
                let mut entries: Vec<(u32, f64)> = Vec::new();
                for (&id, &logprob) in ids
                    .slice(ndarray::s![i, at, ..])
                    .iter()
                    .zip(logprobs.slice(ndarray::s![i, at, ..]))
                {
                    if id == -1 {
                        continue;
                    }
                    let here = format!("row {i}, column {at}");
                    let id = u32::try_from(id)
                        .map_err(|_| self.wrong(format!("tensor {ids_name}: {here}: id {id}")))?;
                    if 0.0 < logprob {
                        return Err(self.wrong(format!(
                            "tensor {name}: {here}: {logprob} of id {id} is above 0: no log-probability"
                        )));
                    }
                    entries.push((id, f64::from(logprob)));
                }
                let mut sorted: Vec<u32> = entries.iter().map(|(id, _)| *id).collect();
                sorted.sort_unstable();
                if let Some([twice, ..]) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
                    return Err(self.wrong(format!(
                        "tensor {ids_name}: row {i}, column {at}: id {twice} twice"
                    )));
                }
                rows.push(Row::listed(entries));
            }
            all.push(rows);
        }
        Ok(all)
    }
}

/// `topk_ids` and `topk_logprobs`; of another tap than `logits`, `step_topk_ids` and so on.
fn listed(what: &str, tap: &str) -> String {
    format!("{}topk_{what}", tap.strip_suffix("logits").unwrap_or(tap))
}
