//! Files from outside, read with the suspicion that they deserve.
//!
//! Only regular files are opened: opening a pipe waits for a writer who may never come, a device has
//! no end. What is read as a whole has a size that can be read as a whole.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::Path,
};

/// The largest file that is read as a text: the index of the official checkpoint has 8 MB.
pub const MAX_TEXT: u64 = 1 << 28;

/// Opens a regular file, or a link to one.
///
/// # Errors
/// If there is none, or it cannot be opened.
pub fn open(path: &Path) -> io::Result<File> {
    let meta = fs::metadata(path)?;
    if meta.is_dir() {
        return Err(io::Error::from(io::ErrorKind::IsADirectory));
    }
    if !meta.is_file() {
        return Err(io::Error::other("expected a regular file, got a pipe, a socket or a device"));
    }
    File::open(path)
}

/// The text of a file of at most [`MAX_TEXT`] bytes.
///
/// # Errors
/// If it cannot be read, is larger, or is not UTF-8.
pub fn text(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    limited(path, MAX_TEXT)?.read_to_string(&mut text)?;
    Ok(text)
}

/// The bytes of a file of at most `max` bytes.
///
/// # Errors
/// If it cannot be read or is larger.
pub fn bytes(path: &Path, max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    limited(path, max)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn limited(path: &Path, max: u64) -> io::Result<io::Take<File>> {
    let file = open(path)?;
    let length = file.metadata()?.len();
    if max < length {
        return Err(io::Error::other(format!("expected at most {max} bytes, got {length}")));
    }
    Ok(file.take(max))
}

/// Whether a name is one part of a path: it leads nowhere else when it is joined to a folder.
pub fn is_plain_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    let first = parts.next();
    matches!(first, Some(std::path::Component::Normal(part)) if part == name)
        && parts.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::{bytes, is_plain_name, open, text};

    #[test]
    fn only_plain_names_stay_inside() {
        for name in ["a", "a.b", "..a", "model-00001-of-00002.safetensors"] {
            assert!(is_plain_name(name), "{name}");
        }
        for name in ["", ".", "..", "/", "/a", "a/", "a/b", "../a", "a/..", "./a"] {
            assert!(!is_plain_name(name), "{name}");
        }
    }

    #[test]
    fn files_that_cannot_be_read_whole_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(open(dir.path()).is_err());
        let path = dir.path().join("sparse");
        std::fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
        assert!(text(&path).unwrap_err().to_string().contains("at most 268435456 bytes"));
        assert!(bytes(&path, 10).is_err());
        std::fs::write(&path, "ten bytes.").unwrap();
        assert_eq!(bytes(&path, 10).unwrap().len(), 10);
        assert_eq!(text(&path).unwrap(), "ten bytes.");
    }
}
