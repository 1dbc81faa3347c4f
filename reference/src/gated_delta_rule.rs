use golden::{
    Tensor3, ops,
    ops::gated_delta_rule::{Inputs, Outputs},
    packed::rows,
};
use ndarray::{Array2, Array3, ArrayView1, Axis, s};

use crate::{
    l2_norm,
    real::{Real, Site, dot},
};

/// Token by token, as the recurrence is written in [`golden::ops::gated_delta_rule`]:
///
/// `S <- exp(g_t) S`, `d = beta_t (v_t - S' k_t)`, `S <- S + k_t d'`, `o_t = S' q_t`.
///
/// `q`, `k`: `[N, HK, K]`; `v`, `o`: `[N, HV, V]`; `g`, `beta`: `[N, HV]`; `state`: `[S, HV, K, V]`.
pub fn gated_delta_rule<R: Real>(x: &Inputs<R>) -> Outputs<R> {
    let (n, hv, v) = x.v.dim();
    let (q, key) = normed(x);
    let group = hv / x.k.dim().1;
    let mut o = Array3::from_elem((n, hv, v), R::zero());
    let mut state = x.state.to_owned();
    let mut d = vec![R::zero(); v];
    for (i, tokens) in rows(&x.cu_seqlens).into_iter().enumerate() {
        for h in 0..hv {
            let mut s = state.slice_mut(s![i, h, .., ..]);
            for t in tokens.clone() {
                let (q, key) = (q.slice(s![t, h / group, ..]), key.slice(s![t, h / group, ..]));
                // Forget.
                let decay = x.g[[t, h]].exp();
                s.mapv_inplace(|s| s * decay);
                // Write the part of the value that the state does not yet say of this key.
                d.fill(R::zero());
                accumulate(&mut d, &key, s.rows());
                for (d, &v) in d.iter_mut().zip(x.v.slice(s![t, h, ..])) {
                    *d = x.beta[[t, h]] * (v - *d);
                }
                for (mut row, &k) in s.rows_mut().into_iter().zip(key) {
                    row.iter_mut().zip(&d).for_each(|(s, &d)| *s = (*s + k * d).at(Site::State));
                }
                // Answer from the state just written.
                let mut o = o.slice_mut(s![t, h, ..]);
                accumulate(o.as_slice_mut().expect("contiguous"), &q, s.rows());
                o.mapv_inplace(|o| o.at(Site::MixerOut));
            }
        }
    }
    Outputs { o: o.into_shared(), state: state.into_shared() }
}

/// `sum += S' x`, row by row of `S`.
pub(crate) fn accumulate<'a, R: Real>(
    sum: &mut [R],
    x: &ArrayView1<'_, R>,
    rows: impl IntoIterator<Item = ArrayView1<'a, R>>,
) {
    for (row, &x) in rows.into_iter().zip(x) {
        let x = x.operand();
        for (sum, &s) in sum.iter_mut().zip(row) {
            *sum += s.operand() * x;
        }
    }
}

/// `l2norm(q) / sqrt(K)` and `l2norm(k)`.
pub(crate) fn normed<R: Real>(x: &Inputs<R>) -> (Tensor3<R>, Tensor3<R>) {
    let norm = |x: &Tensor3<R>, eps: f64| -> Tensor3<R> {
        let (n, hk, k) = x.dim();
        let rows = x
            .as_standard_layout()
            .into_owned()
            .into_shape_with_order((n * hk, k))
            .expect("same elements");
        let o = l2_norm(&ops::l2_norm::Inputs { x: rows.into_shared(), eps }).o;
        o.into_owned().into_shape_with_order((n, hk, k)).expect("same elements").into_shared()
    };
    let scale = R::one() / R::of(x.k.dim().2 as f64).sqrt();
    let q = norm(&x.q, x.eps).map(|&q| q * scale).into_shared();
    (q, norm(&x.k, x.eps))
}

/// Where the decay between two tokens of a chunk comes from, `exp(g_{j+1} + … + g_i)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gates {
    /// The sum of the gates between them.
    Between,
    /// The difference `G_i - G_j` of two sums from the start of the chunk. Where those are large and
    /// the difference is small it has lost what it should say.
    Prefix,
}

/// The chunked (WY) form of [`gated_delta_rule`], as it is written in
/// [`golden::ops::gated_delta_rule`]: chunks of `chunk` tokens, the last one shorter.
///
/// # Panics
/// If `chunk` is zero.
pub fn gated_delta_rule_chunked<R: Real>(x: &Inputs<R>, chunk: usize, gates: Gates) -> Outputs<R> {
    assert!(0 < chunk, "a chunk holds at least one token");
    let (n, hv, v) = x.v.dim();
    let (q, key) = normed(x);
    let group = hv / x.k.dim().1;
    let mut o = Array3::from_elem((n, hv, v), R::zero());
    let mut state = x.state.to_owned();
    for (i, tokens) in rows(&x.cu_seqlens).into_iter().enumerate() {
        for h in 0..hv {
            let mut s = state.slice(s![i, h, .., ..]).to_owned();
            for start in tokens.clone().step_by(chunk) {
                let range = start..(start + chunk).min(tokens.end);
                let part = Chunk {
                    q: q.slice(s![range.clone(), h / group, ..]).to_owned(),
                    k: key.slice(s![range.clone(), h / group, ..]).to_owned(),
                    v: x.v.slice(s![range.clone(), h, ..]).to_owned(),
                    g: x.g.slice(s![range.clone(), h]).to_vec(),
                    beta: x.beta.slice(s![range.clone(), h]).to_vec(),
                };
                let (out, after) = part.run(&s, gates);
                o.slice_mut(s![range, h, ..]).assign(&out);
                s = after;
            }
            state.slice_mut(s![i, h, .., ..]).assign(&s);
        }
    }
    Outputs { o: o.into_shared(), state: state.into_shared() }
}

/// One chunk of one head: `C` tokens.
struct Chunk<R> {
    /// `[C, K]`, normed and scaled.
    q: Array2<R>,
    /// `[C, K]`, normed.
    k: Array2<R>,
    /// `[C, V]`.
    v: Array2<R>,
    /// `[C]`.
    g: Vec<R>,
    /// `[C]`.
    beta: Vec<R>,
}

impl<R: Real> Chunk<R> {
    /// The outputs `[C, V]` and the state after the chunk, `[K, V]`.
    fn run(&self, s: &Array2<R>, from: Gates) -> (Array2<R>, Array2<R>) {
        let Chunk { q, k, v, g, beta } = self;
        let c = g.len();
        // G_i = sum of g up to and with token i.
        let gates: Vec<R> = g
            .iter()
            .scan(R::zero(), |sum, &g| {
                *sum += g;
                Some(*sum)
            })
            .collect();
        // Above the diagonal nothing is exponentiated.
        let mut decay = Array2::from_elem((c, c), R::zero());
        for j in 0..c {
            let mut between = R::zero();
            decay[[j, j]] = R::one();
            for i in j + 1..c {
                between += g[i];
                decay[[i, j]] = match from {
                    Gates::Between => between.exp(),
                    Gates::Prefix => (gates[i] - gates[j]).exp(),
                };
            }
        }
        // Tm = (I + A)^-1 by forward substitution: row i is e_i - sum_{j < i} A_ij row j.
        let a = Array2::from_shape_fn((c, c), |(i, j)| {
            if j < i { beta[i] * inner(k, i, k, j) * decay[[i, j]] } else { R::zero() }
        });
        let scaled = |x: &Array2<R>, factor: &dyn Fn(usize) -> R| {
            Array2::from_shape_fn(x.dim(), |(i, d)| factor(i) * x[[i, d]])
        };
        let mut inverse = Array2::from_elem((c, c), R::zero());
        for i in 0..c {
            let (done, mut rest) = inverse.view_mut().split_at(Axis(0), i);
            let mut row = rest.row_mut(0);
            row[i] = R::one();
            for (j, earlier) in done.rows().into_iter().enumerate() {
                let factor = -a[[i, j]];
                row.iter_mut().zip(earlier).take(j + 1).for_each(|(x, &e)| *x += factor * e);
            }
        }
        inverse.mapv_inplace(|x| x.at(Site::WyInverse));
        // U = Tm (beta V), W = Tm (beta exp(G) K).
        let [u, w] = [scaled(v, &|i| beta[i]), scaled(k, &|i| beta[i] * gates[i].exp())]
            .map(|x| matmul(&inverse, &x).mapv_into(|x| x.at(Site::WyVectors)));
        // Vn = U - W S.
        let mut vn = matmul(&w, s);
        vn.zip_mut_with(&u, |vn, &u| *vn = (u - *vn).at(Site::WyValues));
        // O = (exp(G) Q) S + (Q K' * D) Vn.
        let scores = Array2::from_shape_fn((c, c), |(i, j)| {
            if j <= i { (inner(q, i, k, j) * decay[[i, j]]).at(Site::WyScores) } else { R::zero() }
        });
        let mut o = matmul(&scaled(q, &|i| gates[i].exp()), s);
        o.zip_mut_with(&matmul(&scores, &vn), |o, &inside| *o = (*o + inside).at(Site::MixerOut));
        // S <- exp(G_last) S + (exp(G_last - G) K)' Vn.
        let kept = scaled(k, &|i| decay[[c - 1, i]]);
        let mut after = matmul(&kept.t().to_owned(), &vn);
        after.zip_mut_with(s, |after, &s| {
            *after = (gates[c - 1].exp() * s + *after).at(Site::State);
        });
        (o, after)
    }
}

/// Inner product of two rows.
fn inner<R: Real>(a: &Array2<R>, i: usize, b: &Array2<R>, j: usize) -> R {
    dot(
        a.row(i).to_slice().expect("owned matrices are contiguous"),
        b.row(j).to_slice().expect("owned matrices are contiguous"),
    )
}

/// `a b`, row by row of `b`.
fn matmul<R: Real>(a: &Array2<R>, b: &Array2<R>) -> Array2<R> {
    let mut o = Array2::from_elem((a.nrows(), b.ncols()), R::zero());
    for (mut o, a) in o.rows_mut().into_iter().zip(a.rows()) {
        accumulate(o.as_slice_mut().expect("contiguous"), &a, b.rows());
    }
    o
}
