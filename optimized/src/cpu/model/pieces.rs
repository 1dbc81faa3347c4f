//! A long text in pieces: what a step needs beside its answer does not grow with the text.
//!
//! Rows of a step are those of its sequences, one sequence after another; pieces take them in that order,
//! so that what pieces answer is joined by putting it together. Where a sequence is cut, the delta rule
//! would have begun a new chunk anyway: its bits do not depend on the cuts, and nothing else looks at
//! more than one token but attention, which knows positions alone.

use std::ops::Range;

use golden::{
    Error,
    engine::{Routing, Rows, Step, Want},
    tap::{Forced, Tap, Value},
};
use ndarray::{Array2, Axis, Slice};

use crate::cpu::{gated_delta_rule::fast::CHUNK, gdn_layer::fast::STEPS};

/// Rows of a piece: enough that every routed expert has its share of them, and few enough that
/// intermediates stay near the processor.
pub(crate) const PIECE: usize = 512;

/// Some rows of a step.
pub(crate) struct Piece {
    /// The tokens of each sequence.
    pub(crate) tokens: Vec<Vec<u32>>,
    /// Which rows of the step they are.
    pub(crate) rows: Range<usize>,
    /// Rows of this piece that are the last of their sequence in the step.
    last: Vec<usize>,
}

impl Piece {
    fn empty(sequences: usize, at: usize) -> Piece {
        Piece { tokens: vec![Vec::new(); sequences], rows: at..at, last: Vec::new() }
    }

    /// Which rows of this piece are asked for.
    pub(crate) fn asked(&self, rows: Rows) -> Vec<usize> {
        match rows {
            Rows::All => (0..self.rows.len()).collect(),
            Rows::Last => self.last.clone(),
            Rows::None => Vec::new(),
        }
    }
}

/// The pieces of a step, of at most `most` rows each, which are at least two chunks of the delta rule;
/// one without rows if the step has none.
pub(crate) fn pieces(tokens: &[Vec<u32>], most: usize) -> Vec<Piece> {
    let most = most.max(2 * CHUNK);
    let (mut done, mut piece) = (Vec::new(), Piece::empty(tokens.len(), 0));
    for (sequence, tokens) in tokens.iter().enumerate() {
        let mut rest = &tokens[..];
        while !rest.is_empty() {
            let (taken, left) = rest.split_at(taken(rest.len(), most - piece.rows.len()));
            piece.tokens[sequence] = taken.to_vec();
            piece.rows.end += taken.len();
            rest = left;
            if rest.is_empty() {
                piece.last.push(piece.rows.len() - 1);
            } else {
                let next = Piece::empty(piece.tokens.len(), piece.rows.end);
                done.push(std::mem::replace(&mut piece, next));
            }
        }
    }
    if !piece.rows.is_empty() || done.is_empty() {
        done.push(piece);
    }
    done
}

/// How many of `rest` tokens go where there is room for so many.
fn taken(rest: usize, room: usize) -> usize {
    if rest <= room {
        return rest;
    }
    let whole = room / CHUNK * CHUNK;
    // So few would go token by token, which adds in another order.
    if rest - whole <= STEPS { whole.saturating_sub(CHUNK) } else { whole }
}

/// What is wanted of the rows of a piece, of a step of `n` rows whose logits are `heads`.
///
/// # Errors
/// If what is forced has another number of rows.
pub(crate) fn want_of(
    want: &Want,
    rows: &Range<usize>,
    n: usize,
    heads: (&Range<usize>, usize),
) -> Result<Want, Error> {
    let cut = |ids: &Array2<i64>| -> Result<Array2<i64>, Error> {
        if ids.nrows() != n {
            return Err(format!("experts are forced of {} tokens, of {n}", ids.nrows()).into());
        }
        Ok(ids.slice_axis(Axis(0), Slice::from(rows.clone())).to_owned())
    };
    let forced_routing = match &want.forced_routing {
        None => None,
        Some(layers) => {
            let layers = layers.iter().map(|ids| ids.as_ref().map(cut).transpose());
            Some(layers.collect::<Result<Vec<_>, _>>()?)
        }
    };
    let forced = match want.forced.as_deref() {
        None => None,
        Some(forced) => {
            let mut own = Forced::new();
            for (name, value) in forced {
                let (rows, of) = if name.starts_with("head/lm_head/") { heads } else { (rows, n) };
                own.insert(name.clone(), part(name, value, rows, of)?);
            }
            Some(own.into())
        }
    };
    Ok(Want { forced_routing, forced, ..want.clone() })
}

/// Some rows of a tensor that has `n`.
fn part(name: &str, value: &Value, rows: &Range<usize>, n: usize) -> Result<Value, Error> {
    let shape = value.view().shape().to_vec();
    if shape.first() != Some(&n) {
        return Err(format!("{name}: forced in shape {shape:?}, expected {n} rows").into());
    }
    let rows = Slice::from(rows.clone());
    Ok(match value {
        Value::Numbers(x) => Value::Numbers(x.slice_axis(Axis(0), rows).to_owned()),
        Value::Integers(x) => Value::Integers(x.slice_axis(Axis(0), rows).to_owned()),
    })
}

/// What the next piece answered, put behind what those before it did.
///
/// # Errors
/// If a piece told other tensors than the one before.
pub(crate) fn join(all: &mut Option<Step>, next: Step) -> Result<(), Error> {
    let Some(step) = all else {
        *all = Some(next);
        return Ok(());
    };
    step.logits.append(Axis(0), next.logits.view())?;
    step.greedy.extend(next.greedy);
    for (all, next) in step.hidden.iter_mut().zip(next.hidden) {
        all.append(Axis(0), next.view())?;
    }
    for (all, next) in step.routing.iter_mut().zip(next.routing) {
        if let (Some(all), Some(Routing { ids, margins })) = (all, next) {
            all.ids.append(Axis(0), ids.view())?;
            all.margins.extend(margins);
        }
    }
    for (Tap { value, .. }, next) in step.taps.iter_mut().zip(next.taps) {
        match (value, next.value) {
            (Value::Numbers(all), Value::Numbers(next)) => all.append(Axis(0), next.view())?,
            (Value::Integers(all), Value::Integers(next)) => all.append(Axis(0), next.view())?,
            _ => return Err("a tap changed its type between pieces".into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{CHUNK, STEPS, pieces};

    #[test]
    fn pieces_take_every_row_once_and_cut_where_chunks_begin() {
        let most = 2 * CHUNK;
        let all: [&[usize]; 8] =
            [&[], &[0], &[1], &[64, 0, 1], &[65], &[68, 3], &[69], &[300, 5, 0, 70]];
        for lengths in all {
            let rows =
                |n: usize, sequence: usize| (0..n).map(move |i| (1000 * sequence + i) as u32);
            let tokens: Vec<Vec<u32>> =
                lengths.iter().enumerate().map(|(i, &n)| rows(n, i).collect()).collect();
            let pieces = pieces(&tokens, most);
            let mut at = 0;
            let mut again: Vec<Vec<u32>> = vec![Vec::new(); tokens.len()];
            let mut last = 0;
            for piece in &pieces {
                let n: usize = piece.tokens.iter().map(Vec::len).sum();
                assert!(n <= most && piece.rows == (at..at + n), "{lengths:?}");
                at += n;
                last += piece.last.len();
                for (again, (part, whole)) in again.iter_mut().zip(piece.tokens.iter().zip(&tokens))
                {
                    again.extend(part);
                    let cut = again.len() < whole.len() && !part.is_empty();
                    assert!(!cut || again.len().is_multiple_of(CHUNK), "{lengths:?}");
                    assert!(
                        !cut || STEPS < whole.len() - again.len(),
                        "{lengths:?}: a tail that goes token by token"
                    );
                }
            }
            assert_eq!(again, tokens, "{lengths:?}");
            assert_eq!(last, lengths.iter().filter(|&&n| 0 < n).count(), "{lengths:?}");
        }
    }
}
