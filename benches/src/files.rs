//! Files that are there whole or not at all.

use std::{fs, io, io::Write, path::Path};

/// Writes a file beside its place and renames it; makes the folder.
///
/// # Errors
/// If the path has no folder, or nothing can be written there.
pub fn replace(file: &Path, data: &[u8]) -> io::Result<()> {
    let folder = file.parent().ok_or(io::ErrorKind::InvalidInput)?;
    fs::create_dir_all(folder)?;
    let mut beside = tempfile::NamedTempFile::new_in(folder)?;
    beside.write_all(data)?;
    beside.persist(file)?;
    Ok(())
}
