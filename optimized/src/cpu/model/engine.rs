//! The model as an engine.

use golden::{
    Claims, Config, Engine, Error, Plan, Rng,
    config::Mixer,
    engine::{LinearState, Listener, Rows, Snapshot, Step, Traffic, Want},
    plan::{self, Activations, Form, Grid, Site},
    tap::Part,
};
use ndarray::{Array2, Array3, Array4, ArrayView2, Axis, Slice};

use super::{
    Kept, LayerState, MixerWeights, Model,
    pieces::{Piece, join, pieces},
    weights::{Format, channels},
};
use crate::cpu::{
    attention::{fast::Cached, kept::KeyValues},
    gated_delta_rule::fast::CHUNK,
    linear::fast::{Source, linear},
    rms_norm::fast::{add_rms_norm, rms_norm, rms_norm_row},
    room::room,
    seen::Seen,
    simd::Simd,
    weight::Weight,
};

impl<S: Simd> Engine for Model<S> {
    fn name(&self) -> String {
        let mut name = format!("cpu/{}", S::NAME);
        if self.format != Format::F32 {
            name.extend(["-", self.format.name()]);
        }
        if self.kept != self.format.kept() {
            name.extend(["-kv-", self.kept.name()]);
        }
        name
    }

    fn config(&self) -> &Config {
        &self.config
    }

    fn plan(&self) -> Plan {
        let activations = self.format.activations();
        let plan = Plan::F32.form(Form::Chunked(CHUNK));
        // Products of bf16 pairs may flush.
        let flush_to_zero = self.kept != Kept::F32 || activations != Activations::F32;
        let plan = Plan { activations, flush_to_zero, ..plan };
        let (plan, sites): (_, &[Site]) = match self.kept {
            Kept::F32 => (plan, &[]),
            Kept::Bf16 => (plan, &[Site::Queries, Site::Keys, Site::Values, Site::Probabilities]),
            Kept::Int8 => (Plan { cache: plan::Cache::Int8ByInt16, ..plan }, &[]),
        };
        sites.iter().fold(plan, |plan, &site| plan.round(site, Grid::Bf16))
    }

    fn claims(&self) -> Claims {
        Claims { deterministic: true, batch_invariant: true, cuts: None }
    }

    fn forces(&self) -> bool {
        true
    }

    fn reset(&mut self, sequences: usize) -> Result<(), Error> {
        self.sequences = (0..sequences).map(|_| self.empty_sequence()).collect();
        self.undo = None;
        Ok(())
    }

    fn lengths(&self) -> Vec<usize> {
        self.sequences.iter().map(|sequence| sequence.len).collect()
    }

    fn pretend(&mut self, tokens: usize, seed: u64) -> Result<(), Error> {
        let c = &self.config;
        let width = c.num_key_value_heads * c.head_dim;
        let mut rng = Rng::keyed("pretend", seed);
        let mut numbers =
            |n: usize| -> Vec<f32> { (0..n).map(|_| rng.uniform(-1.0, 1.0)).collect() };
        // A few rows in turn: what is timed does not depend on what they say.
        let rows: Vec<_> = (0..61).map(|_| (numbers(width), numbers(width))).collect();
        let fill = |cache: &mut KeyValues| {
            for i in 0..tokens {
                let (k, v) = &rows[i % rows.len()];
                cache.push(k, v);
            }
        };
        for sequence in &mut self.sequences {
            sequence.len += tokens;
            for layer in &mut sequence.layers {
                match layer {
                    LayerState::Full(cache) => fill(cache),
                    LayerState::Linear(state) => {
                        let conv = numbers(state.conv.len());
                        state.conv.copy_from_slice(&conv);
                        let recurrent = numbers(c.linear_value_dim() * c.linear_key_head_dim);
                        state.hold(recurrent.into_iter().map(|x| 0.1 * x));
                    }
                }
            }
        }
        self.undo = None;
        Ok(())
    }

    fn traffic(&self, depth: usize) -> Option<Traffic> {
        let c = &self.config;
        let (mut weights, mut elements) = (0, 0);
        let mut add = |weight: &Weight, times: usize| {
            weights += (weight.bytes() * times) as u64;
            elements += (weight.rows() * weight.columns() * times) as u64;
        };
        let (mut experts, mut states, mut attention) = (0, 0, 0);
        for layer in &self.layers {
            layer.mixer.each(&mut |weight| add(weight, 1));
            layer.mlp.each(c.num_experts_per_tok, &mut add);
            experts += layer.mlp.read(c.num_experts_per_tok) - layer.mlp.read(0);
            match layer.mixer {
                MixerWeights::Linear { .. } => {
                    let state = c.linear_value_dim() * c.linear_key_head_dim;
                    states += 8 * state as u64;
                }
                MixerWeights::Full { .. } => {
                    let token = self.kept.token(c.num_key_value_heads, c.head_dim);
                    states += (depth * token) as u64;
                    attention += (4 * depth * c.num_attention_heads * c.head_dim) as u64;
                }
            }
        }
        weights += self.lm_head.bytes() as u64;
        Some(Traffic { weights, experts, states, products: 2 * elements, attention })
    }

    fn forward(&mut self, tokens: &[Vec<u32>], want: &Want) -> Result<Step, Error> {
        self.pass(tokens, want)
    }

    fn snapshot(&mut self) -> Result<Snapshot, Error> {
        let id = self.next_snapshot;
        self.next_snapshot += 1;
        self.snapshots.insert(id, self.sequences.clone());
        Ok(Snapshot(id))
    }

    fn restore(&mut self, Snapshot(id): Snapshot) -> Result<(), Error> {
        self.sequences = self.snapshots.get(&id).ok_or("no such snapshot")?.clone();
        self.undo = None;
        Ok(())
    }

    fn release(&mut self, Snapshot(id): Snapshot) {
        self.snapshots.remove(&id);
    }

    /// A recurrent state cannot be cropped: the kept tokens are fed again from the state before.
    fn rollback(&mut self, keep: &[usize]) -> Result<(), Error> {
        let undo = self.undo.take().ok_or("the last step did not ask for rollback")?;
        let (tokens, want) = undo.keeping(keep)?;
        let after = std::mem::replace(&mut self.sequences, undo.before);
        for (sequence, after) in self.sequences.iter_mut().zip(after) {
            sequence.mtp = after.mtp;
        }
        self.pass(&tokens, &want).map(|_| ())
    }

    fn linear_states(&self) -> Result<Vec<Option<LinearState>>, Error> {
        let c = &self.config;
        let (kept, width) = (c.linear_conv_kernel_dim - 1, c.conv_dim() / c.linear_num_key_heads);
        let (hv, k, v) = (c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim);
        let channels = channels(c);
        let layer = |i: usize| {
            let mut conv = Array3::zeros((self.sequences.len(), c.conv_dim(), kept));
            let mut recurrent = Array4::zeros((self.sequences.len(), hv, k, v));
            for (n, sequence) in self.sequences.iter().enumerate() {
                let LayerState::Linear(state) = &sequence.layers[i] else { return None };
                for (head, channels) in channels.iter().enumerate() {
                    let of = &state.conv[head * kept * width..][..kept * width];
                    for (at, &channel) in channels.iter().enumerate() {
                        for j in 0..kept {
                            conv[[n, channel, j]] = of[j * width + at];
                        }
                    }
                }
                recurrent
                    .index_axis_mut(Axis(0), n)
                    .iter_mut()
                    .zip(state.recurrent(self.s))
                    .for_each(|(to, from)| *to = from);
            }
            (c.layer_types[i] == Mixer::Linear).then_some(LinearState { conv, recurrent })
        };
        Ok((0..self.layers.len()).map(layer).collect())
    }

    fn watch(&mut self, listener: Listener) {
        self.listener = Some(listener);
    }

    fn has_mtp(&self) -> bool {
        self.mtp.is_some()
    }

    fn mtp(&mut self, tokens: &[Vec<u32>], hidden: &Array2<f32>) -> Result<Step, Error> {
        self.draft(tokens, hidden, Rows::All)
    }

    fn mtp_feed(&mut self, tokens: &[Vec<u32>], hidden: &Array2<f32>) -> Result<(), Error> {
        self.draft(tokens, hidden, Rows::None).map(drop)
    }

    fn mtp_lengths(&self) -> Vec<usize> {
        self.sequences.iter().map(|sequence| sequence.mtp.len()).collect()
    }

    fn mtp_truncate(&mut self, keep: &[usize]) -> Result<(), Error> {
        if keep.len() != self.sequences.len() {
            let (given, kept) = (keep.len(), self.sequences.len());
            return Err(format!("{given} lengths for {kept} sequences").into());
        }
        for (sequence, &keep) in self.sequences.iter_mut().zip(keep) {
            let len = sequence.mtp.len();
            if len < keep {
                return Err(format!("the MTP cache holds {len} entries, not {keep}").into());
            }
            sequence.mtp.truncate(keep);
        }
        Ok(())
    }
}

impl<S: Simd> Model<S> {
    /// The MTP head over all tokens; logits and hidden states of some.
    fn draft(
        &mut self,
        tokens: &[Vec<u32>],
        hidden: &Array2<f32>,
        rows: Rows,
    ) -> Result<Step, Error> {
        self.check(tokens)?;
        let n = tokens.iter().map(Vec::len).sum::<usize>();
        let d = self.config.hidden_size;
        if hidden.dim() != (n, d) {
            return Err(format!("hidden is {:?}, expected [{n}, {d}]", hidden.dim()).into());
        }
        let mut step = None;
        for piece in pieces(tokens, self.piece) {
            let hidden = hidden.slice_axis(Axis(0), Slice::from(piece.rows.clone()));
            join(&mut step, self.draft_piece(&piece, &hidden, rows)?)?;
        }
        Ok(step.unwrap_or_default())
    }

    fn draft_piece(
        &mut self,
        piece: &Piece,
        hidden: &ArrayView2<'_, f32>,
        answer: Rows,
    ) -> Result<Step, Error> {
        let tokens = &piece.tokens[..];
        let mtp = self.mtp.as_ref().ok_or("the checkpoint has no multi-token-prediction head")?;
        let (s, d) = (self.s, self.config.hidden_size);
        let eps = self.config.rms_norm_eps as f32;
        let n = piece.rows.len();
        let lengths = self.sequences.iter().map(|sequence| sequence.mtp.len());
        let place = self.place(tokens, lengths);
        let mut both = room(n * 2 * d);
        let embedded = self.embed(tokens);
        let rows = embedded.chunks_exact(d).zip(hidden.rows());
        for (both, (embedded, hidden)) in both.chunks_exact_mut(2 * d).zip(rows) {
            let (e, h) = both.split_at_mut(d);
            e.copy_from_slice(embedded);
            h.iter_mut().zip(hidden).for_each(|(to, from)| *to = *from);
            s.run(
                #[inline(always)]
                || rms_norm_row(s, e, &mtp.norm_embedding, eps),
            );
            s.run(
                #[inline(always)]
                || rms_norm_row(s, h, &mtp.norm_hidden, eps),
            );
        }
        let mut x = room(n * d);
        linear(s, &mut x, &both, &mtp.fc);
        let mut normed = room(n * d);
        rms_norm(s, &mut normed, &x, &mtp.layer.input_norm, eps);
        let mut caches: Vec<_> =
            self.sequences.iter().map(|sequence| sequence.mtp.clone()).collect();
        let mut borrowed: Vec<_> = caches.iter_mut().collect();
        let mut seen = Seen { part: Part::Mtp, told: None, forced: None };
        let mixed =
            self.full_attention(&normed, &mtp.layer.mixer, &place, &mut borrowed, &mut seen)?;
        add_rms_norm(s, &mut normed, &mut x, &mixed, &mtp.layer.post_norm, eps);
        let (out, _) = self.mlp(&normed, &mtp.layer.mlp, None, &mut seen)?;
        add_rms_norm(s, &mut normed, &mut x, &out, &mtp.norm, eps);
        for (sequence, cache) in self.sequences.iter_mut().zip(caches) {
            sequence.mtp = cache;
        }
        if answer == Rows::None {
            return Ok(Step::default());
        }
        let logits = self.logits(&normed)?;
        let hidden = Array2::from_shape_vec((n, d), normed.to_vec())?;
        Ok(Step { logits, hidden: vec![hidden], ..Step::default() })
    }
}

#[cfg(test)]
mod tests;
