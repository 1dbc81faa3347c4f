//! `karat check`: every selected problem, by every way to compute it.

use std::{collections::BTreeMap, time::Duration};

use benches::{
    plan::Job,
    registry::{self, Spoil},
    report::{Outcome, Row},
};
use golden::{
    compare::{Bound, Finding},
    recording::Recording,
};
use serde_json::json;

use crate::{
    exit::{Exit, fail, refuse},
    files,
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
    let jobs = args.selection.jobs()?;
    let mut run = Run::new(out, args.fail_fast);
    run.plant.clone_from(&args.plant);
    let memory = benches::host().memory;
    let bar = out.bar(jobs.len() as u64, "check", false);
    benches::bound::keep_in(&files::cache_dir().join("bounds"));
    let screen = |job: &Job| too_large(job, memory);
    benches::plan::check(&jobs, &screen, plant, &mut |row| {
        run.add(row);
        bar.inc(1);
        !run.over()
    });
    bar.finish_and_clear();
    if args.selection.with_recordings() {
        recorded(&mut run, args.selection.words(), plant)?;
    }
    if run.rows == 0 {
        return Err(fail(Exit::Nothing, "nothing selected; `karat list` names every problem"));
    }
    run.end()
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
                run.add(&entry.check_recorded(&recording, case, variant, plant));
            }
        }
    }
    Ok(())
}

/// Rows as they come, and what they come to.
pub(crate) struct Run<'a> {
    pub(crate) out: &'a Out,
    pub(crate) rows: usize,
    /// The fault that was planted, for repro lines.
    plant: Option<String>,
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
            plant: None,
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
            Outcome::Error(_) => Exit::Internal,
            // Known beforehand; told, and not green.
            Outcome::Skipped(_) | Outcome::Unsupported(_) => {
                sum.skipped += 1;
                Exit::Ok
            }
        };
        if exit != Exit::Ok {
            self.out.line(&block(row, self.plant.as_deref()));
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

/// What is wrong, where, and how to see it again.
pub(crate) fn block(row: &Row, plant: Option<&str>) -> String {
    let mut lines = vec![format!(
        "{:<4} {}",
        row.outcome.name().to_uppercase().replace("FAILED", "FAIL"),
        row.id()
    )];
    if let Some(why) = row.outcome.why() {
        lines.push(format!("  {why}"));
    }
    lines.extend(row.outcome.findings().iter().filter(|f| !f.ok).flat_map(told));
    let plant = plant.map_or(String::new(), |plant| format!(" --plant {plant}"));
    lines.push(format!("  repro: karat check '{}'{plant}", row.id()));
    lines.join("\n")
}

/// What is wrong with an output.
pub(crate) fn told(f: &Finding) -> Vec<String> {
    let at = f.at.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let mut lines = vec![format!(
        "  {} of {} elements of {} over, {} not finite",
        f.over, f.n, f.output, f.not_finite
    )];
    lines.push(format!(
        "  worst {}[{at}] got {:.6e} want {:.6e} err {:.1e} allowed {} ({:.1}x of what is allowed)",
        f.output,
        f.pair.1,
        f.pair.0,
        f.max_abs,
        if f.allowed.is_nan() { "by the row".to_owned() } else { format!("{:.1e}", f.allowed) },
        f.budget
    ));
    let kind = match f.bound {
        Bound::Derived { grid, .. } => grid.name(),
        _ => "f32",
    };
    lines.push(format!(
        "  rel-RMS {:.1e} of {:.1e} · worst {} {} at {:.1e} of {:.1e} · ULP({kind}) p99 {} max {}",
        f.rel_rms,
        f.rel_rms_allowed,
        f.worst_is,
        f.worst_token_at,
        f.worst_token,
        f.worst_token_allowed,
        f.ulp.0,
        f.ulp.1,
    ));
    if let Some(bias) = &f.bias
        && 1.0 < bias.used()
    {
        lines.push(format!(
            "  bias: {} of the {} is {:.1e}, allowed {:.1e}",
            bias.what, bias.part, bias.value, bias.allowed
        ));
    }
    lines.push(format!("  bound: {}", bound(f.bound)));
    if let Some(pattern) = &f.pattern {
        lines.push(format!("  pattern: {pattern}"));
    }
    lines
}

/// A bound in words.
pub(crate) fn bound(bound: Bound) -> String {
    match bound {
        Bound::Relative { rel_rms, worst_token } => {
            format!("rel-RMS {rel_rms:.1e}, row {worst_token:.1e}")
        }
        Bound::Twice { rel_rms, worst_token } => {
            format!("rel-RMS {rel_rms:.1e}, row {worst_token:.1e}: twice the emulated plan")
        }
        Bound::Derived { runs, grid } => format!(
            "7 x spread of {runs} runs in stochastic arithmetic + half an ulp of {grid}; sums of squares; bias"
        ),
        Bound::Exact => "equal".to_owned(),
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
