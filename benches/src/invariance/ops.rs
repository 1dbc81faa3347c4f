//! Invariance of one op.

use std::time::Duration;

use golden::{Op, Spec, Tensors, View, ViewMut, compare::Finding};
use ndarray::{ArrayViewD, ArrayViewMutD, Axis, Slice};

use super::{Change, within};
use crate::{
    answer::Answer,
    clock,
    foreign::ended,
    guard, judge,
    report::Outcome,
    same::{Difference, Row, Side, difference, not_finite, taps, verdict},
    sequence::{self, new_rows, resized, taken},
    way::Way,
};

/// Draws the inputs of a spec.
type Draw<'a, O> = &'a dyn Fn(&Spec<<O as Op>::Case>) -> <O as Op>::Inputs<f32>;

/// A problem, one way to compute it, and its first answer.
struct Problem<'a, O: Answer> {
    way: &'a Way<O>,
    spec: Spec<O::Case>,
    inputs: O::Inputs<f32>,
    first: O::Outputs<f32>,
}

/// Every change of a problem by one way to compute it. `draw` gives the inputs of a spec.
pub(crate) fn run<O: Answer>(
    way: &Way<O>,
    by: &str,
    spec: &Spec<O::Case>,
    draw: Draw<'_, O>,
    changes: &[Change],
    budget: Duration,
) -> Vec<Row> {
    let text = spec.to_string();
    let of = |spec: Spec<O::Case>| -> Result<Problem<'_, O>, Outcome> {
        if let Some(outcome) = way.not_run(&spec) {
            return Err(outcome);
        }
        let inputs = draw(&spec);
        let first = way.run(&spec, &inputs)?;
        if let Some(name) = not_finite(&taps(&first), O::TOLD) {
            let why =
                format!("the answer is not finite in {name}: nothing can be compared with it");
            return Err(Outcome::Mistrusted(why));
        }
        Ok(Problem { way, spec, inputs, first })
    };
    // Whole, and alone in its batch.
    let whole = of(spec.clone());
    let alone = of(resized(spec, &[("B", 1), ("N", 1)]));
    changes
        .iter()
        .map(|&change| {
            let problem = if matches!(change, Change::Batch { .. }) { &alone } else { &whole };
            let claim = change.claim(way.claims());
            let work = || match problem {
                Ok(problem) => problem.changed(change, claim, draw, budget),
                Err(outcome) => Err(outcome.clone()),
            };
            let (ended, took) = clock::time(work);
            match ended {
                Err(outcome) => Row { claim, took, ..row::<O>(&text, by, change, outcome) },
                Ok(Ended { outcome, difference, runs }) => {
                    Row { claim, difference, runs, took, ..row::<O>(&text, by, change, outcome) }
                }
            }
        })
        .collect()
}

/// A change that came to an outcome without an answer to compare.
pub(crate) fn row<O: Answer>(spec: &str, by: &str, change: Change, outcome: Outcome) -> Row {
    let subject = format!("{}/{spec}", O::NAME);
    Row::new("invariance", O::NAME, subject, change.to_string(), change.kind(), by, outcome)
}

/// How a change ended.
struct Ended {
    outcome: Outcome,
    difference: Option<Difference>,
    runs: Option<usize>,
}

impl<O: Answer> Problem<'_, O> {
    fn changed(
        &self,
        change: Change,
        claim: Option<&'static str>,
        draw: Draw<'_, O>,
        budget: Duration,
    ) -> Result<Ended, Outcome> {
        match change {
            Change::Runs(runs) => self.again(runs, claim, budget),
            Change::Threads(n) => {
                let mut got = Err(Outcome::Timeout);
                let mut run = || got = self.way.run(&self.spec, &self.inputs);
                within(n, &mut run).map_err(|e| Outcome::Error(e.to_string()))?;
                Ok(self.compare(&got?, claim))
            }
            Change::Batch { of, place } => {
                let spec = resized(&self.spec, &[("B", of), ("N", of)]);
                O::check(&spec).map_err(Outcome::Unsupported)?;
                let mut inputs = draw(&spec);
                insert(&mut inputs, &self.inputs, of, place)?;
                let batch = self.way.run(&spec, &inputs)?;
                let mut got = self.first.clone();
                extract(&mut got, &batch, of, place)?;
                Ok(self.compare(&got, claim))
            }
            Change::Turned(by) => self.turned(by, claim),
        }
    }

    /// Asked again until the runs or the time are over, once at least: prepared once, and every 16th
    /// time anew, at other addresses.
    fn again(
        &self,
        runs: usize,
        claim: Option<&'static str>,
        budget: Duration,
    ) -> Result<Ended, Outcome> {
        let first = taps(&self.first);
        let watch = clock::Stopwatch::new();
        let mut prepared = None;
        let mut done = 1;
        while done < 2 || (done < runs && watch.elapsed() < budget) {
            if done % 16 == 1 {
                prepared = match self.way.variant() {
                    Some(variant) => {
                        Some(variant.prepare(&self.spec, &self.inputs).map_err(ended)?)
                    }
                    None => None,
                };
            }
            let got = match &mut prepared {
                Some(prepared) => guard::poisoned(&mut **prepared).map_err(ended)??,
                None => self.way.run(&self.spec, &self.inputs)?,
            };
            done += 1;
            if difference(&first, &taps(&got)).is_some() {
                return Ok(Ended { runs: Some(done), ..self.compare(&got, claim) });
            }
        }
        Ok(Ended { outcome: Outcome::Passed(Vec::new()), difference: None, runs: Some(done) })
    }

    /// The sequences in another order, each compared with itself.
    fn turned(&self, by: usize, claim: Option<&'static str>) -> Result<Ended, Outcome> {
        let Some(parts) = O::PARTS else {
            return Err(Outcome::Unsupported("this op has no sequences".to_owned()));
        };
        let rows = new_rows(&self.inputs);
        let count = rows.len();
        let order: Vec<usize> = (0..count).map(|i| (i + by) % count).collect();
        let mut inputs = self.inputs.clone();
        sequence::reorder(&mut inputs, &parts, &order);
        let turned = self.way.run(&self.spec, &inputs)?;
        let places = new_rows(&inputs);
        let back = sequence::inverse(&order);
        let mut got = self.first.clone();
        let all = taps(&turned);
        for ((name, view), (_, tap)) in got.tensors_mut().into_iter().zip(&all) {
            let ViewMut::F32(mut x) = view else { continue };
            let states = parts.states.contains(&name);
            for (i, &place) in back.iter().enumerate() {
                let (to, from) = if states {
                    (i..i + 1, place..place + 1)
                } else {
                    (rows[i].clone(), places[place].clone())
                };
                if let View::F32(from) = taken(tap, &from).view() {
                    x.slice_axis_mut(Axis(0), Slice::from(to)).assign(&from);
                }
            }
        }
        Ok(self.compare(&got, claim))
    }

    fn compare(&self, got: &O::Outputs<f32>, claim: Option<&'static str>) -> Ended {
        let difference = difference(&taps(&self.first), &taps(got));
        let outcome = verdict(claim, difference.as_ref(), |side| {
            Ok(self.judge(if side == Side::Got { got } else { &self.first }))
        });
        Ended { outcome, difference, runs: None }
    }

    fn judge(&self, got: &O::Outputs<f32>) -> Vec<Finding> {
        let plan = self.way.plan(&self.spec);
        judge::Case::<O> { spec: &self.spec, inputs: &self.inputs, plan: &plan }.judge(got)
    }
}

/// The axis along which a batch of `of` is longer than one.
fn batched(one: &[usize], batch: &[usize], of: usize) -> Option<usize> {
    let grown = |(&one, &batch): (&usize, &usize)| one * of == batch && one != batch;
    one.iter().zip(batch).position(grown)
}

/// Puts a problem of one into the inputs of a batch of `of`: what both have in one shape (weights) is
/// the same, what grows with the batch has a place of its own.
fn insert(
    batch: &mut impl Tensors,
    one: &impl Tensors,
    of: usize,
    place: usize,
) -> Result<(), Outcome> {
    for ((name, to), (_, from)) in batch.tensors_mut().into_iter().zip(one.tensors()) {
        // Offsets of equal lengths are those that were drawn.
        if name.starts_with("cu_seqlens") {
            continue;
        }
        let placed = match (to, from) {
            (ViewMut::F32(to), View::F32(from)) => put(to, &from, of, place),
            (ViewMut::F64(to), View::F64(from)) => put(to, &from, of, place),
            (ViewMut::I64(to), View::I64(from)) => put(to, &from, of, place),
            (ViewMut::U8(to), View::U8(from)) => put(to, &from, of, place),
            _ => false,
        };
        if !placed {
            return Err(Outcome::Unsupported(format!("input {name} has no place in a batch")));
        }
    }
    Ok(())
}

fn put<T: Clone>(
    mut to: ArrayViewMutD<'_, T>,
    from: &ArrayViewD<'_, T>,
    of: usize,
    place: usize,
) -> bool {
    if to.shape() == from.shape() {
        to.assign(from);
        return true;
    }
    let Some(axis) = batched(from.shape(), to.shape(), of) else { return false };
    let n = from.shape()[axis];
    to.slice_axis_mut(Axis(axis), Slice::from(place * n..(place + 1) * n)).assign(from);
    true
}

/// Takes the answer to a problem of one out of that to a batch.
fn extract(
    one: &mut impl Tensors,
    batch: &impl Tensors,
    of: usize,
    place: usize,
) -> Result<(), Outcome> {
    for ((name, to), (_, from)) in one.tensors_mut().into_iter().zip(batch.tensors()) {
        let taken = match (to, from) {
            (ViewMut::F32(to), View::F32(from)) => take(to, &from, of, place),
            (ViewMut::F64(to), View::F64(from)) => take(to, &from, of, place),
            (ViewMut::I64(to), View::I64(from)) => take(to, &from, of, place),
            _ => false,
        };
        if !taken {
            return Err(Outcome::Unsupported(format!("output {name} has no place in a batch")));
        }
    }
    Ok(())
}

fn take<T: Clone>(
    mut to: ArrayViewMutD<'_, T>,
    from: &ArrayViewD<'_, T>,
    of: usize,
    place: usize,
) -> bool {
    let Some(axis) = batched(to.shape(), from.shape(), of) else { return false };
    let n = to.shape()[axis];
    to.assign(&from.slice_axis(Axis(axis), Slice::from(place * n..(place + 1) * n)));
    true
}
