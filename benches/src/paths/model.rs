//! Paths of a text through a whole model.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use golden::{
    Claims, Engine, Error, Weights,
    compare::{self, Bound, Finding},
    engine::{Rows, Step, Want},
};
use ndarray::{Array2, Axis, arr1, concatenate, s};
use rayon::prelude::*;
use reference::{
    Model,
    real::{Planned, Rounding, under},
};

use super::{
    Before, Draft, Order, Path, Wrong,
    garbage::Garbage,
    plain::{Plain, Subject, whole},
    walk::{Said, Slot, TOKENS, Walk},
};
use crate::{
    ask::argmax,
    clock,
    registry::message,
    report::Outcome,
    same::{Difference, Row, Side, Tap, Taps, difference, not_finite, verdict},
    sequence::{stacked, taken},
    spread,
};

/// Every path of a model; false if `take` ended it.
pub(super) fn run(
    subject: &Subject<'_>,
    weights: Arc<dyn Weights>,
    paths: &[Path],
    take: &mut dyn FnMut(&Row) -> bool,
) -> bool {
    let weights: Arc<dyn Weights> = Arc::new(Garbage(weights));
    let row = |path: &Path, outcome| subject.row("paths", path.to_string(), path.kind(), outcome);
    let model = match Plain::of(subject, &weights) {
        Ok(model) => model,
        Err(outcome) => {
            return paths.iter().all(|path| take(&row(path, outcome.clone())));
        }
    };
    let fed = |engine: &mut dyn Engine, path: &Path| {
        let ((claim, difference, outcome), took) = clock::time(|| model.path(engine, path));
        Row { claim, difference, took, ..row(path, outcome) }
    };
    if subject.engine != "reference" {
        // An engine that fills a device is one.
        let Ok(mut engine) = subject.engine(&weights) else { return true };
        return paths.iter().all(|path| take(&fed(&mut *engine, path)));
    }
    for window in paths.chunks(4 * rayon::current_num_threads()) {
        let rows: Vec<Vec<Row>> = window
            .par_chunks(4)
            .map(|paths| match subject.engine(&weights) {
                // Used again and again: what a path leaves behind the next one may not see.
                Ok(mut engine) => paths.iter().map(|path| fed(&mut *engine, path)).collect(),
                Err(error) => {
                    let outcome = Outcome::Error(error.to_string());
                    paths.iter().map(|path| row(path, outcome.clone())).collect()
                }
            })
            .collect();
        if !rows.iter().flatten().all(&mut *take) {
            return false;
        }
    }
    true
}

type Verdict = (Option<&'static str>, Option<Difference>, Outcome);

/// The greedy choice after each token of a text: what logits say, and what an engine said.
struct Choices {
    want: Tap,
    got: Tap,
}

impl Choices {
    const NAME: &'static str = "greedy";

    fn difference(&self) -> Option<Difference> {
        let taps = |tap: &Tap| vec![(Choices::NAME.to_owned(), tap.clone())];
        difference(&taps(&self.want), &taps(&self.got))
    }

    fn finding(&self) -> Finding {
        compare::views(Choices::NAME, &self.want.view(), &self.got.view(), Bound::Exact)
    }
}

/// A path whose garbage is longer than its text.
const MORE: usize = 20;

impl Plain {
    fn path(&self, engine: &mut dyn Engine, path: &Path) -> Verdict {
        let claim = self.claim(path);
        let run = || match path {
            Path::Mtp(pieces) => self.mtp(engine, *pieces, claim),
            Path::Edit(at) => self.edited(engine, *at, claim),
            Path::Decode(many) => self.decoded(engine, *many, claim),
            _ => self.fed(engine, path, claim),
        };
        match catch_unwind(AssertUnwindSafe(run)) {
            Ok(Ok((difference, outcome))) => (claim, difference, outcome),
            Ok(Err(error)) => (claim, None, Outcome::Error(error.to_string())),
            Err(panic) => (claim, None, Outcome::Crashed(message(&*panic))),
        }
    }

    /// Which promise makes a path's answer equal to the bit, if one does.
    fn claim(&self, path: &Path) -> Option<&'static str> {
        let Claims { batch_invariant, cuts, .. } = self.claims;
        let batch = batch_invariant.then_some("batch invariance");
        let cut = |places: &[usize]| {
            let whole = |n: &usize| places.iter().all(|place| place.is_multiple_of(*n));
            cuts.filter(whole).map(|_| "equal bits however it is cut")
        };
        match path {
            Path::Split(pieces) => cut(&ends(pieces)),
            Path::Every(n) | Path::Mtp(n) => cut(&[*n]),
            Path::Resume(at) => cut(&[*at]),
            // What is taken back may be computed again.
            Path::Rollback(_) | Path::Prompt(_) | Path::Decode(1) => cut(&[1]),
            Path::Together(_) | Path::LeftPadded(_) | Path::Poisoned(_) | Path::Decode(_) => {
                batch.and(cut(&[1]))
            }
            Path::Packed(_) | Path::Edit(_) => batch,
            // It is fed in two halves.
            Path::Fresh(_) => {
                let runs = self.claims.deterministic.then_some("equal bits of two runs");
                runs.and(cut(&[self.text.len() / 2]))
            }
            Path::Alone | Path::Heads | Path::GateOne => None,
        }
    }

    /// A path that feeds texts: what it says of each is what the plain path says.
    fn fed(
        &self,
        engine: &mut dyn Engine,
        path: &Path,
        claim: Option<&'static str>,
    ) -> Result<(Option<Difference>, Outcome), Error> {
        let texts = self.texts(path);
        let told = self.walk(engine, path, &texts)?.into_iter().map(|said| (said, None));
        self.compared(engine, &texts, &told.collect::<Vec<_>>(), claim)
    }

    /// What was told of each text against the plain answer, and choices, where some were made, against those that its
    /// logits say.
    fn compared(
        &self,
        engine: &mut dyn Engine,
        texts: &[Vec<u32>],
        told: &[(Said, Option<Choices>)],
        claim: Option<&'static str>,
    ) -> Result<(Option<Difference>, Outcome), Error> {
        let named = |i: usize, output: &mut String| {
            if 1 < texts.len() {
                *output = format!("text {i}: {output}");
            }
        };
        let mut first = None;
        let mut wrong = Vec::new();
        for (i, (text, (got, choices))) in texts.iter().zip(told).enumerate() {
            let want = self.said(engine, text)?;
            if let Some(name) = not_finite(&want.taps, &[]) {
                let why = format!("text {i}: the plain answer is not finite in {name}");
                return Ok((None, Outcome::Mistrusted(why)));
            }
            let chosen = || choices.as_ref().and_then(Choices::difference);
            if let Some(mut found) = difference(&want.taps, &got.taps).or_else(chosen) {
                named(i, &mut found.output);
                first.get_or_insert(found);
                wrong.push((i, text, want, got, choices));
            }
        }
        let outcome = verdict(claim, first.as_ref(), |side| {
            let mut findings = Vec::new();
            for (i, text, want, got, choices) in &wrong {
                let said = if side == Side::Got { got } else { &**want };
                let mut all = self.judge(text, said)?;
                if side == Side::Got {
                    all.extend(choices.as_ref().map(Choices::finding));
                }
                all.iter_mut().for_each(|finding| named(*i, &mut finding.output));
                findings.extend(all);
            }
            Ok(findings)
        });
        Ok((first, outcome))
    }

    /// The texts that a path feeds.
    fn texts(&self, path: &Path) -> Vec<Vec<u32>> {
        match path {
            Path::Packed(Order::Rising) => self.neighbours.clone(),
            Path::Packed(Order::Falling) => self.neighbours.iter().rev().cloned().collect(),
            Path::Poisoned(_) => {
                let text = |n: usize| self.text[..n.min(self.text.len())].to_vec();
                vec![text(9), text(66), text(self.text.len())]
            }
            Path::LeftPadded(_) => {
                // Not in order: those that are fed nothing yet stand between the others.
                let pads = [70, 0, 64, 1, 7, 3].into_iter().filter(|&pad| pad < self.text.len());
                pads.map(|pad| self.text[pad..].to_vec()).collect()
            }
            Path::Together(_) => {
                vec![self.text.clone(), self.text[self.text.len() / 2..].to_vec()]
            }
            _ => vec![self.text.clone()],
        }
    }

    fn walk(
        &self,
        engine: &mut dyn Engine,
        path: &Path,
        texts: &[Vec<u32>],
    ) -> Result<Vec<Said>, Error> {
        let slots: Vec<Slot> = (0..texts.len()).map(Slot::Text).collect();
        let start = |engine| Walk::start(engine, texts, slots.clone(), self.garbage);
        let t = texts.iter().map(Vec::len).max().unwrap_or(0);
        match path {
            Path::Split(pieces) => {
                let mut walk = start(engine)?;
                pieces.iter().try_for_each(|&piece| walk.feed(&[piece]))?;
                walk.end()
            }
            Path::Every(n) => {
                let mut walk = start(engine)?;
                (0..t).step_by(*n).try_for_each(|at| walk.feed(&[(*n).min(t - at)]))?;
                walk.end()
            }
            Path::Resume(at) => {
                let mut walk = start(engine)?;
                walk.feed(&[*at])?;
                walk.detour(MORE)?;
                walk.feed(&[t - at])?;
                walk.end()
            }
            Path::Rollback(draft) => {
                let mut walk = start(engine)?;
                walk.feed(&[draft.at])?;
                let right =
                    self.speculate(&mut walk, *draft, &[draft.accepted], texts, &[draft.at])?;
                // A plain step follows, and a longer one.
                walk.feed(&[1])?;
                walk.feed(&[t - draft.at - right[0] - 1])?;
                walk.end()
            }
            Path::Together(draft) => {
                let mut walk = start(engine)?;
                let at = [draft.at, draft.at];
                walk.feed(&at)?;
                // The other text accepts all that this one refuses.
                let other = Some(draft.drafted - draft.accepted.unwrap_or(0));
                let accepted = [draft.accepted, other];
                let right = self.speculate(&mut walk, *draft, &accepted, texts, &at)?;
                walk.feed(&[1, 1])?;
                let rest = |i: usize| texts[i].len() - draft.at - right[i] - 1;
                walk.feed(&[rest(0), rest(1)])?;
                walk.end()
            }
            Path::Prompt(draft) => {
                let mut walk = start(engine)?;
                walk.speculate(&[draft.at], &[Vec::new()])?;
                let right =
                    self.speculate(&mut walk, *draft, &[draft.accepted], texts, &[draft.at])?;
                walk.feed(&[1])?;
                walk.feed(&[t - draft.at - right[0] - 1])?;
                walk.end()
            }
            Path::Packed(_) => {
                let mut walk = start(engine)?;
                walk.feed(&texts.iter().map(Vec::len).collect::<Vec<_>>())?;
                walk.end()
            }
            Path::Poisoned(kept) => {
                let mut next = 0..texts.len();
                let slot = |i: usize| {
                    if kept.has(i) {
                        next.next().map_or(Slot::Garbage, Slot::Text)
                    } else {
                        Slot::Garbage
                    }
                };
                let slots = (0..2 * texts.len()).map(slot).collect();
                let mut walk = Walk::start(engine, texts, slots, self.garbage)?;
                // Three steps, so that garbage is in the states as well as beside them.
                let part = |text: &Vec<u32>| text.len() / 3;
                let first: Vec<usize> = texts.iter().map(part).collect();
                walk.feed(&first)?;
                walk.feed(&first)?;
                let rest = texts.iter().map(|text| text.len() - 2 * part(text));
                walk.feed(&rest.collect::<Vec<_>>())?;
                walk.end()
            }
            Path::LeftPadded(column) => {
                let mut walk = start(engine)?;
                let head: Vec<usize> =
                    texts.iter().map(|text| column.saturating_sub(t - text.len())).collect();
                walk.feed(&head)?;
                let rest = texts.iter().zip(&head).map(|(text, head)| text.len() - head);
                walk.feed(&rest.collect::<Vec<_>>())?;
                walk.end()
            }
            Path::Fresh(before) => {
                let garbage = vec![self.garbage; t + MORE];
                engine.reset(1)?;
                engine.forward(&[garbage], &Want::default())?;
                if *before == Before::Released {
                    let snapshot = engine.snapshot()?;
                    engine.release(snapshot);
                }
                let mut walk = start(engine)?;
                walk.feed(&[t / 2])?;
                if *before == Before::Released {
                    walk.detour(1)?;
                }
                walk.feed(&[t - t / 2])?;
                walk.end()
            }
            _ => Err(format!("{path}: a path of ops").into()),
        }
    }

    /// A step of the next token and drafts, each text accepting its own number; tokens kept of each.
    fn speculate(
        &self,
        walk: &mut Walk<'_>,
        draft: Draft,
        accepted: &[Option<usize>],
        texts: &[Vec<u32>],
        at: &[usize],
    ) -> Result<Vec<usize>, Error> {
        let kept: Vec<usize> = accepted.iter().map(|n| n.map_or(0, |n| n + 1)).collect();
        let wrong = |(i, &kept): (usize, &usize)| -> Vec<u32> {
            let token = |j: usize| match draft.wrong {
                Wrong::Nan => self.garbage,
                // Not what comes next.
                Wrong::Token => (texts[i][at[i] + kept + j] + 1) % self.garbage,
            };
            (0..1 + draft.drafted - kept).map(token).collect()
        };
        let wrong: Vec<Vec<u32>> = kept.iter().enumerate().map(wrong).collect();
        walk.speculate(&kept, &wrong)?;
        Ok(kept)
    }

    /// What comes before an edited token does not know of it; the token itself and the last one do.
    fn edited(
        &self,
        engine: &mut dyn Engine,
        at: usize,
        claim: Option<&'static str>,
    ) -> Result<(Option<Difference>, Outcome), Error> {
        let want = self.said(engine, &self.text)?;
        let mut text = self.text.clone();
        text[at] = (text[at] + 1) % self.garbage;
        let got = whole(engine, &text, self.garbage, None)?;
        let rows = |taps: &Taps, from: usize, to: usize| -> Taps {
            let per_token = |name: &str| name.starts_with("hidden.") || name == "logits";
            let cut = |(name, tap): &(String, Tap)| (name.clone(), taken(tap, &(from..to)));
            taps.iter().filter(|(name, _)| per_token(name)).map(cut).collect()
        };
        let t = text.len();
        for felt in [at, t - 1] {
            let logits = |said: &Said| {
                let mut taps = rows(&said.taps, felt, felt + 1);
                taps.retain(|(name, _)| name == "logits");
                taps
            };
            if difference(&logits(&want), &logits(&got)).is_none() {
                let why = format!("token {felt} does not feel that token {at} is another");
                return Ok((None, Outcome::Mistrusted(why)));
            }
        }
        let found = difference(&rows(&want.taps, 0, at), &rows(&got.taps, 0, at));
        let outcome = verdict(claim, found.as_ref(), |side| {
            if side == Side::Want {
                return self.judge(&self.text, &want);
            }
            // The plain answer with the earlier rows of the other one.
            let mut mixed = (*want).clone();
            for ((name, tap), (_, got)) in mixed.taps.iter_mut().zip(&got.taps) {
                if name.starts_with("hidden.") || name == "logits" {
                    let parts = [taken(got, &(0..at)), taken(tap, &(at..t))];
                    *tap = stacked(&parts);
                }
            }
            self.judge(&self.text, &mixed)
        });
        Ok((found, outcome))
    }

    /// Texts one token at a time: with everything looked at, for what routers chose, with logits alone, which are held
    /// against the plain answer, and where the engine chooses with choices alone, which are what its logits say.
    fn decoded(
        &self,
        engine: &mut dyn Engine,
        many: usize,
        claim: Option<&'static str>,
    ) -> Result<(Option<Difference>, Outcome), Error> {
        let t = self.text.len();
        let turned = |i: usize| [&self.text[5 * i % t..], &self.text[..5 * i % t]].concat();
        let texts: Vec<Vec<u32>> = (0..many).map(turned).collect();
        let slots = (0..many).map(Slot::Text).collect();
        let mut walk = Walk::start(engine, &texts, slots, self.garbage)?;
        (0..t).try_for_each(|_| walk.feed(&vec![1; many]))?;
        let looked = walk.end()?;
        // Where embeddings are tied, the logit of garbage is garbage: there is no choice.
        let chooses = engine.chooses() && !engine.config().tie_word_embeddings;
        let mut steps = |want: &Want| -> Result<Vec<Step>, Error> {
            engine.reset(many)?;
            let next = |at: usize| texts.iter().map(|text| vec![text[at]]).collect::<Vec<_>>();
            (0..t).map(|at| engine.forward(&next(at), want)).collect()
        };
        let plain = Want { logits: Rows::Last, last: Rows::None, ..Want::default() };
        let told = steps(&plain)?;
        let greedy = Want { logits: Rows::None, greedy: true, ..plain };
        let chosen = chooses.then(|| steps(&greedy)).transpose()?;
        let held = engine.lengths();
        let mut all = Vec::new();
        for (i, mut got) in looked.into_iter().enumerate() {
            let rows: Vec<_> = told.iter().map(|step| step.logits.slice(s![i..=i, ..])).collect();
            let logits = concatenate(Axis(0), &rows)?;
            for (name, tap) in &mut got.taps {
                match name.as_str() {
                    "logits" => {
                        let known = logits.slice(s![.., ..self.garbage as usize]);
                        *tap = Tap::F32(known.to_owned().into_dyn());
                    }
                    TOKENS => *tap = Tap::I64(arr1(&[held[i] as i64]).into_dyn()),
                    _ => {}
                }
            }
            let says = logits.rows().into_iter().map(|row| i64::from(argmax(&row.to_vec())));
            let own = |step: &Step| step.greedy.get(i).map_or(-1, |&id| i64::from(id));
            let ids = |ids: Vec<i64>| Tap::I64(arr1(&ids).into_dyn());
            let choices = chosen.as_ref().map(|chosen| Choices {
                want: ids(says.collect()),
                got: ids(chosen.iter().map(own).collect()),
            });
            all.push((got, choices));
        }
        self.compared(engine, &texts, &all, claim)
    }

    /// The draft head in pieces, a draft of garbage taken back after each, against the head at once.
    fn mtp(
        &self,
        engine: &mut dyn Engine,
        pieces: usize,
        claim: Option<&'static str>,
    ) -> Result<(Option<Difference>, Outcome), Error> {
        let said = self.said(engine, &self.text)?;
        let last = said.taps.iter().rev().find(|(name, _)| name.starts_with("hidden."));
        let Some((_, Tap::F32(hidden))) = last else { return Err("no hidden states".into()) };
        let hidden = hidden.clone().into_dimensionality::<ndarray::Ix2>()?;
        let next = &self.text[1..];
        let n = next.len();
        let known = |logits: &Array2<f32>| logits.slice(s![.., ..self.garbage as usize]).to_owned();
        let taps = |logits: Array2<f32>, hidden: Array2<f32>| -> Taps {
            let tap = |x: Array2<f32>| Tap::F32(x.into_dyn());
            vec![("mtp.hidden".to_owned(), tap(hidden)), ("mtp.logits".to_owned(), tap(logits))]
        };
        let at_once = |engine: &mut dyn Engine| -> Result<Taps, Error> {
            engine.reset(1)?;
            let mut step = engine.mtp(&[next.to_vec()], &hidden.slice(s![..n, ..]).to_owned())?;
            let logits = known(&step.logits);
            Ok(taps(logits, step.hidden.pop().ok_or("a head returns its hidden state")?))
        };
        let want = at_once(engine)?;
        engine.reset(1)?;
        let (mut logits, mut states) = (Vec::new(), Vec::new());
        for start in (0..n).step_by(pieces) {
            let end = (start + pieces).min(n);
            let rows = hidden.slice(s![start..end, ..]).to_owned();
            let mut step = engine.mtp(&[next[start..end].to_vec()], &rows)?;
            logits.push(known(&step.logits));
            states.push(step.hidden.pop().ok_or("a head returns its hidden state")?);
            engine.mtp(&[vec![self.garbage]], &hidden.slice(s![..1, ..]).to_owned())?;
            engine.mtp_truncate(&[end])?;
        }
        let join = |parts: &[Array2<f32>]| {
            concatenate(Axis(0), &parts.iter().map(|x| x.view()).collect::<Vec<_>>())
        };
        let got = taps(join(&logits)?, join(&states)?);
        let found = difference(&want, &got);
        let outcome = verdict(claim, found.as_ref(), |side| {
            let oracle = at_once(&mut Model::<f64>::new(self.weights.clone()))?;
            let run = |rounding: Rounding| {
                let run = under(&self.plan, None, rounding, || {
                    at_once(&mut Model::<Planned>::new(self.weights.clone()))
                });
                Ok(run?.into_iter().map(|(_, tap)| tap.view().to_f64()).collect())
            };
            let grid = |_: &str| self.plan.output;
            let taps = if side == Side::Got { &got } else { &want };
            spread::judge(taps, &mut |runs| {
                spread::derive(&oracle, &grid, runs, &run).map(Arc::new)
            })
        });
        Ok((found, outcome))
    }
}

/// Where pieces end, but for the last.
fn ends(pieces: &[usize]) -> Vec<usize> {
    let mut ends: Vec<usize> = pieces
        .iter()
        .scan(0, |end, piece| {
            *end += piece;
            Some(*end)
        })
        .collect();
    ends.pop();
    ends
}
