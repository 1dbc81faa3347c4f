//! Checkpoints on disk: a folder with `config.json` and safetensors, whole or in shards.
//!
//! Everything that can be wrong with the files is found when the folder is opened, from headers
//! alone; weights are read when they are used. Experts may be held one by one (the official way) or
//! fused (`experts.gate_up_proj [E, 2 F, D]`, `experts.down_proj [E, D, F]`); they are always asked
//! for one by one.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use memmap2::Mmap;
use serde_json::Value;

use crate::{
    Config, Dtype, Weights, file, map, names,
    names::{Entry, Role},
    recording::FileHash,
    weights::{Kept, Meta, RawTensor, WeightError},
};

mod header;
#[cfg(test)]
mod tests;

/// A checkpoint folder.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: Config,
    shards: Vec<(PathBuf, Arc<Mmap>)>,
    /// Where each tensor of the files is.
    files: BTreeMap<String, Place>,
    /// Where each official name is answered from.
    answers: BTreeMap<String, Answer>,
}

/// A tensor inside a shard.
#[derive(Clone, Debug)]
struct Place {
    shard: usize,
    meta: Meta,
    bytes: Range<usize>,
}

/// Part of a tensor of the files: all of it, or some rows of a fused one.
#[derive(Clone, Debug)]
struct Answer {
    file: String,
    offset: usize,
    meta: Meta,
}

impl Checkpoint {
    /// Opens a folder and checks every header against the config.
    ///
    /// # Errors
    /// One line naming file, tensor, expected and got.
    pub fn open(dir: &Path) -> Result<Checkpoint, WeightError> {
        let config = Config::load(dir).map_err(|e| WeightError(e.0))?;
        let (paths, index) = shards(dir)?;
        let (mut maps, mut files) = (Vec::new(), BTreeMap::new());
        for (shard, path) in paths.iter().enumerate() {
            let map = map::map(path).map_err(|e| error(path, e))?;
            for (name, meta, bytes) in header::read(path, &map)? {
                if let Some(home) = index.as_ref().and_then(|index| index.get(&name))
                    && dir.join(home) != *path
                {
                    return Err(error(
                        path,
                        format!("tensor {name}: the index says it is in {home}"),
                    ));
                }
                if files.insert(name.clone(), Place { shard, meta, bytes }).is_some() {
                    return Err(error(path, format!("tensor {name}: also in another shard")));
                }
            }
            maps.push((path.clone(), Arc::new(map)));
        }
        if let Some(index) = index
            && let Some((name, file)) = index.iter().find(|(name, _)| !files.contains_key(*name))
        {
            return Err(error(
                &dir.join(file),
                format!("tensor {name}: named by the index, missing in the shard"),
            ));
        }
        let mut checkpoint = Checkpoint {
            dir: dir.to_owned(),
            config,
            shards: maps,
            files,
            answers: BTreeMap::new(),
        };
        checkpoint.check()?;
        Ok(checkpoint)
    }

    /// Every tensor that the config asks for is there, once, with its shape, in a type that can be
    /// computed with; nothing else is.
    fn check(&mut self) -> Result<(), WeightError> {
        let mtp = self.files.keys().any(|name| name.starts_with("mtp."));
        let mut used = BTreeSet::new();
        let mut answers = BTreeMap::new();
        for entry in names::entries(&self.config, mtp) {
            let (file, offset, meta) = self.find(&entry)?;
            self.check_dtype(&entry, &file, &meta)?;
            if meta.dtype == Dtype::Fp8 {
                let scale = names::scale_of(&entry.name);
                let scale_meta = self.check_scale(&entry, &scale)?;
                used.insert(scale.clone());
                answers.insert(scale.clone(), Answer { file: scale, offset: 0, meta: scale_meta });
            }
            used.insert(file.clone());
            answers.insert(entry.name, Answer { file, offset, meta });
        }
        let spare = |name: &&String| {
            !(used.contains(*name) || self.config.tie_word_embeddings && *name == names::LM_HEAD)
        };
        if let Some(name) = self.files.keys().find(spare) {
            return Err(self.wrong(
                name,
                "a tensor of this config",
                "one that the config has no place for",
            ));
        }
        self.answers = answers;
        for (name, answer) in &self.answers {
            if name.ends_with(".A_log") {
                let raw = self.fetch(name)?;
                let values = raw.widen().unwrap_or_default();
                if let Some(at) = values.iter().position(|x| !x.is_finite()) {
                    return Err(self.wrong(
                        &answer.file,
                        "finite values",
                        &format!("{} at {at}", values[at]),
                    ));
                }
            }
        }
        Ok(())
    }

    /// Where an official tensor is: itself, or a part of a fused one.
    fn find(&self, entry: &Entry) -> Result<(String, usize, Meta), WeightError> {
        if let Some(place) = self.files.get(&entry.name) {
            if place.meta.shape != entry.shape {
                return Err(self.wrong(
                    &entry.name,
                    &format!("shape {:?}", entry.shape),
                    &format!("{:?}", place.meta.shape),
                ));
            }
            return Ok((entry.name.clone(), 0, place.meta.clone()));
        }
        // …mlp.experts.7.gate_proj.weight, fused with its siblings.
        if let Some((prefix, rest)) = entry.name.split_once(".experts.")
            && let Some((expert, projection)) = rest.split_once('.')
            && let Ok(expert) = expert.parse::<usize>()
        {
            let down = projection == "down_proj.weight";
            let fused =
                format!("{prefix}.experts.{}", if down { "down_proj" } else { "gate_up_proj" });
            if let Some(place) = self.files.get(&fused) {
                let [rows, columns] = [entry.shape[0], entry.shape[1]];
                let per_expert = if down { rows } else { 2 * rows };
                let shape = vec![self.config.num_experts, per_expert, columns];
                if place.meta.shape != shape {
                    return Err(self.wrong(
                        &fused,
                        &format!("shape {shape:?}"),
                        &format!("{:?}", place.meta.shape),
                    ));
                }
                let row =
                    expert * per_expert + if projection == "up_proj.weight" { rows } else { 0 };
                let meta = Meta { dtype: place.meta.dtype, shape: entry.shape.clone() };
                return Ok((fused, row * columns * meta.dtype.size(), meta));
            }
        }
        let dir = &self.dir;
        Err(error(dir, format!("tensor {}: missing, expected shape {:?}", entry.name, entry.shape)))
    }

    fn check_dtype(&self, entry: &Entry, file: &str, meta: &Meta) -> Result<(), WeightError> {
        let linear = matches!(entry.role, Role::In | Role::Out | Role::Router | Role::LmHead);
        match (meta.dtype, &self.config.fp8) {
            (Dtype::F32 | Dtype::F16 | Dtype::Bf16, _) => Ok(()),
            (Dtype::Fp8, Some(fp8)) if linear && file == entry.name => {
                let module = entry.name.strip_suffix(".weight").unwrap_or(&entry.name);
                if fp8.modules_to_not_convert.iter().any(|name| name == module) {
                    return Err(self.wrong(
                        file,
                        "a float type, as modules_to_not_convert says",
                        "F8_E4M3",
                    ));
                }
                Ok(())
            }
            (Dtype::Fp8, None) => Err(self.wrong(
                file,
                "F32, F16 or BF16, as config.json has no quantization_config",
                "F8_E4M3",
            )),
            (dtype, _) => Err(self.wrong(file, "F32, F16 or BF16", dtype.name())),
        }
    }

    /// The scales of an FP8 weight: one finite number above zero per block.
    fn check_scale(&self, entry: &Entry, scale: &str) -> Result<Meta, WeightError> {
        let block = self.config.fp8.as_ref().map_or([1, 1], |fp8| fp8.weight_block_size);
        let shape: Vec<usize> =
            entry.shape.iter().zip(block).map(|(n, block)| n.div_ceil(block)).collect();
        let Some(place) = self.files.get(scale) else {
            let file = &self.shards[self.files[&entry.name].shard].0;
            return Err(error(
                file,
                format!(
                    "tensor {scale}: missing, expected F32 or BF16 of shape {shape:?} beside the FP8 weight"
                ),
            ));
        };
        if place.meta.shape != shape {
            return Err(self.wrong(
                scale,
                &format!("shape {shape:?}"),
                &format!("{:?}", place.meta.shape),
            ));
        }
        if !matches!(place.meta.dtype, Dtype::F32 | Dtype::Bf16) {
            return Err(self.wrong(scale, "F32 or BF16", place.meta.dtype.name()));
        }
        let data = Cow::Borrowed(&self.shards[place.shard].1[place.bytes.clone()]);
        let raw = RawTensor { dtype: place.meta.dtype, shape, data };
        let values = raw.widen().unwrap_or_default();
        // Written so that NaN fails.
        if let Some(at) = values.iter().position(|&x| !(0.0 < x && x.is_finite())) {
            return Err(self.wrong(
                scale,
                "finite scales above 0",
                &format!("{} at block {at}", values[at]),
            ));
        }
        Ok(place.meta.clone())
    }

    /// All rows of an official tensor; none of one that there is not.
    fn rows(&self, name: &str) -> Range<usize> {
        let rows = self.answers.get(name).and_then(|answer| answer.meta.shape.first().copied());
        0..rows.unwrap_or(0)
    }

    /// Where some rows of an official tensor are: shard, type and shape, bytes.
    fn place(
        &self,
        name: &str,
        rows: Range<usize>,
    ) -> Result<(usize, Meta, Range<usize>), WeightError> {
        let Some(answer) = self.answers.get(name) else {
            return Err(error(&self.dir, format!("tensor {name}: there is none")));
        };
        let mut meta = answer.meta.clone();
        if meta.shape.is_empty() || meta.shape[0] < rows.end {
            return Err(error(
                &self.dir,
                format!("tensor {name}: rows {rows:?} of shape {:?}", meta.shape),
            ));
        }
        let row = meta.shape[1..].iter().product::<usize>() * meta.dtype.size();
        meta.shape[0] = rows.len();
        let place = &self.files[&answer.file];
        let start = place.bytes.start + answer.offset;
        Ok((place.shard, meta, start + rows.start * row..start + rows.end * row))
    }

    fn wrong(&self, tensor: &str, expected: &str, got: &str) -> WeightError {
        let file = self.files.get(tensor).map_or(&self.dir, |place| &self.shards[place.shard].0);
        error(file, format!("tensor {tensor}: expected {expected}, got {got}"))
    }

    /// The first NaN or infinity among all weights: tensor and flat index.
    ///
    /// Reads everything; `progress` is told bytes done of all, and ends the scan by returning false.
    ///
    /// # Errors
    /// If a tensor cannot be read.
    pub fn first_not_finite(
        &self,
        progress: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<Option<(String, usize, f32)>, WeightError> {
        let total = self.shards.iter().map(|(_, map)| map.len() as u64).sum();
        let mut done = 0;
        for name in self.answers.keys() {
            let raw = self.fetch(name)?;
            let found = if raw.dtype == Dtype::Fp8 {
                raw.data.iter().position(|code| code & 0x7f == 0x7f).map(|at| (at, f32::NAN))
            } else {
                let values = raw.widen().unwrap_or_default();
                values.iter().position(|x| !x.is_finite()).map(|at| (at, values[at]))
            };
            if let Some((at, value)) = found {
                return Ok(Some((name.clone(), at, value)));
            }
            done += raw.data.len() as u64;
            if !progress(done, total) {
                return Ok(None);
            }
        }
        Ok(None)
    }

    /// Hashes of all files that an answer depends on: config, tokenizer, weights.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn hashes(&self) -> io::Result<Vec<FileHash>> {
        let small = ["config.json", "tokenizer.json"].map(|name| self.dir.join(name));
        let small = small.into_iter().filter(|path| path.exists());
        let weights = self.shards.iter().map(|(path, _)| path.clone());
        small.chain(weights).map(|path| hash_file(&self.dir, &path)).collect()
    }
}

/// A file's name from `dir`, size and blake3.
///
/// # Errors
/// If it cannot be read.
pub fn hash_file(dir: &Path, path: &Path) -> io::Result<FileHash> {
    let mut hasher = blake3::Hasher::new();
    let bytes = io::copy(&mut file::open(path)?, &mut hasher)?;
    let name = path.strip_prefix(dir).unwrap_or(path).to_string_lossy().replace('\\', "/");
    Ok(FileHash { path: name, bytes, blake3: hasher.finalize().to_hex().to_string() })
}

/// The header of a safetensors file, given as all bytes of the file: name, type and shape of each
/// tensor, and where its bytes are.
///
/// # Errors
/// What is wrong, without the file's name.
pub fn parse_header(file: &[u8]) -> Result<Vec<(String, Meta, Range<usize>)>, String> {
    header::parse(file)
}

type Index = BTreeMap<String, String>;

/// The weight files of a folder, and the index that names them if there is one.
fn shards(dir: &Path) -> Result<(Vec<PathBuf>, Option<Index>), WeightError> {
    let index_path = dir.join("model.safetensors.index.json");
    let single = dir.join("model.safetensors");
    let text = match file::text(&index_path) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            if single.exists() {
                return Ok((vec![single], None));
            }
            return Err(error(dir, "neither model.safetensors nor model.safetensors.index.json"));
        }
        Err(e) => return Err(error(&index_path, e)),
    };
    let index = parse_index(&text).map_err(|e| error(&index_path, e))?;
    let files: BTreeSet<&String> = index.values().collect();
    let mut paths = Vec::new();
    for file in files {
        let path = dir.join(file);
        if !path.is_file() {
            return Err(error(
                &index_path,
                format!("names the shard {file}, which does not exist"),
            ));
        }
        paths.push(path);
    }
    if paths.is_empty() {
        return Err(error(&index_path, "names no tensor"));
    }
    Ok((paths, Some(index)))
}

/// The `weight_map` of an index: tensor → file, every file a plain name inside the folder.
///
/// # Errors
/// What is wrong, without the file's name.
pub fn parse_index(text: &str) -> Result<BTreeMap<String, String>, String> {
    let value: Value = serde_json::from_str(text).map_err(|e| format!("no JSON: {e}"))?;
    let map = value.get("weight_map").and_then(Value::as_object).ok_or("no object weight_map")?;
    map.iter()
        .map(|(tensor, name)| {
            let name = name
                .as_str()
                .ok_or_else(|| format!("tensor {tensor}: expected a file name, got {name}"))?;
            if file::is_plain_name(name) {
                Ok((tensor.clone(), name.to_owned()))
            } else {
                Err(format!("tensor {tensor}: expected a file inside the folder, got {name:?}"))
            }
        })
        .collect()
}

impl Weights for Checkpoint {
    fn config(&self) -> &Config {
        &self.config
    }

    fn origin(&self) -> String {
        self.dir.display().to_string()
    }

    fn meta(&self, name: &str) -> Option<Meta> {
        self.answers.get(name).map(|answer| answer.meta.clone())
    }

    fn fetch(&self, name: &str) -> Result<RawTensor<'_>, WeightError> {
        self.fetch_rows(name, self.rows(name))
    }

    fn fetch_rows(&self, name: &str, rows: Range<usize>) -> Result<RawTensor<'_>, WeightError> {
        let (shard, meta, bytes) = self.place(name, rows)?;
        let data = Cow::Borrowed(&self.shards[shard].1[bytes]);
        Ok(RawTensor { dtype: meta.dtype, shape: meta.shape, data })
    }

    fn keep(&self, name: &str) -> Result<Kept, WeightError> {
        let (shard, meta, bytes) = self.place(name, self.rows(name))?;
        Ok(Kept { meta, owner: self.shards[shard].1.clone(), bytes })
    }

    fn pass(&self, name: &str) -> Result<Kept, WeightError> {
        let (shard, meta, bytes) = self.place(name, self.rows(name))?;
        if bytes.is_empty() {
            return self.keep(name);
        }
        let path = &self.shards[shard].0;
        let map =
            map::part(path, &bytes).map_err(|e| error(path, format!("tensor {name}: {e}")))?;
        Ok(Kept { meta, bytes: 0..map.len(), owner: Arc::new(map) })
    }

    /// The config, and of every shard its name, size, time of its last change and header.
    fn identity(&self) -> Option<String> {
        let mut hasher = blake3::Hasher::new();
        hasher.update(format!("{:?}", self.config).as_bytes());
        for (path, map) in &self.shards {
            let changed = path.metadata().and_then(|meta| meta.modified()).ok()?;
            let name = path.file_name()?.to_string_lossy();
            let told = format!("{name:?} {} {changed:?} ", map.len());
            let length = u64::from_le_bytes(*map.first_chunk::<8>()?) as usize;
            hasher.update(told.as_bytes()).update(map.get(8..8 + length)?);
        }
        Some(format!("files {}", hasher.finalize().to_hex()))
    }

    fn is_mapped(&self, name: &str, align: usize) -> bool {
        // A map begins at a page.
        self.place(name, 0..0).is_ok_and(|(_, _, bytes)| bytes.start.is_multiple_of(align))
    }

    fn names(&self) -> Vec<String> {
        self.answers.keys().cloned().collect()
    }
}

fn error(path: &Path, what: impl std::fmt::Display) -> WeightError {
    WeightError(format!("{}: {what}", path.display()))
}
