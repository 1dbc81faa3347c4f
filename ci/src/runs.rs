//! Results of earlier runs, read back: JSON lines as `--format jsonl` and `--results` write them.
//!
//! Every line is looked at, and the first that cannot be believed is told with its place. A run begins with
//! an `env` row and ends with an `end` row, so that a file which was cut is known from one that is whole.

pub(crate) mod rows;
pub(crate) mod times;

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap, hash_map::Entry},
    io::{self, BufRead, BufReader, Read},
    path::{Path, PathBuf},
};

use golden::file;
use serde::Deserialize;

use self::rows::{
    End, Env, Gated, Judged, ModelSpeed, Mutant, Mutation, OUTCOMES, OpSpeed, Part, Past, Sabotage,
    Scale, SpeedFit, Summary, Supported, Verified,
};
use crate::exit::{Exit, refuse};

/// What this karat writes and reads.
pub(crate) const SCHEMA: &str = "karat.result/1";

/// The longest line: a row of a case has some thousand bytes, one with samples of a day less than this.
const MAX_LINE: u64 = 64 << 20;

/// One run: a command that was typed, on one machine.
#[derive(Debug, Default)]
pub(crate) struct Run {
    pub(crate) file: PathBuf,
    /// Whether it said what it is; results of an older karat do not.
    pub(crate) told: bool,
    pub(crate) env: Env,
    pub(crate) end: Option<End>,
    pub(crate) rows: usize,
    /// What it came to, if it came to that.
    pub(crate) summary: Option<Summary>,
}

impl Run {
    /// How it ended; one that did not was ended by something else.
    pub(crate) fn exit(&self) -> Exit {
        match &self.end {
            Some(end) => Exit::of(Some(end.exit)).unwrap_or(Exit::Internal),
            None if self.told => Exit::Crashed,
            None => Exit::Ok,
        }
    }
}

/// All that was read.
#[derive(Debug, Default)]
pub(crate) struct Results {
    pub(crate) runs: Vec<Run>,
    pub(crate) judged: Vec<Judged>,
    pub(crate) verified: Vec<Verified>,
    pub(crate) op_speeds: Vec<OpSpeed>,
    pub(crate) model_speeds: Vec<ModelSpeed>,
    pub(crate) fits: Vec<SpeedFit>,
    pub(crate) scales: Vec<Scale>,
    pub(crate) gated: Vec<Gated>,
    pub(crate) mutants: Vec<Mutant>,
    pub(crate) mutations: Vec<Mutation>,
    pub(crate) sabotaged: Vec<Sabotage>,
    pub(crate) parts: Vec<Part>,
    pub(crate) supported: Vec<Supported>,
    pub(crate) past: Vec<Past>,
    /// What was left out with `--partial`, and why.
    pub(crate) lost: Vec<String>,
    /// Where each case stands.
    seen: HashMap<u128, (u32, u32)>,
    files: Vec<PathBuf>,
}

/// What becomes of files that are not whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Damage {
    /// They are refused; there is an option that takes what is whole of them.
    Refused,
    /// They are refused.
    Fatal,
    /// What is whole of them is taken, and what is missing is told.
    Told,
}

/// Results and what becomes of damaged ones, as they are typed.
#[derive(Debug, clap::Args)]
pub(crate) struct Files {
    /// Results: JSON lines of --results or --format jsonl; - is standard input
    #[arg(required = true, value_name = "RESULTS")]
    pub(crate) files: Vec<PathBuf>,
    /// Take what there is of runs that were cut short, and of shards that are not all there
    #[arg(long)]
    pub(crate) partial: bool,
}

impl Files {
    /// What becomes of damaged ones.
    pub(crate) fn damage(&self) -> Damage {
        if self.partial { Damage::Told } else { Damage::Refused }
    }

    /// All of them.
    pub(crate) fn read(&self) -> anyhow::Result<Results> {
        let mut results = Results::default();
        for file in &self.files {
            results.add(file, self.damage(), &mut |_| ())?;
        }
        results.check_shards(self.damage())?;
        Ok(results)
    }
}

/// What every line has.
#[derive(Deserialize)]
struct Line<'a> {
    #[serde(borrow, default)]
    schema: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    kind: Option<Cow<'a, str>>,
}

impl Results {
    /// The results that a text holds, which were found just now by a run that comes to `exit`.
    pub(crate) fn of_text(text: &str, exit: Exit) -> anyhow::Result<Results> {
        let mut results = Results::default();
        let place = Path::new("the rows of this run");
        // The last row is still to come.
        results.lines(place, text.as_bytes(), Damage::Told, &mut |_| ())?;
        results.lost.clear();
        for run in results.runs.iter_mut().filter(|run| run.end.is_none()) {
            run.end = Some(End { exit: exit as i32, line: None, seconds: 0.0 });
        }
        Ok(results)
    }

    /// Adds a file; `each` is handed every line that was believed.
    pub(crate) fn add(
        &mut self,
        path: &Path,
        damage: Damage,
        each: &mut dyn FnMut(&str),
    ) -> anyhow::Result<()> {
        let open = || -> io::Result<Box<dyn Read>> {
            if path == Path::new("-") {
                return Ok(Box::new(io::stdin()));
            }
            Ok(Box::new(file::open(path)?))
        };
        let file = open().map_err(|e| refuse(format!("{}: {e}", path.display())))?;
        self.lines(path, file, damage, each)
    }

    fn lines(
        &mut self,
        path: &Path,
        from: impl Read,
        damage: Damage,
        each: &mut dyn FnMut(&str),
    ) -> anyhow::Result<()> {
        let shown = path.display();
        let mut reader = BufReader::with_capacity(1 << 20, from);
        let mut bytes = Vec::new();
        let (mut number, first) = (0, self.runs.len());
        self.files.push(path.to_owned());
        loop {
            bytes.clear();
            let read = reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut bytes);
            if read.map_err(|e| refuse(format!("{shown}: {e}")))? == 0 {
                break;
            }
            number += 1;
            if bytes.len() as u64 == MAX_LINE {
                return Err(refuse(format!(
                    "{shown}:{number}: expected lines of JSON, got one of 64 MiB"
                )));
            }
            let whole = bytes.ends_with(b"\n");
            let found = std::str::from_utf8(&bytes).map_err(|_| "no UTF-8".to_owned());
            let found = found.map(str::trim_end).and_then(|line| {
                if line.is_empty() {
                    return Err("an empty line; expected a JSON object".to_owned());
                }
                self.line(path, number, line, first).map(|()| line)
            });
            match found {
                Ok(line) => each(line),
                Err(why) if whole || !is_cut(&bytes) => {
                    return Err(refuse(format!("{shown}:{number}: {why}")));
                }
                Err(_) => {
                    let rows = number - 1;
                    self.damaged(
                        damage,
                        format!("{shown}:{number}: cut in the middle of a row; {rows} whole rows stand before it"),
                    )?;
                }
            }
        }
        if number == 0 {
            self.damaged(damage, format!("{shown}: empty; expected JSON lines of a run"))?;
        }
        for at in first..self.runs.len() {
            let run = &self.runs[at];
            if run.told
                && run.end.is_none()
                && self.lost.last().is_none_or(|lost| !lost.contains("cut"))
            {
                let rows = run.rows;
                self.damaged(
                    damage,
                    format!(
                        "{shown}: `{}` did not end: {rows} rows and no end row",
                        run.env.command
                    ),
                )?;
            }
        }
        Ok(())
    }

    /// A file is not whole.
    fn damaged(&mut self, damage: Damage, what: String) -> anyhow::Result<()> {
        match damage {
            Damage::Refused => Err(refuse(format!("{what}; --partial takes what there is"))),
            Damage::Fatal => Err(refuse(what)),
            Damage::Told => {
                self.lost.push(what);
                Ok(())
            }
        }
    }

    /// Takes a line, or says what is wrong with it.
    fn line(&mut self, path: &Path, number: u32, line: &str, first: usize) -> Result<(), String> {
        let head: Line<'_> = serde_json::from_str(line).map_err(|e| no_json(line, &e))?;
        match head.schema {
            Some(schema) if schema == SCHEMA => {}
            Some(schema) => {
                let newer =
                    schema.strip_prefix("karat.result/").and_then(|n| n.parse::<u64>().ok());
                let newer = if newer.is_some_and(|n| 1 < n) { ", which is newer" } else { "" };
                return Err(format!("expected schema {SCHEMA}, got {schema}{newer}"));
            }
            None => return Err(format!("expected a row of {SCHEMA}, got no schema")),
        }
        let kind = head.kind.ok_or("a row without a kind")?;
        if kind == "env" {
            // What `karat doctor` says is no run, and begins none inside one.
            let told = line.contains("\"run\":\"");
            let open =
                first < self.runs.len() && self.runs.last().is_some_and(|run| run.end.is_none());
            if !told && open {
                return Ok(());
            }
            let env: Env = read(line)?;
            self.runs.push(Run { file: path.to_owned(), told, env, ..Run::default() });
            return Ok(());
        }
        if self.runs.len() == first {
            self.runs.push(Run { file: path.to_owned(), ..Run::default() });
        }
        let run = self.runs.len() - 1;
        if self.runs[run].end.is_some() && kind != "end" {
            return Err(format!("a row of kind {kind} after the end of its run"));
        }
        self.runs[run].rows += 1;
        self.row(&kind, line, run, number)
    }

    fn row(&mut self, kind: &str, line: &str, run: usize, number: u32) -> Result<(), String> {
        match kind {
            "end" => {
                let end: End = read(line)?;
                if Exit::of(Some(end.exit)).is_none() {
                    return Err(format!("exit {}: no exit code of karat", end.exit));
                }
                self.runs[run].end = Some(end);
            }
            "check" | "paths" | "invariance" => {
                let row: Judged = read(line)?;
                if !OUTCOMES.contains(&row.outcome.as_str()) {
                    return Err(format!(
                        "{}: outcome {:?}: expected one of {}",
                        row.case,
                        row.outcome,
                        OUTCOMES.join(", ")
                    ));
                }
                self.once(run, number, &[kind, &row.case])?;
                self.judged.push(row);
            }
            "golden" => {
                let row: Verified = read(line)?;
                if row.ok.is_some() {
                    let of = [
                        Some(row.recording.as_str()),
                        row.prompt.as_deref(),
                        row.engine.as_deref(),
                        row.number.as_deref(),
                    ];
                    self.once(run, number, &of.map(Option::unwrap_or_default))?;
                    self.verified.push(row);
                }
            }
            "bench" if line.contains("\"case\"") => {
                let row: OpSpeed = read(line)?;
                // What was not checked was not timed.
                if row.timed() {
                    times(&row.case, "median_ns", &[row.median_ns])?;
                }
                times(&row.case, "samples_ns", &row.samples_ns)?;
                self.once(run, number, &[kind, &row.case])?;
                self.op_speeds.push(OpSpeed { run, line: number, ..row });
            }
            "bench" => {
                let row: ModelSpeed = read(line)?;
                let of = format!("{} {} {}", row.asked(), row.depth, row.fed);
                times(&row.model, "prefill_samples", &row.prefill_samples)?;
                times(&row.model, "decode_samples", &row.decode_samples)?;
                self.once(run, number, &[kind, &row.model, &of])?;
                self.model_speeds.push(ModelSpeed { run, ..row });
            }
            "bench_fit" => self.fits.push(read(line)?),
            "scale" => {
                let row: Scale = read(line)?;
                for point in &row.points {
                    times(&row.model, "samples_ns", &point.samples_ns.concat())?;
                    times(&row.model, "ms_per_token", &[point.ms_per_token])?;
                }
                let number_of = row.number.clone().unwrap_or_default();
                let of =
                    [&row.engine, row.kv_cache.as_deref().unwrap_or_default(), &row.part].join(" ");
                self.once(run, number, &[kind, &row.model, &of, &number_of])?;
                self.scales.push(Scale { run, ..row });
            }
            "gate" if line.contains("\"verdict\"") => {
                let row: Gated = read(line)?;
                self.once(run, number, &[kind, &row.case, &row.variant])?;
                self.gated.push(row);
            }
            "summary" => self.runs[run].summary = Some(read(line)?),
            "history" => {
                let row: Past = read(line)?;
                times(&row.case, "median_ns", &[row.median_ns])?;
                self.past.push(Past { line: number, ..row });
            }
            "mutant" => {
                let row: Mutant = read(line)?;
                let command = unsharded(&self.runs[run].env.arguments);
                self.once(run, number, &[kind, &row.id, &command])?;
                self.mutants.push(row);
            }
            "mutate" => self.mutations.push(read(line)?),
            "sabotage" => self.sabotaged.push(read(line)?),
            "bisect" => self.parts.push(read(line)?),
            "support" => self.supported.push(read(line)?),
            // Rows that nothing here is made of.
            _ => {}
        }
        Ok(())
    }

    /// A case stands once on each machine: two answers to one question leave open which one holds.
    fn once(&mut self, run: usize, number: u32, key: &[&str]) -> Result<(), String> {
        let mut hasher = blake3::Hasher::new();
        for part in [self.runs[run].env.fingerprint.as_str()].iter().chain(key) {
            hasher.update(part.as_bytes()).update(&[0]);
        }
        let mut hash = [0; 16];
        hash.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        let here = (self.files.len() as u32 - 1, number);
        match self.seen.entry(u128::from_le_bytes(hash)) {
            Entry::Vacant(free) => {
                free.insert(here);
                Ok(())
            }
            Entry::Occupied(taken) => {
                let (file, line) = *taken.get();
                let place = self.files[file as usize].display();
                Err(format!("{} stands in {place}:{line} as well; expected each case once", key[1]))
            }
        }
    }

    /// Shards of one run that are there: of which command, how many there should be, which are there.
    fn shards(&self) -> BTreeMap<(String, usize), Vec<(usize, usize)>> {
        let mut all: BTreeMap<(String, usize), Vec<(usize, usize)>> = BTreeMap::new();
        for (at, run) in self.runs.iter().enumerate() {
            let Some((index, of)) =
                run.env.shard.as_deref().and_then(|shard| shard.split_once('/'))
            else {
                continue;
            };
            if let (Ok(index), Ok(of)) = (index.parse(), of.parse()) {
                all.entry((unsharded(&run.env.arguments), of)).or_default().push((index, at));
            }
        }
        all
    }

    /// Shards are all there, each once, of one program and one revision.
    pub(crate) fn check_shards(&mut self, damage: Damage) -> anyhow::Result<()> {
        let (mut missing, mut differ) = (Vec::new(), None);
        for ((command, of), there) in self.shards() {
            let lacks: Vec<String> = (1..=of)
                .filter(|index| there.iter().all(|(found, _)| found != index))
                .map(|index| format!("{index}/{of}"))
                .collect();
            if !lacks.is_empty() {
                missing
                    .push(format!("shard {} of `karat {command}` is not there", lacks.join(", ")));
            }
            let first = &self.runs[there[0].1];
            for (_, at) in &there {
                let run = &self.runs[*at];
                if (&run.env.revision, &run.env.version)
                    != (&first.env.revision, &first.env.version)
                {
                    let of = |run: &Run| {
                        run.env.revision.clone().unwrap_or_else(|| run.env.version.clone())
                    };
                    differ = Some(format!(
                        "{}: shard of revision {}; {} is of {}",
                        run.file.display(),
                        of(run),
                        first.file.display(),
                        of(first)
                    ));
                }
            }
        }
        if let Some(differ) = differ {
            return Err(refuse(differ));
        }
        missing.into_iter().try_for_each(|what| self.damaged(damage, what))
    }

    /// What all runs together come to.
    pub(crate) fn exit(&self) -> Exit {
        let all = self.runs.iter().map(Run::exit);
        // What is missing may be wrong.
        let lost = if self.lost.is_empty() { Exit::Ok } else { Exit::Crashed };
        let exit = all.fold(lost, Exit::gravest);
        let checks = || self.judged.iter().filter(|row| row.kind == "check");
        let shared = self.runs.iter().any(|run| run.env.shard.is_some());
        // A shard need not hold a case that can run here; the whole must.
        if exit == Exit::Ok && shared && checks().next().is_some() {
            if checks().all(Judged::is_skip) {
                return Exit::Unfit;
            }
            if !checks().any(|row| row.outcome == "passed") {
                return Exit::Wrong;
            }
        }
        let times = || self.op_speeds.iter().map(OpSpeed::outcome);
        if exit == Exit::Ok && shared && times().next().is_some() {
            if times().all(|outcome| matches!(outcome, "skipped" | "unsupported")) {
                return Exit::Unfit;
            }
            if !times().any(|outcome| outcome == "passed") {
                return Exit::Wrong;
            }
        }
        exit
    }
}

/// What was typed, without what differs from shard to shard.
fn unsharded(arguments: &[String]) -> String {
    const OWN: [&str; 8] = [
        "--shard",
        "--results",
        "--junit",
        "--summary",
        "--badge",
        "--verdict",
        "--report",
        "--format",
    ];
    let mut words = Vec::new();
    let mut all = arguments.iter();
    while let Some(word) = all.next() {
        let name = word.split('=').next().unwrap_or_default();
        if OWN.contains(&name) {
            if !word.contains('=') {
                all.next();
            }
        } else {
            words.push(word.as_str());
        }
    }
    words.join(" ")
}

/// A row as it is expected.
fn read<'a, T: Deserialize<'a>>(line: &'a str) -> Result<T, String> {
    serde_json::from_str(line).map_err(|e| no_json(line, &e))
}

/// What is wrong, and where in the line.
fn no_json(line: &str, e: &serde_json::Error) -> String {
    let column = e.column();
    // The parser stops at the first letter that fits nothing, or one further.
    let rests = [1, 2].map(|back| line.get(column.saturating_sub(back)..).unwrap_or_default());
    let bare = ["NaN", "Infinity", "-Infinity", "nan", "inf"];
    let stands = |word: &&&str| rests.iter().any(|rest| rest.starts_with(**word));
    if let Some(word) = bare.iter().find(stands) {
        return format!("column {column}: {word}, which is no number of JSON");
    }
    let what = e.to_string();
    let what = what.split(" at line").next().unwrap_or_default();
    format!("column {column}: {what}")
}

/// Whether a last line looks as if its rest were missing: what is there is the beginning of a row.
fn is_cut(bytes: &[u8]) -> bool {
    let text = String::from_utf8_lossy(bytes);
    let found: Result<serde_json::Value, _> = serde_json::from_str(&text);
    found.is_err_and(|e| e.is_eof() || text.ends_with(char::REPLACEMENT_CHARACTER))
}

/// Times are finite and above zero.
fn times(of: &str, name: &str, samples: &[f64]) -> Result<(), String> {
    match samples.iter().position(|x| !(x.is_finite() && 0.0 < *x)) {
        None => Ok(()),
        Some(at) => {
            let got = samples[at];
            Err(format!("{of}: {name}[{at}] is {got}; expected a number above 0"))
        }
    }
}
