//! Paths: one text, fed in different ways, must have one answer.
//!
//! A path is a way to feed tokens: at once, in pieces, one by one, resumed from a snapshot, after drafts
//! that were taken back, packed with neighbours, left-padded. Its answer is compared with that of the
//! plain path (each sequence alone, at once). The rule:
//!
//! - equal bits pass;
//! - what differs is held to the bound of its precision plan around the oracle, from runs of the
//!   reference in stochastic arithmetic along the same path ([`crate::spread`]);
//! - what differs inside that bound, though its [`golden::Claims`] promise equal bits, is a cheat.
//!
//! The reference promises equal bits on every path: its ops treat rows one by one, sum in one order and
//! see of the past what the states hold. Its chunked form promises them where a sequence is cut at
//! whole chunks.
//!
//! Beside the paths stand relations that need no oracle: a gate of one is the delta rule without gate,
//! heads may stand in any order, and an edit leaves what was before it alone.

mod faults;
pub(crate) mod garbage;
mod list;
mod model;
pub(crate) mod ops;
pub(crate) mod plain;
#[cfg(test)]
mod tests;
pub(crate) mod walk;

use std::{fmt, sync::Arc};

use golden::{Config, Cost, Error, Set, Weights};
use rayon::prelude::*;

pub use self::faults::FAULTS;
pub use crate::same::{Difference, Row};
use crate::{
    Kept, Number, Unfit,
    filter::{Filter, Subject},
    foreign::{self, Kernel},
    formats::Watch,
    registry::{Entry, Parsed, ops},
    same,
    way::Who,
};

/// One way to feed tokens, or one relation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Path {
    /// In these pieces.
    Split(Vec<usize>),
    /// In pieces of so many tokens.
    Every(usize),
    /// Packed sequences of an op, each on its own.
    Alone,
    /// Everything of every second sequence is NaN: the even ones are kept, or the odd ones.
    Poisoned(Parity),
    /// This token is another: what comes before it stays.
    Edit(usize),
    /// Heads in another order.
    Heads,
    /// Every gate one: the delta rule without gate.
    GateOne,
    /// Up to this token; a snapshot; garbage in every slot; back to the snapshot; the rest.
    Resume(usize),
    /// Up to a token, then drafts of which some are taken back, then the rest token by token and at once.
    Rollback(Draft),
    /// Two texts that accept different numbers of drafts in one step.
    Together(Draft),
    /// A prompt of `1 + drafted` tokens, fed as a step that could be taken back, and then a step of as
    /// many drafts.
    Prompt(Draft),
    /// Packed with neighbours of other lengths, in this order.
    Packed(Order),
    /// Texts of different lengths behind so many columns of padding, cut along the columns at this one.
    LeftPadded(usize),
    /// In a slot that held garbage before.
    Fresh(Before),
    /// Token by token and nothing looked at, as a text is continued: so many texts side by side. What an engine
    /// chooses by itself is what its logits say.
    Decode(usize),
    /// The draft head, in pieces of so many tokens, a draft taken back after each.
    Mtp(usize),
}

/// Which sequences are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parity {
    /// The first, third, …
    Even,
    /// The second, fourth, …
    Odd,
}

impl Parity {
    /// Whether a sequence is one of these.
    pub(crate) fn has(self, i: usize) -> bool {
        i.is_multiple_of(2) == (self == Parity::Even)
    }
}

/// In which order sequences are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// The shortest first.
    Rising,
    /// The shortest last.
    Falling,
}

/// What a slot held before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Before {
    /// A longer text of garbage, until the engine was reset.
    Reset,
    /// A snapshot of garbage, released.
    Released,
}

/// A speculative step after `at` tokens: the next token and `drafted` drafts, of which the first
/// `accepted` are right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draft {
    /// Tokens before it.
    pub at: usize,
    /// `k`.
    pub drafted: usize,
    /// `n`; `None` takes the next token back too.
    pub accepted: Option<usize>,
    /// What the wrong drafts are.
    pub wrong: Wrong,
}

/// What a wrong draft is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// Another token.
    Token,
    /// One whose embedding is NaN.
    Nan,
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind())?;
        match self {
            Path::Split(pieces) => {
                let pieces: Vec<_> = pieces.iter().map(ToString::to_string).collect();
                write!(f, "={}", pieces.join(","))
            }
            Path::Every(n)
            | Path::Edit(n)
            | Path::Resume(n)
            | Path::LeftPadded(n)
            | Path::Decode(n)
            | Path::Mtp(n) => write!(f, "={n}"),
            Path::Poisoned(Parity::Even) => f.write_str("=odd"),
            Path::Poisoned(Parity::Odd) => f.write_str("=even"),
            Path::Rollback(draft) | Path::Together(draft) | Path::Prompt(draft) => {
                let Draft { at, drafted, accepted, wrong } = draft;
                write!(f, "=at{at},k{drafted},")?;
                match accepted {
                    Some(n) => write!(f, "n{n}")?,
                    None => f.write_str("none")?,
                }
                if *wrong == Wrong::Nan { f.write_str(",nan") } else { Ok(()) }
            }
            Path::Packed(Order::Rising) => f.write_str("=rising"),
            Path::Packed(Order::Falling) => f.write_str("=falling"),
            Path::Fresh(Before::Reset) => f.write_str("=reset"),
            Path::Fresh(Before::Released) => f.write_str("=released"),
            Path::Alone | Path::Heads | Path::GateOne => Ok(()),
        }
    }
}

impl Path {
    /// What kind it is, in a word.
    pub fn kind(&self) -> &'static str {
        match self {
            Path::Split(_) => "split",
            Path::Every(_) => "every",
            Path::Alone => "alone",
            Path::Poisoned(_) => "poisoned",
            Path::Edit(_) => "edit",
            Path::Heads => "heads",
            Path::GateOne => "gate-one",
            Path::Resume(_) => "resume",
            Path::Rollback(_) => "rollback",
            Path::Together(_) => "together",
            Path::Prompt(_) => "prompt",
            Path::Packed(_) => "packed",
            Path::LeftPadded(_) => "left-pad",
            Path::Fresh(_) => "fresh",
            Path::Decode(_) => "decode",
            Path::Mtp(_) => "mtp",
        }
    }
}

/// What to feed, to whom.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which paths there are.
    pub set: Set,
    /// Longest sequence of an op.
    pub max_length: usize,
    /// Tokens of the text that a model is fed.
    pub tokens: usize,
    /// Models: a folder or `synthetic:…`.
    pub models: Vec<String>,
    /// Engine that is fed.
    pub engine: String,
    /// Its number type.
    pub number: String,
    /// What it keeps keys and values in, if that is said.
    pub kept: Option<Kept>,
    /// Only what runs on this device.
    pub device: Option<String>,
    /// A fault to plant: in the wiring of the reference, in the keeping of states around any engine
    /// ([`FAULTS`]), or in a variant.
    pub plant: Option<String>,
    /// Foreign kernels: where there are some, they alone are fed.
    pub kernels: Vec<Arc<Kernel>>,
}

impl Options {
    fn number(&self) -> Number<'_> {
        Number { name: &self.number, kept: self.kept }
    }
}

/// All paths of one problem by one way to compute it.
pub struct Problem {
    what: What,
    subject: String,
    by: String,
    paths: Vec<Path>,
}

enum What {
    Op { entry: &'static dyn Entry, spec: String, who: Who },
    Model { weights: Arc<dyn Weights>, tokens: usize },
}

impl Problem {
    /// How many paths it has.
    pub fn len(&self) -> usize {
        self.paths.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.paths.is_empty()
    }

    /// `subject/path@by` of every path.
    pub fn ids(&self) -> impl Iterator<Item = String> {
        self.paths.iter().map(|path| same::id(&self.subject, &path.to_string(), &self.by))
    }

    /// Keeps the paths whose subject, as a filter sees it, is meant.
    fn select(&mut self, filter: &Filter, op: &str, parsed: &Parsed) {
        let (subject, by) = (&self.subject, &self.by);
        self.paths.retain(|path| {
            let id = same::id(subject, &path.to_string(), by);
            filter.selects(&Subject { op, variant: by, id: &id, parsed })
        });
    }
}

/// Every problem that the filter leaves a path of.
///
/// # Errors
/// If a model cannot be opened, or nothing has the fault to plant.
pub fn plan(options: &Options, filter: &Filter) -> Result<Vec<Problem>, Error> {
    if !options.kernels.is_empty() {
        let specs = |entry: &dyn Entry| {
            list::specs(entry.name(), options).into_iter().map(|case| case.spec).collect()
        };
        let taken = foreign::problems(&options.kernels, options.device.as_deref(), &specs)?;
        let of = |(entry, parsed, kernel): (_, Parsed, _)| {
            of_op(entry, &parsed, Who::Foreign(kernel), options.set, filter)
        };
        return Ok(taken.into_iter().map(of).filter(|problem| !problem.is_empty()).collect());
    }
    let plant = options.plant.as_deref();
    let wiring = plant.is_none_or(is_fault);
    let mut problems = Vec::new();
    if wiring {
        for name in &options.models {
            problems.push(of_model(name, options, filter)?);
        }
    }
    let mut planted = wiring;
    for &entry in ops() {
        for list::Case { spec, only_variants } in list::specs(entry.name(), options) {
            let parsed = entry.parse(&spec)?;
            for by in entry.variants() {
                let reference = by.starts_with("reference/");
                if by.starts_with("reference/f64") || (reference && only_variants) {
                    continue;
                }
                if plant
                    .is_some_and(|name| !entry.plants(&by).iter().any(|plant| plant.name == name))
                {
                    continue;
                }
                planted = true;
                let who = Who::Named { variant: by, plant: options.plant.clone() };
                problems.push(of_op(entry, &parsed, who, options.set, filter));
            }
        }
    }
    if !planted {
        return Err(unknown_fault(plant.unwrap_or("")));
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
    set: Set,
    filter: &Filter,
) -> Problem {
    let spec = parsed.canonical.clone();
    let mut problem = Problem {
        subject: format!("{}/{spec}", entry.name()),
        by: who.to_string(),
        paths: list::of_op(entry.name(), parsed, set),
        what: What::Op { entry, spec, who },
    };
    problem.select(filter, entry.name(), parsed);
    problem
}

fn of_model(name: &str, options: &Options, filter: &Filter) -> Result<Problem, Error> {
    let weights = opened(name, &options.engine, options.number())?;
    let config = weights.config();
    // Rollback goes on for a few tokens after the last draft.
    let tokens = options.tokens.min(config.context_limit().saturating_sub(8));
    if tokens < 8 {
        return Err(format!("{name}: {tokens} tokens are too few to cut").into());
    }
    let mtp = weights.meta(golden::names::MTP_FC).is_some();
    let by = engine_name(&options.engine, &options.number);
    let parsed = model_parsed(name, config, tokens);
    let mut problem = Problem {
        what: What::Model { weights: weights.clone(), tokens },
        subject: format!("model/{name}"),
        by,
        paths: list::of_model(tokens, config, mtp, options.set),
    };
    problem.select(filter, "model", &parsed);
    Ok(problem)
}

/// A model, for an engine that there is.
pub(crate) fn opened(
    name: &str,
    engine: &str,
    number: Number<'_>,
) -> Result<Arc<dyn Weights>, Error> {
    let weights = golden::open(name)?;
    match crate::engine(engine, number, weights.clone(), None) {
        // What this machine lacks is told of each way to ask.
        Err(error) if !error.is::<Unfit>() => Err(error),
        _ => Ok(weights),
    }
}

/// Whether a fault of that name can be planted in or around a model.
pub(crate) fn is_fault(name: &str) -> bool {
    crate::is_plant(name) || faults::known(name)
}

/// Nothing has that fault.
pub(crate) fn unknown_fault(name: &str) -> Error {
    let wiring = crate::plants().map(|(name, _)| name);
    let known: Vec<_> = wiring.chain(FAULTS.iter().map(|fault| fault.name)).collect();
    let known = known.join(", ");
    format!("plant {name:?}: expected a fault of a variant, or one of {known}").into()
}

/// An engine as rows name it.
pub(crate) fn engine_name(engine: &str, number: &str) -> String {
    if engine == "reference" { format!("reference/{number}") } else { engine.to_owned() }
}

/// What a filter sees of a model.
pub(crate) fn model_parsed(name: &str, config: &Config, tokens: usize) -> Parsed {
    Parsed {
        sizes: vec![("T", tokens)],
        dtype: config.dtype.name(),
        fill: golden::DOMAIN.to_owned(),
        seed: 0,
        canonical: name.to_owned(),
        cost: Cost { bytes: 0, flops: 0 },
    }
}

/// Runs every path of the problems and hands the rows over in order; ends when `take` returns false,
/// and as soon as `watch` does, which is asked at every layer of a model and of the walks that judge it: what is under
/// way then has an error.
pub fn run(
    problems: &[Problem],
    options: &Options,
    watch: &Watch,
    take: &mut dyn FnMut(&Row) -> bool,
) {
    let plant = options.plant.as_deref();
    let (models, ops): (Vec<_>, Vec<_>) =
        problems.iter().partition(|problem| matches!(problem.what, What::Model { .. }));
    for problem in models {
        if let What::Model { weights, tokens } = &problem.what {
            let subject = plain::Subject {
                name: &problem.subject,
                by: &problem.by,
                engine: &options.engine,
                number: options.number(),
                plant,
                tokens: *tokens,
                watch,
            };
            if !model::run(&subject, weights.clone(), &problem.paths, take) {
                return;
            }
        }
    }
    for window in ops.chunks(rayon::current_num_threads()) {
        let rows: Vec<Vec<Row>> = window
            .par_iter()
            .map(|problem| match &problem.what {
                What::Op { entry, spec, who } => entry.paths(spec, who, &problem.paths),
                What::Model { .. } => Vec::new(),
            })
            .collect();
        if !rows.iter().flatten().all(&mut *take) {
            return;
        }
    }
}

/// Lengths of sequences that together have `total` tokens, among them those at which packing goes
/// wrong.
pub(crate) fn lengths(count: usize, total: usize) -> Vec<usize> {
    let mut left = total;
    let mut lengths = Vec::with_capacity(count);
    for i in 1..count {
        // Every later sequence gets a token at least.
        let length = [1, 2, 3, 4, 63, 64, 65][(i - 1) % 7].min(left - (count - i));
        lengths.push(length);
        left -= length;
    }
    lengths.push(left);
    lengths
}
