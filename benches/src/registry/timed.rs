//! A variant on one problem, ready to be timed.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::Arc,
};

use golden::{
    Calls, Case, Clocked, Error, Op, Plan, Prepared, Spec, Tensors, Variant,
    plan::{Activations, Grid},
    recording::serialize,
};
use optimized::doors::Foreign;

use super::{Bench, Candidate, drawn, message};
use crate::{
    answer::Answer,
    clock,
    evidence::held,
    foreign::{Far, Kernel, ended},
    guard, judge,
    report::Outcome,
    turns::{self, Asked, Away, Run, Standing, Timed, Times, Turn},
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

    fn timed_foreign(
        &self,
        text: &str,
        kernel: &Arc<Kernel>,
        asked: &Asked,
    ) -> Result<Box<dyn Timed>, Outcome> {
        let ready = || -> Result<Box<dyn Timed>, Outcome> {
            let spec = Self::spec(text).map_err(Outcome::Error)?;
            Ok(Box::new(Far::<O>::new(&spec, kernel, asked)?))
        };
        caught(ready)
    }

    fn standing(
        &self,
        text: &str,
        kernel: &Foreign,
        asked: &Asked,
    ) -> Result<Box<dyn Standing>, Error> {
        Ok(Box::new(Running::<O>::ready(kernel, &Self::spec(text)?, asked)?))
    }
}

/// A panic ends what is timed, not the run.
fn caught<T>(run: impl FnOnce() -> Result<T, Outcome>) -> Result<T, Outcome> {
    catch_unwind(AssertUnwindSafe(run))
        .unwrap_or_else(|panic| Err(Outcome::Crashed(message(&*panic))))
}

/// The inputs that take turns.
pub(crate) fn draws_of<O: Op>(
    spec: &Spec<O::Case>,
    draws: usize,
) -> impl Iterator<Item = (Spec<O::Case>, O::Inputs<f32>)> {
    (0..draws.max(1) as u64).map(|i| {
        let spec = Spec { seed: spec.seed.wrapping_add(i), ..spec.clone() };
        let inputs = drawn::<O>(&spec);
        (spec, inputs)
    })
}

impl<O: Answer> Running<O> {
    fn new(
        variant: &dyn Variant<O>,
        spec: &Spec<O::Case>,
        asked: &Asked,
    ) -> Result<Running<O>, Outcome> {
        let mut running = Running::ready(variant, spec, asked).map_err(ended)?;
        if asked.extra != 0.0 {
            let less = part::<O>(spec, asked.extra).map_err(Outcome::Error)?;
            let extra = variant.prepare(&less, &drawn::<O>(&less)).map_err(ended)?;
            running.extra = Some(extra);
        }
        Ok(running)
    }

    /// The same without work besides.
    fn ready(
        variant: &dyn Variant<O>,
        spec: &Spec<O::Case>,
        asked: &Asked,
    ) -> Result<Running<O>, Error> {
        let mut draws = Vec::new();
        for (spec, inputs) in draws_of::<O>(spec, asked.draws) {
            let prepared = variant.prepare(&spec, &inputs)?;
            draws.push(Draw { spec, inputs, prepared });
        }
        let plan = variant.plan(spec);
        let told = format!("{plan:?}");
        let away = asked.away.map(Away::new);
        Ok(Running { plan, told, draws, extra: None, away })
    }

    /// One turn: whoever computes elsewhere times elsewhere.
    fn one(&mut self, draw: usize, times: usize, group: usize) -> Result<Turn, Error> {
        let Running { draws, extra, away, .. } = self;
        let n = draws.len();
        let prepared = &mut draws[draw % n].prepared;
        prepared.poison()?;
        let calls = Calls { times, group, away: away.as_ref().map(Away::bytes) };
        let chain = clock::chain().as_nanos() as f64;
        if let Some(Clocked { mut ns, clock }) = prepared.clocked(&calls)? {
            let besides = extra.as_mut().map(|extra| extra.clocked(&calls)).transpose()?.flatten();
            let besides = besides.map_or_else(Vec::new, |besides| besides.ns);
            ns.iter_mut().zip(besides).for_each(|(ns, besides)| *ns += besides);
            return Ok(Turn { ns, chain, clock });
        }
        turns::turn(times, group, away, &mut || {
            prepared.execute()?;
            extra.as_mut().map_or(Ok(()), |extra| extra.execute())
        })
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
        self.one(draw, calls, group)
    }

    fn judge(&mut self) -> Outcome {
        let run = || Ok(self.judged(|draw| guard::watched(&mut *draw.prepared, &draw.inputs)));
        caught(run).unwrap_or_else(|outcome| outcome)
    }

    fn left(&mut self) -> Outcome {
        let run = || Ok(self.judged(Draw::left));
        caught(run).unwrap_or_else(|outcome| outcome)
    }

    fn plan(&self) -> &str {
        &self.told
    }

    fn factors(&self) -> Activations {
        factors(&self.plan)
    }
}

/// What products of a plan read.
pub(crate) fn factors(plan: &Plan) -> Activations {
    match plan.activations {
        Activations::F32 if plan.dot == Grid::Bf16 => Activations::Bf16,
        kind => kind,
    }
}

impl<O: Op> Draw<O> {
    /// What the last run left, if it did nothing else.
    fn left(&mut self) -> Result<Result<O::Outputs<f32>, Outcome>, Error> {
        let got = self.prepared.outputs()?;
        let changed = guard::differs(&self.inputs, &self.prepared.inputs()?);
        let changed = changed.map(|name| format!("input {name} was changed"));
        Ok(match changed.or(self.prepared.strayed()?) {
            Some(why) => Err(Outcome::Cheat(why)),
            None => Ok(got),
        })
    }
}

impl<O: Answer> Standing for Running<O> {
    fn turn(&mut self, draw: usize, calls: usize, group: usize) -> Result<Turn, Error> {
        self.one(draw, calls, group)
    }

    fn answers(&mut self, run: Run, file: &Path) -> Result<Result<(), Outcome>, Error> {
        let mut tensors = Vec::new();
        for (at, draw) in self.draws.iter_mut().enumerate() {
            let got = match run {
                Run::Now => guard::watched(&mut *draw.prepared, &draw.inputs)?,
                Run::Before => draw.left()?,
            };
            let got = match got {
                Ok(got) => got,
                Err(outcome) => return Ok(Err(outcome)),
            };
            let named = got.tensors().into_iter();
            tensors.extend(named.map(|(name, view)| (format!("{at}/{name}"), held(view))));
        }
        std::fs::write(file, serialize(&tensors, &[])?)?;
        Ok(Ok(()))
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
