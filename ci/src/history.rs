//! `karat history`: times over revisions, and where they change.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command as Program,
};

use benches::stats::change_points;
use serde_json::json;

use crate::{
    exit::{Exit, fail, refuse},
    files,
    out::Out,
    runs::{
        rows::Past,
        times::{self, Times},
    },
};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The file of it; target/karat/history.jsonl without it
    #[arg(long, global = true, value_name = "FILE")]
    history: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Add results of `karat bench` or a baseline
    Add {
        /// Files of results
        #[arg(required = true)]
        results: Vec<PathBuf>,
        /// The revision that they are of; that of the current folder without it
        #[arg(long)]
        rev: Option<String>,
    },
    /// Say where times change, and from what to what
    Changepoints {
        /// Words that must be in the id of a case
        filter: Vec<String>,
        /// The share of shuffles that may look as much like a change
        #[arg(long, default_value_t = 0.01, value_name = "P")]
        level: f64,
    },
}

pub(crate) fn run(args: &Args, out: &Out) -> anyhow::Result<Exit> {
    let place = args.history.clone();
    let place = place.unwrap_or_else(|| files::cache_dir().join("history.jsonl"));
    match &args.command {
        Command::Add { results, rev } => add(&place, results, rev.as_deref(), out),
        Command::Changepoints { filter, level } => {
            if !(0.0 < *level && *level < 1.0) {
                return Err(refuse(format!("--level {level}: expected a share between 0 and 1")));
            }
            changes(&place, filter, *level, out)
        }
    }
}

/// The lines that are there; none where there is no file.
fn kept(place: &Path) -> anyhow::Result<Option<Vec<Past>>> {
    place.exists().then(|| times::history(place)).transpose()
}

fn add(place: &PathBuf, paths: &[PathBuf], rev: Option<&str>, out: &Out) -> anyhow::Result<Exit> {
    let rev = match rev {
        Some(rev) if !rev.trim().is_empty() => rev.to_owned(),
        Some(_) => return Err(refuse("--rev: expected a name")),
        None => here()?,
    };
    let before = kept(place)?;
    let mut known: BTreeSet<String> =
        before.iter().flatten().filter_map(|past| past.results.clone()).collect();
    let mut added = Vec::new();
    for path in paths {
        let Times { env, rows, .. } = Times::read(path)?;
        let hash = blake3::hash(&fs::read(path)?).to_hex()[..16].to_owned();
        if !known.insert(hash.clone()) {
            return Err(refuse(format!("{}: was added before", path.display())));
        }
        let right = rows.iter().filter(|row| row.outcome() == "passed");
        added.extend(right.map(|row| {
            json!({"schema": "karat.result/1", "kind": "history", "case": row.case,
                "variant": row.case.split('@').nth(1), "rev": rev, "time": env.time,
                "fingerprint": env.fingerprint, "machine": env.machine,
                "median_ns": benches::stats::median(&row.samples_ns), "results": hash})
        }));
    }
    if added.is_empty() {
        return Err(fail(Exit::Nothing, "no row of these results passed and was timed"));
    }
    let mut text = match before {
        Some(_) => fs::read_to_string(place)?,
        None => String::new(),
    };
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    for line in &added {
        out.json(line);
        text.push_str(&line.to_string());
        text.push('\n');
    }
    files::replace(place, text.as_bytes())
        .map_err(|e| fail(Exit::Unfit, format!("{}: {e}", place.display())))?;
    out.line(&format!("{} cases of {rev}, in {}", added.len(), place.display()));
    Ok(Exit::Ok)
}

/// The commit of the current folder.
fn here() -> anyhow::Result<String> {
    let output = Program::new("git").args(["rev-parse", "--short=12", "HEAD"]).output();
    let output = output.map_err(|e| fail(Exit::Unfit, format!("git: {e}; say --rev")))?;
    let rev = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    if !output.status.success() || rev.is_empty() {
        return Err(refuse("this is no repository: say of which revision they are, --rev REV"));
    }
    Ok(rev)
}

fn changes(place: &Path, words: &[String], level: f64, out: &Out) -> anyhow::Result<Exit> {
    let none = || fail(Exit::Nothing, format!("{}: no history of that", place.display()));
    let history = kept(place)?.ok_or_else(none)?;
    let mut series: BTreeMap<(&str, &str), Vec<&Past>> = BTreeMap::new();
    for past in &history {
        if words.iter().all(|word| past.case.contains(word.as_str())) {
            series.entry((&past.case, &past.fingerprint)).or_default().push(past);
        }
    }
    if series.is_empty() {
        return Err(none());
    }
    let mut found = Vec::new();
    for ((case, fingerprint), all) in &series {
        // Ratios count, not differences.
        let logs: Vec<f64> = all.iter().map(|past| past.median_ns.ln()).collect();
        for change in change_points(&logs, level, 0) {
            let (before, after) = (change.before.exp(), change.after.exp());
            let (rev, last) = (&all[change.at].rev, &all[change.at - 1].rev);
            out.json(&json!({"schema": "karat.result/1", "kind": "change_point", "case": case,
                "fingerprint": fingerprint, "rev": rev, "after_rev": last, "before_ns": before,
                "after_ns": after, "ratio": after / before, "p": change.p, "at": change.at}));
            found.push(vec![
                (*case).to_owned(),
                format!("{last} to {rev}"),
                format!("{:.2}", before / 1e3),
                format!("{:.2}", after / 1e3),
                format!("{:+.1} %", 100.0 * (after / before - 1.0)),
                format!("{:.3}", change.p),
            ]);
        }
    }
    let head = ["case", "between", "µs before", "µs after", "change", "of shuffles"];
    if !found.is_empty() {
        out.table(&head, &found);
    }
    let short = series.values().filter(|all| all.len() < 6).count();
    let s = |n: usize| if n == 1 { "" } else { "s" };
    let (n, of) = (found.len(), series.len());
    out.line(&format!("{n} change{} in {of} series", s(n)));
    if 0 < short {
        out.line(&format!("{short} of them too short to say: fewer than 6 times"));
    }
    out.json(&json!({"schema": "karat.result/1", "kind": "summary", "rows": n, "exit": 0}));
    Ok(Exit::Ok)
}
