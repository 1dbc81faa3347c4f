use golden::{
    Tensor1, Tensor2, Tensor3, ops,
    ops::attention_layer::{Inputs, Outputs},
    packed::{cu_seqlens, rows},
};
use ndarray::{Array3, Axis, concatenate, s};

use crate::{attention, linear::project, probe::Probe, real::Real, rms_norm, rope};

/// Projections, norms, rotation, attention over cache and new tokens, gate, projection: the formula
/// and the packed layout stand in [`golden::ops::attention_layer`].
///
/// `x`, `o`: `[N, D]`; `k`, `v`: `[N, HKV, H]`; `k_cache`, `v_cache`: `[P, HKV, H]`.
pub fn attention_layer<R: Real>(x: &Inputs<R>) -> Outputs<R> {
    attention_layer_seen(x, &mut Probe::off())
}

/// [`attention_layer`], each op shown to a probe.
pub fn attention_layer_seen<R: Real>(x: &Inputs<R>, probe: &mut Probe<'_>) -> Outputs<R> {
    let n = x.x.nrows();
    let (hq, hkv) = (x.hq, x.hkv);
    let h = x.k_proj.nrows() / hkv;

    // Rows of q_proj: per head query, then gate.
    let mut both = heads(project(&x.x, &x.q_proj), hq, 2 * h);
    probe.see("linear", "q_proj", &mut both);
    let q = both.slice(s![.., .., ..h]).to_owned().into_shared();
    let gate = both.slice(s![.., .., h..]).to_owned().into_shared();
    let mut k = heads(project(&x.x, &x.k_proj), hkv, h);
    probe.see("linear", "k_proj", &mut k);
    let mut v = heads(project(&x.x, &x.v_proj), hkv, h);
    probe.see("linear", "v_proj", &mut v);

    let (new, cached) = (rows(&x.cu_seqlens), rows(&x.cu_seqlens_cache));
    let positions: Tensor1<i64> = new
        .iter()
        .zip(&cached)
        .flat_map(|(new, cached)| {
            (cached.len()..cached.len() + new.len()).map(|position| position as i64)
        })
        .collect();
    let (mut q, mut k) = (norm_heads(&q, &x.q_norm, x.eps), norm_heads(&k, &x.k_norm, x.eps));
    probe.see("rms_norm", "q_norm", &mut q);
    probe.see("rms_norm", "k_norm", &mut k);
    let turned = |normed: Tensor3<R>| {
        let (inv_freq, attention_factor) = (x.inv_freq.clone(), x.attention_factor);
        rope(&ops::rope::Inputs {
            x: normed,
            positions: positions.clone(),
            inv_freq,
            attention_factor,
        })
        .o
    };
    let (mut q, mut k) = (turned(q), turned(k));
    probe.see("rope", "q", &mut q);
    probe.see("rope", "k", &mut k);

    // Of each sequence: cache, then new tokens.
    let joined = |cache: &Tensor3<R>, fresh: &Tensor3<R>| -> Tensor3<R> {
        let parts: Vec<_> = cached
            .iter()
            .zip(&new)
            .flat_map(|(c, f)| {
                [cache.slice(s![c.clone(), .., ..]), fresh.slice(s![f.clone(), .., ..])]
            })
            .collect();
        concatenate(Axis(0), &parts)
            .unwrap_or_else(|_| Array3::from_elem((0, hkv, h), R::zero()))
            .into_shared()
    };
    let lengths: Vec<usize> = cached.iter().zip(&new).map(|(c, f)| c.len() + f.len()).collect();
    let mut o = attention(&ops::attention::Inputs {
        q,
        k: joined(&x.k_cache, &k),
        v: joined(&x.v_cache, &v),
        gate: Some(gate),
        cu_seqlens_q: x.cu_seqlens.clone(),
        cu_seqlens_k: cu_seqlens(&lengths),
    })
    .o;
    probe.see("attention", "o", &mut o);
    let flat = o.into_owned().into_shape_with_order((n, hq * h)).expect("same elements");
    let mut o = project(&flat.into_shared(), &x.o_proj);
    probe.see("linear", "o_proj", &mut o);
    Outputs { o, k, v }
}

/// `[N, heads * width]` as `[N, heads, width]`.
fn heads<R: Real>(x: Tensor2<R>, heads: usize, width: usize) -> Tensor3<R> {
    let n = x.nrows();
    x.into_owned().into_shape_with_order((n, heads, width)).expect("same elements").into_shared()
}

/// The zero-centred norm of each head.
fn norm_heads<R: Real>(x: &Tensor3<R>, weight: &Tensor1<f32>, eps: f64) -> Tensor3<R> {
    let (n, count, h) = x.dim();
    let rows = x
        .as_standard_layout()
        .into_owned()
        .into_shape_with_order((n * count, h))
        .expect("same elements");
    let inputs = ops::rms_norm::Inputs {
        x: rows.into_shared(),
        residual: None,
        weight: weight.clone(),
        eps,
    };
    rms_norm(&inputs)
        .o
        .into_owned()
        .into_shape_with_order((n, count, h))
        .expect("same elements")
        .into_shared()
}
