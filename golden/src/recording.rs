//! Recorded answers: what the official implementation said, and how sure it was.
//!
//! A recording is a folder of two files. `manifest.json` (schema `karat.golden/1`) says which
//! checkpoint was asked what, by which versions, and how far the official implementation is from
//! itself (`self_noise`). `recording.safetensors` holds the prompts as token ids and the taps:
//!
//! | tensor | shape | what |
//! |---|---|---|
//! | `P/input_ids` | i64 `[B, T]` | prompt `P` |
//! | `P/attention_mask` | i64 `[B, T]` | 0 at left padding, if any |
//! | `P/hidden.l` | f32 `[B, T, D]` | `output_hidden_states`: 0 the embedding, `L` after the final norm |
//! | `P/logits` | f32 `[B, T, V]` | every position |
//! | `P/routing.l`, `P/margin.l` | i64 `[B, T, A]`, f32 `[B, T]` | experts of layer `l`, gap of logits to the next one |
//! | `P/conv_state.l` | f32 `[B, C, W-1]` | raw convolution inputs, oldest first |
//! | `P/recurrent_state.l` | f32 `[B, HV, K, V]` | after the prompt |
//! | `P/generated`, `P/step_logits` | i64 `[B, N]`, f32 `[B, N+1, V]` | cached greedy decode |
//! | `P/mtp_logits` | f32 `[B, T-1, V]` | MTP head |
//! | `P/bf16.hidden.l`, `P/bf16.logits`, `P/bf16.routing.l` | as without `bf16.` | the official code in bf16 |
//! | `P/….sketch` | f64 `[99]` | in place of a tap that is too large: see [`sketch`](crate::sketch) |
//! | `P/topk.ids`, `P/topk.logits`, `P/logsumexp` | i64, f32 `[B, T, 256]`, f64 `[B, T]` | in place of `logits` where those are too large |
//!
//! The tolerance of a tap follows from its own noise `s` (relative RMS of the official f32 run
//! against the same code in double) and `w` (the same of its worst token): relative RMS at most
//! `max(2e-5, 4 s)`, worst token at most `max(1e-4, 4 w)`.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use ndarray::{ArrayD, IxDyn};
use safetensors::{Dtype as StDtype, SafeTensorError, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::file;

/// The schema that this code reads and writes.
pub const SCHEMA: &str = "karat.golden/1";

/// What was asked: one committed file per recording, from which it can be made again.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Question {
    /// `karat.question/1`.
    pub schema: String,
    /// Name of the recording.
    pub id: String,
    /// What it covers.
    pub why: String,
    /// The checkpoint to ask.
    pub checkpoint: Source,
    /// The prompts, in the manifest's words plus their ids.
    pub prompts: Vec<Value>,
    /// Everything else that the recorder reads.
    #[serde(flatten)]
    pub rest: BTreeMap<String, Value>,
}

/// Where a recorded checkpoint comes from.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Source {
    /// `synthetic` (made again from the seed), `committed` (a folder of this repository) or
    /// `directory` (someone's disk).
    pub source: String,
    /// `config.json`, verbatim.
    #[serde(default)]
    pub config: Value,
    /// Storage type of a synthetic checkpoint.
    #[serde(default)]
    pub dtype: Option<String>,
    /// Seed of a synthetic checkpoint.
    #[serde(default)]
    pub seed: Option<u64>,
    /// Folder of a committed checkpoint, from the root of the repository.
    #[serde(default)]
    pub path: Option<String>,
    /// Files with their hashes; in manifests only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<FileHash>,
    /// blake3 of `config.json`; in manifests only.
    #[serde(default)]
    pub config_blake3: Option<String>,
    /// blake3 of `tokenizer.json`, if there is one.
    #[serde(default)]
    pub tokenizer_blake3: Option<String>,
    /// Public name of the checkpoint.
    #[serde(default)]
    pub repo: Option<String>,
    /// Its revision.
    #[serde(default)]
    pub revision: Option<String>,
}

/// A file and what is in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileHash {
    /// Name, from the checkpoint's folder.
    pub path: String,
    /// Size.
    pub bytes: u64,
    /// blake3, in hex.
    pub blake3: String,
}

/// `manifest.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Manifest {
    /// [`SCHEMA`].
    pub schema: String,
    /// Name of the recording.
    pub id: String,
    /// When, RFC 3339.
    pub created: String,
    /// What it covers.
    pub why: String,
    /// Why it was accepted.
    pub reason: String,
    /// blake3 of the recording that it replaces.
    pub supersedes: Option<String>,
    /// What was asked.
    pub checkpoint: Source,
    /// Who answered: versions and switches.
    pub producer: Value,
    /// The questions.
    #[serde(default)]
    pub prompts: Vec<Prompt>,
    /// Cases of a per-op recording.
    #[serde(default)]
    pub cases: Vec<OpCase>,
    /// Every recorded tensor.
    pub taps: Vec<Tap>,
    /// `prompt/tap` → kind (`f64`, `bf16`, `sdpa`, `batch4`) → distance.
    pub self_noise: BTreeMap<String, BTreeMap<String, Noise>>,
    /// Margins of the router.
    #[serde(default)]
    pub router: Value,
    /// `recording.safetensors`.
    pub recording: FileHash,
}

/// One prompt of a recording.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Prompt {
    /// First part of its tensors' names.
    pub id: String,
    /// How it was fed.
    pub kind: Kind,
    /// `B`.
    pub batch: usize,
    /// `T`.
    pub tokens: usize,
    /// Pieces in which the prompt was fed.
    #[serde(default)]
    pub split: Option<Vec<usize>>,
    /// Steps decoded after it.
    #[serde(default)]
    pub decode: Option<usize>,
    /// Whether an attention mask was given.
    #[serde(default)]
    pub padded: bool,
}

/// How a prompt was fed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// At once.
    Prefill,
    /// In pieces through one cache.
    Split,
    /// At once, then greedily token by token.
    Decode,
    /// At once, then the MTP head.
    Mtp,
}

/// One case of a per-op recording.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OpCase {
    /// The op.
    pub op: String,
    /// Middle part of its tensors' names.
    pub case: String,
    /// Scalars among its inputs.
    #[serde(default)]
    pub scalars: BTreeMap<String, f64>,
}

/// One recorded tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tap {
    /// Its name in `recording.safetensors`.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its type.
    pub dtype: String,
    /// `full`, `topk` or `sketch`.
    pub tier: String,
    /// blake3 of its little-endian bytes.
    pub blake3: String,
}

/// How far two runs of the official implementation are apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Noise {
    /// `sqrt(sum (a - b)^2 / sum b^2)`.
    pub rel_rms: f64,
    /// The largest `|a_t - b_t| / |b_t|` of any token.
    pub worst_token: f64,
}

/// Why a recording cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct RecordingError(pub String);

/// A recording on disk, its tensors decoded.
#[derive(Debug)]
pub struct Recording {
    /// Its folder.
    pub dir: PathBuf,
    /// What it says of itself.
    pub manifest: Manifest,
    bytes: Vec<u8>,
}

/// A recorded tensor.
#[derive(Clone, Debug, PartialEq)]
pub enum Recorded {
    /// Floats (f64 taps are sketches and sums).
    F32(ArrayD<f32>),
    /// Doubles.
    F64(ArrayD<f64>),
    /// Integers.
    I64(ArrayD<i64>),
    /// FP8 codes.
    U8(ArrayD<u8>),
}

impl Recorded {
    /// A tensor of a file, if its type is one of these.
    pub fn of(tensor: &TensorView<'_>) -> Option<Recorded> {
        let shape = IxDyn(tensor.shape());
        let data = tensor.data();
        match tensor.dtype() {
            StDtype::F32 => {
                let values =
                    data.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
                ArrayD::from_shape_vec(shape, values).ok().map(Recorded::F32)
            }
            StDtype::F64 => {
                let values =
                    data.as_chunks::<8>().0.iter().map(|&b| f64::from_le_bytes(b)).collect();
                ArrayD::from_shape_vec(shape, values).ok().map(Recorded::F64)
            }
            StDtype::I64 => {
                let values =
                    data.as_chunks::<8>().0.iter().map(|&b| i64::from_le_bytes(b)).collect();
                ArrayD::from_shape_vec(shape, values).ok().map(Recorded::I64)
            }
            StDtype::U8 => ArrayD::from_shape_vec(shape, data.to_vec()).ok().map(Recorded::U8),
            _ => None,
        }
    }

    fn dtype(&self) -> StDtype {
        match self {
            Recorded::F32(_) => StDtype::F32,
            Recorded::F64(_) => StDtype::F64,
            Recorded::I64(_) => StDtype::I64,
            Recorded::U8(_) => StDtype::U8,
        }
    }

    fn shape(&self) -> &[usize] {
        match self {
            Recorded::F32(x) => x.shape(),
            Recorded::F64(x) => x.shape(),
            Recorded::I64(x) => x.shape(),
            Recorded::U8(x) => x.shape(),
        }
    }

    /// Little-endian, in row-major order.
    fn bytes(&self) -> Vec<u8> {
        match self {
            Recorded::F32(x) => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Recorded::F64(x) => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Recorded::I64(x) => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Recorded::U8(x) => x.iter().copied().collect(),
        }
    }
}

/// Named tensors as a safetensors file, and metadata if there is any.
///
/// # Errors
/// If a name stands twice.
pub fn serialize(
    tensors: &[(String, Recorded)],
    metadata: &[(&str, &str)],
) -> Result<Vec<u8>, SafeTensorError> {
    let bytes: Vec<_> = tensors.iter().map(|(_, tensor)| tensor.bytes()).collect();
    let views = tensors
        .iter()
        .zip(&bytes)
        .map(|((name, tensor), data)| {
            Ok((name, TensorView::new(tensor.dtype(), tensor.shape().to_vec(), data)?))
        })
        .collect::<Result<Vec<_>, SafeTensorError>>()?;
    let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
    let metadata = (!metadata.is_empty()).then(|| metadata.iter().map(owned).collect());
    safetensors::serialize(views, metadata)
}

impl Manifest {
    /// Reads one, and checks what the code that uses it relies on.
    ///
    /// # Errors
    /// What is wrong, without the file's name.
    pub fn parse(text: &str) -> Result<Manifest, String> {
        let value: Value = serde_json::from_str(text).map_err(|e| e.to_string())?;
        let schema = value.get("schema").and_then(Value::as_str).unwrap_or("none");
        if schema != SCHEMA {
            return Err(format!(
                "schema {schema:?}, expected {SCHEMA:?}: made by another version of karat"
            ));
        }
        let manifest: Manifest = serde_json::from_value(value).map_err(|e| e.to_string())?;
        if !file::is_plain_name(&manifest.id) {
            return Err(format!("id: expected a plain name, got {:?}", manifest.id));
        }
        for prompt in &manifest.prompts {
            prompt.check().map_err(|what| format!("prompt {:?}: {what}", prompt.id))?;
        }
        Ok(manifest)
    }
}

impl Prompt {
    /// Sizes that contradict each other, or the tensors of the manifest.
    fn check(&self) -> Result<(), String> {
        if self.batch == 0 || self.tokens == 0 {
            return Err(format!("empty, shape [{}, {}]", self.batch, self.tokens));
        }
        if let Some(split) = &self.split {
            let sum = split.iter().try_fold(0_usize, |sum, &piece| sum.checked_add(piece));
            if sum != Some(self.tokens) || split.contains(&0) {
                return Err(format!(
                    "split: expected pieces above 0 that sum to {}, got {split:?}",
                    self.tokens
                ));
            }
        }
        Ok(())
    }
}

impl Recording {
    /// Reads and hash-checks a recording folder.
    pub fn open(dir: &Path) -> Result<Recording, RecordingError> {
        let path = dir.join("manifest.json");
        let text = file::text(&path).map_err(|e| error(&path, e))?;
        let manifest = Manifest::parse(&text).map_err(|e| error(&path, e))?;
        let path = dir.join("recording.safetensors");
        let bytes = file::bytes(&path, manifest.recording.bytes).map_err(|e| error(&path, e))?;
        let hash = blake3::hash(&bytes).to_hex();
        if hash.as_str() != manifest.recording.blake3 {
            let want = &manifest.recording.blake3;
            return Err(error(&path, format!("damaged: blake3 {hash}, the manifest says {want}")));
        }
        let parsed = SafeTensors::deserialize(&bytes).map_err(|e| error(&path, e))?;
        for tap in &manifest.taps {
            let tensor = parsed.tensor(&tap.name).map_err(|_| {
                error(&path, format!("tensor {} of the manifest is missing", tap.name))
            })?;
            if tensor.shape() != tap.shape {
                return Err(error(
                    &path,
                    format!(
                        "tensor {}: shape {:?}, the manifest says {:?}",
                        tap.name,
                        tensor.shape(),
                        tap.shape
                    ),
                ));
            }
        }
        Ok(Recording { dir: dir.to_owned(), manifest, bytes })
    }

    /// The folder's name.
    pub fn id(&self) -> &str {
        &self.manifest.id
    }

    /// A tensor, if it was recorded.
    pub fn get(&self, name: &str) -> Option<Recorded> {
        let parsed = SafeTensors::deserialize(&self.bytes).ok()?;
        let tensor = parsed.tensor(name).ok()?;
        Recorded::of(&tensor)
    }

    /// A tensor of floats that has to be there.
    pub fn f32(&self, name: &str) -> Result<ArrayD<f32>, RecordingError> {
        match self.get(name) {
            Some(Recorded::F32(x)) => Ok(x),
            Some(_) => Err(error(&self.dir, format!("tensor {name} is not f32"))),
            None => Err(error(&self.dir, format!("tensor {name} is missing"))),
        }
    }

    /// A tensor of doubles that has to be there.
    pub fn f64(&self, name: &str) -> Result<ArrayD<f64>, RecordingError> {
        match self.get(name) {
            Some(Recorded::F64(x)) => Ok(x),
            Some(_) => Err(error(&self.dir, format!("tensor {name} is not f64"))),
            None => Err(error(&self.dir, format!("tensor {name} is missing"))),
        }
    }

    /// A tensor of integers that has to be there.
    pub fn i64(&self, name: &str) -> Result<ArrayD<i64>, RecordingError> {
        match self.get(name) {
            Some(Recorded::I64(x)) => Ok(x),
            Some(_) => Err(error(&self.dir, format!("tensor {name} is not i64"))),
            None => Err(error(&self.dir, format!("tensor {name} is missing"))),
        }
    }

    /// How far the official implementation is from itself at a tap, and not at all where that was not
    /// measured: see [`noise_of`](Self::noise_of).
    pub fn noise(&self, tap: &str, kind: &str) -> Noise {
        self.noise_of(tap, kind).unwrap_or_default()
    }

    /// How far a run of another kind is from the official f32 run, where that was measured: of kind
    /// `f64` the same code in double, of `bf16`, `sdpa` and `batch4` what they say.
    pub fn noise_of(&self, tap: &str, kind: &str) -> Option<Noise> {
        self.manifest.self_noise.get(tap).and_then(|kinds| kinds.get(kind)).copied()
    }

    /// A prompt's tokens, one list per sequence, without left padding.
    pub fn tokens(&self, prompt: &Prompt) -> Result<Vec<Vec<u32>>, RecordingError> {
        let name = format!("{}/input_ids", prompt.id);
        let ids = self.i64(&name)?;
        let rows = self.real_rows(prompt)?;
        let ids = ids
            .into_dimensionality::<ndarray::Ix2>()
            .map_err(|e| error(&self.dir, format!("{name}: {e}")))?;
        self.shaped(&name, ids.shape(), prompt)?;
        let token =
            |id: i64| u32::try_from(id).map_err(|_| error(&self.dir, format!("{name}: id {id}")));
        ids.rows()
            .into_iter()
            .zip(rows)
            .map(|(row, real)| row.iter().skip(row.len() - real).map(|&id| token(id)).collect())
            .collect()
    }

    /// Tokens of each sequence that are not padding; padding is on the left.
    pub fn real_rows(&self, prompt: &Prompt) -> Result<Vec<usize>, RecordingError> {
        let name = format!("{}/attention_mask", prompt.id);
        if !prompt.padded {
            return Ok(vec![prompt.tokens; prompt.batch]);
        }
        let mask = self.i64(&name)?;
        self.shaped(&name, mask.shape(), prompt)?;
        mask.outer_iter()
            .map(|row| {
                let real = row.iter().filter(|&&m| m != 0).count();
                let left = row.iter().skip(row.len() - real).all(|&m| m != 0);
                if left && 0 < real {
                    Ok(real)
                } else {
                    Err(error(&self.dir, format!("{name}: padding is not on the left")))
                }
            })
            .collect()
    }

    /// A tensor of a prompt has its shape.
    fn shaped(&self, name: &str, shape: &[usize], prompt: &Prompt) -> Result<(), RecordingError> {
        let want = [prompt.batch, prompt.tokens];
        if shape == want {
            Ok(())
        } else {
            Err(error(&self.dir, format!("tensor {name}: expected shape {want:?}, got {shape:?}")))
        }
    }
}

fn error(path: &Path, what: impl std::fmt::Display) -> RecordingError {
    RecordingError(format!("{}: {what}", path.display()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::{Manifest, Question};

    const DECODE: &str = include_str!("../recordings/decode/manifest.json");

    #[test]
    fn a_manifest_that_contradicts_itself_is_refused() {
        let with = |change: fn(&mut Value)| {
            let mut value: Value = serde_json::from_str(DECODE).unwrap();
            change(&mut value);
            Manifest::parse(&value.to_string()).map(|_| ())
        };
        assert_eq!(with(|_| {}), Ok(()));
        for (change, said) in [
            ((|m| m["schema"] = json!("karat.golden/2")) as fn(&mut Value), "another version"),
            (|m| m["schema"] = Value::Null, "schema \"none\""),
            (|m| m["id"] = json!("../x"), "expected a plain name"),
            (|m| m["prompts"][0]["tokens"] = json!(0), "empty, shape [1, 0]"),
            (|m| m["prompts"][0]["batch"] = json!(0), "empty, shape [0, 65]"),
            (|m| m["prompts"][0]["batch"] = json!(-1), "invalid value"),
            (|m| m["prompts"][0]["split"] = json!([64]), "sum to 65"),
            (|m| m["prompts"][0]["split"] = json!([65, 0]), "pieces above 0"),
            (|m| m["prompts"][0]["split"] = json!([u64::MAX, 66]), "sum to 65"),
            (|m| m["prompts"][0]["kind"] = json!("guess"), "unknown variant"),
            (|m| m["taps"] = json!({}), "expected a sequence"),
        ] {
            let error = with(change).expect_err(said);
            assert!(error.contains(said), "{error}");
        }
    }

    proptest! {
        #[test]
        fn no_manifest_panics(text in ".{0,200}", key in "id|prompts|taps|self_noise|recording|cases|checkpoint|[a-z]{1,6}",
                              number in any::<f64>(), integer in any::<u64>()) {
            let _ = Manifest::parse(&text);
            for value in [json!(text), json!(number), json!(integer), json!([integer, text]), json!({ text.clone(): number }),
                          json!([{"id": text, "kind": "split", "batch": integer, "tokens": integer, "split": [integer, 1]}])] {
                let mut whole: Value = serde_json::from_str(DECODE).unwrap();
                whole[&key] = value;
                let _ = Manifest::parse(&whole.to_string());
                let _ = serde_json::from_value::<Question>(whole);
            }
        }

        #[test]
        fn no_truncated_manifest_panics(at in 0..DECODE.len()) {
            let _ = Manifest::parse(DECODE.get(..at).unwrap_or(""));
        }
    }
}
