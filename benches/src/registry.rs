//! Where an op's question and its answers meet. One line per op.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    time::Duration,
};

use golden::{
    Cost, Dtype, Fill, Op, Plan, Plant, Rng, Set, Spec, Tensors, Variant, View, compare, ops,
    plan::Form as PlanForm,
    recording::{OpCase, Recording},
};
use optimized::{cpu, cuda, doors::Known};

use crate::{
    answer::Answer,
    bisect, clock,
    evidence::Evidence,
    felt::{self, Felt},
    foreign, guard,
    invariance::{self, Change},
    judge::{self, Derivation},
    paths::{self, Path},
    report::{Outcome, Row},
    sabotage::{self, Spoiled},
    same,
    turns::Times,
    way::{self, Way, Who},
};

mod recorded;
mod timed;

pub(crate) use timed::{draws_of, factors};

pub use crate::{
    drawn::{Drawn, Stored},
    sabotage::Spoil,
};

/// Every op, in the order in which the model runs them.
///
/// A function, as the tables of variants are: of a static, whatever it holds is compiled again in
/// every test binary of its crate.
#[inline(never)]
pub fn ops() -> &'static [&'static dyn Entry] {
    OPS
}

/// An op, and where there are variants of it.
macro_rules! bench {
    ($op:ty, $module:ident on $($device:ident),+) => {
        &Bench::<$op>(&[$($device::$module::variants),+])
    };
}

const OPS: &[&dyn Entry] = &[
    bench!(ops::embedding::Embedding, embedding on cpu, cuda),
    bench!(ops::rms_norm::RmsNorm, rms_norm on cpu, cuda),
    bench!(ops::linear::Linear, linear on cpu, cuda),
    bench!(ops::causal_conv1d::CausalConv1d, causal_conv1d on cpu, cuda),
    bench!(ops::l2_norm::L2Norm, l2_norm on cpu, cuda),
    bench!(ops::gdn_gates::GdnGates, gdn_gates on cpu, cuda),
    bench!(ops::gated_delta_rule::GatedDeltaRule, gated_delta_rule on cpu, cuda),
    bench!(ops::rms_norm_gated::RmsNormGated, rms_norm_gated on cpu, cuda),
    bench!(ops::rope::Rope, rope on cpu, cuda),
    bench!(ops::attention::Attention, attention on cpu, cuda),
    bench!(ops::moe_router::MoeRouter, moe_router on cpu, cuda),
    bench!(ops::moe_experts::MoeExperts, moe_experts on cpu, cuda),
    bench!(ops::shared_expert::SharedExpert, shared_expert on cpu, cuda),
    bench!(ops::lm_head::LmHead, lm_head on cpu, cuda),
    bench!(ops::sampling::Sampling, sampling on cpu, cuda),
    bench!(ops::mtp::Mtp, mtp on cpu),
    bench!(ops::fp8_dequant::Fp8Dequant, fp8_dequant on cpu, cuda),
    bench!(ops::gdn_layer::GdnLayer, gdn_layer on cpu),
    bench!(ops::attention_layer::AttentionLayer, attention_layer on cpu),
    bench!(ops::moe_layer::MoeLayer, moe_layer on cpu),
    &Bench::<ops::model::Model>(&[]),
];

/// The op of a name.
pub fn op(name: &str) -> Option<&'static dyn Entry> {
    OPS.iter().copied().find(|op| op.name() == name)
}

/// One op with its types put away.
pub trait Entry: Times {
    /// [`Op::NAME`].
    fn name(&self) -> &'static str;
    /// Ways to compute it: `device/algorithm`.
    fn variants(&self) -> Vec<String>;
    /// Its fills.
    fn fills(&self) -> &'static [Fill];
    /// Letters of its cases, in order.
    fn letters(&self) -> &'static [&'static str];
    /// Everything of it that has a name.
    fn known(&self) -> Known;
    /// The inputs of a problem, in storage types.
    ///
    /// # Errors
    /// If the spec is none of this op.
    fn draw(&self, spec: &str) -> Result<Drawn, String>;
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
    /// In that process: runs an opened kernel, on the inputs in a file or on those of the spec, and
    /// leaves its answers in a file.
    ///
    /// # Errors
    /// If it gave none.
    fn answer(
        &self,
        spec: &str,
        kernel: &optimized::doors::Foreign,
        inputs: Option<&std::path::Path>,
        file: &std::path::Path,
    ) -> Result<serde_json::Value, golden::Error>;
    /// The same, keeping what it was fed, what it answered and what was allowed, where it does not
    /// pass.
    fn check_keeping(
        &self,
        spec: &str,
        variant: &str,
        plant: Option<Spoil>,
        keep: &mut Evidence,
    ) -> Row;
    /// Faults that can be planted in a variant.
    fn plants(&self, variant: &str) -> &'static [Plant];
    /// [`check`](Self::check) of a variant with a fault planted.
    fn check_planted(&self, spec: &str, variant: &str, plant: &str) -> Row;
    /// [`check`](Self::check) of a variant that is held to another plan than its own.
    fn check_as(&self, spec: &str, variant: &str, plan: &Plan) -> Row;
    /// The outcome where this variant does not compute it or this machine cannot: known before anything
    /// runs.
    fn not_run(&self, spec: &str, variant: &str) -> Option<Outcome>;
    /// How a variant rounds.
    ///
    /// # Errors
    /// If there is no such variant or spec.
    fn plan_of(&self, spec: &str, variant: &str) -> Result<Plan, String>;
    /// Spoiled copies of the right answer under the bound of a plan: see [`sabotage`].
    ///
    /// # Errors
    /// If the spec is none of this op.
    fn sabotage(&self, spec: &str, plan: &Plan) -> Result<Vec<Spoiled>, String>;
    /// Which inputs are felt in which outputs, under the bound of a plan: see [`felt`].
    ///
    /// # Errors
    /// If the spec is none of this op.
    fn felt(&self, spec: &str, plan: &Plan) -> Result<Vec<Felt>, String>;
    /// What the bound of a variant is made of, term by term of its plan.
    ///
    /// # Errors
    /// If there is no such variant or spec, or it is held to another rule: which.
    fn derivation(&self, spec: &str, variant: &str) -> Result<Derivation, String>;
    /// Runs one way to compute it on a recorded case and compares with the official answer; keeps
    /// what it was fed, what it answered and what was recorded.
    fn check_recorded(
        &self,
        recording: &Recording,
        case: &OpCase,
        variant: &str,
        plant: Option<Spoil>,
        keep: &mut Evidence,
    ) -> Row;
    /// Feeds one problem to whoever computes it along these paths.
    fn paths(&self, spec: &str, who: &Who, paths: &[Path]) -> Vec<same::Row>;
    /// Asks whoever computes a problem again, with these changes; `budget` is what the runs may take.
    fn invariance(
        &self,
        spec: &str,
        who: &Who,
        changes: &[Change],
        budget: Duration,
    ) -> Vec<same::Row>;
    /// Which output of a way to compute it is wrong, with a fault of the variant planted or not, and of a
    /// composite op which op inside.
    ///
    /// # Errors
    /// If there is no such variant, spec or fault, or it cannot run.
    fn bisect(
        &self,
        spec: &str,
        variant: &str,
        plant: Option<&str>,
    ) -> Result<bisect::Report, String>;
    /// Whether its tokens form sequences that can be cut and packed.
    fn has_sequences(&self) -> bool;
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

/// An op with its variants, by device. Behind functions: a table of them here would have all their kernels
/// compiled once more in this crate.
pub(crate) struct Bench<O: Op>(pub(crate) &'static [Table<O>]);

/// The variants of an op on a device.
type Table<O> = fn() -> &'static [&'static dyn Variant<O>];

/// The rule for two ways to write the same reference, both in f64: relative RMS 1e-12.
const FORM_RULE: compare::Bound = compare::Bound::Relative { rel_rms: 1e-12, worst_token: 1e-10 };

/// What is run: the reference in f32, in a form, or a variant.
enum Candidate<'a, O: Op> {
    /// The reference in f32.
    Reference(PlanForm),
    /// Another form of the reference, both in f64.
    Wide(PlanForm),
    /// A variant.
    Variant(&'a dyn Variant<O>),
}

/// The inputs of a problem: every side that needs them draws the same.
pub(crate) fn drawn<O: Op>(spec: &Spec<O::Case>) -> O::Inputs<f32> {
    O::inputs(spec, &mut Rng::keyed(&format!("{}/{spec}", O::NAME), spec.seed))
}

impl<O: Answer> Bench<O> {
    fn inputs(spec: &Spec<O::Case>) -> O::Inputs<f32> {
        drawn::<O>(spec)
    }

    fn fast(&self) -> impl Iterator<Item = &'static dyn Variant<O>> {
        self.0.iter().flat_map(|variants| variants()).copied()
    }

    fn candidate(&self, name: &str) -> Result<Candidate<'_, O>, String> {
        let chunk = |text: &str| {
            let forms = [("chunk", PlanForm::Chunked as fn(usize) -> PlanForm)];
            // Not listed: what it is held against in `plans.rs` is another plan than its own.
            let mut forms = forms.into_iter().chain([("prefix", PlanForm::Prefixed as _)]);
            let (size, form) = forms
                .find_map(|(name, form)| Some((text.strip_prefix(name)?.parse().ok()?, form)))?;
            O::CHUNKS.contains(&size).then(|| form(size))
        };
        let found = match name.strip_prefix("reference/") {
            Some("f32") => Some(Candidate::Reference(PlanForm::Plain)),
            Some(form) => match form.strip_prefix("f64-") {
                Some(form) => chunk(form).map(Candidate::Wide),
                None => chunk(form).map(Candidate::Reference),
            },
            None => self.fast().find(|variant| variant.name() == name).map(Candidate::Variant),
        };
        found.ok_or_else(|| format!("no variant {name}"))
    }

    /// What `run` makes of a problem and the way of that name; or how it came to nothing.
    fn ways<T>(
        &self,
        text: &str,
        who: &Who,
        run: impl Fn(&Way<O>, &Spec<O::Case>) -> T,
    ) -> Result<T, Outcome> {
        let run = || -> Result<T, String> {
            let spec: Spec<O::Case> = text.parse()?;
            O::check(&spec)?;
            Ok(run(&self.way(who)?, &spec))
        };
        // A panic in one job ends that job, not the run.
        match catch_unwind(AssertUnwindSafe(run)) {
            Ok(Ok(result)) => Ok(result),
            Ok(Err(why)) => Err(Outcome::Error(why)),
            Err(panic) => Err(Outcome::Crashed(message(&*panic))),
        }
    }

    /// How somebody computes it.
    fn way(&self, who: &Who) -> Result<Way<O>, String> {
        let (name, plant) = match who {
            Who::Named { variant, plant } => (variant.as_str(), plant.as_deref()),
            Who::Foreign(kernel) => {
                return Ok(Way::Made(Box::new(foreign::Remote::new(kernel.clone()))));
            }
        };
        let variant = self.fast().find(|variant| variant.name() == name);
        match (variant, plant) {
            (Some(variant), None) => Ok(Way::Variant(variant)),
            (Some(variant), Some(plant)) => {
                let planted = variant.planted(plant).map(Way::Made);
                planted.ok_or_else(|| format!("{name}: no fault {plant:?}"))
            }
            (None, None) => match self.candidate(name)? {
                Candidate::Reference(form) => Ok(Way::Reference(form)),
                _ => Err(format!("{name} is compared in f64")),
            },
            (None, Some(_)) => Err(format!("{name}: nothing can be planted in the reference")),
        }
    }

    /// What a candidate comes to, under its own plan or another, spoiled or not; keeps its inputs
    /// from before it runs, and the rest where it fails.
    fn outcome(
        spec: &Spec<O::Case>,
        candidate: &Candidate<'_, O>,
        held_to: Option<&Plan>,
        plant: Option<Spoil>,
        mut keep: Option<&mut Evidence>,
    ) -> Outcome {
        let inputs = Self::inputs(spec);
        if let Some(keep) = &mut keep {
            keep.add("in", &inputs);
        }
        let (plan, mut got) = match *candidate {
            Candidate::Wide(form) => {
                let wide = O::wide::<f64>(&inputs);
                let (want, got) = (O::plain(&wide), O::answer(&wide, form, None));
                if let Some(keep) = keep {
                    keep.add("want", &want);
                    keep.add("got", &got);
                }
                return Outcome::of(compare::outputs(&want, &got, FORM_RULE, O::TOLD));
            }
            Candidate::Reference(form) => {
                (Plan::F32.form(form), O::answer::<f32>(&inputs, form, None))
            }
            Candidate::Variant(variant) => {
                if let Some(outcome) = way::not_run(variant, spec) {
                    return outcome;
                }
                match guard::run(variant, spec, &inputs) {
                    Ok(got) => (variant.plan(spec), got),
                    Err(outcome) => return outcome,
                }
            }
        };
        sabotage::all(&mut got, plant);
        let plan = held_to.unwrap_or(&plan);
        let case = judge::Case::<O> { spec, inputs: &inputs, plan };
        let (findings, bound) = case.judged(&got);
        if let Some(keep) = keep
            && !findings.iter().all(|finding| finding.ok)
        {
            keep.add("got", &got);
            if let Some(bound) = bound {
                keep.bound(&bound);
            }
        }
        Outcome::of(findings)
    }

    /// Runs something on a parsed spec. A panic in one job ends that job, not the run.
    fn row(
        text: &str,
        variant: &str,
        run: impl FnOnce(&Spec<O::Case>) -> Result<Outcome, String>,
    ) -> Row {
        let (outcome, took) = clock::time(|| {
            let run = || -> Result<Outcome, String> { run(&Self::spec(text)?) };
            match catch_unwind(AssertUnwindSafe(run)) {
                Ok(Ok(outcome)) => outcome,
                Ok(Err(why)) => Outcome::Error(why),
                Err(panic) => Outcome::Crashed(message(&*panic)),
            }
        });
        Row::new(O::NAME, text, variant, outcome, took)
    }

    fn spec(text: &str) -> Result<Spec<O::Case>, String> {
        let spec: Spec<O::Case> = text.parse()?;
        O::check(&spec)?;
        Ok(spec)
    }

    fn own_plan(&self, spec: &Spec<O::Case>, variant: &str) -> Result<Plan, String> {
        Ok(match self.candidate(variant)? {
            Candidate::Reference(form) | Candidate::Wide(form) => Plan::F32.form(form),
            Candidate::Variant(variant) => variant.plan(spec),
        })
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
        let fast = self.fast().map(|variant| variant.name().to_owned());
        std::iter::once("reference/f32".to_owned()).chain(forms).chain(fast).collect()
    }

    fn fills(&self) -> &'static [Fill] {
        O::fills()
    }

    fn letters(&self) -> &'static [&'static str] {
        <O::Case as golden::Case>::LETTERS
    }

    fn known(&self) -> Known {
        Known {
            letters: self.letters(),
            inputs: <O::Inputs<f32> as Tensors>::names(),
            outputs: <O::Outputs<f32> as Tensors>::names(),
        }
    }

    fn draw(&self, text: &str) -> Result<Drawn, String> {
        let spec = Self::spec(text)?;
        let inputs = Self::inputs(&spec);
        let stored = |(name, view): &(&'static str, View<'_>)| {
            let dtype = if O::WIDE.contains(name) { Dtype::F32 } else { spec.dtype };
            Stored::new(name, view, dtype)
        };
        Ok(Drawn {
            tensors: inputs.tensors().iter().map(stored).collect(),
            scalars: inputs.scalars(),
        })
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
        keep: &mut Evidence,
    ) -> Row {
        let (outcome, took) = clock::time(|| {
            let run = || self.recorded_findings(recording, case, variant, plant, keep);
            match catch_unwind(AssertUnwindSafe(run)) {
                Ok(Ok(findings)) => Outcome::of(findings),
                Ok(Err(why)) => Outcome::Error(why),
                Err(panic) => Outcome::Crashed(message(&*panic)),
            }
        });
        Row::new(O::NAME, &format!("{}:{}", recording.id(), case.case), variant, outcome, took)
    }

    fn check_foreign(&self, text: &str, kernel: &foreign::Kernel, plant: Option<Spoil>) -> Row {
        Self::row(text, &kernel.variant(), |spec| foreign::outcome::<O>(spec, kernel, plant))
    }

    fn answer(
        &self,
        text: &str,
        kernel: &optimized::doors::Foreign,
        inputs: Option<&std::path::Path>,
        file: &std::path::Path,
    ) -> Result<serde_json::Value, golden::Error> {
        foreign::child::answer::<O>(&Self::spec(text)?, kernel, inputs, file)
    }

    fn paths(&self, text: &str, who: &Who, paths: &[Path]) -> Vec<same::Row> {
        let name = &who.to_string();
        let all = |outcome: Outcome| {
            let row = |path| paths::ops::row::<O>(text, name, path, outcome.clone());
            paths.iter().map(row).collect()
        };
        let Some(fed) = O::PATHS else {
            return all(Outcome::Unsupported("this op has no sequences".to_owned()));
        };
        let run =
            |way: &Way<O>, spec: &Spec<O::Case>| fed(way, name, spec, Self::inputs(spec), paths);
        self.ways(text, who, run).unwrap_or_else(all)
    }

    fn invariance(
        &self,
        text: &str,
        who: &Who,
        changes: &[Change],
        budget: Duration,
    ) -> Vec<same::Row> {
        let name = &who.to_string();
        let run = |way: &Way<O>, spec: &Spec<O::Case>| {
            invariance::ops::run(way, name, spec, &Self::inputs, changes, budget)
        };
        self.ways(text, who, run).unwrap_or_else(|outcome| {
            let row = |&change| invariance::ops::row::<O>(text, name, change, outcome.clone());
            changes.iter().map(row).collect()
        })
    }

    fn bisect(
        &self,
        text: &str,
        variant: &str,
        plant: Option<&str>,
    ) -> Result<bisect::Report, String> {
        let spec = Self::spec(text)?;
        let way = self.way(&Who::named(variant, plant))?;
        if let Some(why) = way.not_run(&spec).as_ref().and_then(Outcome::why) {
            return Err(why.to_owned());
        }
        let inputs = Self::inputs(&spec);
        let plan = way.plan(&spec);
        let run = || -> Result<bisect::Report, golden::Error> {
            let (got, inside) = if let Some(variant) = way.variant() {
                let mut prepared = variant.prepare(&spec, &inputs)?;
                prepared.poison()?;
                prepared.execute()?;
                (prepared.outputs()?, prepared.inside()?)
            } else {
                let mut told = Vec::new();
                O::seen(&inputs, None, &mut reference::Probe::new(Some(&mut told), None));
                (O::answer(&inputs, plan.form, None), told)
            };
            let asked = bisect::Kernel::<O> {
                spec: &spec,
                inputs: &inputs,
                plan: &plan,
                got: &got,
                inside: &inside,
            };
            bisect::kernel(format!("{}/{spec}@{variant}", O::NAME), &asked)
        };
        match catch_unwind(AssertUnwindSafe(run)) {
            Ok(report) => report.map_err(|error| error.to_string()),
            Err(panic) => Err(message(&*panic)),
        }
    }

    fn has_sequences(&self) -> bool {
        O::PARTS.is_some()
    }

    fn check(&self, text: &str, variant: &str, plant: Option<Spoil>) -> Row {
        Self::row(text, variant, |spec| {
            Ok(Self::outcome(spec, &self.candidate(variant)?, None, plant, None))
        })
    }

    fn check_keeping(
        &self,
        text: &str,
        variant: &str,
        plant: Option<Spoil>,
        keep: &mut Evidence,
    ) -> Row {
        Self::row(text, variant, |spec| {
            Ok(Self::outcome(spec, &self.candidate(variant)?, None, plant, Some(keep)))
        })
    }

    fn plants(&self, variant: &str) -> &'static [Plant] {
        let found = self.fast().find(|known| known.name() == variant);
        found.map_or(&[], |variant| variant.plants())
    }

    fn check_planted(&self, text: &str, variant: &str, plant: &str) -> Row {
        Self::row(text, variant, |spec| {
            let Candidate::Variant(honest) = self.candidate(variant)? else {
                return Err(format!("{variant}: nothing can be planted in the reference"));
            };
            let planted = honest.planted(plant);
            let planted = planted.ok_or_else(|| format!("{variant}: no fault {plant:?}"))?;
            Ok(Self::outcome(spec, &Candidate::Variant(&*planted), None, None, None))
        })
    }

    fn check_as(&self, text: &str, variant: &str, plan: &Plan) -> Row {
        Self::row(text, variant, |spec| {
            Ok(Self::outcome(spec, &self.candidate(variant)?, Some(plan), None, None))
        })
    }

    fn not_run(&self, text: &str, variant: &str) -> Option<Outcome> {
        match self.candidate(variant).ok()? {
            Candidate::Variant(variant) => way::not_run(variant, &Self::spec(text).ok()?),
            Candidate::Reference(_) | Candidate::Wide(_) => None,
        }
    }

    fn plan_of(&self, text: &str, variant: &str) -> Result<Plan, String> {
        self.own_plan(&Self::spec(text)?, variant)
    }

    fn sabotage(&self, text: &str, plan: &Plan) -> Result<Vec<Spoiled>, String> {
        let spec = Self::spec(text)?;
        let inputs = Self::inputs(&spec);
        let other = Spec { seed: spec.seed ^ 0x5eed, ..spec.clone() };
        let stale = O::plain::<f32>(&Self::inputs(&other));
        Ok(sabotage::each(&judge::Case::<O> { spec: &spec, inputs: &inputs, plan }, &stale))
    }

    fn felt(&self, text: &str, plan: &Plan) -> Result<Vec<Felt>, String> {
        let spec = Self::spec(text)?;
        let inputs = Self::inputs(&spec);
        let other = Spec { seed: spec.seed ^ 0xfe17, ..spec.clone() };
        Ok(felt::each(
            &judge::Case::<O> { spec: &spec, inputs: &inputs, plan },
            &Self::inputs(&other),
        ))
    }

    fn derivation(&self, text: &str, variant: &str) -> Result<Derivation, String> {
        let spec = Self::spec(text)?;
        if let Candidate::Wide(form) = self.candidate(variant)? {
            return Err(format!(
                "{form} against plain, both in f64: relative RMS 1e-12, no plan and no runs"
            ));
        }
        let plan = self.own_plan(&spec, variant)?;
        let inputs = Self::inputs(&spec);
        Ok(judge::derivation(&judge::Case::<O> { spec: &spec, inputs: &inputs, plan: &plan }))
    }
}

/// What a panic said.
pub(crate) fn message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("panicked").to_owned()
}
