//! Foreign kernels: judged like any variant, run in a process of their own.
//!
//! A [`Kernel`] is a `kernel.toml` with the processes that run it: `karat child`, this same program,
//! which opens the door and answers one job after another. A segfault, a hang or memory without end
//! ends one job; the next one gets a fresh process.

mod bundle;
pub mod child;
mod far;
mod guest;
mod remote;
mod verdict;

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use golden::{Claims, Dtype, Plan, Set};
pub use optimized::doors::{Constraints, Entrance, Manifest, scaffold};
use serde_json::{Value, json};

use self::guest::{Ended, Guest};
pub(crate) use self::{
    far::Far,
    remote::{Remote, ended},
    verdict::outcome,
};
use crate::{
    filter::{Filter, Subject},
    plan::{Job, spelled},
    registry::{self, Entry, Parsed, ops},
    report::Outcome,
};

/// How foreign code is kept apart. Paths and limits are chosen by the command line.
#[derive(Clone, Debug)]
pub struct Isolation {
    /// This program.
    pub exe: PathBuf,
    /// The Python that `{python}` stands for.
    pub python: String,
    /// Variables that the processes get besides the inherited ones.
    pub variables: Vec<(&'static str, OsString)>,
    /// The most time one job may take.
    pub timeout: Duration,
    /// The most memory one job may take beyond its inputs and outputs, in bytes; for those there are
    /// whole quarters of it.
    pub memory: u64,
}

/// A kernel that cannot be used.
#[derive(Clone, Debug)]
pub enum Unusable {
    /// Its description, or how it is called, is wrong. One line; what a compiler said may follow.
    Refused(String),
    /// Its process died, or hung, when it was opened.
    Died(String),
}

/// A foreign kernel, opened once.
#[derive(Debug)]
pub struct Kernel {
    /// What it says of itself.
    pub manifest: Manifest,
    /// Why this machine cannot run it, if so.
    pub unfit: Option<String>,
    isolation: Isolation,
    idle: Mutex<Vec<Guest>>,
    started: AtomicUsize,
    folder: tempfile::TempDir,
}

/// What came of asking a kernel.
pub(crate) enum Said {
    /// Tensors, as safetensors.
    Answers(Vec<u8>),
    /// It did what an honest kernel would not.
    Cheat(String),
    /// What it left may be of an earlier call.
    Mistrusted(String),
    /// It died or gave no answer.
    Died(String),
    /// It cannot be called.
    Refused(String),
    /// It can be called, and not be timed.
    Unsupported(String),
    /// It did not end in time.
    Timeout,
}

impl Said {
    /// What a reply is that is none of those wished for.
    fn instead(said: &Value, guest: &Guest) -> Said {
        let why = said["why"].as_str().unwrap_or_default().to_owned();
        match said["said"].as_str() {
            Some("cheat") => Said::Cheat(why),
            Some("mistrusted") => Said::Mistrusted(why),
            Some("refused") => Said::Refused(why),
            Some("unsupported") => Said::Unsupported(why),
            _ => Said::Died(guest.with_last_words(why)),
        }
    }

    /// The answers, or what it came to instead.
    pub(crate) fn answers(self) -> Result<Vec<u8>, Outcome> {
        Err(match self {
            Said::Answers(answers) => return Ok(answers),
            Said::Cheat(why) => Outcome::Cheat(why),
            Said::Mistrusted(why) => Outcome::Mistrusted(why),
            Said::Died(why) => Outcome::Crashed(why),
            Said::Refused(why) => Outcome::Error(why),
            Said::Unsupported(why) => Outcome::Unsupported(why),
            Said::Timeout => Outcome::Timeout,
        })
    }
}

/// What a kernel is asked.
pub(crate) struct Question<'a> {
    pub(crate) op: &'a str,
    pub(crate) spec: &'a str,
    /// Bytes that the problem moves.
    pub(crate) bytes: u64,
    /// Inputs, as a bundle, to be answered once; without them those of the spec are drawn, and it is
    /// watched as somebody whom nobody knows.
    pub(crate) inputs: Option<&'a [u8]>,
    /// With how many threads, where that is asked too.
    pub(crate) threads: Option<usize>,
}

impl Kernel {
    /// Reads a `kernel.toml`, builds what it says is to be built, and opens the door once.
    ///
    /// # Errors
    /// If it cannot be used.
    pub fn open(file: &Path, isolation: Isolation) -> Result<Kernel, Unusable> {
        let ops = |name: &str| registry::op(name).map(Entry::known);
        let manifest = Manifest::read(file, &ops).map_err(Unusable::Refused)?;
        let told = |why: String| Unusable::Refused(format!("{}: {why}", file.display()));
        for op in &manifest.implements {
            // Its weights are a checkpoint, which no door hands over.
            if op == "model" {
                return Err(told("implements: model is no kernel".to_owned()));
            }
            if !fits(&manifest, op) {
                let constraints = &manifest.constraints;
                return Err(told(format!(
                    "[constraints] impossible: no problem of {op} has {constraints}"
                )));
            }
        }
        build(&manifest).map_err(told)?;
        let folder = tempfile::tempdir().map_err(|e| told(format!("temporary folder: {e}")))?;
        let mut kernel = Kernel {
            manifest,
            unfit: None,
            isolation,
            idle: Mutex::default(),
            started: AtomicUsize::new(0),
            folder,
        };
        let (guest, ready) = kernel.start(kernel.stepped(0), None).map_err(|ended| {
            let file = file.display();
            Unusable::Died(match ended {
                Ended::Timeout => format!("{file}: did not open in time"),
                Ended::Died(why) => format!("{file}: {why}"),
            })
        })?;
        let why = |ready: &Value| ready["why"].as_str().unwrap_or_default().to_owned();
        match ready["door"].as_str() {
            Some("open") => kernel.put_back(guest),
            Some("unfit") => kernel.unfit = Some(why(&ready)),
            Some("refused") => return Err(told(why(&ready))),
            _ => {
                let why = guest.with_last_words(why(&ready));
                return Err(Unusable::Died(format!("{}: {why}", file.display())));
            }
        }
        Ok(kernel)
    }

    /// `foreign/<name>`.
    pub fn variant(&self) -> String {
        optimized::doors::variant(&self.manifest)
    }

    /// What it promises.
    pub fn claims(&self) -> Claims {
        self.manifest.claims
    }

    /// How it rounds.
    pub fn plan(&self, dtype: Dtype) -> Plan {
        self.manifest.plan(dtype)
    }

    /// Those problems of an op, each made one that it takes where it is not, none of them twice.
    pub(crate) fn problems(
        &self,
        entry: &'static dyn Entry,
        specs: Vec<String>,
    ) -> impl Iterator<Item = String> {
        let mut known = std::collections::HashSet::new();
        let adapted =
            |spec: String| adapted(&self.manifest.constraints, entry, &spec).unwrap_or(spec);
        specs.into_iter().map(adapted).filter(move |spec| known.insert(spec.clone()))
    }

    /// Whether it computes an op, on the device that is meant.
    pub(crate) fn implements(&self, entry: &dyn Entry, device: Option<&str>) -> bool {
        self.manifest.implements.iter().any(|op| op == entry.name())
            && device.is_none_or(|device| device == self.manifest.device())
    }

    /// Why it does not take a problem, if so.
    pub fn refuses(&self, sizes: &[(&'static str, usize)], dtype: Dtype) -> Option<String> {
        self.manifest.constraints.refuse(sizes, dtype)
    }

    /// Asks for an answer.
    pub(crate) fn ask(&self, question: &Question<'_>) -> Said {
        let &Question { op, spec, bytes, inputs, threads } = question;
        // Two draws of the inputs in two memories, their images and the outputs.
        let answered = self.guest(16 * bytes, threads).and_then(|mut guest| {
            let file = guest.file.clone();
            let sent = inputs.map(|inputs| {
                let sent = file.with_extension("inputs");
                fs::write(&sent, inputs).map(|()| sent)
            });
            let sent = sent.transpose().map_err(|e| Ended::Died(format!("inputs: {e}")))?;
            let said = guest.ask(&json!({"op": op, "spec": spec, "file": file, "inputs": sent}))?;
            Ok((guest, said))
        });
        let (guest, said) = match answered {
            Ok(answered) => answered,
            Err(Ended::Timeout) => return Said::Timeout,
            Err(Ended::Died(why)) => return Said::Died(why),
        };
        if said["said"] != "answers" {
            return Said::instead(&said, &guest);
        }
        match fs::read(&guest.file) {
            Ok(answers) => {
                // Whoever did no harm is asked again.
                self.put_back(guest);
                Said::Answers(answers)
            }
            Err(e) => Said::Died(format!("{}: {e}", guest.file.display())),
        }
    }

    /// A process that has room for so many bytes of inputs and outputs, and takes so many threads: one that is idle, or
    /// a new one.
    fn guest(&self, bytes: u64, threads: Option<usize>) -> Result<Guest, Ended> {
        let limit = self.stepped(bytes);
        let fits = |guest: &Guest| limit <= guest.limit && threads == guest.threads;
        let idle = {
            let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
            idle.iter().rposition(fits).map(|at| idle.remove(at))
        };
        if let Some(guest) = idle {
            return Ok(guest);
        }
        let (guest, ready) = self.start(limit, threads)?;
        if ready["door"] == "open" {
            return Ok(guest);
        }
        let why = ready["why"].as_str().unwrap_or_default().to_owned();
        Err(Ended::Died(guest.with_last_words(why)))
    }

    /// The most memory that a job with so many bytes of inputs and outputs may take: in steps, as a process keeps its
    /// limit, and one that imports for half a minute is to serve more than one size.
    fn stepped(&self, bytes: u64) -> u64 {
        let memory = self.isolation.memory;
        let step = (memory / 4).max(1);
        memory + bytes.div_ceil(step).max(1) * step
    }

    fn put_back(&self, guest: Guest) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(guest);
    }

    fn start(&self, limit: u64, threads: Option<usize>) -> Result<(Guest, Value), Ended> {
        let number = self.started.fetch_add(1, Ordering::Relaxed);
        let file = self.folder.path().join(format!("{number}.safetensors"));
        Guest::start(&self.isolation, &self.manifest.file, limit, threads, file)
    }
}

/// A problem, and the kernel that takes it.
pub(crate) type Taken = (&'static dyn Entry, Parsed, Arc<Kernel>);

/// Of every op that one of these kernels computes: those of its problems that it takes, or that are made
/// so that it does.
///
/// # Errors
/// If a problem is none of its op.
pub(crate) fn problems(
    kernels: &[Arc<Kernel>],
    device: Option<&str>,
    specs: &dyn Fn(&dyn Entry) -> Vec<String>,
) -> Result<Vec<Taken>, String> {
    let mut all = Vec::new();
    for kernel in kernels {
        for &entry in ops().iter().filter(|&&entry| kernel.implements(entry, device)) {
            for spec in kernel.problems(entry, specs(entry)) {
                all.push((entry, entry.parse(&spec)?, kernel.clone()));
            }
        }
    }
    Ok(all)
}

/// Whether some problem of an op can be made one that the kernel takes.
fn fits(manifest: &Manifest, op: &str) -> bool {
    let Some(entry) = registry::op(op) else { return false };
    entry
        .specs(Set::Nightly)
        .iter()
        .any(|spec| adapted(&manifest.constraints, entry, spec).is_some())
}

/// The problem of the op nearest to `spec` that the constraints allow.
pub fn adapted(constraints: &Constraints, entry: &dyn Entry, spec: &str) -> Option<String> {
    let parsed = entry.parse(spec).ok()?;
    let dtype: Dtype = parsed.dtype.parse().ok()?;
    let problem = |sizes: &[(&'static str, usize)], dtype: Dtype| {
        let sizes: Vec<_> = sizes.iter().map(|(letter, size)| format!("{letter}{size}")).collect();
        let text =
            format!("{};dtype={dtype};fill={};seed={}", sizes.join("-"), parsed.fill, parsed.seed);
        entry.parse(&text).ok().map(|parsed| parsed.canonical)
    };
    let fits = |sizes: &[(&'static str, usize)], dtype: Dtype| problem(sizes, dtype).is_some();
    let (sizes, dtype) = constraints.adapt(&parsed.sizes, dtype, &fits)?;
    problem(&sizes, dtype)
}

/// Builds what has to be built: what is not there, or older than a source of it.
fn build(manifest: &Manifest) -> Result<(), String> {
    let Some(build) = &manifest.build else { return Ok(()) };
    let changed = |file: &Path| fs::metadata(file).and_then(|data| data.modified()).ok();
    let newest =
        build.sources.iter().filter_map(|source| changed(&manifest.folder.join(source))).max();
    let files = manifest.files();
    let stale =
        |file: &&Path| changed(file).is_none_or(|made| newest.is_some_and(|new| made < new));
    if !files.is_empty() && !files.iter().any(stale) {
        return Ok(());
    }
    let words = build.command.join(" ");
    let made = Command::new(&build.command[0])
        .args(&build.command[1..])
        .current_dir(&manifest.folder)
        .output()
        .map_err(|e| format!("[build] {words}: {e}"))?;
    if !made.status.success() {
        let log = String::from_utf8_lossy(&made.stderr);
        return Err(format!("[build] {words}: {}\n{}", made.status, log.trim_end()));
    }
    match files.iter().find(|file| !file.is_file()) {
        None => Ok(()),
        Some(file) => Err(format!("[build] {words}: did not make {}", file.display())),
    }
}

/// Jobs of foreign kernels: every problem of a set, made one that the kernel takes where it is not,
/// and problems that a word of the filter spells out, as they are.
///
/// # Errors
/// If such a word names an op but is no problem of it.
pub fn jobs(
    set: Set,
    filter: &Filter,
    device: Option<&str>,
    kernels: &[Arc<Kernel>],
) -> Result<Vec<Job>, String> {
    let mut jobs: Vec<Job> = Vec::new();
    for &entry in ops() {
        for kernel in kernels {
            if !kernel.implements(entry, device) {
                continue;
            }
            let job = |spec: String| -> Result<Job, String> {
                let parsed = entry.parse(&spec)?;
                let foreign = Some(kernel.clone());
                Ok(Job { entry, variant: kernel.variant(), spec, parsed, foreign })
            };
            let mut mine: Vec<Job> =
                kernel.problems(entry, entry.specs(set)).map(job).collect::<Result<_, _>>()?;
            mine.retain(|job| {
                let Job { entry, variant, parsed, .. } = job;
                let subject = Subject { op: entry.name(), variant, id: &job.id(), parsed };
                filter.selects(&subject)
            });
            if mine.is_empty() {
                for word in filter.words() {
                    if let Some((op, spec, variant)) = spelled(word)
                        && op == entry.name()
                        && variant.is_none_or(|variant| variant == kernel.variant())
                    {
                        mine.push(job(entry.parse(spec)?.canonical)?);
                    }
                }
            }
            jobs.extend(mine);
        }
    }
    Ok(jobs)
}
