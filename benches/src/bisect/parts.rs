//! What was recorded of a model, told as parts of it.

use std::collections::BTreeMap;

use golden::{Config, Error, compare::Finding, recording::Recording, tap::Part};

use super::Row;

/// The model that was asked.
pub(super) fn model(recording: &Recording) -> Result<Config, Error> {
    Ok(Config::parse(&recording.manifest.checkpoint.config.to_string(), recording.id())?)
}

/// Whether a model has the sizes of the recorded one: of another no two numbers belong together.
///
/// # Errors
/// Every size that differs, expected and got.
pub(super) fn same_sizes(recording: &Recording, got: &Config) -> Result<(), Error> {
    let sizes = |c: &Config| {
        [
            ("hidden_size", c.hidden_size),
            ("num_hidden_layers", c.num_hidden_layers()),
            ("vocab_size", c.vocab_size),
            ("num_experts", c.num_experts),
            ("num_experts_per_tok", c.num_experts_per_tok),
            ("linear_num_key_heads", c.linear_num_key_heads),
            ("linear_num_value_heads", c.linear_num_value_heads),
            ("linear_key_head_dim", c.linear_key_head_dim),
            ("linear_value_head_dim", c.linear_value_head_dim),
            ("linear_conv_kernel_dim", c.linear_conv_kernel_dim),
        ]
    };
    let want = model(recording)?;
    let mut other: Vec<String> = Vec::new();
    for ((name, want), (_, got)) in sizes(&want).into_iter().zip(sizes(got)) {
        if want != got {
            other.push(format!("{name}: expected {want}, got {got}"));
        }
    }
    let layers = want.layer_types.iter().zip(&want.mlp_types);
    let unlike = layers.zip(got.layer_types.iter().zip(&got.mlp_types)).position(|(a, b)| a != b);
    if let (true, Some(layer)) = (other.is_empty(), unlike) {
        let kind = |c: &Config| format!("{:?}, {:?}", c.layer_types[layer], c.mlp_types[layer]);
        other.push(format!("layer {layer}: expected {}, got {}", kind(&want), kind(got)));
    }
    if other.is_empty() {
        return Ok(());
    }
    Err(format!("{}: recorded of another model: {}", recording.id(), other.join("; ")).into())
}

/// One row per recorded tensor that was judged, in the order of the computation.
///
/// The last hidden state was recorded after the final norm, so it is the head's. What lies between two
/// tensors that were judged cannot be told apart, so a row names all of it.
pub(super) fn rows(
    layers: usize,
    free: &dyn Fn(&str) -> Option<Finding>,
    local: &BTreeMap<String, Finding>,
) -> Vec<Row> {
    let part = |state: usize| match state {
        0 => Part::Embedding,
        state if state == layers => Part::Head,
        state => Part::Layer(state - 1),
    };
    let states = (0..=layers).map(|state| (part(state), format!("hidden.{state}"), state));
    let ends = [
        (Part::Head, "logits"),
        (Part::Head, "topk.logits"),
        (Part::Head, "logsumexp"),
        (Part::Head, "step_logits"),
        (Part::Mtp, "mtp_logits"),
    ];
    let ends = ends.into_iter().map(|(part, name)| (part, name.to_owned(), layers + 1));
    let mut rows = Vec::new();
    let mut before: Option<Finding> = None;
    // The first hidden state that no row has told of yet.
    let mut untold = 0;
    for (part, name, state) in states.chain(ends) {
        let Some(after) = free(&name) else { continue };
        let own = local.get(&name);
        // Without the error of its own a part is to blame if it got what is right and left what is not.
        let inherited = before.as_ref().is_some_and(|before| !before.ok);
        let ok = own.map_or(after.ok || inherited, |own| own.ok);
        let gap = untold < state;
        rows.push(Row {
            part,
            span: span(layers, untold, state, part),
            inherited: before.as_ref().filter(|_| !gap).map(|finding| finding.rel_rms),
            local: own.map(|finding| finding.rel_rms),
            allowed: Some(own.unwrap_or(&after).rel_rms_allowed),
            after: Some(after.rel_rms),
            ok,
            finding: Some(own.unwrap_or(&after).clone()),
        });
        before = Some(after);
        untold = untold.max(state + 1);
    }
    rows
}

/// What computes the hidden states `from ..= to`, where that is more than one part. Beyond the last state
/// is what ends the model.
fn span(layers: usize, from: usize, to: usize, end: Part) -> Option<String> {
    let part = |state: usize| state.checked_sub(1).map_or(Part::Embedding, Part::Layer);
    if layers < from || (from == to && to < layers) {
        return None;
    }
    let first = part(from);
    Some(match to {
        to if from == to => format!("{first} or the final norm"),
        to if to == layers => format!("{first} to the final norm"),
        to if layers < to => format!("{first} to the {end}"),
        to => format!("{first} to {}", part(to)),
    })
}
