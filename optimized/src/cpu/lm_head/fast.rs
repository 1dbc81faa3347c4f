//! The head: a projection whose answer stays in f32.

use golden::{
    Spec,
    ops::lm_head::{Case, Inputs, LmHead, Outputs},
};

use super::spoil;
use crate::cpu::{
    linear::{activations::Reads, fast::linear},
    portable::Planted,
    simd::{Simd, Wide},
    vector::{Fast, flat, flat_mut},
    weight::Weight,
};

/// A problem of the op.
pub(crate) struct Packed {
    x: Vec<f32>,
    weight: Weight,
}

impl Fast for LmHead {
    const KEPT: &'static [&'static str] = &["logits"];
    type Packed<E: Wide> = Packed;

    fn pack<E: Wide>(spec: &Spec<Case>, x: &Inputs, reads: Reads) -> Packed {
        Packed { x: flat(&x.x), weight: Weight::of(spec, reads, &flat(&x.weight), spec.case.d) }
    }

    fn run<S: Simd, E: Wide>(s: S, x: &Packed, o: &mut Outputs, plant: Planted) {
        let m = o.logits.ncols();
        let logits = flat_mut(&mut o.logits);
        linear(s, logits, &x.x, &x.weight);
        spoil(logits, m, plant);
    }
}
