//! CPU variants of `attention_layer`.

use std::ops::Range;

use golden::{
    Plan, Spec, Tensor1, Variant,
    ops::attention_layer::{AttentionLayer, Case, Inputs, Outputs},
    packed::rows,
    plan::Site,
    tap::Tap,
};
use ndarray::{Ix2, Ix3};

use super::{
    attention::{Qkv, attention},
    linear::{Projection, linear},
    portable::{HONEST, Kernel, Planted, Portable, held, pack, packed, unpacked},
    rms_norm::rms_norm,
    rope::{rope, table},
    stored::Stored,
};
use plants::inside;

mod plants;

/// Every CPU variant, plainest first.
#[inline(never)]
pub fn variants() -> &'static [&'static dyn Variant<AttentionLayer>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<AttentionLayer>] =
    &[&Portable::new("cpu/portable", pack!(Loaded), plan, plants::PLANTS)];

/// What one kernel hands to the next is stored; scores and probabilities are f32.
fn plan(spec: &Spec<Case>) -> Plan {
    let plan = Plan::stored(spec.dtype);
    let stored = plan.output;
    [Site::Linear, Site::Norm, Site::Rope, Site::GateOut]
        .into_iter()
        .fold(plan, |plan, site| plan.round(site, stored))
}

/// A problem in memory.
struct Loaded<E> {
    case: Case,
    x: Vec<E>,
    q_proj: Vec<E>,
    k_proj: Vec<E>,
    v_proj: Vec<E>,
    o_proj: Vec<E>,
    q_norm: Vec<f32>,
    k_norm: Vec<f32>,
    k_cache: Vec<E>,
    v_cache: Vec<E>,
    cu_seqlens: Tensor1<i64>,
    cu_seqlens_cache: Tensor1<i64>,
    new: Vec<Range<usize>>,
    cached: Vec<Range<usize>>,
    inv_freq: Vec<f32>,
    attention_factor: f64,
    eps: f64,
    scratch: Scratch<E>,
    o: Vec<E>,
    k: Vec<E>,
    v: Vec<E>,
}

impl<E: Stored> Loaded<E> {
    fn new(spec: &Spec<Case>, x: &Inputs) -> Self {
        let Case { b, t, hkv, h, .. } = spec.case;
        Loaded {
            case: spec.case.clone(),
            x: packed(&x.x),
            q_proj: packed(&x.q_proj),
            k_proj: packed(&x.k_proj),
            v_proj: packed(&x.v_proj),
            o_proj: packed(&x.o_proj),
            q_norm: x.q_norm.to_vec(),
            k_norm: x.k_norm.to_vec(),
            k_cache: packed(&x.k_cache),
            v_cache: packed(&x.v_cache),
            cu_seqlens: x.cu_seqlens.clone(),
            cu_seqlens_cache: x.cu_seqlens_cache.clone(),
            new: rows(&x.cu_seqlens),
            cached: rows(&x.cu_seqlens_cache),
            inv_freq: x.inv_freq.to_vec(),
            attention_factor: x.attention_factor,
            eps: x.eps,
            scratch: Scratch::new(&spec.case),
            o: vec![E::NAN; x.x.len()],
            k: vec![E::NAN; b * t * hkv * h],
            v: vec![E::NAN; b * t * hkv * h],
        }
    }
}

impl<E: Stored> Kernel<AttentionLayer> for Loaded<E> {
    fn poison(&mut self) {
        self.scratch = Scratch::new(&self.case);
        for output in [&mut self.o, &mut self.k, &mut self.v] {
            output.fill(E::NAN);
        }
    }

    fn run(&mut self, plant: Planted) {
        let Case { d, hq, hkv, h, .. } = self.case;
        let layer = Layer {
            x: &self.x,
            q_proj: &self.q_proj,
            k_proj: &self.k_proj,
            v_proj: &self.v_proj,
            o_proj: &self.o_proj,
            q_norm: &self.q_norm,
            k_norm: &self.k_norm,
            k_cache: &self.k_cache,
            v_cache: &self.v_cache,
            new: &self.new,
            cached: &self.cached,
            inv_freq: &self.inv_freq,
            attention_factor: self.attention_factor as f32,
            eps: self.eps as f32,
            d,
            hq,
            hkv,
            h,
        };
        let mut out = Out { o: &mut self.o, k: &mut self.k, v: &mut self.v };
        layer.run(&mut out, &mut self.scratch, plant);
    }

    fn inputs(&self) -> Inputs {
        let Case { b, t, tk, d, hq, hkv, h, .. } = self.case;
        let cache = Ix3(b * (tk - t), hkv, h);
        Inputs {
            x: unpacked(&self.x, Ix2(b * t, d)),
            q_proj: unpacked(&self.q_proj, Ix2(2 * hq * h, d)),
            k_proj: unpacked(&self.k_proj, Ix2(hkv * h, d)),
            v_proj: unpacked(&self.v_proj, Ix2(hkv * h, d)),
            o_proj: unpacked(&self.o_proj, Ix2(d, hq * h)),
            q_norm: self.q_norm.iter().copied().collect(),
            k_norm: self.k_norm.iter().copied().collect(),
            k_cache: unpacked(&self.k_cache, cache),
            v_cache: unpacked(&self.v_cache, cache),
            cu_seqlens: self.cu_seqlens.clone(),
            cu_seqlens_cache: self.cu_seqlens_cache.clone(),
            inv_freq: self.inv_freq.iter().copied().collect(),
            attention_factor: self.attention_factor,
            eps: self.eps,
            hq,
            hkv,
        }
    }

    fn outputs(&self) -> Outputs {
        let Case { b, t, d, hkv, h, .. } = self.case;
        Outputs {
            o: unpacked(&self.o, Ix2(b * t, d)),
            k: unpacked(&self.k, Ix3(b * t, hkv, h)),
            v: unpacked(&self.v, Ix3(b * t, hkv, h)),
        }
    }

    fn inside(&self) -> Vec<Tap> {
        let Case { b, t, d, hq, hkv, h, .. } = self.case;
        let (n, s) = (b * t, &self.scratch);
        vec![
            held("linear", "q_proj", &s.both, &[n, hq, 2 * h]),
            held("linear", "k_proj", &s.k[0], &[n, hkv, h]),
            held("linear", "v_proj", &self.v, &[n, hkv, h]),
            held("rms_norm", "q_norm", &s.q[1], &[n, hq, h]),
            held("rms_norm", "k_norm", &s.k[1], &[n, hkv, h]),
            held("rope", "q", &s.q[2], &[n, hq, h]),
            held("rope", "k", &self.k, &[n, hkv, h]),
            held("attention", "o", &s.o, &[n, hq, h]),
            held("linear", "o_proj", &self.o, &[n, d]),
        ]
    }
}

/// What the layer reads.
pub(crate) struct Layer<'a, E> {
    /// `[N, D]`.
    pub(crate) x: &'a [E],
    /// `[HQ 2 H, D]`, per head query then gate.
    pub(crate) q_proj: &'a [E],
    /// `[HKV H, D]`.
    pub(crate) k_proj: &'a [E],
    /// `[HKV H, D]`.
    pub(crate) v_proj: &'a [E],
    /// `[D, HQ H]`.
    pub(crate) o_proj: &'a [E],
    /// `[H]`, stored minus one.
    pub(crate) q_norm: &'a [f32],
    /// `[H]`, stored minus one.
    pub(crate) k_norm: &'a [f32],
    /// `[P, HKV, H]`.
    pub(crate) k_cache: &'a [E],
    /// `[P, HKV, H]`.
    pub(crate) v_cache: &'a [E],
    /// Rows of `x` of each sequence.
    pub(crate) new: &'a [Range<usize>],
    /// Rows of the caches of each sequence.
    pub(crate) cached: &'a [Range<usize>],
    /// `[R / 2]`.
    pub(crate) inv_freq: &'a [f32],
    pub(crate) attention_factor: f32,
    pub(crate) eps: f32,
    pub(crate) d: usize,
    pub(crate) hq: usize,
    pub(crate) hkv: usize,
    pub(crate) h: usize,
}

/// What the layer writes.
pub(crate) struct Out<'a, E> {
    /// `[N, D]`.
    pub(crate) o: &'a mut [E],
    /// `[N, HKV, H]`, normed and rotated.
    pub(crate) k: &'a mut [E],
    /// `[N, HKV, H]`.
    pub(crate) v: &'a mut [E],
}

/// Between input and output.
pub(crate) struct Scratch<E> {
    /// `[N, HQ, 2 H]`, as projected.
    both: Vec<E>,
    /// `[N, HQ, H]`.
    gate: Vec<E>,
    /// `[N, HQ, H]`: as projected, normed, rotated.
    q: [Vec<E>; 3],
    /// `[N, HKV, H]`: as projected, normed.
    k: [Vec<E>; 2],
    /// `[N]`.
    positions: Vec<i64>,
    /// `[N, R]`, cosines first.
    table: Vec<f32>,
    /// `[M, HKV, H]`: of each sequence its cache, then its new tokens.
    all_k: Vec<E>,
    /// `[M, HKV, H]`.
    all_v: Vec<E>,
    /// `[N, HQ, H]`, gated.
    o: Vec<E>,
}

impl<E: Stored> Scratch<E> {
    /// Not yet written: NaN.
    pub(crate) fn new(&Case { b, t, tk, hq, hkv, h, r, .. }: &Case) -> Self {
        let (n, m) = (b * t, b * tk);
        let stored = |size: usize| vec![E::NAN; size];
        Scratch {
            both: stored(2 * n * hq * h),
            gate: stored(n * hq * h),
            q: std::array::from_fn(|_| stored(n * hq * h)),
            k: std::array::from_fn(|_| stored(n * hkv * h)),
            positions: vec![i64::MIN; n],
            table: vec![f32::NAN; n * r],
            all_k: stored(m * hkv * h),
            all_v: stored(m * hkv * h),
            o: stored(n * hq * h),
        }
    }
}

impl<E: Stored> Layer<'_, E> {
    /// Projections, norms, rotation, attention over cache and new tokens with its gate, projection.
    pub(crate) fn run(&self, out: &mut Out<'_, E>, scratch: &mut Scratch<E>, plant: Planted) {
        let Layer { x, d, hq, hkv, h, eps, .. } = *self;
        let Scratch { both, gate, q, k, positions, table: turns, all_k, all_v, o } = scratch;
        let ([q, q_normed, q_turned], [k, k_normed]) = (q, k);
        let project = |to: &mut [E], weight| linear(to, &Projection { x, weight, d }, HONEST);
        project(both, self.q_proj);
        project(k, self.k_proj);
        project(out.v, self.v_proj);
        split_gate(q, gate, both, hq, h, plant);

        self.positions(positions, plant);
        table(turns, positions, self.inv_freq, self.attention_factor, inside(plant));
        if plant.is("norm-after-rope") {
            rope(q_normed, q, turns, hq, h, HONEST);
            rope(k_normed, k, turns, hkv, h, HONEST);
            rms_norm(q_turned, q_normed, self.q_norm, eps, HONEST);
            rms_norm(out.k, k_normed, self.k_norm, eps, HONEST);
        } else {
            let (q_norm, k_norm) = plants::norms(self.q_norm, self.k_norm, hq, hkv, plant);
            rms_norm(q_normed, q, &q_norm, eps, inside(plant));
            rms_norm(k_normed, k, &k_norm, eps, inside(plant));
            rope(q_turned, q_normed, turns, hq, h, inside(plant));
            rope(out.k, k_normed, turns, hkv, h, inside(plant));
        }
        plants::values(out.v, turns, hkv, h, plant);

        let keys = self.join(all_k, self.k_cache, out.k, plant);
        self.join(all_v, self.v_cache, out.v, plant);
        if plant.is("key-cached-before-rope") {
            out.k.copy_from_slice(k_normed);
        }
        let qkv = Qkv {
            q: q_turned,
            k: all_k,
            v: all_v,
            gate: Some(gate),
            queries: self.new,
            keys: &keys,
            hq,
            hkv,
            h,
        };
        attention(o, &qkv, inside(plant));
        plants::reorder(o, hq, h, plant);
        linear(out.o, &Projection { x: o, weight: self.o_proj, d: hq * h }, HONEST);
    }

    /// The index of each token in its sequence, cached tokens included, `[N]`.
    fn positions(&self, positions: &mut [i64], plant: Planted) {
        for (new, cached) in self.new.iter().zip(self.cached) {
            let first = match plant.0 {
                Some("positions-restart") => 0,
                Some("positions-run-on") => cached.len() + new.start,
                _ => cached.len(),
            };
            for (i, position) in positions[new.clone()].iter_mut().enumerate() {
                *position = (first + i) as i64;
            }
        }
    }

    /// Of each sequence its cache, then its new tokens; where each sequence then stands.
    ///
    /// `all`: `[M, HKV, H]`; `cache`: `[P, HKV, H]`; `fresh`: `[N, HKV, H]`.
    fn join(&self, all: &mut [E], cache: &[E], fresh: &[E], plant: Planted) -> Vec<Range<usize>> {
        let row = self.hkv * self.h;
        let mut end = 0;
        let mut sequences = Vec::with_capacity(self.new.len());
        for (new, cached) in self.new.iter().zip(self.cached) {
            let start = end;
            for (from, rows) in [(cache, cached), (fresh, new)] {
                let to = &mut all[end * row..(end + rows.len()) * row];
                to.copy_from_slice(&from[rows.start * row..rows.end * row]);
                end += rows.len();
            }
            let seen = if plant.is("cache-lost") { start + cached.len() } else { start };
            sequences.push(seen..end);
        }
        sequences
    }
}

/// Rows of `q_proj` are heads of `[query H | gate H]`.
///
/// `q`, `gate`: `[N, HQ, H]`; `both`: `[N, HQ, 2 H]`.
fn split_gate<E: Stored>(
    q: &mut [E],
    gate: &mut [E],
    both: &[E],
    hq: usize,
    h: usize,
    plant: Planted,
) {
    let width = if plant.is("query-gate-ungrouped") { hq * h } else { h };
    let heads = q.chunks_mut(width).zip(gate.chunks_mut(width)).zip(both.chunks(2 * width));
    for ((q, gate), both) in heads {
        q.copy_from_slice(&both[..width]);
        gate.copy_from_slice(&both[width..]);
    }
}
