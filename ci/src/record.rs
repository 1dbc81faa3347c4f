//! The rows of a run, beside those that are printed: written to a file as they come, and kept for what is
//! made of them at the end.
//!
//! A file of results is whole or is not there: rows go to `FILE.part`, which is renamed when the run has
//! ended. What an interrupted run leaves there is what `--resume` goes on with.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use serde_json::Value;

/// Where rows go beside standard output.
#[derive(Debug)]
pub(crate) struct Record(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// What a run begins with, until it has begun.
    head: Option<Value>,
    begun: bool,
    place: Option<PathBuf>,
    file: Option<File>,
    /// Whether rows still go to the file.
    filed: bool,
    /// The first row that could not be written.
    lost: Option<String>,
    keep: bool,
    kept: Vec<String>,
}

/// Where rows stand until the run has ended.
pub(crate) fn part(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".part");
    name.into()
}

impl Record {
    /// Of a run that begins with `head`; its rows also go to `place`.
    pub(crate) fn new(head: Option<Value>, place: Option<PathBuf>) -> Record {
        Record(Mutex::new(State { head, place, filed: true, ..State::default() }))
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps rows from now on, for [`Record::kept`].
    pub(crate) fn keep(&self) {
        self.state().keep = true;
    }

    /// Also writes them to a file, if nobody said where yet.
    pub(crate) fn also(&self, place: &Path) {
        self.state().place.get_or_insert_with(|| place.to_owned());
    }

    /// The rows that were kept, one a line.
    pub(crate) fn kept(&self) -> String {
        self.state().kept.join("\n")
    }

    /// Whether there was a row.
    pub(crate) fn begun(&self) -> bool {
        self.state().begun
    }

    /// Whether anybody wants rows, printed or not.
    pub(crate) fn wants(&self, printed: bool) -> bool {
        let state = self.state();
        printed || state.keep || state.place.is_some()
    }

    /// Takes a row; `print` is handed every line that is to be printed.
    pub(crate) fn take(&self, row: &Value, print: &mut dyn FnMut(&str)) {
        let mut state = self.state();
        state.begun = true;
        if let Some(head) = state.head.take() {
            state.line(&head.to_string(), print);
        }
        state.line(&row.to_string(), print);
    }

    /// Takes a row of an earlier run as it was written.
    pub(crate) fn take_line(&self, line: &str, print: &mut dyn FnMut(&str)) {
        let mut state = self.state();
        state.begun = true;
        if let Some(head) = state.head.take() {
            state.line(&head.to_string(), print);
        }
        state.line(line, print);
    }

    /// The run says itself what it begins with.
    pub(crate) fn without_head(&self) -> Option<Value> {
        self.state().head.take()
    }

    /// Ends the run with `row`, if it began or if a file has to say that it did not. The file gets its
    /// name only if the run is `over`, and not if it was interrupted.
    ///
    /// # Errors
    /// What could not be written, and where.
    pub(crate) fn end(
        &self,
        row: &Value,
        over: bool,
        print: &mut dyn FnMut(&str),
    ) -> Result<(), String> {
        let (begun, filed) = {
            let state = self.state();
            (state.begun, state.place.is_some())
        };
        // An interrupted file goes on: its end is still to come.
        self.state().filed = over;
        if begun {
            self.take(row, print);
        } else if filed {
            self.take(row, &mut |_| ());
        }
        let mut state = self.state();
        let Some(place) = state.place.take() else { return Ok(()) };
        let file = state.file.take();
        if let Some(lost) = state.lost.take() {
            return Err(lost);
        }
        let Some(file) = file.filter(|_| over) else { return Ok(()) };
        let named = file.sync_all().and_then(|()| fs::rename(part(&place), &place));
        named.map_err(|e| format!("{}: {e}", place.display()))
    }
}

impl State {
    fn line(&mut self, line: &str, print: &mut dyn FnMut(&str)) {
        print(line);
        if self.keep {
            self.kept.push(line.to_owned());
        }
        if self.filed
            && self.lost.is_none()
            && let Some(place) = self.place.clone()
            && let Err(e) = self.write(&place, line)
        {
            self.lost = Some(format!("{}: {e}", part(&place).display()));
        }
    }

    fn write(&mut self, place: &Path, line: &str) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            none => {
                let part = part(place);
                if let Some(folder) = part.parent() {
                    fs::create_dir_all(folder)?;
                }
                none.insert(File::create(part)?)
            }
        };
        file.write_all(format!("{line}\n").as_bytes())
    }
}
