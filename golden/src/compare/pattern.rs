//! Where errors are, in words: the first thing a person looks for.

/// Which indices of one axis are `bad`, and what they have in common.
pub(super) fn describe(what: &str, bad: &[bool]) -> String {
    let n = bad.len();
    let at: Vec<usize> = (0..n).filter(|&i| bad[i]).collect();
    let all = format!("{} of {n} {what}s over", at.len());
    match at[..] {
        [] => format!("no single {what} over, the whole tensor is"),
        [one] => format!("only {what} {one} of {n}{}", boundary(what, one)),
        _ if at.len() == n => format!("all {n} {what}s"),
        [first, .., last] if last + 1 == n && at.len() == n - first => {
            format!("every {what} from {first} on{} ({all})", boundary(what, first))
        }
        [first, .., last] if first == 0 && at.len() == last + 1 => {
            format!("every {what} up to {last} ({all})")
        }
        [first, second, ..] => match period(bad) {
            Some((step, rests)) => {
                let boundary = match rests[..] {
                    // What begins or ends a chunk.
                    [rest, ..] if rest == 0 || rests.last() == Some(&(step - 1)) => chunk(step),
                    _ => "",
                };
                let rests = match rests[..] {
                    [rest] => format!("== {rest}"),
                    _ => format!("in {rests:?}"),
                };
                format!("only {what}s with {what} % {step} {rests}{boundary} ({all})")
            }
            None => format!("{what}s {first}, {second}, … ({all})"),
        },
    }
}

/// The longest period that is looked for.
const MAX_PERIOD: usize = 512;

/// The smallest period under which a few remainders, a quarter at most, are bad everywhere and no
/// other is bad anywhere; each has to be seen twice. Nothing bad before the first period counts: what
/// follows a chunk boundary begins behind the first.
fn period(bad: &[bool]) -> Option<(usize, Vec<usize>)> {
    let n = bad.len();
    let first = bad.iter().position(|&bad| bad)?;
    (2..=(n / 2).min(MAX_PERIOD)).find_map(|step| {
        let mut seen = vec![false; step];
        for i in (0..n).filter(|&i| bad[i]) {
            seen[i % step] = true;
        }
        let rests: Vec<usize> = (0..step).filter(|&rest| seen[rest]).collect();
        let few = rests.len() == 1 || 4 * rests.len() <= step;
        let from = first - first % step;
        let twice = rests.iter().all(|&rest| from + rest + step < n);
        (few && twice && (from..n).all(|i| bad[i] == seen[i % step])).then_some((step, rests))
    })
}

/// Chunks have powers of two as sizes.
fn chunk(step: usize) -> &'static str {
    if step.is_power_of_two() && 16 <= step { " -> chunk boundary" } else { "" }
}

/// Whether a token begins a chunk: a multiple of 64, the size that kernels of this model use.
fn boundary(what: &str, at: usize) -> &'static str {
    if what == "token" && at != 0 && at.is_multiple_of(64) { " -> chunk boundary" } else { "" }
}

/// The same along every axis of a tensor whose elements are `bad`: tokens, heads, channels.
pub(super) fn axes(shape: &[usize], bad: &[bool]) -> String {
    let names: &[&str] = match shape.len() {
        0 | 1 => &["row"],
        2 => &["token", "channel"],
        3 => &["token", "head", "channel"],
        _ => &["sequence", "head", "row", "channel"],
    };
    let mut stride: usize = shape.iter().product();
    let mut words = Vec::new();
    for (&size, name) in shape.iter().zip(names) {
        stride /= size.max(1);
        let mut along = vec![false; size];
        for (i, _) in bad.iter().enumerate().filter(|(_, bad)| **bad) {
            along[i / stride.max(1) % size.max(1)] = true;
        }
        words.push(describe(name, &along));
    }
    words.join(", ")
}

#[cfg(test)]
mod tests {
    use super::{axes, describe};

    fn at(n: usize, bad: impl Fn(usize) -> bool) -> Vec<bool> {
        (0..n).map(bad).collect()
    }

    #[test]
    fn what_errors_have_in_common_is_named() {
        for (bad, said) in [
            (at(130, |t| t == 77), "only token 77 of 130"),
            (at(65, |t| t == 64), "only token 64 of 65 -> chunk boundary"),
            (
                at(130, |t| 64 <= t),
                "every token from 64 on -> chunk boundary (66 of 130 tokens over)",
            ),
            (at(130, |t| 63 <= t), "every token from 63 on (67 of 130 tokens over)"),
            (at(130, |t| t < 5), "every token up to 4 (5 of 130 tokens over)"),
            (
                at(130, |t| t % 64 == 0),
                "only tokens with token % 64 == 0 -> chunk boundary (3 of 130 tokens over)",
            ),
            (
                at(257, |t| t != 0 && t % 64 == 0),
                "only tokens with token % 64 == 0 -> chunk boundary (4 of 257 tokens over)",
            ),
            (
                at(256, |t| t % 64 < 3),
                "only tokens with token % 64 in [0, 1, 2] -> chunk boundary (12 of 256 tokens over)",
            ),
            (
                at(256, |t| t % 64 == 63),
                "only tokens with token % 64 == 63 -> chunk boundary (4 of 256 tokens over)",
            ),
            (at(256, |t| t % 64 == 5), "only tokens with token % 64 == 5 (4 of 256 tokens over)"),
            (at(12, |t| t % 3 == 1), "only tokens with token % 3 == 1 (4 of 12 tokens over)"),
            (at(100, |t| t == 3 || t == 50), "tokens 3, 50, … (2 of 100 tokens over)"),
            (at(9, |_| true), "all 9 tokens"),
            (at(9, |_| false), "no single token over, the whole tensor is"),
        ] {
            assert_eq!(describe("token", &bad), said);
        }
    }

    #[test]
    fn every_axis_is_described() {
        // Tokens at chunk boundaries, one head, every channel.
        let bad = at(130 * 4 * 3, |i| (i / 12) % 64 == 0 && i / 3 % 4 == 2);
        assert_eq!(
            axes(&[130, 4, 3], &bad),
            "only tokens with token % 64 == 0 -> chunk boundary (3 of 130 tokens over), only head 2 of 4, all 3 channels"
        );
    }
}
