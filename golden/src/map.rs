//! Files as memory.
#![expect(
    unsafe_code,
    reason = "a memory map is a promise about other processes that only a caller can make"
)]

use std::{io, path::Path};

use memmap2::Mmap;

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
    unsafe { Mmap::map(&file) }
}
