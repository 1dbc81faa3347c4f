use golden::{
    Tensor2,
    ops::moe_router::{Inputs, Outputs},
};
use ndarray::{Array1, Array2};

use crate::{
    linear::decide,
    real::{Real, Site, sum},
};

/// `logits = weight x`, `p = softmax(logits)`, the `A` largest, ties to the lowest index;
/// `weights = p / sum of the chosen p` if `norm_topk_prob`.
///
/// `x`: `[N, D]`; `weight`: `[E, D]`; `ids`, `weights`: `[N, A]`; `logits`: `[N, E]`; `margins`: `[N]`.
pub fn moe_router<R: Real>(x: &Inputs<R>) -> Outputs<R> {
    route(x, None)
}

/// [`moe_router`] with the experts given: their weights still come from the router.
///
/// `ids`: `[N, A]`.
pub fn moe_router_forced<R: Real>(x: &Inputs<R>, ids: &Array2<i64>) -> Outputs<R> {
    route(x, Some(ids))
}

fn route<R: Real>(x: &Inputs<R>, forced: Option<&Array2<i64>>) -> Outputs<R> {
    let logits = decide(&x.x, &x.weight).map(|l| l.at(Site::RouterLogits)).into_shared();
    let (n, e) = logits.dim();
    let a = x.top_k;
    let mut ids = Tensor2::zeros((n, a));
    let mut weights = Array2::from_elem((n, a), R::zero());
    let mut margins = Array1::from_elem(n, R::of(f64::INFINITY));
    for (i, row) in logits.rows().into_iter().enumerate() {
        // By logit, which orders as the probability does; a stable sort leaves ties in index order.
        let mut order: Vec<usize> = (0..e).collect();
        order.sort_by(|&a, &b| row[b].partial_cmp(&row[a]).unwrap_or(std::cmp::Ordering::Equal));
        let max = row[order[0]];
        let total = sum(e, |j| (row[j] - max).exp());
        if a < e {
            margins[i] = row[order[a - 1]] - row[order[a]];
        }
        let chosen: Vec<usize> = match forced {
            None => order[..a].to_vec(),
            Some(ids) => ids.row(i).iter().map(|&id| id as usize).collect(),
        };
        let p: Vec<R> = chosen.iter().map(|&j| (row[j] - max).exp() / total).collect();
        let kept = if x.norm_topk_prob {
            p.iter().copied().fold(R::zero(), |a, b| a + b)
        } else {
            R::one()
        };
        for (slot, (&j, &p)) in chosen.iter().zip(&p).enumerate() {
            ids[[i, slot]] = j as i64;
            weights[[i, slot]] = (p / kept).at(Site::RouterWeights);
        }
    }
    Outputs { ids, weights: weights.into_shared(), logits, margins: margins.into_shared() }
}
