//! Rows of results as they are read. What a row has beyond these fields is left alone.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, de};
use serde_json::Value;

/// The head of a run.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Env {
    pub(crate) run: String,
    pub(crate) time: String,
    pub(crate) command: String,
    pub(crate) arguments: Vec<String>,
    pub(crate) version: String,
    pub(crate) revision: Option<String>,
    pub(crate) dirty: Option<bool>,
    pub(crate) build: String,
    pub(crate) fingerprint: String,
    pub(crate) cpu: String,
    pub(crate) threads: u64,
    pub(crate) memory: u64,
    pub(crate) features: Vec<String>,
    pub(crate) gpu: Option<String>,
    pub(crate) gpu_memory: Option<u64>,
    pub(crate) os: String,
    pub(crate) arch: String,
    pub(crate) shard: Option<String>,
    pub(crate) settings: Vec<Setting>,
    /// The machine, as a person would say it.
    pub(crate) machine: String,
    /// Of a baseline: the program that is kept beside it.
    pub(crate) program_blake3: Option<String>,
}

/// A setting that was in force.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Setting {
    pub(crate) key: String,
    pub(crate) value: String,
    pub(crate) from: String,
}

/// The last row of a run.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct End {
    pub(crate) exit: i32,
    #[serde(default)]
    pub(crate) line: Option<String>,
    #[serde(default)]
    pub(crate) seconds: f64,
}

/// A row of check, paths or invariance.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Judged {
    pub(crate) kind: String,
    pub(crate) case: String,
    /// The op; of paths and invariance it stands in `subject`.
    #[serde(default)]
    pub(crate) op: String,
    #[serde(default)]
    pub(crate) subject: String,
    #[serde(default)]
    pub(crate) spec: String,
    #[serde(default)]
    pub(crate) variant: String,
    pub(crate) outcome: String,
    #[serde(default)]
    pub(crate) why: Option<String>,
    #[serde(default, deserialize_with = "number")]
    pub(crate) budget_used: f64,
    #[serde(default, deserialize_with = "number")]
    pub(crate) ms: f64,
    #[serde(default)]
    pub(crate) findings: Vec<Finding>,
    #[serde(default)]
    pub(crate) repro: Option<String>,
    /// What earlier attempts came to.
    #[serde(default)]
    pub(crate) earlier: Vec<Attempt>,
}

/// An attempt that did not pass.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Attempt {
    pub(crate) outcome: String,
    #[serde(default)]
    pub(crate) why: Option<String>,
    #[serde(default, deserialize_with = "number")]
    pub(crate) budget_used: f64,
}

/// Outcomes, the gravest first.
pub(crate) const OUTCOMES: [&str; 9] = [
    "cheat",
    "failed",
    "mistrusted",
    "crashed",
    "timeout",
    "error",
    "unsupported",
    "skipped",
    "passed",
];

impl Judged {
    /// The op, or the model, of which it is an answer.
    pub(crate) fn of(&self) -> &str {
        if self.op.is_empty() {
            self.subject.split('/').next().unwrap_or_default()
        } else {
            &self.op
        }
    }

    /// Whether it was known beforehand that it would not run.
    pub(crate) fn is_skip(&self) -> bool {
        matches!(self.outcome.as_str(), "skipped" | "unsupported")
    }

    /// Whether something is wrong.
    pub(crate) fn is_red(&self) -> bool {
        self.outcome != "passed" && !self.is_skip()
    }

    /// Whether it passed, but not at once.
    pub(crate) fn is_flaky(&self) -> bool {
        self.outcome == "passed" && !self.earlier.is_empty()
    }

    /// What to type to see it again.
    pub(crate) fn typed(&self) -> String {
        let typed = || format!("karat {} '{}'", self.kind, self.case);
        self.repro.clone().unwrap_or_else(typed)
    }

    /// The type that its numbers are stored in.
    pub(crate) fn dtype(&self) -> &str {
        let spelled = self.spec.split(';').find_map(|part| part.strip_prefix("dtype="));
        spelled.unwrap_or(if self.spec.contains(':') { "recorded" } else { "f32" })
    }
}

/// What comparing one output found.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Finding {
    pub(crate) output: String,
    #[serde(default)]
    pub(crate) tap: Option<String>,
    pub(crate) ok: bool,
    #[serde(default)]
    pub(crate) rule: Option<String>,
    #[serde(default)]
    pub(crate) runs: Option<u64>,
    #[serde(default)]
    pub(crate) output_type: Option<String>,
    #[serde(default)]
    pub(crate) n: u64,
    #[serde(default)]
    pub(crate) over: u64,
    #[serde(default)]
    pub(crate) not_finite: u64,
    #[serde(default, deserialize_with = "number")]
    pub(crate) rel_rms: f64,
    #[serde(default, deserialize_with = "number")]
    pub(crate) rel_rms_allowed: f64,
    #[serde(default)]
    pub(crate) at: Vec<u64>,
    #[serde(default, deserialize_with = "number")]
    pub(crate) want: f64,
    #[serde(default, deserialize_with = "number")]
    pub(crate) got: f64,
    #[serde(default, deserialize_with = "number")]
    pub(crate) max_abs: f64,
    #[serde(default, deserialize_with = "number")]
    pub(crate) allowed: f64,
    #[serde(default)]
    pub(crate) ulp_p99: u64,
    #[serde(default)]
    pub(crate) ulp_max: u64,
    #[serde(default, deserialize_with = "number")]
    pub(crate) budget_used: f64,
    #[serde(default)]
    pub(crate) pattern: Option<String>,
}

/// A prompt of a recording that an engine answered.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Verified {
    pub(crate) recording: String,
    #[serde(default)]
    pub(crate) prompt: Option<String>,
    #[serde(default)]
    pub(crate) engine: Option<String>,
    #[serde(default)]
    pub(crate) number: Option<String>,
    #[serde(default)]
    pub(crate) ok: Option<bool>,
    #[serde(default)]
    pub(crate) illegal_flip: Option<String>,
    #[serde(default)]
    pub(crate) findings: Vec<Finding>,
    #[serde(default, deserialize_with = "number")]
    pub(crate) seconds: f64,
}

impl Verified {
    /// Largest share of an allowance that any tap used.
    pub(crate) fn budget(&self) -> f64 {
        self.findings.iter().map(|f| f.budget_used).fold(0.0, worse)
    }
}

/// The larger; what is no number is larger than any.
pub(crate) fn worse(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) }
}

/// How fast an op was.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct OpSpeed {
    pub(crate) case: String,
    #[serde(default)]
    pub(crate) op: String,
    #[serde(default)]
    pub(crate) variant: String,
    #[serde(default, deserialize_with = "numbers")]
    pub(crate) samples_ns: Vec<f64>,
    #[serde(deserialize_with = "number")]
    pub(crate) median_ns: f64,
    /// The least that has to be moved and computed.
    #[serde(default)]
    pub(crate) bytes: f64,
    #[serde(default)]
    pub(crate) flops: f64,
    #[serde(default)]
    pub(crate) share_of_roof: Option<f64>,
    /// What sets the pace: memory or products.
    #[serde(default)]
    pub(crate) roof: Option<String>,
    #[serde(default)]
    pub(crate) cold: Option<bool>,
    /// What checking it came to.
    #[serde(default)]
    pub(crate) checked: Option<String>,
    #[serde(default)]
    pub(crate) why: Option<String>,
    #[serde(default, deserialize_with = "optional")]
    pub(crate) budget_used: Option<f64>,
    /// How it rounds.
    #[serde(default)]
    pub(crate) plan: String,
    /// Of a baseline: in how many launches the samples were taken.
    #[serde(default)]
    pub(crate) launches: Option<u64>,
    /// Who held the clock, where that is told.
    #[serde(default)]
    pub(crate) timed: Option<String>,
    #[serde(skip)]
    pub(crate) run: usize,
    /// Where it stands in its file.
    #[serde(skip)]
    pub(crate) line: u32,
}

/// The last row of what a command found.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(crate) struct Summary {
    /// Of how many rows.
    #[serde(default)]
    pub(crate) rows: Option<u64>,
}

/// The time of a case at some revision.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Past {
    pub(crate) case: String,
    pub(crate) rev: String,
    pub(crate) fingerprint: String,
    #[serde(deserialize_with = "number")]
    pub(crate) median_ns: f64,
    /// The hash of the results that it is from.
    #[serde(default)]
    pub(crate) results: Option<String>,
    #[serde(skip)]
    pub(crate) line: u32,
}

impl OpSpeed {
    /// The outcome's name, as far as it was told.
    pub(crate) fn outcome(&self) -> &str {
        self.checked.as_deref().unwrap_or_default()
    }

    /// Whether it was: what did not pass was not.
    pub(crate) fn timed(&self) -> bool {
        !self.samples_ns.is_empty()
            || self.checked.as_deref().is_none_or(|checked| checked == "passed")
    }
}

/// The middle of some samples, and what else is said of them.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(crate) struct Samples {
    pub(crate) median: f64,
}

/// Sequences of those who know of one alone.
fn one() -> u64 {
    1
}

/// How fast a model was at a depth.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct ModelSpeed {
    pub(crate) model: String,
    #[serde(default)]
    pub(crate) engine: String,
    #[serde(default)]
    pub(crate) kv_cache: Option<String>,
    #[serde(default = "one")]
    pub(crate) batch: u64,
    #[serde(default)]
    pub(crate) depth: u64,
    #[serde(default)]
    pub(crate) fed: bool,
    #[serde(default)]
    pub(crate) prefill: u64,
    #[serde(default)]
    pub(crate) decode: u64,
    #[serde(default)]
    pub(crate) prefill_tokens_per_second: Option<Samples>,
    #[serde(default)]
    pub(crate) decode_tokens_per_second: Option<Samples>,
    #[serde(default, deserialize_with = "numbers")]
    pub(crate) prefill_samples: Vec<f64>,
    #[serde(default, deserialize_with = "numbers")]
    pub(crate) decode_samples: Vec<f64>,
    /// Of the plain reference in the run without a command: one sample of each.
    #[serde(default)]
    pub(crate) prefill_tokens_per_s: Option<f64>,
    #[serde(default)]
    pub(crate) decode_tokens_per_s: Option<f64>,
    #[serde(default)]
    pub(crate) memory_needed: BTreeMap<String, u64>,
    #[serde(default)]
    pub(crate) peak_rss_bytes: Option<u64>,
    #[serde(skip)]
    pub(crate) run: usize,
}

impl ModelSpeed {
    /// The engine, what it keeps keys in, and how many sequences it has side by side, if several.
    pub(crate) fn asked(&self) -> String {
        asked(&self.engine, self.kv_cache.as_deref(), self.batch)
    }
}

fn asked(engine: &str, kept: Option<&str>, batch: u64) -> String {
    let kept = kept.map_or(String::new(), |kept| format!(", keys in {kept}"));
    let batch = if batch == 1 { String::new() } else { format!(", {batch} sequences") };
    format!("{engine}{kept}{batch}")
}

impl SpeedFit {
    /// Whose fit it is, as [`ModelSpeed::asked`] has it.
    pub(crate) fn asked(&self) -> String {
        asked(&self.engine, self.kv_cache.as_deref(), self.batch)
    }

    /// Seconds of a token with nothing before it, and of each that is: a step gives one of each sequence.
    pub(crate) fn token(&self) -> [f64; 2] {
        [self.seconds_at_none, self.seconds_per_token].map(|step| step / self.batch as f64)
    }
}

/// How a token's time grows with the context.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct SpeedFit {
    pub(crate) engine: String,
    #[serde(default)]
    pub(crate) kv_cache: Option<String>,
    #[serde(default = "one")]
    pub(crate) batch: u64,
    pub(crate) seconds_at_none: f64,
    pub(crate) seconds_per_token: f64,
    #[serde(default)]
    pub(crate) furthest: f64,
    #[serde(default)]
    pub(crate) furthest_depth: u64,
}

/// What `karat scale` found.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Scale {
    #[serde(default)]
    pub(crate) model: String,
    #[serde(default)]
    pub(crate) engine: String,
    #[serde(default)]
    pub(crate) number: Option<String>,
    #[serde(default)]
    pub(crate) points: Vec<Point>,
    #[serde(default)]
    pub(crate) fit: Option<ScaleFit>,
    #[serde(default)]
    pub(crate) cliffs: Option<Vec<Value>>,
    #[serde(default)]
    pub(crate) kv_cache: Option<String>,
    #[serde(default)]
    pub(crate) part: String,
    #[serde(skip)]
    pub(crate) run: usize,
}

/// At one context.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Point {
    pub(crate) context: f64,
    #[serde(deserialize_with = "number")]
    pub(crate) ms_per_token: f64,
    /// By round.
    #[serde(default)]
    pub(crate) samples_ns: Vec<Vec<f64>>,
    #[serde(default)]
    pub(crate) memory_bytes: Option<f64>,
    #[serde(default)]
    pub(crate) state_bytes: Option<f64>,
}

/// Seconds as a + b T + c T².
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct ScaleFit {
    pub(crate) a: f64,
    pub(crate) b: f64,
    #[serde(default)]
    pub(crate) c: f64,
    #[serde(default)]
    pub(crate) exponent: Option<f64>,
    #[serde(default)]
    pub(crate) residual: Option<f64>,
}

/// What the speed gate said of a case.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Gated {
    pub(crate) case: String,
    #[serde(default)]
    pub(crate) variant: String,
    pub(crate) verdict: String,
    #[serde(default)]
    pub(crate) ratio: Option<f64>,
    #[serde(default)]
    pub(crate) lo: Option<f64>,
    #[serde(default)]
    pub(crate) hi: Option<f64>,
    #[serde(default)]
    pub(crate) floor: Option<f64>,
    #[serde(default)]
    pub(crate) reason: Option<String>,
}

/// A planted fault.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Mutant {
    #[serde(rename = "mutant")]
    pub(crate) id: String,
    #[serde(default)]
    pub(crate) what: String,
    #[serde(default)]
    pub(crate) cite: String,
    pub(crate) killed: bool,
}

/// What `karat mutate` came to.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Mutation {
    pub(crate) planted: u64,
    pub(crate) killed: u64,
    #[serde(default)]
    pub(crate) survivors: Vec<String>,
    #[serde(default)]
    pub(crate) honest: u64,
    #[serde(default)]
    pub(crate) false_alarms: u64,
}

/// Spoiled answers of an op.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Sabotage {
    pub(crate) op: String,
    pub(crate) spoiled: u64,
    #[serde(default)]
    pub(crate) missed: Vec<String>,
}

/// What a part of a model did to the error.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Part {
    pub(crate) subject: String,
    #[serde(default)]
    #[serde(rename = "part")]
    pub(crate) name: Option<String>,
    #[serde(default)]
    pub(crate) op: Option<String>,
    #[serde(default, deserialize_with = "optional")]
    pub(crate) inherited: Option<f64>,
    #[serde(default, deserialize_with = "optional")]
    pub(crate) local: Option<f64>,
    #[serde(default, deserialize_with = "optional")]
    pub(crate) after: Option<f64>,
    #[serde(default)]
    pub(crate) ok: bool,
}

/// A cell of the support matrix.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Supported {
    pub(crate) op: String,
    pub(crate) variant: String,
    pub(crate) dtype: String,
    pub(crate) state: String,
    #[serde(default)]
    pub(crate) cases: u64,
    #[serde(default)]
    pub(crate) checked: u64,
    #[serde(default)]
    pub(crate) why: Option<String>,
}

/// A number, or what JSON lacks as text; null is none.
fn number<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    optional(from).map(|found| found.unwrap_or(f64::NAN))
}

fn optional<'de, D: Deserializer<'de>>(from: D) -> Result<Option<f64>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Found<'a> {
        Number(f64),
        Text(#[serde(borrow)] std::borrow::Cow<'a, str>),
        Nothing(()),
    }
    match Found::deserialize(from)? {
        Found::Number(x) => Ok(Some(x)),
        Found::Nothing(()) => Ok(None),
        Found::Text(text) => {
            let known = matches!(&*text, "inf" | "-inf" | "NaN");
            let found = text.parse().ok().filter(|_| known);
            found.map(Some).ok_or_else(|| {
                de::Error::custom(format!("{text:?}: expected a number, inf, -inf or NaN"))
            })
        }
    }
}

fn numbers<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<f64>, D::Error> {
    #[derive(Deserialize)]
    #[serde(transparent)]
    struct One(#[serde(deserialize_with = "number")] f64);
    let all = Vec::<One>::deserialize(from)?;
    Ok(all.into_iter().map(|One(x)| x).collect())
}
