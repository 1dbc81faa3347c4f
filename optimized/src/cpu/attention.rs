//! CPU variants of `attention`.

use std::ops::Range;

use golden::{
    Dtype, Plan, Plant, Spec, Tensor1, Variant,
    ops::attention::{Attention, Case, Inputs, Outputs},
    packed::rows,
    plan::{Cache, Grid, Site},
};
use ndarray::Ix3;
use rayon::prelude::*;

use super::vector::variants;
use super::{
    activation::{overflowing_sigmoid, sigmoid, silu},
    linear::dots,
    portable::{Kernel, Planted, Portable, as_stored, pack, packed, unpacked},
    stored::{Stored, widen},
};
use fp8::InFp8;

pub(crate) mod fast;
mod fp8;
pub(crate) mod kept;
pub(crate) mod paired;

/// Every CPU variant, plainest first.
#[inline(never)]
pub fn variants() -> &'static [&'static dyn Variant<Attention>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<Attention>] = variants!(
    [
        &Portable::new("cpu/portable", pack!(Loaded), as_stored, PLANTS),
        &Portable::new("cpu/portable-fp8", pack!(InFp8), in_fp8, FP8_PLANTS),
    ],
    as_stored,
    VECTOR_PLANTS,
    paired: |spec| {
        let other = || format!("computes bf16 problems, not {}", spec.dtype);
        (spec.dtype != Dtype::Bf16).then(other)
    },
    |spec| {
        let plan = Plan { flush_to_zero: true, ..Plan::stored(spec.dtype) };
        let sites = [Site::Queries, Site::Keys, Site::Values, Site::Probabilities];
        sites.into_iter().fold(plan, |plan, site| plan.round(site, Grid::Bf16))
    },
    int8: |spec| {
        Plan { cache: Cache::Int8ByInt16, flush_to_zero: true, ..Plan::stored(spec.dtype) }
    },
    INT8_PLANTS
);

/// Those that the fast kernels can be told to have: `scale-one-over-h`, `gate-missing`.
#[cfg(target_arch = "x86_64")]
const VECTOR_PLANTS: &[Plant] = &[PLANTS[1], PLANTS[9]];

/// The same, and those of steps.
#[cfg(target_arch = "x86_64")]
const INT8_PLANTS: &[Plant] = &[
    PLANTS[1],
    PLANTS[9],
    Plant {
        name: "step-of-neighbour",
        what: "a row of keys or values in eight bits is scaled by the step of the token before it",
        cite: "https://github.com/vllm-project/vllm/issues/49716",
    },
    Plant {
        name: "value-step-missing",
        what: "values in eight bits are not scaled by their steps",
        cite: "https://github.com/flashinfer-ai/flashinfer/issues/4979",
    },
];

/// The plan of what keeps keys and values in FP8, and all else as a problem is stored.
pub(crate) fn in_fp8(spec: &Spec<Case>) -> Plan {
    Plan::stored(spec.dtype).round(Site::Keys, Grid::Fp8).round(Site::Values, Grid::Fp8)
}

/// Faults that show through what FP8 rounds, and that of its codes.
pub(crate) const FP8_PLANTS: &[Plant] = &[
    PLANTS[0],
    PLANTS[1],
    PLANTS[6],
    PLANTS[7],
    PLANTS[8],
    PLANTS[9],
    PLANTS[10],
    PLANTS[12],
    PLANTS[14],
    PLANTS[15],
    Plant {
        name: "fnuz-bias",
        what: "codes of keys and values are read as e4m3fnuz, whose exponents are biased by one more",
        cite: "https://github.com/vllm-project/vllm/issues/45562",
    },
    Plant {
        name: "codes-cut",
        what: "keys and values are cut to the bits of a code, not rounded to the nearest",
        cite: "https://github.com/ROCm/rocm-systems/pull/6877",
    },
    Plant {
        name: "page-as-stored",
        what: "the last page of 64 tokens is kept as it came, and its bytes are read as codes",
        cite: "https://github.com/vllm-project/vllm/pull/54338",
    },
];

pub(crate) const PLANTS: &[Plant] = &[
    Plant {
        name: "scale-missing",
        what: "scores are not divided by the root of the head's size",
        cite: "https://github.com/NVIDIA-NeMo/Megatron-Bridge/issues/1068",
    },
    Plant {
        name: "scale-one-over-h",
        what: "scores are divided by the head's size, not by its root",
        cite: "https://github.com/ggml-org/llama.cpp/issues/16095",
    },
    Plant {
        name: "scale-in-bf16",
        what: "the root of the head's size is rounded to bf16",
        cite: "https://github.com/huggingface/transformers/issues/46190",
    },
    Plant {
        name: "mask-sees-next",
        what: "a query sees one key too many",
        cite: "https://github.com/huggingface/transformers/issues/46773",
    },
    Plant {
        name: "mask-hides-self",
        what: "a query that sees several keys does not see its own",
        cite: "https://github.com/ml-explore/mlx-lm/issues/1736",
    },
    Plant {
        name: "first-key-forgotten",
        what: "a query that sees several keys does not see the first one",
        cite: "https://github.com/ml-explore/mlx-lm/issues/546",
    },
    Plant {
        name: "cache-offset-ignored",
        what: "the first new token sees the first key, as if nothing were cached",
        cite: "https://github.com/huggingface/transformers/issues/45513",
    },
    Plant {
        name: "packed-as-one",
        what: "a sequence sees all that are packed before it",
        cite: "https://github.com/huggingface/transformers/issues/44867",
    },
    Plant {
        name: "kv-head-modulo",
        what: "query head h reads key/value head h mod HKV in place of h / (HQ / HKV)",
        cite: "https://github.com/huggingface/transformers/issues/40963",
    },
    Plant {
        name: "gate-missing",
        what: "the output is not gated",
        cite: "https://github.com/ggml-org/llama.cpp/issues/16095",
    },
    Plant {
        name: "gate-silu",
        what: "the gate goes through SiLU in place of the sigmoid",
        cite: "https://github.com/ggml-org/llama.cpp/issues/16095",
    },
    Plant {
        name: "gate-in-bf16",
        what: "the gate's sigmoid is rounded to bf16, whatever the plan says",
        cite: "https://github.com/sgl-project/sglang/issues/38975",
    },
    Plant {
        name: "gate-overflows",
        what: "the sigmoid is taken as e^x / (1 + e^x)",
        cite: "https://github.com/ollama/ollama/issues/15865",
    },
    Plant {
        name: "gate-per-block",
        what: "the gate multiplies after every block of keys, so that early blocks are gated again and again",
        cite: "https://github.com/ggml-org/llama.cpp/issues/19324",
    },
    Plant {
        name: "sum-not-rescaled",
        what: "a new largest score rescales the sum of probabilities, but not that of values",
        cite: "https://github.com/ggml-org/llama.cpp/issues/23606",
    },
    Plant {
        name: "maximum-not-subtracted",
        what: "scores are exponentiated as they are",
        cite: "https://github.com/vllm-project/vllm/issues/52568",
    },
    Plant {
        name: "probabilities-in-bf16",
        what: "probabilities are rounded to bf16, whatever the plan says",
        cite: "https://github.com/huggingface/transformers/issues/46190",
    },
    Plant {
        name: "scores-in-bf16",
        what: "scores are rounded to bf16, whatever the plan says",
        cite: "https://github.com/huggingface/transformers/issues/46190",
    },
    Plant {
        name: "tail-unmasked",
        what: "the keys that fill up the last block of 64 count with a score of zero",
        cite: "https://github.com/vllm-project/vllm/issues/55766",
    },
    Plant {
        name: "tail-dropped",
        what: "a query that sees a whole block of 64 keys leaves out those past the last whole block",
        cite: "https://github.com/gittensor-ai-lab/sparkinfer/issues/604",
    },
];

/// A problem in memory.
struct Loaded<E> {
    case: Case,
    q: Vec<E>,
    k: Vec<E>,
    v: Vec<E>,
    gate: Option<Vec<E>>,
    cu_seqlens_q: Tensor1<i64>,
    cu_seqlens_k: Tensor1<i64>,
    queries: Vec<Range<usize>>,
    keys: Vec<Range<usize>>,
    o: Vec<E>,
}

impl<E: Stored> Loaded<E> {
    fn new(spec: &Spec<Case>, x: &Inputs) -> Self {
        Loaded {
            case: spec.case.clone(),
            q: packed(&x.q),
            k: packed(&x.k),
            v: packed(&x.v),
            gate: x.gate.as_ref().map(packed),
            cu_seqlens_q: x.cu_seqlens_q.clone(),
            cu_seqlens_k: x.cu_seqlens_k.clone(),
            queries: rows(&x.cu_seqlens_q),
            keys: rows(&x.cu_seqlens_k),
            o: vec![E::NAN; x.q.len()],
        }
    }
}

impl<E: Stored> Kernel<Attention> for Loaded<E> {
    fn poison(&mut self) {
        self.o.fill(E::NAN);
    }

    fn run(&mut self, plant: Planted) {
        let qkv = Qkv {
            q: &self.q,
            k: &self.k,
            v: &self.v,
            gate: self.gate.as_deref(),
            queries: &self.queries,
            keys: &self.keys,
            hq: self.case.hq,
            hkv: self.case.hkv,
            h: self.case.h,
        };
        attention(&mut self.o, &qkv, plant);
    }

    fn inputs(&self) -> Inputs {
        let Case { b, t, tk, hq, hkv, h } = self.case;
        Inputs {
            q: unpacked(&self.q, Ix3(b * t, hq, h)),
            k: unpacked(&self.k, Ix3(b * tk, hkv, h)),
            v: unpacked(&self.v, Ix3(b * tk, hkv, h)),
            gate: self.gate.as_ref().map(|gate| unpacked(gate, Ix3(b * t, hq, h))),
            cu_seqlens_q: self.cu_seqlens_q.clone(),
            cu_seqlens_k: self.cu_seqlens_k.clone(),
        }
    }

    fn outputs(&self) -> Outputs {
        let Case { b, t, hq, h, .. } = self.case;
        Outputs { o: unpacked(&self.o, Ix3(b * t, hq, h)) }
    }
}

/// What attention reads; keys and values may be stored in a type of their own.
pub(crate) struct Qkv<'a, E, C = E> {
    /// `[N, HQ, H]`.
    pub(crate) q: &'a [E],
    /// `[M, HKV, H]`.
    pub(crate) k: &'a [C],
    /// `[M, HKV, H]`.
    pub(crate) v: &'a [C],
    /// `[N, HQ, H]`.
    pub(crate) gate: Option<&'a [E]>,
    /// Rows of `q` of each sequence.
    pub(crate) queries: &'a [Range<usize>],
    /// Rows of `k` and `v` of each sequence, as many as it has queries or more.
    pub(crate) keys: &'a [Range<usize>],
    pub(crate) hq: usize,
    pub(crate) hkv: usize,
    pub(crate) h: usize,
}

/// Queries of a task: they read a block of keys together, in all heads that share it.
const QUERIES: usize = 8;

/// Keys of a block.
const KEYS: usize = 64;

/// `o_i = softmax_j(q_i k_j / sqrt(H)) v * sigmoid(gate_i)`, in one pass over the keys: a block of
/// scores at a time, and where a block raises the largest score, what was summed before is scaled
/// down.
///
/// Blocks start at the first key of the sequence, so that how a query is summed depends on its
/// position alone. `o`: `[N, HQ, H]`.
pub(crate) fn attention<E: Stored, C: Stored>(o: &mut [E], x: &Qkv<'_, E, C>, plant: Planted) {
    let faults = Faults::new(x.h, plant);
    tasks(o, x, plant).into_par_iter().for_each(|task| task.run(x, &faults));
}

/// One query of one head.
struct Query<'a, E> {
    /// Its row of `q`, `gate` and `o`: `token * HQ + head`.
    row: usize,
    /// The keys that it sees.
    seen: Range<usize>,
    /// `[H]`.
    o: &'a mut [E],
}

/// Queries that share keys: of a few tokens, all heads of one key/value head.
struct Task<'a, E> {
    queries: Vec<Query<'a, E>>,
    /// Their key/value head.
    head: usize,
    /// First key of their sequence.
    first: usize,
}

fn tasks<'a, E: Stored, C: Stored>(
    o: &'a mut [E],
    x: &Qkv<'_, E, C>,
    plant: Planted,
) -> Vec<Task<'a, E>> {
    let group = x.hq / x.hkv;
    let mut outputs = o.chunks_mut(x.h);
    let mut tasks = Vec::new();
    for (queries, keys) in x.queries.iter().zip(x.keys) {
        let first = if plant.is("packed-as-one") { 0 } else { keys.start };
        let before = keys.end - first - queries.len();
        for start in queries.clone().step_by(QUERIES) {
            let at = tasks.len();
            tasks.extend((0..x.hkv).map(|head| Task { queries: Vec::new(), head, first }));
            for token in start..(start + QUERIES).min(queries.end) {
                let seen = seen(token - queries.start, before, keys.end - first, plant);
                for (h, o) in outputs.by_ref().take(x.hq).enumerate() {
                    let head = if plant.is("kv-head-modulo") { h % x.hkv } else { h / group };
                    let seen = first + seen.start..first + seen.end;
                    tasks[at + head].queries.push(Query { row: token * x.hq + h, seen, o });
                }
            }
        }
    }
    tasks
}

/// The keys that new token `i` of a sequence of `all` keys sees after `before` cached ones.
fn seen(i: usize, before: usize, all: usize, plant: Planted) -> Range<usize> {
    let honest = before + i + 1;
    match plant.0 {
        Some("mask-sees-next") => 0..(honest + 1).min(all),
        Some("mask-hides-self") => 0..(honest - 1).max(1),
        Some("first-key-forgotten") => usize::from(1 < honest)..honest,
        Some("cache-offset-ignored") => 0..i + 1,
        Some("tail-dropped") if KEYS <= honest => 0..honest / KEYS * KEYS,
        _ => 0..honest,
    }
}

/// What is known of a query's softmax so far.
struct Softmax {
    max: f32,
    /// Sum of `exp(score - max)`.
    total: f32,
    /// `[H]` sum of `exp(score - max) v`.
    sum: Vec<f32>,
}

impl<E: Stored> Task<'_, E> {
    fn run<C: Stored>(self, x: &Qkv<'_, E, C>, faults: &Faults) {
        let h = x.h;
        let end = self.queries.iter().map(|query| query.seen.end).max().unwrap_or(0);
        let gather = |to: &mut Vec<f32>, from: &[C], block: &Range<usize>| {
            to.resize(block.len() * h, f32::NAN);
            for (to, j) in to.chunks_mut(h).zip(block.clone()) {
                let at = (j * x.hkv + self.head) * h;
                widen(to, &from[at..at + h]);
            }
        };
        let widened = |from: &[E], row: usize| -> Vec<f32> {
            from[row * h..(row + 1) * h].iter().map(|x| x.load()).collect()
        };
        let mut running: Vec<(Vec<f32>, Softmax)> = self
            .queries
            .iter()
            .map(|query| {
                let softmax = Softmax { max: f32::NEG_INFINITY, total: 0.0, sum: vec![0.0; h] };
                (widened(x.q, query.row), softmax)
            })
            .collect();
        let (mut k, mut v) = (Vec::new(), Vec::new());
        for start in (self.first..end).step_by(KEYS) {
            let block = start..(start + KEYS).min(end);
            gather(&mut k, x.k, &block);
            gather(&mut v, x.v, &block);
            for (query, (q, softmax)) in self.queries.iter().zip(&mut running) {
                let seen = query.seen.start.max(start)..query.seen.end.min(block.end);
                if !seen.is_empty() {
                    let inside = (seen.start - start) * h..(seen.end - start) * h;
                    softmax.add(q, &k[inside.clone()], &v[inside], faults);
                    let gate = || x.gate.map(|gate| widened(gate, query.row));
                    if let Some(gate) = faults.gate_per_block.then(gate).flatten() {
                        softmax
                            .sum
                            .iter_mut()
                            .zip(gate)
                            .for_each(|(sum, gate)| *sum *= sigmoid(gate));
                    }
                }
            }
        }
        for (query, (_, softmax)) in self.queries.into_iter().zip(running) {
            let gate = x.gate.filter(|_| !faults.gate_per_block);
            for (c, (o, sum)) in query.o.iter_mut().zip(&softmax.sum).enumerate() {
                let open = gate.map_or(1.0, |gate| (faults.open)(gate[query.row * h + c].load()));
                *o = E::store(sum / softmax.total * open);
            }
        }
    }
}

impl Softmax {
    /// Up to [`KEYS`] keys and their values, `[keys, H]` each.
    fn add(&mut self, q: &[f32], k: &[f32], v: &[f32], faults: &Faults) {
        let h = q.len();
        let mut scores = [0.0; KEYS];
        let scores = &mut scores[..k.len() / h];
        for (score, k) in scores.iter_mut().zip(k.chunks(h)) {
            let [dot] = dots([q], k);
            *score = (faults.score)(dot * faults.scale);
        }
        let max = scores.iter().copied().fold(self.max, f32::max);
        let max = if faults.keep_scores { 0.0 } else { max };
        // Of the first block nothing is kept: exp(-inf) = 0.
        let kept = (self.max - max).exp();
        self.max = max;
        self.total *= kept;
        if !faults.keep_sum {
            self.sum.iter_mut().for_each(|sum| *sum *= kept);
        }
        for (score, v) in scores.iter().zip(v.chunks(h)) {
            let p = (score - max).exp();
            self.total += p;
            let p = (faults.probability)(p);
            for (sum, v) in self.sum.iter_mut().zip(v) {
                *sum += p * v;
            }
        }
        if faults.fill_up {
            self.total += (KEYS - scores.len()) as f32 * (-max).exp();
        }
    }
}

/// What a planted fault changes of the computation of one query.
#[expect(clippy::struct_excessive_bools, reason = "one per fault, asked outside of loops")]
struct Faults {
    scale: f32,
    score: fn(f32) -> f32,
    probability: fn(f32) -> f32,
    open: fn(f32) -> f32,
    keep_scores: bool,
    keep_sum: bool,
    fill_up: bool,
    gate_per_block: bool,
}

impl Faults {
    fn new(h: usize, plant: Planted) -> Faults {
        let bf16: fn(f32) -> f32 = |x| Dtype::Bf16.round(x);
        let narrow = |name: &str| if plant.is(name) { bf16 } else { |x| x };
        Faults {
            scale: match plant.0 {
                Some("scale-missing") => 1.0,
                Some("scale-one-over-h") => 1.0 / h as f32,
                Some("scale-in-bf16") => Dtype::Bf16.round(1.0 / (h as f32).sqrt()),
                _ => 1.0 / (h as f32).sqrt(),
            },
            score: narrow("scores-in-bf16"),
            probability: narrow("probabilities-in-bf16"),
            open: match plant.0 {
                Some("gate-missing") => |_| 1.0,
                Some("gate-silu") => silu,
                Some("gate-in-bf16") => |gate| Dtype::Bf16.round(sigmoid(gate)),
                Some("gate-overflows") => overflowing_sigmoid,
                _ => sigmoid,
            },
            keep_scores: plant.is("maximum-not-subtracted"),
            keep_sum: plant.is("sum-not-rescaled"),
            fill_up: plant.is("tail-unmasked"),
            gate_per_block: plant.is("gate-per-block"),
        }
    }
}
