//! `karat golden`: recordings of the official implementation.

mod formats;
mod record;
mod review;

use std::path::{Path, PathBuf};

use benches::{
    Kept, Number,
    emulation::{has_bf16, verify_bf16},
    verify::{Rule, Verified, verify},
};
use clap::Subcommand;
use golden::{
    Config, Dtype, Weights,
    checkpoint::Checkpoint,
    engine::INTERRUPTED,
    recording::{FileHash, Manifest, Recording, RecordingError},
    split::Split,
    synth,
    synthetic::Synthetic,
};
use serde_json::json;

use crate::{
    block,
    ended::unseen,
    exit::{Exit, fail, of_engine, refuse},
    files,
    keeps::Keeps,
    out::{self, Out},
    same::typed,
};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Ask the official implementation and write down what it says (needs Python, see --help)
    Record(record::Args),
    /// Hold an engine against recordings
    Verify(VerifyArgs),
    /// Say which recordings there are
    Status,
    /// Say how a new recording differs from the accepted one
    Diff(review::DiffArgs),
    /// Accept a new recording
    Accept(review::AcceptArgs),
}

/// How recordings are verified.
#[derive(Debug, clap::Args)]
struct VerifyArgs {
    /// Recordings, by name or folder; all that are committed without one
    ids: Vec<String>,
    /// This checkpoint instead of the recorded one; it is computed even if its hashes differ
    #[arg(long, value_name = "DIR")]
    model: Option<String>,
    /// What computes: reference, cpu, the fast kernels of this machine, or cuda, its GPU
    #[arg(long, default_value = "reference")]
    engine: String,
    /// Number type: f32; of the reference also f64, or bf16, which emulates the official code in bf16 and is
    /// held against what that said; of cpu also bf16, int8 and int4, one or several, of cuda bf16: what is lost
    /// in them, beside what the emulation of their plan loses, and beside cpu in bf16
    #[arg(long, value_delimiter = ',', default_value = "f32", value_name = "NUMBER,…")]
    number: Vec<String>,
    #[command(flatten)]
    keeps: Keeps,
    /// Plant this fault in the wiring, to see that it is caught (karat explain names them)
    #[arg(long, value_name = "NAME")]
    plant: Option<String>,
}

impl Args {
    /// Whether recordings are held against an engine.
    pub(crate) fn verifies(&self) -> bool {
        matches!(self.command, Command::Verify(_))
    }
}

pub(crate) fn run(args: &Args, out: &Out) -> anyhow::Result<Exit> {
    match &args.command {
        Command::Record(args) => record::run(args, out),
        Command::Verify(args) => run_verify(args, out),
        Command::Status => Ok(status(out)),
        Command::Diff(args) => review::diff(args, out),
        Command::Accept(args) => review::accept(args, out),
    }
}

/// Accepted recordings of models, by name.
pub(crate) fn recordings() -> PathBuf {
    files::golden_dir().join("recordings")
}

/// Names of the accepted recordings, in order.
fn ids(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok);
    let mut ids: Vec<String> = entries
        .filter(|entry| entry.path().join("manifest.json").exists())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|id| !id.contains('.'))
        .collect();
    ids.sort();
    ids
}

/// A name that is one: what is accepted or recorded stays inside the folder of recordings.
fn plain(id: &str) -> anyhow::Result<()> {
    if golden::file::is_plain_name(id) && !id.contains('.') {
        Ok(())
    } else {
        Err(refuse(format!("{id:?}: expected the name of a recording")))
    }
}

pub(crate) fn open(id: &str) -> anyhow::Result<Recording> {
    // A name, or a folder anywhere.
    let dir = if id.contains('/') { PathBuf::from(id) } else { recordings().join(id) };
    if !dir.join("manifest.json").exists() {
        let known = ids(&recordings()).join(", ");
        return Err(fail(
            Exit::Recording,
            format!("{}: no such recording; there are {known}", dir.display()),
        ));
    }
    Recording::open(&dir).map_err(|e| fail(Exit::Recording, e.to_string()))
}

/// The recorded checkpoint, as a folder: made again from its seed, or committed.
///
/// A folder that is there already is used if its files still hash as recorded.
pub(crate) fn checkpoint_of(manifest: &Manifest) -> anyhow::Result<PathBuf> {
    let source = &manifest.checkpoint;
    match source.source.as_str() {
        "synthetic" => {
            let dir = files::cache_dir().join("checkpoints").join(&manifest.id);
            if mismatches(&dir, &source.files).is_empty() {
                return Ok(dir);
            }
            let weights = synthetic(&manifest.checkpoint, &manifest.id)?;
            write(&weights, &dir)?;
            Ok(dir)
        }
        "committed" => {
            Ok(files::golden_dir().join("..").join(source.path.as_deref().unwrap_or("")))
        }
        other => Err(fail(
            Exit::Recording,
            format!(
                "{}: recorded from a {other} of someone's disk; --model DIR says where it is here",
                manifest.id
            ),
        )),
    }
}

/// The synthetic weights that a question or a manifest asks for.
fn synthetic(source: &golden::recording::Source, id: &str) -> anyhow::Result<Synthetic> {
    let config = Config::parse(&source.config.to_string(), id).map_err(refuse)?;
    let dtype: Dtype = source.dtype.as_deref().unwrap_or("f32").parse().map_err(refuse)?;
    Ok(Synthetic::new(config.stored_as(dtype), source.seed.unwrap_or(0)))
}

fn write(weights: &dyn Weights, dir: &Path) -> anyhow::Result<()> {
    let parent = dir.parent().unwrap_or(dir);
    std::fs::create_dir_all(parent)
        .map_err(|e| fail(Exit::Unfit, format!("{}: {e}", parent.display())))?;
    let options = synth::Options { shard_bytes: 5 << 30, force: true };
    match synth::write(weights, dir, options, &mut |_, _| !out::interrupted()) {
        Ok(()) => Ok(()),
        Err(synth::SynthError::Interrupted) => Err(fail(Exit::Interrupted, "interrupted")),
        Err(error) => Err(fail(Exit::Unfit, error.to_string())),
    }
}

/// Recorded files that are not in a folder as they were recorded.
fn mismatches(dir: &Path, recorded: &[FileHash]) -> Vec<String> {
    let same = |file: &FileHash| {
        let path = dir.join(&file.path);
        // What has another size need not be read to be another file.
        std::fs::metadata(&path).is_ok_and(|meta| meta.len() == file.bytes)
            && golden::checkpoint::hash_file(dir, &path).is_ok_and(|found| found == *file)
    };
    recorded.iter().filter(|file| !same(file)).map(|file| file.path.clone()).collect()
}

/// What verifying one recording came to.
pub(crate) struct Report {
    pub(crate) id: String,
    pub(crate) verified: Vec<Verified>,
    /// Files that are not as recorded.
    pub(crate) other_files: Vec<String>,
    pub(crate) seconds: f64,
}

impl Report {
    pub(crate) fn ok(&self) -> bool {
        self.verified.iter().all(Verified::ok)
    }

    pub(crate) fn exit(&self) -> Exit {
        if !self.ok() {
            Exit::Wrong
        } else if self.other_files.is_empty() {
            Exit::Ok
        } else {
            Exit::Recording
        }
    }

    /// The first tap over its bound, or the first expert that may not be swapped.
    pub(crate) fn first_wrong(&self) -> Option<String> {
        self.verified.iter().filter(|v| !v.ok()).find_map(|v| {
            let tap = v.first_bad().map(|(tap, _)| tap.clone());
            Some(format!("{}/{}", v.prompt, tap.or_else(|| v.illegal_flip.clone())?))
        })
    }

    /// Largest share of an allowance.
    pub(crate) fn budget(&self) -> f64 {
        let findings = self.verified.iter().flat_map(|v| &v.findings);
        findings.map(|(_, finding)| finding.budget).fold(0.0, f64::max)
    }
}

/// A recording of a whole model, and the checkpoint that it is of.
struct Opened {
    recording: Recording,
    weights: std::sync::Arc<Checkpoint>,
    /// Files that are not as recorded.
    other_files: Vec<String>,
}

impl Opened {
    fn of(id: &str, model: Option<&str>) -> anyhow::Result<Opened> {
        let recording = open(id)?;
        if recording.manifest.prompts.is_empty() {
            return Err(refuse(format!(
                "{id}: a recording of no whole model; `karat check` holds ops against it"
            )));
        }
        let dir = match model {
            Some(model) => PathBuf::from(model),
            None => checkpoint_of(&recording.manifest)?,
        };
        let other_files = mismatches(&dir, &recording.manifest.checkpoint.files);
        let weights = std::sync::Arc::new(Checkpoint::open(&dir).map_err(refuse)?);
        Ok(Opened { recording, weights, other_files })
    }
}

/// Why an engine could not be held against a recording.
fn blamed(e: &golden::Error, at: &str, other_files: &[String]) -> anyhow::Error {
    if e.to_string() == INTERRUPTED {
        fail(Exit::Interrupted, INTERRUPTED)
    } else if e.is::<RecordingError>() {
        fail(Exit::Recording, e.to_string())
    } else if e.is::<benches::Unfit>() || e.is::<benches::Trapped>() {
        of_engine(e)
    } else if other_files.is_empty() {
        refuse(format!("{at}: {e}"))
    } else {
        let files = other_files.join(", ");
        fail(Exit::Recording, format!("{at}: {e}; of another checkpoint: {files}"))
    }
}

/// Verifies one recording, by name.
pub(crate) fn verify_one(
    id: &str,
    model: Option<&str>,
    engine: &str,
    number: Number<'_>,
    plant: Option<&str>,
) -> anyhow::Result<Report> {
    let watch = benches::clock::Stopwatch::new();
    let Opened { recording, weights, other_files } = Opened::of(id, model)?;
    let emulate = number.name == "bf16";
    if emulate && !has_bf16(&recording) {
        return Err(refuse(format!("{id}: the official code was not recorded in bf16")));
    }
    let engine = benches::engine(engine, number, weights.clone(), plant);
    let mut engine = engine.map_err(|e| of_engine(&e))?;
    let mut verified = Vec::new();
    for prompt in &recording.manifest.prompts {
        let progress = &mut |_, _| !out::interrupted();
        let result = if emulate {
            let make = || benches::emulated(weights.clone(), plant);
            verify_bf16(&make, &recording, prompt, progress)
        } else {
            verify(&mut *engine, &recording, prompt, Rule::of(number.name), progress)
        };
        let blame = |e| blamed(&e, &format!("{id}: {}", prompt.id), &other_files);
        verified.push(result.map_err(blame)?);
    }
    Ok(Report { id: id.to_owned(), verified, other_files, seconds: watch.elapsed().as_secs_f64() })
}

/// Whether a recording also has what the official code said in bf16. One that cannot be opened has nothing.
pub(crate) fn in_bf16(id: &str) -> bool {
    Recording::open(&recordings().join(id)).is_ok_and(|recording| has_bf16(&recording))
}

/// Names of the recordings of whole models.
pub(crate) fn model_ids() -> Vec<String> {
    let mut ids = ids(&recordings());
    ids.retain(|id| id != "ops");
    ids
}

/// Why the model of a recording cannot be spread over as many GPUs as were asked for, if so.
fn undivided(id: &str) -> Option<String> {
    let gpus = benches::gpus();
    if gpus == 1 {
        return None;
    }
    // One that cannot be opened is told of by whoever verifies it.
    let recording = open(id).ok()?;
    let weights = Checkpoint::open(&checkpoint_of(&recording.manifest).ok()?).ok()?;
    Split::new(weights.config(), gpus).err()
}

fn run_verify(args: &VerifyArgs, out: &Out) -> anyhow::Result<Exit> {
    let mut ids = if args.ids.is_empty() { model_ids() } else { args.ids.clone() };
    if args.number == ["bf16"] && args.engine == "reference" && args.ids.is_empty() {
        ids.retain(|id| in_bf16(id));
    }
    if args.ids.is_empty() {
        let mut left_out = None;
        for id in std::mem::take(&mut ids) {
            if let Some(why) = undivided(&id) {
                out.line(&format!("skipped: {id}: {why}"));
                left_out = Some(why);
            } else {
                ids.push(id);
            }
        }
        if let Some(why) = left_out.filter(|_| ids.is_empty()) {
            return Err(refuse(format!("gpus: no recording's model divides: {why}")));
        }
    }
    if ids.is_empty() {
        return Err(fail(Exit::Recording, format!("{}: no recordings", recordings().display())));
    }
    if args.model.is_some() && ids.len() != 1 {
        return Err(refuse("--model: expected one recording to hold it against"));
    }
    let plain = |name: &String| {
        (&**name, args.keeps.number(name).keeps(&args.engine)) == ("f32", Some(Kept::F32))
    };
    let in_f32 = matches!(&args.number[..], [one] if plain(one));
    if ["cpu", "cuda"].contains(&&*args.engine) && !in_f32 {
        return formats::run(&ids, args, out);
    }
    let [number] = &args.number[..] else {
        return Err(refuse("--number: several are asked of the cpu and cuda engines only"));
    };
    let number = args.keeps.number(number);
    let mut exit = Exit::Ok;
    let mut rows = Vec::new();
    let bar = out.bar(ids.len() as u64, "verify", false);
    for id in &ids {
        let report =
            verify_one(id, args.model.as_deref(), &args.engine, number, args.plant.as_deref())?;
        bar.inc(1);
        tell(&report, args, number, out);
        rows.push(row(&report));
        exit = exit.gravest(report.exit());
    }
    bar.finish_and_clear();
    out.table(
        &["recording", "prompts", "tokens", "taps", "result", "worst use of bound", "time"],
        &rows,
    );
    Ok(unseen(args.plant.as_deref(), exit, out))
}

/// A recording's line in a table.
pub(crate) fn row(report: &Report) -> Vec<String> {
    let taps: usize = report.verified.iter().map(|v| v.findings.len()).sum();
    let tokens: usize = report.verified.iter().map(|v| v.tokens).sum();
    let result = match report.exit() {
        Exit::Ok => "passed".to_owned(),
        Exit::Recording => "other checkpoint".to_owned(),
        _ => "FAILED".to_owned(),
    };
    vec![
        report.id.clone(),
        report.verified.len().to_string(),
        tokens.to_string(),
        taps.to_string(),
        result,
        format!("{:.1} %", 100.0 * report.budget()),
        format!("{:.1} s", report.seconds),
    ]
}

/// One object for each prompt, by which engine in which number.
pub(crate) fn rows(report: &Report, engine: &str, number: &str, out: &Out) {
    if report.verified.is_empty() {
        out.json(&json!({
            "schema": "karat.result/1", "kind": "golden", "recording": report.id, "engine": engine, "number": number,
            "ok": report.ok(), "seconds": report.seconds, "other_files": report.other_files, "findings": [],
        }));
    }
    for v in &report.verified {
        out.json(&json!({
            "schema": "karat.result/1", "kind": "golden", "recording": report.id, "prompt": v.prompt, "tokens": v.tokens,
            "engine": engine, "number": number, "seconds": report.seconds / report.verified.len() as f64,
            "ok": v.ok(), "legal_flips": v.legal_flips, "illegal_flip": v.illegal_flip, "other_files": report.other_files,
            "findings": v.findings.iter().map(|(tap, f)| {
                let mut json = benches::report::finding_json(f);
                json["tap"] = json!(tap);
                json
            }).collect::<Vec<_>>(),
        }));
    }
}

fn tell(report: &Report, args: &VerifyArgs, number: Number<'_>, out: &Out) {
    if !report.other_files.is_empty() {
        out.line(&format!("{}: not as recorded: {}", report.id, report.other_files.join(", ")));
    }
    rows(report, &args.engine, number.name, out);
    for v in &report.verified {
        if out.verbose {
            for (tap, f) in &v.findings {
                out.line(&format!(
                    "{}/{tap}: rel-RMS {:.2e}, worst row {:.2e}, {:.1} % of the bound ({})",
                    v.prompt,
                    f.rel_rms,
                    f.worst_token,
                    100.0 * f.budget,
                    block::bound(f.bound)
                ));
            }
        }
        if v.ok() {
            continue;
        }
        out.line(&format!("FAIL {}/{}", report.id, v.prompt));
        if let Some(flip) = &v.illegal_flip {
            out.line(&format!("  routing: {flip}"));
        }
        if let Some((tap, f)) = v.first_bad() {
            out.line(&format!("  first tap over its bound: {tap}{}", layer_of(tap, v)));
            out.line(&format!(
                "  rel-RMS {:.2e}, worst row {} at {:.2e}, {:.0}x of what is allowed ({})",
                f.rel_rms,
                f.worst_token_at,
                f.worst_token,
                f.budget,
                block::bound(f.bound)
            ));
            if let Some(pattern) = &f.pattern {
                out.line(&format!("  pattern: {pattern}"));
            }
        }
        let plant = args.plant.as_ref().map_or(String::new(), |plant| format!(" --plant {plant}"));
        let model = args.model.as_ref().map_or(String::new(), |model| format!(" --model {model}"));
        let number = typed("engine", &*args.engine, "reference")
            + &typed("number", number.name, "f32")
            + &args.keeps.typed();
        out.line(&format!("  repro: karat golden verify {}{model}{number}{plant}", report.id));
    }
}

/// Which layer computed a tap; the last hidden state is the only one that the final norm has seen.
fn layer_of(tap: &str, verified: &Verified) -> String {
    let last = verified.findings.iter().rev().find(|(tap, _)| tap.starts_with("hidden."));
    match tap.split_once('.') {
        Some(("hidden" | "layer", "0")) => " (the embedding)".to_owned(),
        Some(("layer", n)) => match n.parse::<usize>() {
            Ok(n) => format!(" (layer {}, fed what was recorded before it)", n - 1),
            Err(_) => String::new(),
        },
        Some(("hidden", n)) => match n.parse::<usize>() {
            Ok(n) if last.is_some_and(|(last, _)| last == tap) => {
                format!(" (layer {} or the final norm)", n - 1)
            }
            Ok(n) => format!(" (layer {})", n - 1),
            Err(_) => String::new(),
        },
        Some((_, n)) if n.parse::<usize>().is_ok() => format!(" (layer {n})"),
        _ if tap == "mtp_logits" => " (the MTP head)".to_owned(),
        _ if tap == "step_logits" => " (a step of the decode; the prompt agrees)".to_owned(),
        _ => String::new(),
    }
}

fn status(out: &Out) -> Exit {
    let dir = recordings();
    let mut rows = Vec::new();
    let mut exit = Exit::Ok;
    for id in ids(&dir) {
        match Recording::open(&dir.join(&id)) {
            Err(error) => {
                out.line(&error.to_string());
                exit = Exit::Recording;
            }
            Ok(recording) => {
                let m = &recording.manifest;
                let noise = m.self_noise.values().filter_map(|kinds| kinds.get("f64"));
                let s = noise.map(|noise| noise.rel_rms).fold(0.0, f64::max);
                let fresh = dir.join(format!("{id}.new")).exists();
                out.json(&json!({"schema": "karat.result/1", "kind": "golden", "recording": id, "why": m.why, "created": m.created,
                    "taps": m.taps.len(), "bytes": m.recording.bytes, "noise": s, "new": fresh}));
                let asked = if m.prompts.is_empty() {
                    format!("{} cases", m.cases.len())
                } else {
                    format!("{} prompts", m.prompts.len())
                };
                rows.push(vec![
                    id,
                    m.why.clone(),
                    asked,
                    m.taps.len().to_string(),
                    format!("{:.0} kB", m.recording.bytes as f64 / 1e3),
                    format!("{s:.1e}"),
                    if fresh { "new one waits".to_owned() } else { String::new() },
                ]);
            }
        }
    }
    out.table(&["recording", "covers", "asked", "taps", "size", "noise s", ""], &rows);
    out.line("");
    let official = dir.join("official/manifest.json").exists();
    if official {
        out.line("Qwen/Qwen3-Next-80B-A3B: recorded here, as \"official\".");
    } else {
        out.line("Qwen/Qwen3-Next-80B-A3B: not recorded here. These are recordings of small synthetic checkpoints made by the");
        out.line("official code; nothing here comes from the official weights. Where the weights are, one command records them:");
        out.line("  karat golden record official --checkpoint DIR");
    }
    out.json(&json!({"schema": "karat.result/1", "kind": "golden", "recording": "official", "recorded": official}));
    exit
}
