//! What formats lose, as tables and for programs.

use benches::{
    Kept,
    formats::{Loss, Mean, Told},
    report::number as finite,
};
use serde_json::{Value, json};

use super::Format;
use crate::{fit, out::Out};

/// Two tables, a line per format each: what is judged, and what is beside bf16. `again` is what has to be
/// typed to see a format again.
pub(crate) fn tell(subject: &str, formats: &[Format], again: &dyn Fn(&str) -> String, out: &Out) {
    let texts = formats.iter().any(|one| 1 < one.told.len());
    let texts = if texts { "texts" } else { "weights" };
    out.table(
        &[
            "format",
            texts,
            "mean KL to f32",
            "largest",
            "of its plan",
            "allowed",
            "top-1",
            "ΔNLL",
            "result",
        ],
        &formats.iter().filter_map(judged).collect::<Vec<_>>(),
    );
    out.line("all of it beside the engine in bf16");
    out.table(
        &["format", "tokens", "mean KL to bf16", "largest", "top-1", "ΔNLL"],
        &formats.iter().filter_map(beside).collect::<Vec<_>>(),
    );
    if let Some(Format { nll: Some(nll), ln_vocabulary, .. }) = formats.first() {
        let blind = ln_vocabulary - 1.0 <= *nll;
        let remark = if blind { ": this text is not predicted, so ΔNLL says little" } else { "" };
        out.line(&format!(
            "a token costs {nll:.3} nats in bf16, ln V is {ln_vocabulary:.3}{remark}"
        ));
    }
    for format in formats {
        out.json(&object(subject, format));
        for told in format.told.iter().filter(|told| !told.ok()) {
            let text =
                if format.told.len() == 1 { String::new() } else { format!(" {}", told.prompt) };
            out.line(&format!("FAIL {}{text}: {}", format.number, why(told)));
        }
        if !format.ok() {
            out.line(&format!("  repro: {}", again(&format.number)));
        }
    }
}

/// What is wrong with a text.
pub(crate) fn why(told: &Told) -> String {
    for (distance, whose) in
        [(&told.own, "the engine"), (&told.bf16, "the engine"), (&told.emulated, "the emulation")]
    {
        if 0 < distance.not_finite {
            return format!("{} rows of {whose} are not finite", distance.not_finite);
        }
    }
    let (kl, allowed) = (told.own.kl.mean, told.allowed());
    let line = format!("mean KL to f32 {kl:.2e}, allowed {allowed:.2e} ({:.1}x)", kl / allowed);
    match &told.flips {
        Some((_, Some(illegal))) => format!("{line}; {illegal}"),
        _ => line,
    }
}

/// The mean of what the texts of a format may diverge.
fn allowed(format: &Format) -> f64 {
    let rows = |told: &Told| told.own.rows as f64;
    let sum: f64 = format.told.iter().map(|told| rows(told) * told.allowed()).sum();
    sum / format.told.iter().map(rows).sum::<f64>()
}

fn judged(format: &Format) -> Option<Vec<String>> {
    let own = Loss::of(format.told.iter().map(|told| &told.own))?;
    let emulated = Loss::of(format.told.iter().map(|told| &told.emulated))?;
    let texts = format.told.len();
    Some(vec![
        format.number.clone(),
        if texts == 1 { fit::size(format.weights()) } else { texts.to_string() },
        format!("{:.2e}", own.kl.mean),
        format!("{:.2e}", own.kl.max),
        format!("{:.2e}", emulated.kl.mean),
        format!("{:.2e}", allowed(format)),
        share(&own.top1),
        change(own.delta_nll.as_ref()),
        if format.ok() { "passed".to_owned() } else { "FAILED".to_owned() },
    ])
}

fn beside(format: &Format) -> Option<Vec<String>> {
    let loss = Loss::of(format.told.iter().map(|told| &told.bf16))?;
    Some(vec![
        format.number.clone(),
        loss.kl.n.to_string(),
        with_error(&format!("{:.2e}", loss.kl.mean), loss.kl.error),
        format!("{:.2e}", loss.kl.max),
        share(&loss.top1),
        change(loss.delta_nll.as_ref()),
    ])
}

fn share(top1: &Mean) -> String {
    format!("{:.1} %", 100.0 * top1.mean)
}

fn change(nll: Option<&Mean>) -> String {
    nll.map_or_else(|| "-".to_owned(), |nll| with_error(&format!("{:+.1e}", nll.mean), nll.error))
}

/// A value and its standard error, where one is known.
fn with_error(value: &str, error: Option<f64>) -> String {
    error.map_or_else(|| value.to_owned(), |error| format!("{value} ± {error:.1e}"))
}

fn object(subject: &str, format: &Format) -> Value {
    let loss = |loss: Option<Loss>| {
        loss.map(|loss| {
            json!({"kl": mean(&loss.kl), "top1": mean(&loss.top1),
            "delta_nll": loss.delta_nll.as_ref().map(mean)})
        })
    };
    json!({
        "schema": "karat.result/1", "kind": "format", "subject": subject, "number": format.number, "kv_cache": format.kept.map(Kept::name),
        "ok": format.ok(), "outcome": if format.ok() { "passed" } else { "failed" },
        "texts": format.told.len(), "weights_bytes": format.weights(),
        "memory_needed": format.memory,
        "to_f32": loss(Loss::of(format.told.iter().map(|told| &told.own))),
        "plan_to_f32": loss(Loss::of(format.told.iter().map(|told| &told.emulated))),
        "mean_kl_allowed": finite(allowed(format)),
        "to_bf16": loss(Loss::of(format.told.iter().map(|told| &told.bf16))),
        "nll_in_bf16": format.nll.map(finite), "ln_vocabulary": finite(format.ln_vocabulary),
    })
}

fn mean(mean: &Mean) -> Value {
    json!({"n": mean.n, "mean": finite(mean.mean), "standard_error": mean.error.map(finite),
        "max": finite(mean.max)})
}
