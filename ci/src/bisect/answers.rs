//! Answers of a file, held against the reference of a checkpoint.

use std::path::Path;

use benches::bisect::{Answers, Report, answers_against_reference};
use golden::{Config, Plan, Weights, config::Mlp};
use indicatif::ProgressBar;
use ndarray::{Array2, Array3, Axis, concatenate, s};
use serde::Deserialize;

use super::{Args, ended, progress};
use crate::{
    compare::read::{File, Part},
    exit::refuse,
    logits::Prompt,
};

pub(super) fn hold(args: &Args, path: &Path, bar: &ProgressBar) -> anyhow::Result<Report> {
    let unused = [
        ("--plant", args.plant.is_some()),
        ("--split", !args.split.is_empty()),
        ("--kv-cache", args.keeps.kv_cache.is_some()),
        ("--prompt", args.prompt.is_some()),
    ];
    if let Some((flag, _)) = unused.iter().find(|(_, given)| *given) {
        return Err(refuse(format!("{flag}: answers of a file are as they are")));
    }
    let (Some(model), Some(tokens)) = (&args.model, &args.tokens) else {
        return Err(refuse(
            "--engine file:…: expected --model and --tokens, which say what was asked, or --against golden:DIR",
        ));
    };
    let weights = golden::open(model).map_err(refuse)?;
    let prompt = Prompt::read(tokens)?;
    prompt.check(tokens, &*weights, 0)?;
    let mut answers = read(args, path, &prompt, &*weights)?;
    answers_against_reference(&mut answers, weights, progress(bar)).map_err(|e| ended(&e))
}

fn read(
    args: &Args,
    path: &Path,
    prompt: &Prompt,
    weights: &dyn Weights,
) -> anyhow::Result<Answers> {
    let file = File::open(path)?;
    let file = file.part(None)?;
    let config = weights.config();
    let plan = match (&args.plan, file.metadata("plan")) {
        (Some(plan), _) => declared(plan)?,
        (None, Some(text)) => {
            serde_json::from_str(text).map_err(|e| file.wrong(format!("metadata plan: {e}")))?
        }
        (None, None) => {
            return Err(
                file.wrong("does not say how it rounds: expected --plan FILE with a [plan]")
            );
        }
    };
    let floats = |name: &str, width: usize| -> anyhow::Result<Array2<f32>> {
        let x = file.floats(name)?.ok_or_else(|| missing(&file, name, "F32", width))?;
        rows(&file, name, &x, prompt, width)
    };
    let states = 0..=config.num_hidden_layers();
    let hidden = states.map(|state| floats(&format!("hidden.{state}"), config.hidden_size));
    Ok(Answers {
        name: file.metadata("engine").map_or_else(|| path.display().to_string(), str::to_owned),
        plan,
        config: config.clone(),
        tokens: prompt.tokens.clone(),
        hidden: hidden.collect::<anyhow::Result<_>>()?,
        experts: experts(&file, prompt, config)?,
        logits: floats("logits", config.vocab_size)?,
    })
}

/// The experts of every layer that has some.
fn experts(
    file: &Part<'_>,
    prompt: &Prompt,
    config: &Config,
) -> anyhow::Result<Vec<Option<Array2<i64>>>> {
    let (taken, all) = (config.num_experts_per_tok, config.num_experts);
    let of = |(layer, kind): (usize, &Mlp)| {
        if *kind != Mlp::Sparse {
            return Ok(None);
        }
        let name = format!("experts.{layer}");
        let ids = file.ids(&name)?.ok_or_else(|| missing(file, &name, "I64", taken))?;
        let ids = rows(file, &name, &ids, prompt, taken)?;
        let beyond = |id: &&i64| usize::try_from(**id).map_or(true, |id| all <= id);
        if let Some(id) = ids.iter().find(beyond) {
            let why = format!("tensor {name}: expected ids below {all}, got {id}");
            return Err(file.wrong(why));
        }
        Ok(Some(ids))
    };
    config.mlp_types.iter().enumerate().map(of).collect()
}

fn missing(file: &Part<'_>, name: &str, dtype: &str, width: usize) -> anyhow::Error {
    file.wrong(format!(
        "tensor {name}: missing, expected {dtype} [B, T, {width}] (karat logits --taps hidden,routing writes it)"
    ))
}

/// Rows of all sequences one after another, without padding.
fn rows<T: Copy>(
    file: &Part<'_>,
    name: &str,
    x: &Array3<T>,
    prompt: &Prompt,
    width: usize,
) -> anyhow::Result<Array2<T>> {
    let want = (prompt.tokens.len(), prompt.columns, width);
    if x.dim() != want {
        let (want, got) = ([want.0, want.1, want.2], x.shape());
        return Err(file.wrong(format!("tensor {name}: expected shape {want:?}, got {got:?}")));
    }
    let kept = prompt.padding.iter().enumerate().map(|(i, &pad)| x.slice(s![i, pad.., ..]));
    Ok(concatenate(Axis(0), &kept.collect::<Vec<_>>())?)
}

/// The plan that a file declares.
fn declared(path: &Path) -> anyhow::Result<Plan> {
    #[derive(Deserialize)]
    struct Declares {
        plan: Plan,
    }
    let wrong = |what: &dyn std::fmt::Display| refuse(format!("{}: {what}", path.display()));
    let text = golden::file::text(path).map_err(|e| wrong(&e))?;
    let line = |e: toml::de::Error| wrong(&e.message().lines().next().unwrap_or_default());
    toml::from_str::<Declares>(&text).map(|declares| declares.plan).map_err(line)
}
