//! The model as an engine.

use golden::{
    Claims, Config, Engine, Error, Plan,
    config::Mixer,
    engine::{LinearState, Listener, Snapshot, Step, Want},
    plan::Form,
    tap::Part,
};
use ndarray::{Array2, Array3, Array4, Axis};

use super::{LayerState, Model, weights::channels};
use crate::cpu::{
    gated_delta_rule::fast::CHUNK,
    linear::fast::linear,
    quantised::Bits,
    rms_norm::fast::{add_rms_norm, rms_norm, rms_norm_row},
    seen::Seen,
    simd::Simd,
};

impl<S: Simd> Engine for Model<S> {
    fn name(&self) -> String {
        let format = self.bits.map_or("", Bits::name);
        format!("cpu/{}{format}", S::NAME)
    }

    fn config(&self) -> &Config {
        &self.config
    }

    fn plan(&self) -> Plan {
        Plan::F32.form(Form::Chunked(CHUNK))
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
                    .zip(&state.recurrent)
                    .for_each(|(to, from)| *to = *from);
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
        self.check(tokens)?;
        let mtp = self.mtp.as_ref().ok_or("the checkpoint has no multi-token-prediction head")?;
        let (s, d) = (self.s, self.config.hidden_size);
        let eps = self.config.rms_norm_eps as f32;
        let n = tokens.iter().map(Vec::len).sum::<usize>();
        if hidden.dim() != (n, d) {
            return Err(format!("hidden is {:?}, expected [{n}, {d}]", hidden.dim()).into());
        }
        let lengths = self.sequences.iter().map(|sequence| sequence.mtp.len());
        let place = self.place(tokens, lengths);
        let mut both = vec![0.0; n * 2 * d];
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
        let mut x = vec![0.0; n * d];
        linear(s, &mut x, &both, &mtp.fc);
        let mut normed = vec![0.0; n * d];
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
        let logits = self.logits(&normed)?;
        let hidden = Array2::from_shape_vec((n, d), normed)?;
        Ok(Step { logits, hidden: vec![hidden], ..Step::default() })
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
