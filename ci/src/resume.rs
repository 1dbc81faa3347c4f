//! `--resume`: a check goes on where it was interrupted.

use std::{
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
};

use benches::report::Outcome;

use crate::{
    exit::refuse,
    record,
    runs::{Damage, Results, rows::Judged},
    support,
};

/// What was found before, in its order.
#[derive(Debug, Default)]
pub(crate) struct Before {
    rows: Vec<Kept>,
    cases: HashSet<String>,
}

/// A row of an earlier run.
#[derive(Debug)]
pub(crate) struct Kept {
    /// As it was written.
    pub(crate) line: String,
    /// As it is read.
    pub(crate) row: Judged,
}

impl Before {
    /// The rows that an interrupted run left beside `results`; those of a finished one if there is none.
    pub(crate) fn read(results: Option<&Path>) -> anyhow::Result<Before> {
        let Some(results) = results else {
            return Err(refuse(
                "--resume: expected --results FILE, the rows of which are gone on with",
            ));
        };
        let part = record::part(results);
        let file = if part.exists() { part } else { results.to_owned() };
        if !file.exists() {
            return Ok(Before::default());
        }
        let mut all = Results::default();
        let mut lines = Vec::new();
        all.add(&file, Damage::Told, &mut |line| lines.push(line.to_owned()))?;
        let shown = file.display();
        if let Some(run) = all.runs.first() {
            let arguments: Vec<String> = std::env::args_os()
                .skip(1)
                .map(|word| word.to_string_lossy().into_owned())
                .collect();
            let asked = |words: &[String]| {
                words.iter().filter(|word| *word != "--resume").cloned().collect::<Vec<_>>()
            };
            if 1 < all.runs.len() || asked(&run.env.arguments) != asked(&arguments) {
                return Err(refuse(format!(
                    "--resume: {shown} is of `{}`; without --resume it begins again",
                    run.env.command
                )));
            }
            if run.env.build != support::build() {
                return Err(refuse(format!(
                    "--resume: {shown} is of another build of karat; without --resume it begins again"
                )));
            }
        }
        let judged = lines.into_iter().filter(|line| line.contains("\"kind\":\"check\""));
        let rows: Vec<Kept> =
            judged.zip(all.judged).map(|(line, row)| Kept { line, row }).collect();
        let cases = rows.iter().map(|kept| kept.row.case.clone()).collect();
        Ok(Before { rows, cases })
    }

    /// The rows.
    pub(crate) fn rows(&self) -> &[Kept] {
        &self.rows
    }

    /// Whether a case was found.
    pub(crate) fn has(&self, id: &str) -> bool {
        self.cases.contains(id)
    }
}

impl Kept {
    /// The outcome, as far as an exit code depends on it.
    pub(crate) fn outcome(&self) -> Outcome {
        let why = || self.row.why.clone().unwrap_or_default();
        match self.row.outcome.as_str() {
            "passed" => Outcome::Passed(Vec::new()),
            "failed" => Outcome::Failed(Vec::new()),
            "mistrusted" => Outcome::Mistrusted(why()),
            "skipped" => Outcome::Skipped(why()),
            "unsupported" => Outcome::Unsupported(why()),
            "crashed" => Outcome::Crashed(why()),
            "timeout" => Outcome::Timeout,
            "cheat" => Outcome::Cheat(why()),
            _ => Outcome::Error(why()),
        }
    }
}

/// An unfinished file of an earlier run that is begun anew is no loss: its place is told.
pub(crate) fn unfinished(results: Option<&PathBuf>) -> Option<String> {
    let part = record::part(results?);
    let lines = String::from_utf8_lossy(&fs::read(&part).ok()?).lines().count();
    Some(format!(
        "{}: {lines} rows of an unfinished run are replaced; --resume goes on with them",
        part.display()
    ))
}
