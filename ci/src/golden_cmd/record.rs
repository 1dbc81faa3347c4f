//! `karat golden record`: asking the official implementation.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use golden::recording::{Question, Recording};
use serde_json::{Value, json};

use super::{recordings, synthetic, write};
use crate::{
    exit::{Exit, fail, refuse},
    files,
    out::{self, Out},
};

/// The recorder is a Python program (golden/scripts/record.py) that needs the packages of
/// golden/scripts/requirements.txt, best in an environment of their own:
/// `python3 -m venv env && env/bin/pip install -r golden/scripts/requirements.txt`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Questions, by name (golden/questions); `ops` for the official functions one by one
    ids: Vec<String>,
    /// Every question that has a recording, and `ops`
    #[arg(long, conflicts_with = "ids")]
    all: bool,
    /// Checkpoint to ask, for questions whose weights are not synthetic
    #[arg(long, value_name = "DIR")]
    checkpoint: Option<PathBuf>,
    /// Python with the packages of golden/scripts/requirements.txt
    #[arg(long, default_value = "python3", env = "KARAT_PYTHON")]
    python: PathBuf,
    /// Walk the model layer by layer, within --memory-gib
    #[arg(long)]
    stream: bool,
    /// Memory budget of the walk
    #[arg(long, default_value_t = 16.0, env = "KARAT_MEMORY_GIB")]
    memory_gib: f64,
    /// Write the recording here instead of beside the accepted one
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

pub(super) fn run(args: &Args, out: &Out) -> anyhow::Result<Exit> {
    let ids = if args.all { super::ids(&recordings()) } else { args.ids.clone() };
    if ids.is_empty() {
        return Err(refuse("golden record: a question by name, or --all"));
    }
    if args.out.is_some() && ids.len() != 1 {
        return Err(refuse("--out: expected one question"));
    }
    for id in &ids {
        super::plain(id)?;
        let place = recordings().join(id);
        let target = args.out.clone().unwrap_or_else(|| recordings().join(format!("{id}.new")));
        let mut command = Command::new(&args.python);
        command.arg(files::golden_dir().join("scripts/record.py")).arg("--out").arg(&target);
        if id == "ops" {
            command.arg("--ops");
        } else {
            ask(args, id, &mut command)?;
        }
        let status = command.status().map_err(|e| {
            fail(Exit::Unfit, format!("{}: {e}; --python names another", args.python.display()))
        })?;
        match status.code() {
            Some(0) => {}
            Some(2) => return Err(refuse(format!("{id}: refused by the recorder"))),
            Some(8) => {
                return Err(fail(
                    Exit::Recording,
                    format!("{id}: not certain enough to be recorded"),
                ));
            }
            Some(9) => {
                return Err(fail(
                    Exit::Unfit,
                    format!("{id}: {} is unfit to record", args.python.display()),
                ));
            }
            Some(130) => return Err(fail(Exit::Interrupted, "interrupted")),
            None if out::interrupted() => return Err(fail(Exit::Interrupted, "interrupted")),
            None => {
                return Err(fail(
                    Exit::Crashed,
                    format!("{id}: the recorder was killed: {status}"),
                ));
            }
            Some(code) => {
                return Err(fail(Exit::Crashed, format!("{id}: the recorder ended with {code}")));
            }
        }
        Recording::open(&target).map_err(|e| fail(Exit::Recording, e.to_string()))?;
        out.json(&json!({"schema": "karat.result/1", "kind": "golden", "recording": id, "written": target.display().to_string()}));
        out.line(&format!(
            "{}: written; `karat golden {} {id}{}` goes on",
            target.display(),
            if place.exists() { "diff" } else { "accept" },
            if place.exists() { "" } else { " --reason TEXT" }
        ));
    }
    Ok(Exit::Ok)
}

/// Arguments for a question about a checkpoint, which is made if it is synthetic.
fn ask(args: &Args, id: &str, command: &mut Command) -> anyhow::Result<()> {
    let path = files::golden_dir().join("questions").join(format!("{id}.json"));
    let text = golden::file::text(&path).map_err(|e| refuse(format!("{}: {e}", path.display())))?;
    let question: Question =
        serde_json::from_str(&text).map_err(|e| refuse(format!("{}: {e}", path.display())))?;
    let checkpoint = match (question.checkpoint.source.as_str(), &args.checkpoint) {
        (_, Some(dir)) => dir.clone(),
        ("synthetic", None) => {
            let dir = files::cache_dir().join("checkpoints").join(id);
            write(&synthetic(&question.checkpoint, id)?, &dir)?;
            dir
        }
        ("committed", None) => {
            files::golden_dir().join("..").join(question.checkpoint.path.as_deref().unwrap_or(""))
        }
        _ => return Err(refuse(format!("{id}: --checkpoint says where the weights are"))),
    };
    // The walk is not a choice where the model does not fit.
    let bytes = bytes_in(&checkpoint);
    let stream = args.stream || (args.memory_gib * 1e9) < 6.0 * bytes as f64;
    command.arg("--question").arg(&path).arg("--checkpoint").arg(&checkpoint);
    if stream {
        command.arg("--stream").arg("--memory-gib").arg(args.memory_gib.to_string());
    }
    Ok(())
}

fn bytes_in(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok);
    entries.filter_map(|entry| entry.metadata().ok()).map(|meta| meta.len()).sum()
}

/// Sets fields of a manifest and writes it back.
pub(super) fn amend(dir: &Path, change: impl FnOnce(&mut Value)) -> anyhow::Result<()> {
    let path = dir.join("manifest.json");
    let wrong =
        |e: &dyn std::fmt::Display| fail(Exit::Recording, format!("{}: {e}", path.display()));
    let text = golden::file::text(&path).map_err(|e| wrong(&e))?;
    let mut value: Value = serde_json::from_str(&text).map_err(|e| wrong(&e))?;
    change(&mut value);
    files::replace(&path, format!("{value:#}\n").as_bytes())
        .map_err(|e| fail(Exit::Unfit, format!("{}: {e}", path.display())))
}
