//! Which experts a token goes to.

use ndarray::Array2;

/// How a sparse layer routes.
pub(crate) struct Routed {
    /// `[N, A]`.
    pub(crate) ids: Vec<i64>,
    /// `[N, A]`.
    pub(crate) weights: Vec<f32>,
    /// `[N]`.
    pub(crate) margins: Vec<f32>,
}

/// The `active` largest of each row of `logits` `[N, E]`, ties to the lowest index, or the experts
/// given; their weights are the softmax of these, or of all if they are not renormalised.
pub(crate) fn route(
    logits: &[f32],
    experts: usize,
    active: usize,
    renormalise: bool,
    forced: Option<&Array2<i64>>,
) -> Routed {
    let mut routed = Routed { ids: Vec::new(), weights: Vec::new(), margins: Vec::new() };
    for (n, row) in logits.chunks_exact(experts).enumerate() {
        // One more than are chosen: the first left out.
        let mut best: Vec<usize> = Vec::with_capacity(active + 2);
        for (i, &logit) in row.iter().enumerate() {
            if best.len() <= active || row[best[active]] < logit {
                let at = best.partition_point(|&j| logit <= row[j]);
                best.insert(at, i);
                best.truncate(active + 1);
            }
        }
        let margin = best.get(active).map(|&left| row[best[active - 1]] - row[left]);
        routed.margins.push(margin.unwrap_or(f32::INFINITY));
        let max = row[best[0]];
        best.truncate(active);
        if let Some(forced) = forced {
            best = forced.row(n).iter().map(|&id| id as usize).collect();
        }
        let score = |logit: f32| (logit - max).exp();
        let total: f32 = if renormalise {
            best.iter().map(|&j| score(row[j])).sum()
        } else {
            row.iter().map(|&logit| score(logit)).sum()
        };
        routed.weights.extend(best.iter().map(|&j| score(row[j]) / total));
        routed.ids.extend(best.iter().map(|&j| j as i64));
    }
    routed
}
