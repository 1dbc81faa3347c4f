//! Files as karat writes and finds them.

use std::{
    fs, io,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

/// Writes beside the place and renames: what is there is whole, before and after.
///
/// A link is followed: the file it names is replaced, the link stays. What is no regular file
/// (`/dev/stdout`, a pipe) is written to and not replaced: a device that is renamed over is gone.
pub(crate) fn replace(path: &Path, data: &[u8]) -> io::Result<()> {
    let place = match fs::metadata(path) {
        Ok(meta) if meta.is_dir() => return Err(io::ErrorKind::IsADirectory.into()),
        Ok(meta) if !meta.is_file() => {
            let mut file = fs::OpenOptions::new().write(true).open(path)?;
            return file.write_all(data).and_then(|()| file.flush());
        }
        Ok(_) => fs::canonicalize(path)?,
        Err(_) => path.to_owned(),
    };
    let path = place.as_path();
    let parent =
        path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(parent)?;
    // As any other file: who may read it is for the umask to say.
    let anybody = fs::Permissions::from_mode(0o666);
    let mut file = tempfile::Builder::new().permissions(anybody).tempfile_in(parent)?;
    file.write_all(data)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|e| e.error)?;
    Ok(())
}

/// Replaces a note to oneself: renamed into its place, and not waited for until it is on the disk. A
/// process that dies leaves one whole note, a machine that dies may leave none.
pub(crate) fn jot(path: &Path, data: &[u8]) -> io::Result<()> {
    let beside = path.with_extension(std::process::id().to_string());
    let write = || fs::write(&beside, data).and_then(|()| fs::rename(&beside, path));
    write().or_else(|_| {
        fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
        write()
    })
}

/// The folder with recordings and questions: `golden/` above the current folder, else that beside the
/// program, as a release has it, else that of the sources karat was built from.
pub(crate) fn golden_dir() -> PathBuf {
    let here = std::env::current_dir().unwrap_or_default();
    let program = std::env::current_exe().and_then(fs::canonicalize).unwrap_or_default();
    let beside = program.parent().unwrap_or(Path::new(""));
    let known = here.ancestors().chain([beside]).map(|dir| dir.join("golden"));
    let found = known.into_iter().find(|dir| dir.join("questions").is_dir());
    found.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../golden"))
}

/// Where karat keeps what it can make again.
pub(crate) fn cache_dir() -> PathBuf {
    golden_dir().join("../target/karat")
}
