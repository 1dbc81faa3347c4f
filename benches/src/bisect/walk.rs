//! One text through an engine, in pieces, everything it tells on the way kept.

use std::{collections::BTreeSet, sync::Arc};

use golden::{
    Dtype, Engine, Error,
    engine::Want,
    tap::{Forced, Part, RESIDUAL, Tap, Value},
};
use ndarray::{Array2, ArrayD, Axis, concatenate};

use crate::same;

/// What is fed.
#[derive(Clone, Debug)]
pub(super) struct Text {
    /// Tokens of each sequence.
    pub(super) tokens: Vec<Vec<u32>>,
    /// Columns in which they are fed; a sequence that has no more is fed none.
    pub(super) pieces: Vec<usize>,
    /// Whether the MTP head is asked too.
    pub(super) drafts: bool,
}

impl Text {
    /// The tokens that each sequence is fed with a piece.
    fn fed(&self, piece: usize) -> Vec<Vec<u32>> {
        let start: usize = self.pieces[..piece].iter().sum();
        let end = start + self.pieces[piece];
        let cut = |row: &Vec<u32>| row[start.min(row.len())..end.min(row.len())].to_vec();
        self.tokens.iter().map(cut).collect()
    }

    /// In the order of whole sequences, the rows of all pieces one after another.
    fn order(&self) -> Vec<usize> {
        let fed: Vec<Vec<Vec<u32>>> = (0..self.pieces.len()).map(|piece| self.fed(piece)).collect();
        let mut order = Vec::new();
        for sequence in 0..self.tokens.len() {
            let mut before = 0;
            for piece in &fed {
                let start: usize = piece[..sequence].iter().map(Vec::len).sum();
                order.extend(before + start..before + start + piece[sequence].len());
                before += piece.iter().map(Vec::len).sum::<usize>();
            }
        }
        order
    }

    /// Rows of whole sequences, piece by piece.
    pub(super) fn cut<T: Clone>(&self, x: &Array2<T>) -> Vec<Array2<T>> {
        let order = self.order();
        let mut rows = vec![0; order.len()];
        order.iter().enumerate().for_each(|(whole, &at)| rows[at] = whole);
        let mut start = 0;
        (0..self.pieces.len())
            .map(|piece| {
                let end = start + self.fed(piece).iter().map(Vec::len).sum::<usize>();
                let cut = x.select(Axis(0), &rows[start..end]);
                start = end;
                cut
            })
            .collect()
    }

    /// Which tokens are not of the first piece, in the order of whole sequences.
    pub(super) fn continued(&self) -> Vec<bool> {
        let first = self.pieces.first().copied().unwrap_or(0);
        self.tokens.iter().flat_map(|row| (0..row.len()).map(move |at| first <= at)).collect()
    }

    /// The row, in the order of whole sequences, of a row of a piece.
    pub(super) fn row(&self, piece: usize, row: usize) -> usize {
        let before: usize =
            (0..piece).map(|piece| self.fed(piece).iter().map(Vec::len).sum::<usize>()).sum();
        self.order().iter().position(|&at| at == before + row).unwrap_or(row)
    }

    pub(super) fn rows(&self) -> usize {
        self.tokens.iter().map(Vec::len).sum()
    }
}

/// What an engine is given in place of what it computed.
#[derive(Clone, Debug, Default)]
pub(super) struct Given {
    /// Intermediates, piece by piece.
    pub(super) forced: Vec<Arc<Forced>>,
    /// Experts, piece by piece and layer by layer.
    pub(super) routing: Vec<Vec<Option<Array2<i64>>>>,
    /// What the MTP head is fed, `[N - S, D]`; the engine's own without.
    pub(super) mtp: Option<Array2<f32>>,
}

/// Everything it told, piece by piece, and what the MTP head was fed.
#[derive(Clone, Debug, Default)]
pub(super) struct Told {
    pieces: Vec<Vec<Tap>>,
    /// `[N - S, D]`.
    pub(super) mtp: Option<Array2<f32>>,
    drafts: Option<Array2<f32>>,
}

impl Told {
    /// Of these taps only, and whether that is all of them.
    pub(super) fn only(&self, names: &BTreeSet<String>) -> (Told, bool) {
        let mut shown = self.clone();
        shown.pieces.iter_mut().for_each(|taps| taps.retain(|tap| names.contains(&tap.name())));
        let count = |told: &Told| told.pieces.iter().map(Vec::len).sum::<usize>();
        let all = count(&shown) == count(self);
        (shown, all)
    }
}

/// Feeds a text.
pub(super) fn walk(engine: &mut dyn Engine, text: &Text, given: &Given) -> Result<Told, Error> {
    engine.reset(text.tokens.len())?;
    let mut told = Told::default();
    let mut hidden: Vec<Array2<f32>> = Vec::new();
    for piece in 0..text.pieces.len() {
        let want = Want {
            taps: true,
            hidden: true,
            routing: true,
            forced: given.forced.get(piece).cloned(),
            forced_routing: given.routing.get(piece).cloned(),
            ..Want::default()
        };
        let mut step = engine.forward(&text.fed(piece), &want)?;
        if step.taps.is_empty() {
            step.taps = streams(&step);
        }
        hidden.push(step.hidden.pop().ok_or("an engine returns its last hidden state")?);
        told.pieces.push(step.taps);
    }
    if text.drafts && engine.has_mtp() && text.tokens.iter().all(|row| 1 < row.len()) {
        let views: Vec<_> = hidden.iter().map(|x| x.view()).collect();
        let whole = concatenate(Axis(0), &views)?.select(Axis(0), &text.order());
        let mut end = 0;
        let mut kept = Vec::new();
        for row in &text.tokens {
            kept.extend(end..end + row.len() - 1);
            end += row.len();
        }
        let fed = given.mtp.clone().unwrap_or_else(|| whole.select(Axis(0), &kept));
        let next: Vec<Vec<u32>> = text.tokens.iter().map(|row| row[1..].to_vec()).collect();
        told.drafts = Some(engine.mtp(&next, &fed)?.logits);
        told.mtp = Some(fed);
    }
    Ok(told)
}

/// What an engine that tells no taps still says: hidden states and logits.
fn streams(step: &golden::engine::Step) -> Vec<Tap> {
    let wide = |x: &Array2<f32>| Value::Numbers(x.map(|&x| f64::from(x)).into_dyn());
    let tap = |part, op: &'static str, tensor: &'static str, value| Tap {
        part,
        op: op.into(),
        tensor: tensor.into(),
        value,
    };
    let layers = step.hidden.len().saturating_sub(1);
    let mut taps = Vec::new();
    for (i, x) in step.hidden.iter().enumerate() {
        taps.push(match i {
            0 => tap(Part::Embedding, "embedding", "o", wide(x)),
            i if i == layers => tap(Part::Head, "rms_norm", "norm", wide(x)),
            i => tap(Part::Layer(i - 1), RESIDUAL, "o", wide(x)),
        });
        if let Some(Some(routing)) = step.routing.get(i) {
            let ids = Value::Integers(routing.ids.clone().into_dyn());
            taps.push(tap(Part::Layer(i), "moe_router", "ids", ids));
        }
    }
    taps.push(tap(Part::Head, "lm_head", "logits", wide(&step.logits)));
    taps
}

/// Whether a tap has a row per token, as opposed to a state, which has one per sequence.
fn per_token(tensor: &str) -> bool {
    tensor != "state"
}

impl Told {
    /// Experts that were chosen, piece by piece.
    pub(super) fn routing(&self, layers: usize) -> Vec<Vec<Option<Array2<i64>>>> {
        let of = |taps: &Vec<Tap>, layer: usize| {
            let name = golden::tap::name(Part::Layer(layer), "moe_router", "ids");
            taps.iter().find(|tap| tap.name() == name).and_then(|tap| match &tap.value {
                Value::Integers(ids) => ids.clone().into_dimensionality().ok(),
                Value::Numbers(_) => None,
            })
        };
        self.pieces.iter().map(|taps| (0..layers).map(|l| of(taps, l)).collect()).collect()
    }

    /// Everything that `keep` keeps, as it can be forced on another engine, stored as `stored` says.
    pub(super) fn forced(
        &self,
        keep: impl Fn(&Tap) -> bool,
        stored: impl Fn(&str) -> Dtype,
    ) -> Vec<Arc<Forced>> {
        let named = |tap: &Tap| {
            let name = tap.name();
            let dtype = stored(&name);
            let value = match &tap.value {
                Value::Numbers(x) => Value::Numbers(x.mapv(|x| dtype.round(x as f32).into())),
                Value::Integers(x) => Value::Integers(x.clone()),
            };
            (name, value)
        };
        let piece =
            |taps: &Vec<Tap>| Arc::new(taps.iter().filter(|tap| keep(tap)).map(named).collect());
        self.pieces.iter().map(piece).collect()
    }

    /// The taps of which every number is one of `dtype`.
    pub(super) fn stored_in(&self, dtype: Dtype) -> BTreeSet<String> {
        let (mut all, mut others) = (BTreeSet::new(), BTreeSet::new());
        for tap in self.pieces.iter().flatten() {
            let Value::Numbers(x) = &tap.value else { continue };
            let fits = x.iter().all(|&x| f64::from(dtype.round(x as f32)) == x);
            if fits { &mut all } else { &mut others }.insert(tap.name());
        }
        all.retain(|name| !others.contains(name));
        all
    }

    /// Every tensor whole: rows of tokens in the order of sequences, states one piece after another.
    pub(super) fn whole(&self, text: &Text) -> Result<Vec<(Tap, same::Tap)>, Error> {
        let order = text.order();
        let Some(first) = self.pieces.first() else { return Ok(Vec::new()) };
        let mut all = Vec::new();
        for (i, tap) in first.iter().enumerate() {
            let parts = self.pieces.iter().map(|taps| taps.get(i));
            let parts: Option<Vec<&Value>> = parts.map(|tap| tap.map(|tap| &tap.value)).collect();
            let parts = parts.ok_or("an engine tells the same of every piece")?;
            let rows = per_token(&tap.tensor);
            let joined = match &tap.value {
                Value::Numbers(_) => same::Tap::F64(join(&parts, rows.then_some(&order), |v| {
                    if let Value::Numbers(x) = v { Some(x) } else { None }
                })?),
                Value::Integers(_) => same::Tap::I64(join(&parts, rows.then_some(&order), |v| {
                    if let Value::Integers(x) = v { Some(x) } else { None }
                })?),
            };
            all.push((
                Tap { value: Value::Integers(ArrayD::zeros(vec![0])), ..tap.clone() },
                joined,
            ));
        }
        if let Some(drafts) = &self.drafts {
            let value = Value::Integers(ArrayD::zeros(vec![0]));
            let tap = Tap { part: Part::Mtp, op: "mtp".into(), tensor: "logits".into(), value };
            all.push((tap, same::Tap::F64(drafts.map(|&x| f64::from(x)).into_dyn())));
        }
        Ok(all)
    }
}

fn join<T: Clone>(
    parts: &[&Value],
    order: Option<&Vec<usize>>,
    of: impl Fn(&Value) -> Option<&ArrayD<T>>,
) -> Result<ArrayD<T>, Error> {
    let views: Option<Vec<_>> = parts.iter().map(|value| of(value).map(|x| x.view())).collect();
    let all = concatenate(Axis(0), &views.ok_or("a tap is of one type in every piece")?)?;
    Ok(order.map_or_else(|| all.clone(), |order| all.select(Axis(0), order)))
}
