//! `karat bisect`: where an engine or a kernel goes wrong.

mod answers;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use benches::{
    bisect::{
        Asked, File, Op, Progress, Report, against_file, against_recording, against_reference,
    },
    registry,
};
use golden::{
    Rng, Weights,
    engine::INTERRUPTED,
    recording::{Prompt as Recorded, Recording, RecordingError},
    tap::Part,
};
use indicatif::ProgressBar;
use safetensors::{Dtype, SafeTensors};
use serde_json::json;

use crate::{
    aside::aside,
    block,
    exit::{Exit, fail, of_engine, refuse},
    golden_cmd,
    keeps::Keeps,
    logits::Prompt,
    out::{self, Out},
    same::typed,
};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A problem and a way to compute it, op/spec@device/algorithm; a whole engine without
    job: Option<String>,
    /// What to hold it against: reference, or golden:NAME or golden:DIR, a recording
    #[arg(long, default_value = "reference")]
    against: String,
    /// What computes, or file:F.safetensors with hidden.l, experts.l and logits that another program wrote, on
    /// another machine perhaps (karat logits --taps hidden,routing)
    #[arg(long, default_value = "reference", env = "KARAT_ENGINE")]
    engine: String,
    /// Number type of the reference: f32, f64, or bf16, which emulates the official code in bf16
    #[arg(long, default_value = "f32")]
    number: String,
    #[command(flatten)]
    keeps: Keeps,
    /// Plant this fault, to see that it is found (karat explain names them); not seen, it ends with 3
    #[arg(long, value_name = "NAME")]
    plant: Option<String>,
    /// A checkpoint folder, or synthetic:PRESET[,layers=N][,experts=E][,dtype=D][,seed=S][,yarn=F]; of a recording
    /// the recorded one without
    #[arg(long, value_name = "DIR")]
    model: Option<String>,
    /// safetensors with input_ids i64 [B, T]; drawn tokens without
    #[arg(long, value_name = "FILE")]
    tokens: Option<PathBuf>,
    /// Feed the tokens in these pieces, which sum to T, so that states are carried
    #[arg(long, value_delimiter = ',', value_name = "N,N,…")]
    split: Vec<usize>,
    /// How answers of a file round that do not say it themselves: a file with the [plan] of a kernel.toml
    #[arg(long, value_name = "FILE")]
    plan: Option<PathBuf>,
    /// Which prompt of the recording; one after another until one is wrong without
    #[arg(long)]
    prompt: Option<String>,
}

/// The model that is meant where none is named: no two layers of it alike.
const MODEL: &str = "synthetic:ragged";

/// The pieces of drawn tokens: a prompt, a continuation, a step.
const PIECES: [usize; 3] = [11, 4, 1];

pub(crate) fn run(args: &Args, out: &Out) -> anyhow::Result<Exit> {
    let bar = out.bar(0, "bisect", false);
    let reports = reports(args, &bar);
    bar.finish_and_clear();
    let reports = reports?;
    for report in &reports {
        tell(report, args, out);
    }
    let wrong = reports.iter().find(|report| !report.ok());
    // A comparison that does not see the fault it was given proves nothing of what it passes.
    let unseen = args.plant.as_deref().filter(|_| wrong.is_none());
    if let Some(plant) = unseen {
        out.line(&format!("{plant} was not seen by this comparison: {}", elsewhere(args)));
    }
    let exit = if wrong.is_none() && unseen.is_none() { Exit::Ok } else { Exit::Wrong };
    out.json(&json!({
        "schema": "karat.result/1", "kind": "summary", "exit": exit as u8,
        "part": wrong.and_then(Report::blame),
        "ops": wrong.map(Report::blamed).unwrap_or_default(),
        "unknown": reports.iter().flat_map(|report| &report.unknown).collect::<Vec<_>>(),
        "unseen": unseen,
    }));
    Ok(exit)
}

/// What might see a fault that was planted and not seen.
fn elsewhere(args: &Args) -> &'static str {
    if args.job.is_some() {
        "try larger sizes or another fill, which karat list names"
    } else if args.against == "reference" {
        "try another --model, or pieces (--split) that carry states"
    } else {
        "try --against reference or another recording; karat mutate names one that sees it"
    }
}

fn reports(args: &Args, bar: &ProgressBar) -> anyhow::Result<Vec<Report>> {
    match (&args.job, args.against.strip_prefix("golden:")) {
        (Some(job), None) => Ok(vec![kernel(args, job, bar)?]),
        (Some(_), Some(_)) => Err(refuse("bisect: a problem is held against the reference")),
        (None, Some(name)) => recorded(args, name, bar),
        (None, None) if args.against == "reference" => Ok(vec![engine(args, bar)?]),
        (None, None) => {
            let given = &args.against;
            Err(refuse(format!("--against {given:?}: expected reference or golden:DIR")))
        }
    }
}

/// Draws how far it is, and ends the work at the next layer once it was interrupted.
fn progress(bar: &ProgressBar) -> Progress {
    let bar = bar.clone();
    Arc::new(move |done, total| {
        bar.set_length(total);
        bar.set_position(done);
        !out::interrupted()
    })
}

/// How a bisection that found nothing out ended.
fn ended(error: &golden::Error) -> anyhow::Error {
    if error.to_string() == INTERRUPTED {
        fail(Exit::Interrupted, INTERRUPTED)
    } else if error.is::<RecordingError>() {
        fail(Exit::Recording, error.to_string())
    } else {
        of_engine(error)
    }
}

/// A problem has no layers at which it could be ended.
fn kernel(args: &Args, job: &str, bar: &ProgressBar) -> anyhow::Result<Report> {
    let expected = || refuse(format!("{job:?}: expected op/spec@device/algorithm"));
    let (problem, variant) = job.split_once('@').ok_or_else(expected)?;
    let (op, spec) = problem.split_once('/').ok_or_else(expected)?;
    let known = || registry::ops().iter().map(|op| op.name()).collect::<Vec<_>>().join(", ");
    let entry = registry::op(op)
        .ok_or_else(|| refuse(format!("op {op:?}: expected one of {}", known())))?;
    let (spec, variant, plant) = (spec.to_owned(), variant.to_owned(), args.plant.clone());
    aside(move || entry.bisect(&spec, &variant, plant.as_deref()), bar)?.map_err(refuse)
}

fn engine(args: &Args, bar: &ProgressBar) -> anyhow::Result<Report> {
    if let Some(path) = args.engine.strip_prefix("file:") {
        return answers::hold(args, Path::new(path), bar);
    }
    if args.plan.is_some() {
        return Err(refuse(
            "--plan: an engine says itself how it rounds; only answers of a file do not",
        ));
    }
    let model = args.model.as_deref().unwrap_or(MODEL);
    let weights = golden::open(model).map_err(refuse)?;
    let (tokens, pieces) = if let Some(path) = &args.tokens {
        let prompt = Prompt::read(path)?;
        prompt.check(path, &*weights, 0)?;
        let columns = prompt.tokens.iter().map(Vec::len).max().unwrap_or(0);
        let pieces = if args.split.is_empty() { halves(columns) } else { args.split.clone() };
        (prompt.tokens, pieces)
    } else {
        let pieces = if args.split.is_empty() { PIECES.to_vec() } else { args.split.clone() };
        (vec![drawn(&*weights, &pieces)?], pieces)
    };
    let columns = tokens.iter().map(Vec::len).max().unwrap_or(0);
    let sum = pieces.iter().try_fold(0_usize, |sum, &piece| sum.checked_add(piece));
    if sum != Some(columns) || pieces.contains(&0) {
        return Err(refuse(format!(
            "--split: expected pieces above 0 that sum to {columns}, got {pieces:?}"
        )));
    }
    against_reference(&asked(args, weights, tokens, pieces, bar)).map_err(|e| ended(&e))
}

/// A prompt, and the last token as a step after it: what carries no state shows nothing of it.
fn halves(columns: usize) -> Vec<usize> {
    match columns {
        0..=1 => vec![columns],
        2 => vec![1, 1],
        n => vec![n.div_ceil(2), n / 2 - 1, 1].into_iter().filter(|&piece| piece != 0).collect(),
    }
}

fn drawn(weights: &dyn Weights, pieces: &[usize]) -> anyhow::Result<Vec<u32>> {
    let config = weights.config();
    let sum = pieces.iter().try_fold(0_usize, |sum, &piece| sum.checked_add(piece));
    let columns = sum.filter(|&sum| sum <= config.context_limit());
    let columns = columns.ok_or_else(|| {
        let limit = config.context_limit();
        refuse(format!("--split: {pieces:?} is beyond the context of {limit}"))
    })?;
    let mut rng = Rng::keyed("bisect", 0);
    Ok((0..columns).map(|_| rng.below(config.vocab_size) as u32).collect())
}

fn asked<'a>(
    args: &'a Args,
    weights: Arc<dyn Weights>,
    tokens: Vec<Vec<u32>>,
    pieces: Vec<usize>,
    bar: &ProgressBar,
) -> Asked<'a> {
    let (engine, number) = (&*args.engine, args.keeps.number(&args.number));
    let plant = args.plant.as_deref();
    Asked { engine, number, plant, weights, tokens, pieces, progress: progress(bar) }
}

/// Prompts of a recording, until one is wrong.
fn recorded(args: &Args, name: &str, bar: &ProgressBar) -> anyhow::Result<Vec<Report>> {
    if args.tokens.is_some() || !args.split.is_empty() {
        return Err(refuse("--tokens, --split: a recording has its own prompts"));
    }
    let recording = golden_cmd::open(name)?;
    let prompts = prompts(args, &recording)?;
    if let Some(path) = args.engine.strip_prefix("file:") {
        if args.plant.is_some() {
            return Err(refuse("--plant: no fault can be planted in a file of answers"));
        }
        if args.keeps.kv_cache.is_some() {
            return Err(refuse("--kv-cache: a file of answers keeps no keys and values"));
        }
        let (file, others) = file(Path::new(path))?;
        let Ok([prompt]) = <[&Recorded; 1]>::try_from(prompts) else {
            return Err(refuse("--prompt: expected which of the recording the file answers"));
        };
        let mut report = against_file(&file, path, &recording, prompt).map_err(|e| ended(&e))?;
        if !others.is_empty() {
            report.unknown.push(format!("{}: not judged here", others.join(", ")));
        }
        return Ok(vec![report]);
    }
    let model = match &args.model {
        Some(model) => model.clone(),
        None => golden_cmd::checkpoint_of(&recording.manifest)?.display().to_string(),
    };
    let weights = golden::open(&model).map_err(refuse)?;
    let mut reports = Vec::new();
    for prompt in prompts {
        let asked = asked(args, weights.clone(), Vec::new(), Vec::new(), bar);
        reports.push(against_recording(&asked, &recording, prompt).map_err(|e| ended(&e))?);
        if reports.last().is_some_and(|report| !report.ok()) {
            break;
        }
    }
    Ok(reports)
}

fn prompts<'a>(args: &Args, recording: &'a Recording) -> anyhow::Result<Vec<&'a Recorded>> {
    let all = &recording.manifest.prompts;
    if all.is_empty() {
        return Err(refuse(format!(
            "{}: a recording of no whole model; `karat check` holds ops against it",
            recording.id()
        )));
    }
    let kept: Vec<&Recorded> =
        all.iter().filter(|p| args.prompt.as_ref().is_none_or(|id| *id == p.id)).collect();
    if kept.is_empty() {
        let known = all.iter().map(|p| p.id.as_str()).collect::<Vec<_>>().join(", ");
        return Err(refuse(format!("{}: --prompt: expected one of {known}", recording.id())));
    }
    Ok(kept)
}

/// Hidden states and logits of a file of answers, and what other answers there are in it.
fn file(path: &Path) -> anyhow::Result<(File, Vec<String>)> {
    let wrong = |what: &dyn std::fmt::Display| refuse(format!("{}: {what}", path.display()));
    let data = golden::map::map(path).map_err(|e| wrong(&e))?;
    let parsed = SafeTensors::deserialize(&data).map_err(|e| wrong(&e))?;
    let (mut file, mut others) = (File::new(), Vec::new());
    for (name, tensor) in parsed.tensors() {
        if name != "logits" && !name.starts_with("hidden") {
            if name != "input_ids" && name != "attention_mask" {
                others.push(name);
            }
            continue;
        }
        if tensor.dtype() != Dtype::F32 {
            let got = tensor.dtype();
            return Err(wrong(&format!("tensor {name}: expected F32, got {got:?}")));
        }
        let bytes = tensor.data().as_chunks::<4>().0;
        let values = bytes.iter().map(|&b| f32::from_le_bytes(b)).collect();
        let x = ndarray::ArrayD::from_shape_vec(tensor.shape(), values).map_err(|e| wrong(&e))?;
        file.insert(name, x);
    }
    if file.is_empty() {
        return Err(wrong(&"expected F32 tensors logits or hidden.l, [B, T, …]"));
    }
    others.sort();
    Ok((file, others))
}

fn tell(report: &Report, args: &Args, out: &Out) {
    out.line(&report.subject);
    let number = |x: Option<f64>| x.map_or("not known".to_owned(), |x| format!("{x:.2e}"));
    let row = |row: &benches::bisect::Row| {
        vec![
            row.name(),
            number(row.inherited),
            number(row.local),
            number(row.allowed),
            number(row.after),
            if row.ok { String::new() } else { "OVER".to_owned() },
        ]
    };
    if !report.rows.is_empty() {
        out.table(
            &["part", "inherited", "own", "allowed", "after", ""],
            &report.rows.iter().map(row).collect::<Vec<_>>(),
        );
    }
    let part = report.part();
    for op in report.ops.iter().filter(|op| Some(op.part) == part) {
        out.line(&block(op));
    }
    let others = report.ops.iter().filter(|op| Some(op.part) != part);
    let mut others: Vec<String> = others.map(|op| format!("{} ({})", op.part, op.op)).collect();
    others.dedup();
    if !others.is_empty() {
        out.line(&format!("the same further on: {}", others.join(", ")));
    }
    if let Some(loss) = report.loss {
        out.line(&format!(
            "on its own: KL {:.2e} nats a token, of an emulation of its plan {:.2e}, allowed {:.2e}{}",
            loss.kl,
            loss.emulated,
            loss.allowed,
            if loss.ok() { "" } else { ": OVER" }
        ));
    }
    for unknown in &report.unknown {
        out.line(&format!("cannot be told: {unknown}"));
    }
    match report.blame() {
        None if args.plant.is_some() => out.line("nothing was found"),
        None => out.line("nothing is to blame"),
        Some(part) => {
            let ops = report.blamed().join(", ");
            let ops = if ops.is_empty() { String::new() } else { format!(", {ops}") };
            out.line(&format!("first to blame: {part}{ops}"));
            out.line(&format!("repro: karat bisect{}", flags(args)));
        }
    }
    report.json().iter().for_each(|line| out.json(line));
}

/// What is wrong with an op.
fn block(op: &Op) -> String {
    let at = if op.part == Part::Alone { String::new() } else { format!("{}: ", op.part) };
    let mut lines = vec![format!("OVER {at}{} {}", op.op, op.tensor)];
    lines.extend(block::told(&op.finding));
    if let Some(first) = &op.first {
        let at = first.at.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        lines.push(format!(
            "  first {}[{at}] got {:.6e} want {:.6e} allowed {:.1e}",
            op.tensor, first.got, first.want, first.allowed
        ));
    }
    lines.extend(op.notes.iter().map(|note| format!("  note: {note}")));
    lines.join("\n")
}

/// What has to be typed to see it again.
fn flags(args: &Args) -> String {
    let mut flags = args.job.as_ref().map_or(String::new(), |job| format!(" '{job}'"));
    flags += &typed("against", &*args.against, "reference");
    flags += &typed("engine", &*args.engine, "reference");
    flags += &typed("number", &*args.number, "f32");
    flags += &args.keeps.typed();
    let tokens = args.tokens.as_ref().map(|path| path.display().to_string());
    let split: Vec<String> = args.split.iter().map(ToString::to_string).collect();
    let split = (!split.is_empty()).then(|| split.join(","));
    let given = [
        ("plant", &args.plant),
        ("model", &args.model),
        ("tokens", &tokens),
        ("split", &split),
        ("prompt", &args.prompt),
    ];
    for (name, value) in given {
        flags.extend(value.iter().map(|value| format!(" --{name} {value}")));
    }
    flags
}
