//! `attention_layer`: a piece leaves keys and values, which are cached.

use std::ops::Range;

use golden::{
    ops::attention_layer::{Inputs, Outputs},
    packed::{cu_seqlens, rows},
};
use reference::Real;

use super::{Before, Parts, after, part, tokens};

pub(crate) const PARTS: Parts = Parts {
    tokens: &["x", "o", "k", "v"],
    seen: &[],
    cached: &["k_cache", "v_cache"],
    states: &[],
    heads: &[],
};

pub(crate) fn cut<R: Real>(
    x: &Inputs<R>,
    i: usize,
    at: Range<usize>,
    before: Before<'_, Inputs<R>, Outputs<R>>,
) -> Inputs<R> {
    let first = rows(&x.cu_seqlens_cache)[i].clone();
    let (k_cache, v_cache) = before.map_or_else(
        || (part(&x.k_cache, &first), part(&x.v_cache, &first)),
        |(before, o)| (after(&before.k_cache, &o.k), after(&before.v_cache, &o.v)),
    );
    Inputs {
        x: part(&x.x, &tokens(&x.cu_seqlens, i, &at)),
        cu_seqlens_cache: cu_seqlens(&[k_cache.dim().0]),
        k_cache,
        v_cache,
        cu_seqlens: cu_seqlens(&[at.len()]),
        ..x.clone()
    }
}
