//! What is kept of a check while it runs: its repro lines, and the tensors of what fails.
//!
//! A kernel may take karat down with it. What was running then stands in `target/karat/running/PID`,
//! one repro line per job: written before a job begins, taken out when it has ended, gone when the run
//! has. The next check says what a dead one left. With `-v` each line also goes to stderr before its
//! job begins.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use benches::{
    evidence::Evidence,
    plan::{Job, Watch},
    report::{Outcome, Row},
};
use golden::recording::serialize;

use crate::{block::Again, files, out};

/// Who is told of the jobs of a check.
pub(crate) struct Watcher {
    /// Memory of this machine in bytes, 0 if it does not tell.
    memory: u64,
    /// What has to be typed to see a job again.
    again: Again,
    /// Whether each job is named on stderr before it runs.
    aloud: bool,
    /// Where the tensors of failing jobs go.
    save: Option<PathBuf>,
    running: Mutex<Running>,
}

struct Running {
    place: PathBuf,
    lines: BTreeSet<String>,
    /// The first file that could not be written.
    lost: Option<String>,
}

/// Files of processes that are no more. Where the system does not list its processes none is known
/// to be dead.
fn left_behind(folder: &Path) -> Vec<(PathBuf, String)> {
    let processes = Path::new("/proc");
    if !processes.join("self").exists() {
        return Vec::new();
    }
    let entries = fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok);
    let dead = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.and_then(|name| name.parse::<u32>().ok())
            .is_some_and(|pid| !processes.join(pid.to_string()).exists())
    };
    entries
        .map(|entry| entry.path())
        .filter(dead)
        .filter_map(|path| fs::read_to_string(&path).ok().map(|text| (path, text)))
        .collect()
}

impl Watcher {
    /// Says what earlier runs were doing that did not live to take it back.
    pub(crate) fn new(memory: u64, again: &Again, out: &out::Out, save: Option<&Path>) -> Watcher {
        let folder = files::cache_dir().join("running");
        for (path, text) in left_behind(&folder) {
            out.note("a run that died had these jobs running:");
            text.lines().for_each(|line| out.note(&format!("  {line}")));
            let _ = fs::remove_file(path);
        }
        let place = folder.join(std::process::id().to_string());
        Watcher {
            memory,
            again: again.clone(),
            aloud: out.verbose,
            save: save.map(Path::to_owned),
            running: Mutex::new(Running { place, lines: BTreeSet::new(), lost: None }),
        }
    }

    /// Takes the repro lines back, and says which file could not be written, if one could not.
    pub(crate) fn end(self) -> Option<String> {
        let running = self.running.into_inner().unwrap_or_else(PoisonError::into_inner);
        let _ = fs::remove_file(&running.place);
        running.lost
    }

    /// Changes the lines and writes them down. That they cannot be written stops no check.
    fn change(&self, change: impl FnOnce(&mut BTreeSet<String>)) {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut running.lines);
        let mut text = running.lines.iter().map(String::as_str).collect::<Vec<_>>().join("\n");
        text.push('\n');
        let _ = files::jot(&running.place, text.as_bytes());
    }

    /// Writes the tensors of a job that did not pass.
    pub(crate) fn save(&self, row: &Row, evidence: &Evidence) {
        let Some(dir) = &self.save else { return };
        if evidence.tensors.is_empty() {
            return;
        }
        let path = dir.join(format!("{}.safetensors", file_name(&row.id())));
        if let Err(error) = write(&path, row, &self.again.typed(&row.id()), evidence) {
            let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
            running.lost.get_or_insert(format!("{}: {error}", path.display()));
        }
    }

    /// Whether a job that does not pass leaves its tensors.
    pub(crate) fn saves(&self) -> bool {
        self.save.is_some()
    }

    /// Names a job before it runs.
    pub(crate) fn begin(&self, id: &str) {
        let line = self.again.typed(id);
        if self.aloud {
            out::warn(&line);
        }
        self.change(|lines| {
            lines.insert(line);
        });
    }

    /// Takes it back.
    pub(crate) fn done(&self, id: &str) {
        let line = self.again.typed(id);
        self.change(|lines| {
            lines.remove(&line);
        });
    }
}

impl Watch for Watcher {
    fn screen(&self, job: &Job) -> Option<Row> {
        too_large(job, self.memory)
    }

    fn begins(&self, job: &Job) {
        self.begin(&job.id());
    }

    fn ends(&self, job: &Job) {
        self.done(&job.id());
    }

    fn keeps(&self) -> bool {
        self.saves()
    }

    fn keep(&self, _: &Job, row: &Row, evidence: &Evidence) {
        self.save(row, evidence);
    }
}

/// A problem that this machine has no memory for, skipped before it runs: inputs and outputs are held
/// in f32 and in f64 at once.
fn too_large(job: &Job, memory: u64) -> Option<Row> {
    let needed = job.parsed.cost.bytes.saturating_mul(4);
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    (memory != 0 && memory < needed).then(|| {
        let why = format!("needs {:.1} GiB, this machine has {:.1}", gib(needed), gib(memory));
        Row::new(job.entry.name(), &job.spec, &job.variant, Outcome::Skipped(why), Duration::ZERO)
    })
}

/// An id as the name of a file.
fn file_name(id: &str) -> String {
    id.chars()
        .map(|c| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '+' })
        .collect()
}

/// Writes beside the place and renames.
fn write(path: &Path, row: &Row, repro: &str, evidence: &Evidence) -> io::Result<()> {
    let id = row.id();
    let metadata = [
        ("case", &*id),
        ("outcome", row.outcome.name()),
        ("repro", repro),
        ("version", env!("CARGO_PKG_VERSION")),
    ];
    let data = serialize(&evidence.tensors, &metadata).map_err(io::Error::other)?;
    files::replace(path, &data)
}

#[cfg(test)]
mod tests {
    use benches::{filter::Filter, plan::plan};
    use golden::Set;

    use super::{file_name, too_large};

    #[test]
    fn a_problem_beyond_the_memory_is_skipped_with_both_sizes() {
        let word = "linear/N16777216-M64-D64@reference/f32".to_owned();
        let filter = Filter::new(&[word], None).unwrap();
        let jobs = plan(Set::Smoke, &filter, None).unwrap();
        let row = too_large(&jobs[0], 8 << 30).unwrap();
        assert_eq!(row.outcome.name(), "skipped");
        assert_eq!(row.outcome.why(), Some("needs 32.0 GiB, this machine has 8.0"));
        assert!(too_large(&jobs[0], 64 << 30).is_none());
        // A machine that does not tell is tried.
        assert!(too_large(&jobs[0], 0).is_none());
    }

    #[test]
    fn an_id_names_a_file() {
        assert_eq!(
            file_name("l2_norm/N3-D8;dtype=bf16@cpu/portable"),
            "l2_norm+N3-D8+dtype+bf16+cpu+portable"
        );
    }
}
