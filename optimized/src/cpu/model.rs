//! The whole model on the processor: the same wiring as the plain reference's, written once more on
//! fast kernels.
//!
//! Activations are f32, weights stay as the checkpoint has them (in its memory map, if it has one) and
//! are widened exactly as they are used. Sequences are ragged and packed: all their new tokens lie one
//! after another in `N` rows.

use std::collections::HashMap;

use golden::{
    Claims, Config, Engine, Error, Plan, Weights,
    config::{Mixer, Mlp},
    engine::{INTERRUPTED, LinearState, Listener, Routing, Rows, Snapshot, Step, Want},
    names,
    plan::Form,
    tap::{Part, RESIDUAL},
};
use ndarray::{Array2, Array3, Array4, Axis};

use super::{
    attention::fast::{Cache, Sizes, attention},
    gated_delta_rule::fast::CHUNK,
    gdn_layer::fast::{Gdn, State},
    linear::fast::{Source, linear},
    moe_experts::fast::{Expert, Groups, moe_experts},
    pool,
    rms_norm::fast::{add, add_rms_norm, rms_norm, rms_norm_row},
    seen::Seen,
    simd::Simd,
    weight::{Weight, matrix, vector},
};

/// The model with the states of its sequences, on instruction set `S`.
pub(crate) struct Model<S> {
    s: S,
    config: Config,
    embedding: Weight,
    layers: Vec<Layer>,
    final_norm: Vec<f32>,
    lm_head: Option<Weight>,
    mtp: Option<Mtp>,
    inv_freq: Vec<f32>,
    sequences: Vec<Sequence>,
    snapshots: HashMap<u64, Vec<Sequence>>,
    next_snapshot: u64,
    undo: Option<Undo>,
    listener: Option<Listener>,
}

/// The weights of a decoder layer.
struct Layer {
    input_norm: Vec<f32>,
    mixer: MixerWeights,
    post_norm: Vec<f32>,
    mlp: MlpWeights,
}

enum MixerWeights {
    Linear {
        qkvz: Weight,
        ba: Weight,
        /// `[HK, W, 2 K + R V]`.
        taps: Vec<f32>,
        rates: Vec<f32>,
        dt_bias: Vec<f32>,
        norm: Vec<f32>,
        out: Weight,
    },
    Full {
        q: Weight,
        k: Weight,
        v: Weight,
        o: Weight,
        q_norm: Vec<f32>,
        k_norm: Vec<f32>,
    },
}

/// Gate, up and down projection.
struct Swiglu([Weight; 3]);

impl Swiglu {
    fn expert(&self) -> Expert<'_, Weight> {
        let [gate_proj, up_proj, down_proj] = &self.0;
        Expert { gate_proj, up_proj, down_proj }
    }
}

#[expect(clippy::large_enum_variant, reason = "there is one per layer")]
enum MlpWeights {
    Dense(Swiglu),
    Sparse { router: Weight, experts: Vec<Swiglu>, shared: Swiglu, shared_gate: Weight },
}

struct Mtp {
    norm_embedding: Vec<f32>,
    norm_hidden: Vec<f32>,
    fc: Weight,
    layer: Layer,
    norm: Vec<f32>,
}

/// What one sequence leaves behind for its next token.
#[derive(Clone)]
struct Sequence {
    len: usize,
    layers: Vec<LayerState>,
    mtp: Cache<f32>,
}

#[derive(Clone)]
enum LayerState {
    Linear(State),
    Full(Cache<f32>),
}

/// What is needed to take tokens of the last step back.
struct Undo {
    before: Vec<Sequence>,
    tokens: Vec<Vec<u32>>,
    forced_routing: Option<Vec<Option<Array2<i64>>>>,
}

/// The rows of the sequences and where they stand.
struct Place {
    /// `[S + 1]`.
    cu: Vec<usize>,
    /// `[N, R / 2]`: cosines and sines.
    turns: Vec<(f32, f32)>,
}

/// Reads the weights of one layer.
struct Loader<'a> {
    weights: &'a dyn Weights,
    config: &'a Config,
}

impl Loader<'_> {
    fn layer(&self, prefix: &str, mixer: Mixer, mlp: Mlp) -> Result<Layer, Error> {
        let vector = |name: &str| vector(self.weights, &format!("{prefix}.{name}"));
        let matrix = |name: &str| matrix(self.weights, &format!("{prefix}.{name}.weight"));
        let mixer = match mixer {
            Mixer::Linear => MixerWeights::Linear {
                qkvz: matrix("linear_attn.in_proj_qkvz")?,
                ba: matrix("linear_attn.in_proj_ba")?,
                taps: self.taps(&vector("linear_attn.conv1d.weight")?),
                rates: vector("linear_attn.A_log")?.iter().map(|a| a.exp()).collect(),
                dt_bias: vector("linear_attn.dt_bias")?,
                norm: vector("linear_attn.norm.weight")?,
                out: matrix("linear_attn.out_proj")?,
            },
            Mixer::Full => MixerWeights::Full {
                q: matrix("self_attn.q_proj")?,
                k: matrix("self_attn.k_proj")?,
                v: matrix("self_attn.v_proj")?,
                o: matrix("self_attn.o_proj")?,
                q_norm: vector("self_attn.q_norm.weight")?,
                k_norm: vector("self_attn.k_norm.weight")?,
            },
        };
        let swiglu = |of: &str| -> Result<Swiglu, Error> {
            let one = |name: &str| matrix(&format!("mlp.{of}{name}"));
            Ok(Swiglu([one("gate_proj")?, one("up_proj")?, one("down_proj")?]))
        };
        let mlp = match mlp {
            Mlp::Dense => MlpWeights::Dense(swiglu("")?),
            Mlp::Sparse => MlpWeights::Sparse {
                router: matrix("mlp.gate")?,
                experts: (0..self.config.num_experts)
                    .map(|e| swiglu(&format!("experts.{e}.")))
                    .collect::<Result<_, _>>()?,
                shared: swiglu("shared_expert.")?,
                shared_gate: matrix("mlp.shared_expert_gate")?,
            },
        };
        Ok(Layer {
            input_norm: vector("input_layernorm.weight")?,
            mixer,
            post_norm: vector("post_attention_layernorm.weight")?,
            mlp,
        })
    }

    /// `conv1d.weight` `[C, 1, W]`, whose channels are all queries, all keys, all values, as
    /// `[HK, W, 2 K + R V]`.
    fn taps(&self, conv: &[f32]) -> Vec<f32> {
        let w = self.config.linear_conv_kernel_dim;
        let channels = channels(self.config);
        channels
            .iter()
            .flat_map(|head| (0..w).flat_map(|j| head.iter().map(move |c| conv[c * w + j])))
            .collect()
    }
}

/// The convolution's channels of each key head: its query, its key, the values of its group.
fn channels(c: &Config) -> Vec<Vec<usize>> {
    let (hk, k) = (c.linear_num_key_heads, c.linear_key_head_dim);
    let width = c.linear_value_dim() / hk;
    let head = |j: usize| {
        let (query, key, value) = (j * k, hk * k + j * k, 2 * hk * k + j * width);
        (query..query + k).chain(key..key + k).chain(value..value + width).collect()
    };
    (0..hk).map(head).collect()
}

impl<S: Simd> Model<S> {
    /// A model that holds no sequence yet.
    ///
    /// # Errors
    /// If a weight cannot be had.
    pub(crate) fn new(s: S, weights: &dyn Weights) -> Result<Self, Error> {
        let config = weights.config().clone();
        let load = Loader { weights, config: &config };
        let kinds = config.layer_types.iter().zip(&config.mlp_types).enumerate();
        let layers = kinds
            .map(|(i, (&mixer, &mlp))| load.layer(&format!("model.layers.{i}"), mixer, mlp))
            .collect::<Result<_, _>>()?;
        let mtp = match weights.meta(names::MTP_FC) {
            None => None,
            Some(_) => Some(Mtp {
                norm_embedding: vector(weights, "mtp.pre_fc_norm_embedding.weight")?,
                norm_hidden: vector(weights, "mtp.pre_fc_norm_hidden.weight")?,
                fc: matrix(weights, names::MTP_FC)?,
                layer: load.layer("mtp.layers.0", Mixer::Full, names::mtp_mlp(&config))?,
                norm: vector(weights, "mtp.norm.weight")?,
            }),
        };
        let lm_head =
            if config.tie_word_embeddings { None } else { Some(matrix(weights, names::LM_HEAD)?) };
        Ok(Model {
            s,
            embedding: matrix(weights, names::EMBED_TOKENS)?,
            final_norm: vector(weights, names::FINAL_NORM)?,
            inv_freq: config.rope.inv_freq(),
            config,
            layers,
            lm_head,
            mtp,
            sequences: Vec::new(),
            snapshots: HashMap::new(),
            next_snapshot: 0,
            undo: None,
            listener: None,
        })
    }

    fn empty_sequence(&self) -> Sequence {
        let c = &self.config;
        let cache = || Cache::new(c.num_key_value_heads, c.head_dim);
        let state = |mixer: &Mixer| match mixer {
            Mixer::Linear => LayerState::Linear(State {
                conv: vec![0.0; c.conv_dim() * (c.linear_conv_kernel_dim - 1)],
                recurrent: vec![0.0; c.linear_value_dim() * c.linear_key_head_dim],
            }),
            Mixer::Full => LayerState::Full(cache()),
        };
        Sequence { len: 0, layers: c.layer_types.iter().map(state).collect(), mtp: cache() }
    }

    /// `[N, D]`.
    fn embed(&self, tokens: &[Vec<u32>]) -> Vec<f32> {
        let d = self.config.hidden_size;
        let ids: Vec<u32> = tokens.iter().flatten().copied().collect();
        let mut x = vec![0.0; ids.len() * d];
        for (x, &id) in x.chunks_exact_mut(d).zip(&ids) {
            self.embedding.row(id as usize, x);
        }
        x
    }

    fn place(&self, tokens: &[Vec<u32>], lengths: impl Iterator<Item = usize>) -> Place {
        let mut place = Place { cu: vec![0], turns: Vec::new() };
        let factor = self.config.rope.yarn.map_or(1.0, |yarn| yarn.attention_factor as f32);
        for (tokens, before) in tokens.iter().zip(lengths) {
            let end = place.cu[place.cu.len() - 1] + tokens.len();
            place.cu.push(end);
            for position in before..before + tokens.len() {
                place.turns.extend(self.inv_freq.iter().map(|frequency| {
                    // The angle is defined in f32; its cosine is taken in f64, so that the reduction
                    // of a large angle costs nothing.
                    let turn = f64::from(position as f32 * frequency);
                    (turn.cos() as f32 * factor, turn.sin() as f32 * factor)
                }));
            }
        }
        place
    }

    /// The sparse or dense MLP.
    fn mlp(
        &self,
        x: &[f32],
        mlp: &MlpWeights,
        forced: Option<&Array2<i64>>,
        seen: &mut Seen<'_>,
    ) -> Result<(Vec<f32>, Option<Routing>), Error> {
        let s = self.s;
        let c = &self.config;
        let n = x.len() / c.hidden_size;
        let mut o = vec![0.0; x.len()];
        let everyone = Groups::new(&vec![0; n], 1, 1);
        match mlp {
            MlpWeights::Dense(mlp) => {
                moe_experts(s, &mut o, x, &everyone, &vec![1.0; n], |_| mlp.expert());
                seen.see("dense_mlp", "o", &[n, c.hidden_size], &mut o)?;
                Ok((o, None))
            }
            MlpWeights::Sparse { router, experts, shared, shared_gate } => {
                let active = c.num_experts_per_tok;
                let mut logits = vec![0.0; n * c.num_experts];
                linear(s, &mut logits, x, router);
                seen.see("moe_router", "logits", &[n, c.num_experts], &mut logits)?;
                let given = seen.given_ids("moe_router", "ids")?;
                let forced = given.as_ref().or(forced);
                let mut routed = route(&logits, c.num_experts, active, c.norm_topk_prob, forced);
                seen.see("moe_router", "weights", &[n, active], &mut routed.weights)?;
                let groups = Groups::new(&routed.ids, active, c.num_experts);
                moe_experts(s, &mut o, x, &groups, &routed.weights, |e| experts[e].expert());
                seen.see("moe_experts", "o", &[n, c.hidden_size], &mut o)?;
                let mut open = vec![0.0; n];
                linear(s, &mut open, x, shared_gate);
                open.iter_mut().for_each(|open| *open = 1.0 / (1.0 + (-*open).exp()));
                moe_experts(s, &mut o, x, &everyone, &open, |_| shared.expert());
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
        caches: &mut [&mut Cache<f32>],
        seen: &mut Seen<'_>,
    ) -> Result<Vec<f32>, Error> {
        let MixerWeights::Full { q, k, v, o, q_norm, k_norm } = mixer else {
            unreachable!("a full layer")
        };
        let s = self.s;
        let c = &self.config;
        let (hq, hkv, h) = (c.num_attention_heads, c.num_key_value_heads, c.head_dim);
        let eps = c.rms_norm_eps as f32;
        let n = x.len() / c.hidden_size;
        let mut both = vec![0.0; n * hq * 2 * h];
        let (mut keys, mut values) = (vec![0.0; n * hkv * h], vec![0.0; n * hkv * h]);
        linear(s, &mut both, x, q);
        seen.see("linear", "q_proj", &[n, hq, 2 * h], &mut both)?;
        linear(s, &mut keys, x, k);
        seen.see("linear", "k_proj", &[n, hkv, h], &mut keys)?;
        linear(s, &mut values, x, v);
        seen.see("linear", "v_proj", &[n, hkv, h], &mut values)?;
        let half = self.inv_freq.len();
        let scale = 1.0 / (h as f32).sqrt();
        let (mut queries, mut gates) = (vec![0.0; n * hq * h], vec![0.0; n * hq * h]);
        pool::pieces2((&mut queries, hq * h), (&mut gates, hq * h), |token, queries, gates| {
            let turns = &place.turns[token * half..][..half];
            s.run(
                #[inline(always)]
                || {
                    let both = both[token * hq * 2 * h..].chunks_exact(2 * h);
                    let heads = queries.chunks_exact_mut(h).zip(gates.chunks_exact_mut(h));
                    for ((query, gate), both) in heads.zip(both) {
                        query.copy_from_slice(&both[..h]);
                        gate.copy_from_slice(&both[h..]);
                        rms_norm_row(s, query, q_norm, eps);
                        turn(query, turns);
                        query.iter_mut().for_each(|x| *x *= scale);
                    }
                },
            );
        });
        pool::pieces(&mut keys, hkv * h, |token, keys| {
            let turns = &place.turns[token * half..][..half];
            s.run(
                #[inline(always)]
                || {
                    for key in keys.chunks_exact_mut(h) {
                        rms_norm_row(s, key, k_norm, eps);
                        turn(key, turns);
                    }
                },
            );
        });
        for (cache, rows) in caches.iter_mut().zip(place.cu.windows(2)) {
            for row in rows[0]..rows[1] {
                let at = row * hkv * h..(row + 1) * hkv * h;
                cache.push(&keys[at.clone()], &values[at]);
            }
        }
        let caches: Vec<&Cache<f32>> = caches.iter().map(|cache| &**cache).collect();
        let mut mixed = vec![0.0; n * hq * h];
        attention(s, &mut mixed, (&queries, &gates), &caches, &place.cu, Sizes { hq, hkv, h });
        seen.see("attention", "o", &[n, hq, h], &mut mixed)?;
        let mut out = vec![0.0; x.len()];
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
    ) -> Result<Vec<f32>, Error> {
        let MixerWeights::Linear { qkvz, ba, out, .. } = mixer else {
            unreachable!("a linear layer")
        };
        let s = self.s;
        let n = x.len() / self.config.hidden_size;
        let mut projected = vec![0.0; n * qkvz.rows()];
        linear(s, &mut projected, x, qkvz);
        seen.see("linear", "in_proj_qkvz", &[n, qkvz.rows()], &mut projected)?;
        let mut gates = vec![0.0; n * ba.rows()];
        linear(s, &mut gates, x, ba);
        seen.see("linear", "in_proj_ba", &[n, ba.rows()], &mut gates)?;
        let mut mixed = vec![0.0; n * self.config.linear_value_dim()];
        self.gdn(mixer).mix(s, &mut mixed, &projected, &gates, states, &place.cu);
        let c = &self.config;
        let heads = [n, c.linear_num_value_heads, c.linear_value_head_dim];
        seen.see("rms_norm_gated", "norm", &heads, &mut mixed)?;
        let mut o = vec![0.0; x.len()];
        linear(s, &mut o, &mixed, out);
        seen.see("linear", "out_proj", &[n, c.hidden_size], &mut o)?;
        Ok(o)
    }

    /// Logits of rows `[N, D]`.
    fn logits(&self, x: &[f32]) -> Result<Array2<f32>, Error> {
        let n = x.len() / self.config.hidden_size;
        let mut logits = vec![0.0; n * self.config.vocab_size];
        linear(self.s, &mut logits, x, self.lm_head.as_ref().unwrap_or(&self.embedding));
        Ok(Array2::from_shape_vec((n, self.config.vocab_size), logits)?)
    }

    fn pass(&mut self, tokens: &[Vec<u32>], want: &Want) -> Result<Step, Error> {
        self.check(tokens)?;
        self.undo = want.rollback.then(|| Undo {
            before: self.sequences.clone(),
            tokens: tokens.to_vec(),
            forced_routing: want.forced_routing.clone(),
        });
        let mut sequences = std::mem::take(&mut self.sequences);
        let step = self.layers(tokens, want, &mut sequences);
        self.sequences = sequences;
        step
    }

    fn layers(
        &mut self,
        tokens: &[Vec<u32>],
        want: &Want,
        sequences: &mut [Sequence],
    ) -> Result<Step, Error> {
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
        let mut normed = vec![0.0; n * d];
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
        let rows: Vec<usize> = match want.logits {
            Rows::All => (0..n).collect(),
            Rows::Last => place.cu.windows(2).filter(|p| p[0] < p[1]).map(|p| p[1] - 1).collect(),
            Rows::None => Vec::new(),
        };
        seen.part = Part::Head;
        seen.see("rms_norm", "norm", &[n, d], &mut normed)?;
        let last = taken(&normed)?;
        step.logits = if rows.len() == n {
            self.logits(&normed)?
        } else {
            self.logits(last.select(Axis(0), &rows).as_slice().unwrap_or(&[]))?
        };
        if let Some(logits) = step.logits.as_slice_mut() {
            seen.see("lm_head", "logits", &[rows.len(), self.config.vocab_size], logits)?;
        }
        step.taps = seen.told.unwrap_or_default();
        step.hidden.push(last);
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
        let (given, kept) = (tokens.len(), self.sequences.len());
        if given != kept {
            return Err(format!("{given} token lists for {kept} sequences").into());
        }
        let vocab = self.config.vocab_size;
        for (i, row) in tokens.iter().enumerate() {
            if let Some((at, id)) = row.iter().enumerate().find(|(_, id)| vocab <= **id as usize) {
                let what =
                    format!("sequence {i}, token {at}: id {id} is not below vocab_size {vocab}");
                return Err(what.into());
            }
        }
        Ok(())
    }
}

/// `(x_i, x_{i + R/2}) <- (x_i c_i - x_{i + R/2} s_i, x_{i + R/2} c_i + x_i s_i)`.
#[inline(always)]
fn turn(x: &mut [f32], turns: &[(f32, f32)]) {
    let (a, rest) = x.split_at_mut(turns.len());
    for ((a, b), (cos, sin)) in a.iter_mut().zip(rest).zip(turns) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

/// How a sparse layer routes.
struct Routed {
    /// `[N, A]`.
    ids: Vec<i64>,
    /// `[N, A]`.
    weights: Vec<f32>,
    /// `[N]`.
    margins: Vec<f32>,
}

/// The `active` largest of each row of `logits` `[N, E]`, ties to the lowest index, or the experts
/// given; their weights are the softmax of these, or of all if they are not renormalised.
fn route(
    logits: &[f32],
    experts: usize,
    active: usize,
    renormalise: bool,
    forced: Option<&Array2<i64>>,
) -> Routed {
    let mut routed = Routed { ids: Vec::new(), weights: Vec::new(), margins: Vec::new() };
    for (n, row) in logits.chunks_exact(experts).enumerate() {
        // One more than are chosen: the first left out.
        let mut best: Vec<usize> = Vec::with_capacity(active + 2);
        for (i, &logit) in row.iter().enumerate() {
            if best.len() <= active || row[best[active]] < logit {
                let at = best.partition_point(|&j| logit <= row[j]);
                best.insert(at, i);
                best.truncate(active + 1);
            }
        }
        let margin = best.get(active).map(|&left| row[best[active - 1]] - row[left]);
        routed.margins.push(margin.unwrap_or(f32::INFINITY));
        let max = row[best[0]];
        best.truncate(active);
        if let Some(forced) = forced {
            best = forced.row(n).iter().map(|&id| id as usize).collect();
        }
        let score = |logit: f32| (logit - max).exp();
        let total: f32 = if renormalise {
            best.iter().map(|&j| score(row[j])).sum()
        } else {
            row.iter().map(|&logit| score(logit)).sum()
        };
        routed.weights.extend(best.iter().map(|&j| score(row[j]) / total));
        routed.ids.extend(best.iter().map(|&j| j as i64));
    }
    routed
}

impl<S: Simd> Engine for Model<S> {
    fn name(&self) -> String {
        format!("cpu/{}", S::NAME)
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
        let kept = undo.tokens.iter().zip(keep);
        if keep.len() != undo.tokens.len() || kept.clone().any(|(tokens, &n)| tokens.len() < n) {
            return Err("rollback keeps more tokens than the last step fed".into());
        }
        let mut rows = Vec::new();
        let mut start = 0;
        for (tokens, &n) in kept.clone() {
            rows.extend(start..start + n);
            start += tokens.len();
        }
        let select = |ids: &Array2<i64>| ids.select(Axis(0), &rows);
        let forced_routing = undo
            .forced_routing
            .map(|layers| layers.iter().map(|ids| ids.as_ref().map(select)).collect());
        let tokens: Vec<Vec<u32>> = kept.map(|(tokens, &n)| tokens[..n].to_vec()).collect();
        let mtp: Vec<_> = self.sequences.iter().map(|sequence| sequence.mtp.clone()).collect();
        self.sequences = undo.before;
        for (sequence, mtp) in self.sequences.iter_mut().zip(mtp) {
            sequence.mtp = mtp;
        }
        let want = Want { logits: Rows::None, forced_routing, ..Want::default() };
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

/// The engine for this machine: on the widest instruction set that it has.
///
/// # Errors
/// If a weight cannot be had.
pub fn engine(weights: &dyn Weights) -> Result<Box<dyn Engine>, Error> {
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(s) = super::avx512::Avx512::new() {
            return Ok(Box::new(Model::new(s, weights)?));
        }
        if let Some(s) = super::avx2::Avx2::new() {
            return Ok(Box::new(Model::new(s, weights)?));
        }
    }
    Ok(Box::new(Model::new(super::simd::Plain, weights)?))
}
