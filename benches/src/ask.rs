//! Asking an engine: a prompt, fed at once or in pieces, continued or not, and all it said.

use golden::{
    Engine, Error,
    engine::{LinearState, Routing, Rows, Step, Want},
};

pub use golden::engine::INTERRUPTED;
use ndarray::{Array2, Axis, concatenate, s};

/// What is asked.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// Tokens of each sequence, without padding.
    pub tokens: Vec<Vec<u32>>,
    /// Columns of left padding before each sequence; empty means none. Only pieces notice: they are
    /// cut along the padded columns.
    pub padding: Vec<usize>,
    /// Pieces in which the prompt is fed; empty means at once.
    pub split: Vec<usize>,
    /// How it goes on.
    pub decode: Decode,
    /// Whether the MTP head is asked too.
    pub mtp: bool,
    /// Experts to use instead of the router's choice, per layer `[N, A]`.
    pub forced_routing: Option<Vec<Option<Array2<i64>>>>,
}

/// How a prompt goes on.
#[derive(Clone, Debug, Default)]
pub enum Decode {
    /// Not at all.
    #[default]
    No,
    /// With the engine's own most likely tokens, ties to the lowest id.
    Greedy(usize),
    /// With these tokens, one list per sequence.
    Forced(Vec<Vec<u32>>),
}

/// Everything an engine said; rows of all sequences one after another.
#[derive(Clone, Debug, Default)]
pub struct Said {
    /// `[N, D]` each, `0 ..= L`.
    pub hidden: Vec<Array2<f32>>,
    /// `[N, V]`.
    pub logits: Array2<f32>,
    /// Per sequence `[steps + 1, V]`: the first row follows the prompt, the last the last token.
    pub steps: Vec<Array2<f32>>,
    /// Per sequence, what followed the prompt.
    pub generated: Vec<Vec<u32>>,
    /// `[N - S, V]`: row `t` from the hidden state of token `t` and token `t + 1`.
    pub mtp: Option<Array2<f32>>,
    /// Per layer; `None` for dense layers.
    pub routing: Vec<Option<Routing>>,
    /// States after the prompt.
    pub states: Vec<Option<LinearState>>,
}

/// Puts a request to an engine. `progress` is told tokens done of all, and ends the work by
/// returning false.
///
/// # Errors
/// If the engine fails, or the work was ended.
pub fn ask(
    engine: &mut dyn Engine,
    request: &Request,
    progress: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<Said, Error> {
    let tokens = &request.tokens;
    let steps = match &request.decode {
        Decode::No => 0,
        Decode::Greedy(n) => *n,
        Decode::Forced(tokens) => tokens.first().map_or(0, Vec::len),
    };
    let prompt: usize = tokens.iter().map(Vec::len).sum();
    let total = prompt + steps * tokens.len();
    let mut done = 0;
    let mut told = |fed: usize| {
        done += fed;
        if progress(done, total) { Ok(()) } else { Err(Error::from(INTERRUPTED)) }
    };
    engine.reset(tokens.len())?;
    let pads = |row: usize| request.padding.get(row).copied().unwrap_or(0);
    let pieces = if request.split.is_empty() { vec![usize::MAX] } else { request.split.clone() };
    let mut fed_lengths: Vec<Vec<usize>> = Vec::new();
    let mut parts: Vec<Step> = Vec::new();
    let mut column = 0_usize;
    for piece in pieces {
        let end = column.saturating_add(piece);
        let cut = |(row, all): (usize, &Vec<u32>)| {
            let at = |column: usize| column.saturating_sub(pads(row)).min(all.len());
            at(column)..at(end)
        };
        let ranges: Vec<_> = tokens.iter().enumerate().map(cut).collect();
        let fed: Vec<Vec<u32>> =
            tokens.iter().zip(&ranges).map(|(all, range)| all[range.clone()].to_vec()).collect();
        let forced_routing = request.forced_routing.as_ref().map(|layers| {
            let mut start = 0;
            let mut taken = Vec::new();
            for (all, range) in tokens.iter().zip(&ranges) {
                taken.extend(start + range.start..start + range.end);
                start += all.len();
            }
            layers.iter().map(|ids| ids.as_ref().map(|ids| ids.select(Axis(0), &taken))).collect()
        });
        let want = Want {
            logits: Rows::All,
            hidden: true,
            routing: true,
            forced_routing,
            ..Want::default()
        };
        parts.push(engine.forward(&fed, &want)?);
        told(fed.iter().map(Vec::len).sum())?;
        fed_lengths.push(fed.iter().map(Vec::len).collect());
        column = end;
    }
    let mut said = Said { states: engine.linear_states()?, ..Said::default() };
    let joined = |pick: &dyn Fn(&Step) -> &Array2<f32>| {
        join(&fed_lengths, &parts.iter().map(pick).collect::<Vec<_>>())
    };
    for layer in 0..parts.first().map_or(0, |part| part.hidden.len()) {
        said.hidden.push(joined(&|part: &Step| &part.hidden[layer])?);
    }
    said.logits = joined(&|part: &Step| &part.logits)?;
    for layer in 0..parts.first().map_or(0, |part| part.routing.len()) {
        said.routing.push(routing(&fed_lengths, &parts, layer)?);
    }
    if request.mtp {
        said.mtp = Some(mtp(engine, tokens, &said)?);
    }
    if steps != 0 {
        decode(engine, request, steps, &mut said, &mut told)?;
    }
    Ok(said)
}

fn decode(
    engine: &mut dyn Engine,
    request: &Request,
    steps: usize,
    said: &mut Said,
    told: &mut dyn FnMut(usize) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut rows: Vec<Vec<Array2<f32>>> = Vec::new();
    let mut end = 0;
    for row in &request.tokens {
        end += row.len();
        rows.push(vec![said.logits.slice(s![end - 1..end, ..]).to_owned()]);
    }
    said.generated = vec![Vec::new(); rows.len()];
    let want = Want { logits: Rows::Last, ..Want::default() };
    for step in 0..steps {
        let mut fed = Vec::new();
        for (i, row) in rows.iter().enumerate() {
            let next = match &request.decode {
                Decode::Forced(tokens) => tokens[i][step],
                _ => argmax(row[step].row(0).as_slice().unwrap_or(&[])),
            };
            said.generated[i].push(next);
            fed.push(vec![next]);
        }
        let part = engine.forward(&fed, &want)?;
        for (i, row) in rows.iter_mut().enumerate() {
            row.push(part.logits.slice(s![i..=i, ..]).to_owned());
        }
        told(fed.len())?;
    }
    for row in rows {
        let views: Vec<_> = row.iter().map(|x| x.view()).collect();
        said.steps.push(concatenate(Axis(0), &views)?);
    }
    Ok(())
}

fn mtp(engine: &mut dyn Engine, tokens: &[Vec<u32>], said: &Said) -> Result<Array2<f32>, Error> {
    if !engine.has_mtp() {
        return Err("the checkpoint has no MTP head (no mtp.* tensors)".into());
    }
    let last = said.hidden.last().ok_or("an engine returns its last hidden state")?;
    let mut kept = Vec::new();
    let mut start = 0;
    for row in tokens {
        kept.extend(start..start + row.len().saturating_sub(1));
        start += row.len();
    }
    let next: Vec<Vec<u32>> =
        tokens.iter().map(|row| row.get(1..).unwrap_or(&[]).to_vec()).collect();
    Ok(engine.mtp(&next, &last.select(Axis(0), &kept))?.logits)
}

/// What is wanted of the token that follows each sequence: the greedy choice, or logits to choose by.
pub(crate) fn next(greedy: bool) -> Want {
    let logits = if greedy { Rows::None } else { Rows::Last };
    Want { logits, greedy, ..Want::default() }
}

/// The largest, ties to the lowest index.
pub fn argmax(x: &[f32]) -> u32 {
    let mut best = 0;
    for (i, &x_i) in x.iter().enumerate() {
        if x[best] < x_i {
            best = i;
        }
    }
    best as u32
}

/// Rows of pieces (each: all sequences one after another) put back in the order of whole sequences.
/// What the router of a layer chose, piece by piece.
fn routing(lengths: &[Vec<usize>], parts: &[Step], layer: usize) -> Result<Option<Routing>, Error> {
    let parts: Option<Vec<&Routing>> =
        parts.iter().map(|part| part.routing.get(layer)?.as_ref()).collect();
    let Some(parts) = parts else { return Ok(None) };
    let column =
        |part: &&Routing| Array2::from_shape_vec((part.margins.len(), 1), part.margins.clone());
    let margins = parts.iter().map(column).collect::<Result<Vec<_>, _>>()?;
    Ok(Some(Routing {
        ids: join(lengths, &parts.iter().map(|part| &part.ids).collect::<Vec<_>>())?,
        margins: join(lengths, &margins.iter().collect::<Vec<_>>())?.into_raw_vec_and_offset().0,
    }))
}

fn join<T: Clone>(lengths: &[Vec<usize>], pieces: &[&Array2<T>]) -> Result<Array2<T>, Error> {
    let sequences = lengths.first().map_or(0, Vec::len);
    let mut starts = vec![0; pieces.len()];
    let mut all = Vec::new();
    for sequence in 0..sequences {
        for ((lengths, rows), start) in lengths.iter().zip(pieces).zip(&mut starts) {
            let n = lengths[sequence];
            all.push(rows.slice(s![*start..*start + n, ..]));
            *start += n;
        }
    }
    Ok(concatenate(Axis(0), &all)?)
}
