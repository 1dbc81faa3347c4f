use golden::{
    Tensor1, Tensor2, ops,
    ops::mtp::{Inputs, Outputs},
};
use ndarray::{Axis, concatenate};

use crate::{linear::project, real::Real, rms_norm};

/// `o = fc( concat[ norm_embedding(embedding), norm_hidden(hidden) ] )`.
///
/// `embedding`, `hidden`, `o`: `[N, D]`; `norm_*`: `[D]`, zero-centred; `fc`: `[D, 2 D]`.
pub fn mtp<R: Real>(x: &Inputs<R>) -> Outputs<R> {
    let norm = |x: &Tensor2<R>, weight: &Tensor1<f32>, eps: f64| {
        rms_norm(&ops::rms_norm::Inputs {
            x: x.clone(),
            residual: None,
            weight: weight.clone(),
            eps,
        })
        .o
    };
    let embedding = norm(&x.embedding, &x.norm_embedding, x.eps);
    let hidden = norm(&x.hidden, &x.norm_hidden, x.eps);
    let both = concatenate(Axis(1), &[embedding.view(), hidden.view()]).expect("N rows each");
    Outputs { o: project(&both.into_shared(), &x.fc) }
}
