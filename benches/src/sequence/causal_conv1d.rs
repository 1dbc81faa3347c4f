//! `causal_conv1d`: a piece leaves its window.

use std::ops::Range;

use golden::{
    ops::causal_conv1d::{Inputs, Outputs},
    packed::cu_seqlens,
};
use reference::Real;

use super::{Before, Head, Parts, part, tokens};

pub(crate) const PARTS: Parts = Parts {
    tokens: &["x", "o"],
    seen: &[],
    cached: &[],
    states: &["state"],
    heads: &[
        ("x", 1, Head::Key),
        ("weight", 0, Head::Key),
        ("state", 1, Head::Key),
        ("o", 1, Head::Key),
    ],
};

pub(crate) fn cut<R: Real>(
    x: &Inputs<R>,
    i: usize,
    at: Range<usize>,
    before: Before<'_, Inputs<R>, Outputs<R>>,
) -> Inputs<R> {
    Inputs {
        x: part(&x.x, &tokens(&x.cu_seqlens, i, &at)),
        weight: x.weight.clone(),
        state: before.map_or_else(|| part(&x.state, &(i..i + 1)), |(_, o)| o.state.clone()),
        cu_seqlens: cu_seqlens(&[at.len()]),
    }
}
