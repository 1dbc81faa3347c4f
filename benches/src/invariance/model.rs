//! Invariance of a whole model.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Duration,
};

use golden::{Engine, Error, Rng, Weights};

use super::{Change, pool};
use crate::{
    clock,
    paths::{
        garbage::Garbage,
        plain::{Plain, Subject, whole},
        walk::{Said, Slot, Walk},
    },
    registry::message,
    report::Outcome,
    same::{Difference, Row, Side, difference, verdict},
};

/// Every change of a text by an engine.
pub(super) fn run(
    subject: &Subject<'_>,
    weights: Arc<dyn Weights>,
    changes: &[Change],
    budget: Duration,
) -> Vec<Row> {
    let weights: Arc<dyn Weights> = Arc::new(Garbage(weights));
    let row = |change: Change, outcome| {
        subject.row("invariance", change.to_string(), change.kind(), outcome)
    };
    let all = |outcome: &Outcome| changes.iter().map(|&c| row(c, outcome.clone())).collect();
    let plain = match Plain::of(subject, &weights) {
        Ok(plain) => plain,
        Err(outcome) => return all(&outcome),
    };
    let mut engine = match subject.engine(&weights) {
        Ok(engine) => engine,
        Err(error) => return all(&Outcome::Error(error.to_string())),
    };
    let mut rows = Vec::new();
    for &change in changes {
        let claim = change.claim(plain.claims);
        let asked = Asked { plain: &plain, subject, weights: &weights, claim };
        let work = || {
            let run = AssertUnwindSafe(|| asked.changed(&mut *engine, change, budget));
            match catch_unwind(run) {
                Ok(Ok(ended)) => ended,
                Ok(Err(error)) => (None, Outcome::Error(error.to_string()), None),
                Err(panic) => (None, Outcome::Crashed(message(&*panic)), None),
            }
        };
        let ((difference, outcome, runs), took) = clock::time(work);
        rows.push(Row { claim, difference, runs, took, ..row(change, outcome) });
    }
    rows
}

/// The first difference, the outcome, and how many runs there were.
type Ended = (Option<Difference>, Outcome, Option<usize>);

struct Asked<'a> {
    plain: &'a Plain,
    subject: &'a Subject<'a>,
    weights: &'a Arc<dyn Weights>,
    claim: Option<&'static str>,
}

impl Asked<'_> {
    fn changed(
        &self,
        engine: &mut dyn Engine,
        change: Change,
        budget: Duration,
    ) -> Result<Ended, Error> {
        let Plain { text, garbage, .. } = self.plain;
        match change {
            Change::Runs(runs) => {
                let want = self.plain.said(engine, text)?;
                let watch = clock::Stopwatch::new();
                let mut done = 1;
                while done < 2 || (done < runs && watch.elapsed() < budget) {
                    let got = whole(engine, text, *garbage, None)?;
                    done += 1;
                    if difference(&want.taps, &got.taps).is_some() {
                        let (difference, outcome) = self.compare(engine, text, &got)?;
                        return Ok((difference, outcome, Some(done)));
                    }
                }
                Ok((None, Outcome::Passed(Vec::new()), Some(done)))
            }
            Change::Threads(n) => {
                // An engine of its own: which threads it uses is settled when it is made.
                let ask = || -> Result<Said, Error> {
                    let mut engine = self.subject.engine(self.weights)?;
                    whole(&mut *engine, text, *garbage, None)
                };
                let got = pool(n)?.install(ask)?;
                let (difference, outcome) = self.compare(engine, text, &got)?;
                Ok((difference, outcome, None))
            }
            Change::Batch { of, place } => {
                let mut rng = Rng::keyed("neighbours", of as u64);
                let mut texts: Vec<Vec<u32>> = (0..of)
                    .map(|_| text.iter().map(|_| rng.below(*garbage as usize) as u32).collect())
                    .collect();
                texts[place].clone_from(text);
                let got = in_one_step(engine, &texts, *garbage)?;
                let (difference, outcome) = self.compare(engine, text, &got[place])?;
                Ok((difference, outcome, None))
            }
            Change::Turned(by) => {
                // Ragged: the text and parts of it, each compared with itself alone.
                let (n, half) = (text.len(), text.len().div_ceil(2));
                let parts = [&text[..], &text[..1], &text[n - half..], &text[..half], &text[1..]];
                let mut texts: Vec<Vec<u32>> = parts.iter().map(|part| part.to_vec()).collect();
                texts.rotate_left(by);
                let got = in_one_step(engine, &texts, *garbage)?;
                for (text, got) in texts.iter().zip(&got) {
                    let (difference, outcome) = self.compare(engine, text, got)?;
                    if difference.is_some() {
                        return Ok((difference, outcome, None));
                    }
                }
                Ok((None, Outcome::Passed(Vec::new()), None))
            }
        }
    }

    fn compare(
        &self,
        engine: &mut dyn Engine,
        text: &[u32],
        got: &Said,
    ) -> Result<(Option<Difference>, Outcome), Error> {
        let want = self.plain.said(engine, text)?;
        let difference = difference(&want.taps, &got.taps);
        let outcome = verdict(self.claim, difference.as_ref(), |side| {
            self.plain.judge(text, if side == Side::Got { got } else { &want })
        });
        Ok((difference, outcome))
    }
}

fn in_one_step(
    engine: &mut dyn Engine,
    texts: &[Vec<u32>],
    garbage: u32,
) -> Result<Vec<Said>, Error> {
    let slots = (0..texts.len()).map(Slot::Text).collect();
    let mut walk = Walk::start(engine, texts, slots, garbage)?;
    walk.feed(&texts.iter().map(Vec::len).collect::<Vec<_>>())?;
    walk.end()
}
