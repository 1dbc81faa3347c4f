use golden::{
    Tensor2, Tensor3, ops,
    ops::gdn_layer::{Inputs, Outputs},
};
use ndarray::{Array2, s};

use crate::{
    causal_conv1d, gated_delta_rule, gdn_gates,
    linear::{decide, project},
    probe::Probe,
    real::Real,
    rms_norm_gated,
};

/// eps of the L2 norms of queries and keys; not `rms_norm_eps`, though the two are equal in every
/// published config.
const L2_EPS: f64 = 1e-6;

/// Projections, convolution, gates, delta rule, gated norm, projection: the formula and the packed
/// layouts stand in [`golden::ops::gdn_layer`].
///
/// `x`, `o`: `[N, D]`; `conv_state`: `[S, C, W - 1]`; `state`: `[S, HV, K, V]`.
pub fn gdn_layer<R: Real>(x: &Inputs<R>) -> Outputs<R> {
    gdn_layer_seen(x, &mut Probe::off())
}

/// [`gdn_layer`], each op shown to a probe.
pub fn gdn_layer_seen<R: Real>(x: &Inputs<R>, probe: &mut Probe<'_>) -> Outputs<R> {
    let n = x.x.nrows();
    let (hk, hv) = (x.hk, x.hv);
    let (_, _, k, v) = x.state.dim();
    let group = hv / hk;

    // Ungroup the projections: HK groups of [q | k | v … | z …] and of [b … | a …].
    let mut qkvz = project(&x.x, &x.in_proj_qkvz);
    probe.see("linear", "in_proj_qkvz", &mut qkvz);
    let mut ba = decide(&x.x, &x.in_proj_ba);
    probe.see("linear", "in_proj_ba", &mut ba);
    let mut qkv = Array2::from_elem((n, 2 * hk * k + hv * v), R::zero());
    let mut z = Array2::from_elem((n, hv * v), R::zero());
    let (mut b, mut a) =
        (Array2::from_elem((n, hv), R::zero()), Array2::from_elem((n, hv), R::zero()));
    for j in 0..hk {
        let start = j * (2 * k + 2 * group * v);
        let part =
            |from: usize, width: usize| qkvz.slice(s![.., start + from..start + from + width]);
        let values = group * v;
        qkv.slice_mut(s![.., j * k..(j + 1) * k]).assign(&part(0, k));
        qkv.slice_mut(s![.., (hk + j) * k..(hk + j + 1) * k]).assign(&part(k, k));
        let v_start = 2 * hk * k + j * values;
        qkv.slice_mut(s![.., v_start..v_start + values]).assign(&part(2 * k, values));
        z.slice_mut(s![.., j * values..(j + 1) * values]).assign(&part(2 * k + values, values));
        let start = 2 * j * group;
        b.slice_mut(s![.., j * group..(j + 1) * group])
            .assign(&ba.slice(s![.., start..start + group]));
        a.slice_mut(s![.., j * group..(j + 1) * group])
            .assign(&ba.slice(s![.., start + group..start + 2 * group]));
    }

    let mut conv = causal_conv1d(&ops::causal_conv1d::Inputs {
        x: qkv.into_shared(),
        weight: x.conv1d.clone(),
        state: x.conv_state.clone(),
        cu_seqlens: x.cu_seqlens.clone(),
    });
    probe.see("causal_conv1d", "o", &mut conv.o);
    probe.see("causal_conv1d", "state", &mut conv.state);
    let mut gates = gdn_gates(&ops::gdn_gates::Inputs {
        a: a.into_shared(),
        b: b.into_shared(),
        a_log: x.a_log.clone(),
        dt_bias: x.dt_bias.clone(),
    });
    probe.see("gdn_gates", "g", &mut gates.g);
    probe.see("gdn_gates", "beta", &mut gates.beta);
    let heads = |from: usize, count: usize, width: usize| -> Tensor3<R> {
        let columns = conv.o.slice(s![.., from..from + count * width]).to_owned();
        let columns = columns.as_standard_layout().into_owned();
        columns.into_shape_with_order((n, count, width)).expect("same elements").into_shared()
    };
    let mut mixed = gated_delta_rule(&ops::gated_delta_rule::Inputs {
        q: heads(0, hk, k),
        k: heads(hk * k, hk, k),
        v: heads(2 * hk * k, hv, v),
        g: gates.g,
        beta: gates.beta,
        state: x.state.clone(),
        cu_seqlens: x.cu_seqlens.clone(),
        eps: L2_EPS,
    });
    probe.see("gated_delta_rule", "o", &mut mixed.o);
    probe.see("gated_delta_rule", "state", &mut mixed.state);
    // One row per token and head.
    let rows = |x: Tensor2<R>| {
        x.into_owned().into_shape_with_order((n * hv, v)).expect("same elements").into_shared()
    };
    let o = mixed.o.into_owned().into_shape_with_order((n * hv, v)).expect("same elements");
    let gated = rms_norm_gated(&ops::rms_norm_gated::Inputs {
        x: o.into_shared(),
        z: rows(z.into_shared()),
        weight: x.norm.clone(),
        eps: x.eps,
    });
    let gated = gated.o.into_owned().into_shape_with_order((n, hv, v)).expect("same elements");
    let mut gated = gated.into_shared();
    probe.see("rms_norm_gated", "norm", &mut gated);
    let gated = gated.into_owned().into_shape_with_order((n, hv * v)).expect("same elements");
    let mut o = project(&gated.into_shared(), &x.out_proj);
    probe.see("linear", "out_proj", &mut o);
    Outputs { o, conv_state: conv.state, state: mixed.state }
}
