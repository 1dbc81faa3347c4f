use std::{collections::BTreeMap, convert::Infallible};

use golden::{
    Tensor2,
    ops::moe_experts::{Inputs, Outputs},
};
use ndarray::{Array2, Axis};

use crate::{
    real::{Real, Site},
    shared_expert::swiglu,
};

/// The weights of one expert.
#[derive(Clone, Debug)]
pub struct Expert {
    /// `[F, D]`.
    pub gate_proj: Tensor2<f32>,
    /// `[F, D]`.
    pub up_proj: Tensor2<f32>,
    /// `[D, F]`.
    pub down_proj: Tensor2<f32>,
}

/// `o = sum_a weights_a * down_e( silu(gate_e x) * (up_e x) )`, `e = ids_a`, summed in ascending order of
/// the experts, as the official code does.
///
/// `x`, `o`: `[N, D]`; `ids`, `weights`: `[N, A]`; `gate_proj`, `up_proj`: `[E, F, D]`;
/// `down_proj`: `[E, D, F]`.
pub fn moe_experts<R: Real>(x: &Inputs<R>) -> Outputs<R> {
    let expert = |e: usize| -> Result<Expert, Infallible> {
        let take = |w: &golden::Tensor3<f32>| w.index_axis(Axis(0), e).to_owned().into_shared();
        Ok(Expert {
            gate_proj: take(&x.gate_proj),
            up_proj: take(&x.up_proj),
            down_proj: take(&x.down_proj),
        })
    };
    match moe_experts_from(&x.x, &x.ids, &x.weights, expert) {
        Ok(o) => Outputs { o },
    }
}

/// [`moe_experts`] with each expert fetched when it is used, once, in ascending order: memory holds
/// one expert at a time.
///
/// # Errors
/// What `expert` fails with.
pub fn moe_experts_from<R: Real, E>(
    x: &Tensor2<R>,
    ids: &Tensor2<i64>,
    weights: &Tensor2<R>,
    mut expert: impl FnMut(usize) -> Result<Expert, E>,
) -> Result<Tensor2<R>, E> {
    let mut users: BTreeMap<usize, Vec<(usize, usize)>> = BTreeMap::new();
    for ((token, slot), &id) in ids.indexed_iter() {
        users.entry(id as usize).or_default().push((token, slot));
    }
    let mut o = Array2::from_elem((ids.nrows(), x.ncols()), R::zero());
    for (e, users) in users {
        let Expert { gate_proj, up_proj, down_proj } = expert(e)?;
        let tokens: Vec<usize> = users.iter().map(|&(token, _)| token).collect();
        let out =
            swiglu(&x.select(Axis(0), &tokens).into_shared(), &gate_proj, &up_proj, &down_proj);
        for (row, &(token, slot)) in out.rows().into_iter().zip(&users) {
            let weight = weights[[token, slot]];
            o.row_mut(token).zip_mut_with(&row, |o, &x| {
                let weighted = (x.at(Site::ExpertOut) * weight).at(Site::ExpertOut);
                *o = (*o + weighted).at(Site::ExpertSum);
            });
        }
    }
    Ok(o.mapv_into(|o| o.at(Site::MoeOut)).into_shared())
}
