use std::cmp::Ordering;

use golden::ops::sampling::{Inputs, Outputs};

use crate::real::Real;

/// Temperature, then top-k, then top-p, then the inverse of the cumulated probability at `uniform`;
/// greedy at temperature 0. Ties go to the lowest id.
///
/// `logits`: `[N, M]`; `uniform`, `ids`: `[N]`.
///
/// ```
/// use golden::ops::sampling::Inputs;
/// use ndarray::{arr1, arr2};
///
/// let logits = arr2(&[[1.0, 3.0, 3.0]]).into_shared();
/// let uniform = arr1(&[0.9]).into_shared();
/// let greedy = Inputs { logits, uniform, temperature: 0.0, top_k: 0, top_p: 1.0 };
/// assert_eq!(reference::sampling::<f64>(&greedy).ids[0], 1);
/// ```
pub fn sampling<R: Real>(x: &Inputs<R>) -> Outputs {
    let ids = x.logits.rows().into_iter().zip(&x.uniform).map(|(row, &uniform)| {
        // Largest first; a stable sort leaves ties in id order.
        let mut order: Vec<usize> = (0..row.len()).collect();
        order.sort_by(|&a, &b| row[b].partial_cmp(&row[a]).unwrap_or(Ordering::Equal));
        if x.temperature == 0.0 {
            return order[0] as i64;
        }
        if 0 < x.top_k {
            order.truncate(x.top_k);
        }
        let max = row[order[0]];
        let mut p: Vec<R> =
            order.iter().map(|&i| ((row[i] - max) / R::of(x.temperature)).exp()).collect();
        if x.top_p < 1.0 {
            let total = p.iter().copied().fold(R::zero(), |a, b| a + b);
            let mut sum = R::zero();
            let reached = p.iter().position(|&p| {
                sum += p;
                R::of(x.top_p) * total <= sum
            });
            p.truncate(reached.map_or(p.len(), |last| last + 1));
        }
        let total = p.iter().copied().fold(R::zero(), |a, b| a + b);
        let mut sum = R::zero();
        let found = p.iter().position(|&p| {
            sum += p;
            uniform * total < sum
        });
        order[found.unwrap_or(p.len() - 1)] as i64
    });
    Outputs { ids: ids.collect() }
}
