//! How rows end a run: outcomes as exit codes, what was not run, and what all comes to.

use std::{collections::BTreeMap, fmt::Write as _};

use benches::report::Outcome;

use crate::{exit::Exit, out::Out};

/// What one outcome means for the run; `by` is the variant or engine.
pub(crate) fn exit(outcome: &Outcome, by: &str) -> Exit {
    match outcome {
        // What is known beforehand is told, and not green.
        Outcome::Passed(_) | Outcome::Skipped(_) | Outcome::Unsupported(_) => Exit::Ok,
        Outcome::Failed(_) | Outcome::Mistrusted(_) => Exit::Wrong,
        Outcome::Crashed(_) | Outcome::Timeout => Exit::Crashed,
        Outcome::Cheat(_) => Exit::Cheat,
        // It is not karat that is wrong with a kernel that cannot be called.
        Outcome::Error(_) if by.starts_with("foreign/") => Exit::Refused,
        Outcome::Error(_) => Exit::Internal,
    }
}

/// Outcome, what, by whom and why of what was not run, and how often.
#[derive(Debug, Default)]
pub(crate) struct Skips(BTreeMap<(&'static str, String), usize>);

impl Skips {
    /// Takes an outcome; whether it is one of these.
    pub(crate) fn add(&mut self, outcome: &Outcome, what: &str, by: &str) -> bool {
        let (Outcome::Skipped(why) | Outcome::Unsupported(why)) = outcome else { return false };
        *self.0.entry((outcome.name(), format!("{what}@{by}: {why}"))).or_default() += 1;
        true
    }

    /// One line for each; `of` is what is counted.
    pub(crate) fn tell(&self, of: &str, out: &Out) {
        for ((outcome, whom), n) in &self.0 {
            let s = if *n == 1 { "" } else { "s" };
            out.line(&format!("{outcome}: {whom} ({n} {of}{s})"));
        }
    }
}

/// How many rows there were, and how they ended.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) rows: usize,
    pub(crate) passed: usize,
    pub(crate) skipped: usize,
    pub(crate) unsupported: usize,
}

impl Counts {
    /// Takes how one row ended.
    pub(crate) fn add(&mut self, outcome: &Outcome) {
        self.rows += 1;
        self.passed += usize::from(matches!(outcome, Outcome::Passed(_)));
        self.skipped += usize::from(matches!(outcome, Outcome::Skipped(_)));
        self.unsupported += usize::from(matches!(outcome, Outcome::Unsupported(_)));
    }

    /// What was known before it ran.
    pub(crate) fn not_run(self) -> usize {
        self.skipped + self.unsupported
    }

    pub(crate) fn not_passed(self) -> usize {
        self.rows - self.passed - self.not_run()
    }

    /// The last line; `more` stands behind what passed.
    pub(crate) fn told(self, more: &str) -> String {
        let Counts { passed, skipped, unsupported, .. } = self;
        let mut told = format!("{passed} passed{more}, {} not passed", self.not_passed());
        for (n, what) in [(skipped, "skipped"), (unsupported, "unsupported")] {
            if n != 0 {
                let _ = write!(told, ", {n} {what}");
            }
        }
        told
    }

    /// The exit code of a run whose gravest row is `exit`. One in which nothing passed is red; where
    /// nothing even ran, the machine was unfit for it; and where a fault was planted, so is one in which
    /// nothing was red.
    pub(crate) fn exit(self, exit: Exit, plant: Option<&str>, out: &Out) -> Exit {
        let exit = match exit {
            Exit::Ok if self.passed == 0 && self.not_run() == self.rows => Exit::Unfit,
            Exit::Ok if self.passed == 0 => Exit::Wrong,
            exit => exit,
        };
        unseen(plant, exit, out)
    }
}

/// What a run comes to in which a fault was planted: one in which nothing was red proves nothing.
pub(crate) fn unseen(plant: Option<&str>, exit: Exit, out: &Out) -> Exit {
    match plant {
        Some(plant) if exit == Exit::Ok => {
            out.line(&format!("NOT SEEN  {plant}: nothing that ran here shows the planted fault"));
            Exit::Wrong
        }
        _ => exit,
    }
}
