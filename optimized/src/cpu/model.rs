//! The whole model on the processor: the same wiring as the plain reference's, written once more on
//! fast kernels.
//!
//! Activations are f32, weights stay as the checkpoint has them (in its memory map, if it has one) and
//! are widened exactly as they are used. Sequences are ragged and packed: all their new tokens lie one
//! after another in `N` rows.

mod engine;
mod memory;
pub(crate) mod pieces;
mod store;
mod weights;

use super::attention::kept::Kept;
pub use store::{Store, StoreError};

use std::{cell::RefCell, collections::HashMap};

use golden::{
    Config, Engine, Error, Weights,
    config::Mixer,
    engine::{
        Demand, INTERRUPTED, Listener, Memory, Routing, Rows, Step, Undo, Want, check_tokens,
    },
    names,
    tap::{Part, RESIDUAL},
};
use ndarray::Array2;

use self::{
    pieces::{PIECE, Piece, join, pieces, want_of},
    store::narrowings,
    weights::{Format, Layer, Loader, MixerWeights, MlpWeights, Mtp},
};
use super::{
    aligned::Arena,
    attention::{
        fast::{Cached, Sizes, attention},
        kept::KeyValues,
    },
    embedding::fast::embedding,
    gdn_layer::fast::{Gdn, State},
    linear::fast::{Source, linear},
    moe_experts::fast::{Groups, moe_experts},
    moe_router::fast::route,
    pool,
    portable::HONEST,
    rms_norm::fast::{add, add_rms_norm, rms_norm, rms_norm_row},
    room::{Room, room},
    rope::fast::{rope_head, table},
    seen::Seen,
    shared_expert::fast::shared_expert,
    simd::Simd,
    weight::{Weight, matrix, vector},
};

/// The model with the states of its sequences, on instruction set `S`.
pub(crate) struct Model<S> {
    s: S,
    config: Config,
    format: Format,
    kept: Kept,
    embedding: Weight,
    layers: Vec<Layer>,
    final_norm: Vec<f32>,
    lm_head: Weight,
    mtp: Option<Mtp>,
    inv_freq: Vec<f32>,
    sequences: Vec<Sequence>,
    snapshots: HashMap<u64, Vec<Sequence>>,
    next_snapshot: u64,
    undo: Option<Undo<Sequence>>,
    listener: Option<Listener>,
    /// Most rows that are walked at once.
    piece: usize,
}

/// What one sequence leaves behind for its next token.
#[derive(Clone)]
struct Sequence {
    len: usize,
    layers: Vec<LayerState>,
    mtp: KeyValues,
}

#[derive(Clone)]
enum LayerState {
    Linear(State),
    Full(KeyValues),
}

/// The rows of the sequences and where they stand.
struct Place {
    /// `[S + 1]`.
    cu: Vec<usize>,
    /// `[N, R]`: cosines, then sines.
    turns: Vec<f32>,
}

impl<S: Simd> Model<S> {
    /// A model that holds no sequence yet.
    ///
    /// # Errors
    /// If a weight cannot be had.
    pub(crate) fn new(
        s: S,
        weights: &dyn Weights,
        (format, kept): (Format, Kept),
        loading: &mut Loading<'_>,
    ) -> Result<Self, Error> {
        let config = weights.config().clone();
        let all = narrowings(weights, format).iter().map(|one| one.size() as u64).sum();
        let store = loading.store;
        let mut tell = |done, all| (loading.tell)(done, all);
        let done = RefCell::new((0, all, &mut tell as &mut (dyn FnMut(u64, u64) -> bool + '_)));
        let arena = Arena::default();
        let load = Loader { weights, config: &config, format, store, arena, done };
        let kinds = config.layer_types.iter().zip(&config.mlp_types).enumerate();
        let layers = kinds
            .map(|(i, (&mixer, &mlp))| load.layer(&format!("model.layers.{i}"), mixer, mlp))
            .collect::<Result<_, _>>()?;
        let mtp = match weights.meta(names::MTP_FC) {
            None => None,
            Some(_) => Some(Mtp {
                norm_embedding: vector(weights, "mtp.pre_fc_norm_embedding.weight")?,
                norm_hidden: vector(weights, "mtp.pre_fc_norm_hidden.weight")?,
                fc: load.projection(names::MTP_FC)?,
                layer: load.layer("mtp.layers.0", Mixer::Full, names::mtp_mlp(&config))?,
                norm: vector(weights, "mtp.norm.weight")?,
            }),
        };
        // A head that is the embedding stays what that is.
        let lm_head = if config.tie_word_embeddings {
            matrix(weights, names::EMBED_TOKENS)?
        } else {
            load.projection(names::LM_HEAD)?
        };
        Ok(Model {
            s,
            embedding: matrix(weights, names::EMBED_TOKENS)?,
            final_norm: vector(weights, names::FINAL_NORM)?,
            inv_freq: config.rope.inv_freq(),
            config,
            format,
            kept,
            layers,
            lm_head,
            mtp,
            sequences: Vec::new(),
            snapshots: HashMap::new(),
            next_snapshot: 0,
            undo: None,
            listener: None,
            piece: PIECE,
        })
    }

    fn empty_sequence(&self) -> Sequence {
        let c = &self.config;
        let cache = || self.kept.cache(c.num_key_value_heads, c.head_dim);
        let state = |mixer: &Mixer| match mixer {
            Mixer::Linear => LayerState::Linear(State::new(
                c.conv_dim() * (c.linear_conv_kernel_dim - 1),
                c.linear_num_value_heads,
                c.linear_key_head_dim,
                c.linear_value_head_dim,
            )),
            Mixer::Full => LayerState::Full(cache()),
        };
        Sequence { len: 0, layers: c.layer_types.iter().map(state).collect(), mtp: cache() }
    }

    /// `[N, D]`.
    fn embed(&self, tokens: &[Vec<u32>]) -> Room<f32> {
        let ids: Vec<i64> = tokens.iter().flatten().map(|&id| id.into()).collect();
        let mut x = room(ids.len() * self.config.hidden_size);
        embedding(self.s, &mut x, &ids, &self.embedding);
        x
    }

    fn place(&self, tokens: &[Vec<u32>], lengths: impl Iterator<Item = usize>) -> Place {
        let mut cu = vec![0];
        let mut positions = Vec::new();
        for (tokens, before) in tokens.iter().zip(lengths) {
            positions.extend((before..before + tokens.len()).map(|position| position as i64));
            cu.push(positions.len());
        }
        let factor = self.config.rope.yarn.map_or(1.0, |yarn| yarn.attention_factor as f32);
        let mut turns = vec![f32::NAN; positions.len() * 2 * self.inv_freq.len()];
        table(&mut turns, &positions, &self.inv_freq, factor);
        Place { cu, turns }
    }

    /// The sparse or dense MLP.
    fn mlp(
        &self,
        x: &[f32],
        mlp: &MlpWeights,
        forced: Option<&Array2<i64>>,
        seen: &mut Seen<'_>,
    ) -> Result<(Room<f32>, Option<Routing>), Error> {
        let s = self.s;
        let c = &self.config;
        let n = x.len() / c.hidden_size;
        let mut o = room(x.len());
        o.fill(0.0);
        match mlp {
            MlpWeights::Dense(mlp) => {
                moe_experts(s, &mut o, x, &Groups::of_all(n), &vec![1.0; n], |_| mlp.expert());
                seen.see("dense_mlp", "o", &[n, c.hidden_size], &mut o)?;
                Ok((o, None))
            }
            MlpWeights::Sparse { router, experts, shared, shared_gate } => {
                let active = c.num_experts_per_tok;
                let mut logits = room(n * c.num_experts);
                linear(s, &mut logits, x, router);
                seen.see("moe_router", "logits", &[n, c.num_experts], &mut logits)?;
                let given = seen.given_ids("moe_router", "ids")?;
                let forced = given.as_ref().or(forced);
                let mut routed = route(s, &logits, c.num_experts, active, c.norm_topk_prob, forced);
                seen.see("moe_router", "weights", &[n, active], &mut routed.weights)?;
                let groups = Groups::new(&routed.ids, active, c.num_experts);
                moe_experts(s, &mut o, x, &groups, &routed.weights, |e| experts[e].expert());
                seen.see("moe_experts", "o", &[n, c.hidden_size], &mut o)?;
                shared_expert(s, &mut o, x, shared_gate, &shared.expert(), HONEST);
                seen.see("moe_layer", "o", &[n, c.hidden_size], &mut o)?;
                let ids = Array2::from_shape_vec((n, active), routed.ids)?;
                Ok((o, Some(Routing { ids, margins: routed.margins })))
            }
        }
    }

    /// `self_attn` over the new rows, whose keys and values are added to the caches.
    fn full_attention(
        &self,
        x: &[f32],
        mixer: &MixerWeights,
        place: &Place,
        caches: &mut [&mut KeyValues],
        seen: &mut Seen<'_>,
    ) -> Result<Room<f32>, Error> {
        let MixerWeights::Full { q, k, v, o, q_norm, k_norm } = mixer else {
            unreachable!("a full layer")
        };
        let s = self.s;
        let c = &self.config;
        let (hq, hkv, h) = (c.num_attention_heads, c.num_key_value_heads, c.head_dim);
        let eps = c.rms_norm_eps as f32;
        let n = x.len() / c.hidden_size;
        let mut both = room(n * hq * 2 * h);
        let (mut keys, mut values) = (room(n * hkv * h), room(n * hkv * h));
        linear(s, &mut both, x, q);
        seen.see("linear", "q_proj", &[n, hq, 2 * h], &mut both)?;
        linear(s, &mut keys, x, k);
        seen.see("linear", "k_proj", &[n, hkv, h], &mut keys)?;
        linear(s, &mut values, x, v);
        seen.see("linear", "v_proj", &[n, hkv, h], &mut values)?;
        let turned = 2 * self.inv_freq.len();
        let (mut queries, mut gates) = (room(n * hq * h), room(n * hq * h));
        pool::pieces2((&mut queries, hq * h), (&mut gates, hq * h), |token, queries, gates| {
            let turns = &place.turns[token * turned..][..turned];
            s.run(
                #[inline(always)]
                || {
                    let both = both[token * hq * 2 * h..].chunks_exact(2 * h);
                    let heads = queries.chunks_exact_mut(h).zip(gates.chunks_exact_mut(h));
                    for ((query, gate), both) in heads.zip(both) {
                        query.copy_from_slice(&both[..h]);
                        gate.copy_from_slice(&both[h..]);
                        rms_norm_row(s, query, q_norm, eps);
                        rope_head(s, query, turns);
                    }
                },
            );
        });
        pool::rows(
            s,
            &mut keys,
            (hkv * h, 1),
            #[inline(always)]
            |token, keys| {
                let turns = &place.turns[token * turned..][..turned];
                for key in keys.chunks_exact_mut(h) {
                    rms_norm_row(s, key, k_norm, eps);
                    rope_head(s, key, turns);
                }
            },
        );
        for (cache, rows) in caches.iter_mut().zip(place.cu.windows(2)) {
            for row in rows[0]..rows[1] {
                let at = row * hkv * h..(row + 1) * hkv * h;
                cache.push(&keys[at.clone()], &values[at]);
            }
        }
        let caches: Vec<&KeyValues> = caches.iter().map(|cache| &**cache).collect();
        let mut mixed = room(n * hq * h);
        attention(s, &mut mixed, (&queries, &gates), &caches, &place.cu, Sizes { hq, hkv, h });
        seen.see("attention", "o", &[n, hq, h], &mut mixed)?;
        let mut out = room(x.len());
        linear(s, &mut out, &mixed, o);
        seen.see("linear", "o_proj", &[n, c.hidden_size], &mut out)?;
        Ok(out)
    }

    fn gdn<'a>(&self, mixer: &'a MixerWeights) -> Gdn<'a> {
        let MixerWeights::Linear { taps, rates, dt_bias, norm, .. } = mixer else {
            unreachable!("a linear layer")
        };
        let c = &self.config;
        Gdn {
            taps,
            rates,
            dt_bias,
            norm,
            hk: c.linear_num_key_heads,
            hv: c.linear_num_value_heads,
            k: c.linear_key_head_dim,
            v: c.linear_value_head_dim,
            w: c.linear_conv_kernel_dim,
            eps: c.rms_norm_eps as f32,
        }
    }

    /// `linear_attn` over the new rows; the states go on.
    fn linear_attention(
        &self,
        x: &[f32],
        mixer: &MixerWeights,
        place: &Place,
        states: &mut [&mut State],
        seen: &mut Seen<'_>,
    ) -> Result<Room<f32>, Error> {
        let MixerWeights::Linear { qkvz, ba, out, .. } = mixer else {
            unreachable!("a linear layer")
        };
        let s = self.s;
        let n = x.len() / self.config.hidden_size;
        let mut projected = room(n * qkvz.rows());
        linear(s, &mut projected, x, qkvz);
        seen.see("linear", "in_proj_qkvz", &[n, qkvz.rows()], &mut projected)?;
        let mut gates = room(n * ba.rows());
        linear(s, &mut gates, x, ba);
        seen.see("linear", "in_proj_ba", &[n, ba.rows()], &mut gates)?;
        let mut mixed = room(n * self.config.linear_value_dim());
        self.gdn(mixer).mix(s, &mut mixed, &projected, &gates, states, &place.cu);
        let c = &self.config;
        let heads = [n, c.linear_num_value_heads, c.linear_value_head_dim];
        seen.see("rms_norm_gated", "norm", &heads, &mut mixed)?;
        let mut o = room(x.len());
        linear(s, &mut o, &mixed, out);
        seen.see("linear", "out_proj", &[n, c.hidden_size], &mut o)?;
        Ok(o)
    }

    /// Logits of rows `[N, D]`.
    fn logits(&self, x: &[f32]) -> Result<Array2<f32>, Error> {
        let n = x.len() / self.config.hidden_size;
        let mut logits = vec![0.0; n * self.config.vocab_size];
        linear(self.s, &mut logits, x, &self.lm_head);
        Ok(Array2::from_shape_vec((n, self.config.vocab_size), logits)?)
    }

    fn pass(&mut self, tokens: &[Vec<u32>], want: &Want) -> Result<Step, Error> {
        self.check(tokens)?;
        self.undo = Undo::of(&self.sequences, tokens, want);
        let mut sequences = std::mem::take(&mut self.sequences);
        let step = self.walk(tokens, want, &mut sequences);
        self.sequences = sequences;
        step
    }

    /// All pieces of a step, one after the other.
    fn walk(
        &mut self,
        tokens: &[Vec<u32>],
        want: &Want,
        sequences: &mut [Sequence],
    ) -> Result<Step, Error> {
        let pieces = pieces(tokens, self.piece);
        if let [whole] = &pieces[..] {
            return self.layers(whole, want, sequences);
        }
        let n = pieces.last().map_or(0, |piece| piece.rows.end);
        let asked: Vec<_> = pieces.iter().map(|piece| piece.asked(want.logits).len()).collect();
        let all = asked.iter().sum();
        let (mut step, mut at) = (None, 0);
        for (piece, asked) in pieces.iter().zip(asked) {
            let own = want_of(want, &piece.rows, n, (&(at..at + asked), all))?;
            at += asked;
            join(&mut step, self.layers(piece, &own, sequences)?)?;
        }
        Ok(step.unwrap_or_default())
    }

    fn layers(
        &mut self,
        piece: &Piece,
        want: &Want,
        sequences: &mut [Sequence],
    ) -> Result<Step, Error> {
        let tokens = &piece.tokens[..];
        let (s, d) = (self.s, self.config.hidden_size);
        let eps = self.config.rms_norm_eps as f32;
        let place = self.place(tokens, sequences.iter().map(|sequence| sequence.len));
        let n = place.cu[place.cu.len() - 1];
        let taken = |x: &[f32]| Array2::from_shape_vec((n, d), x.to_vec());
        let mut step = Step::default();
        let mut seen = Seen {
            part: Part::Embedding,
            told: want.taps.then(Vec::new),
            forced: want.forced.as_deref(),
        };
        let mut x = self.embed(tokens);
        seen.see("embedding", "o", &[n, d], &mut x)?;
        let mut normed = room(n * d);
        let first = self.layers.first().map_or(&self.final_norm, |layer| &layer.input_norm);
        rms_norm(s, &mut normed, &x, first, eps);
        for i in 0..self.layers.len() {
            if self.listener.as_mut().is_some_and(|go_on| !go_on(i)) {
                return Err(INTERRUPTED.into());
            }
            if want.hidden {
                step.hidden.push(taken(&x)?);
            }
            let layer = &self.layers[i];
            seen.part = Part::Layer(i);
            seen.see("rms_norm", "input_layernorm", &[n, d], &mut normed)?;
            let mixed = match layer.mixer {
                MixerWeights::Linear { .. } => {
                    let mut states: Vec<_> = sequences
                        .iter_mut()
                        .filter_map(|sequence| match &mut sequence.layers[i] {
                            LayerState::Linear(state) => Some(state),
                            LayerState::Full(_) => None,
                        })
                        .collect();
                    self.linear_attention(&normed, &layer.mixer, &place, &mut states, &mut seen)?
                }
                MixerWeights::Full { .. } => {
                    let mut caches: Vec<_> = sequences
                        .iter_mut()
                        .filter_map(|sequence| match &mut sequence.layers[i] {
                            LayerState::Full(cache) => Some(cache),
                            LayerState::Linear(_) => None,
                        })
                        .collect();
                    self.full_attention(&normed, &layer.mixer, &place, &mut caches, &mut seen)?
                }
            };
            self.add_norm(("h", &layer.post_norm), &mut normed, &mut x, &mixed, &mut seen)?;
            seen.see("rms_norm", "post_attention_layernorm", &[n, d], &mut normed)?;
            let forced = want.forced_routing.as_ref().and_then(|all| all.get(i)?.as_ref());
            let (mlp, routing) = self.mlp(&normed, &layer.mlp, forced, &mut seen)?;
            let next = self.layers.get(i + 1).map_or(&self.final_norm, |layer| &layer.input_norm);
            self.add_norm(("o", next), &mut normed, &mut x, &mlp, &mut seen)?;
            if want.routing {
                step.routing.push(routing);
            }
        }
        for (sequence, tokens) in sequences.iter_mut().zip(tokens) {
            sequence.len += tokens.len();
        }
        let rows = piece.asked(want.logits);
        seen.part = Part::Head;
        seen.see("rms_norm", "norm", &[n, d], &mut normed)?;
        let select = |rows: &[usize]| -> Vec<f32> {
            rows.iter().flat_map(|row| &normed[row * d..][..d]).copied().collect()
        };
        step.logits =
            if rows.len() == n { self.logits(&normed)? } else { self.logits(&select(&rows))? };
        if let Some(logits) = step.logits.as_slice_mut() {
            seen.see("lm_head", "logits", &[rows.len(), self.config.vocab_size], logits)?;
        }
        step.taps = seen.told.unwrap_or_default();
        let last = piece.asked(if want.hidden { Rows::All } else { want.last });
        step.hidden.push(Array2::from_shape_vec((last.len(), d), select(&last))?);
        Ok(step)
    }

    /// `x <- x + o`, a residual of that name, and its norm; in one pass where nobody looks.
    fn add_norm(
        &self,
        (tensor, weight): (&'static str, &[f32]),
        normed: &mut [f32],
        x: &mut [f32],
        o: &[f32],
        seen: &mut Seen<'_>,
    ) -> Result<(), Error> {
        let (s, d) = (self.s, self.config.hidden_size);
        let eps = self.config.rms_norm_eps as f32;
        if seen.looks() {
            add(s, x, o);
            seen.see(RESIDUAL, tensor, &[x.len() / d, d], x)?;
            rms_norm(s, normed, x, weight, eps);
        } else {
            add_rms_norm(s, normed, x, o, weight, eps);
        }
        Ok(())
    }

    fn check(&self, tokens: &[Vec<u32>]) -> Result<(), Error> {
        check_tokens(tokens, self.sequences.len(), self.config.vocab_size)
    }
}

/// How weights are made ready.
pub struct Loading<'a> {
    /// Told bytes that are narrowed, of all there will be; says whether to go on.
    pub tell: &'a mut dyn FnMut(u64, u64) -> bool,
    /// Narrowed weights that are there already: then nothing is narrowed.
    pub store: Option<&'a Store>,
}

/// What [`engine`] keeps keys and values in with a format, unless it is told otherwise.
///
/// # Errors
/// If there is no such format.
pub fn kept(format: &str) -> Result<crate::Kept, Error> {
    Ok(Format::of(format)?.kept().said())
}

/// A format, and what keys and values are kept in.
fn keeping(format: &str, kept: Option<crate::Kept>) -> Result<(Format, Kept), Error> {
    let format = Format::of(format)?;
    Ok((format, kept.map_or(Ok(format.kept()), Kept::of)?))
}

/// What [`engine`] of these weights in that format, keys and values kept so, needs of the machine's memory
/// to be asked this: from names and shapes alone, nothing is read.
///
/// # Errors
/// If there is no such format, it keeps keys and values in no such thing, or a weight is missing.
pub fn memory(
    weights: &dyn Weights,
    format: &str,
    kept: Option<crate::Kept>,
    demand: &Demand,
) -> Result<Memory, Error> {
    memory::memory(weights, keeping(format, kept)?, demand)
}

/// The engine for this machine: on the widest instruction set that it has.
///
/// `format` is what projections are kept in, and what they read: `f32` as the checkpoint has them, and
/// activations as they are; `bf16` in bf16 or FP8, activations rounded to bf16; `int8` and `int4` narrowed,
/// activations in eight bits. Unless `kept` says otherwise keys and values are in f32 with the first, in
/// bf16 with the others.
///
/// # Errors
/// If there is no such format, a weight cannot be had, or who is told of the loading ends it
/// ([`INTERRUPTED`]).
pub fn engine(
    weights: &dyn Weights,
    format: &str,
    kept: Option<crate::Kept>,
    loading: &mut Loading<'_>,
) -> Result<Box<dyn Engine>, Error> {
    let format = keeping(format, kept)?;
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(s) = super::avx512::Avx512::new() {
            return Ok(Box::new(Model::new(s, weights, format, loading)?));
        }
        if let Some(s) = super::avx2::Avx2::new() {
            return Ok(Box::new(Model::new(s, weights, format, loading)?));
        }
    }
    Ok(Box::new(Model::new(super::simd::Plain, weights, format, loading)?))
}
