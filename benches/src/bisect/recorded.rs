//! An engine held against a recording, layer by layer.
//!
//! Where every hidden state was recorded whole, each layer is fed the recorded one before it. Of a
//! sketch a distance can be estimated, but nothing can be fed: what a layer adds is then not told from
//! what it got, and the first layer over its bound is named. Which op is to blame the reference says,
//! where there are weights to compute with and it agrees with the recording itself.

use std::{collections::BTreeMap, sync::Arc};

use golden::{
    Engine, Error,
    compare::matrices,
    recording::{Kind, Prompt, Recording},
    tap::{self, Forced, Part, RESIDUAL, Value},
};
use ndarray::{Array2, Axis};

use super::{
    Asked, Report,
    model::Oracle,
    parts,
    progress::Steps,
    walk::{Given, Text, walk},
};
use crate::{
    emulation::verify_bf16,
    same,
    verify::{Rule, recorded_routing, rows, verify},
};

/// Holds an engine against one prompt of a recording, and where it is wrong against the reference.
///
/// # Errors
/// If the engine cannot run or is of another model, if the recording has nothing of a part or lacks what
/// its manifest promises, or if the work was ended.
pub fn against_recording(
    asked: &Asked<'_>,
    recording: &Recording,
    prompt: &Prompt,
) -> Result<Report, Error> {
    parts::same_sizes(recording, asked.weights.config())?;
    let steps = Steps::new(asked.progress.clone());
    let mut engine = crate::engine(asked.engine, asked.number, asked.weights.clone(), asked.plant)?;
    engine.watch(steps.listener());
    let layers = engine.config().num_hidden_layers();
    let pieces = prompt.split.as_ref().map_or(1, Vec::len) + prompt.decode.unwrap_or(0);
    steps.expect(layers * pieces);
    // Layers tell of themselves, and end the work as well.
    let told = &mut |_, _| true;
    let rule = Rule::of(asked.number.name);
    let verified = if asked.number.name == "bf16" {
        let make = || {
            let mut emulated = crate::emulated(asked.weights.clone(), asked.plant)?;
            emulated.watch(steps.listener());
            Ok(emulated)
        };
        verify_bf16(&make, recording, prompt, told)?
    } else {
        verify(&mut *engine, recording, prompt, rule, told)?
    };
    let find = |name: &str| verified.findings.iter().find(|(tap, _)| tap == name);
    let free = |name: &str| find(name).map(|(_, finding)| finding.clone());
    let mut report = Report {
        subject: format!("{} against {}/{}", engine.name(), recording.id(), prompt.id),
        ..Report::default()
    };
    let fed = if engine.forces() {
        steps.expect(layers * text(recording, prompt)?.pieces.len());
        streams(&mut *engine, recording, prompt, rule, layers)?
    } else {
        None
    };
    let local = fed.map(|fed| {
        let held = |(layer, fed): (usize, &Fed)| {
            let name = format!("hidden.{layer}");
            let bound = rule.bound(recording.noise(&format!("{}/{name}", prompt.id), rule.kind));
            (name.clone(), matrices(&name, &fed.want, &fed.got, &bound))
        };
        fed.iter().enumerate().map(held).collect::<BTreeMap<_, _>>()
    });
    if local.is_none() {
        let why = if engine.forces() {
            "hidden states were not recorded whole"
        } else {
            "the engine takes no inputs of others"
        };
        report.unknown.push(format!(
            "{why}: what a layer adds is not told from what it inherits; the first over its bound is named"
        ));
    }
    report.rows = parts::rows(layers, &free, &local.unwrap_or_default());
    if report.rows.is_empty() {
        let (id, prompt) = (recording.id(), &prompt.id);
        return Err(format!(
            "{id}: prompt {prompt}: no hidden state and no logits to hold it against"
        )
        .into());
    }
    if let Some(flip) = &verified.illegal_flip {
        report.unknown.push(format!("routing: {flip}"));
    }
    if report.ok() && verified.ok() {
        return Ok(report);
    }
    let text = continued(recording, prompt)?;
    let mut oracle = crate::engine("reference", "f64", asked.weights.clone(), None)?;
    oracle.watch(steps.listener());
    steps.expect(layers * pieces);
    let agrees = asked.number.name == "bf16"
        || verify(&mut *oracle, recording, prompt, Rule::F64, told)?.ok();
    if agrees {
        let oracle =
            Oracle::new(asked.weights.clone(), asked.number.name, engine.plan(), text, steps)?;
        let found = oracle.hold(&mut *engine)?;
        report.unknown.extend(found.unknown);
        report.ops = found.ops;
    } else {
        report.unknown.push(
            "the reference disagrees with this recording itself: the layer is named, not the op in it"
                .to_owned(),
        );
    }
    if report.ok() {
        report.rows.iter_mut().last().into_iter().for_each(|row| row.ok = false);
        let why = match verified.first_bad() {
            Some((tap, _)) => format!("{tap} is over its bound"),
            None => "other experts were chosen than recorded".to_owned(),
        };
        report.unknown.push(format!("{why}, and no part is found to blame"));
    }
    Ok(report)
}

/// The prompt, in its pieces.
fn text(recording: &Recording, prompt: &Prompt) -> Result<Text, Error> {
    let tokens = recording.tokens(prompt)?;
    let pieces = match &prompt.split {
        Some(split) if !prompt.padded => split.clone(),
        _ => vec![prompt.tokens],
    };
    Ok(Text { tokens, pieces, drafts: true })
}

/// The prompt and the first steps after it, if it was continued: what is wrong with a step shows there.
fn continued(recording: &Recording, prompt: &Prompt) -> Result<Text, Error> {
    const STEPS: usize = 3;
    let mut text = text(recording, prompt)?;
    if prompt.kind != Kind::Decode {
        return Ok(text);
    }
    let generated = recording.i64(&format!("{}/generated", prompt.id))?;
    let steps = generated.len_of(Axis(1)).min(STEPS);
    for (row, next) in text.tokens.iter_mut().zip(generated.outer_iter()) {
        for &id in next.iter().take(steps) {
            row.push(u32::try_from(id)?);
        }
    }
    text.pieces.extend(vec![1; steps]);
    Ok(text)
}

/// What a layer was fed last, and what it made of it.
pub(crate) struct Fed {
    /// As recorded.
    pub(crate) want: Array2<f32>,
    /// As computed.
    pub(crate) got: Array2<f32>,
}

/// What each layer makes of the recorded stream before it, the embedding first and the last layer with the
/// final norm; nothing where not all of it was recorded.
pub(crate) fn streams(
    engine: &mut dyn Engine,
    recording: &Recording,
    prompt: &Prompt,
    rule: Rule,
    layers: usize,
) -> Result<Option<Vec<Fed>>, Error> {
    let real = recording.real_rows(prompt)?;
    let mut streams: Vec<Array2<f32>> = Vec::new();
    for layer in 0..=layers {
        match rows(recording, prompt, &rule.tap(&format!("hidden.{layer}")), &real, 0)? {
            Some(x) => streams.push(x),
            None => return Ok(None),
        }
    }
    let text = text(recording, prompt)?;
    let place = |layer: usize| match layer {
        0 => tap::name(Part::Embedding, "embedding", "o"),
        layer if layer == layers => tap::name(Part::Head, "rms_norm", "norm"),
        layer => tap::name(Part::Layer(layer - 1), RESIDUAL, "o"),
    };
    let mut forced = vec![Forced::new(); text.pieces.len()];
    for (layer, x) in streams.iter().enumerate() {
        for (forced, x) in forced.iter_mut().zip(text.cut(&x.mapv(f64::from))) {
            forced.insert(place(layer), Value::Numbers(x.into_dyn()));
        }
    }
    let routing = recorded_routing(recording, prompt, rule, layers)?;
    let mut by_piece = vec![Vec::new(); text.pieces.len()];
    for ids in &routing {
        let cut = ids.as_ref().map(|ids| text.cut(ids));
        for (piece, routing) in by_piece.iter_mut().enumerate() {
            routing.push(cut.as_ref().map(|cut| cut[piece].clone()));
        }
    }
    let forced = forced.into_iter().map(Arc::new).collect();
    let told =
        walk(engine, &text, &Given { forced, routing: by_piece, mtp: None })?.whole(&text)?;
    let mut fed = Vec::new();
    for (layer, want) in streams.into_iter().enumerate() {
        let got = told.iter().find(|(tap, _)| tap.name() == place(layer));
        let Some((_, same::Tap::F64(got))) = got else {
            return Err(format!("{}: no stream after layer {layer}", engine.name()).into());
        };
        let got = got.mapv(|x| x as f32).into_dimensionality()?;
        fed.push(Fed { want, got });
    }
    Ok(Some(fed))
}
