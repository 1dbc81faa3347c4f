//! What the engine calls, one op at a time: at the sizes of the official model, over weights, caches and
//! states as the engine holds them, ready to be run again and again.
//!
//! What claims the pace of memory goes through more of it than caches hold, as a model of 48 layers
//! does: one state, cache or set of weights after the other. Who times a piece decides how.

use golden::{
    Dtype, Narrow, Op, Spec,
    ops::{
        attention::{self, Attention},
        gated_delta_rule::{self, GatedDeltaRule},
        linear::{self, Linear},
        moe_experts::{self, MoeExperts},
        moe_router::{self, MoeRouter},
    },
};

use super::{attention::kept::Kept, roof::Work};

mod prepare;

/// Hidden size.
const D: usize = 2048;
/// Key heads of the delta rule, and value heads.
const HK: usize = 16;
const HV: usize = 32;
/// Channels of its keys, and of its values.
const K: usize = 128;
const V: usize = 128;
/// Taps of the convolution.
const W: usize = 4;
/// Query heads of attention, key/value heads, their channels, and how many of these are turned.
const HQ: usize = 16;
const HKV: usize = 2;
const H: usize = 256;
const TURNED: usize = 64;
/// Experts, those of a token, and their width.
const E: usize = 512;
const A: usize = 10;
const F: usize = 512;
/// Rows of the largest projection, `in_proj_qkvz`.
const QKVZ: usize = 2 * HK * K + 2 * HV * V;
/// Tokens that the vocabulary has.
const VOCABULARY: usize = 151_936;

/// The least that one call has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// Bytes that come from memory and stay as they are.
    pub read: u64,
    /// Bytes that come from memory and go back changed; counted once.
    pub changed: u64,
    /// Operations, a multiplication and an addition being two; none where they are not what sets the pace.
    pub operations: u64,
    /// What they are made of.
    pub word: Work,
}

/// An op at one size, in one format.
#[derive(Clone, Debug)]
pub struct Piece {
    /// Its name; that of a part of an op where the engine has it as a part.
    pub op: &'static str,
    /// Tokens, and what else there is to say of the size.
    pub case: String,
    /// What weights, caches or states are kept in.
    pub format: &'static str,
    /// Tokens of a call.
    pub tokens: usize,
    /// What a call has to do.
    pub cost: Cost,
    kind: Kind,
}

/// What leaves its answer in the slice.
type Call = Box<dyn FnMut(&mut [f32])>;

/// A piece in memory.
pub struct Prepared {
    o: Vec<f32>,
    run: Call,
}

impl Prepared {
    /// One call.
    pub fn run(&mut self) {
        (self.run)(&mut self.o);
    }

    /// Whether the last call answered with numbers, and not with zeros alone.
    pub fn answered(&self) -> bool {
        self.o.iter().all(|o| o.is_finite()) && self.o.iter().any(|&o| o != 0.0)
    }
}

/// What is run.
#[derive(Clone, Copy, Debug)]
enum Kind {
    DeltaRule,
    Mix,
    Convolution,
    Attention { depth: usize, kept: Kept },
    Experts(Format),
    Linear(Format, usize),
    Router,
    Norm,
    GatedNorm,
    Rope,
}

/// What weights are kept in, and with it what their products read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    /// bf16, activations in f32: routers and gates, and everything in the engine's `f32`.
    Wide,
    Bf16,
    Fp8,
    Int8,
    Int4,
}

impl Format {
    const ALL: [Format; 5] = [Format::Wide, Format::Bf16, Format::Fp8, Format::Int8, Format::Int4];

    fn name(self) -> &'static str {
        match self {
            Format::Wide => "bf16*f32",
            Format::Bf16 => "bf16",
            Format::Fp8 => "fp8",
            Format::Int8 => "int8",
            Format::Int4 => "int4",
        }
    }

    fn word(self) -> Work {
        match self {
            Format::Wide => Work::F32,
            Format::Bf16 | Format::Fp8 => Work::Bf16,
            Format::Int8 | Format::Int4 => Work::Int8,
        }
    }

    /// A matrix in it, as a problem.
    fn spec(self, tokens: usize, rows: usize, d: usize) -> Spec<linear::Case> {
        let spec = Spec::new(linear::Case { n: tokens, m: rows, d }).dtype(Dtype::Bf16);
        match self {
            Format::Wide | Format::Bf16 => spec,
            Format::Fp8 => spec.weights(Narrow::Fp8),
            Format::Int8 => spec.weights(Narrow::Int8),
            Format::Int4 => spec.weights(Narrow::Int4),
        }
    }

    fn bytes(self, rows: usize, d: usize) -> u64 {
        self.spec(1, rows, d).weight_bytes(rows as u64, d as u64)
    }
}

/// Every piece, op by op.
pub fn pieces() -> Vec<Piece> {
    let mut all = Vec::new();
    for tokens in [1, 512, 4096] {
        all.push(delta_rule(tokens));
    }
    all.extend([1, 512].map(mix));
    for kept in [Kept::Bf16, Kept::Int8, Kept::F32] {
        for depth in [1 << 10, 1 << 13, 1 << 15] {
            all.push(attention(1, depth, kept));
        }
        for depth in [0, 1 << 14] {
            all.push(attention(512, depth, kept));
        }
    }
    for tokens in [1, 512] {
        // In the engine's f32 experts are what projections are.
        all.extend(Format::ALL.into_iter().skip(1).map(|format| experts(tokens, format)));
    }
    for tokens in [1, 512] {
        all.extend(Format::ALL.map(|format| projection("linear", tokens, QKVZ, format)));
    }
    // What chooses the token keeps eight bits in int4.
    all.extend(
        [Format::Bf16, Format::Int8].map(|format| projection("lm_head", 1, VOCABULARY, format)),
    );
    all.extend([1, 512].map(router));
    let row = |bytes: usize| bytes as u64 * size_of::<f32>() as u64;
    for tokens in [1, 512] {
        let n = |bytes| if tokens == 1 { 0 } else { tokens as u64 * row(bytes) };
        let x = 2 * HK * K + HV * V;
        all.push(passing("causal_conv1d", tokens, (n(x), 0), Kind::Convolution));
        all.push(passing("rms_norm", tokens, (n(D), n(D)), Kind::Norm));
        all.push(passing("rms_norm_gated", tokens, (n(HV * V), n(HV * V)), Kind::GatedNorm));
        all.push(passing("rope", tokens, (0, n(HQ * TURNED)), Kind::Rope));
    }
    all
}

fn of_tokens(tokens: usize) -> String {
    if tokens == 1 { "1 token".to_owned() } else { format!("{tokens} tokens") }
}

/// Bytes of the delta rule's states in a layer.
const STATES: usize = HV * K * V * size_of::<f32>();

fn delta_rule(tokens: usize) -> Piece {
    let case = gated_delta_rule::Case { b: 1, t: tokens, hk: HK, hv: HV, k: K, v: V };
    let operations = GatedDeltaRule::cost(&Spec::new(case)).flops;
    let changed = if tokens == 1 { STATES as u64 } else { 0 };
    Piece {
        op: "gated_delta_rule",
        case: of_tokens(tokens),
        format: "f32",
        tokens,
        cost: Cost { read: 0, changed, operations, word: Work::F32 },
        kind: Kind::DeltaRule,
    }
}

/// The delta rule with what stands before and behind it between the projections, in one pass.
fn mix(tokens: usize) -> Piece {
    let mut piece = Piece { op: "gdn_layer.mix", kind: Kind::Mix, ..delta_rule(tokens) };
    let channels = 2 * HK * K + HV * V;
    piece.cost.operations += (tokens * (channels * (2 * W + 5) + HV * V * 9)) as u64;
    if tokens == 1 {
        piece.cost.changed += ((W - 1) * channels * size_of::<f32>()) as u64;
        piece.cost.read += (W * channels * size_of::<f32>()) as u64;
    }
    piece
}

fn attention(tokens: usize, depth: usize, kept: Kept) -> Piece {
    let tk = if tokens == 1 { depth } else { depth + tokens };
    let case = attention::Case { b: 1, t: tokens, tk, hq: HQ, hkv: HKV, h: H };
    let word = match kept {
        Kept::F32 => Work::F32,
        Kept::Bf16 => Work::Bf16,
        Kept::Int8 => Work::Int16,
    };
    let read = if tokens == 1 { (tk * kept.token(HKV, H)) as u64 } else { 0 };
    Piece {
        op: "attention",
        case: format!("{}, depth {depth}", of_tokens(tokens)),
        format: kept.name(),
        tokens,
        cost: Cost { read, changed: 0, operations: Attention::cost(&Spec::new(case)).flops, word },
        kind: Kind::Attention { depth: tk, kept },
    }
}

fn experts(tokens: usize, format: Format) -> Piece {
    let case = moe_experts::Case { n: tokens, d: D, e: E, a: A, f: F };
    // Tokens take experts in turn.
    let used = E.min(tokens * A) as u64;
    let read = used * (2 * format.bytes(F, D) + format.bytes(D, F));
    let operations = MoeExperts::cost(&Spec::new(case)).flops;
    Piece {
        op: "moe_experts",
        case: format!("{}, {A} of {E}", of_tokens(tokens)),
        format: format.name(),
        tokens,
        cost: Cost { read, changed: 0, operations, word: format.word() },
        kind: Kind::Experts(format),
    }
}

fn projection(op: &'static str, tokens: usize, rows: usize, format: Format) -> Piece {
    let operations = Linear::cost(&format.spec(tokens, rows, D)).flops;
    let read = if tokens == 1 { format.bytes(rows, D) } else { 0 };
    Piece {
        op,
        case: format!("{}, {rows}x{D}", of_tokens(tokens)),
        format: format.name(),
        tokens,
        cost: Cost { read, changed: 0, operations, word: format.word() },
        kind: Kind::Linear(format, rows),
    }
}

fn router(tokens: usize) -> Piece {
    let format = Format::Wide;
    let operations =
        MoeRouter::cost(&Spec::new(moe_router::Case { n: tokens, d: D, e: E, a: A })).flops;
    let read = if tokens == 1 { format.bytes(E, D) } else { 0 };
    Piece {
        op: "moe_router",
        case: format!("{}, {A} of {E}", of_tokens(tokens)),
        format: format.name(),
        tokens,
        cost: Cost { read, changed: 0, operations, word: format.word() },
        kind: Kind::Router,
    }
}

/// What does little with much: only memory bounds it, and of one token nothing does.
fn passing(op: &'static str, tokens: usize, (read, changed): (u64, u64), kind: Kind) -> Piece {
    Piece {
        op,
        case: of_tokens(tokens),
        format: "f32",
        tokens,
        cost: Cost { read, changed, operations: 0, word: Work::F32 },
        kind,
    }
}
