//! `karat bench [FILTER]`: how fast ways to compute ops are, beside what the machine can do.

use std::sync::Arc;

use benches::{
    foreign::Kernel,
    plan::Job,
    roofline::Bound,
    timing::{self, Options, Timing},
};
use golden::Clock;
use serde_json::{Value, json};

use crate::{
    aside::aside,
    ended::{self, Counts, Skips},
    exit::{Exit, fail},
    files, foreign,
    list::{Selection, Shard},
    machine::Machine,
    out::Out,
};

#[derive(Debug, clap::Args)]
#[group(skip)]
pub(crate) struct Args {
    #[command(flatten)]
    selection: Selection,
    /// Turns of each way to compute an op; every turn takes inputs that the one before did not have
    #[arg(long, default_value_t = 20, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    turns: u32,
    /// Walk through twice what the caches hold before each call
    #[arg(long)]
    cold: bool,
    #[command(flatten)]
    foreign: foreign::Kernels,
}

/// Times of a turn.
pub(crate) const CALLS: usize = 5;

impl Args {
    /// Whether ops were named.
    pub(super) fn named(&self) -> bool {
        self.selection.names()
    }

    /// The part of the run that is meant, if not all of it is.
    pub(super) fn shard(&self) -> Option<Shard> {
        self.selection.shard()
    }

    /// Whether foreign kernels are meant.
    pub(super) fn foreign(&self) -> bool {
        self.foreign.given()
    }

    /// The device that is meant, if one is.
    pub(super) fn device(&self) -> Option<&'static str> {
        self.selection.device()
    }
}

/// The jobs of this shard that can be timed.
pub(crate) fn jobs(selection: &Selection) -> anyhow::Result<Vec<Job>> {
    let jobs = selection.part(all(selection)?);
    if jobs.is_empty() {
        return Err(fail(Exit::Nothing, "no problem falls on this shard"));
    }
    Ok(jobs)
}

/// Of all shards: the reference is none of them.
fn all(selection: &Selection) -> anyhow::Result<Vec<Job>> {
    let mut jobs = selection.all(&[])?;
    jobs.retain(|job| !job.variant.starts_with("reference/"));
    if jobs.is_empty() {
        return Err(fail(
            Exit::Nothing,
            "nothing selected that can be timed; `karat list` names every problem",
        ));
    }
    Ok(jobs)
}

/// Of these kernels every problem that is selected, and whatever of ours computes it, one after the other.
fn beside(selection: &Selection, kernels: &[Arc<Kernel>]) -> anyhow::Result<Vec<Job>> {
    let (filter, device) = (selection.filter()?, selection.device());
    let mut problems: Vec<(Job, Vec<Job>)> = Vec::new();
    for job in selection.all(kernels)? {
        let same = |(of, _): &&mut (Job, Vec<Job>)| {
            (of.entry.name(), &of.spec) == (job.entry.name(), &job.spec)
        };
        match problems.iter_mut().find(same) {
            Some((_, jobs)) => jobs.push(job),
            None => problems.push((job.clone(), vec![job])),
        }
    }
    if problems.is_empty() {
        let why =
            "nothing of these kernels is selected; `karat kernel inspect` says what they take";
        return Err(fail(Exit::Nothing, why));
    }
    let all = problems.into_iter().flat_map(|(of, foreign)| {
        let ours = of.beside(&filter, device);
        ours.into_iter().filter(|job| !job.variant.starts_with("reference/")).chain(foreign)
    });
    Ok(all.collect())
}

pub(crate) fn run(args: &Args, out: &Out) -> anyhow::Result<Exit> {
    let (kernels, opened) =
        if args.foreign.given() { args.foreign.open(out)? } else { (Vec::new(), Exit::Ok) };
    let all =
        if kernels.is_empty() { all(&args.selection)? } else { beside(&args.selection, &kernels)? };
    let jobs = args.selection.part(all);
    if jobs.is_empty() {
        out.line("no problem falls on this shard");
        return Ok(opened);
    }
    let caches = benches::caches();
    let away = match (args.cold, caches) {
        (false, _) => None,
        (true, Some(bytes)) => Some(2 * bytes as usize),
        (true, None) => {
            let why = "--cold: this machine does not tell what its caches hold, so that nothing is proven";
            return Err(fail(Exit::Unfit, why));
        }
    };
    let options = Options { rounds: args.turns as usize, calls: CALLS, away, caches };
    benches::bound::keep_in(&files::cache_dir().join("bounds"));
    let here = Machine::here();
    out.line(&here.name);
    let bar = out.bar(jobs.len() as u64, "bench", false);
    let mut told = Told::new(out, away);
    told.exit = opened;
    told.shared = args.shard().is_some();
    let mut machine = None;
    for problem in jobs.chunk_by(|a, b| (a.entry.name(), &a.spec) == (b.entry.name(), &b.spec)) {
        let of = problem.to_vec();
        let work = move || (timing::run(&of, &options, &mut machine), machine);
        let timings;
        (timings, machine) = aside(work, &bar)?;
        for (job, timing) in problem.iter().zip(&timings) {
            told.add(job, timing);
        }
        bar.inc(problem.len() as u64);
    }
    bar.finish_and_clear();
    Ok(told.end())
}

/// Rows as they come.
struct Told<'a> {
    out: &'a Out,
    away: Option<usize>,
    rows: Vec<Vec<String>>,
    skips: Skips,
    counts: Counts,
    exit: Exit,
    /// Whether this is a part of a run, which need not hold what can run here.
    shared: bool,
}

impl<'a> Told<'a> {
    fn new(out: &'a Out, away: Option<usize>) -> Told<'a> {
        let counts = Counts::default();
        let (rows, skips) = (Vec::new(), Skips::default());
        Told { out, away, rows, skips, counts, exit: Exit::Ok, shared: false }
    }

    fn add(&mut self, job: &Job, timing: &Timing) {
        self.out.json(&row(job, timing, self.away));
        self.counts.add(&timing.checked);
        let skipped = self.skips.add(&timing.checked, job.entry.name(), &job.variant);
        let exit = ended::exit(&timing.checked, &job.variant);
        self.exit = self.exit.gravest(exit);
        if skipped {
            return;
        }
        if exit != Exit::Ok {
            let why = timing.checked.why().unwrap_or("`karat check` says what is wrong");
            let line = format!("WITHHELD  {}: {}: {why}", job.id(), timing.checked.name());
            self.out.line(&line);
            return;
        }
        let golden::Cost { bytes, flops } = job.parsed.cost;
        let ns = timing.median().unwrap_or(f64::NAN);
        let pace =
            |work: u64| if work == 0 { String::new() } else { format!("{:.1}", work as f64 / ns) };
        let spread = |share| benches::stats::quantile(&timing.samples, share);
        let warm = timing.warm.is_some_and(|warm| warm.stable);
        self.rows.push(vec![
            format!("{}/{}", job.entry.name(), job.spec),
            job.variant.clone(),
            micro(ns),
            format!(
                "{}..{}{}",
                micro(spread(0.05)),
                micro(spread(0.95)),
                if warm { "" } else { " !" }
            ),
            pace(bytes),
            pace(flops),
            timing.share.map_or(String::new(), |(share, bound)| {
                format!("{:.0} % of {}", 100.0 * share, name(bound))
            }),
            timing.clock.map_or("", Clock::name).to_owned(),
        ]);
    }

    fn end(self) -> Exit {
        if !self.rows.is_empty() {
            let head = ["problem", "way", "µs", "5 %..95 %", "GB/s", "Gop/s", "roof", "timed"];
            self.out.table(&head, &self.rows);
        }
        if self.rows.iter().any(|row| row[3].ends_with('!')) {
            self.out.line("!: still changing when its time for warming up was over");
        }
        self.skips.tell("problem", self.out);
        self.out.line(&self.counts.told(" and timed"));
        let exit =
            if self.shared { self.exit } else { self.counts.exit(self.exit, None, self.out) };
        let Counts { rows, passed, skipped, unsupported } = self.counts;
        self.out.json(
            &json!({"schema": "karat.result/1", "kind": "summary", "rows": rows, "passed": passed,
            "skipped": skipped, "unsupported": unsupported, "exit": exit as u8}),
        );
        exit
    }
}

/// Nanoseconds as microseconds.
fn micro(ns: f64) -> String {
    let us = ns / 1e3;
    let digits = if us < 10.0 { 2 } else { usize::from(us < 100.0) };
    format!("{us:.digits$}")
}

fn name(bound: Bound) -> &'static str {
    match bound {
        Bound::Memory => "memory",
        Bound::Products => "products",
    }
}

/// The object of `--format jsonl`.
pub(crate) fn row(job: &Job, timing: &Timing, away: Option<usize>) -> Value {
    let cost = job.parsed.cost;
    json!({
        "schema": "karat.result/1", "kind": "bench", "case": job.id(), "op": job.entry.name(),
        "spec": job.spec, "variant": job.variant, "checked": timing.checked.name(),
        "why": timing.checked.why(), "budget_used": benches::report::number(timing.budget()),
        "plan": timing.plan, "samples_ns": timing.samples, "median_ns": timing.median(),
        "timed": timing.clock.map(Clock::name), "device": job.device(),
        "kernel": job.foreign.as_ref().map(|kernel| &kernel.manifest.file), "throttled": timing.throttled, "warm": timing.warm.map(|warm| warm.stable),
        "calls_per_sample": timing.warm.map(|warm| if away.is_some() { 1 } else { warm.group }),
        "bytes": cost.bytes, "flops": cost.flops,
        "share_of_roof": timing.share.map(|(share, _)| share),
        "roof": timing.share.map(|(_, bound)| name(bound)),
        "cold": away.is_some(), "walked_between_bytes": away, "cache_bytes": benches::caches(),
    })
}
