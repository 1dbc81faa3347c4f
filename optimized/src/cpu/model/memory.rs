//! What an engine needs of the machine's memory, from names and shapes alone.

use golden::{
    Config, Dtype, Error, Weights,
    config::{Mixer, Mlp},
    engine::{Demand, Memory, Narrowed},
    names,
};

use super::{pieces::PIECE, weights::Format};
use crate::cpu::{
    attention::{fast::Cached, kept::Kept},
    gdn_layer::fast::State,
    quantised::Quantised,
};

/// Matrices that are kept as they are, whatever the format: they decide, or are looked up.
const AS_THEY_ARE: [&str; 4] =
    ["in_proj_ba.weight", "mlp.gate.weight", "shared_expert_gate.weight", names::EMBED_TOKENS];

pub(super) fn memory(
    weights: &dyn Weights,
    (format, kept): (Format, Kept),
    demand: &Demand,
) -> Result<Memory, Error> {
    let c = weights.config();
    let mut memory = Memory::default();
    let has_mtp = weights.meta(names::MTP_FC).is_some();
    for entry in names::entries(c, has_mtp) {
        hold(weights, format, (&entry.name, demand.narrowed), &mut memory)?;
    }
    if c.tie_word_embeddings {
        // The head is kept beside the embedding: twice the same map, or two copies.
        let mut again = Memory::default();
        hold(weights, format, (names::EMBED_TOKENS, demand.narrowed), &mut again)?;
        memory.owned += again.owned;
    }
    let full = c.layer_types.iter().filter(|mixer| **mixer == Mixer::Full).count();
    let linear = c.layer_types.len() - full;
    let windows = c.conv_dim() * (c.linear_conv_kernel_dim - 1);
    let (k, v) = (c.linear_key_head_dim, c.linear_value_head_dim);
    let state = State::len(windows, c.linear_num_value_heads, k, v);
    memory.state = product(&[4, linear, state, demand.sequences]);
    let [held, page] = kept.cache(c.num_key_value_heads, c.head_dim).page();
    let pages = |tokens: usize| product(&[tokens.div_ceil(held), page, demand.sequences]);
    memory.cache =
        pages(demand.context).saturating_mul(full as u64).saturating_add(pages(demand.drafts));
    memory.scratch = scratch(c, demand);
    Ok(memory)
}

/// Adds what a tensor costs.
fn hold(
    weights: &dyn Weights,
    format: Format,
    (name, narrowed): (&str, Narrowed),
    memory: &mut Memory,
) -> Result<(), Error> {
    let meta = weights.meta(name).ok_or_else(|| format!("{name}: missing"))?;
    let elements = product(&meta.shape);
    let projection = names::is_projection(name);
    if !projection && !AS_THEY_ARE.iter().any(|end| name.ends_with(end)) {
        // Norms, convolutions, rates: widened.
        memory.owned += 4 * elements;
        return Ok(());
    }
    if let Some(bits) = format.bits(name).filter(|_| projection) {
        let d: usize = meta.shape[1..].iter().product();
        let bytes = Quantised::size(bits, meta.shape[0], d) as u64;
        match narrowed {
            Narrowed::Owned => memory.owned += bytes,
            Narrowed::Mapped => memory.mapped += bytes,
        }
        return Ok(());
    }
    let wide = matches!(meta.dtype, Dtype::F32 | Dtype::F16);
    if projection && format == Format::Bf16 && wide {
        memory.owned += 2 * elements;
        return Ok(());
    }
    let size = meta.dtype.size();
    let bytes = elements * size as u64;
    if weights.is_mapped(name, size) {
        memory.mapped += bytes;
    } else {
        memory.owned += bytes;
    }
    if let Some(scales) = weights.meta(&names::scale_of(name)) {
        memory.owned += 4 * product(&scales.shape);
    }
    Ok(())
}

/// An upper estimate of what a step needs beside states: rows of a piece times everything that a layer
/// of either kind computes of them in f32 (room is kept to be used again, and a piece may be held in room
/// made for a larger one), and what is answered.
fn scratch(c: &Config, demand: &Demand) -> u64 {
    let d = c.hidden_size;
    let attention = (4 * c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim + d;
    let value = c.linear_value_dim();
    let delta = c.conv_dim() + 2 * value + 2 * c.linear_num_value_heads + d;
    let expert = |slots: usize, f: usize| slots * (3 * f + 2 * d);
    let sparse = c.num_experts
        + expert(c.num_experts_per_tok, c.moe_intermediate_size)
        + expert(1, c.shared_expert_intermediate_size);
    let has = |kind: Mlp| c.mlp_types.contains(&kind);
    let mlp = usize::from(has(Mlp::Sparse)) * sparse
        + usize::from(has(Mlp::Dense)) * expert(1, c.intermediate_size);
    // The stream, its norm, what is added, the drafts' pair; sines and cosines.
    let stream = 6 * d + 2 * c.rope.rotary_dim;
    let rows = demand.fed.min(PIECE);
    let piece = product(&[4, rows, stream + attention + delta + mlp]);
    // A piece is kept in the room of another that has up to four times its size, but not all are.
    let piece = piece.saturating_add(piece / 2);
    // What is answered, and while answers of pieces are joined once more of it.
    let answer =
        product(&[4, demand.logits, c.vocab_size]).saturating_add(product(&[4, demand.hidden, d]));
    piece.saturating_add(answer.saturating_mul(if demand.fed <= PIECE { 1 } else { 3 }))
}

fn product(sizes: &[usize]) -> u64 {
    sizes.iter().fold(1, |all, &n| all.saturating_mul(n as u64))
}

#[cfg(test)]
mod tests {
    use golden::{
        Engine,
        config::Preset,
        engine::{Demand, Narrowed},
        names,
        synthetic::Synthetic,
    };

    use super::{Format, Kept, memory};
    use crate::cpu::model::{
        Loading,
        store::{Narrowing, narrowings},
    };
    use crate::cpu::{
        attention::fast::Cached,
        model::{
            LayerState, Model,
            weights::{MixerWeights, MlpWeights},
        },
        simd::Plain,
        weight::Weight,
    };

    const DEMAND: Demand = Demand {
        sequences: 2,
        context: 300,
        fed: 9,
        logits: 1,
        hidden: 0,
        drafts: 257,
        narrowed: Narrowed::Owned,
    };

    /// Keys and values kept as nobody would without saying so.
    const OTHERWISE: [(Format, Kept); 3] =
        [(Format::Int4, Kept::F32), (Format::F32, Kept::Int8), (Format::Bf16, Kept::Int8)];

    /// Bytes of all matrices of a layer.
    fn matrices(mixer: &MixerWeights, mlp: &MlpWeights) -> usize {
        let mut bytes = 0;
        let mut add = |weight: &Weight| bytes += weight.bytes();
        mixer.each(&mut add);
        match mlp {
            MlpWeights::Dense(all) => all.0.iter().for_each(add),
            MlpWeights::Sparse { router, experts, shared, shared_gate } => {
                experts.iter().chain([shared]).flat_map(|all| &all.0).for_each(&mut add);
                [router, shared_gate].into_iter().for_each(add);
            }
        }
        bytes
    }

    #[test]
    fn what_is_stated_is_what_is_held() {
        let all = Format::ALL.map(|format| (format, format.kept()));
        for format in all.into_iter().chain(OTHERWISE) {
            let weights = Synthetic::new(Preset::Tiny.config(Some(4), None).unwrap(), 0);
            let stated = memory(&weights, format, &DEMAND).unwrap();
            let mut loading = Loading { tell: &mut |_, _| true, store: None };
            let mut model = Model::new(Plain, &weights, format, &mut loading).unwrap();
            let mut bytes = model.embedding.bytes() + model.lm_head.bytes();
            for layer in &model.layers {
                bytes += matrices(&layer.mixer, &layer.mlp);
            }
            let mtp = model.mtp.as_ref().unwrap();
            bytes += mtp.fc.bytes() + matrices(&mtp.layer.mixer, &mtp.layer.mlp);
            // Vectors are f32 in this checkpoint as well.
            let vectors: u64 = names::entries(&model.config, true)
                .iter()
                .filter(|entry| is_vector(&entry.name))
                .map(|entry| 4 * entry.elements())
                .sum();
            assert_eq!(stated.owned, bytes as u64 + vectors, "{format:?}");
            assert_eq!(stated.mapped, 0);
            let demand = Demand { narrowed: Narrowed::Mapped, ..DEMAND };
            let kept = memory(&weights, format, &demand).unwrap();
            assert_eq!(kept.mapped + kept.owned, stated.owned);
            let narrow: usize = narrowings(&weights, format.0).iter().map(Narrowing::size).sum();
            assert_eq!(kept.mapped, narrow as u64);
            model.reset(2).unwrap();
            model.pretend(300, 0).unwrap();
            let (mut state, mut cache) = (0, 0);
            for sequence in &mut model.sequences {
                for layer in &sequence.layers {
                    match layer {
                        LayerState::Linear(own) => {
                            state += 4 * (own.conv.len() + own.heads.len());
                        }
                        LayerState::Full(own) => {
                            cache += own.len().div_ceil(own.page()[0]) * own.held();
                        }
                    }
                }
                let row = vec![0.0; model.config.num_key_value_heads * model.config.head_dim];
                (0..257).for_each(|_| sequence.mtp.push(&row, &row));
                cache += sequence.mtp.len().div_ceil(sequence.mtp.page()[0]) * sequence.mtp.held();
            }
            assert_eq!((stated.state, stated.cache), (state as u64, cache as u64));
            let more = memory(&weights, format, &Demand { context: 30_000, ..DEMAND }).unwrap();
            assert!(stated.cache < more.cache && more.owned == stated.owned);
            assert_eq!(more.must_fit() - stated.must_fit(), more.cache - stated.cache);
        }
    }

    /// Whether a tensor is none of the model's matrices.
    fn is_vector(name: &str) -> bool {
        ["norm.weight", "layernorm.weight", "conv1d.weight", "A_log", "dt_bias"]
            .iter()
            .any(|end| name.ends_with(end))
            || name.contains("pre_fc_norm")
    }

    #[test]
    fn what_nobody_has_is_still_a_number() {
        let weights = Synthetic::new(Preset::Tiny.config(Some(4), None).unwrap(), 0);
        let demand = Demand { context: usize::MAX - 300, logits: usize::MAX, ..DEMAND };
        let memory = memory(&weights, (Format::F32, Kept::F32), &demand).unwrap();
        assert_eq!(memory.must_fit(), u64::MAX);
    }
}
