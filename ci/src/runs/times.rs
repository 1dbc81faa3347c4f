//! Files of which times are compared: one machine's, whole, each case once.

use std::path::Path;

use super::{
    Damage, Results,
    rows::{Env, OpSpeed, Past},
};
use crate::exit::refuse;

/// Times of ops as `karat bench` and `karat baseline` write them.
pub(crate) struct Times {
    /// What the file is called, for what has to be said of it.
    pub(crate) name: String,
    /// The machine.
    pub(crate) env: Env,
    pub(crate) rows: Vec<OpSpeed>,
    /// Its lines, as they stand there.
    pub(crate) lines: Vec<String>,
}

/// A file, and its lines.
fn read(path: &Path) -> anyhow::Result<(Results, Vec<String>)> {
    let (mut results, mut lines) = (Results::default(), Vec::new());
    results.add(path, Damage::Fatal, &mut |line| lines.push(line.to_owned()))?;
    Ok((results, lines))
}

impl Times {
    /// Reads a file.
    ///
    /// # Errors
    /// One line: file, line, what is wrong.
    pub(crate) fn read(path: &Path) -> anyhow::Result<Times> {
        let name = path.display().to_string();
        let (mut results, lines) = read(path)?;
        let wrong = |why: String| Err(refuse(format!("{name}: {why}")));
        let n = lines.len();
        let [run] = &mut results.runs[..] else {
            return wrong(format!("has {} runs, expected one", results.runs.len()));
        };
        let rows = results.op_speeds;
        let Some(summary) = run.summary else {
            return wrong(format!("ends without its summary: it is cut off after {n} lines"));
        };
        if let Some(told) = summary.rows.filter(|&told| told != rows.len() as u64) {
            return wrong(format!("{} rows, its summary says {told}", rows.len()));
        }
        let env = std::mem::take(&mut run.env);
        if env.fingerprint.is_empty() {
            return wrong("no line says of which machine these results are (kind env)".to_owned());
        }
        for row in &rows {
            let why = match row.checked.as_deref() {
                None => "no checked",
                Some("passed") if row.samples_ns.is_empty() => "passed, and has no samples",
                Some(_) => continue,
            };
            return Err(refuse(format!("{name}:{}: {}: {why}", row.line, row.case)));
        }
        Ok(Times { name, env, rows, lines })
    }
}

/// Reads what `karat history` keeps, and nothing else.
///
/// # Errors
/// One line: file, line, what is wrong.
pub(crate) fn history(path: &Path) -> anyhow::Result<Vec<Past>> {
    let (results, lines) = read(path)?;
    // Both are in the order of the file.
    let mut known = results.past.iter().map(|past| past.line as usize).peekable();
    let strange = (1..=lines.len()).find(|at| known.next_if_eq(at).is_none());
    if let Some(at) = strange {
        let want = "expected kind history with case, rev, fingerprint and median_ns above 0";
        return Err(refuse(format!("{}:{at}: {want}", path.display())));
    }
    Ok(results.past)
}
