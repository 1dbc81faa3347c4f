//! `gated_delta_rule`: a piece leaves its state.

use std::ops::Range;

use golden::{
    ops::gated_delta_rule::{Inputs, Outputs},
    packed::cu_seqlens,
};
use reference::{Real, real::Site};

use super::{Before, Head, Parts, part, tokens};

pub(crate) const PARTS: Parts = Parts {
    tokens: &["q", "k", "v", "g", "beta", "o"],
    seen: &[],
    cached: &[],
    states: &["state"],
    heads: &[
        ("q", 1, Head::Key),
        ("k", 1, Head::Key),
        ("v", 1, Head::Value),
        ("g", 1, Head::Value),
        ("beta", 1, Head::Value),
        ("state", 1, Head::Value),
        ("o", 1, Head::Value),
    ],
};

/// A state passes from piece to piece as it is stored: the site rounds it where a plan says so.
pub(crate) fn cut<R: Real>(
    x: &Inputs<R>,
    i: usize,
    at: Range<usize>,
    before: Before<'_, Inputs<R>, Outputs<R>>,
) -> Inputs<R> {
    let rows = tokens(&x.cu_seqlens, i, &at);
    let carried = |o: &Outputs<R>| o.state.map(|&s| s.at(Site::State)).into_shared();
    Inputs {
        q: part(&x.q, &rows),
        k: part(&x.k, &rows),
        v: part(&x.v, &rows),
        g: part(&x.g, &rows),
        beta: part(&x.beta, &rows),
        state: before.map_or_else(|| part(&x.state, &(i..i + 1)), |(_, o)| carried(o)),
        cu_seqlens: cu_seqlens(&[at.len()]),
        eps: x.eps,
    }
}

/// The same problem with every gate one, and the answer of the delta rule that has none.
pub(crate) fn gate_one<R: Real>(x: &Inputs<R>) -> (Inputs<R>, Outputs<R>) {
    let x = Inputs { g: x.g.map(|_| R::zero()).into_shared(), ..x.clone() };
    let o = reference::delta_rule(&x);
    (x, o)
}
