//! Attention over a cache in FP8: keys and values as codes of `float8_e4m3fn` under one scale for each of the
//! two tensors, which is 1.
//!
//! One scale for a tensor is what the peers have (`k_scale`, `v_scale`), and 1 is what they take where a checkpoint
//! brings none, as the official ones of this model. Its keys are normed, so that they are far from the ends of the
//! type; what is beyond 448 saturates.
//! Source: <https://docs.vllm.ai/en/latest/features/quantization/quantized_kvcache/>.

use golden::{
    Spec, fp8,
    ops::attention::{Attention, Case, Inputs, Outputs},
};
use zerocopy::{Immutable, IntoBytes};

use super::{Kernel, Loaded, Planted, Qkv, Stored, attention};

/// A code.
#[derive(Clone, Copy)]
struct E4m3(u8);

impl Stored for E4m3 {
    const NAN: E4m3 = E4m3(0x7f);
    fn load(self) -> f32 {
        fp8::to_f32(self.0)
    }
    fn store(x: f32) -> E4m3 {
        E4m3(fp8::from_f32(x))
    }
}

/// A problem in memory, and its cache.
pub(super) struct InFp8<E> {
    of: Loaded<E>,
    k: Vec<E4m3>,
    v: Vec<E4m3>,
}

impl<E: Stored> InFp8<E> {
    pub(super) fn new(spec: &Spec<Case>, x: &Inputs) -> Self {
        let of = Loaded::new(spec, x);
        let (k, v) = (vec![E4m3::NAN; of.k.len()], vec![E4m3::NAN; of.v.len()]);
        InFp8 { of, k, v }
    }
}

/// What a cache keeps of numbers, so many to a token.
fn keep<E: Stored + IntoBytes + Immutable>(
    to: &mut [E4m3],
    from: &[E],
    of_token: usize,
    plant: Planted,
) {
    // As a code under a bias of one more it is half of what it was.
    let read = if plant.is("fnuz-bias") { 0.5 } else { 1.0 };
    let cut = if plant.is("codes-cut") { !0xf_ffff } else { !0 };
    for (to, from) in to.iter_mut().zip(from) {
        let from = f32::from_bits(from.load().to_bits() & cut);
        *to = E4m3::store(E4m3::store(from).load() * read);
    }
    if plant.is("page-as-stored") && !from.is_empty() {
        let page = (from.len() / of_token - 1) / PAGE * PAGE * of_token;
        for (to, &byte) in to[page..].iter_mut().zip(from[page..].as_bytes()) {
            *to = E4m3(byte);
        }
    }
}

/// Tokens of a page, in that fault.
const PAGE: usize = 64;

impl<E: Stored + IntoBytes + Immutable> Kernel<Attention> for InFp8<E> {
    fn poison(&mut self) {
        self.of.poison();
        self.k.fill(E4m3::NAN);
        self.v.fill(E4m3::NAN);
    }

    fn run(&mut self, plant: Planted) {
        let of_token = self.of.case.hkv * self.of.case.h;
        keep(&mut self.k, &self.of.k, of_token, plant);
        keep(&mut self.v, &self.of.v, of_token, plant);
        let of = &mut self.of;
        let qkv = Qkv {
            q: &of.q,
            k: &self.k,
            v: &self.v,
            gate: of.gate.as_deref(),
            queries: &of.queries,
            keys: &of.keys,
            hq: of.case.hq,
            hkv: of.case.hkv,
            h: of.case.h,
        };
        attention(&mut of.o, &qkv, plant);
    }

    fn inputs(&self) -> Inputs {
        self.of.inputs()
    }

    fn outputs(&self) -> Outputs {
        self.of.outputs()
    }
}

#[cfg(test)]
mod tests {
    use super::{E4m3, Stored};

    #[test]
    fn what_is_beyond_the_type_saturates() {
        let kept = |x: f32| E4m3::store(x).load();
        assert_eq!(
            [1.0, -1.0625, 1.0626, 447.0, 1e4, -1e9].map(kept),
            [1.0, -1.0, 1.125, 448.0, 448.0, -448.0]
        );
        assert_eq!(
            [0.0, 2.0_f32.powi(-9), 2.0_f32.powi(-11)].map(kept),
            [0.0, 2.0_f32.powi(-9), 0.0]
        );
        assert!(kept(f32::NAN).is_nan() && E4m3::NAN.load().is_nan());
    }
}
