//! A piece on its way through the layers: the formulas, as kernels.

use golden::{
    Config, Error,
    engine::{INTERRUPTED, Listener, Routing},
    split::Share,
    tap::{Part, RESIDUAL},
};
use ndarray::Array2;

use super::{
    scratch::Scratch,
    seen::{self, Looked},
    states::{self, LayerState},
    told::Told,
    weights::{Layer, MixerWeights, MlpWeights, Swiglu},
};
use crate::cuda::{
    device::{Buffer, Device},
    engine::{APART, Added, Delta, Element, Experts, FEW, Heads, Matrix, Ops},
};

/// A piece on its way through the layers.
pub(super) struct Pass<'a> {
    pub(super) ops: Ops<'a>,
    /// Where what is looked at is copied from.
    pub(super) device: Option<&'a Device>,
    pub(super) config: &'a Config,
    /// What of the model is computed here.
    pub(super) share: &'a Share,
    pub(super) scratch: &'a mut Scratch,
    pub(super) inv_freq: &'a Buffer,
    pub(super) told: Told,
    /// Where that is which is added to the stream next.
    pub(super) pending: Pending,
}

/// Where what is added to the residual stream is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pending {
    /// In f32.
    Wide,
    /// In E.
    Narrow,
    /// In E, in two parts.
    Both,
}

/// What a piece goes through.
pub(super) struct Layers<'a> {
    pub(super) embedding: &'a Matrix,
    pub(super) all: &'a [Layer],
    pub(super) final_norm: &'a Buffer,
}

impl<'a> Pass<'a> {
    fn device(&self) -> Result<&'a Device, Error> {
        self.device.ok_or_else(|| "no device to look at".into())
    }

    /// Embedding, layers and final norm: nothing waits, unless somebody looks.
    pub(super) fn walk(
        &mut self,
        layers: &Layers<'_>,
        states: &[LayerState],
        mut listener: Option<&mut Listener>,
        looked: &mut Looked<'_>,
    ) -> Result<(), Error> {
        let (n, d) = (self.told.n, self.config.hidden_size);
        let eps = self.config.rms_norm_eps as f32;
        self.ops.embedding(&self.scratch.x, self.told.ids(), layers.embedding, n)?;
        self.see_wide(looked, ("embedding", "o"), &[n, d], |r| &mut r.x)?;
        let first = layers.all.first().map_or(layers.final_norm, |layer| &layer.input_norm);
        self.norm(first, eps)?;
        for (i, (layer, state)) in layers.all.iter().zip(states).enumerate() {
            if looked.listens && listener.as_mut().is_some_and(|go_on| !go_on(i)) {
                return Err(INTERRUPTED.into());
            }
            if let Some(hidden) = &mut looked.hidden {
                hidden.push(self.scratch.stream(self.device()?, (n, d))?);
            }
            looked.seen.part = Part::Layer(i);
            self.see(looked, ("rms_norm", "input_layernorm"), &[n, d], |r| &mut r.normed)?;
            match (&layer.mixer, state) {
                (MixerWeights::Linear { .. }, LayerState::Linear(state)) => {
                    self.linear_attention(&layer.mixer, state, looked)?;
                }
                (MixerWeights::Full { .. }, LayerState::Full(cache)) => {
                    self.full_attention(&layer.mixer, cache, looked)?;
                }
                _ => return Err("a layer with the state of another kind".into()),
            }
            self.add_norm("h", &layer.post_norm, looked)?;
            self.see(looked, ("rms_norm", "post_attention_layernorm"), &[n, d], |r| &mut r.normed)?;
            let forced = looked.forced_routing.and_then(|all| all.get(i)?.as_ref());
            let routing = self.mlp(&layer.mlp, forced, looked)?;
            let next = layers.all.get(i + 1).map_or(layers.final_norm, |layer| &layer.input_norm);
            self.add_norm("o", next, looked)?;
            if let Some(all) = &mut looked.routing {
                all.push(routing);
            }
        }
        Ok(())
    }

    pub(super) fn see(
        &mut self,
        looked: &mut Looked<'_>,
        name: (&'static str, &'static str),
        shape: &[usize],
        of: impl Fn(&mut Scratch) -> &mut Buffer,
    ) -> Result<(), Error> {
        if !looked.seen.looks() {
            return Ok(());
        }
        let (device, element) = (self.device()?, self.ops.element);
        looked.seen.see(device, name, shape, of(self.scratch), element)
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
        let device = self.device()?;
        looked.seen.see(device, name, shape, of(self.scratch), Element::F32)
    }

    /// The norm of the stream.
    pub(super) fn norm(&mut self, weight: &Buffer, eps: f32) -> Result<(), Error> {
        let (n, d) = (self.told.n, self.config.hidden_size);
        let r = &*self.scratch;
        Ok(self.ops.norm((&r.normed, 0, d), &r.x, Added::default(), weight, (n, d, eps))?)
    }

    /// `x <- x + added`, a residual of that name, and its norm; in one pass where nobody looks.
    pub(super) fn add_norm(
        &mut self,
        tensor: &'static str,
        weight: &Buffer,
        looked: &mut Looked<'_>,
    ) -> Result<(), Error> {
        let (n, d) = (self.told.n, self.config.hidden_size);
        let eps = self.config.rms_norm_eps as f32;
        let r = &*self.scratch;
        let add = match self.pending {
            Pending::Wide => Added { wide: Some(&r.added), ..Added::default() },
            Pending::Narrow => Added { narrow: [Some(&r.narrow), None], ..Added::default() },
            Pending::Both => Added { narrow: [Some(&r.narrow), Some(&r.more)], ..Added::default() },
        };
        self.ops.norm((&r.normed, 0, d), &r.x, add, weight, (n, d, eps))?;
        if looked.seen.looks() {
            self.see_wide(looked, (RESIDUAL, tensor), &[n, d], |r| &mut r.x)?;
            self.norm(weight, eps)?;
        }
        Ok(())
    }

    /// Where several GPUs add to the stream, the sum of that. Parts in E were rounded; others are after the sum, if
    /// one GPU's would have been.
    fn join(&mut self, rounds: bool) -> Result<(), Error> {
        let (ranks, n, d) = (self.share.ranks, self.told.n, self.config.hidden_size);
        let r = &*self.scratch;
        let (from, narrow) = match self.pending {
            Pending::Wide => (&r.added, false),
            Pending::Narrow => (&r.narrow, true),
            Pending::Both => return Err("two parts of a part".into()),
        };
        let how = (narrow, rounds && !narrow);
        self.ops.sum((&r.added, &r.gathered), from, how, (ranks, n, d))?;
        self.pending = Pending::Wide;
        Ok(())
    }

    /// The projection that is added to the stream next.
    fn out(
        &mut self,
        (op, tensor): (&'static str, &'static str),
        x: fn(&Scratch) -> &Buffer,
        weight: &Matrix,
        looked: &mut Looked<'_>,
    ) -> Result<(), Error> {
        let n = self.told.n;
        let (r, shape) = (&*self.scratch, [n, weight.rows]);
        if 1 < self.share.ranks {
            if self.ops.reads(weight) {
                self.pending = Pending::Narrow;
                self.ops.linear(&r.narrow, x(r), weight, n)?;
            } else {
                self.pending = Pending::Wide;
                self.ops.unrounded(&r.added, x(r), weight, n)?;
            }
            return self.join(true);
        }
        if self.ops.reads(weight) {
            self.pending = Pending::Narrow;
            self.ops.linear(&r.narrow, x(r), weight, n)?;
            return self.see(looked, (op, tensor), &shape, |r| &mut r.narrow);
        }
        self.pending = Pending::Wide;
        self.ops.widened(&r.added, x(r), weight, n)?;
        self.see_wide(looked, (op, tensor), &shape, |r| &mut r.added)
    }

    /// `linear_attn` over the new rows; the states go on.
    pub(super) fn linear_attention(
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
        let eps = c.rms_norm_eps as f32;
        if self.told.one_each && !looked.seen.looks() && self.ops.steps(ba, delta) {
            let own = (&r.gated, &state.recurrent, &state.conv);
            let reads = (&r.projected, &r.normed, ba);
            self.ops.delta_step(own, reads, [conv, a_log, dt_bias, norm], (s, eps), delta)?;
            return self.out(("linear", "out_proj"), |r| &r.gated, out, looked);
        }
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
        let own = (&r.mixed, &state.recurrent, [&r.work, &r.tickets]);
        self.ops.delta_rule(own, reads, cu, (n, s, self.told.one_each), delta)?;
        self.see(looked, ("gated_delta_rule", "o"), &gv, |r| &mut r.mixed)?;
        let r = &*self.scratch;
        let heads = (n * delta.hv, delta.v);
        self.ops.gated_norm(&r.gated, [&r.mixed, &r.z, norm], eps, heads)?;
        self.see(looked, ("rms_norm_gated", "norm"), &gv, |r| &mut r.gated)?;
        self.out(("linear", "out_proj"), |r| &r.gated, out, looked)
    }

    /// `self_attn` over the new rows, whose keys and values are added to the caches.
    pub(super) fn full_attention(
        &mut self,
        mixer: &MixerWeights,
        cache: &states::Cache,
        looked: &mut Looked<'_>,
    ) -> Result<(), Error> {
        let MixerWeights::Full { q, k, v, o, q_norm, k_norm, together } = mixer else {
            return Err("no full layer".into());
        };
        let c = self.config;
        let (n, s, told) = (self.told.n, self.told.s, self.told);
        let (hq, hkv, h) = (c.num_attention_heads, c.num_key_value_heads, c.head_dim);
        let heads = Heads { hq, hkv, h, kept: cache.kept };
        let r = &*self.scratch;
        let mut reads = None;
        if let Some(all) = together
            && !looked.seen.looks()
        {
            // A row has queries and their gates, keys, values.
            self.ops.linear(&r.both, &r.normed, all, n)?;
            let part = |from: usize, heads: usize| {
                let size = self.ops.element.size();
                r.both.part(from * size, (n.max(1) * all.rows - (all.rows - heads * h)) * size)
            };
            let (keys, values) = (2 * hq * h, (2 * hq + hkv) * h);
            reads = Some(([part(0, 2 * hq), part(keys, hkv), part(values, hkv)], [all.rows; 2]));
        } else {
            self.ops.linear(&r.both, &r.normed, q, n)?;
            self.ops.linear(&r.keys, &r.normed, k, n)?;
            self.ops.linear(&r.values, &r.normed, v, n)?;
        }
        self.see(looked, ("linear", "q_proj"), &[n, hq, 2 * h], |r| &mut r.both)?;
        self.see(looked, ("linear", "k_proj"), &[n, hkv, h], |r| &mut r.keys)?;
        self.see(looked, ("linear", "v_proj"), &[n, hkv, h], |r| &mut r.values)?;
        let (r, eps) = (&*self.scratch, c.rms_norm_eps as f32);
        let factor = c.rope.yarn.map_or(1.0, |yarn| yarn.attention_factor as f32);
        let ([both, keys, values], strides) = match &reads {
            Some((parts, strides)) => (parts.each_ref(), *strides),
            None => ([&r.both, &r.keys, &r.values], [2 * hq * h, hkv * h]),
        };
        // Of an odd number of channels the official code turns one more.
        let turned = c.rope.rotary_dim.next_multiple_of(2);
        self.ops.attention_in(
            [&r.queries, &r.open, &cache.k, &cache.v],
            [both, keys, values, q_norm, k_norm, self.inv_freq],
            strides,
            (told.positions(), told.rows()),
            (n, turned, eps, factor),
            heads,
        )?;
        let reads = [&r.queries, &cache.k, &cache.v, &r.open, &r.parts, &r.tickets];
        self.ops.attention(&r.attended, reads, told.cu_gaps(), (n, s, told.one_each), heads)?;
        self.see(looked, ("attention", "o"), &[n, hq, h], |r| &mut r.attended)?;
        self.out(("linear", "o_proj"), |r| &r.attended, o, looked)
    }

    /// The sparse or dense MLP.
    pub(super) fn mlp(
        &mut self,
        mlp: &MlpWeights,
        forced: Option<&Array2<i64>>,
        looked: &mut Looked<'_>,
    ) -> Result<Option<Routing>, Error> {
        let c = self.config;
        let (n, d) = (self.told.n, c.hidden_size);
        self.pending = Pending::Wide;
        let (active, experts) = (c.num_experts_per_tok, c.num_experts);
        let r = &*self.scratch;
        let x = (&r.normed, &r.hidden);
        let (router, routed, shared, shared_gate, together, deciding) = match mlp {
            MlpWeights::Dense(dense) => {
                let experts = Experts { routed: None, shared: Some((dense, None)) };
                self.ops.experts(&r.added, x, &experts, n)?;
                if 1 < self.share.ranks {
                    self.join(false)?;
                }
                self.see_wide(looked, ("dense_mlp", "o"), &[n, d], |r| &mut r.added)?;
                return Ok(None);
            }
            MlpWeights::Sparse { router, experts, shared, shared_gate, together, deciding } => {
                (router, experts, shared, shared_gate, together.as_ref(), deciding.as_ref())
            }
        };
        // The shared expert is one more of all, in every token's last slot.
        let together = together.filter(|all| self.ops.takes(all) && !looked.seen.looks());
        let slots = active + usize::from(together.is_some());
        // What decides is one product, where nobody looks.
        let deciding = deciding.filter(|_| self.ops.fast.is_some() && !looked.seen.looks());
        let deciding = deciding.unwrap_or(router);
        self.ops.wide(&r.router, &r.normed, deciding, n)?;
        let given = looked.seen.given_ids("moe_router", "ids")?;
        let given = match given.as_ref().or(forced) {
            Some(ids) => Some(seen::put_ids(self.device()?, ids, (n, active))?),
            None => None,
        };
        let r = &*self.scratch;
        let out = [&r.ids, &r.weights, &r.margins, &r.opens];
        let reads = (&r.router, &r.normed, shared_gate);
        let (sizes, rows) = ((n, active, slots), [experts, deciding.rows]);
        self.ops.route(out, reads, given.as_ref(), sizes, rows, c.norm_topk_prob)?;
        // Logits and weights are one op's: weights come of the engine's own logits, whatever is forced.
        self.see_wide(looked, ("moe_router", "logits"), &[n, experts], |r| &mut r.router)?;
        self.see_wide(looked, ("moe_router", "weights"), &[n, active], |r| &mut r.weights)?;
        if 1 < self.share.ranks {
            self.experts_here([routed, shared], together, slots)?;
            return self.routing(looked, (active, slots));
        }
        let r = &*self.scratch;
        let x = (&r.normed, &r.hidden);
        let chosen = Some((routed, &r.ids, &r.weights, active));
        let always = Some((shared, Some(&r.opens)));
        let alike = routed.iter().zip(shared).all(|(one, other)| one.alike(other));
        let sorts = FEW < n && self.ops.takes(routed) && self.ops.takes(shared);
        let room = r.sorted();
        if let Some(all) = together {
            let by = (&r.ids, &r.weights);
            if n <= APART {
                self.ops.few_experts(&r.narrow, x, all, by, (n, slots))?;
            } else {
                let own = (all, experts + 1);
                self.ops.fast_experts(&r.narrow, &r.normed, own, by, (n, slots), &room)?;
            }
            self.pending = Pending::Narrow;
        } else if sorts && !looked.seen.looks() {
            let (own, by) = ((routed, experts), (&r.ids, &r.weights));
            self.ops.fast_experts(&r.narrow, &r.normed, own, by, (n, active), &room)?;
            let (own, by) = ((shared, 1), (&r.zeros, &r.opens));
            self.ops.fast_experts(&r.more, &r.normed, own, by, (n, 1), &room)?;
            self.pending = Pending::Both;
        } else if alike && !looked.seen.looks() {
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
        self.routing(looked, (active, slots))
    }

    /// What the experts of this GPU add, and the sum with those of others.
    fn experts_here(
        &mut self,
        [routed, shared]: [&Swiglu; 2],
        together: Option<&Swiglu>,
        slots: usize,
    ) -> Result<(), Error> {
        let (n, share, active) = (self.told.n, self.share, self.config.num_experts_per_tok);
        let r = &*self.scratch;
        let own = [&r.own_ids, &r.own_weights];
        self.ops.share(own, [&r.ids, &r.weights], share, (n, slots))?;
        let x = (&r.normed, &r.hidden);
        let by = (&r.own_ids, &r.own_weights);
        if let Some(all) = together {
            if n <= APART {
                self.ops.few_experts(&r.narrow, x, all, by, (n, slots))?;
            } else {
                let all = (all, share.experts.len() + 1);
                self.ops.fast_experts(&r.narrow, &r.normed, all, by, (n, slots), &r.sorted())?;
            }
            self.pending = Pending::Narrow;
        } else {
            let chosen = Some((routed, by.0, by.1, active));
            self.ops.experts(&r.added, x, &Experts { routed: chosen, shared: None }, n)?;
            if share.leads() {
                let always = Experts { routed: None, shared: Some((shared, Some(&r.opens))) };
                self.ops.experts(&r.added, x, &always, n)?;
            }
        }
        self.join(false)
    }

    /// Who was chosen, if that is wanted.
    fn routing(
        &self,
        looked: &Looked<'_>,
        (active, slots): (usize, usize),
    ) -> Result<Option<Routing>, Error> {
        let n = self.told.n;
        if looked.routing.is_none() {
            return Ok(None);
        }
        let device = self.device()?;
        let ids = self.scratch.ids(device, (n, active, slots))?;
        let margins = seen::numbers(device, &self.scratch.margins, Element::F32, n)?;
        Ok(Some(Routing { ids, margins }))
    }
}
