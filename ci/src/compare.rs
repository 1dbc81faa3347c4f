//! `karat compare`: logits of any engine against a recording or another file.

use std::path::{Path, PathBuf};

use golden::{
    compare::logits::{Distance, Spread, distance},
    recording::Recording,
};
use ndarray::{Array2, Array3, Ix3};
use safetensors::{Dtype, SafeTensors};
use serde_json::json;

use crate::{
    exit::{Exit, fail, refuse},
    logits::Prompt,
    out::Out,
};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// safetensors with logits f32 [B, T, V]
    got: PathBuf,
    /// safetensors to compare with: logits f32 [B, T, V], optionally input_ids and attention_mask
    #[arg(required_unless_present = "golden", conflicts_with = "golden")]
    want: Option<PathBuf>,
    /// A recording to compare with
    #[arg(long, value_name = "DIR")]
    golden: Option<PathBuf>,
    /// Which prompt of the recording; needed where it has several
    #[arg(long, requires = "golden")]
    prompt: Option<String>,
    /// Largest mean KL(want || got), nats per token
    #[arg(long, default_value_t = 1e-6)]
    max_kl: f64,
    /// Largest relative RMS error; with --golden at least four times the recording's own noise
    #[arg(long, default_value_t = 2e-5)]
    max_rel_rms: f64,
}

pub(crate) fn run(args: &Args, out: &Out) -> anyhow::Result<Exit> {
    for (name, allowed) in [("kl", args.max_kl), ("rel-rms", args.max_rel_rms)] {
        if !(allowed.is_finite() && 0.0 <= allowed) {
            return Err(refuse(format!("--max-{name} {allowed}: expected a number of at least 0")));
        }
    }
    let got = logits(&args.got)?;
    let (want, tokens, noise) = match (&args.golden, &args.want) {
        (Some(dir), _) => recorded(dir, args.prompt.as_deref())?,
        (None, Some(path)) => {
            let tokens = match Prompt::beside(path)? {
                None => Prompt::beside(&args.got)?,
                tokens => tokens,
            };
            (logits(path)?, tokens, 0.0)
        }
        (None, None) => return Err(refuse("compare: a file or --golden")),
    };
    if got.dim() != want.dim() {
        return Err(refuse(format!(
            "{}: tensor logits: expected shape {:?}, got {:?}",
            args.got.display(),
            want.shape(),
            got.shape()
        )));
    }
    if let Some(tokens) = &tokens
        && (tokens.tokens.len(), tokens.columns) != (got.dim().0, got.dim().1)
    {
        return Err(refuse(format!(
            "tensor input_ids: expected shape {:?}, as the logits beside it have, got [{}, {}]",
            &got.shape()[..2],
            tokens.tokens.len(),
            tokens.columns
        )));
    }
    let (rows_want, rows_got, next) = real_rows(&want, &got, tokens.as_ref());
    let d = distance(&rows_want.view(), &rows_got.view(), &next);
    let allowed = args.max_rel_rms.max(4.0 * noise);
    let ok = d.not_finite == 0
        && d.kl.mean <= args.max_kl
        && d.rel_rms <= allowed
        && d.illegal_flips == 0;
    tell(out, &d, args.max_kl, allowed, ok);
    Ok(if ok { Exit::Ok } else { Exit::Wrong })
}

fn tell(out: &Out, d: &Distance, max_kl: f64, max_rel_rms: f64, ok: bool) {
    let spread = |s: &Spread| {
        format!(
            "{:.3e} ± {:.1e} (n {}, p99 {:.3e}, max {:.3e})",
            s.mean, s.error, s.n, s.p99, s.max
        )
    };
    out.line(&format!("KL(want || got)     {}   allowed mean {max_kl:.1e} nats", spread(&d.kl)));
    out.line(&format!("relative RMS        {:.3e}   allowed {max_rel_rms:.1e}", d.rel_rms));
    out.line(&format!("NMSE                {:.3e}   of the variance within rows", d.nmse));
    out.line(&format!("top-1 / top-10      {:.4} / {:.4} of {} rows", d.top1, d.top10, d.rows));
    out.line(&format!(
        "flips               {} inside the error of their row, {} beyond it (allowed 0)",
        d.legal_flips, d.illegal_flips
    ));
    match &d.delta_nll {
        Some(nll) => out.line(&format!("delta NLL           {} nats", spread(nll))),
        None => out.line("delta NLL           not known: no input_ids beside the logits"),
    }
    out.line(&format!("not finite          {} rows", d.not_finite));
    out.line(if ok { "same" } else { "different" });
    let spread = |s: &Spread| json!({"n": s.n, "mean": s.mean, "standard_error": s.error, "p99": s.p99, "max": s.max.to_string()});
    out.json(&json!({
        "schema": "karat.result/1", "kind": "compare", "ok": ok, "rows": d.rows, "kl": spread(&d.kl), "rel_rms": d.rel_rms.to_string(),
        "nmse": d.nmse.to_string(), "top1": d.top1, "top10": d.top10, "legal_flips": d.legal_flips, "illegal_flips": d.illegal_flips,
        "delta_nll": d.delta_nll.as_ref().map(spread), "not_finite": d.not_finite,
        "allowed": {"kl": max_kl, "rel_rms": max_rel_rms},
    }));
}

/// Rows that are not padding, and the token that follows each.
fn real_rows(
    want: &Array3<f32>,
    got: &Array3<f32>,
    tokens: Option<&Prompt>,
) -> (Array2<f32>, Array2<f32>, Vec<Option<u32>>) {
    let (b, t, v) = want.dim();
    let (mut rows, mut next) = (Vec::new(), Vec::new());
    for i in 0..b {
        let pad = tokens.map_or(0, |p| p.padding[i]);
        for at in pad..t {
            rows.push(i * t + at);
            next.push(tokens.and_then(|p| p.tokens[i].get(at - pad + 1).copied()));
        }
    }
    let flat = |x: &Array3<f32>| {
        let mut all = Array2::zeros((rows.len(), v));
        for (mut row, &from) in all.rows_mut().into_iter().zip(&rows) {
            row.assign(&x.slice(ndarray::s![from / t, from % t, ..]));
        }
        all
    };
    (flat(want), flat(got), next)
}

/// Recorded logits of one prompt, its tokens, and how far the official f32 run is from double.
fn recorded(
    dir: &Path,
    prompt: Option<&str>,
) -> anyhow::Result<(Array3<f32>, Option<Prompt>, f64)> {
    let recording = Recording::open(dir).map_err(|e| fail(Exit::Recording, e.to_string()))?;
    let prompts = &recording.manifest.prompts;
    let names = || prompts.iter().map(|p| p.id.as_str()).collect::<Vec<_>>().join(", ");
    let found = match prompt {
        Some(id) => prompts.iter().find(|p| p.id == id),
        None => prompts.first().filter(|_| prompts.len() == 1),
    };
    let found = found.ok_or_else(|| {
        refuse(format!("{}: --prompt: expected one of {}", dir.display(), names()))
    })?;
    let name = format!("{}/logits", found.id);
    let wrong = |e: String| fail(Exit::Recording, e);
    let want = recording.f32(&name).map_err(|e| wrong(e.to_string()))?;
    let want = want
        .into_dimensionality::<Ix3>()
        .map_err(|e| wrong(format!("{}: {name}: {e}", dir.display())))?;
    let tokens = recording.tokens(found).map_err(|e| wrong(e.to_string()))?;
    let padding = tokens.iter().map(|row| found.tokens - row.len()).collect();
    Ok((
        want,
        Some(Prompt { tokens, padding, columns: found.tokens }),
        recording.noise(&name, "f64").rel_rms,
    ))
}

fn logits(path: &Path) -> anyhow::Result<Array3<f32>> {
    let wrong = |what: &dyn std::fmt::Display| refuse(format!("{}: {what}", path.display()));
    let data = golden::map::map(path).map_err(|e| wrong(&e))?;
    let file = SafeTensors::deserialize(&data).map_err(|e| wrong(&e))?;
    let tensor = file
        .tensor("logits")
        .map_err(|_| wrong(&"tensor logits: missing, expected F32 [B, T, V]"))?;
    let (dtype, shape) = (tensor.dtype(), tensor.shape());
    let (Dtype::F32, [b, t, v]) = (dtype, shape) else {
        return Err(wrong(&format!(
            "tensor logits: expected F32 [B, T, V], got {dtype:?} {shape:?}"
        )));
    };
    if b * t * v == 0 {
        return Err(wrong(&format!("tensor logits: empty, shape {shape:?}")));
    }
    let values = tensor.data().as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
    Array3::from_shape_vec((*b, *t, *v), values).map_err(|e| wrong(&e))
}
