//! Where an op's question and its answers meet. One line per op.

use std::panic::{AssertUnwindSafe, catch_unwind};

use golden::{
    Cost, Fill, Number, Op, Rng, Set, Spec,
    compare::{self, F32_RULE, Finding},
    ops,
    recording::{OpCase, Recorded, Recording},
    tensor::{Read, Source},
};
use reference as r;

use crate::{
    clock,
    report::{Outcome, Row},
    verify::Rule,
};

/// Every op, in the order in which the model runs them.
pub static OPS: &[&dyn Entry] = &[
    &Bench::<ops::embedding::Embedding> { f32: r::embedding, f64: r::embedding, forms: &[] },
    &Bench::<ops::rms_norm::RmsNorm> { f32: r::rms_norm, f64: r::rms_norm, forms: &[] },
    &Bench::<ops::linear::Linear> { f32: r::linear, f64: r::linear, forms: &[] },
    &Bench::<ops::causal_conv1d::CausalConv1d> {
        f32: r::causal_conv1d,
        f64: r::causal_conv1d,
        forms: &[],
    },
    &Bench::<ops::l2_norm::L2Norm> { f32: r::l2_norm, f64: r::l2_norm, forms: &[] },
    &Bench::<ops::gdn_gates::GdnGates> { f32: r::gdn_gates, f64: r::gdn_gates, forms: &[] },
    &Bench::<ops::gated_delta_rule::GatedDeltaRule> {
        f32: r::gated_delta_rule,
        f64: r::gated_delta_rule,
        forms: &[
            Form {
                name: "chunk64",
                f32: |x| r::gated_delta_rule_chunked(x, 64),
                f64: |x| r::gated_delta_rule_chunked(x, 64),
            },
            Form {
                name: "chunk7",
                f32: |x| r::gated_delta_rule_chunked(x, 7),
                f64: |x| r::gated_delta_rule_chunked(x, 7),
            },
        ],
    },
    &Bench::<ops::rms_norm_gated::RmsNormGated> {
        f32: r::rms_norm_gated,
        f64: r::rms_norm_gated,
        forms: &[],
    },
    &Bench::<ops::rope::Rope> { f32: r::rope, f64: r::rope, forms: &[] },
    &Bench::<ops::attention::Attention> { f32: r::attention, f64: r::attention, forms: &[] },
    &Bench::<ops::moe_router::MoeRouter> { f32: r::moe_router, f64: r::moe_router, forms: &[] },
    &Bench::<ops::moe_experts::MoeExperts> { f32: r::moe_experts, f64: r::moe_experts, forms: &[] },
    &Bench::<ops::shared_expert::SharedExpert> {
        f32: r::shared_expert,
        f64: r::shared_expert,
        forms: &[],
    },
    &Bench::<ops::lm_head::LmHead> { f32: r::lm_head, f64: r::lm_head, forms: &[] },
    &Bench::<ops::sampling::Sampling> { f32: r::sampling, f64: r::sampling, forms: &[] },
    &Bench::<ops::mtp::Mtp> { f32: r::mtp, f64: r::mtp, forms: &[] },
    &Bench::<ops::fp8_dequant::Fp8Dequant> { f32: r::fp8_dequant, f64: r::fp8_dequant, forms: &[] },
    &Bench::<ops::gdn_layer::GdnLayer> { f32: r::gdn_layer, f64: r::gdn_layer, forms: &[] },
    &Bench::<ops::attention_layer::AttentionLayer> {
        f32: r::attention_layer,
        f64: r::attention_layer,
        forms: &[],
    },
    &Bench::<ops::moe_layer::MoeLayer> { f32: r::moe_layer, f64: r::moe_layer, forms: &[] },
    &Bench::<ops::model::Model> { f32: r::model_op, f64: r::model_op, forms: &[] },
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

/// Another way to write the same reference.
struct Form<O: Op> {
    name: &'static str,
    f32: fn(&O::Inputs<f32>) -> O::Outputs<f32>,
    f64: fn(&O::Inputs<f64>) -> O::Outputs<f64>,
}

struct Bench<O: Op> {
    f32: fn(&O::Inputs<f32>) -> O::Outputs<f32>,
    f64: fn(&O::Inputs<f64>) -> O::Outputs<f64>,
    forms: &'static [Form<O>],
}

/// The rule for two ways to write the same reference, both in f64: relative RMS 1e-12.
const FORM_RULE: compare::Bound = compare::Bound::Relative { rel_rms: 1e-12, worst_token: 1e-10 };

impl<O: Op> Bench<O> {
    fn inputs(spec: &Spec<O::Case>) -> O::Inputs<f32> {
        O::inputs(spec, &mut Rng::keyed(&format!("{}/{spec}", O::NAME), spec.seed))
    }

    fn findings(
        &self,
        spec: &Spec<O::Case>,
        variant: &str,
        plant: Option<Spoil>,
    ) -> Result<Vec<Finding>, String> {
        let inputs = Self::inputs(spec);
        let wide = lift::<O, f64>(&inputs);
        let want = (self.f64)(&wide);
        let form = |name: &str| self.forms.iter().find(|form| form.name == name);
        if let Some(form) = variant.strip_prefix("reference/f64-").and_then(form) {
            return Ok(compare::outputs(&want, &(form.f64)(&wide), FORM_RULE, O::TOLD));
        }
        let got = self.run_f32(&inputs, variant, plant)?;
        Ok(compare::outputs(&want, &got, F32_RULE, O::TOLD))
    }

    fn run_f32(
        &self,
        inputs: &O::Inputs<f32>,
        variant: &str,
        plant: Option<Spoil>,
    ) -> Result<O::Outputs<f32>, String> {
        let form = |name: &str| self.forms.iter().find(|form| form.name == name);
        let mut got = match variant.strip_prefix("reference/") {
            Some("f32") => (self.f32)(inputs),
            Some(name) => (form(name).ok_or_else(|| format!("no variant {variant}"))?.f32)(inputs),
            None => return Err(format!("no variant {variant}")),
        };
        if let Some(spoil) = plant {
            assert!(spoil != Spoil::Crash, "planted");
            for (_, view) in golden::Tensors::tensors_mut(&mut got) {
                if let golden::ViewMut::F32(x) = view {
                    spoil.apply(x);
                }
            }
        }
        Ok(got)
    }

    fn recorded_findings(
        &self,
        recording: &Recording,
        case: &OpCase,
        variant: &str,
        plant: Option<Spoil>,
    ) -> Result<Vec<Finding>, String> {
        let inputs: O::Inputs<f32> = Read::read(&RecordedCase { recording, case })?;
        let got = self.run_f32(&inputs, variant, plant)?;
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

fn lift<O: Op, R: Number>(inputs: &O::Inputs<f32>) -> O::Inputs<R> {
    O::lift(inputs)
}

impl<O: Op> Entry for Bench<O> {
    fn name(&self) -> &'static str {
        O::NAME
    }

    fn variants(&self) -> Vec<String> {
        let forms = self.forms.iter().flat_map(|form| {
            [format!("reference/{}", form.name), format!("reference/f64-{}", form.name)]
        });
        std::iter::once("reference/f32".to_owned()).chain(forms).collect()
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

    fn check(&self, text: &str, variant: &str, plant: Option<Spoil>) -> Row {
        let (outcome, took) = clock::time(|| {
            let run = || -> Result<Vec<Finding>, String> {
                let spec: Spec<O::Case> = text.parse()?;
                O::check(&spec)?;
                self.findings(&spec, variant, plant)
            };
            // A panic in one job ends that job, not the run.
            match catch_unwind(AssertUnwindSafe(run)) {
                Ok(Ok(findings)) => Outcome::of(findings),
                Ok(Err(why)) => Outcome::Error(why),
                Err(panic) => Outcome::Crashed(message(&*panic)),
            }
        });
        Row::new(O::NAME, text, variant, outcome, took)
    }
}

fn message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("panicked").to_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::OPS;

    #[test]
    fn every_spec_of_every_set_reads_back() {
        for op in OPS {
            for spec in op.specs(golden::Set::Nightly) {
                assert_eq!(
                    op.parse(&spec).map(|parsed| parsed.canonical),
                    Ok(spec),
                    "{}",
                    op.name()
                );
            }
        }
    }

    proptest! {
        #[test]
        fn no_spec_panics(text in ".{0,60}", sizes in proptest::collection::vec(
                              prop_oneof![0_u64..300, Just(1 << 24), any::<u64>()], 16),
                          fill in 0_usize..12, dtype in "f32|f16|bf16|fp8|i64|u8|f64|x", seed in any::<u64>()) {
            for op in OPS {
                let _ = op.parse(&text);
                let sized: Vec<_> =
                    op.letters().iter().zip(&sizes).map(|(letter, size)| format!("{letter}{size}")).collect();
                let case = sized.join("-");
                let fill = op.fills().get(fill).map_or("domain", |fill| fill.name);
                for spec in [case.clone(), format!("{case};{text}"), format!("{case}-{text}"), format!("{text}{case}"),
                             format!("{case};dtype={dtype};fill={fill};seed={seed}")] {
                    if let Ok(parsed) = op.parse(&spec) {
                        let again = op.parse(&parsed.canonical);
                        prop_assert_eq!(again, Ok(parsed), "{}/{}", op.name(), spec);
                    }
                }
            }
        }
    }
}
