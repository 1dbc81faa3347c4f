use golden::{
    ops::attention::{Inputs, Outputs},
    packed::rows,
};
use ndarray::{Array3, s};

use crate::real::{Real, Site, dot, sum};

/// `o_i = softmax_j(q_i k_j / sqrt(H)) v * sigmoid(gate_i)`, query `i` of a sequence with `Tq`
/// queries and `Tk` keys seeing keys `0 ..= Tk - Tq + i`.
///
/// `q`, `gate`, `o`: `[N, HQ, H]`; `k`, `v`: `[M, HKV, H]`.
///
/// # Panics
/// If a sequence has more queries than keys.
pub fn attention<R: Real>(x: &Inputs<R>) -> Outputs<R> {
    let (n, hq, h) = x.q.dim();
    let group = hq / x.k.dim().1;
    let scale = R::one() / R::of(h as f64).sqrt();
    let q = x.q.map(|q| q.at(Site::Queries));
    let q = q.as_standard_layout();
    // One contiguous matrix per head.
    let by_head = |x: &golden::Tensor3<R>, site| {
        x.view().permuted_axes([1, 0, 2]).map(|x| x.at(site)).as_standard_layout().into_owned()
    };
    let (k, v) = (by_head(&x.k, Site::Keys), by_head(&x.v, Site::Values));
    let mut o = Array3::from_elem((n, hq, h), R::zero());
    for (queries, keys) in rows(&x.cu_seqlens_q).into_iter().zip(rows(&x.cu_seqlens_k)) {
        let before =
            keys.len().checked_sub(queries.len()).expect("attention: more queries than keys");
        for (i, t) in queries.enumerate() {
            let seen = keys.start..keys.start + before + i + 1;
            for head in 0..hq {
                let q = q.slice(s![t, head, ..]);
                let q = q.to_slice().expect("standard layout");
                let scores: Vec<R> = seen
                    .clone()
                    .map(|j| {
                        let k = k.slice(s![head / group, j, ..]);
                        let score = dot(q, k.to_slice().expect("standard layout"));
                        (score.at(Site::Scores) * scale).at(Site::Scores)
                    })
                    .collect();
                let max = scores.iter().copied().fold(scores[0], |a, b| if a < b { b } else { a });
                let mut p: Vec<R> = scores.iter().map(|&score| (score - max).exp()).collect();
                let total = sum(p.len(), |j| p[j]);
                for p in &mut p {
                    *p = (*p / total).at(Site::Probabilities);
                }
                let mut o = o.slice_mut(s![t, head, ..]);
                for (&p, j) in p.iter().zip(seen.clone()) {
                    let p = p.operand();
                    o.iter_mut()
                        .zip(v.slice(s![head / group, j, ..]))
                        .for_each(|(o, &v)| *o += p * v.operand());
                }
                o.mapv_inplace(|o| o.at(Site::MixerOut));
            }
        }
    }
    if let Some(gate) = &x.gate {
        o.zip_mut_with(gate, |o, gate| {
            *o = (*o * gate.sigmoid().at(Site::Sigmoid)).at(Site::GateOut);
        });
    }
    Outputs { o: o.into_shared() }
}
