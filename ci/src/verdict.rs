//! `verdict.json`: how the last run ended, for programs that lost its exit code.

use std::{io, path::Path};

use serde_json::json;

use crate::{exit::Exit, files};

/// Writes it beside its place and renames.
pub(crate) fn write(path: &Path, command: &str, exit: Exit, line: Option<&str>) -> io::Result<()> {
    let verdict = json!({
        "schema": "karat.verdict/1",
        "command": command,
        "exit": exit as u8,
        "meaning": format!("{exit:?}").to_lowercase(),
        "line": line,
        "version": env!("CARGO_PKG_VERSION"),
    });
    files::replace(path, format!("{verdict:#}\n").as_bytes())
}
