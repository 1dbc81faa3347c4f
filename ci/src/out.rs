//! Where words go: answers to stdout, everything else to stderr.

use std::{
    io::{self, IsTerminal, Write},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use comfy_table::{ContentArrangement, Table, presets::UTF8_FULL_CONDENSED};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

use crate::record::Record;

/// Set by Ctrl-C; long work looks at it and ends.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Whether Ctrl-C was pressed.
pub(crate) fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Listens to Ctrl-C; the second one ends the process at once.
pub(crate) fn listen() {
    // Without a handler Ctrl-C still ends the process: no reason to refuse to run.
    let _ = ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
    });
}

/// How answers are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// For people.
    Human,
    /// Exactly one JSON object per line.
    Jsonl,
    /// Markdown; of `karat support`.
    Md,
}

/// The two streams.
#[derive(Debug)]
pub(crate) struct Out {
    /// How answers are written.
    pub(crate) format: Format,
    /// Whether remarks are left out.
    pub(crate) quiet: bool,
    /// Whether more is said.
    pub(crate) verbose: bool,
    /// Whether bars are drawn where there is a terminal.
    pub(crate) progress: bool,
    /// Where rows go beside standard output.
    pub(crate) record: Record,
}

impl Out {
    /// A line of the answer, for people.
    pub(crate) fn line(&self, text: &str) {
        if self.format == Format::Human {
            print(&format!("{text}\n"));
        }
    }

    /// A piece of the answer without an end of line.
    pub(crate) fn text(&self, text: &str) {
        if self.format == Format::Human {
            print(text);
        }
    }

    /// A table of the answer, for people.
    pub(crate) fn table(&self, head: &[&str], rows: &[Vec<String>]) {
        if self.format == Format::Human {
            let mut table = Table::new();
            table
                .load_style(UTF8_FULL_CONDENSED)
                .set_content_arrangement(ContentArrangement::Dynamic);
            table.set_header(head).add_rows(rows);
            print(&format!("{table}\n"));
        }
    }

    /// A table of the answer as Markdown.
    pub(crate) fn markdown(&self, head: &[&str], rows: &[Vec<String>]) {
        if self.format == Format::Md {
            let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
            let head: Vec<String> = head.iter().map(|&cell| cell.to_owned()).collect();
            let rule = vec!["---".to_owned(); head.len()];
            let rows: String = rows.iter().map(|row| line(row)).collect();
            print(&format!("{}{}{rows}", line(&head), line(&rule)));
        }
    }

    /// An object of the answer, for programs.
    pub(crate) fn json(&self, value: &Value) {
        if self.record.wants(self.format == Format::Jsonl) {
            self.record.take(value, &mut |line| self.row(line));
        }
    }

    /// An object of the answer as an earlier run wrote it.
    pub(crate) fn again(&self, line: &str) {
        if self.record.wants(self.format == Format::Jsonl) {
            self.record.take_line(line, &mut |line| self.row(line));
        }
    }

    /// The end of the rows: how it all ended.
    ///
    /// # Errors
    /// What could not be written, and where.
    pub(crate) fn end(&self, row: &Value, over: bool) -> Result<(), String> {
        self.record.end(row, over, &mut |line| self.row(line))
    }

    fn row(&self, line: &str) {
        if self.format == Format::Jsonl {
            print(&format!("{line}\n"));
        }
    }

    /// A remark.
    pub(crate) fn note(&self, text: &str) {
        if !self.quiet {
            warn(text);
        }
    }

    /// A bar for work of `total` steps; silent where nobody watches.
    pub(crate) fn bar(&self, total: u64, what: &str, bytes: bool) -> ProgressBar {
        if !self.progress || self.quiet || !io::stderr().is_terminal() {
            return ProgressBar::hidden();
        }
        let template = if bytes {
            "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}"
        } else {
            "{msg} {wide_bar} {pos}/{len} {eta}"
        };
        let bar = ProgressBar::new(total).with_message(what.to_owned());
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar
    }
}

/// A line on stderr, whatever was asked.
pub(crate) fn warn(text: &str) {
    // A closed stderr is nobody's error.
    let _ = writeln!(io::stderr(), "{text}");
}

/// What went wrong on stdout first, a reader that has gone away aside.
static STDOUT: Mutex<Result<(), io::Error>> = Mutex::new(Ok(()));

/// Why some of the answer is lost, if it is. That nobody reads on (`| head`) is no loss.
pub(crate) fn lost() -> Option<String> {
    let state = STDOUT.lock().unwrap_or_else(PoisonError::into_inner);
    match &*state {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Some(error.to_string()),
        _ => None,
    }
}

/// Text on stdout. After the first failure nothing more is written, but the work goes on: its exit
/// code is an answer too, and must not turn green because nobody reads the other one.
fn print(text: &str) {
    let mut state = STDOUT.lock().unwrap_or_else(PoisonError::into_inner);
    if state.is_ok() {
        let mut out = io::stdout().lock();
        *state = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    }
}
