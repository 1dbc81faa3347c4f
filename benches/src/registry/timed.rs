//! A variant on one problem, ready to be timed.

use std::panic::{AssertUnwindSafe, catch_unwind};

use golden::{
    Case, Error, Op, Plan, Prepared, Spec, Variant,
    plan::{Activations, Grid},
};

use super::{Bench, Candidate, drawn, message};
use crate::{
    answer::Answer,
    foreign::ended,
    guard, judge,
    report::Outcome,
    turns::{self, Asked, Away, Timed, Times, Turn},
    way,
};

/// A problem, drawn several times.
struct Running<O: Answer> {
    plan: Plan,
    told: String,
    draws: Vec<Draw<O>>,
    /// What is run besides.
    extra: Option<Box<dyn Prepared<O>>>,
    away: Option<Away>,
}

struct Draw<O: Op> {
    spec: Spec<O::Case>,
    inputs: O::Inputs<f32>,
    prepared: Box<dyn Prepared<O>>,
}

impl<O: Answer> Times for Bench<O> {
    fn timed(&self, text: &str, variant: &str, asked: &Asked) -> Result<Box<dyn Timed>, Outcome> {
        let ready = || -> Result<Box<dyn Timed>, Outcome> {
            let spec = Self::spec(text).map_err(Outcome::Error)?;
            let Candidate::Variant(honest) = self.candidate(variant).map_err(Outcome::Error)?
            else {
                let why = "the reference is there to be read, not to be fast";
                return Err(Outcome::Unsupported(why.to_owned()));
            };
            if let Some(outcome) = way::not_run(honest, &spec) {
                return Err(outcome);
            }
            let running = match &asked.fault {
                None => Running::<O>::new(honest, &spec, asked)?,
                Some(fault) => {
                    let none = || Outcome::Error(format!("{variant}: no fault {fault:?}"));
                    Running::<O>::new(&*honest.planted(fault).ok_or_else(none)?, &spec, asked)?
                }
            };
            Ok(Box::new(running))
        };
        caught(ready)
    }
}

/// A panic ends what is timed, not the run.
fn caught<T>(run: impl FnOnce() -> Result<T, Outcome>) -> Result<T, Outcome> {
    catch_unwind(AssertUnwindSafe(run))
        .unwrap_or_else(|panic| Err(Outcome::Crashed(message(&*panic))))
}

impl<O: Answer> Running<O> {
    fn new(
        variant: &dyn Variant<O>,
        spec: &Spec<O::Case>,
        asked: &Asked,
    ) -> Result<Running<O>, Outcome> {
        let mut draws = Vec::new();
        for i in 0..asked.draws.max(1) as u64 {
            let spec = Spec { seed: spec.seed.wrapping_add(i), ..spec.clone() };
            let inputs = drawn::<O>(&spec);
            let prepared = variant.prepare(&spec, &inputs).map_err(ended)?;
            draws.push(Draw { spec, inputs, prepared });
        }
        let extra = if asked.extra == 0.0 {
            None
        } else {
            let less = part::<O>(spec, asked.extra).map_err(Outcome::Error)?;
            Some(variant.prepare(&less, &drawn::<O>(&less)).map_err(ended)?)
        };
        let plan = variant.plan(spec);
        let told = format!("{plan:?}");
        let away = asked.away.map(Away::new);
        Ok(Running { plan, told, draws, extra, away })
    }

    /// Judges every draw as `answers` has it.
    fn judged(
        &mut self,
        mut answers: impl FnMut(&mut Draw<O>) -> Result<Result<O::Outputs<f32>, Outcome>, Error>,
    ) -> Outcome {
        let mut first = None;
        for draw in &mut self.draws {
            let got = match answers(draw) {
                Ok(Ok(got)) => got,
                Ok(Err(outcome)) => return outcome,
                Err(error) => return ended(error),
            };
            let case =
                judge::Case::<O> { spec: &draw.spec, inputs: &draw.inputs, plan: &self.plan };
            let outcome = Outcome::of(case.judge(&got));
            if outcome.is_red() {
                return outcome;
            }
            first.get_or_insert(outcome);
        }
        first.unwrap_or(Outcome::Timeout)
    }
}

impl<O: Answer> Timed for Running<O> {
    fn turn(&mut self, draw: usize, calls: usize, group: usize) -> Result<Turn, Error> {
        let n = self.draws.len();
        let prepared = &mut self.draws[draw % n].prepared;
        prepared.poison()?;
        let extra = &mut self.extra;
        turns::turn(calls, group, &mut self.away, &mut || {
            prepared.execute()?;
            extra.as_mut().map_or(Ok(()), |extra| extra.execute())
        })
    }

    fn judge(&mut self) -> Outcome {
        let run = || Ok(self.judged(|draw| guard::watched(&mut *draw.prepared, &draw.inputs)));
        caught(run).unwrap_or_else(|outcome| outcome)
    }

    fn left(&mut self) -> Outcome {
        let run = || {
            Ok(self.judged(|draw| {
                let got = draw.prepared.outputs()?;
                let changed = guard::differs(&draw.inputs, &draw.prepared.inputs()?);
                Ok(match changed {
                    Some(name) => Err(Outcome::Cheat(format!("input {name} was changed"))),
                    None => Ok(got),
                })
            }))
        };
        caught(run).unwrap_or_else(|outcome| outcome)
    }

    fn plan(&self) -> &str {
        &self.told
    }

    fn factors(&self) -> Activations {
        match self.plan.activations {
            Activations::F32 if self.plan.dot == Grid::Bf16 => Activations::Bf16,
            kind => kind,
        }
    }
}

/// A problem with so large a part of the work of another: one size is smaller, the one that comes
/// closest.
fn part<O: Op>(spec: &Spec<O::Case>, share: f64) -> Result<Spec<O::Case>, String> {
    let work = |spec: &Spec<O::Case>| {
        let cost = O::cost(spec);
        if cost.flops == 0 { cost.bytes as f64 } else { cost.flops as f64 }
    };
    let (sizes, whole) = (spec.case.sizes(), work(spec));
    let off = |spec: &Spec<O::Case>| (work(spec) / whole - share).abs();
    let smaller = (0..sizes.len()).filter_map(|at| {
        let mut sizes = sizes.clone();
        sizes[at] = ((sizes[at] as f64 * share).round() as usize).max(1);
        let less = Spec { case: O::Case::from_sizes(&sizes), ..spec.clone() };
        O::check(&less).is_ok().then_some(less)
    });
    let best = smaller.min_by(|a, b| off(a).total_cmp(&off(b)));
    best.filter(|best| off(best) <= 0.1 * share).ok_or_else(|| {
        format!("{}/{spec}: no problem of it has {:.1} % of its work", O::NAME, 100.0 * share)
    })
}
