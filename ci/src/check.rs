//! `karat check`: every selected problem, by every way to compute it.

use std::{collections::BTreeMap, path::PathBuf};

use benches::{
    evidence::Evidence,
    plan::Job,
    registry::{self, Spoil},
    report::{Outcome, Row, number},
};
use golden::{compare::Bound, recording::Recording};
use serde_json::json;

use crate::{
    block::{Again, block},
    changed::{self, Changed},
    derivation,
    ended::{self, Counts, Skips},
    exit::{Exit, fail, refuse},
    files, foreign,
    list::{Selection, Shard},
    out::{self, Out},
    resume::{self, Before, Kept},
    support::Outcomes,
    told,
    watch::Watcher,
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
    /// Write inputs, answers and bounds of every job that does not pass into this folder: one
    /// safetensors file each, with in.X, want.O, got.O and allowed.O
    #[arg(long, value_name = "DIR")]
    save_failing: Option<PathBuf>,
    /// Memory that one problem may take; what the machine has without it
    #[arg(long, value_name = "GIB", env = "KARAT_MEMORY_GIB")]
    memory_gib: Option<f64>,
    #[command(flatten)]
    changed: changed::Since,
    /// Run what does not pass so many times more; what passes then is flaky, and told as such
    #[arg(long, value_name = "N", default_value_t = 0, env = "KARAT_RETRIES")]
    retries: u32,
    /// Go on where an interrupted run with the same --results stopped
    #[arg(long)]
    resume: bool,
    #[command(flatten)]
    told: told::Told,
}

impl Args {
    /// The part of the run that is meant, if not all of it is.
    pub(crate) fn shard(&self) -> Option<Shard> {
        self.selection.shard()
    }

    /// Whether something is told beside the answer.
    pub(crate) fn tells(&self) -> bool {
        self.told.any()
    }
}

pub(crate) fn run(args: &Args, results: Option<&PathBuf>, out: &Out) -> anyhow::Result<Exit> {
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
    let changed = args.changed.find(&kernels)?;
    let mut jobs = args.selection.all(&kernels)?;
    if let Some(changed) = &changed {
        jobs = changed.of(jobs)?;
    }
    let some = !jobs.is_empty();
    let jobs = args.selection.part(jobs);
    let mut before = Before::default();
    if args.resume {
        before = Before::read(results.map(PathBuf::as_path))?;
    } else if let Some(unfinished) = resume::unfinished(results) {
        out.note(&unfinished);
    }
    args.told.begin(out);
    let jobs: Vec<Job> = jobs.into_iter().filter(|job| !before.has(&job.id())).collect();
    let mut run = Run::new(out, args.fail_fast);
    run.exit = opened;
    run.again.plant.clone_from(&args.plant);
    run.again.limits = args.foreign.limits.typed();
    for kernel in &kernels {
        run.again.kernels.insert(kernel.variant(), kernel.manifest.file.clone());
    }
    if let Some(dir) = &args.save_failing {
        std::fs::create_dir_all(dir)
            .map_err(|e| fail(Exit::Unfit, format!("{}: {e}", dir.display())))?;
    }
    let memory = match args.memory_gib {
        None => benches::host().memory,
        Some(gib) if gib.is_finite() && 0.0 < gib => (gib * f64::from(1 << 30)) as u64,
        Some(gib) => return Err(refuse(format!("--memory-gib {gib}: expected a number above 0"))),
    };
    if !before.rows().is_empty() {
        out.note(&format!("{} problems were judged before", before.rows().len()));
    }
    before.rows().iter().for_each(|kept| run.add_kept(kept));
    let watcher = Watcher::new(memory, &run.again, out, args.save_failing.as_deref());
    let mut red: Vec<usize> = Vec::new();
    let mut at = 0;
    let bar = out.bar(jobs.len() as u64, "check", false);
    benches::bound::keep_in(&files::cache_dir().join("bounds"));
    benches::plan::check(&jobs, &watcher, plant, &mut |row| {
        let again = || jobs[at].run(plant);
        let (row, earlier) = retried(row, args.retries, &again);
        run.add_after(&row, &earlier);
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
        let wanted = Wanted { shard: args.shard(), changed: changed.as_ref() };
        recorded(&mut run, args.selection.words(), plant, Some(&watcher), &wanted, &before)?;
    }
    if let Some(lost) = watcher.end() {
        return Err(fail(Exit::Unfit, lost));
    }
    if run.all.rows == 0 && some && args.shard().is_some() {
        out.line("no problem falls on this shard");
        return Ok(Exit::Ok);
    }
    if run.all.rows == 0 {
        return Err(fail(Exit::Nothing, "nothing selected; `karat list` names every problem"));
    }
    run.shared = args.shard().is_some();
    let exit = run.end()?;
    args.told.end(exit, out)?;
    Ok(exit)
}

/// A row, or what came of running its job again, with those before.
fn retried(row: &Row, retries: u32, again: &dyn Fn() -> Row) -> (Row, Vec<Row>) {
    let mut row = row.clone();
    let mut earlier = Vec::new();
    // Who cheats once has cheated.
    while row.outcome.is_red()
        && !matches!(row.outcome, Outcome::Cheat(_))
        && earlier.len() < retries as usize
        && !out::interrupted()
    {
        earlier.push(std::mem::replace(&mut row, again()));
    }
    (row, earlier)
}

/// Which recorded cases are meant, beside the words.
#[derive(Default)]
pub(crate) struct Wanted<'a> {
    shard: Option<Shard>,
    changed: Option<&'a Changed>,
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

/// Every recorded case of every op whose id holds all the words, in every variant.
pub(crate) fn recorded(
    run: &mut Run<'_>,
    words: &[String],
    plant: Option<Spoil>,
    watcher: Option<&Watcher>,
    wanted: &Wanted<'_>,
    before: &Before,
) -> anyhow::Result<()> {
    let dir = files::golden_dir().join("recordings/ops");
    if !dir.exists() {
        run.out.note(&format!("skipped: per-op recordings: {} does not exist", dir.display()));
        return Ok(());
    }
    let recording = Recording::open(&dir).map_err(|e| fail(Exit::Recording, e.to_string()))?;
    for (at, case) in recording.manifest.cases.iter().enumerate() {
        if wanted.shard.is_some_and(|shard| !shard.holds(at)) {
            continue;
        }
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
            if wanted.changed.is_some_and(|changed| !changed.touches(&case.op, variant)) {
                continue;
            }
            if !before.has(&id) && words.iter().all(|word| id.contains(word.as_str())) {
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

/// An attempt that did not pass, as JSON.
fn attempt(row: &Row) -> serde_json::Value {
    json!({
        "outcome": row.outcome.name(), "why": row.outcome.why(), "budget_used": number(row.budget()),
        "ms": row.took.as_secs_f64() * 1e3,
    })
}

/// Rows as they come, and what they come to.
pub(crate) struct Run<'a> {
    pub(crate) out: &'a Out,
    pub(crate) all: Counts,
    again: Again,
    skips: Skips,
    fail_fast: bool,
    /// Case and outcome, to be kept for `karat support`.
    found: Vec<(String, &'static str)>,
    ops: Vec<&'static str>,
    sums: BTreeMap<&'static str, Sum>,
    flaky: usize,
    /// Whether this is a part of a run, which need not hold what can run here.
    shared: bool,
    exit: Exit,
}

#[derive(Clone, Copy, Default)]
struct Sum {
    of: Counts,
    budget: f64,
    seconds: f64,
}

impl<'a> Run<'a> {
    pub(crate) fn new(out: &'a Out, fail_fast: bool) -> Run<'a> {
        Run {
            out,
            all: Counts::default(),
            again: Again::default(),
            skips: Skips::default(),
            fail_fast,
            found: Vec::new(),
            ops: Vec::new(),
            sums: BTreeMap::new(),
            flaky: 0,
            shared: false,
            exit: Exit::Ok,
        }
    }

    /// Whether nothing more should run.
    pub(crate) fn over(&self) -> bool {
        out::interrupted() || (self.fail_fast && self.exit != Exit::Ok)
    }

    /// Takes a row.
    pub(crate) fn add(&mut self, row: &Row) {
        self.add_after(row, &[]);
    }

    /// Takes a row that came after others of the same case, which did not pass.
    fn add_after(&mut self, row: &Row, earlier: &[Row]) {
        // A planted fault says nothing of the variant.
        if self.again.plant.is_none() {
            self.found.extend(Outcomes::of(row));
        }
        let mut json = row.json();
        json["repro"] = json!(self.again.typed(&row.id()));
        if !earlier.is_empty() {
            json["earlier"] = earlier.iter().map(attempt).collect();
        }
        self.out.json(&json);
        let seconds = row.took.as_secs_f64();
        let (skipped, exit) = self.count(row.op, &row.variant, &row.outcome, row.budget(), seconds);
        if exit != Exit::Ok {
            self.out.line(&block(row, &self.again));
        } else if !earlier.is_empty() {
            self.flaky += 1;
            let of = 1 + earlier.len();
            let first = earlier[0].outcome.name();
            self.out.line(&format!("FLAKY {}: {first}, then passed in attempt {of}", row.id()));
        } else if skipped && self.out.verbose {
            let why = row.outcome.why().unwrap_or_default();
            self.out.line(&format!("{:<11} {}: {why}", row.outcome.name(), row.id()));
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
    }

    /// Takes a row of an earlier run.
    fn add_kept(&mut self, kept: &Kept) {
        let Some(entry) = registry::op(&kept.row.op) else { return };
        self.out.again(&kept.line);
        let (outcome, row) = (kept.outcome(), &kept.row);
        let seconds = row.ms / 1e3;
        let (_, exit) = self.count(entry.name(), &row.variant, &outcome, row.budget_used, seconds);
        self.flaky += usize::from(row.is_flaky());
        if exit != Exit::Ok {
            let word = outcome.name().to_uppercase();
            self.out.line(&format!("{word} {}  judged before", row.case));
            self.out.line(&format!("  repro: {}", row.typed()));
        }
    }

    /// Counts a row; whether it was skipped, and what it means for the run.
    fn count(
        &mut self,
        op: &'static str,
        variant: &str,
        outcome: &Outcome,
        budget: f64,
        seconds: f64,
    ) -> (bool, Exit) {
        self.all.add(outcome);
        if !self.ops.contains(&op) {
            self.ops.push(op);
        }
        let sum = self.sums.entry(op).or_default();
        sum.of.add(outcome);
        sum.seconds += seconds;
        sum.budget = sum.budget.max(budget);
        let skipped = self.skips.add(outcome, op, variant);
        let exit = ended::exit(outcome, variant);
        self.exit = self.exit.gravest(exit);
        (skipped, exit)
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
        let table: Vec<Vec<String>> = self
            .ops
            .iter()
            .map(|op| {
                let sum = self.sums[op];
                vec![
                    (*op).to_owned(),
                    sum.of.rows.to_string(),
                    sum.of.passed.to_string(),
                    sum.of.not_passed().to_string(),
                    sum.of.skipped.to_string(),
                    sum.of.unsupported.to_string(),
                    format!("{:.1} %", 100.0 * sum.budget),
                    format!("{:.0} ms", 1e3 * sum.seconds),
                ]
            })
            .collect();
        self.out.table(
            &[
                "op",
                "cases",
                "passed",
                "not passed",
                "skipped",
                "unsupported",
                "worst use of bound",
                "time",
            ],
            &table,
        );
        self.skips.tell("problem", self.out);
        let flaky = match self.flaky {
            0 => String::new(),
            n => format!(" ({n} flaky)"),
        };
        self.out.line(&self.all.told(&flaky));
        let Counts { rows, passed, skipped, unsupported } = self.all;
        // Whether anything passed is asked of all parts together, by `karat merge`.
        let exit = if self.shared && passed == 0 {
            self.exit
        } else {
            self.all.exit(self.exit, self.again.plant.as_deref(), self.out)
        };
        self.out.json(&json!({
            "schema": "karat.result/1", "kind": "summary", "rows": rows, "passed": passed, "skipped": skipped,
            "unsupported": unsupported, "flaky": self.flaky, "exit": exit as u8,
        }));
        if out::interrupted() {
            return Err(fail(Exit::Interrupted, "interrupted"));
        }
        Ok(exit)
    }
}
