//! An engine that is fed texts, and everything it says of them.

use golden::{
    Engine, Error,
    engine::{Rows, Step, Want},
};
use ndarray::{Array1, Array2, Axis, concatenate, s};

use crate::same::{Tap, Taps};

/// The tap that says how many tokens of a text the engine holds.
pub(crate) const TOKENS: &str = "tokens";

/// What is known of one text after it was fed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Said {
    /// Hidden states, states of linear layers, logits: in the order of the computation.
    pub(crate) taps: Taps,
    /// Experts of each layer, `[T, A]`; `None` for dense ones.
    pub(crate) routing: Routing,
    /// Of each sparse layer, `margins.<layer>`, `[T]`: the gap to the first expert left out.
    pub(crate) margins: Taps,
}

/// Experts of each layer, `[T, A]`.
pub(crate) type Routing = Vec<Option<Array2<i64>>>;

/// What a slot of the engine holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Slot {
    /// A text.
    Text(usize),
    /// Garbage, which is fed along.
    Garbage,
}

/// An engine on its way through some texts.
pub(crate) struct Walk<'a> {
    engine: &'a mut dyn Engine,
    texts: &'a [Vec<u32>],
    slots: Vec<Slot>,
    /// Tokens of each text that were fed.
    at: Vec<usize>,
    /// Of each text, what each step said.
    pieces: Vec<Vec<Piece>>,
    garbage: u32,
    forced: Option<Routing>,
}

/// What one step said of one text.
struct Piece {
    hidden: Vec<Array2<f32>>,
    logits: Array2<f32>,
    routing: Vec<Option<(Array2<i64>, Vec<f32>)>>,
}

impl<'a> Walk<'a> {
    /// At the beginning of the texts, in slots of this order.
    pub(crate) fn start(
        engine: &'a mut dyn Engine,
        texts: &'a [Vec<u32>],
        slots: Vec<Slot>,
        garbage: u32,
    ) -> Result<Walk<'a>, Error> {
        engine.reset(slots.len())?;
        let pieces = texts.iter().map(|_| Vec::new()).collect();
        Ok(Walk { engine, texts, slots, at: vec![0; texts.len()], pieces, garbage, forced: None })
    }

    /// The same with one text, whose experts are given: it has to be fed at once.
    pub(crate) fn forced(self, forced: Option<Routing>) -> Walk<'a> {
        Walk { forced, ..self }
    }

    /// Feeds each text its next tokens, so many; garbage goes into the other slots.
    pub(crate) fn feed(&mut self, next: &[usize]) -> Result<(), Error> {
        self.step(next, &vec![Vec::new(); next.len()], Rollback::No)
    }

    /// Feeds each text its next tokens, `right` many, and then drafts that are `wrong`, and takes those
    /// back; or with `right` zero everything.
    pub(crate) fn speculate(&mut self, right: &[usize], wrong: &[Vec<u32>]) -> Result<(), Error> {
        self.step(right, wrong, Rollback::Yes)
    }

    /// Keeps a copy of all states, feeds garbage to every slot, and goes back to the copy.
    pub(crate) fn detour(&mut self, tokens: usize) -> Result<(), Error> {
        let snapshot = self.engine.snapshot()?;
        let fed = vec![vec![self.garbage; tokens]; self.slots.len()];
        self.engine.forward(&fed, &Want { logits: Rows::None, ..Want::default() })?;
        self.engine.restore(snapshot)?;
        self.engine.release(snapshot);
        Ok(())
    }

    fn step(
        &mut self,
        right: &[usize],
        wrong: &[Vec<u32>],
        rollback: Rollback,
    ) -> Result<(), Error> {
        let next = |i: usize| self.at[i]..self.at[i] + right[i];
        let mut fed = Vec::new();
        let mut keep = Vec::new();
        for slot in &self.slots {
            match slot {
                Slot::Text(i) => {
                    let tokens = self.texts[*i].get(next(*i)).ok_or("a path beyond its text")?;
                    fed.push([tokens, &wrong[*i]].concat());
                    keep.push(right[*i]);
                }
                Slot::Garbage => {
                    fed.push(vec![self.garbage; 2]);
                    keep.push(2);
                }
            }
        }
        if fed.iter().all(Vec::is_empty) {
            return Ok(());
        }
        let want = Want {
            logits: Rows::All,
            hidden: true,
            routing: true,
            rollback: rollback == Rollback::Yes,
            forced_routing: self.forced.clone(),
            ..Want::default()
        };
        let step = self.engine.forward(&fed, &want)?;
        if rollback == Rollback::Yes {
            self.engine.rollback(&keep)?;
        }
        let mut start = 0;
        for (slot, (fed, keep)) in self.slots.iter().zip(fed.iter().zip(keep)) {
            if let Slot::Text(i) = slot {
                self.pieces[*i].push(Piece::of(&step, start, keep)?);
                self.at[*i] += keep;
            }
            start += fed.len();
        }
        Ok(())
    }

    /// What was said of every text.
    pub(crate) fn end(self) -> Result<Vec<Said>, Error> {
        let held = self.engine.lengths();
        let states = self.engine.linear_states()?;
        let mut all = Vec::new();
        for (i, pieces) in self.pieces.iter().enumerate() {
            let slot = self.slots.iter().position(|slot| *slot == Slot::Text(i));
            let slot = slot.ok_or("a text without a slot")?;
            let mut said = Said::default();
            let tokens = held.get(slot).map_or(-1, |&held| held as i64);
            said.taps.push((TOKENS.to_owned(), Tap::I64(ndarray::arr1(&[tokens]).into_dyn())));
            let layers = pieces.first().map_or(0, |piece| piece.hidden.len());
            for layer in 0..layers {
                let hidden = column(pieces, |piece| &piece.hidden[layer])?;
                said.taps.push((format!("hidden.{layer}"), Tap::F32(hidden.into_dyn())));
                if let Some(state) = states.get(layer).and_then(Option::as_ref) {
                    let conv = state.conv.index_axis(Axis(0), slot).to_owned().into_dyn();
                    let recurrent = state.recurrent.index_axis(Axis(0), slot).to_owned().into_dyn();
                    said.taps.push((format!("conv_state.{layer}"), Tap::F32(conv)));
                    said.taps.push((format!("recurrent_state.{layer}"), Tap::F32(recurrent)));
                }
            }
            let logits = column(pieces, |piece| &piece.logits)?;
            // Where embeddings are tied, the logit of garbage is garbage.
            let known = logits.slice(s![.., ..self.garbage as usize]).to_owned();
            said.taps.push(("logits".to_owned(), Tap::F32(known.into_dyn())));
            let layers = pieces.first().map_or(0, |piece| piece.routing.len());
            for layer in 0..layers {
                if pieces.iter().any(|piece| piece.routing[layer].is_none()) {
                    said.routing.push(None);
                    continue;
                }
                let routed = || pieces.iter().filter_map(|piece| piece.routing[layer].as_ref());
                let ids: Vec<_> = routed().map(|(ids, _)| ids.view()).collect();
                said.routing.push(Some(concatenate(Axis(0), &ids)?));
                let margins: Array1<f32> =
                    routed().flat_map(|(_, margins)| margins.iter().copied()).collect();
                said.margins.push((format!("margins.{layer}"), Tap::F32(margins.into_dyn())));
            }
            all.push(said);
        }
        Ok(all)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Rollback {
    No,
    Yes,
}

impl Piece {
    /// Rows `start .. start + n` of a step.
    fn of(step: &Step, start: usize, n: usize) -> Result<Piece, Error> {
        let rows = |x: &Array2<f32>| -> Result<Array2<f32>, Error> {
            if x.nrows() < start + n {
                return Err(format!("{} rows, expected at least {}", x.nrows(), start + n).into());
            }
            Ok(x.slice(s![start..start + n, ..]).to_owned())
        };
        let routed = |routing: &Option<golden::engine::Routing>| {
            routing.as_ref().map(|routing| {
                let ids = routing.ids.slice(s![start..start + n, ..]).to_owned();
                (ids, routing.margins[start..start + n].to_vec())
            })
        };
        Ok(Piece {
            hidden: step.hidden.iter().map(rows).collect::<Result<_, _>>()?,
            logits: rows(&step.logits)?,
            routing: step.routing.iter().map(routed).collect(),
        })
    }
}

fn column<'a>(
    pieces: &'a [Piece],
    pick: impl Fn(&'a Piece) -> &'a Array2<f32>,
) -> Result<Array2<f32>, Error> {
    let views: Vec<_> = pieces.iter().map(pick).map(|x| x.view()).collect();
    Ok(concatenate(Axis(0), &views)?)
}
