//! The whole model, flat: embedding, decoder layers, final norm, `lm_head`; and the MTP head.
//!
//! A decoder layer is `h = x + Mixer(norm(x))`, `y = h + Mlp(norm(h))` with the mixer of its type
//! (`linear_attention` or `full_attention`) and a sparse or dense MLP. Source:
//! `Qwen3NextModel.forward` and `Qwen3NextDecoderLayer.forward` in transformers 5.23.0,
//! `modeling_qwen3_next.py`; the MTP head (which transformers leaves out) is described at
//! [`Model::mtp`].
//!
//! Sequences are ragged and packed: all their new tokens lie one after another in `N` rows.
//! Weights are fetched by checkpoint name when a layer needs them and dropped after it, so that
//! memory holds one layer (of experts: one expert) at a time.

use std::{collections::HashMap, sync::Arc};

use golden::{
    Claims, Config, Dtype, Engine, Error, Tensor1, Tensor2, Tensor3, Tensor4, Weights,
    config::{Mixer, Mlp},
    engine::{
        INTERRUPTED, LinearState, Listener, NOT_FINITE, Routing, Rows, Snapshot, Step, Undo, Want,
        check_tokens,
    },
    ops,
    tap::{Part, RESIDUAL, Tap},
};
use ndarray::{
    ArcArray, Array, Array2, Array3, ArrayView, ArrayView1, Axis, Dimension, concatenate, s,
};

use crate::{
    Plant, Real,
    attention_layer::attention_layer_seen,
    gdn_layer::gdn_layer_seen,
    lm_head,
    load::Load,
    moe_experts::{Expert, moe_experts_from},
    moe_layer::see_routed,
    moe_router, mtp,
    probe::Probe,
    rms_norm,
    shared_expert::{shared_expert, swiglu},
};

/// The model with the states of its sequences.
pub struct Model<R> {
    weights: Arc<dyn Weights>,
    config: Config,
    inv_freq: Tensor1<f32>,
    sequences: Vec<Sequence<R>>,
    snapshots: HashMap<u64, Vec<Sequence<R>>>,
    next_snapshot: u64,
    undo: Option<Undo<Sequence<R>>>,
    plant: Option<Plant>,
    listener: Option<Listener>,
}

/// What one sequence leaves behind for its next token.
#[derive(Clone)]
struct Sequence<R> {
    len: usize,
    layers: Vec<State<R>>,
    mtp: Cache<R>,
}

/// What one layer leaves behind.
#[derive(Clone)]
enum State<R> {
    /// The convolution's last `W - 1` inputs, `[C, W - 1]`, and the recurrent state, `[HV, K, V]`.
    Linear { conv: Tensor2<R>, recurrent: Tensor3<R> },
    /// Keys and values of every token.
    Full(Cache<R>),
}

/// Keys (normed and rotated) and values of every token, `[T, HKV, H]` each.
#[derive(Clone)]
struct Cache<R> {
    k: Tensor3<R>,
    v: Tensor3<R>,
}

/// What one step computed, before it is narrowed for the seam.
struct Pass<R> {
    logits: Tensor2<R>,
    hidden: Vec<Tensor2<R>>,
    routing: Vec<Option<Routed<R>>>,
    taps: Vec<Tap>,
}

/// How a sparse layer routed.
struct Routed<R> {
    ids: Tensor2<i64>,
    weights: Tensor2<R>,
    margins: Tensor1<R>,
}

impl<R: Real> Model<R> {
    /// A model that holds no sequence yet.
    pub fn new(weights: Arc<dyn Weights>) -> Self {
        let config = weights.config().clone();
        let inv_freq = Tensor1::from(config.rope.inv_freq());
        Model {
            weights,
            config,
            inv_freq,
            sequences: Vec::new(),
            snapshots: HashMap::new(),
            next_snapshot: 0,
            undo: None,
            plant: None,
            listener: None,
        }
    }

    /// The same model with a fault in its wiring.
    pub fn with_plant(self, plant: Option<Plant>) -> Self {
        Model { plant, ..self }
    }

    /// The same model with its rotary frequencies as this type holds them.
    pub fn with_frequencies_in(self, dtype: Dtype) -> Self {
        let exact = self.config.rope.inv_freq();
        let inv_freq = exact.into_iter().map(|f| dtype.round(f)).collect();
        Model { inv_freq, ..self }
    }

    fn empty_cache(&self) -> Cache<R> {
        let shape = (0, self.config.num_key_value_heads, self.config.head_dim);
        Cache { k: Tensor3::from_elem(shape, R::zero()), v: Tensor3::from_elem(shape, R::zero()) }
    }

    fn empty_sequence(&self) -> Sequence<R> {
        let c = &self.config;
        let (hv, k, v) = (c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim);
        let state = |mixer: &Mixer| match mixer {
            Mixer::Linear => State::Linear {
                conv: Tensor2::from_elem((c.conv_dim(), c.linear_conv_kernel_dim - 1), R::zero()),
                recurrent: Tensor3::from_elem((hv, k, v), R::zero()),
            },
            Mixer::Full => State::Full(self.empty_cache()),
        };
        Sequence {
            len: 0,
            layers: c.layer_types.iter().map(state).collect(),
            mtp: self.empty_cache(),
        }
    }

    /// `N` embedding rows, fetched one by one: the table itself is never loaded.
    fn embed(&self, tokens: &[Vec<u32>]) -> Result<Tensor2<R>, Error> {
        let ids: Vec<usize> = tokens.iter().flatten().map(|&id| id as usize).collect();
        let mut x = Array2::from_elem((ids.len(), self.config.hidden_size), R::zero());
        for (mut row, id) in x.rows_mut().into_iter().zip(ids) {
            let table = self.weights.matrix_rows(golden::names::EMBED_TOKENS, id..id + 1)?;
            row.zip_mut_with(&table.row(0), |x, &w| *x = R::cast(w));
        }
        Ok(x.into_shared())
    }

    /// The norm called `name`, after adding `residual` if there is one.
    fn norm(
        &self,
        name: &str,
        x: &Tensor2<R>,
        residual: Option<&Tensor2<R>>,
    ) -> Result<ops::rms_norm::Outputs<R>, Error> {
        let weight = self.weights.vector(name)?;
        let eps = self.config.rms_norm_eps;
        let mut inputs =
            ops::rms_norm::Inputs { x: x.clone(), residual: residual.cloned(), weight, eps };
        if let Some(plant) = self.plant.filter(|_| name == golden::names::FINAL_NORM) {
            plant.norm(&mut inputs);
        }
        Ok(rms_norm(&inputs))
    }

    /// `linear_attn` of layer `layer`, over the new rows of every sequence.
    fn linear_attention(
        &mut self,
        layer: usize,
        x: &Tensor2<R>,
        cu: &Tensor1<i64>,
        probe: &mut Probe<'_>,
    ) -> Result<Tensor2<R>, Error> {
        let c = &self.config;
        let name = |tensor: &str| format!("model.layers.{layer}.linear_attn.{tensor}");
        let (mut convs, mut states) = (Vec::new(), Vec::new());
        for sequence in &self.sequences {
            let State::Linear { conv, recurrent } = &sequence.layers[layer] else {
                unreachable!("a linear layer")
            };
            convs.push(conv.view());
            states.push(recurrent.view());
        }
        let conv1d = self.weights.matrix(&name("conv1d.weight"))?;
        let mut inputs = ops::gdn_layer::Inputs {
            x: x.clone(),
            in_proj_qkvz: self.weights.matrix(&name("in_proj_qkvz.weight"))?,
            in_proj_ba: self.weights.matrix(&name("in_proj_ba.weight"))?,
            conv1d,
            a_log: self.weights.vector(&name("A_log"))?,
            dt_bias: self.weights.vector(&name("dt_bias"))?,
            norm: self.weights.vector(&name("norm.weight"))?,
            out_proj: self.weights.matrix(&name("out_proj.weight"))?,
            conv_state: stack(&convs)?,
            state: stack(&states)?,
            cu_seqlens: cu.clone(),
            eps: c.rms_norm_eps,
            hk: c.linear_num_key_heads,
            hv: c.linear_num_value_heads,
        };
        if let Some(plant) = self.plant {
            plant.gdn(&mut inputs);
        }
        let out = gdn_layer_seen(&inputs, probe);
        for (i, sequence) in self.sequences.iter_mut().enumerate() {
            sequence.layers[layer] = State::Linear {
                conv: out.conv_state.slice(s![i, .., ..]).to_owned().into_shared(),
                recurrent: out.state.slice(s![i, .., .., ..]).to_owned().into_shared(),
            };
        }
        Ok(out.o)
    }

    /// `self_attn` under `prefix`, over the new rows of every sequence, appending to `caches`.
    fn full_attention(
        &self,
        prefix: &str,
        x: &Tensor2<R>,
        cu: &Tensor1<i64>,
        caches: &mut [Cache<R>],
        probe: &mut Probe<'_>,
    ) -> Result<Tensor2<R>, Error> {
        let c = &self.config;
        let name = |tensor: &str| format!("{prefix}.self_attn.{tensor}.weight");
        let lengths = caches.iter().map(|cache| cache.k.dim().0);
        let keys: Vec<_> = caches.iter().map(|cache| cache.k.view()).collect();
        let values: Vec<_> = caches.iter().map(|cache| cache.v.view()).collect();
        let mut inputs = ops::attention_layer::Inputs {
            x: x.clone(),
            q_proj: self.weights.matrix(&name("q_proj"))?,
            k_proj: self.weights.matrix(&name("k_proj"))?,
            v_proj: self.weights.matrix(&name("v_proj"))?,
            o_proj: self.weights.matrix(&name("o_proj"))?,
            q_norm: self.weights.vector(&name("q_norm"))?,
            k_norm: self.weights.vector(&name("k_norm"))?,
            cu_seqlens_cache: offsets(lengths),
            k_cache: concatenate(Axis(0), &keys)?.into_shared(),
            v_cache: concatenate(Axis(0), &values)?.into_shared(),
            cu_seqlens: cu.clone(),
            inv_freq: self.inv_freq.clone(),
            attention_factor: c.rope.yarn.map_or(1.0, |yarn| yarn.attention_factor),
            eps: c.rms_norm_eps,
            hq: c.num_attention_heads,
            hkv: c.num_key_value_heads,
        };
        if let Some(plant) = self.plant {
            plant.attention(&mut inputs);
        }
        let out = attention_layer_seen(&inputs, probe);
        for (i, cache) in caches.iter_mut().enumerate() {
            let new = s![cu[i] as usize..cu[i + 1] as usize, .., ..];
            cache.k = concatenate(Axis(0), &[cache.k.view(), out.k.slice(new)])?.into_shared();
            cache.v = concatenate(Axis(0), &[cache.v.view(), out.v.slice(new)])?.into_shared();
        }
        Ok(out.o)
    }

    /// The sparse MLP under `prefix`: routed experts, fetched as they are used, plus the shared one.
    fn sparse_mlp(
        &self,
        prefix: &str,
        x: &Tensor2<R>,
        forced: Option<&Array2<i64>>,
        probe: &mut Probe<'_>,
    ) -> Result<(Tensor2<R>, Routed<R>), Error> {
        let c = &self.config;
        let name = |tensor: &str| format!("{prefix}.mlp.{tensor}.weight");
        let norm_topk_prob = match self.plant {
            Some(plant) => plant.norm_topk_prob(c.norm_topk_prob),
            None => c.norm_topk_prob,
        };
        let router = ops::moe_router::Inputs {
            x: x.clone(),
            weight: self.weights.matrix(&name("gate"))?,
            top_k: c.num_experts_per_tok,
            norm_topk_prob,
        };
        let mut routed = match forced {
            None => moe_router(&router),
            Some(ids) => crate::moe_router::moe_router_forced(&router, ids),
        };
        see_routed(&mut routed, probe);
        let expert = |e: usize| -> Result<Expert, Error> {
            let name = |tensor: &str| format!("{prefix}.mlp.experts.{e}.{tensor}.weight");
            let mut expert = Expert {
                gate_proj: self.weights.matrix(&name("gate_proj"))?,
                up_proj: self.weights.matrix(&name("up_proj"))?,
                down_proj: self.weights.matrix(&name("down_proj"))?,
            };
            if let Some(plant) = self.plant {
                plant.expert(&mut expert);
            }
            Ok(expert)
        };
        let mut o = moe_experts_from(x, &routed.ids, &routed.weights, expert)?;
        probe.see("moe_experts", "o", &mut o);
        let mut shared = ops::shared_expert::Inputs {
            x: x.clone(),
            gate_proj: self.weights.matrix(&name("shared_expert.gate_proj"))?,
            up_proj: self.weights.matrix(&name("shared_expert.up_proj"))?,
            down_proj: self.weights.matrix(&name("shared_expert.down_proj"))?,
            gate: self.weights.matrix(&name("shared_expert_gate"))?,
        };
        if let Some(plant) = self.plant {
            plant.shared_expert(&mut shared);
        }
        let mut shared = shared_expert(&shared).o;
        probe.see("shared_expert", "o", &mut shared);
        o.zip_mut_with(&shared, |o, &shared| {
            *o = (*o + shared).at(crate::real::Site::MoeOut);
        });
        probe.see("moe_layer", "o", &mut o);
        Ok((o, Routed { ids: routed.ids, weights: routed.weights, margins: routed.margins }))
    }

    /// The dense MLP under `prefix`.
    fn dense_mlp(&self, prefix: &str, x: &Tensor2<R>) -> Result<Tensor2<R>, Error> {
        let name = |tensor: &str| format!("{prefix}.mlp.{tensor}.weight");
        let gate_proj = self.weights.matrix(&name("gate_proj"))?;
        let up_proj = self.weights.matrix(&name("up_proj"))?;
        let down_proj = self.weights.matrix(&name("down_proj"))?;
        Ok(swiglu(x, &gate_proj, &up_proj, &down_proj))
    }

    /// Logits of the rows of `x`, a band of the vocabulary at a time.
    fn logits(&self, x: &Tensor2<R>) -> Result<Tensor2<R>, Error> {
        const BAND: usize = 8192;
        let c = &self.config;
        let name = if c.tie_word_embeddings {
            golden::names::EMBED_TOKENS
        } else {
            golden::names::LM_HEAD
        };
        let mut logits = Array2::from_elem((x.nrows(), c.vocab_size), R::zero());
        if x.nrows() == 0 {
            return Ok(logits.into_shared());
        }
        for start in (0..c.vocab_size).step_by(BAND) {
            let rows = start..(start + BAND).min(c.vocab_size);
            let weight = self.weights.matrix_rows(name, rows.clone())?;
            let band = lm_head(&ops::lm_head::Inputs { x: x.clone(), weight }).logits;
            logits.slice_mut(s![.., rows]).assign(&band);
        }
        Ok(logits.into_shared())
    }

    /// Embedding, decoder layers, final norm, logits: one step of every sequence.
    fn pass(&mut self, tokens: &[Vec<u32>], want: &Want) -> Result<Pass<R>, Error> {
        self.check(tokens)?;
        self.undo = Undo::of(&self.sequences, tokens, want);
        let cu = offsets(tokens.iter().map(Vec::len));
        let (mut hidden, mut routing) = (Vec::new(), Vec::new());
        let mut taps = Vec::new();
        let mut probe = Probe::new(want.taps.then_some(&mut taps), want.forced.as_deref());
        let mut x = self.embed(tokens)?;
        probe.part = Part::Embedding;
        probe.see("embedding", "o", &mut x);
        for layer in 0..self.config.num_hidden_layers() {
            if self.listener.as_mut().is_some_and(|go_on| !go_on(layer)) {
                return Err(INTERRUPTED.into());
            }
            if want.hidden {
                hidden.push(x.clone());
            }
            probe.part = Part::Layer(layer);
            let prefix = format!("model.layers.{layer}");
            let mut normed = self.norm(&format!("{prefix}.input_layernorm.weight"), &x, None)?.o;
            probe.see("rms_norm", "input_layernorm", &mut normed);
            let mixed = match self.config.layer_types[layer] {
                Mixer::Linear => self.linear_attention(layer, &normed, &cu, &mut probe)?,
                Mixer::Full => {
                    let mut caches = Vec::new();
                    for sequence in &self.sequences {
                        let State::Full(cache) = &sequence.layers[layer] else {
                            unreachable!("a full layer")
                        };
                        caches.push(cache.clone());
                    }
                    let mixed =
                        self.full_attention(&prefix, &normed, &cu, &mut caches, &mut probe)?;
                    for (sequence, cache) in self.sequences.iter_mut().zip(caches) {
                        sequence.layers[layer] = State::Full(cache);
                    }
                    mixed
                }
            };
            let mut post =
                self.norm(&format!("{prefix}.post_attention_layernorm.weight"), &mixed, Some(&x))?;
            let mut h = post.h.ok_or("a norm with a residual returns the sum")?;
            probe.see(RESIDUAL, "h", &mut h);
            probe.see("rms_norm", "post_attention_layernorm", &mut post.o);
            let forced =
                want.forced_routing.as_ref().and_then(|layers| layers.get(layer)?.as_ref());
            let (mlp, routed) = match self.config.mlp_types[layer] {
                Mlp::Sparse => {
                    let (o, routed) = self.sparse_mlp(&prefix, &post.o, forced, &mut probe)?;
                    (o, Some(routed))
                }
                Mlp::Dense => {
                    let mut o = self.dense_mlp(&prefix, &post.o)?;
                    probe.see("dense_mlp", "o", &mut o);
                    (o, None)
                }
            };
            x = add(&h, &mlp);
            probe.see(RESIDUAL, "o", &mut x);
            if want.routing {
                routing.push(routed);
            }
        }
        for (sequence, tokens) in self.sequences.iter_mut().zip(tokens) {
            sequence.len += tokens.len();
        }
        let mut last = self.norm(golden::names::FINAL_NORM, &x, None)?.o;
        probe.part = Part::Head;
        probe.see("rms_norm", "norm", &mut last);
        let ends: Vec<usize> = cu.iter().map(|&end| end as usize).collect();
        let rows = want.logits.of(&ends);
        let mut logits = self.logits(&last.select(Axis(0), &rows).into_shared())?;
        probe.see("lm_head", "logits", &mut logits);
        let mut fed = if self.plant == Some(Plant::PreNormMtpHidden) { x } else { last };
        probe.part = Part::Mtp;
        probe.see("mtp", "hidden", &mut fed);
        if want.last != Rows::All && !want.hidden {
            fed = fed.select(Axis(0), &want.last.of(&ends)).into_shared();
        }
        hidden.push(fed);
        Ok(Pass { logits, hidden, routing, taps })
    }

    fn check(&self, tokens: &[Vec<u32>]) -> Result<(), Error> {
        check_tokens(tokens, self.sequences.len(), self.config.vocab_size)
    }
}

/// The id of the largest logit, of equal ones the lowest.
fn choice(logits: &ArrayView1<'_, f32>) -> Result<u32, Error> {
    let mut best = (0, f32::NEG_INFINITY);
    for (id, &x) in logits.iter().enumerate() {
        if !x.is_finite() {
            return Err(NOT_FINITE.into());
        }
        if best.1 < x {
            best = (id as u32, x);
        }
    }
    Ok(best.0)
}

impl<R: Real> Engine for Model<R> {
    fn name(&self) -> String {
        format!("reference/{}", R::NAME)
    }

    fn config(&self) -> &Config {
        &self.config
    }

    /// Every op treats rows one by one, a sum has one order, and a token sees of its past what the
    /// states hold: how tokens are fed changes no bit.
    fn claims(&self) -> Claims {
        Claims { deterministic: true, batch_invariant: true, cuts: Some(1) }
    }

    fn forces(&self) -> bool {
        true
    }

    fn chooses(&self) -> bool {
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
        let greedy = want.greedy && want.logits == Rows::None;
        let asked = if greedy { Want { logits: Rows::Last, ..want.clone() } } else { want.clone() };
        let Pass { logits, hidden, routing, taps } = self.pass(tokens, &asked)?;
        let mut logits = narrow(&logits);
        let mut chosen = Vec::new();
        if greedy {
            chosen = logits.rows().into_iter().map(|row| choice(&row)).collect::<Result<_, _>>()?;
            logits = Array2::zeros((0, logits.ncols()));
        }
        let told = |r: Routed<R>| Routing {
            ids: r.ids.into_owned(),
            margins: narrow(&r.margins).into_raw_vec_and_offset().0,
        };
        Ok(Step {
            logits,
            greedy: chosen,
            hidden: hidden.iter().map(narrow).collect(),
            routing: routing.into_iter().map(|routed| routed.map(told)).collect(),
            taps,
        })
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
        self.forward(&tokens, &want).map(|_| ())
    }

    fn linear_states(&self) -> Result<Vec<Option<LinearState>>, Error> {
        let layer = |(layer, mixer): (usize, &Mixer)| {
            let (mut convs, mut states) = (Vec::new(), Vec::new());
            for sequence in &self.sequences {
                if let State::Linear { conv, recurrent } = &sequence.layers[layer] {
                    convs.push(conv.view());
                    states.push(recurrent.view());
                }
            }
            if *mixer == Mixer::Full || convs.is_empty() {
                return Ok(None);
            }
            let (conv, recurrent): (Tensor3<R>, Tensor4<R>) = (stack(&convs)?, stack(&states)?);
            Ok(Some(LinearState { conv: narrow(&conv), recurrent: narrow(&recurrent) }))
        };
        self.config.layer_types.iter().enumerate().map(layer).collect()
    }

    fn watch(&mut self, listener: Listener) {
        self.listener = Some(listener);
    }

    fn has_mtp(&self) -> bool {
        self.weights.meta(golden::names::MTP_FC).is_some()
    }

    /// `u = fc(concat[norm_e(embed(token)), norm_h(hidden)])`, one full-attention decoder layer with
    /// its own cache, `mtp.norm`, the main model's `lm_head`.
    ///
    /// `hidden` is the main model's output *after* its final norm (or, for drafts beyond the first,
    /// the head's own output after `mtp.norm`), the token is the one that follows it, and the
    /// logits predict the token after that. Positions are those of the head's cache; attention with
    /// rotary embedding sees only differences. Source: `qwen3_next_mtp.py` of vLLM and `SGLang`,
    /// which agree.
    fn mtp(&mut self, tokens: &[Vec<u32>], hidden: &Array2<f32>) -> Result<Step, Error> {
        self.check(tokens)?;
        let c = &self.config;
        let cu = offsets(tokens.iter().map(Vec::len));
        let rows = tokens.iter().map(Vec::len).sum::<usize>();
        if hidden.dim() != (rows, c.hidden_size) {
            return Err(format!(
                "hidden is {:?}, expected [{rows}, {}]",
                hidden.dim(),
                c.hidden_size
            )
            .into());
        }
        let mut inputs = ops::mtp::Inputs {
            embedding: self.embed(tokens)?,
            hidden: hidden.map(|&x| R::cast(x)).into_shared(),
            norm_embedding: self.weights.vector("mtp.pre_fc_norm_embedding.weight")?,
            norm_hidden: self.weights.vector("mtp.pre_fc_norm_hidden.weight")?,
            fc: self.weights.matrix(golden::names::MTP_FC)?,
            eps: c.rms_norm_eps,
        };
        if let Some(plant) = self.plant {
            plant.mtp(&mut inputs);
        }
        let x = mtp(&inputs).o;
        let prefix = "mtp.layers.0";
        let normed = self.norm(&format!("{prefix}.input_layernorm.weight"), &x, None)?.o;
        let mut caches: Vec<_> =
            self.sequences.iter().map(|sequence| sequence.mtp.clone()).collect();
        let mixed = self.full_attention(prefix, &normed, &cu, &mut caches, &mut Probe::off())?;
        for (sequence, cache) in self.sequences.iter_mut().zip(caches) {
            sequence.mtp = cache;
        }
        let post =
            self.norm(&format!("{prefix}.post_attention_layernorm.weight"), &mixed, Some(&x))?;
        let sparse = self.weights.meta(&format!("{prefix}.mlp.gate.weight")).is_some();
        let mlp = if sparse {
            self.sparse_mlp(prefix, &post.o, None, &mut Probe::off())?.0
        } else {
            self.dense_mlp(prefix, &post.o)?
        };
        let x = add(&post.h.ok_or("a norm with a residual returns the sum")?, &mlp);
        let last = self.norm("mtp.norm.weight", &x, None)?.o;
        Ok(Step {
            logits: narrow(&self.logits(&last)?),
            hidden: vec![narrow(&last)],
            ..Step::default()
        })
    }

    fn mtp_lengths(&self) -> Vec<usize> {
        self.sequences.iter().map(|sequence| sequence.mtp.k.dim().0).collect()
    }

    fn mtp_truncate(&mut self, keep: &[usize]) -> Result<(), Error> {
        if keep.len() != self.sequences.len() {
            return Err(
                format!("{} lengths for {} sequences", keep.len(), self.sequences.len()).into()
            );
        }
        for (sequence, &keep) in self.sequences.iter_mut().zip(keep) {
            let Cache { k, v } = &mut sequence.mtp;
            if k.dim().0 < keep {
                return Err(format!("the MTP cache holds {} entries, not {keep}", k.dim().0).into());
            }
            *k = k.slice(s![..keep, .., ..]).to_owned().into_shared();
            *v = v.slice(s![..keep, .., ..]).to_owned().into_shared();
        }
        Ok(())
    }
}

/// `[0, l_0, l_0 + l_1, …]`.
fn offsets(lengths: impl Iterator<Item = usize>) -> Tensor1<i64> {
    let mut cu = vec![0];
    let mut end = 0;
    for length in lengths {
        end += length as i64;
        cu.push(end);
    }
    Tensor1::from(cu)
}

/// States of all sequences along a new first axis.
fn stack<R: Real, D: Dimension>(
    states: &[ArrayView<'_, R, D>],
) -> Result<ndarray::ArcArray<R, D::Larger>, Error>
where
    D::Larger: Dimension,
{
    let states = ndarray::stack(Axis(0), states).map_err(|e| e.to_string())?;
    Ok(states.into_dimensionality().map_err(|e| e.to_string())?.into_shared())
}

fn add<R: Real>(a: &Tensor2<R>, b: &Tensor2<R>) -> Tensor2<R> {
    ndarray::Zip::from(a)
        .and(b)
        .map_collect(|&a, &b| (a + b).at(crate::real::Site::Residual))
        .into_shared()
}

fn narrow<R: Real, D: Dimension>(x: &ArcArray<R, D>) -> Array<f32, D> {
    x.map(|x| x.to_f64() as f32)
}

/// The op `model`: see [`golden::ops::model`].
///
/// # Panics
/// If the sizes are none of a tiny preset; [`golden::Op::check`] refuses those.
pub fn model_op<R: Real>(x: &ops::model::Inputs) -> ops::model::Outputs<R> {
    model_op_routed(x, None)
}

/// [`model_op`] with the experts given, `[L, B T, A]`.
///
/// # Panics
/// As [`model_op`].
pub fn model_op_forced<R: Real>(
    x: &ops::model::Inputs,
    ids: &Array3<i64>,
) -> ops::model::Outputs<R> {
    model_op_routed(x, Some(ids.outer_iter().map(|ids| Some(ids.to_owned())).collect()))
}

fn model_op_routed<R: Real>(
    x: &ops::model::Inputs,
    forced_routing: Option<Vec<Option<Array2<i64>>>>,
) -> ops::model::Outputs<R> {
    let config = golden::config::Preset::Tiny
        .config(Some(x.layers), Some(x.experts))
        .expect("checked sizes");
    let mut model = Model::<R>::new(Arc::new(golden::synthetic::Synthetic::new(config, x.seed)));
    let tokens: Vec<Vec<u32>> = x
        .input_ids
        .rows()
        .into_iter()
        .map(|row| row.iter().map(|&id| id as u32).collect())
        .collect();
    model.reset(tokens.len()).expect("the reference has room");
    let want = Want { hidden: true, routing: true, forced_routing, ..Want::default() };
    let Pass { logits, hidden, routing, .. } =
        model.pass(&tokens, &want).expect("synthetic weights are complete");
    let hidden: Vec<_> = hidden.iter().map(|x| x.view()).collect();
    let routed: Vec<_> = routing.iter().flatten().collect();
    let ids: Vec<_> = routed.iter().map(|r| r.ids.view()).collect();
    let weights: Vec<_> = routed.iter().map(|r| r.weights.view()).collect();
    let margins: Vec<_> = routed.iter().map(|r| r.margins.view()).collect();
    let shapes = "every layer of a tiny preset is sparse";
    ops::model::Outputs {
        logits,
        hidden: stack(&hidden).expect("equal shapes"),
        ids: ndarray::stack(Axis(0), &ids).expect(shapes).into_shared(),
        weights: ndarray::stack(Axis(0), &weights).expect(shapes).into_shared(),
        margins: ndarray::stack(Axis(0), &margins).expect(shapes).into_shared(),
    }
}
