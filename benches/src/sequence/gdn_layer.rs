//! `gdn_layer`: a piece leaves its window and its state.

use std::ops::Range;

use golden::{
    ops::gdn_layer::{Inputs, Outputs},
    packed::cu_seqlens,
};
use reference::{Real, real::Site};

use super::{Before, Parts, part, tokens};

pub(crate) const PARTS: Parts = Parts {
    tokens: &["x", "o"],
    seen: &[],
    cached: &[],
    states: &["conv_state", "state"],
    heads: &[],
};

pub(crate) fn cut<R: Real>(
    x: &Inputs<R>,
    i: usize,
    at: Range<usize>,
    before: Before<'_, Inputs<R>, Outputs<R>>,
) -> Inputs<R> {
    let (conv_state, state) = before.map_or_else(
        || (part(&x.conv_state, &(i..i + 1)), part(&x.state, &(i..i + 1))),
        |(_, o)| (o.conv_state.clone(), o.state.map(|&s| s.at(Site::State)).into_shared()),
    );
    Inputs {
        x: part(&x.x, &tokens(&x.cu_seqlens, i, &at)),
        conv_state,
        state,
        cu_seqlens: cu_seqlens(&[at.len()]),
        ..x.clone()
    }
}
