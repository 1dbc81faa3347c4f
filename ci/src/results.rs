//! Files of results, read back: every line is whole, of a schema that is known, and says what it should.

use std::{collections::BTreeSet, path::Path};

use serde_json::Value;

use crate::exit::refuse;

/// Lines of results, each with its number.
pub(crate) struct Results {
    /// What the file is called, for what has to be said of it.
    pub(crate) name: String,
    pub(crate) lines: Vec<(usize, Value)>,
}

/// The schema of lines.
const LINES: &str = "karat.result/";
/// The number behind it that is known.
const KNOWN: u64 = 1;

impl Results {
    /// Reads a file of results.
    ///
    /// # Errors
    /// One line: file, line, what is wrong.
    pub(crate) fn read(path: &Path) -> anyhow::Result<Results> {
        let results = Results::lines(path)?;
        results.whole()?;
        Ok(results)
    }

    /// Reads a file of lines that has no summary.
    ///
    /// # Errors
    /// One line: file, line, what is wrong.
    pub(crate) fn lines(path: &Path) -> anyhow::Result<Results> {
        let name = path.display().to_string();
        let text = golden::file::text(path).map_err(|e| refuse(format!("{name}: {e}")))?;
        let mut lines = Vec::new();
        for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let at = format!("{name}:{}", i + 1);
            let value: Value = serde_json::from_str(line).map_err(|e| {
                let cut = e.is_eof() || !text.ends_with('\n') && i + 1 == text.lines().count();
                let why = if cut { "the line is cut off".to_owned() } else { e.to_string() };
                refuse(format!("{at}: {why}, expected one object per line"))
            })?;
            let schema = value["schema"].as_str().unwrap_or_default();
            match schema.strip_prefix(LINES).map(str::parse::<u64>) {
                Some(Ok(KNOWN)) => {}
                Some(Ok(newer)) if KNOWN < newer => {
                    let known = format!("this karat knows {LINES}{KNOWN}");
                    return Err(refuse(format!("{at}: schema {schema} is newer: {known}")));
                }
                _ => {
                    let want = format!("expected {LINES}{KNOWN}");
                    return Err(refuse(format!("{at}: schema {schema:?}, {want}")));
                }
            }
            lines.push((i + 1, value));
        }
        Ok(Results { name, lines })
    }

    /// Whether it ends as results end, with a summary of as many rows as there are.
    fn whole(&self) -> anyhow::Result<()> {
        // Behind the summary stands the end of the run, if a run wrote it.
        let mut lines = self.lines.iter().map(|(_, line)| line).rev();
        let Some(last) = lines.find(|line| line["kind"] != "end") else {
            return Err(refuse(format!("{}: has no results", self.name)));
        };
        if last["kind"] != "summary" {
            let lines = self.lines.len();
            let why = "ends without its summary: it is cut off";
            return Err(refuse(format!("{}: {why} after {lines} lines", self.name)));
        }
        let rows = self.lines.iter().filter(|(_, line)| line["case"].is_string()).count();
        match last["rows"].as_u64() {
            Some(told) if told != rows as u64 => {
                let why = format!("{rows} rows, its summary says {told}");
                Err(refuse(format!("{}: {why}", self.name)))
            }
            _ => Ok(()),
        }
    }

    /// What a line of the file is refused for.
    pub(crate) fn wrong(&self, line: usize, why: impl std::fmt::Display) -> anyhow::Error {
        refuse(format!("{}:{line}: {why}", self.name))
    }

    /// The line that says of which machine they are.
    pub(crate) fn machine(&self) -> anyhow::Result<&Value> {
        let found = self.lines.iter().find(|(_, line)| line["fingerprint"].is_string());
        let why = "no line says of which machine these results are (kind env)";
        found.map(|(_, line)| line).ok_or_else(|| refuse(format!("{}: {why}", self.name)))
    }

    /// Rows of a kind, none of them of the same case.
    pub(crate) fn rows(&self, kind: &str) -> anyhow::Result<Vec<Timed<'_>>> {
        let mut seen = BTreeSet::new();
        let mut rows = Vec::new();
        let of_kind =
            |(_, line): &&(usize, Value)| line["kind"] == kind && line["case"].is_string();
        for (at, line) in self.lines.iter().filter(of_kind) {
            let case = line["case"].as_str().unwrap_or_default();
            if !seen.insert(case) {
                return Err(self.wrong(*at, format!("a second row of {case}")));
            }
            rows.push(self.timed(*at, case, line)?);
        }
        Ok(rows)
    }

    fn timed<'a>(&self, at: usize, case: &'a str, row: &'a Value) -> anyhow::Result<Timed<'a>> {
        let samples = row["samples_ns"].as_array();
        let samples = samples.ok_or_else(|| self.wrong(at, format!("{case}: no samples_ns")))?;
        let mut ns = Vec::with_capacity(samples.len());
        for (i, sample) in samples.iter().enumerate() {
            let time = sample.as_f64().filter(|ns| ns.is_finite() && 0.0 < *ns);
            let what = || format!("{case}: samples_ns[{i}] is {sample}, expected a time above 0");
            ns.push(time.ok_or_else(|| self.wrong(at, what()))?);
        }
        let checked = row["checked"].as_str();
        let checked = checked.ok_or_else(|| self.wrong(at, format!("{case}: no checked")))?;
        if checked == "passed" && ns.is_empty() {
            return Err(self.wrong(at, format!("{case}: passed, and has no samples")));
        }
        Ok(Timed { case, checked, ns, row })
    }
}

/// A row with times.
pub(crate) struct Timed<'a> {
    pub(crate) case: &'a str,
    /// The outcome's name.
    pub(crate) checked: &'a str,
    /// Nanoseconds of a call.
    pub(crate) ns: Vec<f64>,
    /// All of it.
    pub(crate) row: &'a Value,
}
