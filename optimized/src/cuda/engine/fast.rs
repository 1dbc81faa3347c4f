//! Kernels for Hopper in the places of plain ones: of a model in bf16 with the official sizes of heads.

use golden::Config;
use kernels::{Build, hopper};

use super::{
    Arg::{At, Float, Int},
    Delta, Element, Heads, Matrix, Ops, Stored, at, maybe,
};
use crate::cuda::{
    device::{Buffer, Error},
    gated_delta_rule::preparing,
    launch::Arg,
};

/// What kernels for Hopper are launched by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cuda) struct Fast {
    /// Of the device.
    pub(in crate::cuda) multiprocessors: usize,
}

/// Tokens that a matrix is multiplied with at the speed of memory.
pub(in crate::cuda) const FEW: usize = 8;
/// The same, four times as many.
const SOME: usize = 32;
/// Tokens whose experts are read one by one, be it that some have the same: of more it pays to sort them.
pub(in crate::cuda) const APART: usize = 64;
/// Shared memory of a block of the pipeline of products.
const TILE_SHARED: usize = 231_424;
/// Tokens of a chunk of the delta rule.
const CHUNK: usize = 64;
/// Bytes of a chunk and head in its workspace.
const PREPARED: usize = 17_408;
/// Experts that can be sorted by.
const MOST_EXPERTS: usize = 1024;
/// eps of the norms of queries and keys.
pub(super) const EPS: f32 = 1e-6;
/// Pairs of token and expert that are sorted together.
const PAIRS: usize = 1024;

/// Kernels that may start before what is before them has ended: each waits for it before it reads what others
/// write, weights and its own arguments apart; the walk of the delta rule before it ends, where it goes along with
/// the kernel that prepares, which is not among them.
const EARLY: [&str; 18] = [
    "attention_decode_1",
    "attention_decode_fp8_1",
    "engine_attention_in",
    "engine_attention_in_fp8",
    "engine_delta_in",
    "engine_delta_step",
    "engine_embedding",
    "engine_gated_norm",
    "engine_gather",
    "engine_norm",
    "engine_route",
    "gated_delta_rule_chunk_walk",
    "gated_delta_rule_few",
    "linear_gemv",
    "linear_gemv_32",
    "moe_experts_gemv_down",
    "moe_experts_gemv_up",
    "moe_router_gemv",
];

pub(super) fn starts_early(entry: &str) -> bool {
    EARLY.contains(&entry)
}

/// The room that tokens take while they are sorted by their experts.
pub(in crate::cuda) struct Sorted<'a> {
    pub(in crate::cuda) counts: &'a Buffer,
    pub(in crate::cuda) offsets: &'a Buffer,
    pub(in crate::cuda) tiles: &'a Buffer,
    pub(in crate::cuda) n_tiles: &'a Buffer,
    pub(in crate::cuda) order: &'a Buffer,
    pub(in crate::cuda) passed: &'a Buffer,
    pub(in crate::cuda) parts: &'a Buffer,
}

impl Fast {
    /// Why a model is not one that they are for, if so.
    pub(in crate::cuda) fn unfit(c: &Config, element: Element, target: &str) -> Option<String> {
        if target != "sm_90a" {
            return Some(format!("those for Hopper are of sm_90a, this GPU is {target}"));
        }
        if element != Element::Bf16 {
            return Some("those for Hopper are of activations in bf16".to_owned());
        }
        let (h, heads, kept) = (c.head_dim, c.num_attention_heads, c.num_key_value_heads);
        if h != 256 || heads != 8 * kept {
            return Some(format!(
                "those for Hopper are of 8 heads of 256 channels to a head of keys, this model has {heads} to \
                 {kept}, of {h}"
            ));
        }
        let delta = [c.linear_key_head_dim, c.linear_value_head_dim];
        if delta != [128, 128] {
            return Some(format!(
                "those for Hopper are of states of 128 by 128, this model's are {} by {}",
                delta[0], delta[1]
            ));
        }
        let columns = [
            c.hidden_size,
            c.linear_value_dim(),
            c.moe_intermediate_size,
            c.shared_expert_intermediate_size,
        ];
        if let Some(odd) = columns.iter().find(|n| !n.is_multiple_of(16)) {
            return Some(format!(
                "those for Hopper are of channels in multiples of 16, this model has {odd}"
            ));
        }
        let experts = c.num_experts;
        // One more is the shared one.
        (MOST_EXPERTS <= experts).then(|| {
            format!("those for Hopper are of fewer than {MOST_EXPERTS} experts, not {experts}")
        })
    }

    /// Tokens that are walked at once: as many as give every expert some tiles of them.
    pub(in crate::cuda) const PIECE: usize = 32_768;

    /// Whether they read a matrix.
    pub(in crate::cuda) fn reads(weight: &Matrix) -> bool {
        let known = match weight.stored {
            Stored::Bf16 => true,
            Stored::Fp8 => weight.block == [128, 128],
            Stored::F32 | Stored::F16 => false,
        };
        known && weight.columns.is_multiple_of(16)
    }

    /// Clusters of eight blocks that share the keys of a sequence: one block to a multiprocessor, of codes two, as far as
    /// all clusters have room at once.
    fn clusters(self, sequences: usize, hkv: usize, kept: Stored) -> usize {
        let groups = (sequences * hkv).max(1);
        match kept {
            Stored::Fp8 => ((self.multiprocessors / 4).saturating_sub(3) / groups).clamp(1, 15),
            _ => (self.multiprocessors / 8 / groups).clamp(1, 14),
        }
    }

    /// Bytes of the workspaces of attention: parts, and tickets that are zero between launches.
    pub(in crate::cuda) fn attention(self, sequences: usize, hkv: usize) -> [usize; 2] {
        let most = with_gaps(sequences);
        // Fewer sequences have more clusters each, and codes have the most.
        let parts = (1..=most).map(|s| s * hkv * self.clusters(s, hkv, Stored::Fp8) * 8 * 1040);
        [parts.max().unwrap_or(0), most * hkv * 8 * 4]
    }

    /// Bytes of the workspaces of the delta rule: records, and counts that are zero between launches.
    pub(in crate::cuda) fn delta(rows: usize, sequences: usize, hv: usize) -> [usize; 2] {
        [PREPARED, 4].map(|bytes| (rows / CHUNK + sequences) * hv * bytes)
    }

    /// Bytes of the rooms of [`Sorted`], in its order.
    pub(in crate::cuda) fn sorted(
        pairs: usize,
        experts: usize,
        (f, d): (usize, usize),
    ) -> [usize; 7] {
        // One more is the shared one.
        let experts = experts + 1;
        let counts = 4 * pairs.div_ceil(PAIRS) * experts;
        let tiles = 8 * (pairs.div_ceil(128) + experts);
        [counts, 4 * (experts + 1), tiles, 4, 4 * pairs, 2 * pairs * f, 2 * pairs * d]
    }
}

/// Sequences as attention sees them: a single one needs no gap behind it.
fn with_gaps(sequences: usize) -> usize {
    if sequences == 1 { 1 } else { 2 * sequences }
}

impl Ops<'_> {
    /// Whether products with a matrix are those of tensor cores.
    pub(in crate::cuda) fn reads(&self, weight: &Matrix) -> bool {
        self.fast.is_some() && Fast::reads(weight)
    }

    /// The same of one whose results stay in f32.
    pub(super) fn decides(&self, weight: &Matrix) -> bool {
        self.reads(weight) && weight.stored == Stored::Bf16 && 1 < weight.rows
    }

    /// Whether attention of so many heads is one for Hopper: eight of queries to one of keys.
    pub(super) fn attends(&self, c: Heads) -> bool {
        self.fast.is_some() && c.hq == 8 * c.hkv
    }

    fn multiprocessors(&self) -> usize {
        self.fast.map_or(1, |fast| fast.multiprocessors)
    }

    fn of(weight: &Matrix) -> Build {
        Build { activations: "bf16", weights: Some(weight.stored.name()) }
    }

    /// A projection of `n` tokens.
    pub(super) fn fast_linear(
        &mut self,
        o: &Buffer,
        x: &Buffer,
        weight: &Matrix,
        n: usize,
    ) -> Result<(), Error> {
        let (m, d) = (weight.rows, weight.columns);
        let args = [
            ("o", at(o)),
            ("x", at(x)),
            ("pieces", At(0)),
            ("weight", at(&weight.weights)),
            ("weight_scales", maybe(weight.scales.as_ref())),
            ("N", Int(n)),
            ("M", Int(m)),
            ("D", Int(d)),
        ];
        let few: Vec<_> = args.iter().copied().filter(|(name, _)| *name != "pieces").collect();
        let source = (&hopper::LINEAR, Self::of(weight));
        let codes = weight.stored == Stored::Fp8;
        if n <= FEW {
            let threads = if 6400 <= m { 128 } else { 512 };
            let tiles = m.div_ceil(16);
            let blocks = if codes && 12_288 <= m { tiles.div_ceil(2) } else { tiles };
            let shape = ([blocks, n.div_ceil(FEW), 1], threads, threads * 144);
            return self.launch(source, "linear_gemv", shape, &few);
        }
        if n <= SOME {
            let shape = ([m.div_ceil(16), n.div_ceil(SOME), 1], 256, 256 * (128 + 64));
            return self.launch(source, "linear_gemv_32", shape, &few);
        }
        let shape = ([self.multiprocessors(), 1, 1], tile_threads(codes), TILE_SHARED);
        self.launch(source, "linear_gemm", shape, &args)
    }

    /// A projection of `n` tokens in f32.
    pub(super) fn fast_decision(
        &mut self,
        o: &Buffer,
        x: &Buffer,
        weight: &Matrix,
        n: usize,
    ) -> Result<(), Error> {
        let args = [
            ("logits", at(o)),
            ("x", at(x)),
            ("weight", at(&weight.weights)),
            ("N", Int(n)),
            ("D", Int(weight.columns)),
            ("EXPERTS", Int(weight.rows)),
        ];
        let source = (&hopper::MOE_ROUTER, Build { activations: "bf16", weights: None });
        // Few rows are few tiles, however many tokens.
        let large = 6400 <= weight.rows;
        if n <= if large { FEW } else { APART } {
            let threads = if large { 128 } else { 512 };
            let shape = ([weight.rows.div_ceil(16), n.div_ceil(FEW), 1], threads, 144 * threads);
            return self.launch(source, "moe_router_gemv", shape, &args);
        }
        let shape = ([self.multiprocessors(), 1, 1], tile_threads(false), TILE_SHARED);
        self.launch(source, "moe_router_gemm", shape, &args)
    }

    /// Experts of many tokens, sorted by them; in E.
    pub(in crate::cuda) fn fast_experts(
        &mut self,
        o: &Buffer,
        x: &Buffer,
        (all, experts): (&[Matrix; 3], usize),
        (ids, weights): (&Buffer, &Buffer),
        (n, active): (usize, usize),
        room: &Sorted<'_>,
    ) -> Result<(), Error> {
        let [gate, up, down] = all;
        let (f, d) = (gate.rows, gate.columns);
        let source = (&hopper::MOE_EXPERTS, Self::of(gate));
        let chunks = (n * active).div_ceil(PAIRS);
        let sizes = [("N", Int(n)), ("A", Int(active))];
        let of = [("EXPERTS", Int(experts))];
        let args = [("counts", at(room.counts)), ("ids", at(ids))];
        let args = [&args[..], &sizes, &of].concat();
        self.launch(source, "moe_experts_count", ([chunks, 1, 1], 512, 4 * experts), &args)?;
        let args = [
            ("offsets", at(room.offsets)),
            ("tiles", at(room.tiles)),
            ("n_tiles", at(room.n_tiles)),
            ("counts", at(room.counts)),
        ];
        let args = [&args[..], &sizes, &of].concat();
        self.launch(source, "moe_experts_offsets", ([1, 1, 1], 1024, 0), &args)?;
        let args = [
            ("order", at(room.order)),
            ("offsets", at(room.offsets)),
            ("counts", at(room.counts)),
            ("ids", at(ids)),
        ];
        let args = [&args[..], &sizes, &of].concat();
        self.launch(source, "moe_experts_place", ([chunks, 1, 1], 512, 0), &args)?;
        let shape =
            ([self.multiprocessors(), 1, 1], tile_threads(gate.stored == Stored::Fp8), TILE_SHARED);
        let sorted = [
            ("passed", at(room.passed)),
            ("order", at(room.order)),
            ("offsets", at(room.offsets)),
            ("tiles", at(room.tiles)),
            ("n_tiles", at(room.n_tiles)),
            ("D", Int(d)),
            ("F", Int(f)),
        ];
        let args = [
            ("x", at(x)),
            ("pieces", At(0)),
            ("gate_proj", at(&gate.weights)),
            ("gate_proj_scales", maybe(gate.scales.as_ref())),
            ("up_proj", at(&up.weights)),
            ("up_proj_scales", maybe(up.scales.as_ref())),
        ];
        let args = [&args[..], &sorted, &sizes].concat();
        self.launch(source, "moe_experts_gemm_up", shape, &args)?;
        let args = [
            ("parts", at(room.parts)),
            ("down_proj", at(&down.weights)),
            ("down_proj_scales", maybe(down.scales.as_ref())),
        ];
        let args = [&args[..], &sorted, &sizes].concat();
        self.launch(source, "moe_experts_gemm_down", shape, &args)?;
        let args = [
            ("o", at(o)),
            ("parts", at(room.parts)),
            ("weights", at(weights)),
            ("D", Int(d)),
            ("A", Int(active)),
        ];
        self.launch(source, "moe_experts_combine", ([n, 1, 1], 256, 0), &args)
    }

    /// Experts of a few tokens, each of which is read for its token; in E.
    pub(in crate::cuda) fn few_experts(
        &mut self,
        o: &Buffer,
        (x, hidden): (&Buffer, &Buffer),
        all: &[Matrix; 3],
        (ids, weights): (&Buffer, &Buffer),
        (n, active): (usize, usize),
    ) -> Result<(), Error> {
        /// Threads that `moe_experts_gemv_down` can have.
        const MOST: usize = 704;
        let [gate, up, down] = all;
        let (f, d) = (gate.rows, gate.columns);
        let source = (&hopper::MOE_EXPERTS, Self::of(gate));
        let sizes = [("D", Int(d)), ("A", Int(active)), ("F", Int(f))];
        let between = [("hidden", at(hidden)), ("ids", at(ids))];
        let args = [
            ("x", at(x)),
            ("gate_proj", at(&gate.weights)),
            ("gate_proj_scales", maybe(gate.scales.as_ref())),
            ("up_proj", at(&up.weights)),
            ("up_proj_scales", maybe(up.scales.as_ref())),
        ];
        let args = [&args[..], &between, &sizes].concat();
        let shape = ([f.div_ceil(8), n * active, 1], 128, 16_384);
        self.launch(source, "moe_experts_gemv_up", shape, &args)?;
        let args = [
            ("o", at(o)),
            ("weights", at(weights)),
            ("down_proj", at(&down.weights)),
            ("down_proj_scales", maybe(down.scales.as_ref())),
        ];
        let args = [&args[..], &between, &sizes].concat();
        let threads = (if n == 1 { 64 } else { 32 } * active).min(MOST);
        let shape = ([d.div_ceil(16), n, 1], threads, 128 * (threads + active));
        self.launch(source, "moe_experts_gemv_down", shape, &args)
    }

    /// Whether experts are read by kernels for Hopper.
    pub(in crate::cuda) fn takes(&self, all: &[Matrix; 3]) -> bool {
        all.iter().all(|one| self.reads(one) && one.stored == all[0].stored)
    }

    /// The delta rule: one token of each sequence, or chunks.
    pub(super) fn fast_delta(
        &mut self,
        (o, state, [work, ready]): (&Buffer, &Buffer, [&Buffer; 2]),
        [q, k, v, g, beta]: [&Buffer; 5],
        cu: Arg,
        (n, s, one_each): (usize, usize, bool),
        c: Delta,
    ) -> Result<(), Error> {
        let build = Build { activations: "bf16", weights: None };
        let heads = [("HK", Int(c.hk)), ("HV", Int(c.hv)), ("cu_seqlens", cu)];
        let reads = [("q", at(q)), ("k", at(k)), ("beta", at(beta))];
        let states =
            [("o", at(o)), ("state_out", at(state)), ("state_in", at(state)), ("v", at(v))];
        let gates = [("g", at(g)), ("eps", Float(EPS))];
        if one_each {
            let args = [&heads[..], &reads, &states, &gates].concat();
            let source = (&hopper::GATED_DELTA_RULE_FEW, build);
            return self.launch(source, "gated_delta_rule_few", ([s * c.hv, 4, 1], 128, 0), &args);
        }
        // Where heads leave no multiprocessor without work, all of it is done at once.
        if self.multiprocessors() < 2 * s * c.hv {
            let args = [&heads[..], &reads, &states, &gates].concat();
            let source = (&hopper::GATED_DELTA_RULE_FUSED, build);
            let shape = ([s * c.hv, 1, 1], 512, 228_352);
            return self.launch(source, "gated_delta_rule_fused", shape, &args);
        }
        let source = (&hopper::GATED_DELTA_RULE, build);
        let records = [("work", at(work)), ("ready", at(ready))];
        let args = [&heads[..], &reads, &gates, &[("S", Int(s))]].concat();
        let ahead = preparing(self.multiprocessors() as i64, (s * c.hv) as i64) as usize;
        if ahead == 0 {
            let grid = [c.hk, n / CHUNK + s, (c.hv / c.hk).div_ceil(2)];
            let args = [&args[..], &records[..1]].concat();
            self.launch(source, "gated_delta_rule_chunk_prepare", (grid, 256, 66_560), &args)?;
        } else {
            let shape = ([ahead, 1, 1], 768, 199_680);
            let args = [&args[..], &records].concat();
            self.launch(source, "gated_delta_rule_chunk_ahead", shape, &args)?;
        }
        let along = [("along", Int(usize::from(0 < ahead)))];
        let args = [&heads[..], &reads[..2], &states, &records, &along].concat();
        let shape = ([s * c.hv, 2, 1], 384, 185_344);
        self.launch(source, "gated_delta_rule_chunk_walk", shape, &args)
    }

    /// Whether what is between the projections of a layer is one launch, of one token of each sequence.
    pub(in crate::cuda) fn steps(&self, ba: &Matrix, c: Delta) -> bool {
        let heads = c.hv == 2 * c.hk && c.taps == 4;
        heads && self.reads(ba) && ba.stored == Stored::Bf16
    }

    /// From the wide projection of one token of each sequence, and what the narrow one reads, to the gated norm;
    /// windows and states go on where they are.
    pub(in crate::cuda) fn delta_step(
        &mut self,
        (o, state, window): (&Buffer, &Buffer, &Buffer),
        (projected, x, ba): (&Buffer, &Buffer, &Matrix),
        [conv, a_log, dt_bias, norm]: [&Buffer; 4],
        (s, norm_eps): (usize, f32),
        c: Delta,
    ) -> Result<(), Error> {
        let args = [
            ("o", at(o)),
            ("state_out", at(state)),
            ("window", at(window)),
            ("projected", at(projected)),
            ("x", at(x)),
            ("ba", at(&ba.weights)),
            ("conv", at(conv)),
            ("a_log", at(a_log)),
            ("dt_bias", at(dt_bias)),
            ("norm", at(norm)),
            ("eps", Float(EPS)),
            ("norm_eps", Float(norm_eps)),
            ("HK", Int(c.hk)),
            ("D", Int(ba.columns)),
        ];
        let source = (&hopper::ENGINE_DELTA, Build { activations: "bf16", weights: None });
        self.launch(source, "engine_delta_step", ([8, c.hk, s], 128, 0), &args)
    }

    /// Attention: one query of each sequence, or many.
    pub(super) fn fast_attention(
        &mut self,
        o: &Buffer,
        [q, k, v, gate, parts, tickets]: [&Buffer; 6],
        (cu_q, cu_k): (Arg, Arg),
        (s, one_each): (usize, bool),
        c: Heads,
    ) -> Result<(), Error> {
        let sequences = with_gaps(s);
        let [keys, values] = c.names();
        let args = [
            ("o", at(o)),
            ("q", at(q)),
            (keys, at(k)),
            (values, at(v)),
            ("gate", at(gate)),
            ("cu_seqlens_q", cu_q),
            ("cu_seqlens_k", cu_k),
            ("parts", at(parts)),
            ("tickets", at(tickets)),
            ("S", Int(sequences)),
            ("HKV", Int(c.hkv)),
        ];
        let build = Build { activations: "bf16", weights: None };
        if one_each {
            let clusters = self.fast.map_or(1, |fast| fast.clusters(sequences, c.hkv, c.kept));
            let shape = ([8 * clusters, c.hkv, sequences], 128, 99_520);
            let (source, entry) = match c.kept {
                Stored::Fp8 => (&hopper::ATTENTION_DECODE_FP8, "attention_decode_fp8_1"),
                _ => (&hopper::ATTENTION_DECODE, "attention_decode_1"),
            };
            return self.launch((source, build), entry, shape, &args);
        }
        let args = [&args[..], &[("PARTS", Int(1))]].concat();
        let shape = ([self.multiprocessors(), 1, 1], 384, 229_632);
        let (source, entry) = match c.kept {
            Stored::Fp8 => (&hopper::ATTENTION_PREFILL_FP8, "attention_prefill_fp8"),
            _ => (&hopper::ATTENTION_PREFILL, "attention_prefill"),
        };
        self.launch((source, build), entry, shape, &args)
    }
}

/// Threads of a block of the pipeline; where weights are codes, two more warps in four write them out.
fn tile_threads(codes: bool) -> usize {
    if codes { 512 } else { 384 }
}

#[cfg(test)]
mod tests {
    use kernels::sources;

    use super::{EARLY, starts_early};

    #[test]
    fn what_starts_early_waits() {
        for entry in EARLY {
            let texts: Vec<String> = sources().map(kernels::Source::text).collect();
            let head = format!(" {entry}(\n");
            let text = texts.iter().find_map(|text| text.split_once(&head)).unwrap().1;
            let body = text.split("\n}\n").next().unwrap();
            // Those that call one of these wait in there.
            let waits = ["wait_for_previous()", "gemv<", "gather(", "decode<", "attention_in("];
            assert!(waits.iter().any(|wait| body.contains(wait)), "{entry}");
        }
        // The walk reads what is before this one, without waiting for it.
        assert!(!starts_early("gated_delta_rule_chunk_ahead"));
    }
}
