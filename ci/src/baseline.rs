//! `karat baseline`: what times and answers were, kept with the build that had them.
//!
//! A baseline is a file of results, `target/karat/baselines/NAME.jsonl`, and the program beside it: on the
//! same machine it is run again, in turns with what is new.

use std::{
    fs,
    path::{Path, PathBuf},
};

use benches::{pairs::both, plan::Job};
use serde_json::json;

use crate::{
    bench::ops::jobs,
    exit::{Exit, fail, refuse},
    files,
    floors::Floors,
    gate::program,
    list::Selection,
    machine::Machine,
    out::Out,
    runs::{rows::OpSpeed, times::Times},
    sampling::{self, Sampled, red_exit},
};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Measure what a filter selects, and keep it
    Save(Save),
    /// Show one, or name all of them
    Show {
        /// Which.
        name: Option<String>,
    },
    /// Write one as lines of JSON
    Export {
        /// Which.
        name: String,
        /// Where to; standard output without it
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
}

#[derive(Debug, clap::Args)]
struct Save {
    /// What it is to be called
    name: String,
    #[command(flatten)]
    selection: Selection,
    /// ABBA quads of a launch
    #[arg(long, default_value_t = 60, value_name = "N", value_parser = clap::value_parser!(u32).range(4..=100_000))]
    quads: u32,
    /// Launches of each case: this build beside itself
    #[arg(long, default_value_t = 9, value_name = "N", value_parser = clap::value_parser!(u32).range(3..=1000))]
    launches: u32,
    /// Replace one of that name
    #[arg(long)]
    force: bool,
}

fn folder() -> PathBuf {
    files::cache_dir().join("baselines")
}

/// Where a baseline stands: that of a name, or a file.
pub(crate) fn place(name: &str) -> PathBuf {
    if name.contains('/') || Path::new(name).is_file() {
        return name.into();
    }
    folder().join(format!("{name}.jsonl"))
}

/// The program that is kept beside it.
fn beside(place: &Path) -> PathBuf {
    place.with_extension("karat")
}

/// A baseline, whole.
///
/// # Errors
/// 7 if there is none, 2 if it is damaged.
pub(crate) fn open(name: &str) -> anyhow::Result<Times> {
    let place = place(name);
    if !place.exists() {
        let why = format!("{}: no such baseline; `karat baseline save {name}`", place.display());
        return Err(fail(Exit::Baseline, why));
    }
    Times::read(&place)
}

/// The program of a baseline, if it is there and the one that was kept.
pub(crate) fn kept_program(name: &str, times: &Times) -> Option<PathBuf> {
    let program = beside(&place(name));
    let want = times.env.program_blake3.as_deref()?;
    let got = golden::checkpoint::hash_file(&program, &program).ok()?.blake3;
    (got == want).then(|| std::path::absolute(program).ok())?
}

pub(crate) fn run(args: &Args, out: &Out) -> anyhow::Result<Exit> {
    match &args.command {
        Command::Save(args) => save(args, out),
        Command::Show { name: Some(name) } => show(name, out),
        Command::Show { name: None } => all(out),
        Command::Export { name, out: to } => export(name, to.as_deref(), out),
    }
}

fn save(args: &Save, out: &Out) -> anyhow::Result<Exit> {
    let fine = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if args.name.is_empty() || args.name.starts_with('.') || !args.name.chars().all(fine) {
        let want = "expected letters, digits, - _ and .";
        return Err(refuse(format!("baseline {:?}: {want}", args.name)));
    }
    let path = folder().join(format!("{}.jsonl", args.name));
    if path.exists() && !args.force {
        return Err(refuse(format!("{}: is there already; --force replaces it", path.display())));
    }
    let jobs = jobs(&args.selection)?;
    let ids: Vec<String> = jobs.iter().map(Job::id).collect();
    let cases: Vec<&str> = ids.iter().map(String::as_str).collect();
    let here = Machine::here();
    let program = program()?;
    let mut floors = Floors::kept()?;
    let bar = out.bar(u64::from(args.launches) * cases.len() as u64, "baseline", false);
    let builds = both(&program, Some(benches::host().threads));
    let sizes = (args.quads, args.launches);
    let found =
        sampling::calibrate(&cases, &builds, sizes, &mut floors, &here, &mut || bar.inc(1))?;
    bar.finish_and_clear();
    let unfit = |e: &dyn std::fmt::Display| fail(Exit::Unfit, format!("{}: {e}", path.display()));
    let hash = golden::checkpoint::hash_file(&program, &program).map_err(|e| unfit(&e))?;
    let mut env = here.json();
    env["baseline"] = args.name.as_str().into();
    env["program_blake3"] = hash.blake3.into();
    let mut text = format!("{env}\n");
    out.json(&env);
    let (mut exit, mut passed) = (Exit::Ok, 0);
    for job in &jobs {
        let sampled = &found[&job.id()];
        let row = row(job, sampled, args.quads);
        exit = exit.gravest(sampled.red.as_ref().map_or(Exit::Ok, red_exit));
        passed += usize::from(sampled.red.is_none());
        out.json(&row);
        text.push_str(&row.to_string());
        text.push('\n');
    }
    if passed == 0 && exit == Exit::Ok {
        return Err(fail(Exit::Unfit, "nothing that was selected can be run here"));
    }
    let summary = json!({"schema": "karat.result/1", "kind": "summary", "rows": jobs.len(),
        "passed": passed, "exit": exit as u8});
    out.json(&summary);
    text.push_str(&summary.to_string());
    text.push('\n');
    // The program first: a baseline without one is compared less well, one of another is not compared.
    let kept = beside(&path);
    fs::create_dir_all(folder()).map_err(|e| unfit(&e))?;
    let part = kept.with_extension(std::process::id().to_string());
    fs::copy(&program, &part).and_then(|_| fs::rename(&part, &kept)).map_err(|e| unfit(&e))?;
    files::replace(&path, text.as_bytes()).map_err(|e| unfit(&e))?;
    out.line(&format!("{passed} of {} cases passed and timed, in {}", jobs.len(), path.display()));
    Ok(exit)
}

/// A case as it is kept.
fn row(job: &Job, sampled: &Sampled, quads: u32) -> serde_json::Value {
    let red = sampled.red.as_ref().and_then(|red| red.sides.iter().find(|side| !side.passed()));
    let told = red.or(sampled.told(0));
    // Of wrong answers no time is told.
    let launches = if red.is_some() { &[][..] } else { &sampled.launches };
    let times =
        |launch: &benches::pairs::Launch| launch.sides.each_ref().map(|side| side.ns.clone());
    let samples: Vec<f64> = launches.iter().flat_map(|launch| times(launch).concat()).collect();
    let median = (!samples.is_empty()).then(|| benches::stats::median(&samples));
    json!({
        "schema": "karat.result/1", "kind": "bench", "case": job.id(), "op": job.entry.name(),
        "spec": job.spec, "variant": job.variant, "checked": told.map_or("error", |told| &told.outcome),
        "why": told.and_then(|told| told.why.as_ref()),
        "budget_used": benches::report::number(told.map_or(f64::INFINITY, |told| told.budget)),
        "plan": told.map_or("", |told| &told.plan), "samples_ns": samples, "median_ns": median,
        "bytes": job.parsed.cost.bytes, "flops": job.parsed.cost.flops, "cold": false,
        "quads": quads, "launches": launches.len(),
    })
}

fn show(name: &str, out: &Out) -> anyhow::Result<Exit> {
    let times = open(name)?;
    out.line(&times.env.machine);
    let cell = |row: &OpSpeed| {
        let median = (!row.samples_ns.is_empty()).then(|| format!("{:.2}", row.median_ns / 1e3));
        let budget = row.budget_used.map(|used| format!("{:.1} %", 100.0 * used));
        let [median, budget] = [median, budget].map(Option::unwrap_or_default);
        let samples = row.samples_ns.len().to_string();
        vec![row.case.clone(), row.outcome().to_owned(), median, budget, samples]
    };
    let cells: Vec<_> = times.rows.iter().map(cell).collect();
    out.table(&["case", "checked", "µs", "of its bound", "samples"], &cells);
    times.lines.iter().for_each(|line| out.again(line));
    let paired = kept_program(name, &times).is_some();
    let told = if paired { "its program is kept" } else { "its program is not here" };
    out.line(told);
    Ok(Exit::Ok)
}

fn all(out: &Out) -> anyhow::Result<Exit> {
    let entries = fs::read_dir(folder()).into_iter().flatten().filter_map(Result::ok);
    let paths = entries.map(|entry| entry.path());
    let mut paths: Vec<PathBuf> =
        paths.filter(|path| path.extension().is_some_and(|end| end == "jsonl")).collect();
    paths.sort();
    if paths.is_empty() {
        return Err(fail(Exit::Baseline, "no baseline is kept; `karat baseline save NAME`"));
    }
    for path in paths {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let cases = Times::read(&path).map(|times| times.rows.len());
        let told = match &cases {
            Ok(cases) => format!("{cases} cases"),
            Err(error) => error.to_string(),
        };
        out.line(&format!("{name}: {told}"));
        out.json(&json!({"schema": "karat.result/1", "kind": "baseline", "name": name,
            "cases": cases.as_ref().ok(), "why": cases.as_ref().err().map(ToString::to_string)}));
    }
    Ok(Exit::Ok)
}

fn export(name: &str, to: Option<&Path>, out: &Out) -> anyhow::Result<Exit> {
    let times = open(name)?;
    let text = times.lines.join("\n") + "\n";
    if let Some(path) = to {
        files::replace(path, text.as_bytes())
            .map_err(|e| fail(Exit::Unfit, format!("{}: {e}", path.display())))?;
    } else {
        out.text(&text);
        times.lines.iter().for_each(|line| out.again(line));
    }
    Ok(Exit::Ok)
}
