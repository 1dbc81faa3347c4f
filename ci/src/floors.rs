//! What cases are off by themselves on a machine: `target/karat/floors.json`.
//!
//! Kept are the launches themselves, in which a build ran beside itself: what several of them are off
//! together follows.

use std::{collections::BTreeMap, fs, path::PathBuf};

use benches::pairs::verdict;
use serde::{Deserialize, Serialize};

use crate::{
    exit::{Exit, fail, refuse},
    files,
    machine::Machine,
};

/// The words of the file.
const SCHEMA: &str = "karat.floors/1";

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Floors {
    schema: String,
    /// By fingerprint.
    machines: BTreeMap<String, OfMachine>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct OfMachine {
    name: String,
    /// By id.
    cases: BTreeMap<String, OfCase>,
}

/// What one case showed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct OfCase {
    /// Quads that were asked of each launch.
    pub(crate) quads: usize,
    /// Seconds since 1970.
    pub(crate) time: u64,
    /// Logarithms of ratios, launch by launch.
    pub(crate) launches: Vec<Vec<f64>>,
}

impl OfCase {
    /// Of launches.
    pub(crate) fn new(quads: usize, launches: &[Vec<f64>]) -> OfCase {
        let short = |log: &f64| (log * 1e6).round() / 1e6;
        let launches = launches.iter().map(|logs| logs.iter().map(short).collect()).collect();
        OfCase { quads, time: benches::clock::now(), launches }
    }

    /// What so many launches together are off.
    pub(crate) fn together(&self, launches: usize) -> f64 {
        if self.launches.iter().all(Vec::is_empty) {
            return f64::NAN;
        }
        verdict::floor(&self.launches, launches, 0)
    }
}

fn place() -> PathBuf {
    files::cache_dir().join("floors.json")
}

impl Floors {
    /// Those that were kept; none where there is no file.
    ///
    /// # Errors
    /// If the file is damaged: it holds hours of measuring, and is not thrown away.
    pub(crate) fn kept() -> anyhow::Result<Floors> {
        let (path, none) =
            (place(), Floors { schema: SCHEMA.to_owned(), machines: BTreeMap::new() });
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(none),
            Err(error) => return Err(fail(Exit::Unfit, format!("{}: {error}", path.display()))),
        };
        let wrong = |why: &dyn std::fmt::Display| {
            refuse(format!("{}: {why}; move it away and calibrate again", path.display()))
        };
        let floors: Floors = serde_json::from_str(&text).map_err(|e| wrong(&e))?;
        if floors.schema != SCHEMA {
            return Err(wrong(&format!("schema {:?}, expected {SCHEMA:?}", floors.schema)));
        }
        Ok(floors)
    }

    /// What a case showed on a machine with so many quads a launch.
    pub(crate) fn of(&self, machine: &Machine, case: &str, quads: usize) -> Option<&OfCase> {
        let found = self.machines.get(&machine.fingerprint)?.cases.get(case)?;
        (found.quads == quads).then_some(found)
    }

    /// Takes what a case showed.
    pub(crate) fn add(&mut self, machine: &Machine, case: &str, found: OfCase) {
        let of = self.machines.entry(machine.fingerprint.clone()).or_default();
        of.name.clone_from(&machine.name);
        of.cases.insert(case.to_owned(), found);
    }

    /// Writes them.
    ///
    /// # Errors
    /// If they cannot be written.
    pub(crate) fn keep(&self) -> anyhow::Result<()> {
        let path = place();
        files::replace(&path, &serde_json::to_vec(self)?)
            .map_err(|e| fail(Exit::Unfit, format!("{}: {e}", path.display())))
    }
}
