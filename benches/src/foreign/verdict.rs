//! What a foreign kernel's answers come to.

use golden::{Spec, compare::Finding, tensor::Read};

use super::{Kernel, Question, bundle::Bundle, child::other};
use crate::{
    answer::Answer,
    guard::{Answers, differs, unchanged},
    judge,
    registry::drawn,
    report::Outcome,
    sabotage::{self, Spoil},
};

/// What it comes to without asking: a problem that the kernel does not take, or a machine that it is not for.
pub(super) fn unasked<O: Answer>(spec: &Spec<O::Case>, kernel: &Kernel) -> Option<Outcome> {
    let sizes = golden::Case::sizes(&spec.case);
    let sizes: Vec<_> = <O::Case as golden::Case>::LETTERS.iter().copied().zip(sizes).collect();
    if let Some(why) = kernel.refuses(&sizes, spec.dtype) {
        return Some(Outcome::Unsupported(why));
    }
    let lacks = kernel.manifest.constraints.lacks(&crate::host());
    kernel.unfit.clone().or(lacks).map(Outcome::Skipped)
}

/// Asks a kernel and judges what it says.
pub(crate) fn outcome<O: Answer>(
    spec: &Spec<O::Case>,
    kernel: &Kernel,
    plant: Option<Spoil>,
) -> Result<Outcome, String> {
    if let Some(early) = unasked::<O>(spec, kernel) {
        return Ok(early);
    }
    let question = Question {
        op: O::NAME,
        spec: &spec.to_string(),
        bytes: O::cost(spec).bytes,
        inputs: None,
        threads: None,
    };
    let answers = match kernel.ask(&question).answers() {
        Ok(answers) => answers,
        Err(outcome) => return Ok(outcome),
    };
    let mut answers = read::<O>(&answers)?;
    sabotage::all(&mut answers.first, plant);
    Ok(judged(spec, kernel, &answers))
}

fn judged<O: Answer>(spec: &Spec<O::Case>, kernel: &Kernel, answers: &Answers<O>) -> Outcome {
    let Answers { before, first, moved } = answers;
    let plan = kernel.plan(spec.dtype);
    let inputs = drawn::<O>(spec);
    let judge = |got: &O::Outputs<f32>| {
        Outcome::of(judge::Case::<O> { spec, inputs: &inputs, plan: &plan }.judge(got))
    };
    // Outputs that are wrong, and to the bit the right ones of the call before.
    let stale = |got: &O::Outputs<f32>, wrong: &[Finding]| -> Option<String> {
        let mut kept = unchanged(before, got);
        kept.retain(|name| wrong.iter().any(|f| f.output == *name && !f.ok));
        if kept.is_empty() {
            return None;
        }
        let spec = &other(spec);
        let inputs = &drawn::<O>(spec);
        let of_others = judge::Case::<O> { spec, inputs, plan: &plan }.judge(before);
        kept.retain(|name| of_others.iter().any(|f| f.output == *name && f.ok));
        (!kept.is_empty()).then(|| kept.join(", "))
    };
    let verdict = judge(first);
    if let Outcome::Failed(findings) = &verdict {
        let why = "new inputs at the addresses of the call before got the answer of that call";
        return match stale(first, findings) {
            Some(outputs) => Outcome::Cheat(format!("{why}: {outputs}")),
            None => verdict,
        };
    }
    let Some(name) = differs(first, moved) else { return verdict };
    let again = judge(moved);
    if let Outcome::Failed(findings) = &again {
        let why = "the same inputs at other addresses got the answer to what the old ones hold";
        return match stale(moved, findings) {
            Some(outputs) => Outcome::Cheat(format!("{why}: {outputs}")),
            None => again,
        };
    }
    if kernel.claims().deterministic {
        let why = format!("output {name} differs between two runs, though it claims not to");
        return Outcome::Cheat(why);
    }
    verdict
}

fn read<O: Answer>(answers: &[u8]) -> Result<Answers<O>, String> {
    let mut all = Bundle::open(answers)?;
    let mut read = |when| O::Outputs::<f32>::read(all.under(when));
    Ok(Answers { before: read("before/")?, first: read("first/")?, moved: read("moved/")? })
}
