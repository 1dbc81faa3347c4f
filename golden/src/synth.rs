//! Writing a checkpoint: any source of weights as a folder in the official format.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use serde_json::{Map, Value, json};

use crate::{Dtype, Weights};

/// Why a checkpoint was not written.
#[derive(Debug, thiserror::Error)]
pub enum SynthError {
    /// The place cannot be written to.
    #[error("{}: {source}", path.display())]
    Io {
        /// What was being written.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The folder exists and is not empty.
    #[error("{}: exists and is not empty; --force replaces it", .0.display())]
    Exists(PathBuf),
    /// The place is none that a checkpoint may take, whatever was asked.
    #[error("{}: {why}", path.display())]
    Refused {
        /// The place.
        path: PathBuf,
        /// Why not.
        why: String,
    },
    /// A tensor could not be had.
    #[error(transparent)]
    Weight(#[from] crate::weights::WeightError),
    /// `progress` said to stop.
    #[error("interrupted")]
    Interrupted,
}

/// What [`write()`] should do.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Largest shard, in bytes.
    pub shard_bytes: u64,
    /// Whether an existing checkpoint is replaced. A folder with anything else in it never is.
    pub force: bool,
}

/// Writes `weights` to the folder `dir`: shards, index (where there are several), `config.json`,
/// `generation_config.json`. Everything goes to a folder beside it that is renamed at the end.
///
/// `progress` is told bytes done of all, and ends the work by returning false.
///
/// # Errors
/// See [`SynthError`]; nothing is left behind.
pub fn write(
    weights: &dyn Weights,
    dir: &Path,
    options: Options,
    progress: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<(), SynthError> {
    let refused = |why: String| SynthError::Refused { path: dir.to_owned(), why };
    let at = |source, path: &Path| SynthError::Io { path: path.to_owned(), source };
    // `..`, `/` and the current folder have no name of their own, and are never to be replaced.
    let Some(name) = dir.file_name() else {
        return Err(refused("expected the name of a folder to write".to_owned()));
    };
    if fs::symlink_metadata(dir).is_ok_and(|meta| !meta.is_dir()) {
        return Err(refused("exists and is no folder".to_owned()));
    }
    if let Some(foreign) = foreign(dir).map_err(|e| at(e, dir))? {
        if !options.force {
            return Err(SynthError::Exists(dir.to_owned()));
        }
        if let Some(foreign) = foreign {
            return Err(refused(format!(
                "{foreign:?} in it is no part of a checkpoint; remove the folder yourself"
            )));
        }
    }
    let parent =
        dir.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let beside = |what: &str| {
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}.{what}", std::process::id()));
        parent.join(hidden)
    };
    let (partial, old) = (beside("partial"), beside("old"));
    fs::create_dir_all(parent).map_err(|e| at(e, parent))?;
    for stale in [&partial, &old] {
        // Of a process of the same number that was killed.
        match fs::remove_dir_all(stale) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(at(e, stale)),
            _ => {}
        }
    }
    fs::create_dir(&partial).map_err(|e| at(e, &partial))?;
    let written = fill(weights, &partial, options.shard_bytes, progress);
    let placed = written.and_then(|()| {
        // The old one is gone only when the new one is in its place.
        let replaced = dir.exists();
        if replaced {
            fs::rename(dir, &old).map_err(|e| at(e, dir))?;
        }
        if let Err(error) = fs::rename(&partial, dir) {
            if replaced {
                let _ = fs::rename(&old, dir);
            }
            return Err(at(error, dir));
        }
        if replaced {
            fs::remove_dir_all(&old).map_err(|e| at(e, &old))?;
        }
        Ok(())
    });
    if placed.is_err() {
        // The first error is the one to tell.
        let _ = fs::remove_dir_all(&partial);
    }
    placed
}

/// `None` for a folder that is empty or not there; else the name of something in it that no writer
/// of checkpoints has put there, if there is such a thing.
#[expect(clippy::option_option, reason = "nothing there, nothing foreign there, something foreign")]
fn foreign(dir: &Path) -> io::Result<Option<Option<String>>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let mut occupied = None;
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let part = matches!(
            name.as_str(),
            "config.json"
                | "generation_config.json"
                | "model.safetensors"
                | "model.safetensors.index.json"
        ) || (name.starts_with("model-") && name.ends_with(".safetensors"));
        if !part || !entry.file_type()?.is_file() {
            return Ok(Some(Some(name)));
        }
        occupied = Some(None);
    }
    Ok(occupied)
}

fn fill(
    weights: &dyn Weights,
    dir: &Path,
    shard_bytes: u64,
    progress: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<(), SynthError> {
    let tensors: Vec<Tensor> = weights
        .names()
        .into_iter()
        .filter_map(|name| {
            let meta = weights.meta(&name)?;
            let bytes =
                meta.shape.iter().map(|&n| n as u64).product::<u64>() * meta.dtype.size() as u64;
            Some((name, meta.dtype, meta.shape, bytes))
        })
        .collect();
    let total: u64 = tensors.iter().map(|(.., bytes)| bytes).sum();
    let mut shards: Vec<&[Tensor]> = Vec::new();
    let (mut start, mut size) = (0, 0);
    for (i, (.., bytes)) in tensors.iter().enumerate() {
        if start < i && shard_bytes < size + bytes {
            shards.push(&tensors[start..i]);
            (start, size) = (i, 0);
        }
        size += bytes;
    }
    shards.push(&tensors[start..]);
    let mut weight_map = Map::new();
    let mut done = 0;
    for (i, shard) in shards.iter().enumerate() {
        let file = match shards.len() {
            1 => "model.safetensors".to_owned(),
            n => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
        };
        let path = dir.join(&file);
        let at = |source| SynthError::Io { path: path.clone(), source };
        let mut out = BufWriter::with_capacity(1 << 20, File::create(&path).map_err(at)?);
        out.write_all(&header(shard)).map_err(at)?;
        for (name, _, _, bytes) in *shard {
            out.write_all(&weights.fetch(name)?.data).map_err(at)?;
            done += bytes;
            if !progress(done, total) {
                return Err(SynthError::Interrupted);
            }
            weight_map.insert(name.clone(), Value::String(file.clone()));
        }
        out.into_inner().map_err(|e| at(e.into_error()))?.sync_all().map_err(at)?;
    }
    let json = |name: &str, value: &Value| {
        let path = dir.join(name);
        fs::write(&path, format!("{value:#}\n")).map_err(|source| SynthError::Io { path, source })
    };
    if 1 < shards.len() {
        let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
        json("model.safetensors.index.json", &index)?;
    }
    let config = weights.config();
    json("config.json", &config.to_json())?;
    json(
        "generation_config.json",
        &json!({"eos_token_id": config.eos_token_ids, "do_sample": false}),
    )
}

/// Name, type, shape and bytes of a tensor.
type Tensor = (String, Dtype, Vec<usize>, u64);

/// Length and JSON of a shard's header, padded to eight bytes.
fn header(shard: &[Tensor]) -> Vec<u8> {
    let mut object = Map::new();
    object.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut end = 0;
    for (name, dtype, shape, bytes) in shard {
        let dtype = match dtype {
            Dtype::F64 => "F64",
            Dtype::F32 => "F32",
            Dtype::F16 => "F16",
            Dtype::Bf16 => "BF16",
            Dtype::Fp8 => "F8_E4M3",
            Dtype::I64 => "I64",
            Dtype::U8 => "U8",
        };
        object.insert(
            name.clone(),
            json!({"dtype": dtype, "shape": shape, "data_offsets": [end, end + bytes]}),
        );
        end += bytes;
    }
    let mut text = Value::Object(object).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut all = (text.len() as u64).to_le_bytes().to_vec();
    all.extend(text);
    all
}
