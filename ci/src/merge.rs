//! `karat merge`: the results of several runs as one file.

use std::path::PathBuf;

use serde_json::json;

use crate::{
    exit::{Exit, fail},
    files,
    out::Out,
    runs::{Files, Results},
};

/// Join results, for example of the shards of one run; rows stay as they were written.
///
/// Ends as one run of all of them would have: with the gravest of their exit codes.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    results: Files,
    /// Where the joined results go
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
}

pub(crate) fn run(args: &Args, out: &Out) -> anyhow::Result<Exit> {
    let mut results = Results::default();
    let mut joined = String::new();
    let damage = args.results.damage();
    for file in &args.results.files {
        results.add(file, damage, &mut |line| {
            joined.push_str(line);
            joined.push('\n');
        })?;
    }
    results.check_shards(damage)?;
    files::replace(&args.out, joined.as_bytes())
        .map_err(|e| fail(Exit::Unfit, format!("{}: {e}", args.out.display())))?;
    results.lost.iter().for_each(|lost| out.note(&format!("karat: {lost}")));
    let exit = results.exit();
    let rows: usize = results.runs.iter().map(|run| run.rows).sum();
    let (files, runs) = (args.results.files.len(), results.runs.len());
    let count = |outcome: &str| results.judged.iter().filter(|row| row.outcome == outcome).count();
    let red = results.judged.iter().filter(|row| row.is_red()).count();
    out.line(&format!(
        "{files} files, {runs} runs, {rows} rows: {} passed, {red} not passed, {} skipped, {} unsupported; {}",
        count("passed"),
        count("skipped"),
        count("unsupported"),
        args.out.display()
    ));
    out.json(&json!({
        "schema": "karat.result/1", "kind": "merge", "files": files, "runs": runs, "rows": rows, "passed": count("passed"),
        "not_passed": red, "lost": results.lost, "exit": exit as u8, "out": args.out.display().to_string(),
    }));
    Ok(exit)
}
