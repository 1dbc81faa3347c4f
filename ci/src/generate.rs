//! `karat generate`: a text, continued.

use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
    time::Duration,
};

use benches::generate::{Options, Report, generate};
use golden::engine::Demand;
use serde_json::{Value, json};

use crate::{
    chat::Template,
    exit::{Exit, fail, refuse},
    fit,
    logits::{Prompt, Which, scan},
    out::{self, Out},
    text::{Stream, Text},
};

/// More drafts at a time than any head has ever been right about.
const MAX_DRAFTS: usize = 64;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    which: Which,
    /// What to continue: a user's message, or with --raw the text itself
    #[arg(long, required_unless_present = "tokens", conflicts_with = "tokens")]
    prompt: Option<String>,
    /// A system message before it
    #[arg(long, conflicts_with_all = ["raw", "tokens"])]
    system: Option<String>,
    /// No chat template
    #[arg(long)]
    raw: bool,
    /// safetensors with input_ids i64 [1, T] instead of a text
    #[arg(long, value_name = "FILE")]
    tokens: Option<PathBuf>,
    /// Folder with tokenizer.json, if it is not the model's
    #[arg(long, value_name = "DIR")]
    tokenizer: Option<PathBuf>,
    /// Most tokens to generate
    #[arg(long, default_value_t = 128)]
    max_new: usize,
    /// The most probable token each time
    #[arg(long, conflicts_with_all = ["temperature", "top_k", "top_p"])]
    greedy: bool,
    /// Divides the logits; 0 is greedy. Default: generation_config.json, or 0
    #[arg(long)]
    temperature: Option<f64>,
    /// Keep so many tokens; 0 keeps all
    #[arg(long)]
    top_k: Option<usize>,
    /// Keep the most probable tokens up to this probability
    #[arg(long)]
    top_p: Option<f64>,
    /// Seed of the draws
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Stop after this text
    #[arg(long)]
    stop: Vec<String>,
    /// Do not stop at the model's own end tokens
    #[arg(long)]
    ignore_eos: bool,
    /// Draft so many tokens at a time with the MTP head; greedy only, the text stays the same
    #[arg(long, default_value_t = 0, value_name = "K")]
    speculate: usize,
}

pub(crate) fn run(args: &Args, out: &Out) -> anyhow::Result<Exit> {
    let weights = args.which.weights()?;
    let dir = args.tokenizer.clone().unwrap_or_else(|| PathBuf::from(&args.which.model));
    let text = if args.tokens.is_some() && !dir.join("tokenizer.json").exists() {
        out.note("no tokenizer: token ids are printed");
        None
    } else {
        Some(Text::load(&dir)?)
    };
    let settings = settings(&dir);
    let prompt = match (&args.tokens, &text) {
        (Some(path), _) => {
            let prompt = Prompt::read(path)?;
            prompt.check(path, &*weights, args.max_new)?;
            match &prompt.tokens[..] {
                [row] => row.clone(),
                rows => {
                    return Err(refuse(format!(
                        "{}: tensor input_ids: expected one row, got {}",
                        path.display(),
                        rows.len()
                    )));
                }
            }
        }
        (None, Some(text)) => {
            let prompt = text.encode(&worded(args, &dir)?)?;
            if prompt.is_empty() {
                return Err(refuse("--prompt: an empty prompt"));
            }
            let wrapped =
                Prompt { columns: prompt.len(), padding: vec![0], tokens: vec![prompt.clone()] };
            wrapped.check(Path::new("--prompt"), &*weights, args.max_new)?;
            prompt
        }
        (None, None) => return Err(refuse("--prompt needs a tokenizer")),
    };
    let options = options(args, &settings, &weights.config().eos_token_ids)?;
    let context = prompt.len().saturating_add(args.max_new);
    let drafts = if args.speculate == 0 { 0 } else { context };
    let fed = prompt.len().max(args.speculate + 1);
    let hidden = if args.speculate == 0 { 1 } else { fed };
    let narrowed = args.which.ready.narrowed(&args.which.engine, &args.which.number);
    let demand =
        Demand { sequences: 1, context, fed, logits: args.speculate + 1, hidden, drafts, narrowed };
    fit::check(&args.which.engine, args.which.number(), &*weights, &demand)?;
    let mut engine = args.which.engine(&weights, out)?;
    let mut stream = text.as_ref().map(Stream::new);
    let mut written = String::new();
    let mut failure = None;
    let listener = Box::new(|_| !out::interrupted());
    engine.watch(listener);
    let result = generate(&mut *engine, &prompt, &options, &mut |token| {
        let piece = match &mut stream {
            None => Ok(format!("{token} ")),
            Some(stream) => stream.push(token),
        };
        match piece {
            Ok(piece) => {
                out.text(&piece);
                written.push_str(&piece);
            }
            Err(error) => failure = Some(error),
        }
        let stopped = args.stop.iter().any(|stop| written.contains(stop.as_str()));
        if stopped || failure.is_some() || out::interrupted() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    });
    out.text("\n");
    if let Some(error) = failure {
        return Err(error);
    }
    if out::interrupted() {
        return Err(fail(Exit::Interrupted, "interrupted"));
    }
    let report = match result {
        Err(error) if error.to_string() == golden::engine::NOT_FINITE => {
            let model = &args.which.model;
            out::warn(&format!("karat: {model}: {error}; looking for the weight"));
            scan(model, out)?;
            return Err(fail(Exit::Wrong, format!("{model}: {error}, though every weight is")));
        }
        result => result.map_err(refuse)?,
    };
    tell(&report, &prompt, &written, out);
    Ok(Exit::Ok)
}

fn tell(report: &Report, prompt: &[u32], written: &str, out: &Out) {
    let decode: Duration = report.steps.iter().sum();
    let mut steps = report.steps.clone();
    steps.sort();
    let rate = |tokens: usize, time: Duration| {
        if time.is_zero() { 0.0 } else { tokens as f64 / time.as_secs_f64() }
    };
    let prefill = rate(prompt.len(), report.prefill);
    // The first token comes with the prompt.
    let after = report.tokens.len().saturating_sub(1);
    let overall = rate(after, decode);
    let median = steps.get(steps.len() / 2).copied().unwrap_or_default();
    out.note(&format!(
        "prefill {} tokens, {prefill:.1} tokens/s; decode {after} tokens, {overall:.1} tokens/s, median step {:.1} ms",
        prompt.len(), 1e3 * median.as_secs_f64()
    ));
    if !report.drafted.is_empty() {
        let (drafted, accepted) =
            (report.drafted.iter().sum::<usize>(), report.accepted.iter().sum::<usize>());
        let shares: Vec<String> = report
            .drafted
            .iter()
            .zip(&report.accepted)
            .map(|(d, a)| format!("{:.0} %", 100.0 * *a as f64 / (*d).max(1) as f64))
            .collect();
        out.note(&format!(
            "drafted {drafted}, accepted {accepted} ({}), {:.2} tokens per step",
            shares.join(", "),
            after as f64 / report.steps.len().max(1) as f64
        ));
    }
    out.json(&json!({
        "schema": "karat.result/1", "kind": "generate", "prompt_tokens": prompt.len(), "generated": report.tokens, "text": written,
        "prefill_tokens_per_s": prefill, "decode_tokens_per_s": overall, "drafted": report.drafted, "accepted": report.accepted,
    }));
}

/// The text to continue: the prompt itself, or the conversation that it begins.
fn worded(args: &Args, dir: &Path) -> anyhow::Result<String> {
    let prompt = args.prompt.clone().unwrap_or_default();
    if args.raw {
        return Ok(prompt);
    }
    let template = Template::load(dir)?.ok_or_else(|| {
        refuse(format!("{}: no chat template; --raw continues the text as it is", dir.display()))
    })?;
    let system = args.system.iter().map(|text| json!({"role": "system", "content": text}));
    let messages: Vec<Value> = system.chain([json!({"role": "user", "content": prompt})]).collect();
    template.render(&json!({"messages": messages, "add_generation_prompt": true}))
}

/// `generation_config.json`, where there is one.
fn settings(dir: &Path) -> Value {
    let text = golden::file::text(&dir.join("generation_config.json")).unwrap_or_default();
    serde_json::from_str(&text).unwrap_or(Value::Null)
}

fn options(args: &Args, settings: &Value, eos: &[u32]) -> anyhow::Result<Options> {
    let sampled = settings.get("do_sample").and_then(Value::as_bool).unwrap_or(false)
        && !args.greedy
        && args.speculate == 0;
    let number = |key: &str, default: f64| {
        if sampled { settings.get(key).and_then(Value::as_f64).unwrap_or(default) } else { default }
    };
    let temperature =
        args.temperature.unwrap_or_else(|| number("temperature", if sampled { 1.0 } else { 0.0 }));
    let top_p = args.top_p.unwrap_or_else(|| number("top_p", 1.0));
    let top_k = args.top_k.unwrap_or_else(|| number("top_k", 0.0) as usize);
    if !(temperature.is_finite() && 0.0 <= temperature) {
        return Err(refuse(format!(
            "--temperature {temperature}: expected a number of at least 0"
        )));
    }
    if !(0.0 < top_p && top_p <= 1.0) {
        return Err(refuse(format!("--top-p {top_p}: expected a number in (0, 1]")));
    }
    if MAX_DRAFTS < args.speculate {
        return Err(refuse(format!(
            "--speculate {}: expected at most {MAX_DRAFTS}",
            args.speculate
        )));
    }
    let mut stop = if args.ignore_eos { Vec::new() } else { eos.to_vec() };
    if !args.ignore_eos {
        let ids = match settings.get("eos_token_id") {
            Some(Value::Array(ids)) => ids.clone(),
            Some(id) => vec![id.clone()],
            None => Vec::new(),
        };
        stop.extend(ids.iter().filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok()));
    }
    Ok(Options {
        max_new: args.max_new,
        temperature,
        top_k,
        top_p,
        seed: args.seed,
        stop,
        speculate: args.speculate,
    })
}
