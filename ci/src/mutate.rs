//! `karat mutate`: are the checks to be believed?

use std::{fs, path::PathBuf};

use benches::{
    mutate::{self, Mutant},
    registry::ops,
};
use golden::Set;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    exit::{Exit, fail},
    files, golden_cmd,
    list::{Device, SetName, Shard},
    out::{self, Out},
};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Words that must be in op@variant+fault
    filter: Vec<String>,
    /// Only faults of what runs on this device
    #[arg(long, value_enum, env = "KARAT_DEVICE")]
    device: Option<Device>,
    /// Problems that hunt the faults
    #[arg(long, value_enum, default_value = "ci", env = "KARAT_SET")]
    set: SetName,
    /// Also draw honest kernels anew, and count the false alarms
    #[arg(long)]
    selftest: bool,
    /// Fresh seeds of every op and honest variant
    #[arg(long, default_value_t = 20, env = "KARAT_SEEDS", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    seeds: u64,
    /// Only the i-th of n parts, so that n machines share a run: `karat merge` joins what they found
    #[arg(long, value_name = "i/n", env = "KARAT_SHARD")]
    shard: Option<Shard>,
    /// Begin again instead of where the last selftest was interrupted
    #[arg(long)]
    fresh: bool,
}

/// How far a selftest has come.
#[derive(Debug, Default, Serialize, Deserialize)]
struct State {
    /// What was being tested: another text of the reference, or another filter, begins again.
    of: String,
    seeds: u64,
    honest: usize,
    alarms: Vec<String>,
}

impl Args {
    /// Words that must be in op@variant+fault.
    fn words(&self) -> Vec<String> {
        let device = self.device.map(|device| format!("@{}/", device.name()));
        self.filter.iter().cloned().chain(device).collect()
    }

    /// The part of the run that is meant, if not all of it is.
    pub(crate) fn shard(&self) -> Option<Shard> {
        self.shard
    }

    /// Whether what stands at this place is of this part.
    fn holds(&self, at: usize) -> bool {
        self.shard.is_none_or(|shard| shard.holds(at))
    }
}

pub(crate) fn run(args: &Args, out: &Out) -> anyhow::Result<Exit> {
    let words = args.words();
    benches::bound::keep_in(&files::cache_dir().join("bounds"));
    let set: Set = args.set.into();
    let all = mutate::mutants(&words);
    let wiring = benches::plants().filter(|(name, _)| {
        let id = format!("model@reference/f32+{name}");
        words.iter().all(|word| id.contains(word.as_str()))
    });
    // Places are counted before it is asked what runs here: shards of unequal machines still hold each once.
    let places = all.len();
    let mut some = 0 < places;
    let mut mutants: Vec<Mutant> =
        all.into_iter().enumerate().filter(|(at, _)| args.holds(*at)).map(|(_, one)| one).collect();
    mutants.retain(Mutant::runs);
    let wiring: Vec<(&str, &str)> = wiring
        .enumerate()
        .inspect(|_| some = true)
        .filter(|(at, _)| args.holds(places + at))
        .map(|(_, one)| one)
        .collect();
    let planted = mutants.len() + wiring.len();
    if planted == 0 && !(some && args.shard.is_some()) {
        return Err(fail(
            Exit::Nothing,
            "nothing selected; `karat mutate` without words hunts every fault",
        ));
    }
    let mut survivors = Vec::new();
    let mut killed = 0;
    let bar = out.bar(planted as u64, "mutate", false);
    let mut tell = |id: &str, what: &str, cite: &str, by: Option<String>| {
        out.json(&json!({"schema": "karat.result/1", "kind": "mutant", "mutant": id, "what": what, "cite": cite,
            "killed": by.is_some(), "by": by}));
        if let Some(by) = by {
            killed += 1;
            if out.verbose {
                out.line(&format!("killed    {id}  by {by}"));
            }
        } else {
            out.line(&format!("SURVIVED  {id}: {what} ({cite})"));
            survivors.push(id.to_owned());
        }
        bar.inc(1);
        !out::interrupted()
    };
    mutate::hunt(&mutants, set, &mut |mutant: &Mutant, row| {
        tell(&mutant.id(), mutant.plant.what, mutant.plant.cite, row.map(benches::report::Row::id))
    });
    for (name, cite) in wiring {
        if out::interrupted() {
            break;
        }
        let by = wiring_killer(name)?;
        tell(&format!("model@reference/f32+{name}"), "wiring", cite, by);
    }
    bar.finish_and_clear();
    if out::interrupted() {
        return Err(fail(Exit::Interrupted, "interrupted"));
    }
    let mut exit = if survivors.is_empty() { Exit::Ok } else { Exit::Wrong };
    out.line(&format!("{killed} of {planted} planted faults found"));
    exit = exit.gravest(guarded(args, &words, out)?);
    let (honest, alarms) =
        if args.selftest { selftest(args, &words, out)? } else { (0, Vec::new()) };
    if !alarms.is_empty() {
        exit = exit.gravest(Exit::Wrong);
    }
    out.json(
        &json!({"schema": "karat.result/1", "kind": "mutate", "planted": planted, "killed": killed,
        "survivors": survivors, "honest": honest, "false_alarms": alarms.len()}),
    );
    Ok(exit)
}

/// The first recording that a fault in the model's wiring fails.
fn wiring_killer(name: &str) -> anyhow::Result<Option<String>> {
    for id in golden_cmd::model_ids() {
        let report = golden_cmd::verify_one(&id, None, "reference", "f32".into(), Some(name))?;
        if let Some(tap) = report.first_wrong() {
            return Ok(Some(format!("{id}: {tap}")));
        }
    }
    Ok(None)
}

/// Spoiled answers and inputs drawn anew, op by op, over the smoke set.
fn guarded(args: &Args, words: &[String], out: &Out) -> anyhow::Result<Exit> {
    let ops: Vec<_> = ops()
        .iter()
        .filter(|op| words.iter().all(|word| op.name().contains(word.as_str())))
        .enumerate()
        .filter(|(at, _)| args.holds(*at))
        .map(|(_, op)| op)
        .collect();
    let bar = out.bar(ops.len() as u64, "sabotage", false);
    let (mut spoiled, mut exit) = (0, Exit::Ok);
    for op in ops {
        if out::interrupted() {
            return Err(fail(Exit::Interrupted, "interrupted"));
        }
        let found = mutate::guard(*op, Set::Smoke).map_err(|e| anyhow::anyhow!("{e}"))?;
        bar.inc(1);
        spoiled += found.spoiled;
        out.json(&json!({"schema": "karat.result/1", "kind": "sabotage", "op": op.name(), "ok": found.ok(),
            "spoiled": found.spoiled, "missed": found.missed, "idle": found.idle, "unfelt": found.unfelt}));
        if !found.ok() {
            exit = Exit::Wrong;
        }
        for missed in &found.missed {
            out.line(&format!("LET THROUGH  {missed}"));
        }
        for idle in &found.idle {
            out.line(&format!("IDLE         {}: {idle} never applies", op.name()));
        }
        for unfelt in &found.unfelt {
            out.line(&format!("MISTRUSTED   {unfelt}"));
        }
    }
    bar.finish_and_clear();
    if 0 < spoiled {
        out.line(&format!("{spoiled} spoiled answers judged"));
    }
    Ok(exit)
}

/// Fresh seeds of every op and honest variant; goes on where an interrupted one stopped.
fn selftest(args: &Args, words: &[String], out: &Out) -> anyhow::Result<(usize, Vec<String>)> {
    const STEP: u64 = 4;
    let all = mutate::honest(words, &|at| args.holds(at));
    let path = files::cache_dir().join("mutate-selftest.json");
    let part = args.shard.map_or_else(String::new, |shard| format!(" {shard}"));
    let of = format!("{} {words:?} {}{part}", benches::bound::version(), all.len());
    let mut state = State { of: of.clone(), ..State::default() };
    if !args.fresh
        && let Some(kept) = read(&path).filter(|kept| kept.of == of && kept.seeds < args.seeds)
    {
        out.note(&format!("going on after {} seeds; --fresh begins again", kept.seeds));
        state = kept;
    }
    let bar = out.bar(args.seeds, "false alarms", false);
    bar.set_position(state.seeds);
    while state.seeds < args.seeds {
        if out::interrupted() {
            return Err(fail(Exit::Interrupted, "interrupted; the same command goes on from here"));
        }
        let to = (state.seeds + STEP).min(args.seeds);
        let (drawn, rows) = mutate::false_alarms(&all, state.seeds..to);
        for row in &rows {
            out.line(&crate::block::block(row, &crate::block::Again::default()));
            out.json(&row.json());
        }
        state.honest += drawn;
        state.alarms.extend(rows.iter().map(benches::report::Row::id));
        state.seeds = to;
        let text = serde_json::to_vec(&state)?;
        files::replace(&path, &text)
            .map_err(|e| fail(Exit::Unfit, format!("{}: {e}", path.display())))?;
        bar.set_position(to);
    }
    bar.finish_and_clear();
    out.line(&format!(
        "{} false alarms in {} fresh problems of {} honest ways to compute an op",
        state.alarms.len(),
        state.honest,
        all.len()
    ));
    // Finished: the next one begins again.
    let _ = fs::remove_file(&path);
    Ok((state.honest, state.alarms))
}

fn read(path: &PathBuf) -> Option<State> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}
