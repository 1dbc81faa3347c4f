//! The plain answers of an engine, and what is held against them.

use std::{
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex},
};

use golden::{
    Claims, Engine, Error, Plan, Rng, View, Weights,
    compare::{self, Bound, Finding, derived::Derived},
    engine::Listener,
    plan::Grid,
};
use reference::{
    Model, Real,
    real::{Planned, Rounding, under},
};

use super::{
    faults::{self, Faulty},
    garbage::Garbage,
    walk::{Routing, Said, Slot, TOKENS, Walk},
};
use crate::{
    Number, Unfit,
    formats::Watch,
    judge::same_experts,
    registry::message,
    report::Outcome,
    same::{Row, Tap, Taps, not_finite},
    spread::{self, Bounds},
};

/// What is fed, and to whom.
pub(crate) struct Subject<'a> {
    pub(crate) name: &'a str,
    pub(crate) by: &'a str,
    pub(crate) engine: &'a str,
    pub(crate) number: Number<'a>,
    pub(crate) plant: Option<&'a str>,
    pub(crate) tokens: usize,
    /// Asked at every layer, by the engine and by those that judge it.
    pub(crate) watch: &'a Watch,
}

impl Subject<'_> {
    pub(crate) fn engine(&self, weights: &Arc<dyn Weights>) -> Result<Box<dyn Engine>, Error> {
        let wiring = self.plant.filter(|name| !faults::known(name));
        let mut engine = crate::engine(self.engine, self.number, weights.clone(), wiring)?;
        engine.watch(listener(self.watch));
        Ok(match self.plant.filter(|name| faults::known(name)) {
            Some(fault) => Box::new(Faulty::new(engine, fault)),
            None => engine,
        })
    }

    /// An outcome of one way to do it otherwise.
    pub(crate) fn row(
        &self,
        command: &'static str,
        way: String,
        kind: &'static str,
        outcome: Outcome,
    ) -> Row {
        Row::new(command, self.name, self.name.to_owned(), way, kind, self.by, outcome)
    }
}

/// A text, and the experts that it is computed with if not with those that are chosen: of near ties an
/// engine takes others than the oracle, and most paths of it take the same.
type Asked = (Vec<u32>, Option<Routing>);

/// Bounds, from so many runs.
type Kept = HashMap<(Asked, u32), Arc<Bounds>>;

/// The plain answers: each text alone, at once.
pub(crate) struct Plain {
    pub(crate) weights: Arc<dyn Weights>,
    pub(crate) plan: Plan,
    pub(crate) claims: Claims,
    pub(crate) garbage: u32,
    /// The text that most paths feed.
    pub(crate) text: Vec<u32>,
    /// Texts of other lengths, for packing; a prefix of one is fed by more than one path.
    pub(crate) neighbours: Vec<Vec<u32>>,
    said: Mutex<HashMap<Asked, Arc<Said>>>,
    oracles: Mutex<HashMap<Asked, Arc<Said>>>,
    bounds: Mutex<Kept>,
    watch: Watch,
}

impl Plain {
    pub(crate) fn of(subject: &Subject<'_>, weights: &Arc<dyn Weights>) -> Result<Plain, Outcome> {
        let failed = |error: Error| match error.downcast_ref::<Unfit>() {
            Some(unfit) => Outcome::Skipped(unfit.to_string()),
            None => Outcome::Error(error.to_string()),
        };
        let mut engine = subject.engine(weights).map_err(failed)?;
        let garbage = Garbage::token(engine.config());
        let mut rng = Rng::keyed("paths", 0);
        let mut draw =
            |n: usize| -> Vec<u32> { (0..n).map(|_| rng.below(garbage as usize) as u32).collect() };
        let text = draw(subject.tokens);
        let most = subject.tokens;
        let neighbours = [1, 2, 3, 4, 63, 64, 65, 6].map(|n| draw(n.min(most))).to_vec();
        let kept = crate::as_kept(subject.engine, subject.number.name, weights.clone());
        let plain = Plain {
            weights: kept.map_err(failed)?,
            plan: engine.plan(),
            claims: engine.claims(),
            garbage,
            text,
            neighbours,
            said: Mutex::default(),
            oracles: Mutex::default(),
            bounds: Mutex::default(),
            watch: subject.watch.clone(),
        };
        let run = AssertUnwindSafe(|| plain.said(&mut *engine, &plain.text));
        let said = catch_unwind(run)
            .map_err(|panic| Outcome::Crashed(message(&*panic)))?
            .map_err(failed)?;
        if let Some(name) = not_finite(&said.taps, &[]) {
            return Err(Outcome::Mistrusted(format!(
                "the plain answer is not finite in {name}: nothing can be compared with it"
            )));
        }
        Ok(plain)
    }

    /// What an engine says of a text on the plain path.
    pub(crate) fn said(&self, engine: &mut dyn Engine, text: &[u32]) -> Result<Arc<Said>, Error> {
        once(&self.said, &(text.to_vec(), None), || whole(engine, text, self.garbage, None))
    }

    /// Holds what was said of a text against the bound of the engine's plan. Where experts differ from
    /// the oracle's within the margin of a near tie, everything else has to be right with these.
    pub(crate) fn judge(&self, text: &[u32], got: &Said) -> Result<Vec<Finding>, Error> {
        let mut findings = vec![tokens(text, got)];
        let alone = (text.to_vec(), None);
        let own = self.oracle(&alone)?;
        let flips = flips(&own, got, &*self.derive(&alone, &own, crate::bound::SCREEN)?);
        match flips {
            Some(Flip::Illegal(finding)) => {
                findings.push(*finding);
                return Ok(findings);
            }
            Some(Flip::Legal) => {
                let forced = (text.to_vec(), Some(got.routing.clone()));
                let own = self.oracle(&forced)?;
                findings.extend(spread::judge(&with_margins(got), &mut |runs| {
                    self.derive(&forced, &own, runs)
                })?);
            }
            None => findings.extend(spread::judge(&with_margins(got), &mut |runs| {
                self.derive(&alone, &own, runs)
            })?),
        }
        Ok(findings)
    }

    /// The reference's answer, in a number type.
    fn answer<R: Real>(&self, text: &[u32], forced: Option<Routing>) -> Result<Said, Error> {
        let mut model = Model::<R>::new(self.weights.clone());
        model.watch(listener(&self.watch));
        whole(&mut model, text, self.garbage, forced)
    }

    /// The oracle's.
    fn oracle(&self, asked: &Asked) -> Result<Arc<Said>, Error> {
        once(&self.oracles, asked, || self.answer::<f64>(&asked.0, asked.1.clone()))
    }

    /// Bounds around the oracle's answer; runs take its experts.
    fn derive(&self, asked: &Asked, own: &Said, runs: u32) -> Result<Arc<Bounds>, Error> {
        let key = (asked.clone(), runs);
        if let Some(bounds) = self.bounds.lock().ok().and_then(|all| all.get(&key).cloned()) {
            return Ok(bounds);
        }
        let grid = |name: &str| match name {
            name if name.starts_with("recurrent_state") => self.plan.state,
            name if name.starts_with("margins") => Grid::F32,
            _ => self.plan.output,
        };
        let run = |rounding: Rounding| {
            let run = under(&self.plan, None, rounding, || {
                self.answer::<Planned>(&asked.0, Some(own.routing.clone()))
            });
            Ok(with_margins(&run?).into_iter().map(|(_, tap)| tap.view().to_f64()).collect())
        };
        let bounds = Arc::new(spread::derive(&with_margins(own), &grid, runs, &run)?);
        if let Ok(mut all) = self.bounds.lock() {
            all.insert(key, bounds.clone());
        }
        Ok(bounds)
    }
}

/// An engine's listener.
fn listener(watch: &Watch) -> Listener {
    let watch = watch.clone();
    Box::new(move |_| watch())
}

/// What is kept of a text, or what `f` makes of it.
fn once(
    kept: &Mutex<HashMap<Asked, Arc<Said>>>,
    asked: &Asked,
    f: impl FnOnce() -> Result<Said, Error>,
) -> Result<Arc<Said>, Error> {
    if let Some(said) = kept.lock().ok().and_then(|kept| kept.get(asked).cloned()) {
        return Ok(said);
    }
    let said = Arc::new(f()?);
    if let Ok(mut kept) = kept.lock() {
        kept.insert(asked.clone(), said.clone());
    }
    Ok(said)
}

/// A text alone, at once.
pub(crate) fn whole(
    engine: &mut dyn Engine,
    text: &[u32],
    garbage: u32,
    forced: Option<Routing>,
) -> Result<Said, Error> {
    let texts = [text.to_vec()];
    let mut walk = Walk::start(engine, &texts, vec![Slot::Text(0)], garbage)?.forced(forced);
    walk.feed(&[text.len()])?;
    walk.end()?.pop().ok_or_else(|| "one text".into())
}

/// Everything that has a bound.
fn with_margins(said: &Said) -> Taps {
    let taps = said.taps.iter().filter(|(name, _)| name != TOKENS);
    taps.chain(&said.margins).cloned().collect()
}

/// The engine holds as many tokens as it was left with.
fn tokens(text: &[u32], got: &Said) -> Finding {
    let want = ndarray::arr1(&[text.len() as i64]).into_dyn();
    let nothing = ndarray::arr1(&[-1_i64]).into_dyn();
    let got = got.taps.iter().find_map(|(name, tap)| match tap {
        Tap::I64(held) if name == TOKENS => Some(held),
        _ => None,
    });
    let got = got.unwrap_or(&nothing);
    compare::views(TOKENS, &View::I64(want.view()), &View::I64(got.view()), Bound::Exact)
}

/// Experts that differ from the oracle's.
enum Flip {
    Legal,
    Illegal(Box<Finding>),
}

/// A swap is legal where the oracle's margin is at most what the two sides of it may be off.
fn flips(own: &Said, got: &Said, bounds: &Bounds) -> Option<Flip> {
    let mut found = None;
    for (layer, (own, got)) in own.routing.iter().zip(&got.routing).enumerate() {
        let (Some(own), Some(got)) = (own, got) else { continue };
        let name = format!("margins.{layer}");
        let margins: Option<&Derived> =
            bounds.iter().find(|(other, _)| *other == name).map(|(_, derived)| derived);
        let allowed = margins.map(Derived::allowed).unwrap_or_default();
        for (token, (own_ids, got_ids)) in own.rows().into_iter().zip(got.rows()).enumerate() {
            if same_experts(&own_ids, &got_ids) {
                continue;
            }
            let margin = margins.and_then(|m| m.want.get(token)).copied().unwrap_or(f64::INFINITY);
            if margin <= 2.0 * allowed.get(token).map_or(0.0, |allowed| allowed.0) {
                found.get_or_insert(Flip::Legal);
                continue;
            }
            let name = format!("routing.{layer}");
            let (want, got) = (own.view().into_dyn(), got.view().into_dyn());
            let mut finding =
                compare::views(&name, &View::I64(want), &View::I64(got), Bound::Exact);
            finding.pattern = Some(format!(
                "token {token}: experts {got_ids}, oracle {own_ids}, margin {margin:.3e}, above what it may be off"
            ));
            return Some(Flip::Illegal(Box::new(finding)));
        }
    }
    found
}
