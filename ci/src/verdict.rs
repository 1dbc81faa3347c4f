//! `verdict.json`: how the last run ended, for programs that lost its exit code.

use std::{
    env, io,
    path::{Path, PathBuf},
};

use serde_json::json;

use crate::{exit::Exit, files};

/// Where it is written if nobody says otherwise.
pub(crate) const DEFAULT: &str = "target/karat/verdict.json";

/// The environment variable that says otherwise.
pub(crate) const VARIABLE: &str = "KARAT_VERDICT";

/// Where a command line that cannot be read wants it: its `--verdict`, else the environment's, else
/// that of `karat.toml`.
pub(crate) fn place(configured: Option<PathBuf>) -> PathBuf {
    let mut arguments = env::args_os().skip(1);
    while let Some(argument) = arguments.next() {
        let text = argument.to_string_lossy();
        if let Some(path) = text.strip_prefix("--verdict=") {
            return path.into();
        }
        if text == "--verdict"
            && let Some(path) = arguments.next()
        {
            return path.into();
        }
    }
    let set = env::var_os(VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from);
    set.or(configured).unwrap_or_else(|| DEFAULT.into())
}

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
