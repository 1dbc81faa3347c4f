//! The row that results begin with: which machine, which program, which revision, what was typed.

use std::process::{Command, Stdio};

use chrono::{DateTime, Datelike, SecondsFormat};
use serde_json::{Value, json};

use crate::{block::quoted, config::InForce, files, list::Shard, machine::Machine, support};

/// What this machine is, and which settings are in force.
pub(crate) fn machine(settings: &[InForce]) -> Value {
    let host = benches::host();
    let (here, gpu) = (Machine::here(), benches::gpu().as_ref().ok());
    let goldens = files::golden_dir().join("recordings");
    let recordings =
        std::fs::read_dir(&goldens).map_or(0, |dir| dir.filter_map(Result::ok).count());
    let settings = settings
        .iter()
        .map(|InForce { key, value, from }| json!({"key": key, "value": value, "from": from}));
    json!({
        "schema": "karat.result/1", "kind": "env", "cpu": host.cpu, "threads": host.threads, "memory": host.memory,
        "features": host.features, "gpu": gpu.map(|gpu| &gpu.name), "gpu_memory": gpu.map(|gpu| gpu.memory),
        "recordings": recordings, "version": env!("CARGO_PKG_VERSION"), "machine": here.name, "fingerprint": here.fingerprint,
        "os": std::env::consts::OS, "arch": std::env::consts::ARCH, "settings": settings.collect::<Vec<_>>(),
    })
}

/// The head of a run: the machine, and what ran on it when.
pub(crate) fn head(settings: &[InForce], shard: Option<Shard>) -> Value {
    let words = std::env::args_os().skip(1);
    let command: Vec<String> = words.map(|word| word.to_string_lossy().into_owned()).collect();
    let now = benches::clock::now();
    let run = format!("{now} {} {command:?}", std::process::id());
    let (revision, dirty) = revision();
    let mut row = machine(settings);
    row["run"] = json!(blake3::hash(run.as_bytes()).to_hex()[..16]);
    row["time"] = json!(moment(now));
    row["command"] = json!(typed(&command));
    row["arguments"] = json!(command);
    row["revision"] = json!(revision);
    row["dirty"] = json!(dirty);
    row["build"] = json!(support::build());
    row["shard"] = json!(shard.map(|shard| shard.to_string()));
    row
}

/// Seconds since 1970, as RFC 3339 says them.
pub(crate) fn moment(seconds: u64) -> Option<String> {
    let time = DateTime::from_timestamp(seconds as i64, 0)?;
    Some(time.to_rfc3339_opts(SecondsFormat::Secs, true))
}

/// Year, month and day of some seconds since 1970.
pub(crate) fn day(seconds: u64) -> (u64, u64, u64) {
    let day = DateTime::from_timestamp(seconds as i64, 0).unwrap_or(DateTime::UNIX_EPOCH);
    (day.year() as u64, day.month().into(), day.day().into())
}

/// A command as a shell reads it.
pub(crate) fn typed(arguments: &[String]) -> String {
    let words = arguments.iter().map(|word| quoted(word));
    std::iter::once("karat".to_owned()).chain(words).collect::<Vec<_>>().join(" ")
}

/// The commit of the current folder and whether files differ from it; nothing where git knows none.
fn revision() -> (Option<String>, Option<bool>) {
    let git = |arguments: &[&str]| {
        let mut git = Command::new("git");
        let ran = git.args(arguments).stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
        let text = String::from_utf8(ran.stdout).ok()?;
        ran.status.success().then(|| text.trim().to_owned())
    };
    let revision = git(&["rev-parse", "HEAD"]);
    let changed = || git(&["status", "--porcelain", "--untracked-files=no"]);
    let dirty = revision.as_ref().and_then(|_| changed()).map(|changed| !changed.is_empty());
    (revision, dirty)
}

#[cfg(test)]
mod tests {
    use super::day;

    #[test]
    fn days_have_their_dates() {
        for (seconds, want) in [
            (0, (1970, 1, 1)),
            (951_782_400, (2000, 2, 29)),
            (1_709_164_799, (2024, 2, 28)),
            (1_709_164_800, (2024, 2, 29)),
            (1_767_225_599, (2025, 12, 31)),
            (4_107_542_400, (2100, 3, 1)),
        ] {
            assert_eq!(day(seconds), want);
        }
    }
}
