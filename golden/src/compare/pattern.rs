//! Where errors are, in words: the first thing a person looks for.

/// Which indices of one axis are `bad`, and what they have in common.
pub(super) fn describe(what: &str, bad: &[bool]) -> String {
    let n = bad.len();
    let at: Vec<usize> = (0..n).filter(|&i| bad[i]).collect();
    let all = format!("{} of {n} {what}s over", at.len());
    match at[..] {
        [] => format!("no single {what} over, the whole tensor is"),
        [one] => format!("only {what} {one} of {n}"),
        _ if at.len() == n => format!("all {n} {what}s"),
        [first, .., last] if last + 1 == n && at.len() == n - first => {
            format!("every {what} from {first} on ({all})")
        }
        [first, .., last] if first == 0 && at.len() == last + 1 => {
            format!("every {what} up to {last} ({all})")
        }
        [first, second, ..] => {
            let step = second - first;
            let periodic = 1 < step
                && at.windows(2).all(|pair| (pair[1] - pair[0]).is_multiple_of(step))
                && n.saturating_sub(first).div_ceil(step) == at.len();
            if periodic {
                let boundary =
                    if step.is_power_of_two() && 16 <= step { " -> chunk boundary" } else { "" };
                format!("only {what}s with {what} % {step} == {}{boundary} ({all})", first % step)
            } else {
                format!("{what}s {first}, {second}, … ({all})")
            }
        }
    }
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
