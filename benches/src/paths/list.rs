//! Which paths there are.

use golden::{Config, Set};

use super::{Before, Draft, Options, Order, Parity, Path, Wrong};
use crate::registry::Parsed;

/// A problem whose sequences are fed.
pub(super) struct Case {
    pub(super) spec: String,
    /// Whether the plain reference would take too long.
    pub(super) only_variants: bool,
}

/// Lengths at which something begins, ends or repeats.
const LADDER: &[usize] = &[1, 2, 3, 63, 64, 65, 127, 128, 129, 273, 1000, 4096, 16384, 65536];

/// Longest ladder of an op whose work grows with the square of the length.
const QUADRATIC: usize = 4096;

/// The problems of an op whose tokens form sequences; none for the others.
pub(super) fn specs(op: &str, options: &Options) -> Vec<Case> {
    // One long sequence, packed ones, and what else is drawn; `{T}` is filled in.
    let (small, others, official): (&str, &[&str], &str) = match op {
        "causal_conv1d" => (
            "B1-T{T}-C10-W4",
            &["B8-T26-C10-W4", "B1-T141-C6-W3;dtype=bf16", "B1-T141-C10-W4;fill=fresh"],
            "B1-T{T}-C512-W4",
        ),
        "gated_delta_rule" => (
            "B1-T{T}-HK2-HV6-K8-V6",
            &[
                "B8-T26-HK2-HV6-K8-V6",
                "B1-T141-HK1-HV2-K8-V8;dtype=bf16",
                "B1-T141-HK2-HV4-K8-V6;fill=mixed-gates",
                "B1-T141-HK2-HV4-K8-V6;fill=remember",
                "B1-T141-HK2-HV4-K8-V6;fill=fresh",
            ],
            "B1-T{T}-HK1-HV2-K128-V128",
        ),
        "attention" => (
            "B1-T{T}-TK{T}-HQ4-HKV2-H8",
            &[
                "B8-T26-TK26-HQ4-HKV2-H8",
                "B1-T77-TK141-HQ4-HKV2-H8",
                "B1-T141-TK141-HQ4-HKV2-H8;dtype=bf16",
                "B1-T141-TK141-HQ4-HKV2-H8;fill=sharp",
            ],
            "B1-T{T}-TK{T}-HQ8-HKV1-H256",
        ),
        "gdn_layer" => (
            "B1-T{T}-D16-HK2-HV6-K8-V4-W4",
            &["B8-T26-D16-HK2-HV6-K8-V4-W4", "B1-T141-D16-HK1-HV2-K8-V4-W4;dtype=bf16"],
            "B1-T{T}-D256-HK1-HV2-K128-V128-W4",
        ),
        "attention_layer" => (
            "B1-T{T}-TK{T}-D16-HQ4-HKV2-H8-R4",
            &[
                "B8-T26-TK29-D16-HQ4-HKV2-H8-R4",
                "B1-T77-TK141-D16-HQ4-HKV2-H8-R4",
                "B1-T141-TK141-D16-HQ4-HKV2-H8-R4;fill=yarn",
            ],
            "B1-T{T}-TK{T}-D256-HQ8-HKV1-H256-R64",
        ),
        _ => return Vec::new(),
    };
    let at = |text: &str, t: usize| text.replace("{T}", &t.to_string());
    let mut cases = vec![Case { spec: at(small, 141), only_variants: false }];
    cases.extend(others.iter().map(|&spec| Case { spec: spec.to_owned(), only_variants: false }));
    if options.set >= Set::Ci {
        cases.extend(
            [1, 2, 3, 63, 64, 65, 127, 128, 129, 273, 1000]
                .map(|t| Case { spec: at(small, t), only_variants: false }),
        );
        cases.extend([129, 273].map(|t| Case { spec: at(official, t), only_variants: true }));
    }
    if options.set >= Set::Nightly {
        let most = if op.starts_with("attention") { QUADRATIC } else { usize::MAX };
        let long = LADDER.iter().copied().filter(|&t| 1000 < t && t <= most);
        cases.extend(long.clone().map(|t| Case { spec: at(small, t), only_variants: false }));
        cases.extend(
            std::iter::once(1000)
                .chain(long)
                .map(|t| Case { spec: at(official, t), only_variants: true }),
        );
    }
    cases.retain(|case| length(&case.spec) <= options.max_length);
    cases
}

fn length(spec: &str) -> usize {
    let mut sizes = spec.split(['-', ';']);
    sizes.find_map(|size| size.strip_prefix('T')?.parse().ok()).unwrap_or(0)
}

/// The paths of one problem of an op.
pub(super) fn of_op(op: &str, parsed: &Parsed, set: Set) -> Vec<Path> {
    let size = |letter: &str| {
        parsed.sizes.iter().find(|(name, _)| *name == letter).map_or(1, |&(_, size)| size)
    };
    let t = size("T");
    if 1 < size("B") {
        return vec![Path::Alone, Path::Poisoned(Parity::Even), Path::Poisoned(Parity::Odd)];
    }
    let mut paths = splits(t, set);
    paths.extend(edits(t));
    if matches!(op, "causal_conv1d" | "gated_delta_rule" | "attention") {
        paths.push(Path::Heads);
    }
    if op == "gated_delta_rule" {
        paths.push(Path::GateOne);
    }
    paths
}

/// Where chunks and blocks end.
const BOUNDARIES: [usize; 2] = [64, 128];

/// Pieces: every split at and around boundaries, pieces that do not divide a block, token by token.
fn splits(t: usize, set: Set) -> Vec<Path> {
    let mut at: Vec<usize> = vec![1, t / 2, t.saturating_sub(1)];
    if t <= 1000 {
        at.extend([2, 3, 4, t.saturating_sub(2)]);
        at.extend(BOUNDARIES.iter().flat_map(|b| b - 2..=b + 2));
    } else {
        // The first chunk boundary and the last one, and what is around them.
        let last = (t - 1) / 64 * 64;
        at.extend([63, 64, 65, last - 1, last, last + 1]);
    }
    if set >= Set::Nightly && t <= 300 {
        at.extend(1..t);
    }
    at.sort_unstable();
    at.dedup();
    let inside = at.into_iter().filter(|&at| 0 < at && at < t);
    let mut paths: Vec<Path> = inside.map(|at| Path::Split(vec![at, t - at])).collect();
    for head in [&[63, 2][..], &[64, 1, 1], &[1, 3, 60], &[64, 64], &[5, 59, 1]] {
        let fed: usize = head.iter().sum();
        if fed < t {
            paths.push(Path::Split([head, &[t - fed]].concat()));
        }
    }
    let every: &[usize] =
        if t <= 1000 { &[1, 2, 3, 7, 16, 63, 64, 65] } else { &[1, 64, 100, 4096] };
    paths.extend(every.iter().filter(|&&n| n < t).map(|&n| Path::Every(n)));
    paths
}

fn edits(t: usize) -> impl Iterator<Item = Path> {
    let mut at = vec![0, 1, 63, 64, 65, 127, 128, 129, t - 1];
    at.sort_unstable();
    at.dedup();
    // A lone token has no other to become.
    at.into_iter().filter(move |&at| at < t && 1 < t).map(Path::Edit)
}

/// The paths of a text of `t` tokens through a whole model.
pub(super) fn of_model(t: usize, config: &Config, mtp: bool, set: Set) -> Vec<Path> {
    let mut paths = splits(t, set);
    let around = BOUNDARIES.iter().flat_map(|b| b - 10..=b + 10);
    let resumed: Vec<usize> = if set >= Set::Nightly {
        (1..t).collect()
    } else {
        [1, 2, 3].into_iter().chain(around).chain([t - 1]).collect()
    };
    paths.extend(resumed.into_iter().filter(|&at| 0 < at && at < t).map(Path::Resume));
    paths.extend(drafts(t, set));
    paths.extend([Path::Packed(Order::Rising), Path::Packed(Order::Falling)]);
    paths.extend([Path::Poisoned(Parity::Even), Path::Poisoned(Parity::Odd)]);
    paths.extend([Path::Fresh(Before::Reset), Path::Fresh(Before::Released)]);
    // Padding ends inside, at and after the first piece; the convolution's window is the narrowest.
    let window = config.linear_conv_kernel_dim;
    let columns = [1, 2, window - 1, window, 7, 63, 64, 65, 70, t - 1];
    let mut columns: Vec<usize> = columns.into_iter().filter(|&at| 0 < at && at < t).collect();
    columns.sort_unstable();
    columns.dedup();
    paths.extend(columns.into_iter().map(Path::LeftPadded));
    paths.extend([1, 3].map(Path::Decode));
    paths.extend(edits(t));
    if mtp {
        paths.extend([1, 2, 7, 64].into_iter().filter(|&n| n < t).map(Path::Mtp));
    }
    paths
}

/// Every number of drafts up to four and every number accepted, before, across and after a boundary,
/// right after the prompt, and with prompts that are as long as a step.
fn drafts(t: usize, set: Set) -> Vec<Path> {
    let mut paths = Vec::new();
    let places: &[usize] =
        if set >= Set::Ci { &[1, 2, 3, 61, 62, 63, 64, 65, 130] } else { &[3, 62] };
    for wrong in [Wrong::Token, Wrong::Nan] {
        for drafted in 0..=4 {
            let accepted = std::iter::once(None).chain((0..=drafted).map(Some));
            for accepted in accepted {
                let draft = |at| Draft { at, drafted, accepted, wrong };
                let fits = |at: usize| at + drafted + 4 < t;
                paths.extend(
                    places.iter().filter(|&&at| fits(at)).map(|&at| Path::Rollback(draft(at))),
                );
                // The text beside it has half of its length.
                if 0 < drafted && 5 + drafted + 4 < t / 2 {
                    paths.push(Path::Together(draft(5)));
                    paths.push(Path::Prompt(draft(1 + drafted)));
                }
            }
        }
    }
    paths
}
