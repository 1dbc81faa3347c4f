//! GitHub Actions: annotations, and the summary of a step.

use std::{fs::OpenOptions, io::Write, path::Path};

use super::markdown;
use crate::{
    runs::{Results, rows::Judged},
    words,
};

/// A step shows no more of them.
const MOST: usize = 10;

/// One annotation a line; where there are too many, the last says how many are left out.
pub(crate) fn text(results: &Results) -> String {
    let mut all = Vec::new();
    for row in results.judged.iter().filter(|row| row.is_red()) {
        let title = format!("{} {}", row.outcome, row.case);
        let told = format!("{}\n{}", words::first(row), row.typed());
        all.push(annotation("error", file(row).as_deref(), &title, &told));
    }
    for row in results.verified.iter().filter(|row| row.ok == Some(false)) {
        let title = format!("failed {}", words::verified(row));
        all.push(annotation("error", None, &title, &words::recorded(row)));
    }
    for row in results.gated.iter().filter(|row| row.verdict == "slower") {
        all.push(annotation("error", None, &format!("slower {}", row.case), &words::gated(row)));
    }
    for row in results.judged.iter().filter(|row| row.is_flaky()) {
        let told = format!("passed in attempt {}\n{}", 1 + row.earlier.len(), row.typed());
        all.push(annotation(
            "warning",
            file(row).as_deref(),
            &format!("flaky {}", row.case),
            &told,
        ));
    }
    for lost in &results.lost {
        all.push(annotation("error", None, "results are not whole", lost));
    }
    if MOST < all.len() {
        let more = all.len() - (MOST - 1);
        all.truncate(MOST - 1);
        let told = format!("{more} more are in the summary of this step and in the report");
        all.push(annotation("error", None, "more", &told));
    }
    all.into_iter().flat_map(|line| [line, "\n".to_owned()]).collect()
}

/// Where a kernel stands, if it stands below the current folder.
fn file(row: &Judged) -> Option<String> {
    let (device, _) = row.variant.split_once('/')?;
    let op = row.of();
    let place = match device {
        "reference" => format!("reference/src/{op}.rs"),
        "cpu" | "cuda" => format!("optimized/src/{device}/{op}.rs"),
        "foreign" => {
            let repro = row.repro.as_deref()?;
            let (_, file) = repro.split_once("--kernel ")?;
            file.split(' ').next()?.trim_matches('\'').to_owned()
        }
        _ => return None,
    };
    Path::new(&place).is_file().then_some(place)
}

fn annotation(level: &str, file: Option<&str>, title: &str, told: &str) -> String {
    let place = file.map_or(String::new(), |file| format!("file={},line=1,", property(file)));
    format!("::{level} {place}title={}::{}", property(title), data(told))
}

/// As the runner reads the text of a command.
fn data(text: &str) -> String {
    text.replace('%', "%25").replace('\r', "%0D").replace('\n', "%0A")
}

/// As the runner reads a property of a command.
fn property(text: &str) -> String {
    data(text).replace(':', "%3A").replace(',', "%2C")
}

/// Adds the summary to that of the step, if this is one.
pub(crate) fn summarize(results: &Results) -> Result<(), String> {
    let Some(path) = std::env::var_os("GITHUB_STEP_SUMMARY").filter(|path| !path.is_empty()) else {
        return Ok(());
    };
    let shown = Path::new(&path).display().to_string();
    let file = OpenOptions::new().append(true).create(true).open(&path);
    let text = markdown::text(results);
    file.and_then(|mut file| file.write_all(text.as_bytes())).map_err(|e| format!("{shown}: {e}"))
}
