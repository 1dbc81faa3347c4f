//! A text of a model that is too large for a dozen runs: the rule is relative ([`crate::dear`]).

use std::{borrow::Cow, collections::BTreeSet};

use golden::{
    Engine, Error, View,
    compare::{
        Bound,
        logits::{Allowed, distance},
        views,
    },
    inventory::Inventory,
    tap::{Part, Tap},
};
use ndarray::{Array1, Array2, ArrayView1};
use reference::real::Rounding;

use super::{Fed, Judged, Oracle, rows};
use crate::{
    bisect::{
        Loss, Op, Report,
        walk::{Given, Told, walk},
    },
    dear::{self, Yardstick},
    same, spread,
};

/// Emulations that add in other orders, where the loss is over twice that of the first.
const ORDERS: u32 = 12;

/// Of a distance only the divergence is asked.
const UNJUDGED: Allowed = Allowed { rel_rms: f64::INFINITY, worst_row: f64::INFINITY };

/// The same walk of the oracle, of an emulation of the plan and of the engine.
struct Walks<'a> {
    given: &'a Given,
    want: &'a Told,
    emulated: &'a Told,
    got: &'a Told,
}

/// What an engine says where it is fed.
struct Theirs {
    got: Told,
    /// With experts of its own choice.
    own: Told,
}

impl Oracle {
    /// Whether a dozen runs of this text are too dear.
    pub(super) fn is_dear(&self) -> bool {
        let tokens = self.text.rows() as u64;
        let each = Inventory::of(&*self.weights).flops_per_token(tokens);
        dear::TOO_DEAR <= tokens.saturating_mul(each)
    }

    /// Holds an engine against the reference.
    pub(super) fn hold_large(&self, engine: &mut dyn Engine) -> Result<Report, Error> {
        let forces = engine.forces();
        let mut report = Report::against_reference(engine);
        report.unknown.push(
            "single elements: tensors and their worst rows are held to twice what an emulation of the plan errs, \
             as a dozen runs are too dear"
                .to_owned(),
        );
        let routing = self.routing();
        self.expect(1);
        let free = walk(engine, &self.text, &routing)?;
        let given = self.given(if forces { &self.free } else { &free }, Fed::Layers);
        let theirs = self.theirs(engine, &free, &given)?;
        // Emulations take one thread each.
        let own = || -> Result<Cow<'_, Told>, Error> {
            if let Some(emulated) = &self.emulated {
                return Ok(Cow::Borrowed(emulated));
            }
            self.expect(1);
            self.planned(Rounding::Nearest, &routing).map(Cow::Owned)
        };
        let (emulated, layers) = rayon::join(own, || self.oracles(&given));
        let (emulated, (want, near)) = (emulated?, layers?);
        let walks = Walks { given: &given, want: &want, emulated: &near, got: &theirs.got };
        let layers = self.relative(Fed::Layers, &walks)?;
        report.ops = if layers.iter().all(|one| one.finding.ok) {
            self.swaps(&want, &near, &theirs.own)?
        } else if forces {
            self.ops(engine, &free)?
        } else {
            report.unknown.push("answers tell the layer, not the op in it".to_owned());
            Vec::new()
        };
        report.ops.sort_by_key(|op| op.part);
        let walks = Walks { given: &routing, want: &self.free, emulated: &emulated, got: &free };
        let after = self.relative(Fed::Free, &walks)?;
        report.rows = rows(&after, &layers);
        if let (false, Some(last)) = (forces, report.rows.iter_mut().find(|r| r.part == Part::Head))
        {
            // What the last layer leaves is told after the final norm.
            let layers = self.weights.config().num_hidden_layers();
            last.span = Some(format!("layer {} to the head", layers.saturating_sub(1)));
        }
        report.loss = self.loss(&walks)?;
        let lost = report.loss.is_some_and(|loss| !loss.ok()).then_some(Part::Head);
        let added = after.iter().find(|one| !one.finding.ok).map(|one| one.tap.part).or(lost);
        if let (None, Some(part)) = (report.part(), added) {
            report.adds_up(part);
        }
        Ok(report)
    }

    /// What an engine says where it is fed, with the oracle's experts and with its own.
    fn theirs(&self, engine: &mut dyn Engine, free: &Told, given: &Given) -> Result<Theirs, Error> {
        if !engine.forces() {
            return Ok(Theirs { got: free.clone(), own: free.clone() });
        }
        self.expect(2);
        let got = walk(engine, &self.text, given)?;
        let own = Given { routing: Vec::new(), ..given.clone() };
        Ok(Theirs { got, own: walk(engine, &self.text, &own)? })
    }

    /// The oracle where it is fed, and an emulation of the plan.
    fn oracles(&self, given: &Given) -> Result<(Told, Told), Error> {
        self.expect(2);
        let (want, near) = rayon::join(
            || walk(&mut self.model::<f64>(), &self.text, given),
            || self.planned(Rounding::Nearest, given),
        );
        Ok((want?, near?))
    }

    /// The ops that are over where every op is fed, routers among them: what one reads is right there, whatever
    /// its mixer did.
    fn ops(&self, engine: &mut dyn Engine, free: &Told) -> Result<Vec<Op>, Error> {
        let whole = free.whole(&self.text)?;
        let names: BTreeSet<String> = whole.iter().map(|(tap, _)| tap.name()).collect();
        let shown = self.free.only(&names).0;
        let given = self.given(&shown, Fed::Ops);
        let theirs = self.theirs(engine, free, &given)?;
        let (want, near) = self.oracles(&given)?;
        let walks = Walks { given: &given, want: &want, emulated: &near, got: &theirs.got };
        let judged = self.relative(Fed::Ops, &walks)?;
        let routers = self.swaps(&want, &near, &theirs.own)?;
        Ok(self.blamed(&judged).into_iter().chain(routers).collect())
    }

    /// What was told, held to twice what the emulation errs.
    fn relative(&self, fed: Fed, walks: &Walks<'_>) -> Result<Vec<Judged>, Error> {
        let name = |(tap, x): &(Tap, same::Tap)| (tap.name(), x.clone());
        let got: same::Taps = self.judged_of(walks.got, fed)?.iter().map(name).collect();
        let told = |tap: &Tap| got.iter().any(|(name, _)| *name == tap.name());
        let run = |told_by: &Told| -> Result<spread::Run, Error> {
            let mut run = self.judged_of(told_by, fed)?;
            run.retain(|(tap, _)| told(tap));
            Ok(run.into_iter().map(|(_, x)| x.view().to_f64()).collect())
        };
        let mut want = self.judged_of(walks.want, fed)?;
        want.retain(|(tap, _)| told(tap));
        let oracle: same::Taps = want.iter().map(name).collect();
        let emulate = |rounding: Rounding| {
            if rounding == Rounding::Nearest {
                return run(walks.emulated);
            }
            self.expect(1);
            run(&self.planned(rounding, walks.given)?)
        };
        let mut yardstick = Yardstick::default();
        let grid = |name: &str| self.grid(name);
        let findings = spread::twice(&oracle, &grid, &mut yardstick, &emulate, &got)?;
        let judged = |((tap, _), finding)| Judged {
            tap,
            finding,
            first: None,
            rows: Vec::new(),
            expert: None,
        };
        Ok(want.into_iter().zip(findings).map(judged).collect())
    }

    /// What logits lose, beside what they lose under the plan.
    fn loss(&self, walks: &Walks<'_>) -> Result<Option<Loss>, Error> {
        let logits = |told: &Told| -> Result<Option<Array2<f32>>, Error> {
            let whole = told.whole(&self.text)?;
            let found =
                whole.into_iter().find(|(tap, _)| tap.part == Part::Head && tap.tensor == "logits");
            let Some((_, x)) = found else { return Ok(None) };
            let view = x.view();
            let &[n, v] = view.shape() else { return Ok(None) };
            let values = view.to_f64().into_iter().map(|x| x as f32).collect();
            Ok(Some(Array2::from_shape_vec((n, v), values)?))
        };
        let (Some(want), Some(got)) = (logits(walks.want)?, logits(walks.got)?) else {
            return Ok(None);
        };
        let kl = |x: &Array2<f32>| distance(&want.view(), &x.view(), &[], UNJUDGED).kl.mean;
        let of = |told: &Told| -> Result<f64, Error> { Ok(logits(told)?.map_or(0.0, |x| kl(&x))) };
        let emulated = of(walks.emulated)?;
        let mut loss = Loss { kl: kl(&got), emulated, allowed: 2.0 * emulated };
        for seed in 0..ORDERS {
            if loss.ok() || !loss.kl.is_finite() {
                break;
            }
            self.expect(1);
            let run = self.planned(Rounding::Random(u64::from(seed)), walks.given)?;
            loss.allowed = loss.allowed.max(of(&run)?);
        }
        Ok(Some(loss))
    }

    /// Routers that chose, of the residual stream that the oracle has, experts which the oracle's logits do not
    /// bear: one that was left out leads one that was taken by more than four times what a logit of the
    /// emulation is off, where twice is allowed of each.
    fn swaps(&self, want: &Told, emulated: &Told, got: &Told) -> Result<Vec<Op>, Error> {
        let layers = self.weights.config().num_hidden_layers();
        let logits = |told: &Told| -> Result<Vec<(Part, Array2<f64>)>, Error> {
            let mut whole = told.whole(&self.text)?;
            whole.retain(|(tap, _)| tap.op == "moe_router" && tap.tensor == "logits");
            let wide = |(tap, x): (Tap, same::Tap)| {
                let view = x.view();
                let rows = view.shape().first().copied().unwrap_or(0).max(1);
                let values = view.to_f64();
                let columns = values.len() / rows;
                Ok((tap.part, Array2::from_shape_vec((rows, columns), values)?))
            };
            whole.into_iter().map(wide).collect()
        };
        let chosen = got.routing(layers);
        let mut found = Vec::new();
        for ((part, want), (_, near)) in logits(want)?.iter().zip(&logits(emulated)?) {
            let Part::Layer(layer) = *part else { continue };
            let off = want.iter().zip(near).map(|(want, near)| (want - near).abs());
            let off = off.fold(0.0, f64::max);
            for (piece, ids) in chosen.iter().enumerate() {
                let Some(ids) = &ids[layer] else { continue };
                let unborne = ids.rows().into_iter().enumerate().find_map(|(token, ids)| {
                    let row = self.text.row(piece, token);
                    let lead = lead(&want.row(row), &ids);
                    let borne = lead <= 4.0 * off;
                    (!borne).then_some((row, ids, lead))
                });
                let Some((row, ids, lead)) = unborne else { continue };
                let own = top(&want.row(row), ids.len());
                let (own, ids) = (own.into_dyn(), ids.to_owned().into_dyn());
                found.push(Op {
                    part: *part,
                    op: "moe_router".to_owned(),
                    tensor: "ids".to_owned(),
                    notes: vec![format!(
                        "token {row}: experts {ids}, oracle {own}; one left out leads by {lead:.3e}, a logit of an \
                         emulation is off by {off:.3e}"
                    )],
                    finding: views("ids", &View::I64(own.view()), &View::I64(ids.view()), Bound::Exact),
                    first: None,
                });
                break;
            }
        }
        Ok(found)
    }
}

/// By how much the first that was left out leads the last that was taken; what is no choice leads by far.
fn lead(logits: &ArrayView1<'_, f64>, ids: &ArrayView1<'_, i64>) -> f64 {
    let taken: BTreeSet<usize> = ids.iter().filter_map(|&id| usize::try_from(id).ok()).collect();
    if taken.len() < ids.len() || taken.iter().any(|&id| logits.len() <= id) {
        return f64::INFINITY;
    }
    let (mut least, mut most) = (f64::INFINITY, f64::NEG_INFINITY);
    for (id, &logit) in logits.iter().enumerate() {
        if taken.contains(&id) {
            least = least.min(logit);
        } else {
            most = most.max(logit);
        }
    }
    most - least
}

/// The experts of the largest logits.
fn top(logits: &ArrayView1<'_, f64>, count: usize) -> Array1<i64> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    order.into_iter().take(count).map(|id| id as i64).collect()
}
