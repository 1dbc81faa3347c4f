use golden::{
    ops::attention::{Inputs, Outputs},
    packed::rows,
    plan::Cache,
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
    let mut q = q.as_standard_layout().into_owned();
    for mut row in q.rows_mut() {
        let counted = R::counted(row.as_slice().expect("standard layout"));
        row.iter_mut().zip(counted.into_iter().flatten()).for_each(|(x, counted)| *x = counted);
    }
    // One contiguous matrix per head, and the steps in which its rows are counted, where a cache does.
    let by_head = |x: &golden::Tensor3<R>, site| {
        let x = x.view().permuted_axes([1, 0, 2]).map(|x| x.at(site));
        let mut x = x.as_standard_layout().into_owned();
        let steps: Option<Vec<R>> = x
            .rows_mut()
            .into_iter()
            .map(|mut row| {
                let (step, whole) = R::cached(row.as_slice().expect("standard layout"))?;
                row.iter_mut().zip(whole).for_each(|(x, whole)| *x = whole);
                Some(step)
            })
            .collect();
        (x, steps)
    };
    let ((k, k_steps), (v, v_steps)) = (by_head(&x.k, Site::Keys), by_head(&x.v, Site::Values));
    let m = x.k.dim().0;
    let scaled = |x: R, steps: &Option<Vec<R>>, head: usize, j: usize| match steps {
        Some(steps) => x * steps[head * m + j],
        None => x,
    };
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
                        let score = scaled(score, &k_steps, head / group, j);
                        (score.at(Site::Scores) * scale).at(Site::Scores)
                    })
                    .collect();
                let max = scores.iter().copied().fold(scores[0], |a, b| if a < b { b } else { a });
                let mut p: Vec<R> = scores.iter().map(|&score| (score - max).exp()).collect();
                let total = sum(p.len(), |j| p[j]);
                for (p, j) in p.iter_mut().zip(seen.clone()) {
                    let weight = scaled(*p / total, &v_steps, head / group, j);
                    *p = weight.at(Site::Probabilities);
                }
                for block in p.chunks_mut(Cache::COUNTED) {
                    if let Some(counted) = R::counted(block) {
                        block.copy_from_slice(&counted);
                    }
                }
                let mut o = o.slice_mut(s![t, head, ..]);
                for (&p, j) in p.iter().zip(seen.clone()) {
                    let p = p.operand();
                    o.iter_mut()
                        .zip(v.slice(s![head / group, j, ..]))
                        .for_each(|(o, &v)| *o += p * v.operand());
                }
                o.mapv_inplace(|o| o.at(Site::AttentionOut));
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
