//! Cases in launches of two builds, until something is shown or enough was tried.

use std::collections::BTreeMap;

use benches::{
    pairs::{
        Build, Launch, Plan, Stopped, Told, launch,
        verdict::{CHANCE, Judged, Verdict, paired, quads},
    },
    stats::benjamini_hochberg,
};
use serde_json::{Value, json};

use crate::{
    bench::ops::CALLS,
    env::day,
    exit::{Exit, fail},
    floors::{Floors, OfCase},
    gate::stopped,
    machine::Machine,
    out::{self, Out},
    policy::Policy,
};

/// How much is sampled.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct Sampling {
    /// ABBA quads of a launch
    #[arg(long, default_value_t = 60, value_name = "N", value_parser = clap::value_parser!(u32).range(4..=100_000))]
    pub(crate) quads: u32,
    /// Launches of each case: fresh processes of both sides
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u32).range(3..=1000))]
    pub(crate) launches: u32,
    /// Launches of a case, at the most, while nothing is shown
    #[arg(long, default_value_t = 12, value_name = "N", value_parser = clap::value_parser!(u32).range(3..=1000))]
    pub(crate) most_launches: u32,
    /// Launches of a build beside itself from which it follows what a case is off by itself
    #[arg(long, default_value_t = 9, value_name = "N", value_parser = clap::value_parser!(u32).range(3..=1000))]
    pub(crate) aa: u32,
}

/// What is planted in the second side.
#[derive(Clone, Debug, Default)]
pub(crate) struct Plant {
    pub(crate) extra: f64,
    pub(crate) fault: Option<String>,
}

impl std::str::FromStr for Plant {
    type Err = String;

    fn from_str(text: &str) -> Result<Plant, String> {
        match text.parse::<f64>() {
            Ok(extra) if 0.0 < extra && extra <= 4.0 => Ok(Plant { extra, fault: None }),
            Ok(_) => {
                Err("expected a share above 0 and at most 4, or the name of a fault".to_owned())
            }
            Err(_) => Ok(Plant { extra: 0.0, fault: Some(text.to_owned()) }),
        }
    }
}

/// Launches of one case.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sampled {
    pub(crate) launches: Vec<Launch>,
    /// Why there are no more: wrong answers, or none.
    pub(crate) red: Option<Launch>,
}

impl Sampled {
    /// What a side said last.
    pub(crate) fn told(&self, side: usize) -> Option<&Told> {
        let last = self.red.as_ref().or(self.launches.last());
        last.map(|launch| &launch.sides[side])
    }
}

/// Runs launches of cases in turns: what changes on the machine meanwhile meets all of them.
pub(crate) fn rounds(
    cases: &[&str],
    builds: &[Build; 2],
    quads: u32,
    rounds: u32,
    into: &mut BTreeMap<String, Sampled>,
    step: &mut dyn FnMut(),
) -> anyhow::Result<()> {
    for _ in 0..rounds {
        for &case in cases {
            let sampled = into.entry(case.to_owned()).or_default();
            if sampled.red.is_none() {
                let plan = Plan { quads: quads as usize, calls: CALLS, judged: true };
                match launch(case, builds, plan, &mut || !out::interrupted()) {
                    Ok(found) if found.sides.iter().all(Told::passed) => {
                        sampled.launches.push(found);
                    }
                    Ok(red) => sampled.red = Some(red),
                    // A kernel that takes its process with it ends its case alone.
                    Err(Stopped::Died(why)) if !out::interrupted() => {
                        sampled.red = Some(crashed(why, sampled, builds));
                    }
                    Err(Stopped::Died(_)) => return Err(stopped(Stopped::Interrupted)),
                    Err(other) => return Err(stopped(other)),
                }
            }
            step();
        }
    }
    Ok(())
}

/// A launch of which one side is no more.
fn crashed(why: String, sampled: &Sampled, builds: &[Build; 2]) -> Launch {
    let mut red = Launch::default();
    let passed = Told { outcome: "passed".to_owned(), ..Told::default() };
    red.sides = [passed.clone(), passed];
    for side in 0..2 {
        if let Some(told) = sampled.told(side) {
            red.sides[side] = told.clone();
        }
    }
    let first = builds[0].program.display().to_string();
    let side = usize::from(!(why.starts_with(&first) && builds[0].program != builds[1].program));
    "crashed".clone_into(&mut red.sides[side].outcome);
    red.sides[side].why = Some(why);
    red
}

/// Launches of a build beside itself, of cases whose floors are not known.
pub(crate) fn calibrate(
    cases: &[&str],
    builds: &[Build; 2],
    (quads, launches): (u32, u32),
    floors: &mut Floors,
    machine: &Machine,
    step: &mut dyn FnMut(),
) -> anyhow::Result<BTreeMap<String, Sampled>> {
    let mut found = BTreeMap::new();
    rounds(cases, builds, quads, launches, &mut found, step)?;
    for (case, sampled) in &found {
        if sampled.red.is_none() {
            let logs = self::quads(&sampled.launches);
            floors.add(machine, case, OfCase::new(quads as usize, &logs));
        }
    }
    floors.keep()?;
    Ok(found)
}

/// What is said of a case.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) case: String,
    pub(crate) verdict: Verdict,
    pub(crate) judged: Option<Judged>,
    pub(crate) floor: f64,
    pub(crate) quads: usize,
    pub(crate) launches: usize,
    pub(crate) q: Option<f64>,
    pub(crate) reason: Option<String>,
    pub(crate) exit: Exit,
    /// Whether sides took turns, rather than the one after the other.
    pub(crate) paired: bool,
}

impl Row {
    /// A case of which no speed is told.
    pub(crate) fn without(case: &str, verdict: Verdict, reason: String, exit: Exit) -> Row {
        Row {
            case: case.to_owned(),
            verdict,
            judged: None,
            floor: f64::NAN,
            quads: 0,
            launches: 0,
            q: None,
            reason: Some(reason),
            exit,
            paired: true,
        }
    }

    /// A case of which it is; `samples` are those of its launches.
    pub(crate) fn of(case: &str, judged: Judged, floor: f64, samples: &[Vec<f64>]) -> Row {
        Row {
            case: case.to_owned(),
            verdict: judged.verdict,
            judged: Some(judged),
            floor,
            quads: samples.iter().map(Vec::len).sum(),
            launches: samples.len(),
            q: None,
            reason: None,
            exit: Exit::Ok,
            paired: true,
        }
    }

    /// The object of `--format jsonl`.
    pub(crate) fn json(&self) -> Value {
        let number = |x: Option<f64>| x.filter(|x| x.is_finite());
        let of = |f: fn(&Judged) -> f64| number(self.judged.as_ref().map(f));
        json!({
            "schema": "karat.result/1", "kind": "gate", "case": self.case,
            "variant": self.case.split('@').nth(1), "verdict": self.verdict.name(),
            "ratio": of(|j| j.ratio), "lo": of(|j| j.interval.lo), "hi": of(|j| j.interval.hi),
            "floor": number(Some(self.floor)), "quads": self.quads, "launches": self.launches,
            "p": of(|j| j.p), "q": number(self.q), "reason": self.reason, "paired": self.paired,
            "exit": self.exit as u8,
        })
    }
}

/// Samples cases that both sides have until each is decided or enough was tried, and judges them
/// together.
pub(crate) fn decide(
    cases: &[&str],
    builds: &[Build; 2],
    sampling: Sampling,
    floors: &dyn Fn(&str, usize) -> f64,
    policy: &Policy,
    out: &Out,
) -> anyhow::Result<(Vec<Row>, BTreeMap<String, Sampled>)> {
    let mut sampled = BTreeMap::new();
    let mut open: Vec<&str> = cases.to_vec();
    let mut rows = BTreeMap::new();
    let mut done = 0;
    let bar = out.bar(0, "launches", false);
    let mut step = sampling.launches;
    while !open.is_empty() && 0 < step {
        bar.set_length(bar.position() + u64::from(step) * open.len() as u64);
        rounds(&open, builds, sampling.quads, step, &mut sampled, &mut || bar.inc(1))?;
        done += step;
        for &case in &open {
            let found = &sampled[case];
            let logs = quads(&found.launches);
            let floor = floors(case, logs.len().max(1));
            let judged = paired(&logs, &policy.rule(case, floor), 0);
            rows.insert(case, Row::of(case, judged, floor, &logs));
        }
        let undecided = |case: &&str| {
            let still = [Verdict::Ambiguous, Verdict::Ungateable].contains(&rows[*case].verdict);
            still && sampled[*case].red.is_none()
        };
        open.retain(undecided);
        step = sampling.launches.min(sampling.most_launches.saturating_sub(done));
    }
    bar.finish_and_clear();
    let mut rows: Vec<Row> = cases.iter().filter_map(|case| rows.remove(case)).collect();
    together(&mut rows);
    Ok((rows, sampled))
}

/// Corrects for having asked of many cases, and says how each row ends the run.
pub(crate) fn together(rows: &mut [Row]) {
    let chances: Vec<f64> =
        rows.iter().filter_map(|row| row.judged.as_ref().map(|judged| judged.p)).collect();
    let mut corrected = benjamini_hochberg(&chances).into_iter();
    for row in rows {
        if row.judged.is_none() {
            continue;
        }
        row.q = corrected.next();
        let sure = row.q.is_some_and(|q| q <= CHANCE);
        if [Verdict::Slower, Verdict::Faster].contains(&row.verdict) && !sure {
            row.verdict = Verdict::Ambiguous;
            row.reason = Some("not sure enough beside so many cases".to_owned());
        }
        row.exit = match row.verdict {
            Verdict::Slower => Exit::Slower,
            Verdict::Ambiguous | Verdict::Ungateable => Exit::Ambiguous,
            _ => Exit::Ok,
        };
    }
}

/// What one side's answers were, to be held against the other's.
#[derive(Clone, Debug)]
pub(crate) struct Answers {
    pub(crate) outcome: String,
    pub(crate) why: Option<String>,
    pub(crate) budget: f64,
    pub(crate) plan: String,
}

impl From<&Told> for Answers {
    fn from(told: &Told) -> Answers {
        let Told { outcome, why, budget, plan, .. } = told;
        Answers { outcome: outcome.clone(), why: why.clone(), budget: *budget, plan: plan.clone() }
    }
}

/// The use of a bound below which it may grow as it likes.
const LITTLE: f64 = 0.01;

/// What has got worse in answers, if anything: the verdict, in which words, and how it ends the run.
pub(crate) fn worse(was: &Answers, is: &Answers) -> Option<(Verdict, String, Exit)> {
    let why = |of: &Answers| of.why.as_ref().map_or(String::new(), |why| format!(": {why}"));
    let passed = was.outcome == "passed";
    match &*is.outcome {
        "passed" if !passed => {
            let reason = format!("passes now, was {}{}", was.outcome, why(was));
            let run = !["skipped", "unsupported", "missing"].contains(&&*was.outcome);
            let verdict = if run { Verdict::Withheld } else { Verdict::Missing };
            return Some((verdict, reason, Exit::Ok));
        }
        "passed" => {}
        "skipped" | "unsupported" | "missing" => {
            let exit = if passed { Exit::Wrong } else { Exit::Ok };
            let what = if passed { "passed, and is no longer run" } else { "not run" };
            let reason = format!("{what}: {}{}", is.outcome, why(is));
            return Some((Verdict::Missing, reason, exit));
        }
        outcome => {
            let exit = match outcome {
                "cheat" => Exit::Cheat,
                "crashed" | "timeout" => Exit::Crashed,
                _ => Exit::Wrong,
            };
            let before = if passed { "passed, is now" } else { "is" };
            // What was wrong before is no worse, and still nothing to tell a speed of.
            let exit = if passed || was.outcome == "missing" { exit } else { Exit::Ok };
            return Some((Verdict::Withheld, format!("{before} {outcome}{}", why(is)), exit));
        }
    }
    if LITTLE < is.budget && 2.0 * was.budget < is.budget {
        let reason = format!(
            "uses {:.1} % of its bound, was {:.1} %",
            100.0 * is.budget,
            100.0 * was.budget
        );
        return Some((Verdict::Withheld, reason, Exit::Wrong));
    }
    if was.plan != is.plan {
        let reason = "fell back: it rounds otherwise than it did (`plan` in the rows)".to_owned();
        return Some((Verdict::Withheld, reason, Exit::Wrong));
    }
    None
}

/// Lets through what the policy does today.
pub(crate) fn allow(rows: &mut [Row], policy: &Policy, out: &Out) {
    let today = day(benches::clock::now());
    let counts = |exit: Exit| [Exit::Slower, Exit::Wrong, Exit::Ambiguous].contains(&exit);
    for row in rows.iter_mut().filter(|row| counts(row.exit)) {
        match policy.allowed(&row.case, today) {
            Ok(None) => {}
            Ok(Some(allowed)) => {
                let reason =
                    row.reason.take().map_or(String::new(), |reason| format!("{reason}; "));
                row.reason = Some(reason + &allowed);
                row.exit = Exit::Ok;
            }
            Err(over) => out.note(&format!("{}: {over}", row.case)),
        }
    }
}

/// Tells rows, as a table and as lines, and ends the run.
pub(crate) fn tell(rows: &[Row], strict: bool, out: &Out) -> anyhow::Result<Exit> {
    let mut exit = Exit::Ok;
    let mut cells = Vec::new();
    for row in rows {
        out.json(&row.json());
        let own = if row.exit == Exit::Ambiguous && !strict { Exit::Ok } else { row.exit };
        exit = exit.gravest(own);
        let of = |f: &dyn Fn(&Judged) -> String| row.judged.as_ref().map_or(String::new(), f);
        cells.push(vec![
            row.case.clone(),
            row.verdict.name().to_owned(),
            of(&|j| format!("{:.3}", j.ratio)),
            of(&|j| format!("{:.3}..{:.3}", j.interval.lo, j.interval.hi)),
            if row.floor.is_finite() {
                format!("{:.1} %", 100.0 * row.floor)
            } else {
                String::new()
            },
            format!("{} x {}", row.launches, row.quads.checked_div(row.launches).unwrap_or(0)),
            row.reason.clone().unwrap_or_default(),
        ]);
    }
    out.table(
        &["case", "verdict", "B over A", "95 %", "off by itself", "launches x quads", "why"],
        &cells,
    );
    let count = |verdict: Verdict| rows.iter().filter(|row| row.verdict == verdict).count();
    let said: Vec<String> = [
        Verdict::Slower,
        Verdict::Faster,
        Verdict::Same,
        Verdict::Ambiguous,
        Verdict::Ungateable,
        Verdict::Withheld,
        Verdict::Missing,
    ]
    .into_iter()
    .filter(|&verdict| 0 < count(verdict))
    .map(|verdict| format!("{} {}", count(verdict), verdict.name()))
    .collect();
    out.line(&said.join(", "));
    let told = |verdict| count(verdict);
    out.json(&json!({"schema": "karat.result/1", "kind": "summary", "rows": rows.len(),
        "slower": told(Verdict::Slower), "faster": told(Verdict::Faster), "same": told(Verdict::Same),
        "ambiguous": told(Verdict::Ambiguous), "ungateable": told(Verdict::Ungateable),
        "withheld": told(Verdict::Withheld), "missing": told(Verdict::Missing), "exit": exit as u8}));
    if rows.is_empty() {
        return Err(fail(Exit::Nothing, "nothing selected"));
    }
    Ok(exit)
}

/// How answers that are red end a run; what is known beforehand is told, and ends nothing.
pub(crate) fn red_exit(launch: &Launch) -> Exit {
    let of = |told: &Told| match &*told.outcome {
        "passed" | "skipped" | "unsupported" => Exit::Ok,
        "cheat" => Exit::Cheat,
        "crashed" | "timeout" => Exit::Crashed,
        _ => Exit::Wrong,
    };
    launch.sides.iter().map(of).fold(Exit::Ok, Exit::gravest)
}
