//! The kernels of `engine.cu`, and those of ops that the engine launches, each as a function: what it takes,
//! and how many threads do it.

mod fast;
mod head;
mod matrix;
mod several;

pub(super) use fast::{APART, FEW, Fast, Sorted};
pub(super) use matrix::{Element, Matrix, Stored};

use kernels::{ATTENTION, Build, ENGINE, ENGINE_EXPERTS, GATED_DELTA_RULE, Source};

use super::{
    device::{Buffer, Error},
    launch::{Arg, Call, Launches},
};

use Arg::{At, Float, Int};

/// How a kernel of synthetic weights writes its elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Made {
    Weights(Stored),
    Scales,
}

/// Threads of a block, and warps.
const THREADS: usize = 256;
const WARPS: usize = THREADS / 32;
/// Tokens that `engine_linear_many` takes at a time.
const MANY: usize = 8;
/// Channels that a block of `engine_experts_down` does, and its warps at the most.
const ROWS: usize = 4;
const MOST_WARPS: usize = 16;
/// Threads of a block that does a head of attention.
const HEAD: usize = 128;

/// What is added to the residual stream.
#[derive(Clone, Copy, Default)]
pub(super) struct Added<'a> {
    /// In f32.
    pub(super) wide: Option<&'a Buffer>,
    /// In E.
    pub(super) narrow: [Option<&'a Buffer>; 2],
    /// Whether there was nothing before.
    pub(super) begins: bool,
}

/// Experts of some tokens.
#[derive(Clone, Copy)]
pub(super) struct Experts<'a> {
    /// Those that are chosen: their projections, ids, weights, and how many of each token.
    pub(super) routed: Option<(&'a [Matrix; 3], &'a Buffer, &'a Buffer, usize)>,
    /// The one of all, and how far it opens; with that alone it adds to what there is.
    pub(super) shared: Option<(&'a [Matrix; 3], Option<&'a Buffer>)>,
}

/// Launches kernels into the stream of the device.
pub(super) struct Ops<'a> {
    pub(super) stream: &'a mut dyn Launches,
    pub(super) element: Element,
    /// Kernels for Hopper, if they are used where they can be.
    pub(super) fast: Option<Fast>,
}

/// The sizes of a layer of the delta rule.
#[derive(Clone, Copy)]
pub(super) struct Delta {
    pub(super) hk: usize,
    pub(super) hv: usize,
    pub(super) k: usize,
    pub(super) v: usize,
    pub(super) taps: usize,
}

/// The sizes of a layer of attention, and its cache.
#[derive(Clone, Copy)]
pub(super) struct Heads {
    pub(super) hq: usize,
    pub(super) hkv: usize,
    pub(super) h: usize,
    /// What keys and values are kept in.
    pub(super) kept: Stored,
}

impl Ops<'_> {
    fn launch(
        &mut self,
        (source, build): (&Source, Build),
        entry: &'static str,
        (grid, threads, shared): ([usize; 3], usize, usize),
        args: &[(&'static str, Arg)],
    ) -> Result<(), Error> {
        let early = self.fast.is_some() && fast::starts_early(entry);
        let call = Call { source, build, entry, grid, threads, shared, early, args };
        self.stream.launch(&call)
    }

    /// A kernel of `engine.cu` or `engine_experts.cu`.
    fn engine(
        &mut self,
        entry: &'static str,
        weights: Option<Stored>,
        shape: ([usize; 3], usize, usize),
        args: &[(&'static str, Arg)],
    ) -> Result<(), Error> {
        let activations = self.element.name();
        let weights = Some(weights.map_or(activations, Stored::name));
        let of_experts = ["engine_route", "engine_share"].contains(&entry)
            || entry.starts_with("engine_experts");
        let source = if of_experts { &ENGINE_EXPERTS } else { &ENGINE };
        self.launch((source, Build { activations, weights }), entry, shape, args)
    }

    /// Some elements of a synthetic tensor, from byte `start` of a buffer on.
    pub(super) fn synthesise(
        &mut self,
        o: (&Buffer, usize),
        made: Made,
        recipe: &golden::weights::Recipe,
        count: usize,
    ) -> Result<(), Error> {
        let kind = match made {
            Made::Weights(Stored::F32) => 0,
            Made::Weights(Stored::Bf16) => 1,
            Made::Weights(Stored::F16) => 2,
            Made::Weights(Stored::Fp8) => 3,
            Made::Scales => 4,
        };
        let half = |x: u64, up: u32| Int((x >> up & 0xffff_ffff) as usize);
        self.engine(
            "engine_synthesise",
            None,
            (each(count), THREADS, 0),
            &[
                ("o", At(o.0.address() + o.1 as u64)),
                ("key_low", half(recipe.key, 0)),
                ("key_high", half(recipe.key, 32)),
                ("offset", Float(recipe.offset)),
                ("unit", Float(recipe.unit)),
                ("kind", Int(kind)),
                ("count_low", half(count as u64, 0)),
                ("count_high", half(count as u64, 32)),
            ],
        )
    }

    /// `o` f32 `[N, D]`: rows of the table.
    pub(super) fn embedding(
        &mut self,
        o: &Buffer,
        ids: Arg,
        table: &Matrix,
        n: usize,
    ) -> Result<(), Error> {
        let d = table.columns;
        let args = [
            ("o", at(o)),
            ("ids", ids),
            ("table", at(&table.weights)),
            ("N", Int(n)),
            ("D", Int(d)),
        ];
        self.engine("engine_embedding", Some(table.stored), (each(n * d), THREADS, 0), &args)
    }

    /// `x <- x + what is added`, or that alone where it begins the stream; the norm of it in rows of `o`,
    /// `stride` apart, from element `from` on.
    pub(super) fn norm(
        &mut self,
        (o, from, stride): (&Buffer, usize, usize),
        x: &Buffer,
        add: Added<'_>,
        weight: &Buffer,
        (n, d, eps): (usize, usize, f32),
    ) -> Result<(), Error> {
        let args = [
            ("o", At(o.address() + (from * self.element.size()) as u64)),
            ("x", at(x)),
            ("add", maybe(add.wide)),
            ("narrow", maybe(add.narrow[0])),
            ("more", maybe(add.narrow[1])),
            ("weight", at(weight)),
            ("eps", Float(eps)),
            ("begins", Int(usize::from(add.begins))),
            ("stride", Int(stride)),
            ("D", Int(d)),
        ];
        self.engine("engine_norm", None, ([n, 1, 1], THREADS, 0), &args)
    }

    /// A projection of `n` tokens, in E.
    pub(super) fn linear(
        &mut self,
        o: &Buffer,
        x: &Buffer,
        weight: &Matrix,
        n: usize,
    ) -> Result<(), Error> {
        if self.reads(weight) {
            return self.fast_linear(o, x, weight, n);
        }
        let to = (at(o), At(0), true);
        self.project(to, x, weight, n)
    }

    /// The same numbers, as f32.
    pub(super) fn widened(
        &mut self,
        o: &Buffer,
        x: &Buffer,
        weight: &Matrix,
        n: usize,
    ) -> Result<(), Error> {
        let to = (At(0), at(o), true);
        self.project(to, x, weight, n)
    }

    /// The same, not rounded yet.
    pub(super) fn unrounded(
        &mut self,
        o: &Buffer,
        x: &Buffer,
        weight: &Matrix,
        n: usize,
    ) -> Result<(), Error> {
        let to = (At(0), at(o), false);
        self.project(to, x, weight, n)
    }

    /// A projection of `n` tokens, in f32.
    pub(super) fn wide(
        &mut self,
        o: &Buffer,
        x: &Buffer,
        weight: &Matrix,
        n: usize,
    ) -> Result<(), Error> {
        if self.decides(weight) {
            return self.fast_decision(o, x, weight, n);
        }
        let to = (At(0), at(o), false);
        self.project(to, x, weight, n)
    }

    fn project(
        &mut self,
        (o, wide, rounds): (Arg, Arg, bool),
        x: &Buffer,
        weight: &Matrix,
        n: usize,
    ) -> Result<(), Error> {
        let (entry, tokens) =
            if n == 1 { ("engine_linear_one", 1) } else { ("engine_linear_many", MANY) };
        let (m, d) = (weight.rows, weight.columns);
        let args = [
            ("o", o),
            ("wide", wide),
            ("x", at(x)),
            ("weight", at(&weight.weights)),
            ("scales", maybe(weight.scales.as_ref())),
            ("block_rows", Int(weight.block[0])),
            ("block_cols", Int(weight.block[1])),
            ("rounds", Int(usize::from(rounds))),
            ("N", Int(n)),
            ("M", Int(m)),
            ("D", Int(d)),
        ];
        let grid = [m.div_ceil(WARPS), n.div_ceil(tokens), 1];
        self.engine(entry, Some(weight.stored), (grid, THREADS, 0), &args)
    }

    /// What the delta rule reads, of projections and the windows before; those after, if every sequence has one
    /// token and it `advances`.
    pub(super) fn delta_in(
        &mut self,
        [q, k, v, z, g, beta]: [&Buffer; 6],
        [projected, gates, conv, a_log, dt_bias, state]: [&Buffer; 6],
        cu: Arg,
        (n, s, advances): (usize, usize, bool),
        c: Delta,
    ) -> Result<(), Error> {
        // Of many tokens a thread does some, so that what it has found out of its channel is used again.
        let together = if n <= 1024 { 1 } else { 16 };
        let mut args = vec![
            ("q", at(q)),
            ("k", at(k)),
            ("v", at(v)),
            ("z", at(z)),
            ("g", at(g)),
            ("beta", at(beta)),
            ("projected", at(projected)),
            ("gates", at(gates)),
            ("conv", at(conv)),
            ("a_log", at(a_log)),
            ("dt_bias", at(dt_bias)),
            ("state", at(state)),
            ("cu_seqlens", cu),
            ("advances", Int(usize::from(advances))),
            ("together", Int(together)),
            ("N", Int(n)),
            ("S", Int(s)),
        ];
        args.extend(c.sizes());
        let channels = 2 * c.hk * c.k + 2 * c.hv * c.v + c.hv;
        let grid = [n.div_ceil(together), channels.div_ceil(THREADS), 1];
        self.engine("engine_delta_in", None, (grid, THREADS, 0), &args)
    }

    /// The windows after.
    pub(super) fn conv_state(
        &mut self,
        state: &Buffer,
        projected: &Buffer,
        cu: Arg,
        s: usize,
        c: Delta,
    ) -> Result<(), Error> {
        let mut args = vec![
            ("state_out", at(state)),
            ("projected", at(projected)),
            ("cu_seqlens", cu),
            ("S", Int(s)),
        ];
        args.extend(c.sizes());
        let channels = 2 * c.hk * c.k + c.hv * c.v;
        self.engine("engine_conv_state", None, (each(s * channels), THREADS, 0), &args)
    }

    /// The delta rule; states go on where they are.
    pub(super) fn delta_rule(
        &mut self,
        (o, state, between): (&Buffer, &Buffer, [&Buffer; 2]),
        [q, k, v, g, beta]: [&Buffer; 5],
        cu: Arg,
        (n, s, one_each): (usize, usize, bool),
        c: Delta,
    ) -> Result<(), Error> {
        if self.fast.is_some() {
            let reads = [q, k, v, g, beta];
            return self.fast_delta((o, state, between), reads, cu, (n, s, one_each), c);
        }
        let args = [
            ("o", at(o)),
            ("state_out", at(state)),
            ("q", at(q)),
            ("k", at(k)),
            ("v", at(v)),
            ("g", at(g)),
            ("beta", at(beta)),
            ("state_in", at(state)),
            ("cu_seqlens", cu),
            ("eps", Float(fast::EPS)),
            ("HK", Int(c.hk)),
            ("HV", Int(c.hv)),
            ("K", Int(c.k)),
            ("V", Int(c.v)),
        ];
        let threads = c.v.next_power_of_two().clamp(32, THREADS);
        let shape = ([s * c.hv, c.v.div_ceil(threads), 1], threads, 8 * c.k);
        let build = Build { activations: self.element.name(), weights: None };
        self.launch((&GATED_DELTA_RULE, build), "gated_delta_rule_naive", shape, &args)
    }

    /// The gated norm of `n` heads.
    pub(super) fn gated_norm(
        &mut self,
        o: &Buffer,
        [x, z, weight]: [&Buffer; 3],
        eps: f32,
        (n, v): (usize, usize),
    ) -> Result<(), Error> {
        let args = [
            ("o", at(o)),
            ("x", at(x)),
            ("z", at(z)),
            ("weight", at(weight)),
            ("eps", Float(eps)),
            ("N", Int(n)),
            ("V", Int(v)),
        ];
        self.engine("engine_gated_norm", None, ([n.div_ceil(WARPS), 1, 1], THREADS, 0), &args)
    }

    /// Queries and their gates, and keys and values where the cache has them; of projections whose rows are so far
    /// apart, those of queries and those of keys and values.
    pub(super) fn attention_in(
        &mut self,
        [q, gate, k_cache, v_cache]: [&Buffer; 4],
        [both, keys, values, q_norm, k_norm, inv_freq]: [&Buffer; 6],
        [of_queries, of_keys]: [usize; 2],
        (positions, rows): (Arg, Arg),
        (n, turned, eps, factor): (usize, usize, f32, f32),
        c: Heads,
    ) -> Result<(), Error> {
        let args = [
            ("q", at(q)),
            ("gate", at(gate)),
            ("k_cache", at(k_cache)),
            ("v_cache", at(v_cache)),
            ("both", at(both)),
            ("keys", at(keys)),
            ("values", at(values)),
            ("q_norm", at(q_norm)),
            ("k_norm", at(k_norm)),
            ("inv_freq", at(inv_freq)),
            ("of_queries", Int(of_queries)),
            ("of_keys", Int(of_keys)),
            ("positions", positions),
            ("rows", rows),
            ("eps", Float(eps)),
            ("attention_factor", Float(factor)),
            ("HQ", Int(c.hq)),
            ("HKV", Int(c.hkv)),
            ("H", Int(c.h)),
            ("R", Int(turned)),
        ];
        let shape = ([n * (c.hq + c.hkv), 1, 1], HEAD, 4 * c.h);
        let entry = match c.kept {
            Stored::Fp8 => "engine_attention_in_fp8",
            _ => "engine_attention_in",
        };
        self.engine(entry, None, shape, &args)
    }

    /// Attention over caches with gaps between them: every second sequence is a gap, without queries.
    pub(super) fn attention(
        &mut self,
        o: &Buffer,
        [q, k, v, gate, parts, tickets]: [&Buffer; 6],
        (cu_q, cu_k): (Arg, Arg),
        (n, s, one_each): (usize, usize, bool),
        c: Heads,
    ) -> Result<(), Error> {
        if self.attends(c) {
            let reads = [q, k, v, gate, parts, tickets];
            return self.fast_attention(o, reads, (cu_q, cu_k), (s, one_each), c);
        }
        let [keys, values] = c.names();
        let args = [
            ("o", at(o)),
            ("q", at(q)),
            (keys, at(k)),
            (values, at(v)),
            ("gate", at(gate)),
            ("cu_seqlens_q", cu_q),
            ("cu_seqlens_k", cu_k),
            ("S", Int(2 * s)),
            ("HQ", Int(c.hq)),
            ("HKV", Int(c.hkv)),
            ("H", Int(c.h)),
        ];
        let shape = ([n * c.hq, 1, 1], HEAD, 4 * (2 * c.h + HEAD));
        let build = Build { activations: self.element.name(), weights: None };
        let entry = match c.kept {
            Stored::Fp8 => "attention_naive_fp8",
            _ => "attention_naive",
        };
        self.launch((&ATTENTION, build), entry, shape, &args)
    }

    /// Experts of `n` tokens, or the weights of those that are forced, and how far the shared one opens: that
    /// too in the slot behind them, if there is one. Rows of logits are so far apart; where that is further than
    /// there are experts, what opens the shared one stands behind theirs.
    pub(super) fn route(
        &mut self,
        [ids, weights, margins, shared]: [&Buffer; 4],
        (logits, x, gate): (&Buffer, &Buffer, &Matrix),
        forced: Option<&Buffer>,
        (n, active, slots): (usize, usize, usize),
        [experts, of_row]: [usize; 2],
        renormalise: bool,
    ) -> Result<(), Error> {
        let args = [
            ("ids", at(ids)),
            ("weights", at(weights)),
            ("margins", at(margins)),
            ("shared", at(shared)),
            ("logits", at(logits)),
            ("forced", maybe(forced)),
            ("x", at(x)),
            ("gate", at(&gate.weights)),
            ("norm_topk_prob", Int(usize::from(renormalise))),
            ("of_row", Int(of_row)),
            ("N", Int(n)),
            ("A", Int(active)),
            ("SLOTS", Int(slots)),
            ("EXPERTS", Int(experts)),
            ("D", Int(gate.columns)),
        ];
        let threads = (64 * n).min(THREADS);
        let shape = ([(64 * n).div_ceil(threads.max(1)), 1, 1], threads, 0);
        self.engine("engine_route", Some(gate.stored), shape, &args)
    }

    /// What experts add up to.
    pub(super) fn experts(
        &mut self,
        o: &Buffer,
        (x, hidden): (&Buffer, &Buffer),
        experts: &Experts<'_>,
        n: usize,
    ) -> Result<(), Error> {
        let Experts { routed, shared } = *experts;
        let some = routed.map(|(all, ..)| all).or(shared.map(|(all, _)| all));
        let some = some.ok_or_else(|| Error::Compile("no experts".to_owned()))?;
        let alike = |all: &[Matrix; 3]| all.iter().all(|one| one.stored == some[0].stored);
        if !routed.is_none_or(|(all, ..)| alike(all)) || !shared.is_none_or(|(all, _)| alike(all)) {
            return Err(Error::Compile("projections of experts differ in type".to_owned()));
        }
        let (f, d, stored) = (some[0].rows, some[0].columns, some[0].stored);
        let (ids, weights, active) = routed
            .map_or((At(0), At(0), 0), |(_, ids, weights, active)| (at(ids), at(weights), active));
        let slots = active + usize::from(shared.is_some());
        let of = |all: Option<&[Matrix; 3]>, which: usize| {
            let one = all.map(|all| &all[which]);
            let scales = one.and_then(|one| one.scales.as_ref());
            (maybe(one.map(|one| &one.weights)), maybe(scales))
        };
        let (own, other) = (routed.map(|(all, ..)| all), shared.map(|(all, _)| all));
        let [(gate, gate_scales), (up, up_scales), (down, down_scales)] =
            [0, 1, 2].map(|i| of(own, i));
        let [shared_gate, shared_up, shared_down] = [0, 1, 2].map(|i| of(other, i));
        let args = [
            ("hidden", at(hidden)),
            ("x", at(x)),
            ("ids", ids),
            ("gate_proj", gate),
            ("gate_scales", gate_scales),
            ("up_proj", up),
            ("up_scales", up_scales),
            ("shared_gate_proj", shared_gate.0),
            ("shared_gate_scales", shared_gate.1),
            ("shared_up_proj", shared_up.0),
            ("shared_up_scales", shared_up.1),
            ("block_rows", Int(some[0].block[0])),
            ("block_cols", Int(some[0].block[1])),
            ("A", Int(active)),
            ("SLOTS", Int(slots)),
            ("F", Int(f)),
            ("D", Int(d)),
        ];
        let shape = ([f.div_ceil(WARPS), slots, n], THREADS, 0);
        self.engine("engine_experts_up", Some(stored), shape, &args)?;
        let opens = shared.and_then(|(_, opens)| opens);
        let args = [
            ("o", at(o)),
            ("hidden", at(hidden)),
            ("ids", ids),
            ("weights", weights),
            ("shared", maybe(opens)),
            ("down_proj", down),
            ("down_scales", down_scales),
            ("shared_down_proj", shared_down.0),
            ("shared_down_scales", shared_down.1),
            ("block_rows", Int(some[0].block[0])),
            ("block_cols", Int(some[0].block[1])),
            ("adds", Int(usize::from(active == 0 && opens.is_some()))),
            ("A", Int(active)),
            ("SLOTS", Int(slots)),
            ("F", Int(f)),
            ("D", Int(d)),
        ];
        let threads = 32 * slots.min(MOST_WARPS);
        let shape = ([d.div_ceil(ROWS), 1, n], threads, 4 * ROWS * slots);
        self.engine("engine_experts_down", Some(stored), shape, &args)
    }

    /// Rows `first ..` of `o`, of `d` bytes, `n` of them, become those of `x` `[M, D]`, in turn.
    pub(super) fn repeat(
        &mut self,
        (o, first): (&Buffer, usize),
        x: &Buffer,
        (n, m, d): (usize, usize, usize),
    ) -> Result<(), Error> {
        let args = [
            ("o", at(o)),
            ("x", at(x)),
            ("first", Int(first)),
            ("N", Int(n)),
            ("M", Int(m)),
            ("D", Int(d)),
        ];
        self.engine("engine_repeat", None, (each(n * d), THREADS, 0), &args)
    }

    /// Reads all of a buffer.
    pub(super) fn read(&mut self, o: &Buffer, x: &Buffer) -> Result<(), Error> {
        /// Enough to fill any GPU a few times.
        const BLOCKS: usize = 2048;
        let args = [("o", at(o)), ("x", at(x)), ("N", Int(x.len() / 16))];
        self.engine("engine_read", None, ([BLOCKS, 1, 1], THREADS, 0), &args)
    }
}

impl Heads {
    /// What kernels call keys and values: codes have names of their own.
    fn names(self) -> [&'static str; 2] {
        match self.kept {
            Stored::Fp8 => ["keys", "values"],
            _ => ["k", "v"],
        }
    }
}

impl Delta {
    fn sizes(self) -> [(&'static str, Arg); 5] {
        let Delta { hk, hv, k, v, taps } = self;
        [("HK", hk), ("HV", hv), ("K", k), ("V", v), ("TAPS", taps)].map(|(name, n)| (name, Int(n)))
    }
}

/// Where a buffer is.
fn at(buffer: &Buffer) -> Arg {
    At(buffer.address())
}

fn maybe(buffer: Option<&Buffer>) -> Arg {
    buffer.map_or(At(0), at)
}

/// Blocks of one thread for each of so many.
fn each(n: usize) -> [usize; 3] {
    [n.div_ceil(THREADS), 1, 1]
}
