//! A piece on its way through the layers: the formulas, as kernels.

use golden::{
    Config, Error,
    engine::{INTERRUPTED, Listener, Routing},
    tap::{Part, RESIDUAL},
};
use ndarray::Array2;

use super::{
    scratch::Scratch,
    seen::{self, Looked},
    states::{self, LayerState},
    told::Told,
    weights::{Layer, MixerWeights, MlpWeights},
};
use crate::cuda::{
    device::{Buffer, Device},
    engine::{Delta, Element, Experts, Heads, Matrix, Ops},
};

/// A piece on its way through the layers.
pub(super) struct Pass<'a> {
    pub(super) ops: Ops<'a>,
    /// Where what is looked at is copied from.
    pub(super) device: Option<&'a Device>,
    pub(super) config: &'a Config,
    pub(super) scratch: &'a mut Scratch,
    pub(super) inv_freq: &'a Buffer,
    pub(super) told: Told,
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
        self.norm(None, first, eps)?;
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

    pub(super) fn norm(
        &mut self,
        add: Option<&Buffer>,
        weight: &Buffer,
        eps: f32,
    ) -> Result<(), Error> {
        let (n, d) = (self.told.n, self.config.hidden_size);
        let r = &*self.scratch;
        let add = add.map(|add| (add, false));
        Ok(self.ops.norm((&r.normed, 0, d), &r.x, add, weight, (n, d, eps))?)
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
        let add = Some((&r.added, false));
        self.ops.norm((&r.normed, 0, d), &r.x, add, weight, (n, d, eps))?;
        if looked.seen.looks() {
            self.see_wide(looked, (RESIDUAL, tensor), &[n, d], |r| &mut r.x)?;
            self.norm(None, weight, eps)?;
        }
        Ok(())
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
    pub(super) fn full_attention(
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
    pub(super) fn mlp(
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
        let given = looked.seen.given_ids("moe_router", "ids")?;
        let given = match given.as_ref().or(forced) {
            Some(ids) => Some(seen::put_ids(self.device()?, ids, (n, active))?),
            None => None,
        };
        let r = &*self.scratch;
        let out = [&r.ids, &r.weights, &r.margins, &r.opens];
        let reads = (&r.router, &r.normed, shared_gate);
        let sizes = (n, active, experts);
        self.ops.route(out, reads, given.as_ref(), sizes, c.norm_topk_prob)?;
        // Logits and weights are one op's: weights come of the engine's own logits, whatever is forced.
        self.see_wide(looked, ("moe_router", "logits"), &[n, experts], |r| &mut r.router)?;
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
        let device = self.device()?;
        let ids = self.scratch.ids(device, (n, active))?;
        let margins = seen::numbers(device, &self.scratch.margins, Element::F32, n)?;
        Ok(Some(Routing { ids, margins }))
    }
}
