//! `karat report`: results as one HTML file that needs no network and no script.

mod cases;
mod compare;
mod machine;
mod page;
mod plot;
mod plots;
mod speed;
mod tables;

use std::path::PathBuf;

use serde_json::json;

pub(crate) use self::page::page;
use crate::{
    exit::{Exit, fail},
    export::{badge, write},
    out::Out,
    runs::{Damage, Files, Results},
};

/// Write results as one HTML file that needs no network and no script.
///
/// Ends with 0 when the report is written, whatever it says: `karat merge` and the commands that judge end as
/// their results do.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    results: Files,
    /// Where the report goes
    #[arg(short, long, value_name = "FILE", default_value = "report.html")]
    out: PathBuf,
    /// Results of the same cases to compare with. Times are compared on one machine only
    #[arg(long, value_name = "BASE")]
    compare: Option<PathBuf>,
    /// Also write an SVG badge
    #[arg(long, value_name = "FILE")]
    badge: Option<PathBuf>,
}

pub(crate) fn run(args: &Args, out: &Out) -> anyhow::Result<Exit> {
    let results = args.results.read()?;
    if results.runs.iter().all(|run| run.rows == 0) {
        return Err(fail(Exit::Nothing, "nothing selected: no file has a row"));
    }
    let base = match &args.compare {
        None => None,
        Some(path) if !path.exists() => {
            return Err(fail(
                Exit::Baseline,
                format!("--compare {}: no such file", path.display()),
            ));
        }
        Some(path) => {
            let mut base = Results::default();
            base.add(path, Damage::Refused, &mut |_| ())?;
            compare::refuse_other_machines(&results, &base, path)?;
            Some(base)
        }
    };
    results.lost.iter().for_each(|lost| out.note(&format!("karat: {lost}")));
    let text = page(&results, base.as_ref());
    write(&args.out, &text)?;
    if let Some(path) = &args.badge {
        write(path, &badge::text(&results))?;
    }
    out.line(&format!(
        "{} cases, {} bytes; {}",
        results.judged.len(),
        text.len(),
        args.out.display()
    ));
    out.json(&json!({
        "schema": "karat.result/1", "kind": "report", "cases": results.judged.len(), "bytes": text.len(),
        "lost": results.lost, "out": args.out.display().to_string(),
    }));
    Ok(Exit::Ok)
}
