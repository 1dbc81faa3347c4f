//! The seam between the whole model and those who run it.

use std::sync::Arc;

use ndarray::{Array2, Array3, Array4, Axis};
use serde::Serialize;

use crate::{
    Claims, Config, Error, Plan,
    tap::{Forced, Tap},
};

/// A whole model with the states of a number of sequences.
///
/// Sequences are ragged: each has its own length, and a step may feed each a different number of
/// tokens (none is allowed). A batch is many sequences of one length, a left-padded batch is a
/// ragged one without its padding, and packed sequences are the same thing again; state never
/// passes from one sequence to another.
pub trait Engine {
    /// For messages and reports: `reference/f32`, `cuda`, …
    fn name(&self) -> String;
    /// The model.
    fn config(&self) -> &Config;
    /// How it rounds: the bound it is held to follows from this.
    fn plan(&self) -> Plan {
        Plan::F32
    }
    /// Why slower kernels compute in place of those that are made for this machine, if they do.
    fn falls_back(&self) -> Option<String> {
        None
    }
    /// What it promises of its bits beyond that.
    fn claims(&self) -> Claims {
        Claims::default()
    }
    /// Whether it makes the greedy choice where its logits are: [`Want::greedy`].
    fn chooses(&self) -> bool {
        false
    }
    /// Whether it goes on with [`Want::forced`]; one that does not refuses a step that asks for it.
    fn forces(&self) -> bool {
        false
    }
    /// Forgets everything and makes room for `sequences` empty ones.
    fn reset(&mut self, sequences: usize) -> Result<(), Error>;
    /// Tokens that each sequence holds.
    fn lengths(&self) -> Vec<usize>;
    /// Makes the states of every sequence those of some text of so many tokens, drawn from a seed: to
    /// time what follows without feeding it.
    ///
    /// # Errors
    /// If it cannot.
    fn pretend(&mut self, _tokens: usize, _seed: u64) -> Result<(), Error> {
        Err(format!("{} cannot make up states", self.name()).into())
    }
    /// What a token costs that follows `depth` others, if it tells.
    fn traffic(&self, _depth: usize) -> Option<Traffic> {
        None
    }
    /// Feeds each sequence its next tokens and computes what is wanted.
    fn forward(&mut self, tokens: &[Vec<u32>], want: &Want) -> Result<Step, Error>;
    /// Keeps a copy of all states.
    fn snapshot(&mut self) -> Result<Snapshot, Error>;
    /// Goes back to a snapshot, which stays valid.
    fn restore(&mut self, snapshot: Snapshot) -> Result<(), Error>;
    /// Gives a snapshot's memory back.
    fn release(&mut self, snapshot: Snapshot);
    /// Keeps, of the tokens that the last [`forward`](Self::forward) fed to each sequence, only the
    /// first `keep[sequence]`. That forward must have wanted [`Want::rollback`].
    fn rollback(&mut self, keep: &[usize]) -> Result<(), Error>;
    /// The states of every layer, `None` for attention layers.
    fn linear_states(&self) -> Result<Vec<Option<LinearState>>, Error>;
    /// Asks to be told of each layer as a step comes to it; the step ends with the error
    /// [`INTERRUPTED`] when the listener returns false.
    fn watch(&mut self, listener: Listener);
    /// Whether the checkpoint has a multi-token-prediction head.
    fn has_mtp(&self) -> bool;
    /// Runs the MTP head: for each sequence, `tokens[s]` are the tokens *after* those whose hidden
    /// states (after the final norm, or the head's own output for further drafts) are the rows of
    /// `hidden`, all sequences one after another. Appends to the head's own cache.
    fn mtp(&mut self, tokens: &[Vec<u32>], hidden: &Array2<f32>) -> Result<Step, Error>;
    /// The same without an answer: only the head's cache is wanted.
    fn mtp_feed(&mut self, tokens: &[Vec<u32>], hidden: &Array2<f32>) -> Result<(), Error> {
        self.mtp(tokens, hidden).map(drop)
    }
    /// Entries that each sequence has in the MTP head's cache.
    fn mtp_lengths(&self) -> Vec<usize>;
    /// Drops all but the first `keep[sequence]` entries of the MTP head's cache.
    fn mtp_truncate(&mut self, keep: &[usize]) -> Result<(), Error>;
}

/// Told of each layer as a step comes to it; returns whether to go on.
pub type Listener = Box<dyn FnMut(usize) -> bool + Send>;

/// The error of a step that its listener ended.
pub const INTERRUPTED: &str = "interrupted";

/// What one token costs, at least.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Traffic {
    /// Bytes of weights that it reads, the output head's among them.
    pub weights: u64,
    /// Bytes of these that are of the experts which are chosen for it.
    pub experts: u64,
    /// Bytes of states and caches that it reads or writes.
    pub states: u64,
    /// Multiplications and additions with weight matrices, without the output head.
    pub products: u64,
    /// Multiplications and additions in attention.
    pub attention: u64,
}

impl Traffic {
    /// Bytes that a step of a token each of so many sequences reads or writes: weights once, of `E` experts as many
    /// as are met if each token chooses its `k` evenly, `E (1 - (1 - k / E)^sequences)`, and the states of each.
    pub fn of_step(&self, sequences: usize, config: &Config) -> f64 {
        let (all, chosen) = (config.num_experts as f64, config.num_experts_per_tok as f64);
        // Exactly those of a token, if there is one; and a model may have no experts.
        let met = if sequences == 1 || self.experts == 0 {
            1.0
        } else {
            all / chosen * (1.0 - (1.0 - chosen / all).powf(sequences as f64))
        };
        (self.weights - self.experts) as f64
            + met * self.experts as f64
            + sequences as f64 * self.states as f64
    }
}

/// What an engine needs of the machine's memory, in bytes, stated before anything is allocated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// Weights in the checkpoint's own memory map. They need not fit: pages are read when they are used,
    /// and given up when the machine wants them back.
    pub mapped: u64,
    /// Weights that the engine holds itself, narrowed or widened.
    pub owned: u64,
    /// Recurrent states and windows of the convolution, of all sequences.
    pub state: u64,
    /// Keys and values of all sequences, in whole pages.
    pub cache: u64,
    /// Intermediates of a step, at most, and the logits that it answers.
    pub scratch: u64,
}

impl Memory {
    /// What must fit: all but mapped weights.
    pub fn must_fit(&self) -> u64 {
        [self.owned, self.state, self.cache, self.scratch]
            .iter()
            .fold(0, |a, &b| a.saturating_add(b))
    }

    /// Weights, states and caches: what cannot be less whatever an engine does.
    pub fn held(&self) -> u64 {
        [self.mapped, self.owned, self.state, self.cache]
            .iter()
            .fold(0, |a, &b| a.saturating_add(b))
    }
}

/// Where an engine that narrows weights has them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Narrowed {
    /// In memory of its own.
    #[default]
    Owned,
    /// In a file, mapped.
    Mapped,
}

/// What an engine is going to be asked, as far as memory depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Demand {
    /// Sequences.
    pub sequences: usize,
    /// Tokens that each will hold.
    pub context: usize,
    /// Most tokens that are fed in one step, of all sequences.
    pub fed: usize,
    /// Most rows of logits that are asked for in one step.
    pub logits: usize,
    /// Most rows of the last hidden state that are asked for in one step.
    pub hidden: usize,
    /// Tokens that the draft head's cache of each sequence will hold.
    pub drafts: usize,
    /// Where narrowed weights are.
    pub narrowed: Narrowed,
}

/// A copy of all states, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Snapshot(pub u64);

/// What a linear-attention layer keeps of `S` sequences.
#[derive(Clone, Debug)]
pub struct LinearState {
    /// `[S, C, W - 1]` the last raw inputs of the convolution, oldest first.
    pub conv: Array3<f32>,
    /// `[S, HV, K, V]`.
    pub recurrent: Array4<f32>,
}

/// The error of a step whose logits are NaN or infinite: no choice among them means anything.
pub const NOT_FINITE: &str = "logits are not finite";

/// Which rows of a step get logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Rows {
    /// Every token.
    #[default]
    All,
    /// The last token of each sequence that was fed any.
    Last,
    /// None.
    None,
}

impl Rows {
    /// Which rows these are, of sequences whose tokens begin and end at `cu` `[S + 1]`.
    pub fn of(self, cu: &[usize]) -> Vec<usize> {
        match self {
            Rows::All => (0..cu.last().copied().unwrap_or(0)).collect(),
            Rows::Last => cu.windows(2).filter(|p| p[0] < p[1]).map(|p| p[1] - 1).collect(),
            Rows::None => Vec::new(),
        }
    }
}

/// What a step should compute beside advancing the states.
#[expect(clippy::struct_excessive_bools, reason = "each asks for one thing, and none for another")]
#[derive(Clone, Debug, Default)]
pub struct Want {
    /// Rows of logits.
    pub logits: Rows,
    /// In place of logits, of which [`Rows::None`] are wanted then, the choice that greedy sampling makes after the last
    /// token of each sequence that was fed any. An engine that does not choose ([`Engine::chooses`]) leaves it out.
    pub greedy: bool,
    /// Rows of the last hidden state, unless `hidden` asks for all of them.
    pub last: Rows,
    /// Hidden states `0 ..= L`.
    pub hidden: bool,
    /// Routing of each layer.
    pub routing: bool,
    /// Ability to roll back within this step.
    pub rollback: bool,
    /// Experts to use instead of the router's own choice, per layer `[N, A]`; their weights still
    /// come from the router's probabilities. Used where a recording chose otherwise within the
    /// margin of a near tie.
    pub forced_routing: Option<Vec<Option<Array2<i64>>>>,
    /// Intermediates. An engine tells those it has: none is allowed.
    pub taps: bool,
    /// Intermediates to go on with in place of the engine's own, which are told as they were computed:
    /// with the residual streams of another engine, each layer's error is its own; with everything,
    /// each op's.
    pub forced: Option<Arc<Forced>>,
}

/// What a step computed; all sequences' tokens one after another, `N` in all.
#[derive(Clone, Debug, Default)]
pub struct Step {
    /// `[N or fewer, vocab_size]`, as [`Want::logits`] asks.
    pub logits: Array2<f32>,
    /// Ids of the largest logits, of equal ones the lowest. Empty unless wanted.
    pub greedy: Vec<u32>,
    /// `[N, D]` each: the embedding, the residual stream after each layer but the last, and the
    /// last one after the final norm. Empty unless wanted, but for the last, which the MTP head
    /// needs and which is always there, in the rows that [`Want::last`] asks for.
    pub hidden: Vec<Array2<f32>>,
    /// Per layer; `None` for dense layers. Empty unless wanted.
    pub routing: Vec<Option<Routing>>,
    /// What was computed on the way, in that order. Empty unless wanted.
    pub taps: Vec<Tap>,
}

/// What a router chose.
#[derive(Clone, Debug)]
pub struct Routing {
    /// `[N, A]` experts, most probable first.
    pub ids: Array2<i64>,
    /// `[N]` gap between the logits of the last expert chosen and the first one left out.
    pub margins: Vec<f32>,
}

/// Whether token lists can be fed to so many sequences.
///
/// # Errors
/// Names the sequence and the token.
pub fn check_tokens(tokens: &[Vec<u32>], sequences: usize, vocab_size: usize) -> Result<(), Error> {
    if tokens.len() != sequences {
        return Err(format!("{} token lists for {sequences} sequences", tokens.len()).into());
    }
    for (i, row) in tokens.iter().enumerate() {
        let beyond = row.iter().enumerate().find(|(_, id)| vocab_size <= **id as usize);
        if let Some((at, id)) = beyond {
            return Err(format!(
                "sequence {i}, token {at}: id {id} is not below vocab_size {vocab_size}"
            )
            .into());
        }
    }
    Ok(())
}

/// What an engine whose states cannot be cropped needs to take tokens of its last step back: the states
/// before it, and what was fed.
#[derive(Clone, Debug)]
pub struct Undo<S> {
    /// The sequences before the step.
    pub before: Vec<S>,
    /// What it fed to each.
    pub tokens: Vec<Vec<u32>>,
    /// The experts that were forced.
    pub forced_routing: Option<Vec<Option<Array2<i64>>>>,
}

impl<S> Undo<S> {
    /// Of a step that is about to be made, if it wants to be taken back.
    pub fn of(before: &[S], tokens: &[Vec<u32>], want: &Want) -> Option<Undo<S>>
    where
        S: Clone,
    {
        want.rollback.then(|| Undo {
            before: before.to_vec(),
            tokens: tokens.to_vec(),
            forced_routing: want.forced_routing.clone(),
        })
    }

    /// The step that feeds the first `keep[sequence]` tokens again.
    ///
    /// # Errors
    /// If that is more than the step fed.
    pub fn keeping(&self, keep: &[usize]) -> Result<(Vec<Vec<u32>>, Want), Error> {
        let kept = self.tokens.iter().zip(keep);
        if keep.len() != self.tokens.len() || kept.clone().any(|(tokens, &n)| tokens.len() < n) {
            return Err("rollback keeps more tokens than the last step fed".into());
        }
        let mut rows = Vec::new();
        let mut start = 0;
        for (tokens, &n) in kept.clone() {
            rows.extend(start..start + n);
            start += tokens.len();
        }
        let select = |ids: &Array2<i64>| ids.select(Axis(0), &rows);
        let forced_routing = self
            .forced_routing
            .as_ref()
            .map(|layers| layers.iter().map(|ids| ids.as_ref().map(select)).collect());
        let tokens = kept.map(|(tokens, &n)| tokens[..n].to_vec()).collect();
        Ok((tokens, Want { logits: Rows::None, forced_routing, ..Want::default() }))
    }
}

#[cfg(test)]
mod tests {
    use super::Traffic;
    use crate::{Weights as _, synthetic::Synthetic};

    #[test]
    fn a_step_reads_the_experts_that_its_sequences_meet() {
        let weights: Synthetic = "synthetic:tiny".parse().unwrap();
        let mut config = weights.config().clone();
        (config.num_experts, config.num_experts_per_tok) = (4, 2);
        let traffic = Traffic { weights: 100, experts: 60, states: 7, ..Traffic::default() };
        // Of four experts two; of two tokens three in the mean, each being missed by a token in one of two cases.
        assert_eq!(traffic.of_step(1, &config), 107.0);
        assert_eq!(traffic.of_step(2, &config), 40.0 + 90.0 + 14.0);
        // In the end all.
        assert_eq!(traffic.of_step(1000, &config), 40.0 + 120.0 + 7000.0);
        let dense = Traffic { weights: 100, states: 7, ..Traffic::default() };
        assert_eq!(dense.of_step(2, &config), 114.0);
    }
}
