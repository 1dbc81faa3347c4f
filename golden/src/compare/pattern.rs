//! Where errors are, in words: the first thing a person looks for.

/// Which tokens are over `allowed`, and what they have in common.
pub(super) fn describe(per_token: &[f64], allowed: f64) -> String {
    let n = per_token.len();
    let bad: Vec<usize> =
        (0..n).filter(|&t| per_token[t].is_nan() || allowed < per_token[t]).collect();
    let all = format!("{} of {n} rows over", bad.len());
    match bad[..] {
        [] => "no single row over, the whole tensor is".to_owned(),
        [one] => format!("only row {one} of {n}"),
        _ if bad.len() == n => format!("all {n} rows"),
        [first, .., last] if last + 1 == n && bad.len() == n - first => {
            format!("every row from {first} on ({all})")
        }
        [first, .., last] if first == 0 && bad.len() == last + 1 => {
            format!("every row up to {last} ({all})")
        }
        [first, second, ..] => {
            let step = second - first;
            let periodic = 1 < step
                && bad.windows(2).all(|pair| (pair[1] - pair[0]).is_multiple_of(step))
                && n.saturating_sub(first).div_ceil(step) == bad.len();
            if periodic {
                let boundary =
                    if step.is_power_of_two() && 16 <= step { " -> chunk boundary" } else { "" };
                format!("only rows with t % {step} == {}{boundary} ({all})", first % step)
            } else {
                format!("rows {first}, {second}, … ({all})")
            }
        }
    }
}
