use golden::{
    ops,
    ops::moe_layer::{Inputs, Outputs},
};

use ndarray::Array2;

use crate::{
    moe_experts, moe_router, moe_router_forced,
    probe::Probe,
    real::{Real, Site},
    shared_expert,
};

/// `o = moe_experts(x, moe_router(x)) + shared_expert(x)`.
///
/// `x`, `o`: `[N, D]`; `ids`: `[N, A]`; `margins`: `[N]`.
pub fn moe_layer<R: Real>(x: &Inputs<R>) -> Outputs<R> {
    moe_layer_seen(x, None, &mut Probe::off())
}

/// [`moe_layer`] with the experts given, `[N, A]`.
pub fn moe_layer_forced<R: Real>(x: &Inputs<R>, ids: &Array2<i64>) -> Outputs<R> {
    moe_layer_seen(x, Some(ids), &mut Probe::off())
}

fn router<R: Real>(x: &Inputs<R>) -> ops::moe_router::Inputs<R> {
    ops::moe_router::Inputs {
        x: x.x.clone(),
        weight: x.router.clone(),
        top_k: x.top_k,
        norm_topk_prob: x.norm_topk_prob,
    }
}

/// [`moe_layer`] with the experts given or not, each op shown to a probe.
pub fn moe_layer_seen<R: Real>(
    x: &Inputs<R>,
    ids: Option<&Array2<i64>>,
    probe: &mut Probe<'_>,
) -> Outputs<R> {
    let mut routed = match ids {
        None => moe_router(&router(x)),
        Some(ids) => moe_router_forced(&router(x), ids),
    };
    see_routed(&mut routed, probe);
    let mut o = moe_experts(&ops::moe_experts::Inputs {
        x: x.x.clone(),
        ids: routed.ids.clone(),
        weights: routed.weights.clone(),
        gate_proj: x.gate_proj.clone(),
        up_proj: x.up_proj.clone(),
        down_proj: x.down_proj.clone(),
    })
    .o;
    probe.see("moe_experts", "o", &mut o);
    let mut shared = shared_expert(&ops::shared_expert::Inputs {
        x: x.x.clone(),
        gate_proj: x.shared_gate_proj.clone(),
        up_proj: x.shared_up_proj.clone(),
        down_proj: x.shared_down_proj.clone(),
        gate: x.shared_gate.clone(),
    });
    probe.see("shared_expert", "o", &mut shared.o);
    o.zip_mut_with(&shared.o, |o, &shared| *o = (*o + shared).at(Site::MoeOut));
    probe.see("moe_layer", "o", &mut o);
    Outputs { o, ids: routed.ids, weights: routed.weights, margins: routed.margins }
}

/// What a router chose, and why.
pub(crate) fn see_routed<R: Real>(routed: &mut ops::moe_router::Outputs<R>, probe: &mut Probe<'_>) {
    probe.see("moe_router", "logits", &mut routed.logits);
    probe.see("moe_router", "margins", &mut routed.margins);
    probe.see_ids("moe_router", "ids", &mut routed.ids);
    probe.see("moe_router", "weights", &mut routed.weights);
}
