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
//! A sequence of a cache is followed by a gap up to its capacity. To the attention kernels gaps are sequences
//! without queries.

mod engine;
mod memory;
mod scratch;
mod seen;
mod states;
mod weights;

pub use memory::memory;

use std::{collections::HashMap, fmt, sync::Arc};

use golden::{
    Config, Engine, Error, Weights,
    engine::{INTERRUPTED, Listener, Routing, Rows, Step, Undo, Want, check_tokens},
    names,
    tap::{Part, RESIDUAL},
};
use ndarray::Array2;

use self::{
    scratch::{LOGITS, Scratch},
    seen::{Looked, Seen},
    states::{LayerState, Saved, Sizes, States},
    weights::{Layer, Loader, MixerWeights, MlpWeights, Mtp},
};
use super::{
    device::{self, Buffer, Device, Graph},
    engine::{Delta, Element, Experts, Heads, Matrix, Ops},
    gpu::{Context, gpu, with},
    launch::{Arg, Kernels},
};
use crate::cpu::model::pieces::{Piece, join, pieces, want_of};

/// Rows that are walked at once.
pub(super) const PIECE: usize = 2048;

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
    format: Format,
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
    logits: bool,
    scratch: u64,
    states: u64,
}

/// What the device is told of a step: the places of its parts in one buffer of `i64`.
#[derive(Clone, Copy)]
struct Told {
    address: u64,
    n: usize,
    s: usize,
    /// Whether every sequence has one token.
    one_each: bool,
}

impl Told {
    fn part(self, before: usize) -> Arg {
        Arg::At(self.address + 8 * before as u64)
    }

    fn ids(self) -> Arg {
        self.part(0)
    }

    fn positions(self) -> Arg {
        self.part(self.n)
    }

    fn rows(self) -> Arg {
        self.part(2 * self.n)
    }

    /// Rows that are asked for.
    fn asked(self) -> Arg {
        self.part(3 * self.n)
    }

    fn cu(self) -> Arg {
        self.part(4 * self.n)
    }

    /// Of queries and of keys, with gaps.
    fn cu_gaps(self) -> (Arg, Arg) {
        let before = 4 * self.n + self.s + 1;
        (self.part(before), self.part(before + 2 * self.s + 1))
    }

    /// All parts, in order.
    fn numbers(
        tokens: &[Vec<u32>],
        lengths: &[usize],
        capacity: usize,
        asked: &[usize],
    ) -> Vec<i64> {
        let n: usize = tokens.iter().map(Vec::len).sum();
        let s = tokens.len();
        let mut all: Vec<i64> = Vec::with_capacity(4 * n + 5 * s + 3);
        all.extend(tokens.iter().flatten().map(|&id| i64::from(id)));
        let each = || tokens.iter().zip(lengths).enumerate();
        for (_, (tokens, &length)) in each() {
            all.extend((length..length + tokens.len()).map(|position| position as i64));
        }
        for (i, (tokens, &length)) in each() {
            let first = i * capacity + length;
            all.extend((first..first + tokens.len()).map(|row| row as i64));
        }
        all.extend(asked.iter().map(|&row| row as i64));
        all.resize(4 * n, 0);
        let mut end = 0;
        let mut ends = vec![0];
        for tokens in tokens {
            end += tokens.len() as i64;
            ends.push(end);
        }
        all.extend(&ends);
        // A gap begins where its sequence ends, and has no queries.
        all.push(0);
        all.extend(ends[1..].iter().flat_map(|&end| [end, end]));
        all.push(0);
        for (i, (tokens, &length)) in each() {
            all.push((i * capacity + length + tokens.len()) as i64);
            all.push(((i + 1) * capacity) as i64);
        }
        debug_assert_eq!(all.len(), 4 * n + 5 * s + 3);
        all
    }
}

impl Model {
    fn load(
        weights: &dyn Weights,
        format: Format,
        context: &mut Context,
        tell: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Model, Error> {
        let config = weights.config().clone();
        let mut kernels = Kernels::default();
        let device = context.device.clone();
        let ops = Ops { context, kernels: &mut kernels, element: format.element() };
        let mut load = Loader { weights, config: &config, format, ops, tell };
        let embedding = load.matrix(names::EMBED_TOKENS)?;
        let kinds = config.layer_types.iter().zip(&config.mlp_types).enumerate();
        let layers = kinds
            .map(|(i, (&mixer, &mlp))| load.layer(&format!("model.layers.{i}"), mixer, mlp))
            .collect::<Result<_, _>>()?;
        let final_norm = load.vector(names::FINAL_NORM)?;
        let lm_head =
            if config.tie_word_embeddings { None } else { Some(load.matrix(names::LM_HEAD)?) };
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
        Sizes::of(&self.config, self.format.element())
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
        let longest = tokens.iter().zip(&self.states.lengths);
        let longest = longest.map(|(tokens, length)| tokens.len() + length).max().unwrap_or(0);
        let row = self.sizes().row;
        self.states.grow(&self.device, row, longest)?;
        let looked = want.taps || want.forced.is_some() || want.forced_routing.is_some();
        let plain = !looked && !want.hidden && !want.routing;
        if plain && !tokens.is_empty() && tokens.iter().all(|tokens| tokens.len() == 1) {
            return self.decode(context, tokens, want);
        }
        let pieces = pieces(tokens, PIECE);
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
        self.scratch.fit(&self.device, &self.config, self.format.element(), (n, s))?;
        let numbers = Told::numbers(tokens, lengths, capacity, asked);
        self.scratch.put(&self.device, &numbers)?;
        let address = self.device.address(&self.scratch.told);
        let one_each = tokens.iter().all(|tokens| tokens.len() == 1);
        Ok(Told { address, n, s, one_each })
    }

    /// A token of each sequence, with logits of each or none.
    fn decode(
        &mut self,
        context: &mut Context,
        tokens: &[Vec<u32>],
        want: &Want,
    ) -> Result<Step, Error> {
        let logits = want.logits != Rows::None;
        if let Some(listener) = &mut self.listener
            && !(0..self.layers.len()).all(listener)
        {
            return Err(INTERRUPTED.into());
        }
        let n = tokens.len();
        let asked: Vec<usize> = (0..if logits { n } else { 0 }).collect();
        let lengths = self.states.lengths.clone();
        let told = self.tell(tokens, &asked, (&lengths, self.capacity()))?;
        let of = Captured {
            sequences: n,
            logits,
            scratch: self.scratch.moved,
            states: self.states.moved,
        };
        let banded = LOGITS < asked.len();
        let mut decode = self.decode.take().filter(|decode| decode.of == of);
        match &mut decode {
            Some(Decode { graph: Some(graph), .. }) if !banded => graph.launch()?,
            Some(Decode { graph, .. }) if !banded => {
                let device = self.device.clone();
                let mut failed = None;
                let captured = device.capture(|| {
                    let done = self.all(context, told, &mut Looked::nothing()).and_then(|()| {
                        let band = 0..asked.len();
                        if logits { self.band(context, told, band) } else { Ok(()) }
                    });
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
                if logits && !banded {
                    self.band(context, told, 0..n)?;
                }
            }
        }
        self.decode = Some(decode.unwrap_or(Decode { of, graph: None }));
        self.states.lengths.iter_mut().for_each(|length| *length += 1);
        let logits = if banded {
            self.logits(context, told, asked.len())?
        } else {
            self.scratch.logits(&self.device, asked.len(), self.config.vocab_size)?
        };
        let last: Vec<usize> = if want.last == Rows::None { vec![] } else { (0..n).collect() };
        let (element, d) = (self.format.element(), self.config.hidden_size);
        let hidden = vec![self.scratch.rows(&self.device, element, d, &last)?];
        Ok(Step { logits, hidden, ..Step::default() })
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
        let mut asked = piece.asked(want.logits);
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
        let mut logits = self.logits(context, told, asked.len())?;
        let shape = [asked.len(), self.config.vocab_size];
        if let Some(numbers) = logits.as_slice_mut() {
            seen.see_here(("lm_head", "logits"), &shape, numbers)?;
        }
        asked = piece.asked(if want.hidden { Rows::All } else { want.last });
        let last = self.scratch.rows(&self.device, element, d, &asked)?;
        let mut hidden = hidden.unwrap_or_default();
        hidden.push(last);
        let (routing, taps) = (routing.unwrap_or_default(), seen.told.unwrap_or_default());
        Ok(Step { logits, hidden, routing, taps })
    }

    /// Logits of the rows that are asked for, of the norm at hand.
    fn logits(
        &mut self,
        context: &mut Context,
        told: Told,
        asked: usize,
    ) -> Result<Array2<f32>, Error> {
        let v = self.config.vocab_size;
        let mut all = Array2::zeros((0, v));
        for first in (0..asked).step_by(LOGITS) {
            let end = (first + LOGITS).min(asked);
            self.band(context, told, first..end)?;
            let band = self.scratch.logits(&self.device, end - first, v)?;
            if asked <= LOGITS {
                return Ok(band);
            }
            all.append(ndarray::Axis(0), band.view())?;
        }
        Ok(all)
    }

    /// Logits of some of the rows that are asked for.
    fn band(
        &mut self,
        context: &mut Context,
        told: Told,
        rows: std::ops::Range<usize>,
    ) -> Result<(), Error> {
        let element = self.format.element();
        let Arg::At(asked) = told.asked() else { unreachable!("an address") };
        let chosen = Arg::At(asked + 8 * rows.start as u64);
        let head = self.lm_head.as_ref().unwrap_or(&self.embedding);
        let mut ops = Ops { context, kernels: &mut self.kernels, element };
        let (r, d) = (&self.scratch, self.config.hidden_size);
        ops.gather(&r.last, &r.normed, chosen, (rows.len(), d * element.size()))?;
        ops.wide(&r.logits, &r.last, head, rows.len())?;
        Ok(())
    }

    /// Embedding, layers and final norm of a piece: nothing waits, unless somebody looks.
    fn all(
        &mut self,
        context: &mut Context,
        told: Told,
        looked: &mut Looked<'_>,
    ) -> Result<(), Error> {
        let element = self.format.element();
        let (n, d) = (told.n, self.config.hidden_size);
        let eps = self.config.rms_norm_eps as f32;
        let device = self.device.clone();
        let mut pass = Pass {
            ops: Ops { context, kernels: &mut self.kernels, element },
            config: &self.config,
            scratch: &mut self.scratch,
            inv_freq: &self.inv_freq,
            told,
        };
        pass.ops.embedding(&pass.scratch.x, told.ids(), &self.embedding, n)?;
        looked.seen.see(&device, ("embedding", "o"), &[n, d], &mut pass.scratch.x, Element::F32)?;
        let first = self.layers.first().map_or(&self.final_norm, |layer| &layer.input_norm);
        pass.norm(None, first, eps)?;
        for (i, (layer, state)) in self.layers.iter().zip(&self.states.layers).enumerate() {
            if looked.listens && self.listener.as_mut().is_some_and(|go_on| !go_on(i)) {
                return Err(INTERRUPTED.into());
            }
            if let Some(hidden) = &mut looked.hidden {
                let x = pass.scratch.stream(&device, (n, d))?;
                hidden.push(x);
            }
            looked.seen.part = Part::Layer(i);
            pass.see(looked, ("rms_norm", "input_layernorm"), &[n, d], |r| &mut r.normed)?;
            match (&layer.mixer, state) {
                (MixerWeights::Linear { .. }, LayerState::Linear(state)) => {
                    pass.linear_attention(&layer.mixer, state, looked)?;
                }
                (MixerWeights::Full { .. }, LayerState::Full(cache)) => {
                    pass.full_attention(&layer.mixer, cache, looked)?;
                }
                _ => return Err("a layer with the state of another kind".into()),
            }
            pass.add_norm("h", &layer.post_norm, looked)?;
            pass.see(looked, ("rms_norm", "post_attention_layernorm"), &[n, d], |r| &mut r.normed)?;
            let forced = looked.forced_routing.and_then(|all| all.get(i)?.as_ref());
            let routing = pass.mlp(&layer.mlp, forced, looked)?;
            let next = self.layers.get(i + 1).map_or(&self.final_norm, |layer| &layer.input_norm);
            pass.add_norm("o", next, looked)?;
            if let Some(all) = &mut looked.routing {
                all.push(routing);
            }
        }
        Ok(())
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
        let longest = piece.tokens.iter().zip(&self.states.drafts);
        let longest = longest.map(|(tokens, length)| tokens.len() + length).max().unwrap_or(0);
        let row = self.sizes().row;
        self.states.grow_drafts(&self.device, row, longest)?;
        let drafts = self.states.drafts.clone();
        let capacity = self.states.mtp.as_ref().map_or(0, |cache| cache.capacity);
        let told = self.tell(&piece.tokens, &asked, (&drafts, capacity))?;
        let none = "the checkpoint has no multi-token-prediction head";
        let (mtp, cache) = self.mtp.as_ref().zip(self.states.mtp.as_ref()).ok_or(none)?;
        let mut pass = Pass {
            ops: Ops { context, kernels: &mut self.kernels, element },
            config: &self.config,
            scratch: &mut self.scratch,
            inv_freq: &self.inv_freq,
            told,
        };
        let looked = &mut Looked::nothing();
        looked.seen.part = Part::Mtp;
        pass.ops.embedding(&pass.scratch.x, told.ids(), &self.embedding, n)?;
        let r = &*pass.scratch;
        pass.ops.norm((&r.pairs, 0, 2 * d), &r.x, None, &mtp.norm_embedding, (n, d, eps))?;
        pass.scratch.put_stream(&self.device, hidden)?;
        let r = &*pass.scratch;
        pass.ops.norm((&r.pairs, d, 2 * d), &r.x, None, &mtp.norm_hidden, (n, d, eps))?;
        pass.ops.widened(&r.added, &r.pairs, &mtp.fc, n)?;
        let begins = Some((&r.added, true));
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
        let logits = self.logits(context, told, asked.len())?;
        let hidden = self.scratch.rows(&self.device, element, d, &asked)?;
        Ok(Step { logits, hidden: vec![hidden], ..Step::default() })
    }
}

/// A piece on its way through the layers.
struct Pass<'a> {
    ops: Ops<'a>,
    config: &'a Config,
    scratch: &'a mut Scratch,
    inv_freq: &'a Buffer,
    told: Told,
}

impl Pass<'_> {
    fn see(
        &mut self,
        looked: &mut Looked<'_>,
        name: (&'static str, &'static str),
        shape: &[usize],
        of: impl Fn(&mut Scratch) -> &mut Buffer,
    ) -> Result<(), Error> {
        if !looked.seen.looks() {
            return Ok(());
        }
        let (device, element) = (self.ops.context.device.clone(), self.ops.element);
        looked.seen.see(&device, name, shape, of(self.scratch), element)
    }

    /// The same of numbers in f32.
    fn see_wide(
        &mut self,
        looked: &mut Looked<'_>,
        name: (&'static str, &'static str),
        shape: &[usize],
        of: impl Fn(&mut Scratch) -> &mut Buffer,
    ) -> Result<(), Error> {
        if !looked.seen.looks() {
            return Ok(());
        }
        let device = self.ops.context.device.clone();
        looked.seen.see(&device, name, shape, of(self.scratch), Element::F32)
    }

    fn norm(&mut self, add: Option<&Buffer>, weight: &Buffer, eps: f32) -> Result<(), Error> {
        let (n, d) = (self.told.n, self.config.hidden_size);
        let r = &*self.scratch;
        let add = add.map(|add| (add, false));
        Ok(self.ops.norm((&r.normed, 0, d), &r.x, add, weight, (n, d, eps))?)
    }

    /// `x <- x + added`, a residual of that name, and its norm; in one pass where nobody looks.
    fn add_norm(
        &mut self,
        tensor: &'static str,
        weight: &Buffer,
        looked: &mut Looked<'_>,
    ) -> Result<(), Error> {
        let (n, d) = (self.told.n, self.config.hidden_size);
        let eps = self.config.rms_norm_eps as f32;
        let r = &*self.scratch;
        let add = Some((&r.added, false));
        self.ops.norm((&r.normed, 0, d), &r.x, add, weight, (n, d, eps))?;
        if looked.seen.looks() {
            self.see_wide(looked, (RESIDUAL, tensor), &[n, d], |r| &mut r.x)?;
            self.norm(None, weight, eps)?;
        }
        Ok(())
    }

    /// `linear_attn` over the new rows; the states go on.
    fn linear_attention(
        &mut self,
        mixer: &MixerWeights,
        state: &states::Linear,
        looked: &mut Looked<'_>,
    ) -> Result<(), Error> {
        let MixerWeights::Linear { qkvz, ba, conv, a_log, dt_bias, norm, out } = mixer else {
            return Err("no linear layer".into());
        };
        let c = self.config;
        let (n, s, cu) = (self.told.n, self.told.s, self.told.cu());
        let delta = Delta {
            hk: c.linear_num_key_heads,
            hv: c.linear_num_value_heads,
            k: c.linear_key_head_dim,
            v: c.linear_value_head_dim,
            taps: c.linear_conv_kernel_dim,
        };
        let r = &*self.scratch;
        self.ops.linear(&r.projected, &r.normed, qkvz, n)?;
        self.ops.wide(&r.gates, &r.normed, ba, n)?;
        self.see(looked, ("linear", "in_proj_qkvz"), &[n, qkvz.rows], |r| &mut r.projected)?;
        self.see_wide(looked, ("linear", "in_proj_ba"), &[n, ba.rows], |r| &mut r.gates)?;
        let r = &*self.scratch;
        self.ops.delta_in(
            [&r.q, &r.k, &r.v, &r.z, &r.g, &r.beta],
            [&r.projected, &r.gates, conv, a_log, dt_bias, &state.conv],
            cu,
            (n, s, self.told.one_each),
            delta,
        )?;
        if !self.told.one_each {
            self.ops.conv_state(&state.conv, &r.projected, cu, s, delta)?;
        }
        let gv = [n, delta.hv, delta.v];
        let reads = [&r.q, &r.k, &r.v, &r.g, &r.beta];
        self.ops.delta_rule(&r.mixed, &state.recurrent, reads, cu, s, delta)?;
        self.see(looked, ("gated_delta_rule", "o"), &gv, |r| &mut r.mixed)?;
        let (r, eps) = (&*self.scratch, c.rms_norm_eps as f32);
        let heads = (n * delta.hv, delta.v);
        self.ops.gated_norm(&r.gated, [&r.mixed, &r.z, norm], eps, heads)?;
        self.see(looked, ("rms_norm_gated", "norm"), &gv, |r| &mut r.gated)?;
        let r = &*self.scratch;
        self.ops.widened(&r.added, &r.gated, out, n)?;
        self.see_wide(looked, ("linear", "out_proj"), &[n, out.rows], |r| &mut r.added)
    }

    /// `self_attn` over the new rows, whose keys and values are added to the caches.
    fn full_attention(
        &mut self,
        mixer: &MixerWeights,
        cache: &states::Cache,
        looked: &mut Looked<'_>,
    ) -> Result<(), Error> {
        let MixerWeights::Full { q, k, v, o, q_norm, k_norm } = mixer else {
            return Err("no full layer".into());
        };
        let c = self.config;
        let (n, s, told) = (self.told.n, self.told.s, self.told);
        let heads = Heads { hq: c.num_attention_heads, hkv: c.num_key_value_heads, h: c.head_dim };
        let Heads { hq, hkv, h } = heads;
        let r = &*self.scratch;
        self.ops.linear(&r.both, &r.normed, q, n)?;
        self.ops.linear(&r.keys, &r.normed, k, n)?;
        self.ops.linear(&r.values, &r.normed, v, n)?;
        self.see(looked, ("linear", "q_proj"), &[n, hq, 2 * h], |r| &mut r.both)?;
        self.see(looked, ("linear", "k_proj"), &[n, hkv, h], |r| &mut r.keys)?;
        self.see(looked, ("linear", "v_proj"), &[n, hkv, h], |r| &mut r.values)?;
        let (r, eps) = (&*self.scratch, c.rms_norm_eps as f32);
        let factor = c.rope.yarn.map_or(1.0, |yarn| yarn.attention_factor as f32);
        // Of an odd number of channels the official code turns one more.
        let turned = c.rope.rotary_dim.next_multiple_of(2);
        self.ops.attention_in(
            [&r.queries, &r.open, &cache.k, &cache.v],
            [&r.both, &r.keys, &r.values, q_norm, k_norm, self.inv_freq],
            (told.positions(), told.rows()),
            (n, turned, eps, factor),
            heads,
        )?;
        let reads = [&r.queries, &cache.k, &cache.v, &r.open];
        self.ops.attention(&r.attended, reads, told.cu_gaps(), (n, s), heads)?;
        self.see(looked, ("attention", "o"), &[n, hq, h], |r| &mut r.attended)?;
        let r = &*self.scratch;
        self.ops.widened(&r.added, &r.attended, o, n)?;
        self.see_wide(looked, ("linear", "o_proj"), &[n, o.rows], |r| &mut r.added)
    }

    /// The sparse or dense MLP.
    fn mlp(
        &mut self,
        mlp: &MlpWeights,
        forced: Option<&Array2<i64>>,
        looked: &mut Looked<'_>,
    ) -> Result<Option<Routing>, Error> {
        let c = self.config;
        let (n, d) = (self.told.n, c.hidden_size);
        let (active, experts) = (c.num_experts_per_tok, c.num_experts);
        let r = &*self.scratch;
        let x = (&r.normed, &r.hidden);
        let (router, routed, shared, shared_gate) = match mlp {
            MlpWeights::Dense(dense) => {
                let experts = Experts { routed: None, shared: Some((dense, None)) };
                self.ops.experts(&r.added, x, &experts, n)?;
                self.see_wide(looked, ("dense_mlp", "o"), &[n, d], |r| &mut r.added)?;
                return Ok(None);
            }
            MlpWeights::Sparse { router, experts, shared, shared_gate } => {
                (router, experts, shared, shared_gate)
            }
        };
        self.ops.wide(&r.router, &r.normed, router, n)?;
        self.see_wide(looked, ("moe_router", "logits"), &[n, experts], |r| &mut r.router)?;
        let device = self.ops.context.device.clone();
        let given = looked.seen.given_ids("moe_router", "ids")?;
        let given = match given.as_ref().or(forced) {
            Some(ids) => Some(seen::put_ids(&device, ids, (n, active))?),
            None => None,
        };
        let r = &*self.scratch;
        let out = [&r.ids, &r.weights, &r.margins, &r.opens];
        let reads = (&r.router, &r.normed, shared_gate);
        let sizes = (n, active, experts);
        self.ops.route(out, reads, given.as_ref(), sizes, c.norm_topk_prob)?;
        self.see_wide(looked, ("moe_router", "weights"), &[n, active], |r| &mut r.weights)?;
        let r = &*self.scratch;
        let x = (&r.normed, &r.hidden);
        let chosen = Some((routed, &r.ids, &r.weights, active));
        let always = Some((shared, Some(&r.opens)));
        let alike = routed.iter().zip(shared).all(|(one, other)| {
            (one.stored, one.rows, one.block) == (other.stored, other.rows, other.block)
        });
        if alike && !looked.seen.looks() {
            let experts = Experts { routed: chosen, shared: always };
            self.ops.experts(&r.added, x, &experts, n)?;
        } else {
            self.ops.experts(&r.added, x, &Experts { routed: chosen, shared: None }, n)?;
            self.see_wide(looked, ("moe_experts", "o"), &[n, d], |r| &mut r.added)?;
            let r = &*self.scratch;
            let always = Experts { routed: None, shared: Some((shared, Some(&r.opens))) };
            self.ops.experts(&r.added, (&r.normed, &r.hidden), &always, n)?;
        }
        self.see_wide(looked, ("moe_layer", "o"), &[n, d], |r| &mut r.added)?;
        if looked.routing.is_none() {
            return Ok(None);
        }
        let ids = self.scratch.ids(&device, (n, active))?;
        let margins = seen::numbers(&device, &self.scratch.margins, Element::F32, n)?;
        Ok(Some(Routing { ids, margins }))
    }
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

/// Bytes of the GPU's memory that nobody has.
///
/// # Errors
/// [`Unfit`] if there is no GPU.
pub fn free() -> Result<u64, Error> {
    gpu().as_ref().map_err(|why| Unfit(why.clone()))?;
    on(|context| Ok(context.device.free()?))
}

/// The engine on the GPU of this machine: `format` is `f32`, activations in f32 over weights as the checkpoint
/// has them, or `bf16`, activations, keys and values in bf16 over weights in bf16 or FP8.
///
/// # Errors
/// [`Unfit`] if there is no GPU, or not enough memory on it; if there is no such format, or a weight cannot be
/// had; [`INTERRUPTED`] if who is told of bytes that are loaded ends it.
pub fn engine(
    weights: &dyn Weights,
    format: &str,
    tell: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<Box<dyn Engine>, Error> {
    let format = Format::of(format)?;
    gpu().as_ref().map_err(|why| Unfit(why.clone()))?;
    let all = memory::weights(weights, format)?;
    let mut done = 0;
    let mut count = |bytes: u64| {
        done += bytes;
        tell(done, all)
    };
    let model = on(|context| {
        memory::fits_weights(&context.device, all)?;
        Model::load(weights, format, context, &mut count)
    })?;
    Ok(Box::new(model))
}
