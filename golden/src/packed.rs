//! Sequences packed one after another: `N` rows and `S + 1` offsets.

use std::ops::Range;

use crate::{Rng, Tensor1};

/// Offsets of sequences of these lengths: 0 first, `N` last.
pub fn cu_seqlens(lengths: &[usize]) -> Tensor1<i64> {
    let mut end = 0;
    let ends = lengths.iter().map(|length| {
        end += *length as i64;
        end
    });
    std::iter::once(0).chain(ends).collect()
}

/// Rows of each sequence.
///
/// # Panics
/// If the offsets decrease.
pub fn rows(cu_seqlens: &Tensor1<i64>) -> Vec<Range<usize>> {
    let ends: Vec<usize> = cu_seqlens.iter().map(|&end| end as usize).collect();
    assert!(ends.is_sorted(), "cu_seqlens decrease");
    ends.windows(2).map(|pair| pair[0]..pair[1]).collect()
}

/// `b` lengths that sum to `b * t` and differ: the shortest are 0, 1, 2, … (as far as they fit), the
/// longest takes the rest, in an order drawn from `rng`.
pub fn ragged(b: usize, t: usize, rng: &mut Rng) -> Vec<usize> {
    let total = b * t;
    let mut lengths: Vec<usize> = Vec::with_capacity(b);
    let mut left = total;
    for i in 0..b.saturating_sub(1) {
        let length = i.min(left);
        lengths.push(length);
        left -= length;
    }
    lengths.push(left);
    for i in (1..b).rev() {
        lengths.swap(i, rng.below(i + 1));
    }
    lengths
}
