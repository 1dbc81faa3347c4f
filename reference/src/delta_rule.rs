use golden::{
    ops::gated_delta_rule::{Inputs, Outputs},
    packed::rows,
};
use ndarray::{Array3, s};

use crate::{
    gated_delta_rule::{accumulate, normed},
    real::{Real, Site},
};

/// The delta rule without a gate, which the gated one is where every gate is one; `g` is not read:
///
/// `d = beta_t (v_t - S' k_t)`, `S <- S + k_t d'`, `o_t = S' q_t`.
///
/// `q`, `k`: `[N, HK, K]`; `v`, `o`: `[N, HV, V]`; `beta`: `[N, HV]`; `state`: `[S, HV, K, V]`.
/// Source: Yang et al., Parallelizing Linear Transformers with the Delta Rule (2024), equation 2.
pub fn delta_rule<R: Real>(x: &Inputs<R>) -> Outputs<R> {
    let (n, hv, v) = x.v.dim();
    let (q, key) = normed(x);
    let group = hv / x.k.dim().1;
    let mut o = Array3::from_elem((n, hv, v), R::zero());
    let mut state = x.state.to_owned();
    for (i, tokens) in rows(&x.cu_seqlens).into_iter().enumerate() {
        for t in tokens {
            for h in 0..hv {
                let (q, key) = (q.slice(s![t, h / group, ..]), key.slice(s![t, h / group, ..]));
                let mut s = state.slice_mut(s![i, h, .., ..]);
                // Write the part of the value that the state does not yet say of this key.
                let mut said = vec![R::zero(); v];
                accumulate(&mut said, &key, s.rows());
                for (mut row, &k) in s.rows_mut().into_iter().zip(&key) {
                    for ((s, &v), &said) in row.iter_mut().zip(x.v.slice(s![t, h, ..])).zip(&said) {
                        *s = (*s + k * (x.beta[[t, h]] * (v - said))).at(Site::State);
                    }
                }
                // Answer from the state just written.
                let mut answer = vec![R::zero(); v];
                accumulate(&mut answer, &q, s.rows());
                for (o, &answer) in o.slice_mut(s![t, h, ..]).iter_mut().zip(&answer) {
                    *o = answer.at(Site::MixerOut);
                }
            }
        }
    }
    Outputs { o: o.into_shared(), state: state.into_shared() }
}
