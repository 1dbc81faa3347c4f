//! `attention`: keys and values of earlier tokens are inputs of every piece.

use std::ops::Range;

use golden::{
    ops::attention::{Inputs, Outputs},
    packed::{cu_seqlens, rows},
};
use reference::Real;

use super::{Before, Head, Parts, part, tokens};

pub(crate) const PARTS: Parts = Parts {
    tokens: &["q", "gate", "o"],
    seen: &["k", "v"],
    cached: &[],
    states: &[],
    heads: &[
        ("k", 1, Head::Key),
        ("v", 1, Head::Key),
        ("q", 1, Head::Value),
        ("gate", 1, Head::Value),
        ("o", 1, Head::Value),
    ],
};

/// The cache of a piece is everything before its last token.
pub(crate) fn cut<R: Real>(
    x: &Inputs<R>,
    i: usize,
    at: Range<usize>,
    _: Before<'_, Inputs<R>, Outputs<R>>,
) -> Inputs<R> {
    let queries = tokens(&x.cu_seqlens_q, i, &at);
    let (new, all) = (&rows(&x.cu_seqlens_q)[i], &rows(&x.cu_seqlens_k)[i]);
    let seen = all.len() - new.len() + at.end;
    let keys = all.start..all.start + seen;
    Inputs {
        q: part(&x.q, &queries),
        k: part(&x.k, &keys),
        v: part(&x.v, &keys),
        gate: x.gate.as_ref().map(|gate| part(gate, &queries)),
        cu_seqlens_q: cu_seqlens(&[at.len()]),
        cu_seqlens_k: cu_seqlens(&[seen]),
    }
}
