//! The model as an engine.

use golden::{
    Claims, Config, Engine, Error, Plan, Rng,
    engine::{LinearState, Listener, Rows, Snapshot, Step, Traffic, Want},
    fp8,
    plan::{Form, Grid, Site},
};
use ndarray::{Array2, Array3, Array4, Axis, Slice};

use super::{
    Context, Format, LayerState, Model, fast, memory, on, piece,
    seen::{numbers, stored},
    weights::Layer,
};
use crate::{
    cpu::model::pieces::{join, pieces},
    cuda::{
        engine::{Element, Fast, Ops, Stored},
        launch::Stream,
    },
};

impl Engine for Model {
    fn name(&self) -> String {
        let name = match self.format {
            Format::F32 => "cuda",
            Format::Bf16 => "cuda-bf16",
        };
        if self.kept == Stored::Fp8 { format!("{name}-kv-fp8") } else { name.to_owned() }
    }

    fn config(&self) -> &Config {
        &self.config
    }

    fn plan(&self) -> Plan {
        let plan = plan(self.format, self.fast.is_some());
        if self.kept == Stored::Fp8 {
            return plan.round(Site::Keys, Grid::Fp8).round(Site::Values, Grid::Fp8);
        }
        plan
    }

    fn falls_back(&self) -> Option<String> {
        if let Err(why) = fast(&self.share, self.format) {
            return Some(why);
        }
        let [queries, keys] = [self.config.num_attention_heads, self.config.num_key_value_heads];
        if queries != 8 * keys {
            let of = "attention for Hopper is of 8 heads to a head of keys";
            return Some(format!(
                "{of}, each of {} GPUs has {queries} to {keys}",
                self.share.ranks
            ));
        }
        let odd: Vec<_> = self.layers.iter().flat_map(Layer::projections).collect();
        let all = odd.len();
        let odd = odd.into_iter().filter(|matrix| !Fast::reads(matrix)).count();
        let of = "those for Hopper are of weights in bf16, or in FP8 in blocks of 128 by 128";
        (0 < odd).then(|| format!("{of}; {odd} of {all} kinds of projections are not"))
    }

    fn claims(&self) -> Claims {
        let plain = self.fast.is_none();
        Claims { deterministic: true, batch_invariant: plain, cuts: plain.then_some(1) }
    }

    fn forces(&self) -> bool {
        true
    }

    fn reset(&mut self, sequences: usize) -> Result<(), Error> {
        self.undo = None;
        let sizes = self.sizes();
        self.on(|model, _| {
            let needs = (sequences * model.layers.len() * (sizes.conv + sizes.recurrent)) as u64;
            let (device, has) = (model.device.clone(), (sequences, model.mtp.is_some()));
            let reset = model.states.reset(&device, (&model.config, sizes), has);
            reset.map_err(|e| memory::unfit(&device, ("states", Some(needs)), e.into()))
        })
    }

    fn lengths(&self) -> Vec<usize> {
        self.states.lengths.clone()
    }

    fn pretend(&mut self, tokens: usize, seed: u64) -> Result<(), Error> {
        /// Keys and values are these rows in turn: what is timed does not depend on what they say.
        const TURN: usize = 61;
        self.undo = None;
        self.on(|model, context| {
            let c = &model.config;
            let (width, element) = (c.num_key_value_heads * c.head_dim, model.format.element());
            let (device, row, kept) = (model.device.clone(), model.sizes().row, model.kept);
            let most = model.states.lengths.iter().max().map_or(0, |most| most + tokens);
            let full = c.layer_types.len() * model.states.sequences();
            let grown = model.states.grow(&device, row, most);
            grown.map_err(|e| {
                let needs = Some((full * most * row / 2) as u64);
                memory::unfit(&device, ("keys and values", needs), e.into())
            })?;
            let mut rng = Rng::keyed("pretend", seed);
            let mut drawn = |n: usize, of: f32| -> Vec<f32> {
                (0..n).map(|_| of * rng.uniform(-1.0, 1.0)).collect()
            };
            let mut rows = [device.room(TURN * row)?, device.room(TURN * row)?];
            for rows in &mut rows {
                let drawn = drawn(TURN * width, 1.0);
                let codes = || drawn.iter().map(|&x| fp8::from_f32(x)).collect();
                let own = if kept == Stored::Fp8 {
                    codes()
                } else {
                    stored(&drawn, element).into_owned()
                };
                device.put_at(&own, rows, 0)?;
            }
            let stream = &mut Stream { context, kernels: &mut model.kernels };
            let mut ops = Ops { stream, element, fast: None };
            for layer in &mut model.states.layers {
                match layer {
                    LayerState::Full(cache) => {
                        for (s, &length) in model.states.lengths.iter().enumerate() {
                            let first = s * cache.capacity + length;
                            let sizes = (tokens, TURN, row);
                            ops.repeat((&cache.k, first), &rows[0], sizes)?;
                            ops.repeat((&cache.v, first), &rows[1], sizes)?;
                        }
                    }
                    LayerState::Linear(state) => {
                        let n = state.conv.len() / element.size();
                        device.put_at(&stored(&drawn(n, 1.0), element), &mut state.conv, 0)?;
                        let n = state.recurrent.len() / 4;
                        device.put_at(
                            &stored(&drawn(n, 0.1), Element::F32),
                            &mut state.recurrent,
                            0,
                        )?;
                    }
                }
            }
            model.states.lengths.iter_mut().for_each(|length| *length += tokens);
            Ok(device.wait()?)
        })
    }

    fn traffic(&self, depth: usize) -> Option<Traffic> {
        let c = &self.config;
        let (mut weights, mut elements, mut states, mut attention) = (0, 0, 0, 0);
        let mut experts = 0;
        for (layer, mixer) in self.layers.iter().zip(&c.layer_types) {
            let [bytes, own] = layer.read(c.num_experts_per_tok);
            weights += bytes;
            elements += own;
            experts += bytes - layer.read(0)[0];
            match mixer {
                golden::config::Mixer::Linear => {
                    states += 8 * (c.linear_value_dim() * c.linear_key_head_dim) as u64;
                }
                golden::config::Mixer::Full => {
                    states += (2 * depth * self.sizes().row) as u64;
                    attention += (4 * depth * c.num_attention_heads * c.head_dim) as u64;
                }
            }
        }
        weights += self.lm_head.as_ref().unwrap_or(&self.embedding).bytes() as u64;
        Some(Traffic { weights, experts, states, products: 2 * elements, attention })
    }

    fn forward(&mut self, tokens: &[Vec<u32>], want: &Want) -> Result<Step, Error> {
        self.pass(|model, context| {
            let device = model.device.clone();
            let step = model.step(context, tokens, want);
            step.map_err(|e| memory::unfit(&device, ("the tokens of this step", None), e))
        })
    }

    fn chooses(&self) -> bool {
        true
    }

    fn snapshot(&mut self) -> Result<Snapshot, Error> {
        let id = self.next_snapshot;
        self.next_snapshot += 1;
        let sizes = self.sizes();
        let saved = self.on(|model, _| {
            let device = model.device.clone();
            let saved = model.states.save(&device, sizes);
            saved.map_err(|e| memory::unfit(&device, ("a copy of states", None), e.into()))
        })?;
        self.snapshots.insert(id, saved);
        Ok(Snapshot(id))
    }

    fn restore(&mut self, Snapshot(id): Snapshot) -> Result<(), Error> {
        let saved = self.snapshots.remove(&id).ok_or("no such snapshot")?;
        self.undo = None;
        let sizes = self.sizes();
        let loaded = self.on(|model, _| {
            let device = model.device.clone();
            Ok(model.states.load(&device, &saved, (&model.config, sizes))?)
        });
        self.snapshots.insert(id, saved);
        loaded
    }

    fn release(&mut self, Snapshot(id): Snapshot) {
        self.snapshots.remove(&id);
    }

    /// A recurrent state cannot be cropped: the kept tokens are fed again from the state before.
    fn rollback(&mut self, keep: &[usize]) -> Result<(), Error> {
        let (undo, saved) = self.undo.take().ok_or("the last step did not ask for rollback")?;
        let (tokens, want) = undo.keeping(keep)?;
        self.on(|model, context| {
            let device = model.device.clone();
            model.states.load_linear(&device, &saved)?;
            model.step(context, &tokens, &want).map(drop)
        })
    }

    fn linear_states(&self) -> Result<Vec<Option<LinearState>>, Error> {
        let c = &self.config;
        let (s, element) = (self.states.sequences(), self.format.element());
        let kept = c.linear_conv_kernel_dim - 1;
        let (hv, k, v) = (c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim);
        on(|_| {
            let layer = |layer: &LayerState| {
                let LayerState::Linear(state) = layer else { return Ok(None) };
                let conv = numbers(&self.device, &state.conv, element, s * c.conv_dim() * kept)?;
                let recurrent =
                    numbers(&self.device, &state.recurrent, Element::F32, s * hv * k * v)?;
                Ok(Some(LinearState {
                    conv: Array3::from_shape_vec((s, c.conv_dim(), kept), conv)?,
                    recurrent: Array4::from_shape_vec((s, hv, k, v), recurrent)?,
                }))
            };
            if self.states.layers.is_empty() {
                return Ok(self.layers.iter().map(|_| None).collect());
            }
            self.states.layers.iter().map(layer).collect()
        })
    }

    fn watch(&mut self, listener: Listener) {
        self.listener = Some(listener);
    }

    fn has_mtp(&self) -> bool {
        self.mtp.is_some()
    }

    fn mtp(&mut self, tokens: &[Vec<u32>], hidden: &Array2<f32>) -> Result<Step, Error> {
        self.drafts(tokens, hidden, Rows::All)
    }

    fn mtp_feed(&mut self, tokens: &[Vec<u32>], hidden: &Array2<f32>) -> Result<(), Error> {
        self.drafts(tokens, hidden, Rows::None).map(drop)
    }

    fn mtp_lengths(&self) -> Vec<usize> {
        self.states.drafts.clone()
    }

    fn mtp_truncate(&mut self, keep: &[usize]) -> Result<(), Error> {
        let drafts = &mut self.states.drafts;
        if keep.len() != drafts.len() {
            let (given, kept) = (keep.len(), drafts.len());
            return Err(format!("{given} lengths for {kept} sequences").into());
        }
        for (len, &keep) in drafts.iter().zip(keep) {
            if *len < keep {
                return Err(format!("the MTP cache holds {len} entries, not {keep}").into());
            }
        }
        drafts.copy_from_slice(keep);
        Ok(())
    }
}

/// How a format rounds, on plain kernels or on those for Hopper.
///
/// Of several GPUs that is the same, but for one thing that no plan says: kernels for Hopper answer in bf16, so that
/// each GPU's part of what is added to the stream is rounded, and their sum is not. Plain kernels answer in f32, and
/// the sum is rounded as one GPU's is.
fn plan(format: Format, fast: bool) -> Plan {
    match format {
        Format::F32 => Plan::F32,
        Format::Bf16 => {
            let sites = [
                Site::Linear,
                Site::Norm,
                Site::ConvOut,
                Site::Beta,
                Site::MixerOut,
                Site::GateOut,
                Site::Rope,
                Site::ExpertHidden,
            ];
            let plan = sites.iter().fold(Plan::F32, |plan, &site| plan.round(site, Grid::Bf16));
            if !fast {
                return plan;
            }
            // Of many tokens chunks are multiplied in bf16, and what experts come to is stored.
            let sites = [
                Site::Probabilities,
                Site::WyInverse,
                Site::WyValues,
                Site::WyScores,
                Site::ExpertOut,
                Site::MoeOut,
            ];
            let plan = Plan { form: Form::Prefixed(64), dot: Grid::Bf16, ..plan }.truncated(16);
            sites.iter().fold(plan, |plan, &site| plan.round(site, Grid::Bf16))
        }
    }
}

impl Model {
    /// A pass over tokens. Where it fails, what is zero between launches may not be, as some of them were not made: the
    /// next one gets new room. Why it failed is told, and nothing that follows from it.
    fn pass(
        &mut self,
        work: impl FnOnce(&mut Model, &mut Context) -> Result<Step, Error>,
    ) -> Result<Step, Error> {
        self.on(|model, context| {
            let step = work(model, context);
            if step.is_err() {
                let _ = model.scratch.leave(&model.device);
            }
            step
        })
    }

    /// The MTP head over all tokens; logits and hidden states of some.
    fn drafts(
        &mut self,
        tokens: &[Vec<u32>],
        hidden: &Array2<f32>,
        rows: Rows,
    ) -> Result<Step, Error> {
        golden::engine::check_tokens(tokens, self.states.sequences(), self.config.vocab_size)?;
        let n = tokens.iter().map(Vec::len).sum::<usize>();
        let d = self.config.hidden_size;
        if hidden.dim() != (n, d) {
            return Err(format!("hidden is {:?}, expected [{n}, {d}]", hidden.dim()).into());
        }
        self.pass(|model, context| {
            let mut step = None;
            for piece in pieces(tokens, piece(model.fast)) {
                let own = hidden.slice_axis(Axis(0), Slice::from(piece.rows.clone()));
                let own: Vec<f32> = own.iter().copied().collect();
                join(&mut step, model.draft(context, &piece, &own, rows)?)?;
            }
            Ok(step.unwrap_or_default())
        })
    }
}

#[cfg(test)]
mod tests {
    use golden::synthetic::Synthetic;

    use super::super::{Unfit, engine};
    use crate::{Kept, cuda::gpu};

    #[test]
    fn without_a_gpu_one_line_says_so() {
        let weights: Synthetic = "synthetic:tiny".parse().unwrap();
        assert!(
            engine(&weights, "int8", None, 1, &mut |_, _| true).is_err_and(|e| !e.is::<Unfit>())
        );
        let kept = |kept| engine(&weights, "bf16", Some(kept), 1, &mut |_, _| true);
        let refused = kept(Kept::Int8).err().unwrap();
        assert!(!refused.is::<Unfit>() && refused.to_string().contains("bf16, fp8"), "{refused}");
        assert!(kept(Kept::Fp8).is_ok() || gpu().is_err());
        let made = engine(&weights, "f32", None, 1, &mut |_, _| true);
        match gpu() {
            Ok(_) => assert!(made.is_ok()),
            Err(why) => {
                let error = made.err().unwrap();
                assert!(error.is::<Unfit>());
                assert_eq!(error.to_string(), *why);
                assert!(!why.contains('\n'));
            }
        }
    }
}
