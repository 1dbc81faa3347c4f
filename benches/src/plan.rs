//! From a filter to a list of jobs. No job is run here.

use std::sync::Arc;

use golden::Set;
use rayon::prelude::*;

use crate::{
    evidence::Evidence,
    filter::{Filter, Subject},
    foreign::Kernel,
    registry::{self, Entry, Parsed, Spoil, ops},
    report::{Outcome, Row},
    turns::{Asked, Timed},
};

/// One spec for one way to compute it.
#[derive(Clone)]
pub struct Job {
    /// The op.
    pub entry: &'static dyn Entry,
    /// `device/algorithm`.
    pub variant: String,
    /// The spec, as it prints.
    pub spec: String,
    /// What it says.
    pub parsed: Parsed,
    /// The foreign kernel, if the variant is one.
    pub foreign: Option<Arc<Kernel>>,
}

impl Job {
    /// `op/spec@device/algorithm`.
    pub fn id(&self) -> String {
        format!("{}/{}@{}", self.entry.name(), self.spec, self.variant)
    }

    /// Of the same problem those ways of our own that a filter and a device select.
    pub fn beside(&self, filter: &Filter, device: Option<&str>) -> Vec<Job> {
        let of = |variant| Job { variant, foreign: None, ..self.clone() };
        let mut jobs: Vec<Job> = self.entry.variants().into_iter().map(of).collect();
        jobs.retain(|job| selects(filter, job));
        jobs.retain(|job| device.is_none_or(|device| on(&job.variant, device)));
        jobs
    }

    /// The device that it runs on.
    pub fn device(&self) -> &str {
        match &self.foreign {
            Some(kernel) => kernel.manifest.device(),
            None if on(&self.variant, "cpu") => "cpu",
            None => self.variant.split('/').next().unwrap_or_default(),
        }
    }

    /// Makes it ready to be timed.
    ///
    /// # Errors
    /// The outcome, if it does not come to that.
    pub fn timed(&self, asked: &Asked) -> Result<Box<dyn Timed>, Outcome> {
        match &self.foreign {
            Some(kernel) => self.entry.timed_foreign(&self.spec, kernel, asked),
            None => self.entry.timed(&self.spec, &self.variant, asked),
        }
    }

    /// Runs it and compares with the oracle.
    pub fn run(&self, plant: Option<Spoil>) -> Row {
        match &self.foreign {
            Some(kernel) => self.entry.check_foreign(&self.spec, kernel, plant),
            None => self.entry.check(&self.spec, &self.variant, plant),
        }
    }
}

/// Every job of a set that the filter selects, ops in the model's order, cheapest first.
///
/// A word of the filter that is itself a whole id selects that job even if no set holds it.
///
/// # Errors
/// If such a word names an op but is no problem of it.
pub fn plan(set: Set, filter: &Filter, device: Option<&str>) -> Result<Vec<Job>, String> {
    let mut jobs = Vec::new();
    for &entry in ops() {
        for spec in entry.specs(set) {
            for variant in entry.variants() {
                let parsed = entry.parse(&spec)?;
                jobs.push(Job { entry, variant, spec: spec.clone(), parsed, foreign: None });
            }
        }
    }
    jobs.retain(|job| selects(filter, job));
    if jobs.is_empty() {
        for word in filter.words() {
            jobs.extend(named(word)?);
        }
    }
    jobs.retain(|job| device.is_none_or(|device| on(&job.variant, device)));
    Ok(jobs)
}

/// Whether a filter selects a job.
fn selects(filter: &Filter, job: &Job) -> bool {
    let Job { entry, variant, parsed, .. } = job;
    filter.selects(&Subject { op: entry.name(), variant, id: &job.id(), parsed })
}

/// Who is told of jobs as they run, several at a time.
pub trait Watch: Sync {
    /// What a job comes to that need not run: this machine has no memory for it.
    fn screen(&self, _job: &Job) -> Option<Row> {
        None
    }
    /// It runs from here on.
    fn begins(&self, _job: &Job) {}
    /// It has run.
    fn ends(&self, _job: &Job) {}
    /// Whether tensors of a job that does not pass are wanted.
    fn keeps(&self) -> bool {
        false
    }
    /// The tensors of a job that did not pass.
    fn keep(&self, _job: &Job, _row: &Row, _evidence: &Evidence) {}
}

/// Nobody is told.
pub struct Unwatched;

impl Watch for Unwatched {}

/// Checks jobs, several problems at a time, and hands their rows over in order; ends when `take`
/// returns false.
pub fn check(
    jobs: &[Job],
    watch: &dyn Watch,
    plant: Option<Spoil>,
    take: &mut dyn FnMut(&Row) -> bool,
) {
    // All ways to compute one problem share its bound: one after another, they derive it once.
    let problems: Vec<&[Job]> =
        jobs.chunk_by(|a, b| (a.entry.name(), &a.spec) == (b.entry.name(), &b.spec)).collect();
    for window in problems.chunks(4 * rayon::current_num_threads()) {
        let rows: Vec<Vec<Row>> = window
            .par_iter()
            .map(|jobs| {
                let run = |job: &Job| {
                    watch.begins(job);
                    let row = one(job, watch, plant);
                    watch.ends(job);
                    row
                };
                jobs.iter().map(|job| watch.screen(job).unwrap_or_else(|| run(job))).collect()
            })
            .collect();
        if !rows.iter().flatten().all(&mut *take) {
            return;
        }
    }
}

fn one(job: &Job, watch: &dyn Watch, plant: Option<Spoil>) -> Row {
    // What a foreign kernel was fed and said stays in its own process.
    if !watch.keeps() || job.foreign.is_some() {
        return job.run(plant);
    }
    let mut evidence = Evidence::default();
    let row = job.entry.check_keeping(&job.spec, &job.variant, plant, &mut evidence);
    if row.outcome.is_red() {
        watch.keep(job, &row, &evidence);
    }
    row
}

/// Whether a variant runs on a device: the reference is a computation of the CPU.
pub(crate) fn on(variant: &str, device: &str) -> bool {
    let first = variant.split('/').next().unwrap_or("");
    first == device || (device == "cpu" && first == "reference")
}

/// Op, spec and variant of a word that spells a job: `op/spec@variant`, or `op/spec` of any variant.
pub fn spelled(word: &str) -> Option<(&str, &str, Option<&str>)> {
    let (problem, variant) = match word.split_once('@') {
        Some((problem, variant)) => (problem, Some(variant)),
        None => (word, None),
    };
    // `rms_norm/` is part of an id, and spells no problem.
    let (op, spec) = problem.split_once('/').filter(|(_, spec)| !spec.is_empty())?;
    Some((op, spec, variant))
}

/// Jobs that a word spells out: `op/spec` (every variant) or `op/spec@variant`.
fn named(word: &str) -> Result<Vec<Job>, String> {
    let Some((op, spec, variant)) = spelled(word) else { return Ok(Vec::new()) };
    let Some(entry) = registry::op(op) else { return Ok(Vec::new()) };
    // `ops:…` is a case of the recording of that name, which no spec spells.
    if spec.contains(':') {
        return Ok(Vec::new());
    }
    let parsed = entry.parse(spec)?;
    let variants =
        entry.variants().into_iter().filter(|name| variant.is_none_or(|variant| variant == name));
    Ok(variants
        .map(|variant| Job {
            entry,
            variant,
            spec: parsed.canonical.clone(),
            parsed: parsed.clone(),
            foreign: None,
        })
        .collect())
}
