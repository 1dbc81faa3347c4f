//! CUDA variants of `attention`.

use golden::{
    Claims, Dtype, Plan, Plant, Spec, Variant,
    ops::attention::{Attention, Case},
    plan::{Grid, Site},
};

use super::{
    entry::{Launch, MULTIPROCESSORS, Scratch, Sizes, pieces, threads},
    kernel::{CLAIMS, CUT_ANYWHERE, Cuda, any, chosen},
};
use crate::cpu::attention::{FP8_PLANTS, PLANTS, in_fp8};

/// Every CUDA variant, plainest first.
#[inline(never)]
pub fn variants() -> &'static [&'static dyn Variant<Attention>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<Attention>] = {
    let [one, four, eight, pairs_one, pairs_four, pairs_eight] = &DECODE;
    let [one_fp8, eight_fp8, pairs_one_fp8] = &DECODE_FP8;
    &[
        &NAIVE,
        &NAIVE_FP8,
        one,
        four,
        eight,
        pairs_one,
        pairs_four,
        pairs_eight,
        one_fp8,
        eight_fp8,
        pairs_one_fp8,
        &PREFILL,
        &PREFILL_PARTS,
        &PREFILL_FP8,
    ]
};

const NAIVE: Cuda<Attention> = Cuda {
    name: "cuda/naive",
    source: kernels::ATTENTION,
    launches: &[Launch::blocks("attention_naive", |n| [n.of("N") * n.of("HQ"), 1, 1])
        .threads(|_| 128)
        .sharing(|n| 4 * (2 * n.of("H") + 128))],
    scratch: &[],
    unfit: any,
    plan: |spec| Plan::stored(spec.dtype),
    claims: CUT_ANYWHERE,
    plants: &chosen(
        PLANTS,
        [
            "scale-missing",
            "scale-one-over-h",
            "mask-sees-next",
            "mask-hides-self",
            "cache-offset-ignored",
            "packed-as-one",
            "kv-head-modulo",
            "gate-missing",
            "gate-silu",
            "gate-overflows",
            "sum-not-rescaled",
            "maximum-not-subtracted",
            "probabilities-in-bf16",
            "scores-in-bf16",
        ],
    ),
};

/// The same over a cache in FP8.
const NAIVE_FP8: Cuda<Attention> = Cuda {
    name: "cuda/naive-fp8",
    launches: &[
        Launch::blocks("attention_keep_fp8", |n| threads(codes(n))),
        Launch::blocks("attention_naive_fp8", |n| [n.of("N") * n.of("HQ"), 1, 1])
            .threads(|_| 128)
            .sharing(|n| 4 * (2 * n.of("H") + 128)),
    ],
    scratch: &[Scratch::new("keys", codes), Scratch::new("values", codes)],
    plan: in_fp8,
    plants: FP8_PLANTS,
    ..NAIVE
};

/// Few queries of a sequence, `$each` together in a group, whose keys clusters of `$blocks` blocks share: how many
/// clusters depends on the batch.
macro_rules! decode {
    ($name:literal, $entry:literal, $each:literal queries, $blocks:literal blocks, $threads:literal threads,
     $shared:literal bytes, up to $most:literal, $plants:expr) => {
        Cuda {
            name: $name,
            source: kernels::hopper::ATTENTION_DECODE,
            launches: &[Launch::blocks($entry, |n| decode_grid(n, $each, $blocks))
                .threads(|_| $threads)
                .sharing(|_| $shared)],
            scratch: &[
                Scratch::new("parts", |n| decode_parts(n, $each, $blocks)),
                Scratch::zero("tickets", |n| decode_tickets(n, $each, $blocks)),
            ],
            unfit: |spec| few(spec, $most),
            plan,
            claims: Claims { batch_invariant: false, ..CLAIMS },
            plants: $plants,
        }
    };
}

#[rustfmt::skip]
const DECODE: [Cuda<Attention>; 6] = [
    decode!("cuda/decode1", "attention_decode_1", 1 queries, 8 blocks, 128 threads, 99_520 bytes, up to 1, &ONE_PLANTS),
    decode!("cuda/decode4", "attention_decode_4", 4 queries, 8 blocks, 256 threads, 185_088 bytes, up to 4, &HOPPER_PLANTS),
    decode!("cuda/decode8", "attention_decode_8", 8 queries, 8 blocks, 256 threads, 206_336 bytes, up to 64, &HOPPER_PLANTS),
    // Two blocks to a cluster: where there are many sequences.
    decode!("cuda/decode1-pairs", "attention_decode_pairs_1", 1 queries, 2 blocks, 128 threads, 99_520 bytes, up to 1, &ONE_PLANTS),
    decode!("cuda/decode4-pairs", "attention_decode_pairs_4", 4 queries, 2 blocks, 256 threads, 185_088 bytes, up to 4, &HOPPER_PLANTS),
    decode!("cuda/decode8-pairs", "attention_decode_pairs_8", 8 queries, 2 blocks, 256 threads, 206_336 bytes, up to 64, &HOPPER_PLANTS),
];

/// The same over a cache in FP8: half the bytes, and two blocks to a multiprocessor.
macro_rules! decode_fp8 {
    ($name:literal, $entry:literal, $each:literal queries, $clusters:ident of $blocks:literal blocks,
     $threads:literal threads, $shared:literal bytes, up to $most:literal) => {
        Cuda {
            name: $name,
            source: kernels::hopper::ATTENTION_DECODE_FP8,
            launches: &[
                Launch::blocks("attention_decode_fp8_keep", |n| threads(codes(n))),
                Launch::blocks($entry, |n| {
                    [$blocks * $clusters(n, $each, $blocks), n.of("HKV"), groups(n, $each)]
                })
                .threads(|_| $threads)
                .sharing(|_| $shared),
            ],
            scratch: &[
                Scratch::new("keys", codes),
                Scratch::new("values", codes),
                Scratch::new("parts", |n| parts(n, $each, $clusters(n, $each, $blocks))),
                Scratch::zero("tickets", |n| decode_tickets(n, $each, $blocks)),
            ],
            unfit: |spec| few(spec, $most),
            plan: fp8_plan,
            claims: Claims { batch_invariant: false, ..CLAIMS },
            plants: &HOPPER_FP8_PLANTS,
        }
    };
}

#[rustfmt::skip]
const DECODE_FP8: [Cuda<Attention>; 3] = [
    decode_fp8!("cuda/decode1-fp8", "attention_decode_fp8_1", 1 queries, crowded of 8 blocks, 128 threads, 99_520 bytes, up to 1),
    decode_fp8!("cuda/decode8-fp8", "attention_decode_fp8_8", 8 queries, clusters of 8 blocks, 256 threads, 173_568 bytes, up to 64),
    decode_fp8!("cuda/decode1-pairs-fp8", "attention_decode_fp8_pairs_1", 1 queries, crowded of 2 blocks, 128 threads, 99_520 bytes, up to 1),
];

/// Codes of keys, or of values.
fn codes(n: &Sizes) -> i64 {
    n.of("M") * n.of("HKV") * n.of("H")
}

/// Faults that show through what FP8 rounds, and those of its codes.
const HOPPER_FP8_PLANTS: [Plant; 8] = {
    let [scale, heads, gate, sum, fnuz, cut, page] = chosen(
        FP8_PLANTS,
        [
            "scale-missing",
            "kv-head-modulo",
            "gate-missing",
            "sum-not-rescaled",
            "fnuz-bias",
            "codes-cut",
            "page-as-stored",
        ],
    );
    let [.., last] = HOPPER_PLANTS;
    [scale, heads, gate, sum, last, fnuz, cut, page]
};

/// One query has no next key.
const ONE_PLANTS: [Plant; 6] = chosen(
    &HOPPER_PLANTS,
    [
        "scale-missing",
        "mask-hides-self",
        "kv-head-modulo",
        "gate-missing",
        "sum-not-rescaled",
        "last-part-dropped",
    ],
);

/// Many queries.
const PREFILL: Cuda<Attention> = Cuda {
    name: "cuda/prefill",
    source: kernels::hopper::ATTENTION_PREFILL,
    launches: &[prefill("attention_prefill").passing(&[("PARTS", |_| 1)])],
    scratch: &[Scratch::new("parts", |_| 0), Scratch::zero("tickets", |_| 8)],
    unfit,
    plan,
    claims: CLAIMS,
    plants: {
        // Without parts the last is not dropped.
        let [all @ .., _] = &HOPPER_PLANTS;
        all
    },
};

/// Many queries, whose keys several blocks share.
const PREFILL_PARTS: Cuda<Attention> = Cuda {
    name: "cuda/prefill-parts",
    launches: &[
        prefill("attention_prefill").passing(&[("PARTS", |_| PARTS)]),
        Launch::blocks("attention_join", |n| [n.of("N"), n.of("HKV"), 1])
            .passing(&[("PARTS", |_| PARTS)]),
    ],
    scratch: &[
        Scratch::new("parts", |n| (n.of("N") / 16 + n.of("S")) * n.of("HKV") * PARTS * 128 * 1040),
        Scratch::zero("tickets", |_| 8),
    ],
    plants: &HOPPER_PLANTS,
    ..PREFILL
};

/// Many queries over a cache in FP8.
const PREFILL_FP8: Cuda<Attention> = Cuda {
    name: "cuda/prefill-fp8",
    source: kernels::hopper::ATTENTION_PREFILL_FP8,
    launches: &[
        Launch::blocks("attention_prefill_fp8_keep", |n| threads(codes(n))),
        prefill("attention_prefill_fp8").passing(&[("PARTS", |_| 1)]),
    ],
    scratch: &[
        Scratch::new("keys", codes),
        Scratch::new("values", codes),
        Scratch::new("parts", |_| 0),
        Scratch::zero("tickets", |_| 8),
    ],
    plan: fp8_plan,
    plants: {
        let [scale, heads, gate, sum, _, fnuz, cut, page] = HOPPER_FP8_PLANTS;
        &[scale, heads, gate, sum, fnuz, cut, page]
    },
    ..PREFILL
};

const PARTS: i64 = 4;

const fn prefill(entry: &'static str) -> Launch {
    Launch::blocks(entry, |n| [n.of(MULTIPROCESSORS), 1, 1]).threads(|_| 384).sharing(|_| 229_632)
}

/// Probabilities meet values in bf16.
fn plan(spec: &Spec<Case>) -> Plan {
    Plan::stored(spec.dtype).truncated(16).round(Site::Probabilities, Grid::Bf16)
}

/// The same over a cache in FP8. Probabilities meet values in f16, not yet divided by their sum: of those that weigh
/// something less is lost than bf16 loses of the quotients, and f16 of these would have no room for small ones.
fn fp8_plan(spec: &Spec<Case>) -> Plan {
    in_fp8(spec).truncated(16).round(Site::Probabilities, Grid::Bf16)
}

const HOPPER_PLANTS: [Plant; 7] = {
    let [a, b, c, d, e, f] = chosen(
        PLANTS,
        [
            "scale-missing",
            "mask-sees-next",
            "mask-hides-self",
            "kv-head-modulo",
            "gate-missing",
            "sum-not-rescaled",
        ],
    );
    let last = Plant {
        name: "last-part-dropped",
        what: "of the parts into which keys are split the last is not joined",
        cite: "https://github.com/openvinotoolkit/openvino/pull/38034",
    };
    [a, b, c, d, e, f, last]
};

fn unfit(spec: &Spec<Case>) -> Option<&'static str> {
    let Case { hq, hkv, h, .. } = spec.case;
    let fits = spec.dtype == Dtype::Bf16 && h == 256 && hq == 8 * hkv;
    (!fits).then_some("is for bf16, heads of 256, eight queries' to a key's")
}

/// The same of kernels for so many tokens of a sequence.
fn few(spec: &Spec<Case>, most: usize) -> Option<&'static str> {
    let few = spec.case.t <= most && (!spec.is("packed") || 1 < most);
    unfit(spec).or((!few).then_some("is for fewer tokens"))
}

/// Groups of consecutive queries, of so many each, at the most.
fn groups(n: &Sizes, each: i64) -> i64 {
    n.of("S") * pieces(n.of("N"), each)
}

/// Clusters of so many blocks that share the keys of a group.
fn clusters(n: &Sizes, each: i64, blocks: i64) -> i64 {
    let groups = (groups(n, each) * n.of("HKV")).max(1);
    (n.of(MULTIPROCESSORS) / blocks / groups).clamp(1, 14)
}

/// The same where two blocks have room on a multiprocessor: of clusters of eight not all of them.
fn crowded(n: &Sizes, each: i64, blocks: i64) -> i64 {
    let (groups, room) =
        ((groups(n, each) * n.of("HKV")).max(1), 2 * n.of(MULTIPROCESSORS) / blocks);
    if blocks == 8 { ((room - 3) / groups).clamp(1, 15) } else { (room / groups).clamp(1, 28) }
}

fn decode_grid(n: &Sizes, each: i64, blocks: i64) -> [i64; 3] {
    [blocks * clusters(n, each, blocks), n.of("HKV"), groups(n, each)]
}

fn decode_parts(n: &Sizes, each: i64, blocks: i64) -> i64 {
    parts(n, each, clusters(n, each, blocks))
}

fn parts(n: &Sizes, each: i64, clusters: i64) -> i64 {
    groups(n, each) * n.of("HKV") * clusters * 8 * each * 1040
}

fn decode_tickets(n: &Sizes, each: i64, blocks: i64) -> i64 {
    groups(n, each) * n.of("HKV") * blocks * 4
}
