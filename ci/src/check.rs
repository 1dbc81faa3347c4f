//! `karat check`: every selected problem, by every way to compute it.

use std::{collections::BTreeMap, path::PathBuf};

use benches::{
    evidence::Evidence,
    registry::{self, Spoil},
    report::{Outcome, Row},
};
use golden::{
    compare::{Bound, Finding},
    recording::Recording,
};
use serde_json::json;

use crate::{
    derivation,
    exit::{Exit, fail, refuse},
    files,
    list::Selection,
    out::{self, Out},
    support::Outcomes,
    watch::{Watcher, repro},
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
    /// Write inputs, answers and bounds of every job that does not pass into this folder: one
    /// safetensors file each, with in.X, want.O, got.O and allowed.O
    #[arg(long, value_name = "DIR")]
    save_failing: Option<PathBuf>,
    /// Memory that one problem may take; what the machine has without it
    #[arg(long, value_name = "GIB", env = "KARAT_MEMORY_GIB")]
    memory_gib: Option<f64>,
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
    run.flags = args.plant.as_ref().map_or(String::new(), |plant| format!(" --plant {plant}"));
    if let Some(dir) = &args.save_failing {
        std::fs::create_dir_all(dir)
            .map_err(|e| fail(Exit::Unfit, format!("{}: {e}", dir.display())))?;
    }
    let memory = match args.memory_gib {
        None => benches::host().memory,
        Some(gib) if gib.is_finite() && 0.0 < gib => (gib * f64::from(1 << 30)) as u64,
        Some(gib) => return Err(refuse(format!("--memory-gib {gib}: expected a number above 0"))),
    };
    let watcher = Watcher::new(memory, &run.flags, out, args.save_failing.as_deref());
    let bar = out.bar(jobs.len() as u64, "check", false);
    benches::bound::keep_in(&files::cache_dir().join("bounds"));
    benches::plan::check(&jobs, &watcher, plant, &mut |row| {
        run.add(row);
        bar.inc(1);
        !run.over()
    });
    bar.finish_and_clear();
    if args.selection.with_recordings() {
        recorded(&mut run, args.selection.words(), plant, Some(&watcher))?;
    }
    if let Some(lost) = watcher.end() {
        return Err(fail(Exit::Unfit, lost));
    }
    if run.rows == 0 {
        return Err(fail(Exit::Nothing, "nothing selected; `karat list` names every problem"));
    }
    run.end()
}

/// Every recorded case of every op whose id holds all the words, in every variant.
pub(crate) fn recorded(
    run: &mut Run<'_>,
    words: &[String],
    plant: Option<Spoil>,
    watcher: Option<&Watcher>,
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
                let mut evidence = Evidence::default();
                let mut check =
                    || entry.check_recorded(&recording, case, variant, plant, &mut evidence);
                let Some(watcher) = watcher else {
                    run.add(&check());
                    continue;
                };
                watcher.begin(&id);
                let row = check();
                watcher.done(&id);
                if !matches!(row.outcome, Outcome::Passed(_)) {
                    watcher.save(&row, &evidence);
                }
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
    /// What has to be typed besides an id to see a row again.
    flags: String,
    /// Outcome, op, variant and reason of what was skipped, and how often.
    skips: BTreeMap<(&'static str, String), usize>,
    fail_fast: bool,
    /// Case and outcome, to be kept for `karat support`.
    found: Vec<(String, &'static str)>,
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
            flags: String::new(),
            skips: BTreeMap::new(),
            fail_fast,
            found: Vec::new(),
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
        // A planted fault says nothing of the variant.
        if self.flags.is_empty() {
            self.found.extend(Outcomes::of(row));
        }
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
            self.out.line(&block(row, &self.flags));
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
        if self.out.verbose {
            self.derive(row);
        }
        self.exit = self.exit.gravest(exit);
    }

    /// What the bound of a row is made of. Recorded cases have another rule, told with their findings.
    fn derive(&self, row: &Row) {
        let derived = matches!(row.outcome.findings(), [first, ..] if matches!(first.bound, Bound::Derived { .. } | Bound::Exact));
        if derived
            && let Some(entry) = registry::op(row.op)
            && let Ok(found) = entry.derivation(&row.spec, &row.variant)
        {
            derivation::lines(&found).iter().for_each(|line| self.out.line(line));
        }
    }

    /// The table by op, the summary, and the exit code.
    pub(crate) fn end(mut self) -> anyhow::Result<Exit> {
        Outcomes::keep(std::mem::take(&mut self.found));
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
pub(crate) fn block(row: &Row, flags: &str) -> String {
    let mut lines = vec![format!(
        "{:<4} {}",
        row.outcome.name().to_uppercase().replace("FAILED", "FAIL"),
        row.id()
    )];
    if let Some(why) = row.outcome.why() {
        lines.push(format!("  {why}"));
    }
    lines.extend(row.outcome.findings().iter().filter(|f| !f.ok).flat_map(told));
    lines.push(format!("  repro: {}", repro(&row.id(), flags)));
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
        Bound::Derived { runs, grid } => format!(
            "7 x spread of {runs} runs in stochastic arithmetic + half an ulp of {grid}; sums of squares; bias"
        ),
        Bound::Exact => "equal".to_owned(),
    }
}
