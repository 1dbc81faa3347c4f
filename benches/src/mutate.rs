//! Trust in the checks themselves: faults that are planted must be found, honest kernels must not be.

use std::collections::BTreeMap;

use golden::{Plan, Plant, Set};
use rayon::prelude::*;

use crate::{
    felt::Declared,
    registry::{Entry, Spoil, ops},
    report::{Outcome, Row},
};

/// A fault in a variant.
#[derive(Clone, Copy)]
pub struct Mutant {
    /// The op.
    pub entry: &'static dyn Entry,
    /// Which of its variants.
    pub variant: usize,
    /// The fault.
    pub plant: Plant,
}

impl Mutant {
    /// `device/algorithm`.
    pub fn variant(&self) -> String {
        self.entry.variants()[self.variant].clone()
    }

    /// `op@device/algorithm+fault`.
    pub fn id(&self) -> String {
        format!("{}@{}+{}", self.entry.name(), self.variant(), self.plant.name)
    }

    /// Whether this machine can run the variant on any problem: it is hunted where it runs.
    pub fn runs(&self) -> bool {
        let variant = self.variant();
        let runs = |spec: &String| self.entry.not_run(spec, &variant).is_none();
        self.entry.specs(Set::Ci).iter().any(runs)
    }

    /// The first problem of a set whose check sees the fault, cheapest first.
    pub fn hunt(&self, set: Set) -> Option<Row> {
        let variant = self.variant();
        let specs = self.entry.specs(set);
        let rows =
            specs.iter().map(|spec| self.entry.check_planted(spec, &variant, self.plant.name));
        rows.into_iter()
            .find(|row| !matches!(row.outcome, Outcome::Passed(_) | Outcome::Skipped(_)))
    }
}

/// Every fault of every variant of the ops whose name holds all the words.
pub fn mutants(words: &[String]) -> Vec<Mutant> {
    let mut all = Vec::new();
    for &entry in ops() {
        for (i, variant) in entry.variants().iter().enumerate() {
            let plants = entry.plants(variant).iter();
            all.extend(plants.map(|&plant| Mutant { entry, variant: i, plant }));
        }
    }
    all.retain(|mutant| words.iter().all(|word| mutant.id().contains(word.as_str())));
    all
}

/// Hunts mutants, several at a time, and hands each over with the problem that killed it, in order;
/// ends when `take` returns false.
pub fn hunt(mutants: &[Mutant], set: Set, take: &mut dyn FnMut(&Mutant, Option<&Row>) -> bool) {
    for window in mutants.chunks(4 * rayon::current_num_threads()) {
        let killed: Vec<Option<Row>> = window.par_iter().map(|mutant| mutant.hunt(set)).collect();
        if !window.iter().zip(&killed).all(|(mutant, row)| take(mutant, row.as_ref())) {
            return;
        }
    }
}

/// What sabotage and feeling came to for one op.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Guarded {
    /// Spoiled copies that were judged.
    pub spoiled: usize,
    /// Those that were let through: spec, output, way.
    pub missed: Vec<String>,
    /// Ways that never applied.
    pub idle: Vec<&'static str>,
    /// What an op says wrongly of its inputs and outputs: pairs that depend on each other and that some
    /// case does not feel, declarations that no case bears out, inputs that no case feels at all.
    pub unfelt: Vec<String>,
}

impl Guarded {
    /// Nothing let through, nothing idle, nothing unfelt.
    pub fn ok(&self) -> bool {
        self.missed.is_empty() && self.idle.is_empty() && self.unfelt.is_empty()
    }
}

/// Spoils the right answer to every problem of a set in every way, and draws every input anew.
///
/// # Errors
/// If a set holds what is no problem of its op.
pub fn guard(entry: &dyn Entry, set: Set) -> Result<Guarded, String> {
    let mut found = Guarded { unfelt: unfelt(entry, set)?, ..Guarded::default() };
    let mut applied: BTreeMap<&'static str, bool> =
        Spoil::answers().map(|(name, _)| (name, false)).collect();
    let specs = entry.specs(set);
    let parts: Vec<_> = specs
        .par_iter()
        .map(|spec| Ok((spec, entry.sabotage(spec, &stored(entry, spec)?)?)))
        .collect::<Result<_, String>>()?;
    for (spec, spoiled) in parts {
        for one in spoiled {
            if let Some(caught) = one.caught {
                found.spoiled += 1;
                applied.insert(one.name, true);
                if !caught {
                    found.missed.push(format!(
                        "{}/{spec}: {} of {}",
                        entry.name(),
                        one.name,
                        one.output
                    ));
                }
            }
        }
    }
    found.idle =
        applied.into_iter().filter(|(_, applied)| !applied).map(|(name, _)| name).collect();
    Ok(found)
}

/// The plan of a problem's own storage type, all else in f32.
fn stored(entry: &dyn Entry, spec: &str) -> Result<Plan, String> {
    Ok(Plan::stored(entry.parse(spec)?.dtype.parse()?))
}

/// Draws every input of every problem of a set anew, and holds what moves against what the op
/// declares.
///
/// # Errors
/// If a set holds what is no problem of its op.
pub fn unfelt(entry: &dyn Entry, set: Set) -> Result<Vec<String>, String> {
    let specs = entry.specs(set);
    let parts: Vec<_> = specs
        .par_iter()
        .map(|spec| Ok((spec, entry.felt(spec, &stored(entry, spec)?)?)))
        .collect::<Result<_, String>>()?;
    let mut found = Vec::new();
    let mut felt: BTreeMap<&'static str, bool> = BTreeMap::new();
    for (spec, moved) in parts {
        for one in moved {
            *felt.entry(one.input).or_default() |= one.felt();
            let pair = format!("{}/{spec}: {} in {}", entry.name(), one.input, one.output);
            match one.declared {
                Declared::Dependent if !one.felt() => {
                    found.push(format!("{pair}: moved by {:.1e} of its bound", one.moved));
                }
                Declared::Apart if one.moved != 0.0 => {
                    found.push(format!("{pair}: declared apart, and it moves"));
                }
                Declared::Unfelt if one.felt() => {
                    found.push(format!("{pair}: declared unfelt, and it moves beyond its bound"));
                }
                _ => {}
            }
        }
    }
    let nowhere = felt.into_iter().filter(|(_, felt)| !felt);
    found.extend(nowhere.map(|(name, _)| format!("{}: {name}: felt in no case", entry.name())));
    Ok(found)
}

/// Problems of at most so many elements are drawn anew for false alarms.
const SMALL: u64 = 1 << 14;

/// An honest way to compute an op, to be drawn anew many times.
#[derive(Clone)]
pub struct Honest {
    /// The op.
    pub entry: &'static dyn Entry,
    /// `device/algorithm`.
    pub variant: String,
    /// Small problems, one per seed in turn.
    specs: Vec<String>,
}

/// Every op and honest variant with its small problems, f32 and narrower storage among them.
pub fn honest(words: &[String], holds: &dyn Fn(usize) -> bool) -> Vec<Honest> {
    let mut all = Vec::new();
    let mut place = 0;
    for &entry in ops() {
        let small = |spec: &String| {
            entry.parse(spec).is_ok_and(|parsed| {
                // Four bytes an element is the most that an input or an output takes.
                parsed.cost.bytes <= 4 * SMALL && parsed.cost.flops <= 1 << 22
            })
        };
        let specs: Vec<String> = entry.specs(Set::Ci).into_iter().filter(small).collect();
        for variant in entry.variants() {
            let id = format!("{}@{variant}", entry.name());
            if variant.starts_with("reference/f64-") || !words.iter().all(|word| id.contains(word))
            {
                continue;
            }
            place += 1;
            let runs = |spec: &&String| entry.not_run(spec, &variant).is_none();
            let specs: Vec<String> = specs.iter().filter(runs).cloned().collect();
            if holds(place - 1) && !specs.is_empty() {
                all.push(Honest { entry, variant, specs });
            }
        }
    }
    all
}

impl Honest {
    /// Its problem for a seed.
    fn spec(&self, seed: u64) -> String {
        let spec = &self.specs[seed as usize % self.specs.len()];
        let plain = spec.split(";seed=").next().unwrap_or(spec);
        // Far from the seeds of the sets.
        format!("{plain};seed={}", 1_000_000 + seed)
    }
}

/// Draws seeds `from..to` of every honest variant, hands over what did not pass, and how many were
/// drawn.
pub fn false_alarms(all: &[Honest], seeds: std::ops::Range<u64>) -> (usize, Vec<Row>) {
    let draws: Vec<(&Honest, u64)> =
        seeds.flat_map(|seed| all.iter().map(move |honest| (honest, seed))).collect();
    let rows: Vec<Row> = draws
        .par_iter()
        .map(|(honest, seed)| honest.entry.check(&honest.spec(*seed), &honest.variant, None))
        .filter(|row| !matches!(row.outcome, Outcome::Passed(_)))
        .collect();
    crate::bound::forget();
    (draws.len(), rows)
}
