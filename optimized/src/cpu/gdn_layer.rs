//! CPU variants of `gdn_layer`.

use golden::{
    Plan, Spec, Tensor1, Variant,
    ops::gdn_layer::{Case, GdnLayer, Inputs, Outputs},
    plan::Site,
    tap::Tap,
};
use ndarray::{Ix2, Ix3, Ix4};

use super::{
    causal_conv1d,
    gated_delta_rule::{self, Sizes, gated_delta_rule, recurrent::Recurrent},
    gdn_gates::{log_decay, rates, write_strength},
    linear::{Projection, linear},
    portable::{HONEST, Kernel, Planted, Portable, held, pack, packed, unpacked},
    rms_norm_gated::rms_norm_gated,
    stored::Stored,
};
use plants::inside;

pub(crate) mod fast;
mod layout;
mod plants;

/// Every CPU variant, plainest first.
#[inline(never)]
pub fn variants() -> &'static [&'static dyn Variant<GdnLayer>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<GdnLayer>] =
    &[&Portable::new("cpu/portable", pack!(Loaded), plan, plants::PLANTS)];

/// What one kernel hands to the next is stored; gates and the state are f32.
fn plan(spec: &Spec<Case>) -> Plan {
    let plan = Plan::stored(spec.dtype);
    let stored = plan.output;
    [Site::Linear, Site::Decision, Site::ConvOut, Site::MixerOut, Site::GateOut]
        .into_iter()
        .fold(plan, |plan, site| plan.round(site, stored))
}

/// eps of the L2 norms of queries and keys; the model has it fixed.
const L2_EPS: f32 = 1e-6;

/// A problem in memory.
struct Loaded<E> {
    case: Case,
    x: Vec<E>,
    in_proj_qkvz: Vec<E>,
    in_proj_ba: Vec<E>,
    /// `[W, C]`, oldest first.
    taps: Vec<f32>,
    a_log: Vec<f32>,
    dt_bias: Vec<f32>,
    norm: Vec<f32>,
    out_proj: Vec<E>,
    conv_state: Vec<E>,
    state: Vec<f32>,
    cu_seqlens: Vec<i64>,
    eps: f64,
    scratch: Scratch<E>,
    o: Vec<E>,
    conv_after: Vec<E>,
    after: Vec<f32>,
}

impl<E: Stored> Loaded<E> {
    fn new(spec: &Spec<Case>, x: &Inputs) -> Self {
        Loaded {
            case: spec.case.clone(),
            x: packed(&x.x),
            in_proj_qkvz: packed(&x.in_proj_qkvz),
            in_proj_ba: packed(&x.in_proj_ba),
            taps: x.conv1d.t().iter().copied().collect(),
            a_log: x.a_log.to_vec(),
            dt_bias: x.dt_bias.to_vec(),
            norm: x.norm.to_vec(),
            out_proj: packed(&x.out_proj),
            conv_state: packed(&x.conv_state),
            state: packed(&x.state),
            cu_seqlens: x.cu_seqlens.to_vec(),
            eps: x.eps,
            scratch: Scratch::new(&spec.case),
            o: vec![E::NAN; x.x.len()],
            conv_after: vec![E::NAN; x.conv_state.len()],
            after: vec![f32::NAN; x.state.len()],
        }
    }
}

impl<E: Stored> Kernel<GdnLayer> for Loaded<E> {
    fn poison(&mut self) {
        self.scratch = Scratch::new(&self.case);
        self.o.fill(E::NAN);
        self.conv_after.fill(E::NAN);
        self.after.fill(f32::NAN);
    }

    fn run(&mut self, plant: Planted) {
        let Case { d, hk, hv, k, v, w, .. } = self.case;
        let layer = Layer {
            x: &self.x,
            in_proj_qkvz: &self.in_proj_qkvz,
            in_proj_ba: &self.in_proj_ba,
            taps: &self.taps,
            a_log: &self.a_log,
            dt_bias: &self.dt_bias,
            norm: &self.norm,
            out_proj: &self.out_proj,
            conv_state: &self.conv_state,
            state: &self.state,
            cu_seqlens: &self.cu_seqlens,
            eps: self.eps as f32,
            d,
            w,
            sizes: Sizes { hk, hv, k, v },
        };
        let mut out =
            Out { o: &mut self.o, conv_state: &mut self.conv_after, state: &mut self.after };
        layer.run(&mut out, &mut self.scratch, plant);
    }

    fn inputs(&self) -> Inputs {
        let Case { b, t, d, hk, hv, k, v, w } = self.case;
        let c = 2 * hk * k + hv * v;
        Inputs {
            x: unpacked(&self.x, Ix2(b * t, d)),
            in_proj_qkvz: unpacked(&self.in_proj_qkvz, Ix2(c + hv * v, d)),
            in_proj_ba: unpacked(&self.in_proj_ba, Ix2(2 * hv, d)),
            conv1d: unpacked(&self.taps, Ix2(w, c)).reversed_axes(),
            a_log: self.a_log.iter().copied().collect(),
            dt_bias: self.dt_bias.iter().copied().collect(),
            norm: self.norm.iter().copied().collect(),
            out_proj: unpacked(&self.out_proj, Ix2(d, hv * v)),
            conv_state: unpacked(&self.conv_state, Ix3(b, c, w - 1)),
            state: unpacked(&self.state, Ix4(b, hv, k, v)),
            cu_seqlens: Tensor1::from_vec(self.cu_seqlens.clone()),
            eps: self.eps,
            hk,
            hv,
        }
    }

    fn outputs(&self) -> Outputs {
        let Case { b, t, d, hk, hv, k, v, w } = self.case;
        Outputs {
            o: unpacked(&self.o, Ix2(b * t, d)),
            conv_state: unpacked(&self.conv_after, Ix3(b, 2 * hk * k + hv * v, w - 1)),
            state: unpacked(&self.after, Ix4(b, hv, k, v)),
        }
    }

    fn inside(&self) -> Vec<Tap> {
        let Case { b, t, d, hk, hv, k, v, w } = self.case;
        let (n, c, s) = (b * t, 2 * hk * k + hv * v, &self.scratch);
        vec![
            held("linear", "in_proj_qkvz", &s.qkvz, &[n, c + hv * v]),
            held("linear", "in_proj_ba", &s.ba, &[n, 2 * hv]),
            held("causal_conv1d", "o", &s.mixed, &[n, c]),
            held("causal_conv1d", "state", &self.conv_after, &[b, c, w - 1]),
            held("gdn_gates", "g", &s.g, &[n, hv]),
            held("gdn_gates", "beta", &s.beta, &[n, hv]),
            held("gated_delta_rule", "o", &s.o, &[n, hv, v]),
            held("gated_delta_rule", "state", &self.after, &[b, hv, k, v]),
            held("rms_norm_gated", "norm", &s.gated, &[n, hv, v]),
            held("linear", "out_proj", &self.o, &[n, d]),
        ]
    }
}

/// What the layer reads.
pub(crate) struct Layer<'a, E> {
    /// `[N, D]`.
    pub(crate) x: &'a [E],
    /// `[2 HK K + 2 HV V, D]`, `HK` groups.
    pub(crate) in_proj_qkvz: &'a [E],
    /// `[2 HV, D]`, `HK` groups.
    pub(crate) in_proj_ba: &'a [E],
    /// `[W, C]`, oldest first.
    pub(crate) taps: &'a [f32],
    /// `[HV]`.
    pub(crate) a_log: &'a [f32],
    /// `[HV]`.
    pub(crate) dt_bias: &'a [f32],
    /// `[V]`.
    pub(crate) norm: &'a [f32],
    /// `[D, HV V]`.
    pub(crate) out_proj: &'a [E],
    /// `[S, C, W - 1]`.
    pub(crate) conv_state: &'a [E],
    /// `[S, HV, K, V]`.
    pub(crate) state: &'a [f32],
    /// `[S + 1]`.
    pub(crate) cu_seqlens: &'a [i64],
    pub(crate) eps: f32,
    pub(crate) d: usize,
    pub(crate) w: usize,
    pub(crate) sizes: Sizes,
}

/// What the layer writes.
pub(crate) struct Out<'a, E> {
    /// `[N, D]`.
    pub(crate) o: &'a mut [E],
    /// `[S, C, W - 1]`.
    pub(crate) conv_state: &'a mut [E],
    /// `[S, HV, K, V]`.
    pub(crate) state: &'a mut [f32],
}

/// Between input and output; `C = 2 HK K + HV V`.
pub(crate) struct Scratch<E> {
    /// `[N, 2 HK K + 2 HV V]`, as projected.
    qkvz: Vec<E>,
    /// `[N, 2 HV]`, as projected.
    ba: Vec<E>,
    /// `[N, C]`: queries, keys, values.
    qkv: Vec<E>,
    /// `[N, C]`, convolved.
    mixed: Vec<E>,
    /// `[N, HK, K]`.
    q: Vec<E>,
    /// `[N, HK, K]`.
    k: Vec<E>,
    /// `[N, HV, V]`.
    v: Vec<E>,
    /// `[N, HV, V]`.
    z: Vec<E>,
    /// `[N, HV]`.
    b: Vec<E>,
    /// `[N, HV]`.
    a: Vec<E>,
    /// `[HV]`.
    rates: Vec<f32>,
    /// `[N, HV]`.
    g: Vec<f32>,
    /// `[N, HV]`.
    beta: Vec<f32>,
    rule: gated_delta_rule::Scratch,
    /// `[N, HV, V]` output of the delta rule.
    o: Vec<E>,
    /// `[N, HV, V]`, normed and gated.
    gated: Vec<E>,
}

impl<E: Stored> Scratch<E> {
    /// Not yet written: NaN.
    pub(crate) fn new(&Case { b, t, hk, hv, k, v, .. }: &Case) -> Self {
        let n = b * t;
        let (keys, values) = (n * hk * k, n * hv * v);
        let stored = |size: usize| vec![E::NAN; size];
        let wide = |size: usize| vec![f32::NAN; size];
        Scratch {
            qkvz: stored(2 * (keys + values)),
            ba: stored(2 * n * hv),
            qkv: stored(2 * keys + values),
            mixed: stored(2 * keys + values),
            q: stored(keys),
            k: stored(keys),
            v: stored(values),
            z: stored(values),
            b: stored(n * hv),
            a: stored(n * hv),
            rates: wide(hv),
            g: wide(n * hv),
            beta: wide(n * hv),
            rule: gated_delta_rule::Scratch { q: wide(keys), k: wide(keys), o: wide(values) },
            o: stored(values),
            gated: stored(values),
        }
    }
}

impl<E: Stored> Layer<'_, E> {
    /// Projections, convolution, gates, delta rule, gated norm, projection.
    pub(crate) fn run(&self, out: &mut Out<'_, E>, scratch: &mut Scratch<E>, plant: Planted) {
        let Layer { x, d, sizes, .. } = *self;
        let Sizes { hk, hv, k, v } = sizes;
        let s = scratch;
        linear(&mut s.qkvz, &Projection { x, weight: self.in_proj_qkvz, d }, HONEST);
        linear(&mut s.ba, &Projection { x, weight: self.in_proj_ba, d }, HONEST);
        layout::ungroup_qkvz(&mut s.qkv, &mut s.z, &s.qkvz, sizes, plant);
        layout::ungroup_ba(&mut s.b, &mut s.a, &s.ba, sizes, plant);

        let c = 2 * hk * k + hv * v;
        let taps = plants::taps(self.taps, sizes, plant);
        let convolution = causal_conv1d::Problem {
            x: &s.qkv,
            taps: &taps,
            state: self.conv_state,
            cu_seqlens: self.cu_seqlens,
            c,
            w: self.w,
        };
        convolution.run(&mut s.mixed, out.conv_state, inside(plant));
        layout::split(&mut [&mut s.q, &mut s.k, &mut s.v], &s.mixed, &[hk * k, hk * k, hv * v]);

        rates(&mut s.rates, self.a_log, HONEST);
        log_decay(&mut s.g, &s.a, &s.rates, &plants::dt_bias(self.dt_bias, plant), HONEST);
        write_strength(&mut s.beta, &s.b, HONEST);
        let (mut q, mut key) = (&s.q, &s.k);
        if plant.is("q-k-swapped") {
            std::mem::swap(&mut q, &mut key);
        }
        let rule = gated_delta_rule::Problem {
            q,
            k: key,
            v: &s.v,
            g: &s.g,
            beta: &s.beta,
            state: self.state,
            cu_seqlens: self.cu_seqlens,
            sizes,
            eps: L2_EPS,
        };
        gated_delta_rule::<E, Recurrent>(&mut s.o, out.state, &mut s.rule, &rule, inside(plant));

        let norm = plants::norm(self.norm, hv, plant);
        rms_norm_gated(&mut s.gated, &s.o, &s.z, &norm, self.eps, inside(plant));
        plants::reorder(&mut s.gated, hv, v, plant);
        let out_proj = Projection { x: &s.gated, weight: self.out_proj, d: hv * v };
        linear(out.o, &out_proj, HONEST);
    }
}
