//! Kernels of other hands: honest ones, and a zoo of those that are not. Each must be judged rightly,
//! and harm nobody else.
//!
//! They are compiled into temporary folders. Where a compiler or a Python package is not there the
//! tests that need it are ignored, which is decided before they are listed.

#[path = "kernels/bench.rs"]
mod bench;
#[path = "cli/home.rs"]
#[allow(dead_code, reason = "the tests of the command line use the rest")]
mod home;
#[path = "kernels/peers.rs"]
mod peers;
#[path = "kernels/resources.rs"]
mod resources;
#[path = "kernels/scaffolds.rs"]
mod scaffolds;
#[path = "kernels/shrink.rs"]
mod shrink;
#[path = "kernels/trace.rs"]
mod trace;
#[path = "kernels/zoo.rs"]
mod zoo;

use std::{
    collections::BTreeSet,
    fs,
    io::Write,
    process::{Command, ExitCode, Stdio},
};

use libtest_mimic::{Arguments, Trial};
use serde_json::Value;

use home::{Home, Ran};

/// What a test needs of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Needs {
    Nothing,
    Cc,
    Python,
    Numpy,
    Transformers,
    Nvrtc,
}

impl Needs {
    /// Why this machine does not have it, if so.
    fn missing(self) -> Option<String> {
        let (program, args, install) = match self {
            Needs::Nothing => return None,
            Needs::Nvrtc => {
                let unset = "KARAT_NVRTC is not the folder of libnvrtc 13.0.88; .ci/run has it";
                return std::env::var_os("KARAT_NVRTC").is_none().then(|| unset.to_owned());
            }
            Needs::Cc => ("cc".to_owned(), vec!["--version"], "install a C compiler"),
            Needs::Python => (python(), vec!["--version"], "install Python 3"),
            Needs::Numpy => (python(), vec!["-c", "import numpy"], "pip install numpy"),
            Needs::Transformers => {
                let install = "pip install torch transformers numpy";
                (
                    python(),
                    vec!["-c", "import numpy, torch, transformers.models.qwen3_next"],
                    install,
                )
            }
        };
        let ran = Command::new(&program)
            .args(&args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        let there = ran.is_ok_and(|status| status.success());
        (!there).then(|| format!("`{program} {}` fails; {install}", args.join(" ")))
    }
}

/// The Python that a developer would use: the one that `KARAT_PYTHON` names, or `python3`.
fn python() -> String {
    std::env::var("KARAT_PYTHON").unwrap_or_else(|_| "python3".to_owned())
}

/// A named test.
struct Test {
    name: String,
    needs: Needs,
    run: Box<dyn FnOnce() + Send>,
}

fn test(name: impl Into<String>, needs: Needs, run: impl FnOnce() + Send + 'static) -> Test {
    Test { name: name.into(), needs, run: Box::new(run) }
}

fn main() -> ExitCode {
    let tests = [
        zoo::tests(),
        scaffolds::tests(),
        shrink::tests(),
        bench::tests(),
        peers::tests(),
        trace::tests(),
        resources::tests(),
    ];
    let tests: Vec<Test> = tests.into_iter().flatten().collect();
    let needs: BTreeSet<Needs> = tests.iter().map(|test| test.needs).collect();
    let missing: Vec<(Needs, String)> =
        needs.into_iter().filter_map(|needs| Some((needs, needs.missing()?))).collect();
    for (needs, why) in &missing {
        // libtest has no place for the reason of an ignored test.
        let _ = writeln!(std::io::stderr(), "ignored: tests that need {needs:?}: {why}");
    }
    let trials = tests.into_iter().map(|Test { name, needs, run }| {
        let ignored = missing.iter().any(|(lacking, _)| *lacking == needs);
        let run = || {
            run();
            Ok(())
        };
        Trial::test(name, run).with_ignored_flag(ignored)
    });
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit_code()
}

/// Where a kernel describes itself.
const FILE: &str = "kernel.toml";

/// A folder with a kernel in it.
fn kernel(files: &[(&str, &str)]) -> Home {
    let home = Home::new();
    for (name, text) in files {
        fs::write(home.path(name), text).unwrap();
    }
    home
}

/// `karat check --kernel FILE` with JSON lines: how it ended, its rows, and its summary.
fn check(home: &Home, file: &str, args: &[&str]) -> (Ran, Vec<Value>, Value) {
    let python = python();
    let always = ["check", "--kernel", file, "--format", "jsonl", "--python", &python];
    let ran = home.karat(&[&always[..], args].concat());
    let lines = ran.lines();
    let rows = lines.iter().filter(|line| line["kind"] == "check").cloned().collect();
    let summary = lines.last().cloned().unwrap_or_default();
    (ran, rows, summary)
}
