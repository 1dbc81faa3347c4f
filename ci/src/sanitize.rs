//! `karat sanitize`: the sanitizers of CUDA over kernels at work.

use std::{
    env, fs,
    io::ErrorKind,
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
    /// Which problems there are; kernels for one machine have sizes that smoke does not hold
    #[arg(long, value_enum, default_value = "ci", env = "KARAT_SET")]
    set: SetName,
    /// Tools to run
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Tool::ALL)]
    tool: Vec<Tool>,
    /// The kernel that this kernel.toml describes, in place of karat's own; may be given again
    #[arg(long, value_name = "K.toml")]
    kernel: Vec<PathBuf>,
    /// Folder in which each tool's whole log is left
    #[arg(long, value_name = "DIR")]
    logs: Option<PathBuf>,
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
    /// What it says, each once with how often, in the order in which it was said first.
    findings: Vec<(Finding, u64)>,
}

/// What was found and where, line by line, whoever it was and of whatever launch.
type Finding = Vec<String>;

pub(crate) fn run(args: &Args, out: &Out) -> anyhow::Result<Exit> {
    let unfit = |why: String| fail(Exit::Unfit, why);
    if let Err(why) = benches::gpu() {
        return Err(unfit(format!("sanitizers need a GPU: {why}")));
    }
    let program = found(args.compute_sanitizer.as_deref()).map_err(unfit)?;
    let own = env::current_exe().map_err(|e| unfit(format!("this program's file: {e}")))?;
    let room = tempfile::tempdir().map_err(|e| unfit(format!("a folder for logs: {e}")))?;
    let logs = args.logs.as_deref().unwrap_or(room.path());
    fs::create_dir_all(logs).map_err(|e| unfit(format!("{}: {e}", logs.display())))?;
    let mut exit = Exit::Ok;
    let bar = out.bar(args.tool.len() as u64, "sanitize", false);
    for &tool in &args.tool {
        let log = logs.join(format!("{tool}.log"));
        let verdict = room.path().join("verdict.json");
        let mut command = Command::new(&program);
        // What an earlier run left is not what this one finds.
        if let Err(e) = fs::remove_file(&log)
            && e.kind() != ErrorKind::NotFound
        {
            return Err(unfit(format!("{}: {e}", log.display())));
        }
        command.args(["--tool", tool.name(), "--target-processes", "all", "--print-limit", "0"]);
        command.arg("--log-file").arg(&log);
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
        for (finding, times) in told.findings.iter().take(SHOWN) {
            out.line(&format!("           {times} times: {}", finding.join(" ")));
        }
        if SHOWN < told.findings.len() {
            out.line(&format!("           and {} others (--logs)", told.findings.len() - SHOWN));
        }
        if ended != Exit::Ok && told.findings.is_empty() {
            let said = String::from_utf8_lossy(&ran.stderr);
            said.lines().take(3).for_each(|said| out::warn(&format!("karat: {tool}: {said}")));
        }
        let one = |(said, times): &(Finding, u64)| json!({"said": said, "times": times});
        let said: Vec<_> = told.findings.iter().map(one).collect();
        out.json(&json!({"schema": "karat.result/1", "kind": "sanitize", "tool": tool.name(),
            "set": args.set.name(), "errors": told.errors, "told": said,
            "check": ran.status.code(), "exit": ended as u8}));
        exit = exit.gravest(ended);
    }
    bar.finish_and_clear();
    Ok(exit)
}

/// Findings that people are shown of each tool.
const SHOWN: usize = 5;

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
    let counted = |line: &&str| !line.contains("were not printed");
    let errors = lines().filter(counted).filter_map(|line| {
        number(line, "ERROR SUMMARY: ").or_else(|| number(line, "RACECHECK SUMMARY: "))
    });
    // With several processes each has a last word.
    Told { errors: errors.reduce(u64::wrapping_add), findings: findings(lines()) }
}

/// A line that is not indented begins a finding; of what follows, places tell one from another.
fn findings<'a>(lines: impl Iterator<Item = &'a str>) -> Vec<(Finding, u64)> {
    const ABOUT: [&str; 3] = ["COMPUTE-SANITIZER", "ERROR SUMMARY", "RACECHECK SUMMARY"];
    const WHERE: [&str; 3] = ["at ", "and ", "Device Frame:"];
    let mut all: Vec<Finding> = Vec::new();
    let mut inside = false;
    for line in lines.filter(|line| !line.trim().is_empty()) {
        let own = line.trim();
        if !line.starts_with(' ') {
            inside = !ABOUT.iter().any(|about| line.starts_with(about));
            if inside {
                all.push(vec![place(own)]);
            }
        } else if inside && WHERE.iter().any(|begins| own.starts_with(begins)) {
            all.last_mut().expect("a finding has begun").push(place(own));
        }
    }
    let mut each: Vec<(Finding, u64)> = Vec::new();
    for finding in all {
        match each.iter_mut().find(|(own, _)| *own == finding) {
            Some((_, times)) => *times += 1,
            None => each.push((finding, 1)),
        }
    }
    each
}

/// Without the address of an instruction, and how many threads met.
fn place(line: &str) -> String {
    let met = |line: &str| Some(line.strip_suffix(" hazards]")?.rsplit_once(" [")?.0.len());
    let line = met(line).map_or(line, |end| &line[..end]);
    let words = line.split(' ').map(|word| word.split_once("+0x").map_or(word, |(name, _)| name));
    words.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::{Told, told};

    fn finding(said: &[&str], times: u64) -> (Vec<String>, u64) {
        (said.iter().map(|line| (*line).to_owned()).collect(), times)
    }

    #[test]
    fn a_log_is_understood() {
        let clean = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n";
        assert_eq!(told(clean), Told { errors: Some(0), findings: vec![] });
        let wrong = "\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at rms_norm(float (*) [32])+0x120 in kernel.cu:7
=========     by thread (0,0,0) in block (0,0,0)
=========     Saved host backtrace up to driver entry point at error
========= ERROR SUMMARY: 3 errors
========= ERROR SUMMARY: 2 errors were not printed. Use --print-limit option to adjust the number of printed errors
========= COMPUTE-SANITIZER
========= ERROR SUMMARY: 0 errors
";
        let findings = vec![finding(
            &[
                "Invalid __global__ write of size 4 bytes",
                "at rms_norm(float (*) [32]) in kernel.cu:7",
            ],
            1,
        )];
        assert_eq!(told(wrong), Told { errors: Some(3), findings });
        let cut = "========= COMPUTE-SANITIZER\n========= Error: Device not supported\n";
        assert_eq!(told(cut).errors, None);
        assert_eq!(told(""), Told { errors: None, findings: vec![] });
    }

    #[test]
    fn a_race_is_told_once_however_many_threads_and_launches_meet() {
        let raced = "\
========= COMPUTE-SANITIZER
========= Warning: Race reported between Read access at load(unsigned int (&)[4], unsigned int)+0x7150 in mma.cuh:133
=========     and Write access at store(int)+0x40 in kernel.cu:3 [508 hazards]
========= 
========= Warning: Race reported between Read access at load(unsigned int (&)[4], unsigned int)+0x7190 in mma.cuh:133
=========     and Write access at store(int)+0x80 in kernel.cu:3 [12 hazards]
========= 
========= Error: Race reported between Write access at x+0x40 in kernel.cu:3
=========     and Write access at x+0x60 in kernel.cu:9 [1 hazards]
========= 
========= RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)
";
        let load = "load(unsigned int (&)[4], unsigned int) in mma.cuh:133";
        let findings = vec![
            finding(
                &[
                    &format!("Warning: Race reported between Read access at {load}"),
                    "and Write access at store(int) in kernel.cu:3",
                ],
                2,
            ),
            finding(
                &[
                    "Error: Race reported between Write access at x in kernel.cu:3",
                    "and Write access at x in kernel.cu:9",
                ],
                1,
            ),
        ];
        assert_eq!(told(raced), Told { errors: Some(3), findings });
    }
}
