//! Invariance: the same question, asked again, on other threads, in another batch or at another place
//! in it, must have the same answer.
//!
//! What is promised ([`golden::Claims`]) is equal to the bit, and the first element that is not breaks
//! the promise: a cheat. What is not promised is measured, and held to the bound of its plan.

mod model;
pub(crate) mod ops;
#[cfg(test)]
mod tests;

use std::{
    fmt,
    sync::{Arc, OnceLock},
    time::Duration,
};

use golden::{Error, Set};
use rayon::{ThreadPool, ThreadPoolBuilder, prelude::*};

use crate::{
    Kept, Number,
    filter::{Filter, Subject},
    foreign::{self, Kernel},
    formats::Watch,
    paths::{self, Row},
    registry::{Entry, Parsed, ops},
    same,
    way::Who,
};

/// What is done otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Asked again, up to so many times.
    Runs(usize),
    /// Computed by so many threads.
    Threads(usize),
    /// In a batch of so many, at this place.
    Batch {
        /// How many are in the batch.
        of: usize,
        /// Which one of them it is.
        place: usize,
    },
    /// The sequences of a ragged batch turned by so many places.
    Turned(usize),
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // Not how many: a run cut short by the time it took has the same name.
            Change::Runs(_) => f.write_str("runs"),
            Change::Threads(n) => write!(f, "threads={n}"),
            Change::Batch { of, place } => write!(f, "batch={of},place={place}"),
            Change::Turned(by) => write!(f, "turned={by}"),
        }
    }
}

impl Change {
    /// What kind it is, in a word.
    pub fn kind(self) -> &'static str {
        match self {
            Change::Runs(_) => "runs",
            Change::Threads(_) => "threads",
            Change::Batch { .. } => "batch",
            Change::Turned(_) => "turned",
        }
    }

    /// Which promise makes the answer equal to the bit, if one does.
    pub(crate) fn claim(self, claims: golden::Claims) -> Option<&'static str> {
        match self {
            Change::Runs(_) | Change::Threads(_) => {
                claims.deterministic.then_some("equal bits of two runs")
            }
            Change::Batch { .. } | Change::Turned(_) => {
                claims.batch_invariant.then_some("batch invariance")
            }
        }
    }
}

/// Numbers of threads that are tried.
const THREADS: [usize; 4] = [1, 2, 3, 8];

/// A pool of so many threads.
///
/// # Errors
/// If the machine gives no more threads.
pub(crate) fn pool(threads: usize) -> Result<&'static ThreadPool, Error> {
    static POOLS: OnceLock<Vec<Option<ThreadPool>>> = OnceLock::new();
    let pools = POOLS.get_or_init(|| {
        THREADS.map(|n| ThreadPoolBuilder::new().num_threads(n).build().ok()).into()
    });
    let at = THREADS.iter().position(|&n| n == threads).ok_or("no pool of that size")?;
    pools[at].as_ref().ok_or_else(|| format!("no {threads} threads").into())
}

/// Does something in a pool of so many threads. Behind a pointer, so that a pool's machinery is not
/// compiled for every op.
pub(crate) fn within(threads: usize, work: &mut (dyn FnMut() + Send)) -> Result<(), Error> {
    pool(threads)?.install(work);
    Ok(())
}

/// Sizes of batches and places in them: the first, one in the middle, the last.
const BATCHES: [(usize, &[usize]); 3] = [(3, &[0, 1, 2]), (8, &[0, 3, 7]), (65, &[0, 32, 64])];

/// What to ask, and whom.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which problems there are.
    pub set: Set,
    /// Most runs of one problem.
    pub runs: usize,
    /// Most time that the runs of one problem may take.
    pub budget: Duration,
    /// Models: a folder or `synthetic:…`.
    pub models: Vec<String>,
    /// Engine that is asked.
    pub engine: String,
    /// Its number type.
    pub number: String,
    /// What it keeps keys and values in, if that is said.
    pub kept: Option<Kept>,
    /// Only what runs on this device.
    pub device: Option<String>,
    /// A fault to plant, as in [`paths::Options`].
    pub plant: Option<String>,
    /// Foreign kernels: where there are some, they alone are asked.
    pub kernels: Vec<Arc<Kernel>>,
}

impl Options {
    fn number(&self) -> Number<'_> {
        Number { name: &self.number, kept: self.kept }
    }
}

/// All changes of one problem by one way to compute it.
pub struct Problem {
    what: What,
    subject: String,
    by: String,
    changes: Vec<Change>,
}

enum What {
    Op { entry: &'static dyn Entry, spec: String, who: Who },
    Model { weights: std::sync::Arc<dyn golden::Weights>, tokens: usize },
}

impl Problem {
    /// How many changes it has.
    pub fn len(&self) -> usize {
        self.changes.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    fn select(&mut self, filter: &Filter, op: &str, parsed: &Parsed) {
        let (subject, by) = (&self.subject, &self.by);
        self.changes.retain(|change| {
            let id = same::id(subject, &change.to_string(), by);
            filter.selects(&Subject { op, variant: by, id: &id, parsed })
        });
    }
}

/// Every problem that the filter leaves a change of.
///
/// # Errors
/// If a model cannot be opened, or nothing has the fault to plant.
pub fn plan(options: &Options, filter: &Filter) -> Result<Vec<Problem>, Error> {
    if !options.kernels.is_empty() {
        let specs = |entry: &dyn Entry| entry.specs(options.set);
        let taken = foreign::problems(&options.kernels, options.device.as_deref(), &specs)?;
        let of = |(entry, parsed, kernel): (_, Parsed, Arc<Kernel>)| {
            // A device has no threads to be told the number of.
            let cpu = kernel.manifest.device() == "cpu";
            let mut problem = of_op(entry, &parsed, Who::Foreign(kernel), options.runs, filter);
            problem.changes.retain(|change| cpu || !matches!(change, Change::Threads(_)));
            problem
        };
        return Ok(taken.into_iter().map(of).filter(|problem| !problem.is_empty()).collect());
    }
    let plant = options.plant.as_deref();
    let mut problems = Vec::new();
    let wiring = plant.is_none_or(paths::is_fault);
    if wiring {
        for name in &options.models {
            problems.extend(of_model(name, options, filter)?);
        }
    }
    let mut planted = wiring;
    for &entry in ops() {
        for spec in entry.specs(options.set) {
            let parsed = entry.parse(&spec)?;
            for by in entry.variants() {
                if by.starts_with("reference/f64")
                    || plant.is_some_and(|name| {
                        !entry.plants(&by).iter().any(|plant| plant.name == name)
                    })
                {
                    continue;
                }
                planted = true;
                let who = Who::Named { variant: by, plant: options.plant.clone() };
                problems.push(of_op(entry, &parsed, who, options.runs, filter));
            }
        }
    }
    if !planted {
        return Err(paths::unknown_fault(plant.unwrap_or("")));
    }
    let device = options.device.as_deref();
    problems.retain(|problem| {
        !problem.is_empty() && device.is_none_or(|device| crate::plan::on(&problem.by, device))
    });
    Ok(problems)
}

fn of_op(
    entry: &'static dyn Entry,
    parsed: &Parsed,
    who: Who,
    runs: usize,
    filter: &Filter,
) -> Problem {
    let mut problem = Problem {
        subject: format!("{}/{}", entry.name(), parsed.canonical),
        by: who.to_string(),
        changes: changes(runs, parsed, entry.has_sequences()),
        what: What::Op { entry, spec: parsed.canonical.clone(), who },
    };
    problem.select(filter, entry.name(), parsed);
    problem
}

/// What is done otherwise with a problem of an op: in a batch sequences change places, alone it is put
/// among others of its lengths.
fn changes(runs: usize, parsed: &Parsed, sequences: bool) -> Vec<Change> {
    let size = |wanted: &str| {
        parsed.sizes.iter().find(|(letter, _)| *letter == wanted).map_or(0, |&(_, size)| size)
    };
    let mut changes = vec![Change::Runs(runs)];
    changes.extend(THREADS.map(Change::Threads));
    if sequences && 1 < size("B") {
        changes.extend((1..size("B").min(4)).map(Change::Turned));
    }
    let ragged = parsed.fill == "packed";
    if !ragged && (0 < size("B") || 0 < size("N")) {
        changes.extend(in_batches());
    }
    changes
}

fn in_batches() -> impl Iterator<Item = Change> {
    let places = |(of, places): (usize, &'static [usize])| {
        places.iter().map(move |&place| Change::Batch { of, place })
    };
    BATCHES.into_iter().flat_map(places)
}

fn of_model(name: &str, options: &Options, filter: &Filter) -> Result<Vec<Problem>, Error> {
    let weights = paths::opened(name, &options.engine, options.number())?;
    let by = paths::engine_name(&options.engine, &options.number);
    let mut problems = Vec::new();
    // A small one that can be asked a thousand times, and one that is longer than a chunk.
    for tokens in [5, 70] {
        let parsed = paths::model_parsed(name, weights.config(), tokens);
        let mut changes = vec![Change::Runs(options.runs)];
        changes.extend(THREADS.map(Change::Threads));
        changes.extend(in_batches().filter(|change| {
            // Of the longer text a few at a time.
            tokens < 64 || !matches!(change, Change::Batch { of: 65, .. })
        }));
        changes.extend((1..4).map(Change::Turned));
        let mut problem = Problem {
            what: What::Model { weights: weights.clone(), tokens },
            subject: format!("model/{name}/T{tokens}"),
            by: by.clone(),
            changes,
        };
        problem.select(filter, "model", &parsed);
        problems.push(problem);
    }
    Ok(problems)
}

/// Runs every change of the problems and hands the rows over in order; ends when `take` returns false,
/// and as soon as `watch` does, which is asked at every layer of a model and of the walks that judge it: what is under
/// way then has an error.
pub fn run(
    problems: &[Problem],
    options: &Options,
    watch: &Watch,
    take: &mut dyn FnMut(&Row) -> bool,
) {
    let plant = options.plant.as_deref();
    for window in problems.chunks(rayon::current_num_threads()) {
        let rows: Vec<Vec<Row>> = window
            .par_iter()
            .map(|problem| match &problem.what {
                What::Op { entry, spec, who } => {
                    entry.invariance(spec, who, &problem.changes, options.budget)
                }
                What::Model { weights, tokens } => {
                    let subject = paths::plain::Subject {
                        name: &problem.subject,
                        by: &problem.by,
                        engine: &options.engine,
                        number: options.number(),
                        plant,
                        tokens: *tokens,
                        watch,
                    };
                    model::run(&subject, weights.clone(), &problem.changes, options.budget)
                }
            })
            .collect();
        if !rows.iter().flatten().all(&mut *take) {
            return;
        }
    }
}
