//! `karat support`: which way to compute which op in which type, and how its last check went.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::PathBuf,
};

use benches::{
    plan::Job,
    registry::ops,
    report::{Outcome, Row},
};
use golden::{Set, checkpoint::hash_file};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    exit::Exit,
    files,
    out::{Format, Out},
};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Words that must be in op@variant
    filter: Vec<String>,
}

/// Outcomes of the last checks, case by case: `target/karat/outcomes.json`.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Outcomes {
    /// By id.
    cases: BTreeMap<String, Last>,
}

/// How one case went when it was last checked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Last {
    outcome: String,
    /// blake3 of the program that checked it: what another one found is stale.
    build: String,
}

fn place() -> PathBuf {
    files::cache_dir().join("outcomes.json")
}

/// What tells this build from another: the program itself, byte by byte.
pub(crate) fn build() -> String {
    let hash = std::env::current_exe().and_then(|exe| hash_file(&exe, &exe));
    hash.map_or(String::new(), |hash| hash.blake3[..16].to_owned())
}

impl Outcomes {
    /// Those that were kept; none where there is no file, or none that can be read.
    fn kept() -> Outcomes {
        let text = fs::read_to_string(place()).unwrap_or_default();
        serde_json::from_str(&text).unwrap_or_default()
    }

    /// Adds what a check found to what earlier ones did. That it cannot be kept is nobody's error.
    pub(crate) fn keep(found: Vec<(String, &'static str)>) {
        if found.is_empty() {
            return;
        }
        let mut all = Outcomes::kept();
        let build = build();
        for (id, outcome) in found {
            all.cases.insert(id, Last { outcome: outcome.to_owned(), build: build.clone() });
        }
        if let Ok(text) = serde_json::to_vec(&all) {
            let _ = files::jot(&place(), &text);
        }
    }

    /// A row of a check that is worth keeping: recorded cases are of no set.
    pub(crate) fn of(row: &Row) -> Option<(String, &'static str)> {
        (!row.spec.contains(':')).then(|| (row.id(), row.outcome.name()))
    }
}

/// One op, one way, one type.
#[derive(Debug, Default)]
struct Cell {
    /// Cases there are in all sets.
    cases: usize,
    /// Outcomes of this build, and of others.
    fresh: BTreeMap<String, usize>,
    stale: BTreeMap<String, usize>,
    /// Why nothing of it can run here, if nothing can.
    skip: Option<Outcome>,
}

/// Outcomes, the gravest first. A type in which something passed and something was too large passed:
/// both counts are told.
const GRAVEST: [&str; 9] = [
    "cheat",
    "failed",
    "mistrusted",
    "crashed",
    "timeout",
    "error",
    "passed",
    "unsupported",
    "skipped",
];

impl Cell {
    fn checked(&self) -> usize {
        self.fresh.values().sum()
    }

    /// The gravest outcome of this build, or what is known instead.
    fn state(&self) -> &str {
        let gravest = |of: &BTreeMap<String, usize>| {
            GRAVEST.iter().find(|name| of.contains_key(**name)).copied()
        };
        match (gravest(&self.fresh), &self.skip) {
            (Some(outcome), _) => outcome,
            (None, Some(known)) => known.name(),
            (None, None) if !self.stale.is_empty() => "stale",
            (None, None) => "unchecked",
        }
    }

    /// In a table: the state, and how many cases it rests on.
    fn text(&self) -> String {
        let told = |of: &BTreeMap<String, usize>| {
            let words: Vec<_> = GRAVEST
                .iter()
                .filter_map(|name| Some(format!("{name} {}", of.get(*name)?)))
                .collect();
            words.join(", ")
        };
        match self.state() {
            "stale" => format!("stale: {} of {}", told(&self.stale), self.cases),
            "unchecked" => format!("unchecked ({})", self.cases),
            state if self.fresh.is_empty() => state.to_owned(),
            _ => format!("{} of {}", told(&self.fresh), self.cases),
        }
    }
}

/// A row and column of the matrix.
type Key = (usize, &'static str, String, &'static str);

pub(crate) fn run(args: &Args, out: &Out) -> anyhow::Result<Exit> {
    let kept = Outcomes::kept();
    let build = build();
    let mut cells: BTreeMap<Key, Cell> = BTreeMap::new();
    let mut dtypes = BTreeSet::new();
    for (at, &entry) in ops().iter().enumerate() {
        for variant in entry.variants() {
            let name = format!("{}@{variant}", entry.name());
            if !args.filter.iter().all(|word| name.contains(word.as_str())) {
                continue;
            }
            for spec in entry.specs(Set::Nightly) {
                let Ok(parsed) = entry.parse(&spec) else { continue };
                dtypes.insert((order(parsed.dtype), parsed.dtype));
                let job = Job { entry, variant: variant.clone(), spec, parsed, foreign: None };
                let key = (at, entry.name(), variant.clone(), job.parsed.dtype);
                let cell = cells.entry(key).or_insert_with(|| Cell {
                    skip: entry.not_run(&job.spec, &variant),
                    ..Cell::default()
                });
                cell.cases += 1;
                // What runs one case of a type is not skipped for the type, and what this machine lacks
                // says more than that a case is none of the variant's.
                cell.skip = match (cell.skip.take(), entry.not_run(&job.spec, &variant)) {
                    (None, _) | (_, None) => None,
                    (Some(skipped @ Outcome::Skipped(_)), _) | (_, Some(skipped)) => Some(skipped),
                };
                if let Some(last) = kept.cases.get(&job.id()) {
                    let of = if last.build == build { &mut cell.fresh } else { &mut cell.stale };
                    *of.entry(last.outcome.clone()).or_default() += 1;
                }
            }
        }
    }
    if cells.is_empty() {
        return Err(crate::exit::fail(
            Exit::Nothing,
            "nothing selected; `karat list` names everything",
        ));
    }
    tell(&cells, &dtypes.into_iter().map(|(_, name)| name).collect::<Vec<_>>(), out);
    Ok(Exit::Ok)
}

/// Wide types first.
fn order(dtype: &str) -> usize {
    ["f32", "f16", "bf16"].iter().position(|name| *name == dtype).unwrap_or(usize::MAX)
}

fn tell(cells: &BTreeMap<Key, Cell>, dtypes: &[&'static str], out: &Out) {
    for ((_, op, variant, dtype), cell) in cells {
        out.json(&json!({
            "schema": "karat.result/1", "kind": "support", "op": op, "variant": variant, "dtype": dtype,
            "state": cell.state(), "cases": cell.cases, "checked": cell.checked(),
            "outcomes": cell.fresh, "stale": cell.stale, "why": cell.skip.as_ref().and_then(Outcome::why),
        }));
    }
    let mut rows: Vec<Vec<String>> = Vec::new();
    let mut last = None;
    for (at, op, variant, _) in cells.keys() {
        if last == Some((at, variant)) {
            continue;
        }
        last = Some((at, variant));
        let mut row = vec![(*op).to_owned(), variant.clone()];
        row.extend(dtypes.iter().map(|&dtype| {
            cells.get(&(*at, *op, variant.clone(), dtype)).map_or("-".to_owned(), Cell::text)
        }));
        rows.push(row);
    }
    let head: Vec<&str> = ["op", "variant"].into_iter().chain(dtypes.iter().copied()).collect();
    if out.format == Format::Md {
        out.markdown(&head, &rows);
    } else {
        out.table(&head, &rows);
        out.line("n of m: m cases in all sets, n of them checked by this build; stale: by another build; -: no case of this type");
    }
}
