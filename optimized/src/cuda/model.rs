//! The whole model on the GPU: the same wiring as the plain reference's, written once more on kernels.
//!
//! Weights ([`weights`]) go to the device once, as the checkpoint has them (FP8 codes with their scales, in
//! f32 as the official files have them), experts of a layer one after another; synthetic weights are made
//! there. States ([`states`]) stay there: every sequence has its place in the buffers of each layer.
//! Intermediates ([`scratch`]) stay there as well, and are made for as many rows as a piece has: a long text
//! is walked in pieces. Kernels are called by name, and so are their arguments ([`super::launch`],
//! [`super::engine`]): where a faster one takes the same tensors, it is one line.
//!
//! What differs from token to token is told the device in one small copy before each step: ids, positions, the
//! rows of the cache, where sequences begin and end ([`Told`]). So a step of one token of each sequence is the
//! same work again and again, captured once as a graph ([`Decode`]) and launched as a whole.
//!
//! The residual stream is f32. Activations between it and the next addition are f32, or in bf16 what kernels
//! of tensor cores read; [`Format`] says which, and the plan what that rounds. Everything is
//! computed token by token in one order, so that no bit depends on how a text is cut or who is in the batch.
//!
//! Several GPUs have a share of the model each ([`golden::split`]), and are driven by a thread each ([`ranks`]). What
//! a mixer or an MLP adds to the stream is gathered and added up in the order of the ranks by each of them: the
//! streams are equal to the bit, and what is promised of the bits of one GPU holds of several.
//!
//! A sequence of a cache is followed by a gap up to its capacity. To the attention kernels gaps are sequences
//! without queries.

mod engine;
mod head;
mod memory;
#[cfg(test)]
mod paper;
mod pass;
mod ranks;
mod scratch;
mod seen;
mod states;
mod told;
mod weights;

pub use memory::memory;

use std::{collections::HashMap, fmt, sync::Arc};

use golden::{
    Config, Engine, Error, Weights,
    engine::{INTERRUPTED, Listener, Rows, Step, Undo, Want, check_tokens},
    names,
    split::{Share, Split},
    tap::Part,
};

use self::{
    head::Head,
    pass::{Layers, Pass, Pending},
    scratch::{LOGITS, Scratch},
    seen::{Looked, Seen},
    states::{LayerState, Saved, Sizes, States},
    told::Told,
    weights::{Layer, Loader, Mtp},
};
use super::{
    device::{self, Buffer, Device, Graph},
    engine::{Added, Element, Fast, Matrix, Ops, Stored},
    gpu::{Context, gpu, with},
    launch::{Kernels, Stream},
};
use crate::{
    Kept,
    cpu::model::pieces::{Piece, join, pieces, want_of},
};

/// Rows that are walked at once.
pub(super) fn piece(fast: Option<Fast>) -> usize {
    /// By plain kernels.
    const PIECE: usize = 2048;
    fast.map_or(PIECE, |_| Fast::PIECE)
}

/// Why this machine cannot do what is asked, in one line.
#[derive(Debug)]
pub struct Unfit(pub String);

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unfit {}

/// What activations are in, and what projections are kept in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// Activations in f32, projections as the checkpoint has them.
    F32,
    /// Activations in bf16, projections in bf16 or FP8.
    Bf16,
}

/// A format, and what keys and values are kept in: as activations are, or in FP8.
fn keeping(format: &str, kept: Option<Kept>) -> Result<(Format, Stored), Error> {
    let format = Format::of(format)?;
    let (own, stored) = match format {
        Format::F32 => (Kept::F32, Stored::F32),
        Format::Bf16 => (Kept::Bf16, Stored::Bf16),
    };
    let engine = format!("the cuda engine in {}", own.name());
    match kept.unwrap_or(own).among(&[own, Kept::Fp8], &engine)? {
        Kept::Fp8 => Ok((format, Stored::Fp8)),
        _ => Ok((format, stored)),
    }
}

/// What [`engine`] keeps keys and values in with a format, unless it is told otherwise.
///
/// # Errors
/// If there is no such format.
pub fn kept(format: &str) -> Result<Kept, Error> {
    Ok(match Format::of(format)? {
        Format::F32 => Kept::F32,
        Format::Bf16 => Kept::Bf16,
    })
}

impl Format {
    fn of(name: &str) -> Result<Format, Error> {
        match name {
            "f32" => Ok(Format::F32),
            "bf16" => Ok(Format::Bf16),
            _ => Err(format!("number {name:?}: the cuda engine has f32, bf16").into()),
        }
    }

    pub(super) fn element(self) -> Element {
        match self {
            Format::F32 => Element::F32,
            Format::Bf16 => Element::Bf16,
        }
    }
}

/// The model with the states of its sequences.
pub(super) struct Model {
    device: Arc<Device>,
    kernels: Kernels,
    config: Config,
    share: Share,
    format: Format,
    /// What keys and values are in.
    kept: Stored,
    fast: Option<Fast>,
    embedding: Matrix,
    layers: Vec<Layer>,
    final_norm: Buffer,
    /// None where it is the embedding.
    lm_head: Option<Matrix>,
    mtp: Option<Mtp>,
    inv_freq: Buffer,
    scratch: Scratch,
    states: States,
    snapshots: HashMap<u64, Saved>,
    next_snapshot: u64,
    undo: Option<(Undo<()>, Saved)>,
    listener: Option<Listener>,
    decode: Option<Decode>,
}

/// A step of one token of each sequence.
struct Decode {
    /// Of which buffers.
    of: Captured,
    /// Not there before the second step: the first one loads what it needs.
    graph: Option<Graph>,
}

/// What a graph depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Captured {
    sequences: usize,
    head: Head,
    scratch: u64,
    states: u64,
}

impl Model {
    fn load(
        weights: &dyn Weights,
        (share, format, kept): (&Share, Format, Stored),
        context: &mut Context,
        tell: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Model, Error> {
        let config = weights.config().clone();
        let mut kernels = Kernels::default();
        let device = context.device.clone();
        let stream = &mut Stream { context, kernels: &mut kernels };
        let ops = Ops { stream, element: format.element(), fast: None };
        let own = device.clone();
        let experts = share.experts.clone();
        let mut load = Loader { weights, experts, format, device: own, ops, tell };
        let embedding = load.matrix(names::EMBED_TOKENS)?;
        let kinds = config.layer_types.iter().zip(&config.mlp_types).enumerate();
        let layers = kinds
            .map(|(i, (&mixer, &mlp))| load.layer(&format!("model.layers.{i}"), mixer, mlp))
            .collect::<Result<_, _>>()?;
        let final_norm = load.vector(names::FINAL_NORM)?;
        let lm_head =
            if config.tie_word_embeddings { None } else { Some(load.matrix(names::LM_HEAD)?) };
        // Of logits everybody has some, of the embedding all.
        let own = &share.vocabulary;
        let tied = lm_head.is_none() && own.len() < embedding.rows;
        let lm_head = if tied { Some(embedding.rows_of(own.start, own.len())) } else { lm_head };
        let mtp = match weights.meta(names::MTP_FC) {
            None => None,
            Some(_) => Some(Mtp {
                norm_embedding: load.vector("mtp.pre_fc_norm_embedding.weight")?,
                norm_hidden: load.vector("mtp.pre_fc_norm_hidden.weight")?,
                fc: load.matrix(names::MTP_FC)?,
                layer: load.layer(
                    "mtp.layers.0",
                    golden::config::Mixer::Full,
                    names::mtp_mlp(&config),
                )?,
                norm: load.vector("mtp.norm.weight")?,
            }),
        };
        let inv_freq = load.numbers(&config.rope.inv_freq())?;
        device.wait()?;
        Ok(Model {
            scratch: Scratch::none(&device)?,
            device,
            kernels,
            format,
            kept,
            fast: fast(share, format).ok(),
            share: share.clone(),
            embedding,
            layers,
            final_norm,
            lm_head,
            mtp,
            inv_freq,
            config,
            states: States::none(),
            snapshots: HashMap::new(),
            next_snapshot: 0,
            undo: None,
            listener: None,
            decode: None,
        })
    }

    /// Does some work on the device, alone.
    fn on<T>(
        &mut self,
        work: impl FnOnce(&mut Model, &mut Context) -> Result<T, Error>,
    ) -> Result<T, Error> {
        on(|context| work(self, context))
    }

    fn sizes(&self) -> Sizes {
        Sizes::of(&self.config, self.format.element(), self.kept)
    }

    fn step(
        &mut self,
        context: &mut Context,
        tokens: &[Vec<u32>],
        want: &Want,
    ) -> Result<Step, Error> {
        check_tokens(tokens, self.states.sequences(), self.config.vocab_size)?;
        self.undo = None;
        if want.rollback {
            let (tokens, forced_routing) = (tokens.to_vec(), want.forced_routing.clone());
            let undo = Undo { before: Vec::new(), tokens, forced_routing };
            self.undo = Some((undo, self.states.save_linear(&self.device)?));
        }
        let longest = longest(tokens, &self.states.lengths);
        let row = self.sizes().row;
        self.states.grow(&self.device, row, longest)?;
        let looked = want.taps || want.forced.is_some() || want.forced_routing.is_some();
        let plain = !looked && !want.hidden && !want.routing;
        if plain && !tokens.is_empty() && tokens.iter().all(|tokens| tokens.len() == 1) {
            return self.decode(context, tokens, want);
        }
        let pieces = pieces(tokens, piece(self.fast));
        if let [whole] = &pieces[..] {
            return self.piece(context, whole, want);
        }
        let n = pieces.last().map_or(0, |piece| piece.rows.end);
        let asked: Vec<_> = pieces.iter().map(|piece| piece.asked(want.logits).len()).collect();
        let all = asked.iter().sum();
        let (mut step, mut at) = (None, 0);
        for (piece, asked) in pieces.iter().zip(asked) {
            let own = want_of(want, &piece.rows, n, (&(at..at + asked), all))?;
            at += asked;
            join(&mut step, self.piece(context, piece, &own)?)?;
        }
        Ok(step.unwrap_or_default())
    }

    /// Tells the device of a step, and makes room for it.
    fn tell(
        &mut self,
        tokens: &[Vec<u32>],
        asked: &[usize],
        (lengths, capacity): (&[usize], usize),
    ) -> Result<Told, Error> {
        let (n, s) = (tokens.iter().map(Vec::len).sum(), tokens.len());
        let kinds = (self.format.element(), self.fast, self.share.ranks);
        self.scratch.fit(&self.device, &self.config, kinds, (n, s))?;
        let numbers = Told::numbers(tokens, lengths, capacity, asked);
        self.scratch.put(&self.device, &numbers)?;
        let address = self.scratch.told.address();
        let one_each = tokens.iter().all(|tokens| tokens.len() == 1);
        Ok(Told { address, n, s, one_each })
    }

    /// A token of each sequence, with logits of each, the choice among them, or nothing.
    fn decode(
        &mut self,
        context: &mut Context,
        tokens: &[Vec<u32>],
        want: &Want,
    ) -> Result<Step, Error> {
        let head = Head::of(want);
        if let Some(listener) = &mut self.listener
            && !(0..self.layers.len()).all(listener)
        {
            return Err(INTERRUPTED.into());
        }
        let n = tokens.len();
        let asked: Vec<usize> = (0..if head == Head::Nothing { 0 } else { n }).collect();
        let lengths = self.states.lengths.clone();
        let told = self.tell(tokens, &asked, (&lengths, self.capacity()))?;
        let of =
            Captured { sequences: n, head, scratch: self.scratch.moved, states: self.states.moved };
        let banded = LOGITS < asked.len();
        let mut decode = self.decode.take().filter(|decode| decode.of == of);
        match &mut decode {
            Some(Decode { graph: Some(graph), .. }) if !banded => graph.launch()?,
            Some(Decode { graph, .. }) if !banded => {
                let device = self.device.clone();
                let mut failed = None;
                let captured = device.capture(|| {
                    let done = self
                        .all(context, told, &mut Looked::nothing())
                        .and_then(|()| self.band(context, told, head, 0..asked.len()));
                    done.map_err(|e| {
                        let text = e.to_string();
                        failed = Some(e);
                        device::Error::Driver(text)
                    })
                });
                if let Some(e) = failed {
                    return Err(e);
                }
                graph.insert(captured?).launch()?;
            }
            _ => {
                self.all(context, told, &mut Looked::nothing())?;
                if !banded {
                    self.band(context, told, head, 0..asked.len())?;
                }
            }
        }
        self.decode = Some(decode.unwrap_or(Decode { of, graph: None }));
        self.states.lengths.iter_mut().for_each(|length| *length += 1);
        let (logits, greedy) = if banded {
            self.heads(context, told, head, asked.len())?
        } else {
            self.headed(head, asked.len())?
        };
        let last: Vec<usize> = if want.last == Rows::None { vec![] } else { (0..n).collect() };
        let (element, d) = (self.format.element(), self.config.hidden_size);
        let hidden = vec![self.scratch.rows(&self.device, element, d, &last)?];
        Ok(Step { logits, greedy, hidden, ..Step::default() })
    }

    /// Tokens that caches have room for.
    fn capacity(&self) -> usize {
        let cache = |layer: &LayerState| match layer {
            LayerState::Full(cache) => Some(cache.capacity),
            LayerState::Linear(_) => None,
        };
        self.states.layers.iter().find_map(cache).unwrap_or(0)
    }

    /// A piece of a step, and what is wanted of it.
    fn piece(&mut self, context: &mut Context, piece: &Piece, want: &Want) -> Result<Step, Error> {
        let (n, d) = (piece.rows.len(), self.config.hidden_size);
        let head = Head::of(want);
        let mut asked = piece.asked(head.rows(want));
        let lengths = self.states.lengths.clone();
        let told = self.tell(&piece.tokens, &asked, (&lengths, self.capacity()))?;
        let mut looked = Looked {
            seen: Seen {
                part: Part::Embedding,
                told: want.taps.then(Vec::new),
                forced: want.forced.as_deref(),
            },
            hidden: want.hidden.then(Vec::new),
            routing: want.routing.then(Vec::new),
            forced_routing: want.forced_routing.as_deref(),
            listens: true,
        };
        self.all(context, told, &mut looked)?;
        for (length, tokens) in self.states.lengths.iter_mut().zip(&piece.tokens) {
            *length += tokens.len();
        }
        let Looked { mut seen, hidden, routing, .. } = looked;
        seen.part = Part::Head;
        let element = self.format.element();
        seen.see(&self.device, ("rms_norm", "norm"), &[n, d], &mut self.scratch.normed, element)?;
        let (mut logits, greedy) = self.heads(context, told, head, asked.len())?;
        let shape = [logits.nrows(), self.share.vocabulary.len()];
        if let Some(numbers) = logits.as_slice_mut() {
            seen.see_here(("lm_head", "logits"), &shape, numbers)?;
        }
        asked = piece.asked(if want.hidden { Rows::All } else { want.last });
        let last = self.scratch.rows(&self.device, element, d, &asked)?;
        let mut hidden = hidden.unwrap_or_default();
        hidden.push(last);
        let (routing, taps) = (routing.unwrap_or_default(), seen.told.unwrap_or_default());
        Ok(Step { logits, greedy, hidden, routing, taps })
    }

    /// Embedding, layers and final norm of a piece: nothing waits, unless somebody looks.
    fn all(
        &mut self,
        context: &mut Context,
        told: Told,
        looked: &mut Looked<'_>,
    ) -> Result<(), Error> {
        let stream = &mut Stream { context, kernels: &mut self.kernels };
        let mut pass = Pass {
            ops: Ops { stream, element: self.format.element(), fast: self.fast },
            device: Some(&self.device),
            config: &self.config,
            share: &self.share,
            scratch: &mut self.scratch,
            inv_freq: &self.inv_freq,
            told,
            pending: Pending::Wide,
        };
        let layers =
            Layers { embedding: &self.embedding, all: &self.layers, final_norm: &self.final_norm };
        pass.walk(&layers, &self.states.layers, self.listener.as_mut(), looked)
    }

    /// The MTP head over some tokens: its norm at hand.
    fn draft(
        &mut self,
        context: &mut Context,
        piece: &Piece,
        hidden: &[f32],
        answer: Rows,
    ) -> Result<Step, Error> {
        let element = self.format.element();
        let (n, d) = (piece.rows.len(), self.config.hidden_size);
        let eps = self.config.rms_norm_eps as f32;
        let asked = piece.asked(answer);
        let longest = longest(&piece.tokens, &self.states.drafts);
        let row = self.sizes().row;
        self.states.grow_drafts(&self.device, row, longest)?;
        let drafts = self.states.drafts.clone();
        let capacity = self.states.mtp.as_ref().map_or(0, |cache| cache.capacity);
        let told = self.tell(&piece.tokens, &asked, (&drafts, capacity))?;
        let none = "the checkpoint has no multi-token-prediction head";
        let (mtp, cache) = self.mtp.as_ref().zip(self.states.mtp.as_ref()).ok_or(none)?;
        let stream = &mut Stream { context, kernels: &mut self.kernels };
        let mut pass = Pass {
            ops: Ops { stream, element, fast: self.fast },
            device: Some(&self.device),
            config: &self.config,
            share: &self.share,
            scratch: &mut self.scratch,
            inv_freq: &self.inv_freq,
            told,
            pending: Pending::Wide,
        };
        let looked = &mut Looked::nothing();
        looked.seen.part = Part::Mtp;
        pass.ops.embedding(&pass.scratch.x, told.ids(), &self.embedding, n)?;
        let r = &*pass.scratch;
        let alone = Added::default();
        pass.ops.norm((&r.pairs, 0, 2 * d), &r.x, alone, &mtp.norm_embedding, (n, d, eps))?;
        pass.scratch.put_stream(&self.device, hidden)?;
        let r = &*pass.scratch;
        pass.ops.norm((&r.pairs, d, 2 * d), &r.x, alone, &mtp.norm_hidden, (n, d, eps))?;
        pass.ops.widened(&r.added, &r.pairs, &mtp.fc, n)?;
        let begins = Added { wide: Some(&r.added), begins: true, ..alone };
        pass.ops.norm((&r.normed, 0, d), &r.x, begins, &mtp.layer.input_norm, (n, d, eps))?;
        pass.full_attention(&mtp.layer.mixer, cache, looked)?;
        pass.add_norm("h", &mtp.layer.post_norm, looked)?;
        pass.mlp(&mtp.layer.mlp, None, looked)?;
        pass.add_norm("o", &mtp.norm, looked)?;
        for (length, tokens) in self.states.drafts.iter_mut().zip(&piece.tokens) {
            *length += tokens.len();
        }
        if answer == Rows::None {
            return Ok(Step::default());
        }
        let (logits, _) = self.heads(context, told, Head::Logits, asked.len())?;
        let hidden = self.scratch.rows(&self.device, element, d, &asked)?;
        Ok(Step { logits, hidden: vec![hidden], ..Step::default() })
    }
}

/// Kernels for Hopper, where the GPU and the model are what they are for; else why they are not.
fn fast(share: &Share, format: Format) -> Result<Fast, String> {
    let gpu = gpu().as_ref().map_err(Clone::clone)?;
    // Where queries of one head of keys are dealt, attention alone is not by them.
    let [num_attention_heads, num_key_value_heads] = share.heads_of_whole();
    let config = Config { num_attention_heads, num_key_value_heads, ..share.config.clone() };
    match Fast::unfit(&config, format.element(), &gpu.target) {
        None => Ok(Fast { multiprocessors: gpu.multiprocessors as usize }),
        Some(why) => Err(why),
    }
}

/// Tokens of the longest sequence once these are added.
fn longest(tokens: &[Vec<u32>], lengths: &[usize]) -> usize {
    let after = tokens.iter().zip(lengths).map(|(tokens, length)| tokens.len() + length);
    after.max().unwrap_or(0)
}

/// Does some work on the device, alone; a fault of the device takes it from this process.
fn on<T>(work: impl FnOnce(&mut Context) -> Result<T, Error>) -> Result<T, Error> {
    with("the cuda engine", |context| match work(context) {
        Ok(done) => Ok(Ok(done)),
        Err(error) => match error.downcast::<device::Error>() {
            Ok(error) => Err(*error),
            Err(error) => Ok(Err(error)),
        },
    })?
}

/// Bytes of memory that nobody has, of the first GPUs, so many, on the one with the least.
///
/// # Errors
/// [`Unfit`] if there are not as many.
pub fn free(gpus: usize) -> Result<u64, Error> {
    gpu().as_ref().map_err(|why| Unfit(why.clone()))?;
    if 1 < gpus {
        return ranks::free(gpus);
    }
    on(|context| Ok(context.device.free()?))
}

/// The engine on GPUs of this machine, one or several that have a share of the model each: `format` is `f32`,
/// activations in f32 over weights as the checkpoint has them, or `bf16`, activations in bf16 over weights in bf16 or FP8.
/// Keys and values are in the same, or in FP8 where `kept` says so.
///
/// # Errors
/// [`Unfit`] if there are not as many GPUs, or not enough memory on them; if there is no such format, it keeps keys and
/// values in no such thing, or the model does not divide; if a weight cannot be had; [`INTERRUPTED`] if who is told of
/// bytes that are loaded ends it.
pub fn engine(
    weights: &dyn Weights,
    format: &str,
    kept: Option<Kept>,
    gpus: usize,
    tell: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<Box<dyn Engine>, Error> {
    let (format, kept) = keeping(format, kept)?;
    let split = split(weights.config(), gpus)?;
    gpu().as_ref().map_err(|why| Unfit(why.clone()))?;
    if 1 < gpus {
        return Ok(Box::new(ranks::Ranks::load(weights, &split, (format, kept), tell)?));
    }
    let share = Share::whole(weights.config());
    let all = memory::weights(weights, &share, format)?;
    let mut done = 0;
    let mut count = |bytes: u64| {
        done += bytes;
        tell(done, all)
    };
    let model = on(|context| {
        memory::fits_weights(&context.device, all)?;
        Model::load(weights, (&share, format, kept), context, &mut count)
    })?;
    Ok(Box::new(model))
}

/// The model in so many shares.
fn split(config: &Config, gpus: usize) -> Result<Split, Error> {
    Ok(Split::new(config, gpus).map_err(|why| format!("gpus {gpus}: {why}"))?)
}
