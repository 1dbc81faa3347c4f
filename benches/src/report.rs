//! What a job came to.

use std::time::Duration;

use golden::compare::{Bound, Finding};
use serde_json::{Value, json};

/// How a job ended. Only `Passed` is green.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// Every output within its bound.
    Passed(Vec<Finding>),
    /// Some output outside it.
    Failed(Vec<Finding>),
    /// The case proves too little to be believed.
    Mistrusted(String),
    /// Known before running: this machine cannot run it.
    Skipped(String),
    /// Known before running: this variant does not compute it.
    Unsupported(String),
    /// It panicked, or its process died.
    Crashed(String),
    /// It did not end in time.
    Timeout,
    /// It did what an honest kernel would not.
    Cheat(String),
    /// It could not be run.
    Error(String),
}

impl Outcome {
    /// `Passed` or `Failed`; `Mistrusted` where nothing is wrong that has a bound, but not everything
    /// has one.
    pub fn of(findings: Vec<Finding>) -> Outcome {
        if findings.iter().all(|finding| finding.ok) {
            return Outcome::Passed(findings);
        }
        if findings.iter().any(|finding| !finding.ok && !finding.unbounded) {
            return Outcome::Failed(findings);
        }
        let without = findings.iter().filter(|finding| finding.unbounded);
        let names: Vec<_> = without.map(|finding| finding.output.as_str()).collect();
        Outcome::Mistrusted(format!(
            "no bound can be derived under this plan: runs in stochastic arithmetic are not finite in {}",
            names.join(", ")
        ))
    }

    /// Whether something is wrong: neither passed nor known beforehand.
    pub fn is_red(&self) -> bool {
        !matches!(self, Outcome::Passed(_) | Outcome::Skipped(_) | Outcome::Unsupported(_))
    }

    /// One word.
    pub fn name(&self) -> &'static str {
        match self {
            Outcome::Passed(_) => "passed",
            Outcome::Failed(_) => "failed",
            Outcome::Mistrusted(_) => "mistrusted",
            Outcome::Skipped(_) => "skipped",
            Outcome::Unsupported(_) => "unsupported",
            Outcome::Crashed(_) => "crashed",
            Outcome::Timeout => "timeout",
            Outcome::Cheat(_) => "cheat",
            Outcome::Error(_) => "error",
        }
    }

    /// Why, where a reason belongs to it.
    pub fn why(&self) -> Option<&str> {
        match self {
            Outcome::Mistrusted(why)
            | Outcome::Skipped(why)
            | Outcome::Unsupported(why)
            | Outcome::Crashed(why)
            | Outcome::Cheat(why)
            | Outcome::Error(why) => Some(why),
            Outcome::Passed(_) | Outcome::Failed(_) | Outcome::Timeout => None,
        }
    }

    /// What comparing found, if it came to that.
    pub fn findings(&self) -> &[Finding] {
        match self {
            Outcome::Passed(findings) | Outcome::Failed(findings) => findings,
            _ => &[],
        }
    }
}

/// A job with its outcome.
#[derive(Clone, Debug)]
pub struct Row {
    /// The op.
    pub op: &'static str,
    /// The spec, as it prints.
    pub spec: String,
    /// `device/algorithm`.
    pub variant: String,
    /// How it ended.
    pub outcome: Outcome,
    /// How long it took, reference included.
    pub took: Duration,
}

impl Row {
    /// A row.
    pub fn new(
        op: &'static str,
        spec: &str,
        variant: &str,
        outcome: Outcome,
        took: Duration,
    ) -> Row {
        Row { op, spec: spec.to_owned(), variant: variant.to_owned(), outcome, took }
    }

    /// `op/spec@device/algorithm`: what to type to run it again.
    pub fn id(&self) -> String {
        format!("{}/{}@{}", self.op, self.spec, self.variant)
    }

    /// Largest share of an allowance that any output used.
    pub fn budget(&self) -> f64 {
        self.outcome.findings().iter().map(|finding| finding.budget).fold(0.0, f64::max)
    }

    /// The object of `--format jsonl`.
    pub fn json(&self) -> Value {
        json!({
            "schema": "karat.result/1",
            "kind": "check",
            "case": self.id(),
            "op": self.op,
            "spec": self.spec,
            "variant": self.variant,
            "outcome": self.outcome.name(),
            "why": self.outcome.why(),
            "budget_used": number(self.budget()),
            "ms": self.took.as_secs_f64() * 1e3,
            "findings": self.outcome.findings().iter().map(finding_json).collect::<Vec<_>>(),
        })
    }
}

/// A finding as JSON; infinities, which JSON lacks, are the text `inf`.
pub fn finding_json(f: &Finding) -> Value {
    let (rule, runs, grid) = match f.bound {
        Bound::Relative { .. } => ("relative", None, None),
        Bound::Twice { .. } => ("twice the emulated plan", None, None),
        Bound::Derived { runs, grid } => ("derived", Some(runs), Some(grid.name())),
        Bound::Exact => ("exact", None, None),
    };
    json!({
        "output": f.output,
        "ok": f.ok,
        "rule": rule,
        "runs": runs,
        "output_type": grid,
        "n": f.n,
        "over": f.over,
        "rel_rms": number(f.rel_rms),
        "rel_rms_allowed": number(f.rel_rms_allowed),
        "worst_token": number(f.worst_token),
        "worst_token_allowed": number(f.worst_token_allowed),
        "worst_token_at": f.worst_token_at,
        "worst_is": f.worst_is,
        "max_abs": number(f.max_abs),
        "allowed": number(f.allowed),
        "at": f.at,
        "want": number(f.pair.0),
        "got": number(f.pair.1),
        "ulp_p99": f.ulp.0,
        "ulp_max": f.ulp.1,
        "ulp_histogram": f.ulps,
        "not_finite": f.not_finite,
        "budget_used": number(f.budget),
        "bias": f.bias.as_ref().map(|bias| json!({
            "what": bias.what, "part": bias.part, "value": number(bias.value),
            "allowed": number(bias.allowed),
        })),
        "pattern": f.pattern,
    })
}

/// A number as JSON; what JSON lacks is text.
pub fn number(x: f64) -> Value {
    if x.is_finite() { json!(x) } else { json!(x.to_string()) }
}

#[cfg(test)]
mod tests {
    use golden::{
        View,
        compare::{Finding, derived::Derived},
        plan::Grid,
    };
    use ndarray::arr1;

    use super::Outcome;

    /// What an answer comes to whose right value is one, after runs that gave these.
    fn finding(name: &str, runs: &[f64], got: f32) -> Finding {
        let mut derived = Derived::new(&[1], vec![1.0], Grid::F32);
        for &run in runs {
            derived.add(&[run]);
        }
        derived.compare(name, &View::F32(arr1(&[got]).into_dyn().view()))
    }

    #[test]
    fn without_a_bound_nobody_passes_or_fails() {
        let right = finding("right", &[1.0, 1.1], 1.05);
        let wrong = finding("wrong", &[1.0, 1.1], 9.0);
        for run in [f64::NAN, f64::INFINITY] {
            for got in [1.0, 9.0, f32::NAN] {
                let nothing = finding("o", &[1.0, run], got);
                let why = "no bound can be derived under this plan: \
                           runs in stochastic arithmetic are not finite in o";
                assert_eq!(
                    Outcome::of(vec![right.clone(), nothing.clone()]),
                    Outcome::Mistrusted(why.to_owned())
                );
                // What has a bound is held to it.
                let outcome = Outcome::of(vec![wrong.clone(), nothing]);
                assert!(matches!(outcome, Outcome::Failed(_)), "{outcome:?}");
            }
        }
        assert!(matches!(Outcome::of(vec![right]), Outcome::Passed(_)));
    }
}
