//! `karat export`: results in the words of other tools.

pub(crate) mod badge;
mod criterion;
pub(crate) mod github;
pub(crate) mod junit;
pub(crate) mod markdown;
pub(crate) mod speed;

use std::path::{Path, PathBuf};

use serde_json::json;

use crate::{
    exit::{Exit, fail, refuse},
    files,
    out::Out,
    runs::Files,
};

/// Write results as other tools read them.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    results: Files,
    /// What for
    #[arg(long, value_enum)]
    to: To,
    /// Where it goes; standard output without one. Of criterion a folder, in which `criterion` is made
    #[arg(short, long, value_name = "PATH")]
    out: Option<PathBuf>,
    /// Of criterion: what these results are called
    #[arg(long, value_name = "NAME", default_value = "karat")]
    baseline: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum To {
    /// JUnit XML, as Jenkins and GitLab read it
    Junit,
    /// Annotations of GitHub Actions, ten at most
    Github,
    /// Markdown: a comment, or the summary of a step
    Markdown,
    /// An SVG badge
    Badge,
    /// A folder as Criterion leaves it, which critcmp reads
    Criterion,
    /// JSON of Bencher (Bencher Metric Format)
    Bmf,
    /// JSON of github-action-benchmark (customSmallerIsBetter)
    GithubActionBenchmark,
    /// JSON lines as llama-bench writes them
    LlamaBench,
}

pub(crate) fn run(args: &Args, out: &Out) -> anyhow::Result<Exit> {
    let results = args.results.read()?;
    results.lost.iter().for_each(|lost| out.note(&format!("karat: {lost}")));
    if args.to == To::Criterion {
        let folder = args.out.as_deref().ok_or_else(|| {
            refuse("--to criterion: expected --out DIR: it is a folder with files for each case")
        })?;
        let cases = criterion::write(&results, folder, &args.baseline)?;
        let made = folder.join("criterion");
        out.line(&format!("{cases} cases; {}", made.display()));
        told(args, cases, out);
        return Ok(Exit::Ok);
    }
    let (text, rows) = match args.to {
        To::Junit => (junit::text(&results)?, results.judged.len()),
        To::Github => (github::text(&results), results.judged.len()),
        To::Markdown => (markdown::text(&results), results.judged.len()),
        To::Badge => (badge::text(&results), results.judged.len()),
        To::Bmf => speed::bmf(&results)?,
        To::GithubActionBenchmark => speed::action(&results)?,
        To::LlamaBench => speed::llama(&results)?,
        To::Criterion => unreachable!("made above"),
    };
    match &args.out {
        None => {
            out.text(&text);
            out.json(&json!({
                "schema": "karat.result/1", "kind": "export", "to": name(args.to), "rows": rows, "text": text,
            }));
        }
        Some(path) => {
            write(path, &text)?;
            out.note(&path.display().to_string());
            told(args, rows, out);
        }
    }
    Ok(Exit::Ok)
}

fn told(args: &Args, rows: usize, out: &Out) {
    let path = args.out.as_ref().map(|path| path.display().to_string());
    out.json(&json!({
        "schema": "karat.result/1", "kind": "export", "to": name(args.to), "rows": rows, "out": path,
    }));
}

fn name(to: To) -> String {
    let value = clap::ValueEnum::to_possible_value(&to);
    value.map_or(String::new(), |value| value.get_name().to_owned())
}

/// Writes beside the place and renames.
pub(crate) fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    files::replace(path, text.as_bytes())
        .map_err(|e| fail(Exit::Unfit, format!("{}: {e}", path.display())))
}

/// Nothing of what an export is made of is there.
fn nothing(what: &str) -> anyhow::Error {
    fail(Exit::Nothing, format!("nothing selected: {what}"))
}
