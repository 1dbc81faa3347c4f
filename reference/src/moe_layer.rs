use golden::{
    ops,
    ops::moe_layer::{Inputs, Outputs},
};

use ndarray::Array2;

use crate::{
    moe_experts, moe_router, moe_router_forced,
    real::{Real, Site},
    shared_expert,
};

/// `o = moe_experts(x, moe_router(x)) + shared_expert(x)`.
///
/// `x`, `o`: `[N, D]`; `ids`: `[N, A]`; `margins`: `[N]`.
pub fn moe_layer<R: Real>(x: &Inputs<R>) -> Outputs<R> {
    layer(x, moe_router(&router(x)))
}

/// [`moe_layer`] with the experts given, `[N, A]`.
pub fn moe_layer_forced<R: Real>(x: &Inputs<R>, ids: &Array2<i64>) -> Outputs<R> {
    layer(x, moe_router_forced(&router(x), ids))
}

fn router<R: Real>(x: &Inputs<R>) -> ops::moe_router::Inputs<R> {
    ops::moe_router::Inputs {
        x: x.x.clone(),
        weight: x.router.clone(),
        top_k: x.top_k,
        norm_topk_prob: x.norm_topk_prob,
    }
}

fn layer<R: Real>(x: &Inputs<R>, routed: ops::moe_router::Outputs<R>) -> Outputs<R> {
    let mut o = moe_experts(&ops::moe_experts::Inputs {
        x: x.x.clone(),
        ids: routed.ids.clone(),
        weights: routed.weights.clone(),
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
    o.zip_mut_with(&shared.o, |o, &shared| *o = (*o + shared).at(Site::MoeOut));
    Outputs { o, ids: routed.ids, weights: routed.weights, margins: routed.margins }
}
