//! Narrowed weights in a file, which the next run maps instead of narrowing again.
//!
//! A safetensors file: one tensor of bytes per projection, under its official name, codes, scales and
//! minima as they lie in memory, then the BLAKE3 hash of name and bytes. The metadata says what the
//! weights were made of. Nothing of a file is used before all of it was checked; the file must not be cut
//! short while it is mapped, as that of a checkpoint must not.

use std::{
    collections::HashMap,
    fmt, fs, io,
    io::{BufWriter, Write},
    path::Path,
    sync::Arc,
};

use golden::{Error, Weights, checkpoint, engine::INTERRUPTED, map, names, weights::Kept};
use rayon::prelude::*;
use serde_json::{Map, Value, json};

use super::weights::Format;
use crate::cpu::{
    aligned::Arena,
    quantised::{Bits, Quantised},
    weight::{Weight, passing},
};

/// What such a file calls itself.
const KIND: &str = "karat narrowed weights";

/// Changes whenever [`Quantised`] lies otherwise in memory, or narrows otherwise.
const LAYOUT: u32 = 2;

/// Bytes of a hash.
const HASH: usize = blake3::OUT_LEN;

/// Matrices that are checked between two looks at whether to go on.
const TOGETHER: usize = 64;

/// A file of narrowed weights, mapped and checked.
#[derive(Debug)]
pub struct Store {
    format: Format,
    matrices: HashMap<String, Kept>,
}

/// Why there is no [`Store`]; each is one line that names the file.
#[derive(Debug)]
pub enum StoreError {
    /// What is there is none, and is not replaced.
    Foreign(String),
    /// It cannot be read or written.
    Io(String),
    /// Weights cannot be had, or not be told apart from others.
    Weights(String),
    /// Whoever was told said so.
    Interrupted,
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoreError::Foreign(line) | StoreError::Io(line) | StoreError::Weights(line) => {
                f.write_str(line)
            }
            StoreError::Interrupted => f.write_str(INTERRUPTED),
        }
    }
}

impl std::error::Error for StoreError {}

/// A projection that is narrowed.
pub(super) struct Narrowing {
    pub(super) name: String,
    bits: Bits,
    rows: usize,
    d: usize,
}

impl Narrowing {
    /// Bytes, narrowed.
    pub(super) fn size(&self) -> usize {
        Quantised::size(self.bits, self.rows, self.d)
    }

    fn make(&self, weights: &dyn Weights) -> Result<Weight, Error> {
        Ok(passing(weights, &self.name)?.narrowed(self.bits, &Arena::default()))
    }
}

/// Every projection that a format narrows.
pub(super) fn narrowings(weights: &dyn Weights, format: Format) -> Vec<Narrowing> {
    let has_mtp = weights.meta(names::MTP_FC).is_some();
    let all = names::entries(weights.config(), has_mtp).into_iter();
    let all = all.filter(|entry| names::is_projection(&entry.name));
    all.filter_map(|entry| {
        let (bits, d) = (format.bits(&entry.name)?, entry.shape[1..].iter().product());
        Some(Narrowing { name: entry.name, bits, rows: entry.shape[0], d })
    })
    .collect()
}

/// What tells a file of these weights from every other.
fn key(weights: &dyn Weights, format: Format) -> Result<String, StoreError> {
    let identity = weights.identity().ok_or_else(|| {
        StoreError::Weights(format!("{}: cannot be told from other weights", weights.origin()))
    })?;
    let text = format!("{KIND} {LAYOUT} {} {identity}", format.name());
    Ok(blake3::hash(text.as_bytes()).to_hex().to_string())
}

fn hash(name: &str, parts: &[&[u8]]) -> [u8; HASH] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&(name.len() as u64).to_le_bytes());
    hasher.update(name.as_bytes());
    parts.iter().for_each(|part| _ = hasher.update(part));
    *hasher.finalize().as_bytes()
}

/// What the header of a file says that it is: its kind and its key.
fn marks(file: &[u8]) -> Option<(String, String)> {
    let length = u64::from_le_bytes(*file.first_chunk::<8>()?);
    let json = file.get(8..8_usize.checked_add(usize::try_from(length).ok()?)?)?;
    let header: Value = serde_json::from_slice(json).ok()?;
    let mark = |name: &str| header["__metadata__"][name].as_str().map(str::to_owned);
    Some((mark("kind")?, mark("key")?))
}

impl Store {
    /// The narrowed weights in a file; made, or made anew, where it has none or others. `number` is
    /// `int8` or `int4`; `tell` is told bytes done of all and says whether to go on, `note` why a file is
    /// made anew.
    ///
    /// # Errors
    /// As [`StoreError`] says. What is in a place that is no file of narrowed weights stays.
    pub fn ready(
        path: &Path,
        weights: &dyn Weights,
        number: &str,
        tell: &mut dyn FnMut(u64, u64) -> bool,
        note: &mut dyn FnMut(&str),
    ) -> Result<Store, StoreError> {
        let format = Format::of(number).map_err(|e| StoreError::Weights(e.to_string()))?;
        let all = narrowings(weights, format);
        if all.is_empty() {
            return Err(StoreError::Weights(format!("number {number} narrows nothing")));
        }
        let key = key(weights, format)?;
        match Store::open(path, format, &key, &all, tell)? {
            Ok(store) => return Ok(store),
            Err(Some(why)) => note(&format!("{}: {why}; made anew", path.display())),
            Err(None) => {}
        }
        write(path, weights, &key, &all, tell)?;
        // Read again: what is used is what the next run uses.
        Store::open(path, format, &key, &all, tell)?.map_err(|why| {
            let why = why.unwrap_or_else(|| "gone".to_owned());
            StoreError::Io(format!("{}: was written, and is {why}", path.display()))
        })
    }

    /// What is in a file, or why it has to be made; `None` where there is no file.
    fn open(
        path: &Path,
        format: Format,
        key: &str,
        all: &[Narrowing],
        tell: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<Result<Store, Option<String>>, StoreError> {
        let file = match map::map(path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Err(None)),
            Err(e) => return Err(StoreError::Io(format!("{}: {e}", path.display()))),
        };
        let Some((_, found)) = marks(&file).filter(|(kind, _)| kind == KIND) else {
            let path = path.display();
            return Err(StoreError::Foreign(format!(
                "{path}: no file of narrowed weights; it stays as it is: name another, or remove it"
            )));
        };
        if found != key {
            let why = "of another checkpoint, format or version of karat";
            return Ok(Err(Some(why.to_owned())));
        }
        let damaged = |why: String| Ok(Err(Some(format!("damaged ({why})"))));
        let tensors = match checkpoint::parse_header(&file) {
            Ok(tensors) => tensors,
            Err(why) => return damaged(why),
        };
        let owner = Arc::new(file);
        let mut matrices: HashMap<String, Kept> = tensors
            .into_iter()
            .map(|(name, meta, bytes)| (name, Kept::new(meta, owner.clone(), bytes)))
            .collect();
        let total = all.iter().map(|one| one.size() as u64).sum();
        let mut done = 0;
        for some in all.chunks(TOGETHER) {
            let wrong = some.par_iter().find_any(|one| {
                let data = matrices.get(&one.name).map_or(&[][..], Kept::data);
                data.len() != one.size() + HASH || {
                    let (data, own) = data.split_at(one.size());
                    hash(&one.name, &[data]) != *own
                }
            });
            if let Some(wrong) = wrong {
                return damaged(format!("tensor {}: its hash is another", wrong.name));
            }
            done += some.iter().map(|one| one.size() as u64).sum::<u64>();
            if !tell(done, total) {
                return Err(StoreError::Interrupted);
            }
        }
        for one in all {
            if let Some(kept) = matrices.get_mut(&one.name) {
                *kept = kept.part(0..one.size());
            }
        }
        Ok(Ok(Store { format, matrices }))
    }

    /// A projection as this file has it.
    ///
    /// # Errors
    /// If it has none of that name and size.
    pub(super) fn weight(
        &self,
        format: Format,
        weights: &dyn Weights,
        name: &str,
    ) -> Result<Weight, Error> {
        let none = || format!("{name}: not among the narrowed weights");
        let bits = format.bits(name).filter(|_| format == self.format).ok_or_else(none)?;
        let meta = weights.meta(name).ok_or_else(none)?;
        let (rows, d) = (meta.shape[0], meta.shape[1..].iter().product());
        let kept = self.matrices.get(name).ok_or_else(none)?;
        let quantised = Quantised::kept(bits, rows, d, kept).ok_or_else(none)?;
        Ok(Weight::quantised(quantised))
    }
}

/// Narrows everything into a file beside its place, which is then renamed.
fn write(
    path: &Path,
    weights: &dyn Weights,
    key: &str,
    all: &[Narrowing],
    tell: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<(), StoreError> {
    let io = |e: io::Error| StoreError::Io(format!("{}: {e}", path.display()));
    // A link stays, the file that it names is replaced.
    let place = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let parent = place.parent().filter(|parent| !parent.as_os_str().is_empty());
    let mut file = tempfile::NamedTempFile::new_in(parent.unwrap_or(Path::new("."))).map_err(io)?;
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"kind": KIND, "key": key}));
    let mut at = 0;
    for one in all {
        let size = one.size() + HASH;
        header.insert(
            one.name.clone(),
            json!({"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}),
        );
        at += size;
    }
    let mut header = Value::Object(header).to_string();
    // Scales have two bytes.
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(64) - header.len()));
    let mut to = BufWriter::new(file.as_file_mut());
    to.write_all(&(header.len() as u64).to_le_bytes()).map_err(io)?;
    to.write_all(header.as_bytes()).map_err(io)?;
    let total = all.iter().map(|one| one.size() as u64).sum();
    let mut done = 0;
    for one in all {
        let weight = one.make(weights).map_err(|e| StoreError::Weights(e.to_string()))?;
        let parts = weight.narrow_parts();
        for part in parts {
            to.write_all(part).map_err(io)?;
        }
        to.write_all(&hash(&one.name, &parts)).map_err(io)?;
        done += one.size() as u64;
        if !tell(done, total) {
            return Err(StoreError::Interrupted);
        }
    }
    to.flush().map_err(io)?;
    drop(to);
    file.as_file().sync_all().map_err(io)?;
    file.persist(&place).map_err(|e| io(e.error))?;
    Ok(())
}

#[cfg(test)]
mod tests;
