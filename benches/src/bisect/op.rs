//! A kernel held against the reference: its outputs, and the ops inside a composite one.

use golden::{
    Error, Plan, Spec, Tensors, View,
    compare::Finding,
    plan::Grid,
    tap::{Forced, Part, Tap, Value},
};
use ndarray::ArrayD;
use reference::{
    Probe, Real,
    real::{Planned, Rounding, under},
};

use super::{Op, Report, element, model::beyond_doubt};
use crate::{
    answer::Answer,
    bound::{DECIDE, Output, SCREEN},
    dear, judge, same, spread,
    spread::Bounds,
};

/// What a kernel was asked and said.
pub(crate) struct Kernel<'a, O: Answer> {
    pub(crate) spec: &'a Spec<O::Case>,
    pub(crate) inputs: &'a O::Inputs<f32>,
    pub(crate) plan: &'a Plan,
    pub(crate) got: &'a O::Outputs<f32>,
    /// What it held between inputs and outputs.
    pub(crate) inside: &'a [Tap],
}

/// Which output is wrong, and by which inner op.
pub(crate) fn kernel<O: Answer>(subject: String, asked: &Kernel<'_, O>) -> Result<Report, Error> {
    let mut report = Report { subject, ..Report::default() };
    let case = judge::Case::<O> { spec: asked.spec, inputs: asked.inputs, plan: asked.plan };
    let findings = case.judge(asked.got);
    let outputs = asked.got.tensors();
    let ids = outputs.iter().find_map(|(name, view)| match view {
        View::I64(ids) if *name == "ids" => Some(ids.to_owned()),
        _ => None,
    });
    let ids = ids.filter(|ids| judge::routes(&ids.view(), O::experts(asked.inputs)));
    let told = told::<O, f64>(asked, ids.as_ref(), None);
    if told.is_empty() {
        let simple = "it is one op";
        report.unknown.push(format!("{}: no intermediates to compare: {simple}", O::NAME));
    } else if asked.inside.is_empty() {
        let why = "the kernel tells no intermediates: the output is named, not the op inside";
        report.unknown.push(format!("{}: {why}", O::NAME));
    } else if dear::is::<O>(asked.spec, dear::TOO_DEAR) {
        let why = "too dear for bounds of what is inside: take a smaller problem";
        report.unknown.push(format!("{}: {why}", O::NAME));
    } else {
        report.ops = inside::<O>(asked, ids.as_ref())?;
    }
    // A dear problem has no bound per element, and a right one needs none.
    if findings.iter().all(|f| f.ok) {
        return Ok(report);
    }
    if dear::is::<O>(asked.spec, dear::TOO_DEAR) {
        let op = |finding: Finding| Op {
            part: Part::Alone,
            op: O::NAME.to_owned(),
            tensor: finding.output.clone(),
            finding,
            first: None,
            notes: Vec::new(),
        };
        report.ops.extend(findings.into_iter().filter(|finding| !finding.ok).map(op));
        return Ok(report);
    }
    let derived = case.question(ids.as_ref().filter(|_| told_ids(&findings))).derive(SCREEN);
    for finding in findings.into_iter().filter(|finding| !finding.ok) {
        let got = outputs.iter().find(|(name, _)| *name == finding.output).map(|(_, view)| view);
        let bound = derived.iter().find_map(|(name, output)| match output {
            Output::Numbers(bound) if *name == finding.output => Some(bound),
            _ => None,
        });
        let mut notes = Vec::new();
        let mut first = None;
        if let (Some(bound), Some(got)) = (bound, got) {
            let over = element::over(bound, got);
            first = element::first(bound, got, &over);
            let rows = element::rows(&bound.shape, &over);
            notes.extend(ids.as_ref().and_then(|ids| element::expert(ids, &rows)));
        }
        report.ops.push(Op {
            part: Part::Alone,
            op: O::NAME.to_owned(),
            tensor: finding.output.clone(),
            finding,
            first,
            notes,
        });
    }
    Ok(report)
}

/// Whether the experts that were chosen are to be judged by, not themselves wrong.
fn told_ids(findings: &[Finding]) -> bool {
    findings.iter().any(|finding| finding.output == "ids" && finding.ok)
}

/// The reference's intermediates, with those of the kernel in their place or not.
fn told<O: Answer, R: Real>(
    asked: &Kernel<'_, O>,
    ids: Option<&ArrayD<i64>>,
    forced: Option<&Forced>,
) -> Vec<Tap> {
    let mut told = Vec::new();
    O::seen(&O::wide::<R>(asked.inputs), ids, &mut Probe::new(Some(&mut told), forced));
    told
}

/// Ops inside that are over their bound when fed what the kernel had.
fn inside<O: Answer>(asked: &Kernel<'_, O>, ids: Option<&ArrayD<i64>>) -> Result<Vec<Op>, Error> {
    let had = asked.inside.iter().map(|tap| (tap.name(), tap.value.clone()));
    let forced: Forced = had.collect();
    let judged = |tap: &Tap| {
        let numbers = matches!(tap.value, Value::Numbers(_));
        numbers && tap.tensor != "margins" && forced.contains_key(&tap.name())
    };
    let pick = |mut taps: Vec<Tap>| {
        taps.retain(judged);
        taps
    };
    let want = pick(told::<O, f64>(asked, ids, Some(&forced)));
    let named: same::Taps =
        want.iter().map(|tap| (tap.name(), same::Tap::of(&tap.value.view()))).collect();
    let run = |rounding: Rounding| {
        let told =
            under(asked.plan, None, rounding, || told::<O, Planned>(asked, ids, Some(&forced)));
        Ok(pick(told).iter().map(|tap| tap.value.view().to_f64()).collect())
    };
    let over = |bounds: &Bounds| -> (Vec<Op>, bool) {
        let mut sure = true;
        let mut ops = Vec::new();
        for (tap, (name, bound)) in want.iter().zip(bounds) {
            let got = forced[name].view();
            let finding = bound.compare(&tap.tensor, &got);
            if finding.ok {
                continue;
            }
            sure &= beyond_doubt(&finding);
            let over = element::over(bound, &got);
            let rows = element::rows(&bound.shape, &over);
            ops.push(Op {
                part: Part::Alone,
                op: tap.op.to_string(),
                tensor: tap.tensor.to_string(),
                first: element::first(bound, &got, &over),
                notes: ids.and_then(|ids| element::expert(ids, &rows)).into_iter().collect(),
                finding,
            });
        }
        (ops, sure)
    };
    let derive = |runs| spread::derive(&named, &|_: &str| Grid::F32, runs, &run);
    let (ops, sure) = over(&derive(SCREEN)?);
    if ops.is_empty() || sure {
        return Ok(ops);
    }
    Ok(over(&derive(DECIDE)?).0)
}
