use golden::{
    ops,
    ops::moe_layer::{Inputs, Outputs},
};

use crate::{moe_experts, moe_router, real::Real, shared_expert};

/// `o = moe_experts(x, moe_router(x)) + shared_expert(x)`.
///
/// `x`, `o`: `[N, D]`; `ids`: `[N, A]`; `margins`: `[N]`.
pub fn moe_layer<R: Real>(x: &Inputs<R>) -> Outputs<R> {
    let routed = moe_router(&ops::moe_router::Inputs {
        x: x.x.clone(),
        weight: x.router.clone(),
        top_k: x.top_k,
        norm_topk_prob: x.norm_topk_prob,
    });
    let mut o = moe_experts(&ops::moe_experts::Inputs {
        x: x.x.clone(),
        ids: routed.ids.clone(),
        weights: routed.weights,
        gate_proj: x.gate_proj.clone(),
        up_proj: x.up_proj.clone(),
        down_proj: x.down_proj.clone(),
    })
    .o;
    let shared = shared_expert(&ops::shared_expert::Inputs {
        x: x.x.clone(),
        gate_proj: x.shared_gate_proj.clone(),
        up_proj: x.shared_up_proj.clone(),
        down_proj: x.shared_down_proj.clone(),
        gate: x.shared_gate.clone(),
    });
    o.zip_mut_with(&shared.o, |o, &shared| *o += shared);
    Outputs { o, ids: routed.ids, margins: routed.margins }
}
