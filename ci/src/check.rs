//! `karat check`: every selected problem, by every way to compute it.

use std::{collections::BTreeMap, time::Duration};

use benches::{
    plan::Job,
    registry::{self, Spoil},
    report::{Outcome, Row},
};
use golden::recording::Recording;
use serde_json::json;

use crate::{
    block::{Again, block},
    exit::{Exit, fail, refuse},
    files, foreign,
    list::Selection,
    out::{self, Out},
};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    selection: Selection,
    /// Stop at the first problem that does not pass.
    #[arg(long)]
    fail_fast: bool,
    /// Spoil every answer in this way, to see that the check sees it.
    #[arg(long, value_name = "NAME")]
    plant: Option<String>,
    /// Of every way to compute an op that fails, find the smallest problem that fails so.
    #[arg(long)]
    shrink: bool,
    #[command(flatten)]
    foreign: foreign::Kernels,
}

pub(crate) fn run(args: &Args, out: &Out) -> anyhow::Result<Exit> {
    let plant = match &args.plant {
        None => None,
        Some(name) => {
            let known = || Spoil::ALL.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
            let found = Spoil::ALL.iter().find(|(known, _)| known == name);
            Some(
                found
                    .ok_or_else(|| refuse(format!("--plant {name}: expected one of {}", known())))?
                    .1,
            )
        }
    };
    let (kernels, opened) = args.foreign.open(out)?;
    let jobs = args.selection.jobs(&kernels)?;
    let mut run = Run::new(out, args.fail_fast);
    run.exit = opened;
    run.again.plant.clone_from(&args.plant);
    for kernel in &kernels {
        run.again.kernels.insert(kernel.variant(), kernel.manifest.file.clone());
    }
    let mut red: Vec<usize> = Vec::new();
    let mut at = 0;
    let memory = benches::host().memory;
    let bar = out.bar(jobs.len() as u64, "check", false);
    benches::bound::keep_in(&files::cache_dir().join("bounds"));
    let screen = |job: &Job| too_large(job, memory);
    benches::plan::check(&jobs, &screen, plant, &mut |row| {
        run.add(row);
        let same = |job: &Job| job.entry.name() == row.op && job.variant == row.variant;
        if row.outcome.is_red() && !red.iter().any(|&at| same(&jobs[at])) {
            red.push(at);
        }
        at += 1;
        bar.inc(1);
        !run.over()
    });
    bar.finish_and_clear();
    if args.shrink {
        red.iter().for_each(|&at| shrink(&jobs[at], plant, &run));
    }
    if args.selection.with_recordings() && !args.foreign.given() {
        recorded(&mut run, args.selection.words(), plant)?;
    }
    if run.rows == 0 {
        return Err(fail(Exit::Nothing, "nothing selected; `karat list` names every problem"));
    }
    run.end()
}

/// Tells the smallest problem that fails as this one does.
fn shrink(job: &Job, plant: Option<Spoil>, run: &Run<'_>) {
    let bar = run.out.bar(0, "shrink", false);
    let found = benches::shrink::smallest(job, plant, &mut |_| {
        bar.inc(1);
        !out::interrupted()
    });
    bar.finish_and_clear();
    if let Some((smallest, row)) = found {
        run.out.line(&format!("smallest that fails as {} does:", job.id()));
        run.out.line(&block(&row, &run.again));
        run.out.json(&json!({
            "schema": "karat.result/1", "kind": "shrunk", "case": job.id(), "smallest": smallest.id(),
            "outcome": row.outcome.name(), "why": row.outcome.why(),
        }));
    }
}

/// A problem that this machine has no memory for, skipped before it runs: inputs and outputs are held
/// in f32 and in f64 at once.
fn too_large(job: &Job, memory: u64) -> Option<Row> {
    let needed = job.parsed.cost.bytes.saturating_mul(4);
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    (memory != 0 && memory < needed).then(|| {
        let why = format!("needs {:.1} GiB, this machine has {:.1}", gib(needed), gib(memory));
        Row::new(job.entry.name(), &job.spec, &job.variant, Outcome::Skipped(why), Duration::ZERO)
    })
}

/// Every recorded case of every op whose id holds all the words, in every variant.
pub(crate) fn recorded(
    run: &mut Run<'_>,
    words: &[String],
    plant: Option<Spoil>,
) -> anyhow::Result<()> {
    let dir = files::golden_dir().join("recordings/ops");
    if !dir.exists() {
        run.out.note(&format!("skipped: per-op recordings: {} does not exist", dir.display()));
        return Ok(());
    }
    let recording = Recording::open(&dir).map_err(|e| fail(Exit::Recording, e.to_string()))?;
    for case in &recording.manifest.cases {
        let Some(entry) = registry::op(&case.op) else {
            return Err(fail(
                Exit::Recording,
                format!("{}: case of an unknown op {}", dir.display(), case.op),
            ));
        };
        for variant in entry
            .variants()
            .iter()
            .filter(|name| name.starts_with("reference/") && !name.starts_with("reference/f64-"))
        {
            let id = format!("{}/ops:{}@{variant}", case.op, case.case);
            if run.over() {
                return Ok(());
            }
            if words.iter().all(|word| id.contains(word.as_str())) {
                let row = entry.check_recorded(&recording, case, variant, plant);
                run.add(&row);
            }
        }
    }
    Ok(())
}

/// Rows as they come, and what they come to.
pub(crate) struct Run<'a> {
    pub(crate) out: &'a Out,
    pub(crate) rows: usize,
    again: Again,
    /// Outcome, op, variant and reason of what was skipped, and how often.
    skips: BTreeMap<(&'static str, String), usize>,
    fail_fast: bool,
    ops: Vec<&'static str>,
    sums: BTreeMap<&'static str, Sum>,
    exit: Exit,
}

#[derive(Clone, Copy, Default)]
struct Sum {
    cases: usize,
    passed: usize,
    skipped: usize,
    budget: f64,
    seconds: f64,
}

impl<'a> Run<'a> {
    pub(crate) fn new(out: &'a Out, fail_fast: bool) -> Run<'a> {
        Run {
            out,
            rows: 0,
            again: Again::default(),
            skips: BTreeMap::new(),
            fail_fast,
            ops: Vec::new(),
            sums: BTreeMap::new(),
            exit: Exit::Ok,
        }
    }

    /// Whether nothing more should run.
    pub(crate) fn over(&self) -> bool {
        out::interrupted() || (self.fail_fast && self.exit != Exit::Ok)
    }

    /// Takes a row.
    pub(crate) fn add(&mut self, row: &Row) {
        self.rows += 1;
        if !self.ops.contains(&row.op) {
            self.ops.push(row.op);
        }
        let sum = self.sums.entry(row.op).or_default();
        sum.cases += 1;
        sum.seconds += row.took.as_secs_f64();
        sum.budget = sum.budget.max(row.budget());
        self.out.json(&row.json());
        let exit = match &row.outcome {
            Outcome::Passed(_) => {
                sum.passed += 1;
                Exit::Ok
            }
            Outcome::Failed(_) | Outcome::Mistrusted(_) => Exit::Wrong,
            Outcome::Crashed(_) | Outcome::Timeout => Exit::Crashed,
            Outcome::Cheat(_) => Exit::Cheat,
            // It is not karat that is wrong with a kernel that cannot be called.
            Outcome::Error(_) if row.variant.starts_with("foreign/") => Exit::Refused,
            Outcome::Error(_) => Exit::Internal,
            // Known beforehand; told, and not green.
            Outcome::Skipped(_) | Outcome::Unsupported(_) => {
                sum.skipped += 1;
                Exit::Ok
            }
        };
        if exit != Exit::Ok {
            self.out.line(&block(row, &self.again));
        } else if let Outcome::Skipped(why) | Outcome::Unsupported(why) = &row.outcome {
            let whom = format!("{}@{}: {why}", row.op, row.variant);
            *self.skips.entry((row.outcome.name(), whom)).or_default() += 1;
            if self.out.verbose {
                self.out.line(&format!("{:<11} {}: {why}", row.outcome.name(), row.id()));
            }
        } else if self.out.verbose {
            self.out.line(&format!(
                "{:<11} {}  budget {:.3}",
                row.outcome.name(),
                row.id(),
                row.budget()
            ));
        }
        self.exit = self.exit.gravest(exit);
    }

    /// The table by op, the summary, and the exit code.
    pub(crate) fn end(self) -> anyhow::Result<Exit> {
        let rows: Vec<Vec<String>> = self
            .ops
            .iter()
            .map(|op| {
                let sum = self.sums[op];
                vec![
                    (*op).to_owned(),
                    sum.cases.to_string(),
                    sum.passed.to_string(),
                    (sum.cases - sum.passed - sum.skipped).to_string(),
                    sum.skipped.to_string(),
                    format!("{:.1} %", 100.0 * sum.budget),
                    format!("{:.0} ms", 1e3 * sum.seconds),
                ]
            })
            .collect();
        self.out.table(
            &["op", "cases", "passed", "not passed", "skipped", "worst use of bound", "time"],
            &rows,
        );
        for ((outcome, whom), n) in &self.skips {
            let problems = if *n == 1 { "problem" } else { "problems" };
            self.out.line(&format!("{outcome}: {whom} ({n} {problems})"));
        }
        let passed: usize = self.sums.values().map(|sum| sum.passed).sum();
        let skipped: usize = self.sums.values().map(|sum| sum.skipped).sum();
        let told = if skipped == 0 { String::new() } else { format!(", {skipped} skipped") };
        let wrong = self.rows - passed - skipped;
        self.out.line(&format!("{passed} passed, {wrong} not passed{told}"));
        // A run in which nothing passed is red; where nothing even ran, the machine was unfit for it.
        let exit = match self.exit {
            Exit::Ok if passed == 0 && skipped == self.rows => Exit::Unfit,
            Exit::Ok if passed == 0 => Exit::Wrong,
            exit => exit,
        };
        self.out.json(&json!({
            "schema": "karat.result/1", "kind": "summary", "rows": self.rows, "passed": passed, "skipped": skipped,
            "exit": exit as u8,
        }));
        if out::interrupted() {
            return Err(fail(Exit::Interrupted, "interrupted"));
        }
        Ok(exit)
    }
}

#[cfg(test)]
mod tests {
    use benches::{filter::Filter, plan::plan};
    use golden::Set;

    use super::too_large;

    #[test]
    fn a_problem_beyond_the_memory_is_skipped_with_both_sizes() {
        let word = "linear/N16777216-M64-D64@reference/f32".to_owned();
        let filter = Filter::new(&[word], None).unwrap();
        let jobs = plan(Set::Smoke, &filter, None).unwrap();
        let row = too_large(&jobs[0], 8 << 30).unwrap();
        assert_eq!(row.outcome.name(), "skipped");
        assert_eq!(row.outcome.why(), Some("needs 32.0 GiB, this machine has 8.0"));
        assert!(too_large(&jobs[0], 64 << 30).is_none());
        // A machine that does not tell is tried.
        assert!(too_large(&jobs[0], 0).is_none());
    }
}
