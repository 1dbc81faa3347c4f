//! What a run tells beside its answer: files for other tools, annotations, a report.

use std::path::PathBuf;

use crate::{
    exit::{Exit, fail},
    export::{badge, github, junit, markdown, write},
    out::{self, Out},
    report,
    runs::Results,
};

#[derive(Debug, clap::Args)]
pub(crate) struct Told {
    /// Also write JUnit XML
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// Also annotate, ten lines at most on stderr, and add to the summary of the step of GitHub Actions
    #[arg(long)]
    github: bool,
    /// Also write a summary in Markdown
    #[arg(long, value_name = "FILE")]
    summary: Option<PathBuf>,
    /// Also write an SVG badge
    #[arg(long, value_name = "FILE")]
    badge: Option<PathBuf>,
    /// Also write the report: one HTML file
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

impl Told {
    /// Whether rows are needed at the end.
    pub(crate) fn any(&self) -> bool {
        let files = [&self.junit, &self.summary, &self.badge, &self.report];
        self.github || files.iter().any(|file| file.is_some())
    }

    /// Before the first row.
    pub(crate) fn begin(&self, out: &Out) {
        if self.any() {
            out.record.keep();
        }
    }

    /// After the last.
    pub(crate) fn end(&self, exit: Exit, out: &Out) -> anyhow::Result<()> {
        if !self.any() {
            return Ok(());
        }
        let results = Results::of_text(&out.record.kept(), exit)?;
        if let Some(path) = &self.junit {
            write(path, &junit::text(&results)?)?;
        }
        if let Some(path) = &self.summary {
            write(path, &markdown::text(&results))?;
        }
        if let Some(path) = &self.badge {
            write(path, &badge::text(&results))?;
        }
        if let Some(path) = &self.report {
            write(path, &report::page(&results, None))?;
        }
        if self.github {
            let text = github::text(&results);
            text.lines().for_each(out::warn);
            github::summarize(&results).map_err(|line| fail(Exit::Unfit, line))?;
        }
        Ok(())
    }
}
