//! `karat check`: every selected problem, by every way to compute it.

use std::collections::BTreeMap;

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
    let mut red: Vec<usize> = Vec::new();
    let mut at = 0;
    let bar = out.bar(jobs.len() as u64, "check", false);
    benches::bound::keep_in(&files::cache_dir().join("bounds"));
    benches::plan::check(&jobs, plant, &mut |row| {
        run.add(row, &repro(&jobs[at]));
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
        red.iter().for_each(|&at| shrink(&jobs[at], plant, out));
    }
    if args.selection.with_recordings() && !args.foreign.given() {
        recorded(&mut run, args.selection.words(), plant)?;
    }
    if run.rows == 0 {
        return Err(fail(Exit::Nothing, "nothing selected; `karat list` names every problem"));
    }
    run.end()
}

/// What to type to run a job again.
fn repro(job: &Job) -> String {
    let kernel = job
        .foreign
        .as_ref()
        .map_or(String::new(), |kernel| format!(" --kernel {}", kernel.manifest.file.display()));
    format!("karat check '{}'{kernel}", job.id())
}

/// Tells the smallest problem that fails as this one does.
fn shrink(job: &Job, plant: Option<Spoil>, out: &Out) {
    let bar = out.bar(0, "shrink", false);
    let found = benches::shrink::smallest(job, plant, &mut |_| {
        bar.inc(1);
        !out::interrupted()
    });
    bar.finish_and_clear();
    if let Some((smallest, row)) = found {
        out.line(&format!("smallest that fails as {} does:", job.id()));
        out.line(&block(&row, &repro(&smallest)));
        out.json(&json!({
            "schema": "karat.result/1", "kind": "shrunk", "case": job.id(), "smallest": smallest.id(),
            "outcome": row.outcome.name(), "why": row.outcome.why(),
        }));
    }
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
                run.add(&row, &format!("karat check '{}'", row.id()));
            }
        }
    }
    Ok(())
}

/// Rows as they come, and what they come to.
pub(crate) struct Run<'a> {
    pub(crate) out: &'a Out,
    pub(crate) rows: usize,
    fail_fast: bool,
    ops: Vec<&'static str>,
    sums: BTreeMap<&'static str, Sum>,
    exit: Exit,
}

#[derive(Clone, Copy, Default)]
struct Sum {
    cases: usize,
    passed: usize,
    budget: f64,
    seconds: f64,
}

impl<'a> Run<'a> {
    pub(crate) fn new(out: &'a Out, fail_fast: bool) -> Run<'a> {
        Run { out, rows: 0, fail_fast, ops: Vec::new(), sums: BTreeMap::new(), exit: Exit::Ok }
    }

    /// Whether nothing more should run.
    pub(crate) fn over(&self) -> bool {
        out::interrupted() || (self.fail_fast && self.exit != Exit::Ok)
    }

    /// Takes a row; `repro` is what to type to see it again.
    pub(crate) fn add(&mut self, row: &Row, repro: &str) {
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
            Outcome::Skipped(_) | Outcome::Unsupported(_) => Exit::Ok,
        };
        if exit != Exit::Ok {
            self.out.line(&block(row, repro));
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
                    (sum.cases - sum.passed).to_string(),
                    format!("{:.1} %", 100.0 * sum.budget),
                    format!("{:.0} ms", 1e3 * sum.seconds),
                ]
            })
            .collect();
        self.out
            .table(&["op", "cases", "passed", "not passed", "worst use of bound", "time"], &rows);
        let passed: usize = self.sums.values().map(|sum| sum.passed).sum();
        self.out.line(&format!("{passed} passed, {} not passed", self.rows - passed));
        self.out.json(&json!({
            "schema": "karat.result/1", "kind": "summary", "rows": self.rows, "passed": passed, "exit": self.exit as u8,
        }));
        if out::interrupted() {
            return Err(fail(Exit::Interrupted, "interrupted"));
        }
        // A run in which nothing passed is red.
        Ok(if passed == 0 { self.exit.gravest(Exit::Wrong) } else { self.exit })
    }
}

/// What is wrong, where, and how to see it again.
fn block(row: &Row, repro: &str) -> String {
    let mut lines = vec![format!(
        "{:<4} {}",
        row.outcome.name().to_uppercase().replace("FAILED", "FAIL"),
        row.id()
    )];
    if let Some(why) = row.outcome.why() {
        lines.push(format!("  {why}"));
    }
    lines.extend(row.outcome.findings().iter().filter(|f| !f.ok).flat_map(told));
    lines.push(format!("  repro: {repro}"));
    lines.join("\n")
}

/// What is wrong with an output.
fn told(f: &Finding) -> Vec<String> {
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
        Bound::Derived { runs, grid } => format!(
            "7 x spread of {runs} runs in stochastic arithmetic + half an ulp of {grid}; sums of squares; bias"
        ),
        Bound::Exact => "equal".to_owned(),
    }
}
