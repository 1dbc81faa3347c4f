//! How a run ends: one closed set of exit codes.

use std::{fmt, process::ExitCode};

/// The exit codes, in the words of `karat explain`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub(crate) enum Exit {
    /// All that was asked for passed.
    Ok = 0,
    /// A fault of karat itself.
    Internal = 1,
    /// Usage, or refused input: argument, config, checkpoint, tokens, `kernel.toml`, results file.
    Refused = 2,
    /// Wrong numbers.
    Wrong = 3,
    /// Nothing was selected.
    Nothing = 4,
    /// Slower.
    Slower = 5,
    /// Ambiguous, with `--strict`.
    Ambiguous = 6,
    /// The baseline is missing or of another machine.
    Baseline = 7,
    /// A recording is missing, stale or of another checkpoint.
    Recording = 8,
    /// The machine is unfit: no GPU, memory, disk full, unwritable output, missing tool.
    Unfit = 9,
    /// Something crashed or timed out.
    Crashed = 10,
    /// A kernel cheated.
    Cheat = 11,
    /// Interrupted.
    Interrupted = 130,
}

impl Exit {
    /// All of them, the gravest first.
    const ORDER: [Exit; 13] = [
        Exit::Interrupted,
        Exit::Internal,
        Exit::Refused,
        Exit::Cheat,
        Exit::Wrong,
        Exit::Crashed,
        Exit::Recording,
        Exit::Baseline,
        Exit::Unfit,
        Exit::Slower,
        Exit::Ambiguous,
        Exit::Nothing,
        Exit::Ok,
    ];

    /// The end that a code of another run of karat tells; `None` of a run that was killed.
    pub(crate) fn of(code: Option<i32>) -> Option<Exit> {
        Exit::ORDER.into_iter().find(|&exit| Some(exit as i32) == code)
    }

    /// The gravest of several, in the order 130, 1, 2, 11, 3, 10, 8, 7, 9, 5, 6, 4, 0.
    pub(crate) fn gravest(self, other: Exit) -> Exit {
        Exit::ORDER.into_iter().find(|&exit| exit == self || exit == other).unwrap_or(self)
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

/// An end that is not `Ok`, with its one line. Return it through `anyhow`; `main` prints the line
/// on stderr and exits with the code.
#[derive(Debug)]
pub(crate) struct Failure {
    /// The exit code.
    pub(crate) exit: Exit,
    /// One line: file, tensor, expected, got.
    pub(crate) line: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.line)
    }
}

impl std::error::Error for Failure {}

/// A [`Failure`] as an error.
pub(crate) fn fail(exit: Exit, line: impl Into<String>) -> anyhow::Error {
    Failure { exit, line: line.into() }.into()
}

/// Why an engine does not do what is asked: the machine is unfit, a kernel crashed, or it was asked wrongly.
pub(crate) fn of_engine(error: &golden::Error) -> anyhow::Error {
    if error.is::<benches::Unfit>() {
        fail(Exit::Unfit, error.to_string())
    } else if error.is::<benches::Trapped>() {
        fail(Exit::Crashed, error.to_string())
    } else {
        refuse(error)
    }
}

/// Refused input, exit 2.
pub(crate) fn refuse(line: impl fmt::Display) -> anyhow::Error {
    fail(Exit::Refused, line.to_string())
}
