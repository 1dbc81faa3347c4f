//! `karat logits`: what a model says, as a file that any other program can read.

use std::{path::PathBuf, sync::Arc};

use benches::{
    Number,
    ask::{Decode, INTERRUPTED, Request, Said, ask},
};
use golden::{
    Engine, Weights,
    checkpoint::Checkpoint,
    recording::{Recorded, serialize},
};
use ndarray::{Array2, Array3};
use safetensors::{Dtype, SafeTensors};
use serde_json::json;

use crate::{
    exit::{Exit, fail, refuse},
    files,
    keeps::Keeps,
    out::{self, Out},
    ready::Ready,
};

/// Which model, computed by what.
#[derive(Debug, clap::Args)]
pub(crate) struct Which {
    /// A checkpoint folder, or synthetic:PRESET[,layers=N][,experts=E][,dtype=D][,seed=S][,yarn=F]
    #[arg(long, env = "KARAT_MODEL")]
    pub(crate) model: String,
    /// What computes it: reference, cpu, the fast kernels of this machine, or cuda, its GPU
    #[arg(long, default_value = "reference", env = "KARAT_ENGINE")]
    pub(crate) engine: String,
    /// Number type: of the reference f32, f64 for the oracle, or bf16, which emulates the official code in
    /// bf16; of cpu f32 over weights as they are, bf16 in products of bf16, or weights narrowed to int8 or int4
    #[arg(long, default_value = "f32", env = "KARAT_NUMBER")]
    pub(crate) number: String,
    #[command(flatten)]
    pub(crate) keeps: Keeps,
    #[command(flatten)]
    pub(crate) ready: Ready,
}

impl Which {
    /// What it computes in.
    pub(crate) fn number(&self) -> Number<'_> {
        self.keeps.number(&self.number)
    }

    /// The model's weights.
    pub(crate) fn weights(&self) -> anyhow::Result<Arc<dyn Weights>> {
        golden::open(&self.model).map_err(refuse)
    }

    /// The engine, ready to be asked.
    pub(crate) fn engine(
        &self,
        weights: &Arc<dyn Weights>,
        out: &Out,
    ) -> anyhow::Result<Box<dyn Engine>> {
        self.ready.engine(&self.engine, self.number(), weights, out)
    }

    /// Both.
    pub(crate) fn open(&self, out: &Out) -> anyhow::Result<(Box<dyn Engine>, Arc<dyn Weights>)> {
        let weights = self.weights()?;
        Ok((self.engine(&weights, out)?, weights))
    }
}

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    which: Which,
    /// safetensors with input_ids i64 [B, T] and optionally attention_mask i64 [B, T] (left padding)
    #[arg(long, value_name = "FILE")]
    tokens: PathBuf,
    /// safetensors to write: logits f32 [B, T, V], …
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Also hidden.0 … hidden.L, and experts.l of every router, i64 [B, T, A]
    #[arg(long, value_enum, value_delimiter = ',')]
    taps: Vec<Taps>,
    /// Feed the prompt in these pieces, which sum to T
    #[arg(long, value_delimiter = ',', value_name = "N,N,…")]
    split: Vec<usize>,
    /// Continue greedily for so many tokens: generated i64 [B, N], step_logits f32 [B, N + 1, V]
    #[arg(long, value_name = "N")]
    decode: Option<usize>,
    /// Also mtp_logits f32 [B, T - 1, V]
    #[arg(long)]
    mtp: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Taps {
    /// Hidden states, as `output_hidden_states` gives them.
    Hidden,
    /// Experts that routers chose.
    Routing,
}

pub(crate) fn run(args: &Args, out: &Out) -> anyhow::Result<Exit> {
    let prompt = Prompt::read(&args.tokens)?;
    let (mut engine, weights) = args.which.open(out)?;
    let (b, t) = (prompt.tokens.len(), prompt.columns);
    prompt.check(&args.tokens, &*weights, args.decode.unwrap_or(0))?;
    let sum = args.split.iter().try_fold(0_usize, |sum, &piece| sum.checked_add(piece));
    if !args.split.is_empty() && (sum != Some(t) || args.split.contains(&0)) {
        return Err(refuse(format!(
            "--split: expected pieces above 0 that sum to {t}, got {:?}",
            args.split
        )));
    }
    if args.mtp && !engine.has_mtp() {
        return Err(refuse(format!("--mtp: {} has no mtp.* tensors", args.which.model)));
    }
    let fed: usize = prompt.tokens.iter().map(Vec::len).sum();
    let bar = out.bar((fed + b * args.decode.unwrap_or(0)) as u64, "tokens", false);
    let request = Request {
        tokens: prompt.tokens.clone(),
        padding: prompt.padding.clone(),
        split: args.split.clone(),
        decode: args.decode.map_or(Decode::No, Decode::Greedy),
        mtp: args.mtp,
        forced_routing: None,
    };
    let watch = benches::clock::Stopwatch::new();
    let layers = weights.config().num_hidden_layers();
    engine.watch(Box::new({
        let bar = bar.clone();
        move |layer| {
            bar.set_message(format!("layer {}/{layers}", layer + 1));
            bar.tick();
            !out::interrupted()
        }
    }));
    let said = ask(&mut *engine, &request, &mut |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
        !out::interrupted()
    });
    bar.finish_and_clear();
    let said = said.map_err(|e| {
        if e.to_string() == INTERRUPTED {
            fail(Exit::Interrupted, "interrupted; nothing was written")
        } else {
            refuse(e)
        }
    })?;
    if let Some(what) = not_finite(&said) {
        let model = &args.which.model;
        out::warn(&format!("karat: {model}: {what} are not finite; looking for the weight"));
        scan(model, out)?;
        return Err(fail(
            Exit::Wrong,
            format!("{model}: {what} are not finite, though every weight is; nothing was written"),
        ));
    }
    let data = pack(&said, &prompt, args, &*engine)?;
    files::replace(&args.out, &data)
        .map_err(|e| fail(Exit::Unfit, format!("{}: {e}", args.out.display())))?;
    let seconds = watch.elapsed().as_secs_f64();
    let peak = benches::peak_memory();
    out.line(&format!("{}: {b} x {t} tokens in {seconds:.1} s", args.out.display()));
    if let Some(peak) = peak {
        out.line(&format!("peak memory {:.2} GB", peak as f64 / 1e9));
    }
    out.json(&json!({"schema": "karat.result/1", "kind": "logits", "out": args.out.display().to_string(), "sequences": b, "tokens": t,
        "seconds": seconds, "peak_bytes": peak, "engine": engine.name(), "model": args.which.model}));
    Ok(Exit::Ok)
}

/// The first of all answers that has a NaN or an infinity.
fn not_finite(said: &Said) -> Option<String> {
    let bad = |x: &Array2<f32>| x.iter().any(|x| !x.is_finite());
    let hidden = said.hidden.iter().position(bad).map(|layer| format!("hidden states {layer}"));
    let named = |name: &str, found: bool| found.then(|| name.to_owned());
    named("logits", bad(&said.logits))
        .or(hidden)
        .or(named("logits of a decoded token", said.steps.iter().any(bad)))
        .or(named("MTP logits", said.mtp.as_ref().is_some_and(bad)))
}

/// Names the first weight that is NaN or infinite.
pub(crate) fn scan(model: &str, out: &Out) -> anyhow::Result<Exit> {
    if model.starts_with("synthetic:") {
        out.line("synthetic weights are finite by construction");
        return Ok(Exit::Ok);
    }
    let checkpoint = Checkpoint::open(std::path::Path::new(model)).map_err(refuse)?;
    let bar = out.bar(0, "scan", true);
    let found = checkpoint.first_not_finite(&mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
        !out::interrupted()
    });
    bar.finish_and_clear();
    match found.map_err(refuse)? {
        Some((tensor, at, value)) => {
            Err(refuse(format!("{model}: tensor {tensor}: {value} at element {at}")))
        }
        None if out::interrupted() => Err(fail(Exit::Interrupted, "interrupted")),
        None => {
            out.line("every weight is finite");
            Ok(Exit::Ok)
        }
    }
}

/// A prompt as it came in a file.
#[derive(Debug)]
pub(crate) struct Prompt {
    /// Per sequence, without padding.
    pub(crate) tokens: Vec<Vec<u32>>,
    /// Columns of padding before each.
    pub(crate) padding: Vec<usize>,
    /// `T`, padding included.
    pub(crate) columns: usize,
}

impl Prompt {
    /// `input_ids` and `attention_mask` of a safetensors file.
    pub(crate) fn read(path: &std::path::Path) -> anyhow::Result<Prompt> {
        Prompt::beside(path)?
            .ok_or_else(|| refuse(format!("{}: tensor input_ids: missing", path.display())))
    }

    /// The same, where a file need not have them.
    pub(crate) fn beside(path: &std::path::Path) -> anyhow::Result<Option<Prompt>> {
        let wrong = |what: &dyn std::fmt::Display| refuse(format!("{}: {what}", path.display()));
        let data = golden::map::map(path).map_err(|e| wrong(&e))?;
        let file = SafeTensors::deserialize(&data).map_err(|e| wrong(&e))?;
        Prompt::within(&file, "").map_err(|e| wrong(&e))
    }

    /// The same of tensors whose names begin so: what is wrong comes without the file's name.
    pub(crate) fn within(file: &SafeTensors<'_>, prefix: &str) -> Result<Option<Prompt>, String> {
        let Some(ids) = integers(file, &format!("{prefix}input_ids"))? else {
            return Ok(None);
        };
        let mask = integers(file, &format!("{prefix}attention_mask"))?;
        let (b, t) = ids.dim();
        if b == 0 || t == 0 {
            return Err(format!("tensor {prefix}input_ids: an empty prompt, shape [{b}, {t}]"));
        }
        let (mut tokens, mut padding) = (Vec::new(), Vec::new());
        if let Some(mask) = &mask
            && mask.dim() != (b, t)
        {
            return Err(format!(
                "tensor {prefix}attention_mask: expected shape [{b}, {t}], got {:?}",
                mask.shape()
            ));
        }
        for (i, row) in ids.rows().into_iter().enumerate() {
            let pad = match &mask {
                None => 0,
                Some(mask) => {
                    let row = mask.row(i);
                    let real = row.iter().filter(|&&m| m == 1).count();
                    let left =
                        row.iter().enumerate().all(|(at, &m)| m == i64::from(t - real <= at));
                    if !left || real == 0 {
                        return Err(format!(
                            "tensor {prefix}attention_mask: row {i}: expected zeros, then at least one 1 (left padding)"
                        ));
                    }
                    t - real
                }
            };
            let token = |(at, &id): (usize, &i64)| {
                u32::try_from(id)
                    .map_err(|_| format!("tensor {prefix}input_ids: row {i}, column {at}: id {id}"))
            };
            tokens.push(row.iter().enumerate().skip(pad).map(token).collect::<Result<_, _>>()?);
            padding.push(pad);
        }
        Ok(Some(Prompt { tokens, padding, columns: t }))
    }

    /// Ids inside the vocabulary, and room for the prompt and `more` tokens.
    pub(crate) fn check(
        &self,
        path: &std::path::Path,
        weights: &dyn Weights,
        more: usize,
    ) -> anyhow::Result<()> {
        let config = weights.config();
        for (i, (row, pad)) in self.tokens.iter().zip(&self.padding).enumerate() {
            if let Some(at) = row.iter().position(|&id| config.vocab_size <= id as usize) {
                return Err(refuse(format!(
                    "{}: tensor input_ids: row {i}, column {}: expected an id below vocab_size {}, got {}",
                    path.display(),
                    at + pad,
                    config.vocab_size,
                    row[at]
                )));
            }
            if config.context_limit() < row.len().saturating_add(more) {
                return Err(refuse(format!(
                    "{}: row {i}: {} tokens and {more} more are beyond the context of {} (max_position_embeddings{})",
                    path.display(),
                    row.len(),
                    config.context_limit(),
                    if config.rope.yarn.is_some() { ", extended by YaRN" } else { "; no YaRN" }
                )));
            }
        }
        Ok(())
    }
}

/// `[B, T]` integers, if they are there.
pub(crate) fn integers(file: &SafeTensors<'_>, name: &str) -> Result<Option<Array2<i64>>, String> {
    let Ok(tensor) = file.tensor(name) else { return Ok(None) };
    let (dtype, shape) = (tensor.dtype(), tensor.shape());
    let (Dtype::I64, [b, t]) = (dtype, shape) else {
        return Err(format!("tensor {name}: expected I64 [B, T], got {dtype:?} {shape:?}"));
    };
    let values = tensor.data().as_chunks::<8>().0.iter().map(|&b| i64::from_le_bytes(b)).collect();
    Array2::from_shape_vec((*b, *t), values).map(Some).map_err(|e| format!("tensor {name}: {e}"))
}

/// Rows of all sequences one after another, each `short` of its tokens, as `[B, T - short, …]`; zeros at padding.
fn padded<T: Copy + Default>(x: &Array2<T>, prompt: &Prompt, short: usize) -> Array3<T> {
    let (b, t) = (prompt.tokens.len(), prompt.columns);
    let mut all = Array3::from_elem((b, t - short, x.ncols()), T::default());
    let mut start = 0;
    for (i, row) in prompt.tokens.iter().enumerate() {
        let n = row.len() - short;
        let first = t - short - n;
        all.slice_mut(ndarray::s![i, first.., ..])
            .assign(&x.slice(ndarray::s![start..start + n, ..]));
        start += n;
    }
    all
}

/// The answer as safetensors; rows at padding are zeros. Who said it and how it rounds are beside it.
fn pack(said: &Said, prompt: &Prompt, args: &Args, engine: &dyn Engine) -> anyhow::Result<Vec<u8>> {
    let b = prompt.tokens.len();
    let mut floats: Vec<(String, Array3<f32>)> =
        vec![("logits".to_owned(), padded(&said.logits, prompt, 0))];
    if args.taps.contains(&Taps::Hidden) {
        floats.extend(
            said.hidden
                .iter()
                .enumerate()
                .map(|(layer, x)| (format!("hidden.{layer}"), padded(x, prompt, 0))),
        );
    }
    if let Some(mtp) = &said.mtp {
        floats.push(("mtp_logits".to_owned(), padded(mtp, prompt, 1)));
    }
    if args.decode.is_some() {
        let views: Vec<_> = said.steps.iter().map(|x| x.view()).collect();
        let steps = if views.is_empty() {
            // No step: the row that would choose the first token.
            let mut last = Array3::zeros((b, 1, said.logits.ncols()));
            let mut end = 0;
            for (i, row) in prompt.tokens.iter().enumerate() {
                end += row.len();
                last.slice_mut(ndarray::s![i, 0, ..]).assign(&said.logits.row(end - 1));
            }
            last
        } else {
            ndarray::stack(ndarray::Axis(0), &views)?
        };
        floats.push(("step_logits".to_owned(), steps));
    }
    let mut tensors: Vec<(String, Recorded)> =
        floats.into_iter().map(|(name, x)| (name, Recorded::F32(x.into_dyn()))).collect();
    if args.taps.contains(&Taps::Routing) {
        for (layer, routing) in said.routing.iter().enumerate() {
            let Some(routing) = routing else { continue };
            let ids = padded(&routing.ids, prompt, 0);
            tensors.push((format!("experts.{layer}"), Recorded::I64(ids.into_dyn())));
        }
    }
    if let Some(n) = args.decode {
        let ids = said.generated.iter().flatten().map(|&id| i64::from(id)).collect();
        let ids = Array2::from_shape_vec((b, n), ids)?;
        tensors.push(("generated".to_owned(), Recorded::I64(ids.into_dyn())));
    }
    let plan = serde_json::to_string(&engine.plan())?;
    Ok(serialize(&tensors, &[("engine", &engine.name()), ("plan", &plan)])?)
}
