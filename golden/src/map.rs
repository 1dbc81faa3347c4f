//! Files as memory.
#![expect(
    unsafe_code,
    reason = "a memory map is a promise about other processes that only a caller can make"
)]

use std::{io, ops::Range, path::Path};

use memmap2::{Mmap, MmapOptions};

use crate::file;

/// Maps a regular file for reading.
///
/// A checkpoint is larger than memory and mostly untouched: pages are read when a tensor is used.
/// Truncating the file while karat runs ends the process (SIGBUS), as with every program that maps
/// weights.
///
/// # Errors
/// If there is none, or it cannot be opened or mapped.
pub fn map(path: &Path) -> io::Result<Mmap> {
    let file = file::open(path)?;
    // SAFETY: the map is read-only and private; a checkpoint that is rewritten during a run is
    // outside what any reader of weights can answer for.
    let map = unsafe { Mmap::map(&file) }?;
    // What is read from the disk from now on comes in huge pages, if the file system has them: finding
    // where small ones are costs a tenth of reading weights. What was read before stays as it lies.
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    Ok(map)
}

/// Maps some bytes of a regular file for reading, as [`map`] does.
///
/// # Errors
/// As [`map`], and if the file ends before them.
pub(crate) fn part(path: &Path, bytes: &Range<usize>) -> io::Result<Mmap> {
    let file = file::open(path)?;
    let len = file.metadata()?.len();
    if len < bytes.end as u64 {
        let line = format!("expected at least {} bytes, got {len}", bytes.end);
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, line));
    }
    // SAFETY: as of `map`.
    unsafe { MmapOptions::new().offset(bytes.start as u64).len(bytes.len()).map(&file) }
}
