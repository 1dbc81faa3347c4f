//! Paths of one op: its sequences cut, packed with others, edited, their heads in another order.

use std::{collections::HashMap, ops::Range, sync::Arc};

use golden::{
    Error, Op, Plan, Spec, Tensors,
    compare::Finding,
    plan::{Form, Grid, Site},
};
use reference::{
    Real,
    real::{Planned, Rounding, under},
};

use super::Path;
use crate::{
    answer::Answer,
    clock,
    dear::{self, Yardstick},
    report::Outcome,
    same::{Row, Side, Taps, difference, not_finite, taps, verdict},
    sequence::{self, Parts, Sequence, joined, new_rows, piece, taken},
    spread::{self, Bounds},
    way::Way,
};

/// A problem, one way to compute it, and the answer by the plain path.
struct Problem<'a, O: Sequence> {
    way: &'a Way<O>,
    spec: &'a Spec<O::Case>,
    inputs: O::Inputs<f32>,
    parts: Parts,
    plain: Taps,
    /// The answer of the plain path in f64.
    oracle: Option<Arc<Taps>>,
    /// Bounds by the pieces that they hold for.
    bounds: HashMap<(Cuts, u32), Arc<Bounds>>,
    /// How far emulations are off, by the same, where bounds are too dear.
    yardsticks: HashMap<Cuts, Yardstick>,
}

/// Of each sequence, the tokens of its pieces; none is the whole problem in one call.
type Cuts = Vec<Vec<Range<usize>>>;

/// [`run`].
pub(crate) type Run<O> =
    fn(&Way<O>, &str, &Spec<<O as Op>::Case>, <O as Op>::Inputs<f32>, &[Path]) -> Vec<Row>;

/// Every path of a problem by one way to compute it. The first error in computing it at all ends it.
pub(crate) fn run<O: Sequence>(
    way: &Way<O>,
    by: &str,
    spec: &Spec<O::Case>,
    mut inputs: O::Inputs<f32>,
    paths: &[Path],
) -> Vec<Row> {
    let all = |outcome: &Outcome| {
        paths.iter().map(|path| row::<O>(&spec.to_string(), by, path, outcome.clone())).collect()
    };
    if let Some(outcome) = way.not_run(spec) {
        return all(&outcome);
    }
    let count = new_rows(&inputs).len();
    if 1 < count {
        let total = new_rows(&inputs).last().map_or(0, |rows| rows.end);
        sequence::relength(&mut inputs, &super::lengths(count, total));
    }
    let plain = match way.run(spec, &inputs) {
        Ok(plain) => taps(&plain),
        Err(outcome) => return all(&outcome),
    };
    if let Some(name) = not_finite(&plain, O::TOLD) {
        return all(&Outcome::Mistrusted(format!(
            "the plain answer is not finite in {name}: nothing can be compared with it"
        )));
    }
    let mut problem = Problem {
        way,
        spec,
        inputs,
        parts: <O as Sequence>::PARTS,
        plain,
        oracle: None,
        bounds: HashMap::new(),
        yardsticks: HashMap::new(),
    };
    paths
        .iter()
        .map(|path| {
            let claim = problem.claim(path);
            let (result, took) = clock::time(|| problem.outcome(path, claim));
            let (outcome, difference) = result.unwrap_or_else(|outcome| (outcome, None));
            let row = row::<O>(&spec.to_string(), by, path, outcome);
            Row { claim, difference, took, ..row }
        })
        .collect()
}

/// A path that came to an outcome without an answer to compare.
pub(crate) fn row<O: Answer>(spec: &str, by: &str, path: &Path, outcome: Outcome) -> Row {
    let subject = format!("{}/{spec}", O::NAME);
    Row::new("paths", O::NAME, subject, path.to_string(), path.kind(), by, outcome)
}

type Difference = Option<crate::same::Difference>;

impl<O: Sequence> Problem<'_, O> {
    /// Which promise makes a path's answer equal to the bit, if one does.
    fn claim(&self, path: &Path) -> Option<&'static str> {
        let claims = self.way.claims();
        let reference = matches!(self.way, Way::Reference(_));
        let batch = claims.batch_invariant.then_some("batch invariance");
        match path {
            Path::Split(_) | Path::Every(_) => {
                let cuts = self.cuts(path);
                let whole =
                    |n: usize| cuts.iter().flatten().all(|piece| piece.start.is_multiple_of(n));
                claims.cuts.filter(|&n| whole(n)).map(|_| "equal bits however it is cut")
            }
            Path::Alone | Path::Poisoned(_) | Path::Edit(_) => batch,
            Path::Heads => reference.then_some("heads computed one by one"),
            Path::GateOne => matches!(self.way, Way::Reference(Form::Plain))
                .then_some("a gate of one multiplies by one"),
            _ => None,
        }
    }

    /// The pieces of a path that cuts.
    fn cuts(&self, path: &Path) -> Cuts {
        let cut = |length: usize| -> Vec<Range<usize>> {
            let mut ends = match path {
                Path::Split(pieces) => pieces
                    .iter()
                    .scan(0, |end, piece| {
                        *end += piece;
                        Some(*end)
                    })
                    .collect(),
                Path::Every(n) => (1..=length / n).map(|i| i * n).collect(),
                _ => Vec::new(),
            };
            ends.retain(|&end| end < length);
            ends.push(length);
            let starts = std::iter::once(0).chain(ends.clone());
            starts.zip(ends).map(|(start, end)| start..end).filter(|at| !at.is_empty()).collect()
        };
        new_rows(&self.inputs).iter().map(|rows| cut(rows.len())).collect()
    }

    fn outcome(
        &mut self,
        path: &Path,
        claim: Option<&'static str>,
    ) -> Result<(Outcome, Difference), Outcome> {
        match path {
            Path::Split(_) | Path::Every(_) | Path::Alone => {
                let cuts = self.cuts(path);
                let got = self.fed(&cuts)?;
                Ok(self.compare(&got, &cuts, claim))
            }
            Path::Poisoned(kept) => {
                let kept = |i: usize| kept.has(i);
                let mut inputs = self.inputs.clone();
                let sequences = new_rows(&inputs).len();
                for i in (0..sequences).filter(|&i| !kept(i)) {
                    sequence::poison(&mut inputs, &self.parts, i);
                }
                let poisoned = taps(&self.way.run(self.spec, &inputs)?);
                let got = self.with(&poisoned, &|rows, states| {
                    (0..sequences)
                        .map(|i| if states { i..i + 1 } else { rows[i].clone() })
                        .enumerate()
                        .map(|(i, rows)| (rows, kept(i)))
                        .collect()
                });
                Ok(self.compare(&got, &Cuts::new(), claim))
            }
            Path::Edit(at) => self.edited(*at, claim),
            Path::Heads => {
                let Some((keys, values)) = sequence::shuffled(&self.inputs, &self.parts) else {
                    return Err(Outcome::Unsupported("there is one head".to_owned()));
                };
                let mut inputs = self.inputs.clone();
                sequence::permute(inputs.tensors_mut(), &self.parts, &keys, &values);
                let mut got = self.way.run(self.spec, &inputs)?;
                let (keys, values) = (sequence::inverse(&keys), sequence::inverse(&values));
                sequence::permute(got.tensors_mut(), &self.parts, &keys, &values);
                Ok(self.compare(&taps(&got), &Cuts::new(), claim))
            }
            Path::GateOne => self.gate_one(claim),
            _ => Err(Outcome::Unsupported("a path of whole models".to_owned())),
        }
    }

    /// The plain answer with some rows of another: of each range, whether the other's are taken.
    fn with(&self, other: &Taps, choose: &Choose<'_>) -> Taps {
        let rows = new_rows(&self.inputs);
        let mix = |(name, plain): &(String, crate::same::Tap)| {
            let other = other.iter().find(|(n, _)| n == name).map_or(plain, |(_, tap)| tap);
            let chosen = choose(&rows, self.parts.states.contains(&name.as_str()));
            let pieces: Vec<_> = chosen
                .iter()
                .map(|(rows, take)| taken(if *take { other } else { plain }, rows))
                .collect();
            (name.clone(), sequence::stacked(&pieces))
        };
        self.plain.iter().map(mix).collect()
    }

    /// What comes before an edited token does not know of it; the token itself does.
    fn edited(
        &mut self,
        at: usize,
        claim: Option<&'static str>,
    ) -> Result<(Outcome, Difference), Outcome> {
        let n = new_rows(&self.inputs).first().map_or(0, ExactSizeIterator::len);
        let mut inputs = self.inputs.clone();
        sequence::edit(&mut inputs, &self.parts, at, (at + 1) % n);
        let edited = taps(&self.way.run(self.spec, &inputs)?);
        let here = at..at + 1;
        let felt = self.plain.iter().zip(&edited).any(|((name, plain), (_, edited))| {
            let row = |tap| vec![(name.clone(), taken(tap, &here))];
            !self.parts.states.contains(&name.as_str())
                && difference(&row(plain), &row(edited)).is_some()
        });
        if !felt {
            return Err(Outcome::Mistrusted(format!("token {at} does not feel its own inputs")));
        }
        let got = self.with(&edited, &|rows, states| {
            if states {
                return rows.iter().enumerate().map(|(i, _)| (i..i + 1, false)).collect();
            }
            vec![(0..at, true), (at..rows.last().map_or(at, |rows| rows.end), false)]
        });
        Ok(self.compare(&got, &Cuts::new(), claim))
    }

    fn gate_one(&mut self, claim: Option<&'static str>) -> Result<(Outcome, Difference), Outcome> {
        let Some((inputs, want)) = O::gate_one::<f32>(&self.inputs) else {
            return Err(Outcome::Unsupported("there is no gate".to_owned()));
        };
        let (want, got) = (taps(&want), taps(&self.way.run(self.spec, &inputs)?));
        let difference = difference(&want, &got);
        let plan = self.way.plan(self.spec);
        let dear = dear::is::<O>(self.spec, dear::TOO_DEAR);
        let outcome = verdict(claim, difference.as_ref(), |side| {
            let wide = O::wide::<f64>(&inputs);
            let (_, oracle) = O::gate_one(&wide).ok_or("there is a gate")?;
            let planned = O::wide::<Planned>(&inputs);
            let run = |rounding: Rounding| {
                if rounding == Rounding::Nearest && plan.only_f32() {
                    return Ok(widened(&taps(&O::answer(&inputs, plan.form, None))));
                }
                let run = under(&plan, None, rounding, || O::answer(&planned, plan.form, None));
                Ok(widened(&taps(&run)))
            };
            let grid = |name: &str| grid(&plan, &self.parts, name);
            let derive =
                &mut |runs| spread::derive(&taps(&oracle), &grid, runs, &run).map(Arc::new);
            let side = if side == Side::Got { &got } else { &want };
            if dear {
                let mut yardstick = Yardstick::default();
                return spread::twice(&taps(&oracle), &grid, &mut yardstick, &run, side);
            }
            spread::judge(side, derive)
        });
        Ok((outcome, difference))
    }

    /// What the way answers when it is fed in pieces.
    fn fed(&self, cuts: &Cuts) -> Result<Taps, Outcome> {
        pieces::<O, f32, Outcome>(
            &self.inputs,
            cuts,
            &self.parts,
            &mut |at, i, before| O::cut(&self.inputs, i, at.clone(), before),
            &mut |at, inputs| self.way.run(&piece(self.spec, at), inputs),
        )
    }

    fn compare(
        &mut self,
        got: &Taps,
        cuts: &Cuts,
        claim: Option<&'static str>,
    ) -> (Outcome, Difference) {
        let difference = difference(&self.plain, got);
        let outcome = verdict(claim, difference.as_ref(), |side| match side {
            Side::Got => self.judge(got, cuts),
            Side::Want => {
                let plain = self.plain.clone();
                self.judge(&plain, &Cuts::new())
            }
        });
        (outcome, difference)
    }

    /// Above so many operations a dozen stochastic runs take minutes.
    const DEAR: u64 = 20_000_000;

    fn judge(&mut self, got: &Taps, cuts: &Cuts) -> Result<Vec<Finding>, Error> {
        let oracle = self.oracle();
        let cuts = if self.same_arithmetic(cuts) { &Cuts::new() } else { cuts };
        if Self::DEAR < O::cost(self.spec).flops {
            return self.relative(&oracle, got, cuts);
        }
        let planned = O::wide::<Planned>(&self.inputs);
        let run = |rounding: Rounding| self.walked(&planned, cuts, rounding);
        let plan = self.way.plan(self.spec);
        let mut kept = HashMap::new();
        let findings = spread::judge(got, &mut |runs| {
            if let Some(bounds) = self.bounds.get(&(cuts.clone(), runs)) {
                return Ok(bounds.clone());
            }
            let grid = |name: &str| grid(&plan, &self.parts, name);
            let bounds = Arc::new(spread::derive(&oracle, &grid, runs, &run)?);
            kept.insert((cuts.clone(), runs), bounds.clone());
            Ok(bounds)
        });
        self.bounds.extend(kept);
        findings
    }

    fn oracle(&mut self) -> Arc<Taps> {
        let inputs = &self.inputs;
        let plain = || Arc::new(taps(&O::plain(&O::wide::<f64>(inputs))));
        self.oracle.get_or_insert_with(plain).clone()
    }

    fn relative(&mut self, oracle: &Taps, got: &Taps, cuts: &Cuts) -> Result<Vec<Finding>, Error> {
        let mut yardstick = self.yardsticks.remove(cuts).unwrap_or_default();
        let emulate = |rounding| {
            if rounding == Rounding::Nearest && self.only_f32(cuts) {
                return self.walked(&O::wide::<f32>(&self.inputs), cuts, rounding);
            }
            self.walked(&O::wide::<Planned>(&self.inputs), cuts, rounding)
        };
        let plan = self.way.plan(self.spec);
        let grid = |name: &str| grid(&plan, &self.parts, name);
        let findings = spread::twice(oracle, &grid, &mut yardstick, &emulate, got);
        self.yardsticks.insert(cuts.clone(), yardstick);
        findings
    }

    /// Whether every piece is computed under a plan that the reference in f32 follows, at a tenth of the
    /// price of an emulation.
    fn only_f32(&self, cuts: &Cuts) -> bool {
        let mut plans = cuts.iter().flatten().map(|at| self.way.plan(&piece(self.spec, at)));
        self.way.plan(self.spec).only_f32() && plans.all(|plan| plan.only_f32())
    }

    /// Whether the pieces are computed as the whole is, rounding for rounding, so that one bound holds
    /// for both: token by token, under one plan, the state stored as it is kept.
    fn same_arithmetic(&self, cuts: &Cuts) -> bool {
        let plan = self.way.plan(self.spec);
        plan.form == Form::Plain
            && plan.state == plan.accumulator
            && cuts.iter().flatten().all(|at| self.way.plan(&piece(self.spec, at)) == plan)
    }

    /// The reference, fed as the candidate was, each piece under its own plan if the number follows
    /// plans.
    fn walked<R: Real>(
        &self,
        inputs: &O::Inputs<R>,
        cuts: &Cuts,
        rounding: Rounding,
    ) -> Result<spread::Run, Error> {
        if cuts.is_empty() {
            let plan = self.way.plan(self.spec);
            let run = under(&plan, None, rounding, || O::answer(inputs, plan.form, None));
            return Ok(widened(&taps(&run)));
        }
        let plan = self.way.plan(self.spec);
        let seam = Plan::F32.round(Site::State, plan.state);
        let got = pieces::<O, R, Error>(
            inputs,
            cuts,
            &self.parts,
            &mut |at, i, before| {
                under(&seam, None, rounding, || O::cut(inputs, i, at.clone(), before))
            },
            &mut |at, inputs| {
                let plan = self.way.plan(&piece(self.spec, at));
                Ok(under(&plan, None, rounding, || O::answer(inputs, plan.form, None)))
            },
        )?;
        Ok(widened(&got))
    }
}

fn widened(taps: &Taps) -> spread::Run {
    taps.iter().map(|(_, tap)| tap.view().to_f64()).collect()
}

/// Given the rows of each sequence, and whether a tensor has one row per sequence instead: ranges of
/// rows, and whether they are taken from the other answer.
type Choose<'a> = dyn Fn(&[Range<usize>], bool) -> Vec<(Range<usize>, bool)> + 'a;

/// What an output is stored in.
fn grid(plan: &Plan, parts: &Parts, name: &str) -> Grid {
    if name == "state" && parts.states.contains(&name) { plan.state } else { plan.output }
}

/// Feeds every sequence piece by piece and joins what comes back.
#[expect(clippy::type_complexity, reason = "a piece and what was before it")]
fn pieces<O: Sequence, R: Real, E>(
    whole: &O::Inputs<R>,
    cuts: &Cuts,
    parts: &Parts,
    cut: &mut dyn FnMut(
        &Range<usize>,
        usize,
        sequence::Before<'_, O::Inputs<R>, O::Outputs<R>>,
    ) -> O::Inputs<R>,
    run: &mut dyn FnMut(&Range<usize>, &O::Inputs<R>) -> Result<O::Outputs<R>, E>,
) -> Result<Taps, E> {
    let mut sequences = Vec::new();
    for (i, cuts) in cuts.iter().enumerate().take(new_rows(whole).len()) {
        let mut before: Option<(O::Inputs<R>, O::Outputs<R>)> = None;
        let mut answers: Vec<Taps> = Vec::new();
        for at in cuts {
            let seen = before.as_ref().map(|(inputs, outputs)| (inputs, outputs));
            let inputs = cut(at, i, seen);
            let outputs = run(at, &inputs)?;
            if let Some(answer) = answers.last_mut() {
                // Tens of thousands of states would not fit.
                answer.retain(|(name, _)| !parts.states.contains(&name.as_str()));
            }
            answers.push(taps(&outputs));
            before = Some((inputs, outputs));
        }
        sequences.push(joined(answers));
    }
    Ok(joined(sequences))
}
