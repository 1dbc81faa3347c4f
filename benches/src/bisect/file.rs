//! A file of answers held against a recording. Needs no weights, and can be fed nothing.

use std::collections::BTreeMap;

use golden::{
    Error,
    compare::Finding,
    recording::{Prompt, Recording},
};
use ndarray::{ArrayD, Axis, Ix3, concatenate, s};

use super::{
    Report,
    parts::{self, rows},
};
use crate::verify::{Rule, held, top_logits};

/// What an engine of any kind wrote down: `hidden.l` and `logits`, each `[B, T, …]`.
pub type File = BTreeMap<String, ArrayD<f32>>;

/// Holds a file of answers against one prompt of a recording: every tensor of it that was recorded.
///
/// # Errors
/// If a tensor is none of the recorded model's or has another shape, if nothing in the file was recorded,
/// or if the recording lacks what its manifest promises.
pub fn against_file(
    file: &File,
    name: &str,
    recording: &Recording,
    prompt: &Prompt,
) -> Result<Report, Error> {
    let model = parts::model(recording)?;
    let layers = model.num_hidden_layers();
    let known: Vec<String> =
        (0..=layers).map(|state| format!("hidden.{state}")).chain(["logits".to_owned()]).collect();
    let real = recording.real_rows(prompt)?;
    let mut findings: Vec<(String, Finding)> = Vec::new();
    let mut report = Report {
        subject: format!("{name} against {}/{}", recording.id(), prompt.id),
        ..Report::default()
    };
    let (mut sketched, mut beyond) = (false, Vec::new());
    for (tensor, x) in file {
        if !known.contains(tensor) {
            return Err(format!(
                "{name}: tensor {tensor}: expected hidden.0 … hidden.{layers} or logits of {}",
                recording.id()
            )
            .into());
        }
        let width = if tensor == "logits" { model.vocab_size } else { model.hidden_size };
        let want = [prompt.batch, prompt.tokens, width];
        if x.shape() != want {
            return Err(format!(
                "{name}: tensor {tensor}: expected shape {want:?} of {}/{}, got {:?}",
                recording.id(),
                prompt.id,
                x.shape()
            )
            .into());
        }
        let x = x.view().into_dimensionality::<Ix3>()?;
        let t = prompt.tokens;
        let kept: Vec<_> =
            real.iter().enumerate().map(|(i, &n)| x.slice(s![i, t - n.., ..])).collect();
        let x = concatenate(Axis(0), &kept)?;
        sketched |= recording.get(&format!("{}/{tensor}.sketch", prompt.id)).is_some();
        let before = findings.len();
        if let Some(finding) = held(recording, prompt, tensor, &x, Rule::F32)? {
            findings.push((tensor.clone(), finding));
        }
        if tensor == "logits" {
            top_logits(recording, prompt, &x, Rule::F32, &mut findings)?;
        }
        if findings.len() == before {
            beyond.push(tensor.as_str());
        }
    }
    let free = |tap: &str| {
        findings.iter().find(|(name, _)| name == tap).map(|(_, finding)| finding.clone())
    };
    report.rows = rows(layers, &free, &BTreeMap::new());
    if report.rows.is_empty() {
        return Err(format!(
            "{name}: it holds nothing that {} has of {}: expected hidden.0 … hidden.{layers} or logits",
            recording.id(),
            prompt.id
        )
        .into());
    }
    if !beyond.is_empty() {
        report.unknown.push(format!("{}: not recorded", beyond.join(", ")));
    }
    report.unknown.push(
        "a file can be fed nothing: what a layer adds is not told from what it inherits; the first over its bound is named, not the op in it".to_owned(),
    );
    if sketched {
        report.unknown.push(
            "only sketches were recorded: distances are estimates to about 25 %, and no token, head or element can be named".to_owned(),
        );
    }
    Ok(report)
}
