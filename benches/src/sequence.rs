//! Ops whose tokens form sequences: what of them belongs to which token, how a sequence is cut, and
//! what one piece leaves to the next.

pub(crate) mod attention;
pub(crate) mod attention_layer;
pub(crate) mod causal_conv1d;
pub(crate) mod gated_delta_rule;
pub(crate) mod gdn_layer;

use std::{collections::HashMap, ops::Range};

use golden::{
    Case, Spec, Tensor1, Tensors, View, ViewMut, ops,
    packed::{cu_seqlens, rows},
};
use ndarray::{ArcArray, ArrayViewMutD, Axis, RemoveAxis, Slice, concatenate};

use reference::Real;

use crate::{
    answer::Answer,
    same::{Tap, Taps},
};

/// Which tensors of an op belong to what. Names of inputs and outputs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Parts {
    /// One row per new token.
    pub(crate) tokens: &'static [&'static str],
    /// One row per token that can be seen: of each sequence, cached ones and then new ones.
    pub(crate) seen: &'static [&'static str],
    /// One row per cached token.
    pub(crate) cached: &'static [&'static str],
    /// One entry per sequence; as outputs, what is left to the next token.
    pub(crate) states: &'static [&'static str],
    /// Axes along which heads (or channels) lie, none of which sees another.
    pub(crate) heads: &'static [(&'static str, usize, Head)],
}

/// What lies along an axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Head {
    /// Key heads (or channels).
    Key,
    /// Value or query heads, so many to a key head.
    Value,
}

/// An op whose tokens form sequences.
pub(crate) trait Sequence: Answer {
    /// What of it belongs to what.
    const PARTS: Parts;

    /// The tokens `at` of sequence `i` as a problem of their own, after those `before` them.
    fn cut<R: Real>(
        x: &Self::Inputs<R>,
        i: usize,
        at: Range<usize>,
        before: Before<'_, Self::Inputs<R>, Self::Outputs<R>>,
    ) -> Self::Inputs<R>;

    /// The same problem with every gate one, and what an op without gates answers to it.
    fn gate_one<R: Real>(_: &Self::Inputs<R>) -> Option<(Self::Inputs<R>, Self::Outputs<R>)> {
        None
    }
}

macro_rules! sequence {
    ($module:ident::$name:ident $(, $gate_one:path)?) => {
        impl Sequence for ops::$module::$name {
            const PARTS: Parts = $module::PARTS;

            fn cut<R: Real>(
                x: &Self::Inputs<R>,
                i: usize,
                at: Range<usize>,
                before: Before<'_, Self::Inputs<R>, Self::Outputs<R>>,
            ) -> Self::Inputs<R> {
                $module::cut(x, i, at, before)
            }

            $(fn gate_one<R: Real>(
                x: &Self::Inputs<R>,
            ) -> Option<(Self::Inputs<R>, Self::Outputs<R>)> {
                Some($gate_one(x))
            })?
        }
    };
}

sequence!(causal_conv1d::CausalConv1d);
sequence!(gated_delta_rule::GatedDeltaRule, gated_delta_rule::gate_one);
sequence!(attention::Attention);
sequence!(gdn_layer::GdnLayer);
sequence!(attention_layer::AttentionLayer);

/// What was before a piece: the piece before it, and its answer.
pub(crate) type Before<'a, I, O> = Option<(&'a I, &'a O)>;

/// Rows of a tensor.
fn part<T: Clone, D: RemoveAxis>(x: &ArcArray<T, D>, rows: &Range<usize>) -> ArcArray<T, D> {
    x.slice_axis(Axis(0), Slice::from(rows.clone())).to_owned().into_shared()
}

/// One tensor after another.
fn after<T: Clone, D: RemoveAxis>(a: &ArcArray<T, D>, b: &ArcArray<T, D>) -> ArcArray<T, D> {
    concatenate(Axis(0), &[a.view(), b.view()]).expect("rows of one shape").into_shared()
}

/// Rows of the tokens `at` of sequence `i`.
fn tokens(cu_seqlens: &Tensor1<i64>, i: usize, at: &Range<usize>) -> Range<usize> {
    let start = rows(cu_seqlens)[i].start;
    start + at.start..start + at.end
}

/// The spec of the tokens `at` of one sequence of a problem.
pub(crate) fn piece<C: Case>(spec: &Spec<C>, at: &Range<usize>) -> Spec<C> {
    let old = spec.case.sizes();
    let size = |letter: &str| {
        C::LETTERS.iter().position(|l| *l == letter).map_or(0, |position| old[position])
    };
    let cached = size("TK").saturating_sub(size("T"));
    resized(spec, &[("B", 1), ("T", at.len()), ("TK", cached + at.end)])
}

/// A spec with some sizes changed.
pub(crate) fn resized<C: Case>(spec: &Spec<C>, new: &[(&str, usize)]) -> Spec<C> {
    let mut sizes = spec.case.sizes();
    for (size, letter) in sizes.iter_mut().zip(C::LETTERS) {
        if let Some((_, new)) = new.iter().find(|(name, _)| name == letter) {
            *size = *new;
        }
    }
    Spec { case: C::from_sizes(&sizes), ..spec.clone() }
}

fn offsets(inputs: &impl Tensors, names: &[&str]) -> Option<Tensor1<i64>> {
    inputs.tensors().into_iter().find_map(|(name, view)| match view {
        View::I64(x) if names.contains(&name) => Some(x.iter().copied().collect()),
        _ => None,
    })
}

/// Rows of the new tokens of each sequence.
pub(crate) fn new_rows(inputs: &impl Tensors) -> Vec<Range<usize>> {
    offsets(inputs, &["cu_seqlens", "cu_seqlens_q"]).map_or_else(Vec::new, |cu| rows(&cu))
}

/// Rows of the tokens that each sequence can see, or has cached, where the op has such a tensor.
fn other_rows(inputs: &impl Tensors) -> Vec<Range<usize>> {
    offsets(inputs, &["cu_seqlens_k", "cu_seqlens_cache"]).map_or_else(Vec::new, |cu| rows(&cu))
}

/// Cuts the tokens of a problem into sequences of other lengths, as many and with the same sum: what
/// was drawn for one sequence becomes part of another.
pub(crate) fn relength(inputs: &mut impl Tensors, lengths: &[usize]) {
    let new = new_rows(inputs);
    let cached: Vec<usize> = other_rows(inputs)
        .iter()
        .zip(&new)
        .map(|(seen, new)| seen.len().saturating_sub(new.len()))
        .collect();
    for (name, view) in inputs.tensors_mut() {
        let ViewMut::I64(mut cu) = view else { continue };
        let lengths = match name {
            "cu_seqlens" | "cu_seqlens_q" => lengths.to_vec(),
            "cu_seqlens_k" => lengths.iter().zip(&cached).map(|(new, old)| new + old).collect(),
            _ => continue,
        };
        cu.iter_mut().zip(cu_seqlens(&lengths)).for_each(|(cu, end)| *cu = end);
    }
}

/// Which rows of a tensor belong to sequence `i`.
fn rows_of(
    parts: &Parts,
    name: &str,
    new: &[Range<usize>],
    other: &[Range<usize>],
    i: usize,
) -> Option<Range<usize>> {
    if parts.tokens.contains(&name) {
        Some(new[i].clone())
    } else if parts.seen.contains(&name) || parts.cached.contains(&name) {
        Some(other[i].clone())
    } else if parts.states.contains(&name) {
        Some(i..i + 1)
    } else {
        None
    }
}

fn for_rows(
    inputs: &mut impl Tensors,
    parts: &Parts,
    mut f: impl FnMut(&str, ArrayViewMutD<'_, f32>, &dyn Fn(usize) -> Range<usize>),
) {
    let (new, other) = (new_rows(inputs), other_rows(inputs));
    for (name, view) in inputs.tensors_mut() {
        let ViewMut::F32(x) = view else { continue };
        if rows_of(parts, name, &new, &other, 0).is_some() {
            f(name, x, &|i| rows_of(parts, name, &new, &other, i).unwrap_or(0..0));
        }
    }
}

/// Everything of a sequence, cached and new, becomes NaN.
pub(crate) fn poison(inputs: &mut impl Tensors, parts: &Parts, sequence: usize) {
    for_rows(inputs, parts, |_, mut x, rows| {
        x.slice_axis_mut(Axis(0), Slice::from(rows(sequence))).fill(f32::NAN);
    });
}

/// Puts the sequences into another order: `order[i]` becomes the `i`-th.
pub(crate) fn reorder(inputs: &mut impl Tensors, parts: &Parts, order: &[usize]) {
    let (new, other) = (new_rows(inputs), other_rows(inputs));
    for_rows(inputs, parts, |_, mut x, rows| {
        let taken: Vec<usize> = order.iter().flat_map(|&i| rows(i)).collect();
        let moved = x.select(Axis(0), &taken);
        x.assign(&moved);
    });
    for (name, view) in inputs.tensors_mut() {
        let ViewMut::I64(mut cu) = view else { continue };
        let old = match name {
            "cu_seqlens" | "cu_seqlens_q" => &new,
            "cu_seqlens_k" | "cu_seqlens_cache" => &other,
            _ => continue,
        };
        let lengths: Vec<usize> = order.iter().map(|&i| old[i].len()).collect();
        cu.iter_mut().zip(cu_seqlens(&lengths)).for_each(|(cu, end)| *cu = end);
    }
}

/// Gives token `to` of the first sequence everything that token `from` has.
pub(crate) fn edit(inputs: &mut impl Tensors, parts: &Parts, to: usize, from: usize) {
    let new = new_rows(inputs).first().map_or(0, ExactSizeIterator::len);
    for_rows(inputs, parts, |name, mut x, rows| {
        if parts.states.contains(&name) || parts.cached.contains(&name) {
            return;
        }
        // Where cached tokens stand before the new ones, those stay.
        let first = rows(0).end - new;
        let row = x.index_axis(Axis(0), first + from).to_owned();
        x.index_axis_mut(Axis(0), first + to).assign(&row);
    });
}

/// An order of heads that no head survives, if there are two: of key heads and of value heads, each
/// value head staying with its key head.
pub(crate) fn shuffled(inputs: &impl Tensors, parts: &Parts) -> Option<(Vec<usize>, Vec<usize>)> {
    let count = |wanted: Head| {
        let (name, axis, _) = parts.heads.iter().find(|(.., head)| *head == wanted)?;
        let tensors = inputs.tensors();
        let (_, view) = tensors.iter().find(|(other, _)| other == name)?;
        view.shape().get(*axis).copied()
    };
    let keys = count(Head::Key)?;
    let values = count(Head::Value).unwrap_or(keys);
    let group = values / keys;
    let turned = |n: usize| (0..n).map(move |i| (i + 1) % n);
    let key_order: Vec<usize> = turned(keys).collect();
    let value_order =
        turned(keys).flat_map(|k| turned(group).map(move |j| k * group + j)).collect();
    (1 < values).then_some((key_order, value_order))
}

/// Puts heads into another order: `order[i]` becomes the `i`-th.
pub(crate) fn permute(
    tensors: Vec<(&'static str, ViewMut<'_>)>,
    parts: &Parts,
    keys: &[usize],
    values: &[usize],
) {
    for (name, view) in tensors {
        let ViewMut::F32(mut x) = view else { continue };
        if let Some((_, axis, head)) = parts.heads.iter().find(|(other, ..)| *other == name) {
            let order = if *head == Head::Key { keys } else { values };
            let moved = x.select(Axis(*axis), order);
            x.assign(&moved);
        }
    }
}

/// The order that undoes another.
pub(crate) fn inverse(order: &[usize]) -> Vec<usize> {
    let mut back = vec![0; order.len()];
    order.iter().enumerate().for_each(|(i, &from)| back[from] = i);
    back
}

/// Answers as one, tensor by tensor, one after another along the first axis: of pieces in time, of
/// sequences in a row. A tensor that an answer lacks is not there in it.
pub(crate) fn joined(all: Vec<Taps>) -> Taps {
    let Some(last) = all.last() else { return Vec::new() };
    let names: Vec<String> = last.iter().map(|(name, _)| name.clone()).collect();
    let mut columns: HashMap<String, Vec<Tap>> = HashMap::new();
    for (name, tap) in all.into_iter().flatten() {
        columns.entry(name).or_default().push(tap);
    }
    let column = |name: String| {
        let tap = stacked(columns.get(&name).map_or(&[], Vec::as_slice));
        (name, tap)
    };
    names.into_iter().map(column).collect()
}

/// Tensors of one type along their first axis.
pub(crate) fn stacked(taps: &[Tap]) -> Tap {
    macro_rules! stack {
        ($kind:ident) => {{
            let views: Vec<_> = taps
                .iter()
                .filter_map(|tap| if let Tap::$kind(x) = tap { Some(x.view()) } else { None })
                .collect();
            Tap::$kind(concatenate(Axis(0), &views).expect("tensors of one shape"))
        }};
    }
    match taps.first() {
        Some(Tap::F64(_)) => stack!(F64),
        Some(Tap::I64(_)) => stack!(I64),
        _ => stack!(F32),
    }
}

/// Rows of a tensor, as a tensor.
pub(crate) fn taken(tap: &Tap, rows: &Range<usize>) -> Tap {
    let rows = Slice::from(rows.clone());
    match tap {
        Tap::F32(x) => Tap::F32(x.slice_axis(Axis(0), rows).to_owned()),
        Tap::F64(x) => Tap::F64(x.slice_axis(Axis(0), rows).to_owned()),
        Tap::I64(x) => Tap::I64(x.slice_axis(Axis(0), rows).to_owned()),
    }
}
