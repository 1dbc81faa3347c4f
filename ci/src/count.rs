//! Numbers of tokens, as people write them.

/// `4096`, `4k`, `1M`: in units of 1024.
///
/// # Errors
/// If it is none.
pub(crate) fn tokens(text: &str) -> Result<usize, String> {
    let (digits, unit) = match text.as_bytes().last() {
        Some(b'k' | b'K') => (&text[..text.len() - 1], 1 << 10),
        Some(b'm' | b'M') => (&text[..text.len() - 1], 1 << 20),
        _ => (text, 1),
    };
    let number: Option<usize> = digits.parse().ok();
    let all = number.and_then(|number| number.checked_mul(unit));
    all.ok_or_else(|| "expected a number of tokens: 4096, 4k, 1M".to_owned())
}

/// The same back, in the largest unit that divides it.
pub(crate) fn shown(tokens: usize) -> String {
    match tokens {
        0 => "0".to_owned(),
        n if n.is_multiple_of(1 << 20) => format!("{}M", n >> 20),
        n if n.is_multiple_of(1 << 10) => format!("{}k", n >> 10),
        n => n.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::{shown, tokens};

    #[test]
    fn numbers_of_tokens_are_read_and_told() {
        for (text, n) in
            [("0", 0), ("700", 700), ("4k", 4096), ("1M", 1 << 20), ("1025k", 1025 << 10)]
        {
            assert_eq!((tokens(text), shown(n)), (Ok(n), text.to_owned()));
        }
        assert_eq!(tokens("2K"), tokens("2048"));
        for text in ["", "k", "-1", "1.5k", "4kk", "99999999999999999M", "4 k"] {
            assert!(tokens(text).is_err(), "{text:?}");
        }
    }
}
