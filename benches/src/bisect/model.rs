//! An engine held against the reference, layer by layer and op by op.

mod large;

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
};

use golden::{
    Dtype, Engine, Error, Plan, View, Weights,
    compare::{
        Bound, Finding,
        derived::{Derived, SPREADS},
        views,
    },
    plan::Grid,
    tap::{self, Part, RESIDUAL, Tap},
    weights::Rounded,
};
use ndarray::{Array2, ArrayD};
use reference::{
    Model, Real,
    real::{Planned, Rounding, under},
};

use super::{
    Answers, Op, Report, Row, element,
    progress::{Progress, Steps},
    walk::{Given, Text, Told, walk},
};
use crate::{
    Number,
    bound::{DECIDE, SCREEN},
    judge::same_experts,
    same, spread,
    spread::Bounds,
};

/// What an engine is asked, and how it is built.
pub struct Asked<'a> {
    /// Its name.
    pub engine: &'a str,
    /// Its number type.
    pub number: Number<'a>,
    /// A fault in its wiring.
    pub plant: Option<&'a str>,
    /// The model.
    pub weights: Arc<dyn Weights>,
    /// Tokens of each sequence.
    pub tokens: Vec<Vec<u32>>,
    /// Columns in which they are fed.
    pub pieces: Vec<usize>,
    /// Told how far it is.
    pub progress: Progress,
}

/// Holds an engine against the reference.
///
/// # Errors
/// If there is no such engine, it cannot run, or the work was ended.
pub fn against_reference(asked: &Asked<'_>) -> Result<Report, Error> {
    let mut engine = crate::engine(asked.engine, asked.number, asked.weights.clone(), asked.plant)?;
    let steps = Steps::new(asked.progress.clone());
    engine.watch(steps.listener());
    // A cast model is the reference's business; of other engines the plan says all.
    let number = if asked.engine == "reference" { asked.number.name } else { "f32" };
    let oracle = Oracle::new(
        crate::as_kept(asked.engine, asked.number.name, asked.weights.clone())?,
        number,
        engine.plan(),
        Text { tokens: asked.tokens.clone(), pieces: asked.pieces.clone(), drafts: true },
        steps,
    )?;
    oracle.hold(&mut *engine)
}

/// Holds answers against the reference, which goes on with them: layer by layer, and on its own with the same
/// experts. By the relative rule ([`crate::dear`]).
///
/// # Errors
/// If the work was ended.
pub fn answers_against_reference(
    answers: &mut Answers,
    weights: Arc<dyn Weights>,
    progress: Progress,
) -> Result<Report, Error> {
    let columns = answers.tokens.iter().map(Vec::len).max().unwrap_or(0);
    let text = Text { tokens: answers.tokens.clone(), pieces: vec![columns], drafts: false };
    let mut oracle = Oracle::empty(weights, "f32", answers.plan(), text, Steps::new(progress));
    oracle.expect(1);
    let given = Given { routing: answers.routing(), ..Given::default() };
    oracle.free = walk(&mut oracle.model::<f64>(), &oracle.text, &given)?;
    oracle.hold_large(answers)
}

/// What is put in place of what the engine computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fed {
    /// Nothing.
    Free,
    /// What each layer reads.
    Layers,
    /// What each op reads.
    Ops,
}

/// Bounds of a walk, from so many runs.
type Kept = Vec<((Fed, u32), Arc<Bounds>)>;

/// The reference's side of a text.
pub(super) struct Oracle {
    weights: Arc<dyn Weights>,
    /// Whether rotary frequencies are in bf16, as those of a model that was cast.
    cast: bool,
    plan: Plan,
    text: Text,
    free: Told,
    /// The reference as it rounds to the nearest under the plan, with the oracle's experts, where that is known.
    emulated: Option<Told>,
    /// Whether a dozen runs are too dear.
    dear: bool,
    /// What the plan stores in bf16, if not everything.
    narrow: BTreeSet<String>,
    /// Bounds of walks that are forced with the reference's own intermediates: every engine of this
    /// plan shares them.
    kept: Mutex<Kept>,
    steps: Steps,
}

impl Oracle {
    /// Walks the oracle once.
    pub(super) fn new(
        weights: Arc<dyn Weights>,
        number: &str,
        plan: Plan,
        text: Text,
        steps: Steps,
    ) -> Result<Oracle, Error> {
        let mut oracle = Oracle::empty(weights, number, plan, text, steps);
        oracle.expect(1);
        oracle.free = walk(&mut oracle.model::<f64>(), &oracle.text, &Given::default())?;
        let some = oracle.plan.round.values().any(|&grid| grid == Grid::Bf16);
        if oracle.plan.output != Grid::Bf16 && some {
            oracle.expect(1);
            let told = oracle.planned(Rounding::Nearest, &oracle.routing())?;
            oracle.narrow = told.stored_in(Dtype::Bf16);
            oracle.emulated = Some(told);
        }
        oracle.dear = oracle.is_dear();
        Ok(oracle)
    }

    fn empty(
        weights: Arc<dyn Weights>,
        number: &str,
        plan: Plan,
        text: Text,
        steps: Steps,
    ) -> Oracle {
        // Every side is fed exactly what the engine gets, weights too.
        let cast = number == "bf16";
        let weights: Arc<dyn Weights> =
            if cast { Arc::new(Rounded::new(weights, Dtype::Bf16)) } else { weights };
        let (free, emulated, dear) = (Told::default(), None, false);
        let (narrow, kept) = (BTreeSet::new(), Mutex::default());
        Oracle { weights, cast, plan, text, free, emulated, dear, narrow, kept, steps }
    }

    /// As if a dozen runs were too dear.
    #[cfg(test)]
    pub(super) fn large(self) -> Oracle {
        Oracle { dear: true, ..self }
    }

    /// The reference as it rounds under the plan.
    fn planned(&self, rounding: Rounding, given: &Given) -> Result<Told, Error> {
        under(&self.plan, None, rounding, || walk(&mut self.model::<Planned>(), &self.text, given))
    }

    /// What an op leaves is stored as its sites say, which runs of the plan do; logits as outputs are.
    fn grid(&self, name: &str) -> Grid {
        let logits = name.ends_with("/lm_head/logits") || name.ends_with("mtp/logits");
        if logits { self.plan.output } else { Grid::F32 }
    }

    /// Experts are the oracle's: a swap in a near tie is judged where the router is.
    fn routing(&self) -> Given {
        let layers = self.weights.config().num_hidden_layers();
        Given { routing: self.free.routing(layers), ..Given::default() }
    }

    fn model<R: Real>(&self) -> Model<R> {
        let model = Model::new(self.weights.clone());
        let mut model = if self.cast { model.with_frequencies_in(Dtype::Bf16) } else { model };
        model.watch(self.steps.listener());
        model
    }

    /// So many more walks are to come.
    fn expect(&self, walks: usize) {
        let layers = self.weights.config().num_hidden_layers();
        self.steps.expect(walks * layers * self.text.pieces.len());
    }

    /// What is told of the residual stream and after it.
    fn stream(tap: &Tap) -> bool {
        match tap.part {
            Part::Layer(_) => tap.op == RESIDUAL && tap.tensor == "o",
            _ => true,
        }
    }

    /// As a tap is stored that is fed: everybody gets the same numbers.
    fn stored(&self, name: &str) -> Dtype {
        let narrow = self.plan.output == Grid::Bf16 || self.narrow.contains(name);
        if narrow { Dtype::Bf16 } else { Dtype::F32 }
    }

    /// What of one walk is fed to another.
    fn given(&self, from: &Told, fed: Fed) -> Given {
        let layers = self.weights.config().num_hidden_layers();
        let forced = match fed {
            Fed::Free => Vec::new(),
            // The stream after the last layer is what the final norm reads.
            Fed::Layers => from.forced(Oracle::stream, |name| self.stored(name)),
            Fed::Ops => from.forced(|_| true, |name| self.stored(name)),
        };
        let hidden = self.stored(&tap::name(Part::Head, "rms_norm", "norm"));
        let narrow = |x: &Array2<f32>| x.mapv(|x| hidden.round(x));
        let mtp = if fed == Fed::Free { None } else { from.mtp.as_ref().map(narrow) };
        Given { forced, routing: from.routing(layers), mtp }
    }

    /// Holds an engine against the reference.
    pub(super) fn hold(&self, engine: &mut dyn Engine) -> Result<Report, Error> {
        if self.dear {
            return self.hold_large(engine);
        }
        let forces = engine.forces();
        let mut report = Report::against_reference(engine);
        self.expect(1);
        let free = walk(engine, &self.text, &self.routing())?;
        let whole = free.whole(&self.text)?;
        let tells_ops = whole.iter().any(|(tap, _)| !Oracle::stream(tap));
        // What an engine does not tell it is not fed either: from one tap that it tells to the next is one
        // op, for everybody.
        let names: BTreeSet<String> = whole.iter().map(|(tap, _)| tap.name()).collect();
        let (shown, all) = self.free.only(&names);
        let mut side = |fed: Fed, free: &Told| -> Result<Vec<Judged>, Error> {
            if forces {
                let (from, shared) =
                    if fed == Fed::Ops { (&shown, all) } else { (&self.free, true) };
                let given = self.given(from, fed);
                self.expect(1);
                let got = walk(engine, &self.text, &given)?;
                self.settle(from, fed, &got, shared)
            } else {
                self.settle(free, fed, free, false)
            }
        };
        let layers = side(Fed::Layers, &free)?;
        let told = self.judge(&self.free, Fed::Free, &free, true, SCREEN)?;
        report.rows = rows(&told, &layers);
        if tells_ops {
            let judged = side(Fed::Ops, &free)?;
            report.ops = self.blamed(&judged);
            if forces {
                report.ops.extend(self.router(engine, &shown)?);
                report.ops.sort_by_key(|op| op.part);
            }
        } else {
            report.unknown.push(format!(
                "{} tells no intermediates: the layer is named, not the op in it",
                engine.name()
            ));
        }
        if report.ok() && told.iter().any(|one| !one.finding.ok) {
            let told = self.judge(&self.free, Fed::Free, &free, true, DECIDE)?;
            let Some(first) = told.iter().find(|one| !one.finding.ok) else { return Ok(report) };
            report.adds_up(first.tap.part);
        }
        Ok(report)
    }

    /// Judged with few runs, and with many where that leaves a doubt about what is the first to blame.
    /// Further on only what is beyond doubt is told.
    fn settle(
        &self,
        from: &Told,
        fed: Fed,
        got: &Told,
        shared: bool,
    ) -> Result<Vec<Judged>, Error> {
        let mut judged = self.judge(from, fed, got, shared, SCREEN)?;
        let doubtful = |one: &Judged| !one.finding.ok && !beyond_doubt(&one.finding);
        let first = judged.iter().filter(|one| !one.finding.ok).map(|one| one.tap.part).min();
        if judged.iter().any(|one| Some(one.tap.part) == first && doubtful(one)) {
            return self.judge(from, fed, got, shared, DECIDE);
        }
        judged.iter_mut().filter(|one| doubtful(one)).for_each(|one| one.finding.ok = true);
        Ok(judged)
    }

    /// What is judged of what was told.
    fn judged_of(&self, told: &Told, fed: Fed) -> Result<Vec<(Tap, same::Tap)>, Error> {
        let keep = |tap: &Tap| fed == Fed::Ops || Oracle::stream(tap);
        let mut whole = told.whole(&self.text)?;
        whole.retain(|(tap, _)| keep(tap) && tap.tensor != "ids" && tap.tensor != "margins");
        Ok(whole)
    }

    /// Holds what was told against the oracle fed with the same.
    fn judge(
        &self,
        from: &Told,
        fed: Fed,
        got: &Told,
        shared: bool,
        runs: u32,
    ) -> Result<Vec<Judged>, Error> {
        let given = self.given(from, fed);
        let pick = |told: &Told| self.judged_of(told, fed);
        let want = if fed == Fed::Free {
            pick(&self.free)?
        } else {
            self.expect(1);
            pick(&walk(&mut self.model::<f64>(), &self.text, &given)?)?
        };
        let ids: Vec<(Part, ArrayD<i64>)> = from
            .whole(&self.text)?
            .into_iter()
            .filter_map(|(tap, value)| match value {
                same::Tap::I64(ids) => Some((tap.part, ids)),
                _ => None,
            })
            .collect();
        let named: same::Taps = want.iter().map(|(tap, x)| (tap.name(), x.clone())).collect();
        let grid = |name: &str| self.grid(name);
        let run = |rounding: Rounding| {
            let told = self.planned(rounding, &given)?;
            Ok(pick(&told)?.into_iter().map(|(_, tap)| tap.view().to_f64()).collect())
        };
        let derive = |runs: u32| -> Result<Arc<Bounds>, Error> {
            let kept = self.kept.lock().ok().and_then(|kept| {
                kept.iter().find(|(key, _)| shared && *key == (fed, runs)).map(|(_, b)| b.clone())
            });
            if let Some(bounds) = kept {
                return Ok(bounds);
            }
            self.expect(runs as usize);
            let bounds = Arc::new(spread::derive(&named, &grid, runs, &run)?);
            if let (true, Ok(mut kept)) = (shared, self.kept.lock()) {
                kept.push(((fed, runs), bounds.clone()));
            }
            Ok(bounds)
        };
        let got = pick(got)?;
        Ok(judged(&want, &*derive(runs)?, &got, &ids))
    }

    /// Ops that are over, and where.
    fn blamed(&self, judged: &[Judged]) -> Vec<Op> {
        let continued = self.text.continued();
        let over = judged.iter().filter(|one| !one.finding.ok);
        let mut ops: Vec<Op> = over
            .map(|one| {
                let mut notes: Vec<String> = one.expert.iter().cloned().collect();
                let by_token = one.rows.len() == self.text.rows();
                let of_later = by_token
                    && one.rows.contains(&true)
                    && one.rows.iter().zip(&continued).all(|(&bad, &later)| !bad || later);
                if of_later {
                    notes.push(
                        "only tokens of a continuation: a state is lost or read wrong".to_owned(),
                    );
                }
                Op {
                    part: one.tap.part,
                    op: one.tap.op.to_string(),
                    tensor: one.tap.tensor.to_string(),
                    finding: one.finding.clone(),
                    first: one.first.clone(),
                    notes,
                }
            })
            .collect();
        // `part` is the order of the computation, and within a part the taps are in theirs.
        ops.sort_by_key(|op| op.part);
        ops
    }

    /// Routers that chose experts of their own, fed what the oracle has: a swap is legal where the
    /// oracle's margin is at most twice what it may be off.
    fn router(&self, engine: &mut dyn Engine, from: &Told) -> Result<Vec<Op>, Error> {
        let given = Given { routing: Vec::new(), ..self.given(from, Fed::Ops) };
        let layers = self.weights.config().num_hidden_layers();
        self.expect(2);
        let got = walk(engine, &self.text, &given)?.routing(layers);
        let own = walk(&mut self.model::<f64>(), &self.text, &given)?;
        let margins = |told: &Told| -> Result<Vec<(Part, Vec<f64>)>, Error> {
            let whole = told.whole(&self.text)?.into_iter();
            let kept = whole.filter(|(tap, _)| tap.tensor == "margins");
            Ok(kept.map(|(tap, x)| (tap.part, x.view().to_f64())).collect())
        };
        let (want, own_ids) = (margins(&own)?, own.routing(layers));
        if got == own_ids {
            return Ok(Vec::new());
        }
        let mut off: Vec<Vec<f64>> = want.iter().map(|(_, x)| vec![0.0; x.len()]).collect();
        self.expect(SCREEN as usize);
        for seed in 0..SCREEN {
            let run = under(&self.plan, None, Rounding::Random(u64::from(seed)), || {
                walk(&mut self.model::<Planned>(), &self.text, &given)
            })?;
            for ((off, (_, want)), (_, run)) in off.iter_mut().zip(&want).zip(margins(&run)?) {
                for ((off, want), run) in off.iter_mut().zip(want).zip(run) {
                    *off += (run - want) * (run - want) / f64::from(SCREEN);
                }
            }
        }
        let mut found = Vec::new();
        let sequences = own_ids.iter().zip(&got).enumerate();
        for (piece, (own, got)) in sequences {
            for ((layer, own), got) in own.iter().enumerate().zip(got) {
                let (Some(own), Some(got)) = (own, got) else { continue };
                let part = Part::Layer(layer);
                let Some(at) = want.iter().position(|(other, _)| *other == part) else { continue };
                for (token, (own, got)) in own.rows().into_iter().zip(got.rows()).enumerate() {
                    let row = self.text.row(piece, token);
                    let (margin, off) = (want[at].1[row], off[at][row].sqrt());
                    if same_experts(&own, &got) || margin <= 2.0 * SPREADS * off {
                        continue;
                    }
                    let ids = |row: ndarray::ArrayView1<'_, i64>| row.to_owned().into_dyn();
                    let (want, got_ids) = (ids(own), ids(got));
                    let finding = views(
                        "ids",
                        &View::I64(want.view()),
                        &View::I64(got_ids.view()),
                        Bound::Exact,
                    );
                    found.push(Op {
                        part,
                        op: "moe_router".to_owned(),
                        tensor: "ids".to_owned(),
                        finding,
                        first: None,
                        notes: vec![format!(
                            "token {row}: experts {got}, oracle {own}, margin {margin:.3e}, above what it may be off"
                        )],
                    });
                    break;
                }
            }
        }
        Ok(found)
    }
}

/// Whether more runs cannot acquit: for twelve runs to have seen a tenth of the true spread, a chi-square
/// of twelve degrees of freedom has to be below a hundredth of its mean, which has a probability below
/// 1e-10. Where no run saw any spread nothing is known yet.
pub(super) fn beyond_doubt(finding: &Finding) -> bool {
    0 < finding.not_finite || (10.0 < finding.budget && finding.budget.is_finite())
}

/// A tensor that was held against its bound.
struct Judged {
    tap: Tap,
    finding: Finding,
    first: Option<element::First>,
    /// Tokens (or whatever the first axis is) that are over.
    rows: Vec<bool>,
    expert: Option<String>,
}

fn judged(
    want: &[(Tap, same::Tap)],
    bounds: &Bounds,
    got: &[(Tap, same::Tap)],
    ids: &[(Part, ArrayD<i64>)],
) -> Vec<Judged> {
    let one = |((tap, _), (name, bound)): (&(Tap, same::Tap), &(String, Derived))| {
        let (_, got) = got.iter().find(|(other, _)| other.name() == *name)?;
        let got = got.view();
        let finding = bound.compare(&tap.tensor, &got);
        let over = if finding.ok { Vec::new() } else { element::over(bound, &got) };
        let rows = element::rows(&bound.shape, &over);
        let routed = ids.iter().find(|(part, _)| *part == tap.part);
        Some(Judged {
            tap: tap.clone(),
            first: element::first(bound, &got, &over),
            expert: routed.and_then(|(_, ids)| element::expert(ids, &rows)),
            rows,
            finding,
        })
    };
    want.iter().zip(bounds).filter_map(one).collect()
}

/// One row per part of the model.
fn rows(free: &[Judged], layers: &[Judged]) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    let mut before = None;
    for one in layers {
        let after = free.iter().find(|other| other.tap.name() == one.tap.name());
        let after = after.map(|other| other.finding.rel_rms);
        let finding = &one.finding;
        if let Some(last) = rows.last_mut()
            && last.part == one.tap.part
        {
            // Of a part with several tensors the last one is what it leaves; the first that is over
            // says why.
            last.local = Some(finding.rel_rms);
            last.allowed = Some(finding.rel_rms_allowed);
            last.after = after;
            if last.ok {
                last.finding = Some(finding.clone());
            }
            last.ok &= finding.ok;
        } else {
            rows.push(Row {
                part: one.tap.part,
                span: None,
                inherited: before,
                local: Some(finding.rel_rms),
                allowed: Some(finding.rel_rms_allowed),
                after,
                ok: finding.ok,
                finding: Some(finding.clone()),
            });
        }
        before = after;
    }
    rows
}
