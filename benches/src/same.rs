//! Two answers that should be the same: to the bit where that is promised, else within the bound of
//! the plan.

use std::{collections::HashMap, time::Duration};

use golden::{Error, Tensors, View, compare::Finding};
use ndarray::{ArrayD, ArrayViewD, Dimension, IxDyn};
use serde_json::{Value, json};

use crate::report::{Outcome, finding_json, number};

/// One tensor of an answer.
#[derive(Clone, Debug)]
pub(crate) enum Tap {
    F32(ArrayD<f32>),
    F64(ArrayD<f64>),
    I64(ArrayD<i64>),
}

/// An answer: its tensors by name, in the order in which they are computed.
pub(crate) type Taps = Vec<(String, Tap)>;

impl Tap {
    pub(crate) fn of(view: &View<'_>) -> Tap {
        match view {
            View::F32(x) => Tap::F32(x.to_owned()),
            View::F64(x) => Tap::F64(x.to_owned()),
            View::I64(x) => Tap::I64(x.to_owned()),
            View::U8(x) => Tap::I64(x.map(|&x| i64::from(x))),
            View::Wide(x) => Tap::F64(x.clone()),
        }
    }

    pub(crate) fn view(&self) -> View<'_> {
        match self {
            Tap::F32(x) => View::F32(x.view()),
            Tap::F64(x) => View::F64(x.view()),
            Tap::I64(x) => View::I64(x.view()),
        }
    }

    /// Whether no number in it is NaN or infinite.
    fn finite(&self) -> bool {
        match self {
            Tap::F32(x) => x.iter().all(|x| x.is_finite()),
            Tap::F64(x) => x.iter().all(|x| x.is_finite()),
            Tap::I64(_) => true,
        }
    }
}

/// Every output of an op.
pub(crate) fn taps(outputs: &impl Tensors) -> Taps {
    outputs.tensors().iter().map(|(name, view)| ((*name).to_owned(), Tap::of(view))).collect()
}

/// The first tensor that holds a NaN or an infinity: an answer that proves nothing. Those in `told`
/// may: the margin of a router that chose every expert is infinite.
pub(crate) fn not_finite<'a>(taps: &'a Taps, told: &[&str]) -> Option<&'a str> {
    let bad = |(name, tap): &&(String, Tap)| !told.contains(&name.as_str()) && !tap.finite();
    taps.iter().find(bad).map(|(name, _)| name.as_str())
}

/// Where two answers part.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    /// The first output, in the order of the computation, that is not equal to the bit.
    pub output: String,
    /// Its first element that differs.
    pub at: Vec<usize>,
    /// That element in the plain answer.
    pub want: f64,
    /// And in the other one.
    pub got: f64,
    /// Elements of that output that differ.
    pub differing: usize,
    /// Of so many.
    pub of: usize,
    /// Largest absolute difference in that output; NaN counts as infinite.
    pub max_abs: f64,
    /// Relative RMS of the difference in that output.
    pub rel_rms: f64,
    /// Largest distance in units in the last place of f32.
    pub ulp: u64,
}

impl Difference {
    fn json(&self) -> Value {
        json!({
            "output": self.output, "at": self.at, "want": number(self.want), "got": number(self.got),
            "differing": self.differing, "of": self.of, "max_abs": number(self.max_abs),
            "rel_rms": number(self.rel_rms), "ulp": self.ulp,
        })
    }
}

/// The first difference in bits, if there is one. An output that `got` lacks, or has in another shape,
/// differs in its first element.
pub(crate) fn difference(want: &Taps, got: &Taps) -> Option<Difference> {
    let by_name: HashMap<&str, &Tap> = got.iter().map(|(name, tap)| (name.as_str(), tap)).collect();
    want.iter().find_map(|(name, want)| match (want, by_name.get(name.as_str())) {
        (Tap::F32(want), Some(Tap::F32(got))) => {
            elements(name, &want.view(), &got.view(), |x| u64::from(x.to_bits()), f64::from)
        }
        (Tap::F64(want), Some(Tap::F64(got))) => {
            elements(name, &want.view(), &got.view(), f64::to_bits, |x| x)
        }
        (Tap::I64(want), Some(Tap::I64(got))) => {
            elements(name, &want.view(), &got.view(), |x| x as u64, |x| x as f64)
        }
        (want, _) => Some(absent(name, want.view().shape())),
    })
}

fn absent(name: &str, shape: &[usize]) -> Difference {
    let of = shape.iter().product();
    Difference {
        output: name.to_owned(),
        at: vec![0; shape.len()],
        want: f64::NAN,
        got: f64::NAN,
        differing: of,
        of,
        max_abs: f64::INFINITY,
        rel_rms: f64::INFINITY,
        ulp: u64::MAX,
    }
}

fn elements<T: Copy>(
    name: &str,
    want: &ArrayViewD<'_, T>,
    got: &ArrayViewD<'_, T>,
    bits: impl Fn(T) -> u64,
    wide: impl Fn(T) -> f64,
) -> Option<Difference> {
    if want.shape() != got.shape() {
        return Some(absent(name, want.shape()));
    }
    let mut first: Option<(IxDyn, T, T)> = None;
    let (mut differing, mut max_abs, mut err2, mut want2, mut ulp) = (0, 0.0_f64, 0.0, 0.0, 0);
    for ((at, &w), &g) in want.indexed_iter().zip(got) {
        let x = wide(w);
        want2 += if x.is_finite() { x * x } else { 0.0 };
        if bits(w) == bits(g) {
            continue;
        }
        first.get_or_insert((at, w, g));
        differing += 1;
        let err = (wide(g) - x).abs();
        let err = if err.is_nan() { f64::INFINITY } else { err };
        max_abs = max_abs.max(err);
        err2 += err * err;
        ulp = ulp.max(golden::compare::ulp(x, wide(g)));
    }
    let (at, w, g) = first?;
    Some(Difference {
        output: name.to_owned(),
        at: at.as_array_view().to_vec(),
        want: wide(w),
        got: wide(g),
        differing,
        of: want.len(),
        max_abs,
        rel_rms: if err2 == 0.0 { 0.0 } else { (err2 / want2).sqrt() },
        ulp,
    })
}

/// Which of two answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// The plain one.
    Want,
    /// The other one.
    Got,
}

/// What two answers came to. Equal bits pass. Where they differ, both are held to the bound of the
/// plan; inside it a difference is still a broken promise if equal bits were claimed.
pub(crate) fn verdict(
    claim: Option<&'static str>,
    difference: Option<&Difference>,
    mut judge: impl FnMut(Side) -> Result<Vec<Finding>, Error>,
) -> Outcome {
    let Some(difference) = difference else { return Outcome::Passed(Vec::new()) };
    let mut judged = |side| match judge(side) {
        Ok(findings) => Outcome::of(findings),
        Err(error) => Outcome::Error(error.to_string()),
    };
    let got = judged(Side::Got);
    if !matches!(got, Outcome::Passed(_)) {
        return got;
    }
    match (judged(Side::Want), claim) {
        (Outcome::Passed(_), Some(claim)) => Outcome::Cheat(format!(
            "it claims {claim}, but {} of {} elements of {} differ, the largest by {:.1e}",
            difference.differing, difference.of, difference.output, difference.max_abs
        )),
        (Outcome::Passed(_), None) => got,
        (Outcome::Failed(mut findings), _) => {
            for finding in &mut findings {
                finding.output = format!("{} (plain)", finding.output);
            }
            Outcome::Failed(findings)
        }
        (other, _) => other,
    }
}

/// One comparison of an answer with the plain one, with its outcome.
#[derive(Clone, Debug)]
pub struct Row {
    /// `paths` or `invariance`.
    pub command: &'static str,
    /// The op, or the model.
    pub group: String,
    /// `op/spec`, or `model/…`.
    pub subject: String,
    /// What was done otherwise: `split=64,77`, `threads=3`.
    pub way: String,
    /// Its kind: `split`, `threads`.
    pub kind: &'static str,
    /// Who computed: `device/algorithm`, or an engine.
    pub by: String,
    /// Which promise asks for equal bits here, if one does.
    pub claim: Option<&'static str>,
    /// The first difference in bits.
    pub difference: Option<Difference>,
    /// How it ended: `Passed` without findings is equal to the bit.
    pub outcome: Outcome,
    /// Runs that were compared, where one was repeated.
    pub runs: Option<usize>,
    /// How long it took.
    pub took: Duration,
}

impl Row {
    /// An outcome that no difference led to.
    pub(crate) fn new(
        command: &'static str,
        group: &str,
        subject: String,
        way: String,
        kind: &'static str,
        by: &str,
        outcome: Outcome,
    ) -> Row {
        Row {
            command,
            group: group.to_owned(),
            subject,
            way,
            kind,
            by: by.to_owned(),
            claim: None,
            difference: None,
            outcome,
            runs: None,
            took: Duration::ZERO,
        }
    }

    /// `subject/way@by`: what to type to run it again.
    pub fn id(&self) -> String {
        id(&self.subject, &self.way, &self.by)
    }

    /// Whether nothing differs in any bit.
    pub fn equal(&self) -> bool {
        self.difference.is_none() && matches!(self.outcome, Outcome::Passed(_))
    }

    /// Largest share of an allowance that was used; nothing where all bits are equal.
    pub fn budget(&self) -> f64 {
        self.outcome.findings().iter().map(|finding| finding.budget).fold(0.0, f64::max)
    }

    /// The object of `--format jsonl`.
    pub fn json(&self) -> Value {
        json!({
            "schema": "karat.result/1",
            "kind": self.command,
            "case": self.id(),
            "subject": self.subject,
            "way": self.way,
            "what": self.kind,
            "variant": self.by,
            "outcome": self.outcome.name(),
            "why": self.outcome.why(),
            "claim": self.claim,
            "equal": self.equal(),
            "difference": self.difference.as_ref().map(Difference::json),
            "runs": self.runs,
            "budget_used": number(self.budget()),
            "ms": self.took.as_secs_f64() * 1e3,
            "findings": self.outcome.findings().iter().map(finding_json).collect::<Vec<_>>(),
        })
    }
}

/// `subject/way@by`.
pub(crate) fn id(subject: &str, way: &str, by: &str) -> String {
    format!("{subject}/{way}@{by}")
}
