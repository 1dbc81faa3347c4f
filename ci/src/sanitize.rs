//! `karat sanitize`: the sanitizers of CUDA over kernels at work.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::json;

use crate::{
    exit::{Exit, fail},
    list::SetName,
    out::{self, Out},
};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Words that must be in the id
    filter: Vec<String>,
    /// Which problems there are
    #[arg(long, value_enum, default_value = "smoke", env = "KARAT_SET")]
    set: SetName,
    /// Tools to run
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Tool::ALL)]
    tool: Vec<Tool>,
    /// The kernel that this kernel.toml describes, in place of karat's own; may be given again
    #[arg(long, value_name = "K.toml")]
    kernel: Vec<PathBuf>,
    /// The program compute-sanitizer, where neither PATH nor CUDA's folder has it
    #[arg(long, value_name = "PROGRAM", env = "KARAT_COMPUTE_SANITIZER")]
    compute_sanitizer: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Tool {
    /// Addresses outside of memory, and misaligned ones.
    Memcheck,
    /// Shared memory that two threads touch without a barrier between.
    Racecheck,
    /// Memory that is read before anybody wrote it.
    Initcheck,
    /// Barriers that not every thread reaches.
    Synccheck,
}

impl Tool {
    const ALL: [Tool; 4] = [Tool::Memcheck, Tool::Racecheck, Tool::Initcheck, Tool::Synccheck];

    fn name(self) -> &'static str {
        match self {
            Tool::Memcheck => "memcheck",
            Tool::Racecheck => "racecheck",
            Tool::Initcheck => "initcheck",
            Tool::Synccheck => "synccheck",
        }
    }
}

impl std::fmt::Display for Tool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What a sanitizer's log comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Told {
    /// Errors, or hazards; `None` without a last word: it did not come to its end.
    errors: Option<u64>,
    /// What it says first.
    first: Option<String>,
}

pub(crate) fn run(args: &Args, out: &Out) -> anyhow::Result<Exit> {
    let unfit = |why: String| fail(Exit::Unfit, why);
    if let Err(why) = benches::gpu() {
        return Err(unfit(format!("sanitizers need a GPU: {why}")));
    }
    let program = found(args.compute_sanitizer.as_deref()).map_err(unfit)?;
    let own = env::current_exe().map_err(|e| unfit(format!("this program's file: {e}")))?;
    let room = tempfile::tempdir().map_err(|e| unfit(format!("a folder for logs: {e}")))?;
    let mut exit = Exit::Ok;
    let bar = out.bar(args.tool.len() as u64, "sanitize", false);
    for &tool in &args.tool {
        let (log, verdict) = (room.path().join(tool.name()), room.path().join("verdict.json"));
        let mut command = Command::new(&program);
        command.args(["--tool", tool.name(), "--target-processes", "all", "--log-file"]).arg(&log);
        command.arg(&own).arg("--no-progress").arg("--verdict").arg(&verdict);
        command.args(["--format", "jsonl", "check", "--set", args.set.name()]);
        for kernel in &args.kernel {
            command.arg("--kernel").arg(kernel);
        }
        if args.kernel.is_empty() {
            command.args(["--device", "cuda"]);
        }
        command.arg("--").args(&args.filter).stdin(Stdio::null());
        let ran = command.output();
        let ran = ran.map_err(|e| unfit(format!("{}: {e}", program.display())))?;
        if out::interrupted() {
            return Err(fail(Exit::Interrupted, "interrupted"));
        }
        bar.inc(1);
        let log = fs::read_to_string(&log).unwrap_or_default();
        let told = told(&log);
        let checked = Exit::of(ran.status.code());
        let ended = match told.errors {
            Some(0) => Exit::Ok,
            Some(_) => Exit::Wrong,
            None if log.contains("Device not supported") => Exit::Unfit,
            None => Exit::Crashed,
        };
        let saw = match told.errors {
            Some(n) => format!("{n} errors"),
            None => "did not come to its end".to_owned(),
        };
        // The check has its own word on an answer; what the sanitizer saw is told beside it.
        let (ended, besides) = match checked {
            Some(Exit::Ok) => (ended, String::new()),
            Some(checked) => {
                let code = checked as u8;
                (ended.gravest(checked), format!(", and the check ended with exit code {code}"))
            }
            None => (ended.gravest(Exit::Crashed), ", and the check was killed".to_owned()),
        };
        out.line(&format!("{tool:<10} {saw}{besides}"));
        if let Some(first) = &told.first {
            out.line(&format!("           {first}"));
        }
        if ended != Exit::Ok && told.first.is_none() {
            let said = String::from_utf8_lossy(&ran.stderr);
            said.lines().take(3).for_each(|said| out::warn(&format!("karat: {tool}: {said}")));
        }
        out.json(&json!({"schema": "karat.result/1", "kind": "sanitize", "tool": tool.name(),
            "set": args.set.name(), "errors": told.errors, "first": told.first,
            "check": ran.status.code(), "exit": ended as u8}));
        exit = exit.gravest(ended);
    }
    bar.finish_and_clear();
    Ok(exit)
}

/// Where compute-sanitizer is.
fn found(given: Option<&Path>) -> Result<PathBuf, String> {
    const NAME: &str = "compute-sanitizer";
    if let Some(given) = given {
        let there = given.is_file().then(|| given.to_owned());
        return there.ok_or_else(|| format!("{}: no such program", given.display()));
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let cuda = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os);
    let homes = cuda.map(PathBuf::from).chain([PathBuf::from("/usr/local/cuda")]);
    let mut all = env::split_paths(&path).chain(homes.map(|home| home.join("bin")));
    let place = all.find_map(|folder| Some(folder.join(NAME)).filter(|place| place.is_file()));
    place.ok_or_else(|| {
        format!("{NAME} is not found; it is part of the CUDA toolkit (--compute-sanitizer PROGRAM)")
    })
}

/// Reads a sanitizer's log.
fn told(log: &str) -> Told {
    let lines = || log.lines().filter_map(|line| line.strip_prefix("========= "));
    let number = |text: &str, behind: &str| -> Option<u64> {
        text.split_once(behind)?.1.split_whitespace().next()?.parse().ok()
    };
    let errors = lines().filter_map(|line| {
        number(line, "ERROR SUMMARY: ").or_else(|| number(line, "RACECHECK SUMMARY: "))
    });
    let about = ["COMPUTE-SANITIZER", "ERROR SUMMARY", "RACECHECK SUMMARY"];
    let first = lines().find(|line| !about.iter().any(|about| line.starts_with(about)));
    // With several processes each has a last word.
    Told {
        errors: errors.reduce(u64::wrapping_add),
        first: first.map(|line| line.trim().to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::{Told, told};

    #[test]
    fn a_log_is_understood() {
        let clean = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n";
        assert_eq!(told(clean), Told { errors: Some(0), first: None });
        let wrong = "\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at rms_norm+0x120 in kernel.cu:7
========= ERROR SUMMARY: 3 errors
========= COMPUTE-SANITIZER
========= ERROR SUMMARY: 0 errors
";
        let first = Some("Invalid __global__ write of size 4 bytes".to_owned());
        assert_eq!(told(wrong), Told { errors: Some(3), first });
        let raced = "\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at x+0x40 in kernel.cu:3
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
";
        assert_eq!(told(raced).errors, Some(1));
        let cut = "========= COMPUTE-SANITIZER\n========= Error: Device not supported\n";
        assert_eq!(told(cut).errors, None);
        assert_eq!(told(""), Told { errors: None, first: None });
    }
}
