//! Where an op's question and its answers meet. One line per op.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use golden::{
    Cost, Fill, Op, Plan, Rng, Set, Spec, Variant,
    compare::{self, Finding},
    ops,
    plan::Form as PlanForm,
    recording::{OpCase, Recorded, Recording},
    tensor::{Read, Source},
};

use crate::{
    answer::Answer,
    clock, foreign, guard, judge,
    report::{Outcome, Row},
    verify::Rule,
};

/// Every op, in the order in which the model runs them.
pub static OPS: &[&dyn Entry] = &[
    &Bench::<ops::embedding::Embedding>(optimized::cpu::embedding::VARIANTS),
    &Bench::<ops::rms_norm::RmsNorm>(optimized::cpu::rms_norm::VARIANTS),
    &Bench::<ops::linear::Linear>(optimized::cpu::linear::VARIANTS),
    &Bench::<ops::causal_conv1d::CausalConv1d>(optimized::cpu::causal_conv1d::VARIANTS),
    &Bench::<ops::l2_norm::L2Norm>(optimized::cpu::l2_norm::VARIANTS),
    &Bench::<ops::gdn_gates::GdnGates>(optimized::cpu::gdn_gates::VARIANTS),
    &Bench::<ops::gated_delta_rule::GatedDeltaRule>(optimized::cpu::gated_delta_rule::VARIANTS),
    &Bench::<ops::rms_norm_gated::RmsNormGated>(optimized::cpu::rms_norm_gated::VARIANTS),
    &Bench::<ops::rope::Rope>(optimized::cpu::rope::VARIANTS),
    &Bench::<ops::attention::Attention>(optimized::cpu::attention::VARIANTS),
    &Bench::<ops::moe_router::MoeRouter>(optimized::cpu::moe_router::VARIANTS),
    &Bench::<ops::moe_experts::MoeExperts>(optimized::cpu::moe_experts::VARIANTS),
    &Bench::<ops::shared_expert::SharedExpert>(optimized::cpu::shared_expert::VARIANTS),
    &Bench::<ops::lm_head::LmHead>(optimized::cpu::lm_head::VARIANTS),
    &Bench::<ops::sampling::Sampling>(optimized::cpu::sampling::VARIANTS),
    &Bench::<ops::mtp::Mtp>(optimized::cpu::mtp::VARIANTS),
    &Bench::<ops::fp8_dequant::Fp8Dequant>(optimized::cpu::fp8_dequant::VARIANTS),
    &Bench::<ops::gdn_layer::GdnLayer>(optimized::cpu::gdn_layer::VARIANTS),
    &Bench::<ops::attention_layer::AttentionLayer>(optimized::cpu::attention_layer::VARIANTS),
    &Bench::<ops::moe_layer::MoeLayer>(optimized::cpu::moe_layer::VARIANTS),
    &Bench::<ops::model::Model>(&[]),
];

/// The op of a name.
pub fn op(name: &str) -> Option<&'static dyn Entry> {
    OPS.iter().copied().find(|op| op.name() == name)
}

/// One op with its types put away.
pub trait Entry: Sync {
    /// [`Op::NAME`].
    fn name(&self) -> &'static str;
    /// Ways to compute it: `device/algorithm`.
    fn variants(&self) -> Vec<String>;
    /// Its fills.
    fn fills(&self) -> &'static [Fill];
    /// Letters of its cases, in order.
    fn letters(&self) -> &'static [&'static str];
    /// Specs of a set, as they print.
    fn specs(&self, set: Set) -> Vec<String>;
    /// What a spec's text says, or why it is none of this op.
    ///
    /// # Errors
    /// One line.
    fn parse(&self, spec: &str) -> Result<Parsed, String>;
    /// Runs one way to compute it on one spec and compares with the oracle.
    fn check(&self, spec: &str, variant: &str, plant: Option<Spoil>) -> Row;
    /// Runs a foreign kernel on one spec, in a process of its own, and compares with the oracle.
    fn check_foreign(&self, spec: &str, kernel: &foreign::Kernel, plant: Option<Spoil>) -> Row;
    /// In that process: runs an opened kernel, and leaves its answers in a file.
    ///
    /// # Errors
    /// If it gave none.
    fn answer(
        &self,
        spec: &str,
        kernel: &optimized::doors::Foreign,
        file: &Path,
    ) -> Result<serde_json::Value, golden::Error>;
    /// Runs one way to compute it on a recorded case and compares with the official answer.
    fn check_recorded(
        &self,
        recording: &Recording,
        case: &OpCase,
        variant: &str,
        plant: Option<Spoil>,
    ) -> Row;
}

/// What a spec's text says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parsed {
    /// Letter and size.
    pub sizes: Vec<(&'static str, usize)>,
    /// Storage dtype.
    pub dtype: &'static str,
    /// Fill.
    pub fill: String,
    /// Seed.
    pub seed: u64,
    /// The same spec as it prints: defaults left out.
    pub canonical: String,
    /// The least work.
    pub cost: Cost,
}

/// A way to spoil the checked answer, to show that the check sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spoil {
    /// One element, the last one, off by one percent of the largest.
    OneElement,
    /// The last element NaN.
    Nan,
    /// Every 64th row zero.
    ChunkBoundary,
    /// A panic in place of an answer.
    Crash,
}

impl Spoil {
    /// Every spoil by name.
    pub const ALL: &[(&str, Spoil)] = &[
        ("one-element", Spoil::OneElement),
        ("nan", Spoil::Nan),
        ("chunk-boundary", Spoil::ChunkBoundary),
        ("crash", Spoil::Crash),
    ];

    fn apply(self, mut x: ndarray::ArrayViewMutD<'_, f32>) {
        let largest = x.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
        let rows = x.shape().first().copied().unwrap_or(1).max(1);
        let row = (x.len() / rows).max(1);
        let last = x.len().saturating_sub(1);
        for (i, x) in x.iter_mut().enumerate() {
            match self {
                Spoil::OneElement if i == last => *x += 0.01 * largest + 1e-30,
                Spoil::Nan if i == last => *x = f32::NAN,
                Spoil::ChunkBoundary if (i / row).is_multiple_of(64) => *x = 0.0,
                _ => {}
            }
        }
    }
}

/// An op with its variants.
struct Bench<O: Op>(&'static [&'static dyn Variant<O>]);

/// The rule for two ways to write the same reference, both in f64: relative RMS 1e-12.
const FORM_RULE: compare::Bound = compare::Bound::Relative { rel_rms: 1e-12, worst_token: 1e-10 };

/// What is run: the reference in f32, in a form, or a variant.
enum Candidate<O: Op> {
    /// The reference in f32.
    Reference(PlanForm),
    /// Another form of the reference, both in f64.
    Wide(PlanForm),
    /// A variant.
    Variant(&'static dyn Variant<O>),
}

/// The inputs of a problem: every side that needs them draws the same.
pub(crate) fn drawn<O: Op>(spec: &Spec<O::Case>) -> O::Inputs<f32> {
    O::inputs(spec, &mut Rng::keyed(&format!("{}/{spec}", O::NAME), spec.seed))
}

impl<O: Answer> Bench<O> {
    fn inputs(spec: &Spec<O::Case>) -> O::Inputs<f32> {
        drawn::<O>(spec)
    }

    fn candidate(&self, name: &str) -> Result<Candidate<O>, String> {
        let chunk = |text: &str| {
            let size = text.strip_prefix("chunk")?.parse().ok()?;
            O::CHUNKS.contains(&size).then_some(PlanForm::Chunked(size))
        };
        let found = match name.strip_prefix("reference/") {
            Some("f32") => Some(Candidate::Reference(PlanForm::Plain)),
            Some(form) => match form.strip_prefix("f64-") {
                Some(form) => chunk(form).map(Candidate::Wide),
                None => chunk(form).map(Candidate::Reference),
            },
            None => {
                let variant = self.0.iter().find(|variant| variant.name() == name);
                variant.map(|variant| Candidate::Variant(*variant))
            }
        };
        found.ok_or_else(|| format!("no variant {name}"))
    }

    fn outcome(
        &self,
        spec: &Spec<O::Case>,
        variant: &str,
        plant: Option<Spoil>,
    ) -> Result<Outcome, String> {
        let candidate = self.candidate(variant)?;
        let inputs = Self::inputs(spec);
        let (plan, mut got) = match candidate {
            Candidate::Wide(form) => {
                let wide = O::wide::<f64>(&inputs);
                let (want, got) = (O::plain(&wide), O::answer(&wide, form, None));
                return Ok(Outcome::of(compare::outputs(&want, &got, FORM_RULE, O::TOLD)));
            }
            Candidate::Reference(form) => {
                (Plan::F32.form(form), O::answer::<f32>(&inputs, form, None))
            }
            Candidate::Variant(variant) => {
                if let Some(why) = variant.skip(&crate::host(), spec) {
                    return Ok(Outcome::Skipped(why));
                }
                match guard::run(variant, spec, &inputs)? {
                    Ok(got) => (variant.plan(spec), got),
                    Err(outcome) => return Ok(outcome),
                }
            }
        };
        spoil(&mut got, plant);
        let case = judge::Case::<O> { spec, inputs: &inputs, plan: &plan };
        Ok(Outcome::of(case.judge(&got)))
    }

    fn recorded_findings(
        &self,
        recording: &Recording,
        case: &OpCase,
        variant: &str,
        plant: Option<Spoil>,
    ) -> Result<Vec<Finding>, String> {
        let inputs: O::Inputs<f32> = Read::read(&RecordedCase { recording, case })?;
        let mut got = match self.candidate(variant)? {
            Candidate::Reference(form) => O::answer::<f32>(&inputs, form, None),
            _ => return Err(format!("{variant} is no form of the reference")),
        };
        spoil(&mut got, plant);
        let prefix = format!("{}/{}", O::NAME, case.case);
        let mut findings = Vec::new();
        for (name, got) in golden::Tensors::tensors(&got) {
            let want = match recording.get(&format!("{prefix}/out.{name}")) {
                Some(Recorded::F32(x)) => x.map(|&x| f64::from(x)),
                Some(Recorded::I64(x)) => x.map(|&x| x as f64),
                // What the official function does not return cannot be compared.
                _ => continue,
            };
            let bound = Rule::F32.bound(recording.noise(&format!("{prefix}/{name}")));
            let exact = matches!(got, golden::View::I64(_));
            let bound = if exact { compare::Bound::Exact } else { bound };
            findings.push(compare::views(name, &golden::View::F64(want.view()), &got, bound));
        }
        if findings.is_empty() {
            Err("no output of this op was recorded".to_owned())
        } else {
            Ok(findings)
        }
    }
}

/// A recorded case as a source of inputs.
struct RecordedCase<'a> {
    recording: &'a Recording,
    case: &'a OpCase,
}

impl Source for RecordedCase<'_> {
    fn tensor(&self, name: &str) -> Option<Recorded> {
        self.recording.get(&format!("{}/{}/in.{name}", self.case.op, self.case.case))
    }

    fn scalar(&self, name: &str) -> Option<f64> {
        self.case.scalars.get(name).copied()
    }
}

/// Spoils every output that holds numbers.
pub(crate) fn spoil(got: &mut impl golden::Tensors, plant: Option<Spoil>) {
    let Some(spoil) = plant else { return };
    assert!(spoil != Spoil::Crash, "planted");
    for (_, view) in got.tensors_mut() {
        if let golden::ViewMut::F32(x) = view {
            spoil.apply(x);
        }
    }
}

impl<O: Answer> Entry for Bench<O> {
    fn name(&self) -> &'static str {
        O::NAME
    }

    fn variants(&self) -> Vec<String> {
        let forms = O::CHUNKS
            .iter()
            .flat_map(|n| [format!("reference/chunk{n}"), format!("reference/f64-chunk{n}")]);
        let fast = self.0.iter().map(|variant| variant.name().to_owned());
        std::iter::once("reference/f32".to_owned()).chain(forms).chain(fast).collect()
    }

    fn fills(&self) -> &'static [Fill] {
        O::fills()
    }

    fn letters(&self) -> &'static [&'static str] {
        <O::Case as golden::Case>::LETTERS
    }

    fn specs(&self, set: Set) -> Vec<String> {
        O::specs(set).iter().map(ToString::to_string).collect()
    }

    fn parse(&self, text: &str) -> Result<Parsed, String> {
        let spec: Spec<O::Case> = text.parse()?;
        O::check(&spec)?;
        let sizes = self.letters().iter().copied().zip(golden::Case::sizes(&spec.case)).collect();
        Ok(Parsed {
            sizes,
            dtype: spec.dtype.name(),
            fill: spec.fill.clone(),
            seed: spec.seed,
            canonical: spec.to_string(),
            cost: O::cost(&spec),
        })
    }

    fn check_recorded(
        &self,
        recording: &Recording,
        case: &OpCase,
        variant: &str,
        plant: Option<Spoil>,
    ) -> Row {
        let (outcome, took) = clock::time(|| {
            let run = || self.recorded_findings(recording, case, variant, plant);
            match catch_unwind(AssertUnwindSafe(run)) {
                Ok(Ok(findings)) => Outcome::of(findings),
                Ok(Err(why)) => Outcome::Error(why),
                Err(panic) => Outcome::Crashed(message(&*panic)),
            }
        });
        Row::new(O::NAME, &format!("{}:{}", recording.id(), case.case), variant, outcome, took)
    }

    fn check_foreign(&self, text: &str, kernel: &foreign::Kernel, plant: Option<Spoil>) -> Row {
        let (outcome, took) = clock::time(|| {
            caught(|| {
                let spec: Spec<O::Case> = text.parse()?;
                O::check(&spec)?;
                foreign::outcome::<O>(&spec, kernel, plant)
            })
        });
        Row::new(O::NAME, text, &kernel.variant(), outcome, took)
    }

    fn answer(
        &self,
        text: &str,
        kernel: &optimized::doors::Foreign,
        file: &Path,
    ) -> Result<serde_json::Value, golden::Error> {
        let spec: Spec<O::Case> = text.parse()?;
        O::check(&spec)?;
        foreign::child::answer::<O>(&spec, kernel, file)
    }

    fn check(&self, text: &str, variant: &str, plant: Option<Spoil>) -> Row {
        let (outcome, took) = clock::time(|| {
            caught(|| {
                let spec: Spec<O::Case> = text.parse()?;
                O::check(&spec)?;
                self.outcome(&spec, variant, plant)
            })
        });
        Row::new(O::NAME, text, variant, outcome, took)
    }
}

/// A panic in one job ends that job, not the run.
fn caught(run: impl FnOnce() -> Result<Outcome, String>) -> Outcome {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(why)) => Outcome::Error(why),
        Err(panic) => Outcome::Crashed(message(&*panic)),
    }
}

fn message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("panicked").to_owned()
}
