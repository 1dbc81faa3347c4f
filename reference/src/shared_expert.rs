use golden::{
    Tensor2,
    ops::shared_expert::{Inputs, Outputs},
};

use crate::{
    linear::{decide, project_at},
    real::{Real, Site},
};

/// `o = sigmoid(gate x) * down( silu(gate_proj x) * (up_proj x) )`.
///
/// `x`, `o`: `[N, D]`; `gate_proj`, `up_proj`: `[F, D]`; `down_proj`: `[D, F]`; `gate`: `[1, D]`.
pub fn shared_expert<R: Real>(x: &Inputs<R>) -> Outputs<R> {
    let gate = decide(&x.x, &x.gate);
    let mut o = swiglu(&x.x, &x.gate_proj, &x.up_proj, &x.down_proj);
    for (mut row, gate) in o.rows_mut().into_iter().zip(gate.column(0)) {
        let gate = gate.sigmoid().at(Site::Sigmoid);
        row.mapv_inplace(|o| (o * gate).at(Site::GateOut));
    }
    Outputs { o }
}

/// `down( silu(gate_proj x) * (up_proj x) )`: the MLP of a dense layer, and every expert.
///
/// `x` and the result: `[N, D]`; `gate_proj`, `up_proj`: `[F, D]`; `down_proj`: `[D, F]`.
pub fn swiglu<R: Real>(
    x: &Tensor2<R>,
    gate_proj: &Tensor2<f32>,
    up_proj: &Tensor2<f32>,
    down_proj: &Tensor2<f32>,
) -> Tensor2<R> {
    let project = |x: &Tensor2<R>, weight| project_at(Site::ExpertLinear, x, weight);
    let mut hidden = project(x, gate_proj);
    hidden.zip_mut_with(&project(x, up_proj), |gate, &up| {
        *gate = (gate.silu().at(Site::Silu) * up).at(Site::ExpertHidden);
    });
    project(&hidden, down_proj)
}
