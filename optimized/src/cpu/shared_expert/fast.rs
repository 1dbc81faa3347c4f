//! The shared expert on vectors: one more expert, of all tokens, with a gate per token.

use golden::{
    Spec,
    ops::shared_expert::{Case, Inputs, Outputs, SharedExpert},
};

use crate::cpu::{
    activation::sigmoid,
    linear::{
        activations::Reads,
        fast::{Source, linear},
    },
    moe_experts::fast::{Expert, Groups, moe_experts},
    portable::Planted,
    room::room,
    simd::{Simd, Wide},
    vector::{Fast, flat, flat_mut},
    weight::Weight,
};

/// `o += sigmoid(gate x) down(silu(gate_proj x) * (up_proj x))`. `o`, `x`: `[N, D]`; `gate`: `[1, D]`.
pub(crate) fn shared_expert<S: Simd>(
    s: S,
    o: &mut [f32],
    x: &[f32],
    gate: &Weight,
    expert: &Expert<'_, Weight>,
    plant: Planted,
) {
    let n = x.len() / expert.gate_proj.columns();
    let mut open = room(n);
    linear(s, &mut open, x, gate);
    open.iter_mut().for_each(|open| *open = sigmoid(*open));
    match plant.0 {
        Some("gate-missing") => open.fill(1.0),
        Some("gate-of-first-token") => {
            let first = open[0];
            open.fill(first);
        }
        _ => {}
    }
    moe_experts(s, o, x, &Groups::of_all(n), &open, |_| Expert { ..*expert });
}

/// A problem of the op.
pub(crate) struct Packed {
    x: Vec<f32>,
    gate: Weight,
    gate_proj: Weight,
    up_proj: Weight,
    down_proj: Weight,
}

impl Fast for SharedExpert {
    type Packed<E: Wide> = Packed;

    fn pack<E: Wide>(spec: &Spec<Case>, x: &Inputs, reads: Reads) -> Packed {
        let Case { d, f, .. } = spec.case;
        Packed {
            x: flat(&x.x),
            // A gate reads activations as they are.
            gate: Weight::of(spec, Reads::F32, &flat(&x.gate), d),
            gate_proj: Weight::of(spec, reads, &flat(&x.gate_proj), d),
            up_proj: Weight::of(spec, reads, &flat(&x.up_proj), d),
            down_proj: Weight::of(spec, reads, &flat(&x.down_proj), f),
        }
    }

    fn run<S: Simd, E: Wide>(s: S, x: &Packed, o: &mut Outputs, plant: Planted) {
        let (gate_proj, up_proj) = if plant.is("gate-up-swapped") {
            (&x.up_proj, &x.gate_proj)
        } else {
            (&x.gate_proj, &x.up_proj)
        };
        let expert = Expert { gate_proj, up_proj, down_proj: &x.down_proj };
        let o = flat_mut(&mut o.o);
        o.fill(0.0);
        shared_expert(s, o, &x.x, &x.gate, &expert, plant);
    }
}
