//! Sums of products.

use super::stored::Stored;

/// Partial sums: enough for a compiler to keep them in vectors.
const LANES: usize = 16;

/// `sum_i a_i b_i`, in interleaved partial sums that are then added in order.
pub(crate) fn dot<A: Stored, B: Stored>(a: &[A], b: &[B]) -> f32 {
    assert_eq!(a.len(), b.len(), "dot of vectors of different lengths");
    let (a_whole, a_rest) = a.as_chunks::<LANES>();
    let (b_whole, b_rest) = b.as_chunks::<LANES>();
    let mut lanes = [0.0; LANES];
    for (a, b) in a_whole.iter().zip(b_whole) {
        for (lane, (a, b)) in lanes.iter_mut().zip(a.iter().zip(b)) {
            *lane += a.load() * b.load();
        }
    }
    for (lane, (a, b)) in lanes.iter_mut().zip(a_rest.iter().zip(b_rest)) {
        *lane += a.load() * b.load();
    }
    lanes.iter().sum()
}

/// `sum += factor x`.
pub(crate) fn add_scaled(sum: &mut [f32], factor: f32, x: &[f32]) {
    for (sum, x) in sum.iter_mut().zip(x) {
        *sum += factor * x;
    }
}
