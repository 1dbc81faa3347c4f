//! One way to compute an op: what it is, what it promises, and a run of it.

use std::{fmt, sync::Arc};

use golden::{Claims, Op, Plan, Spec, Variant, plan::Form};

use crate::{answer::Answer, foreign::Kernel, guard, report::Outcome};

/// Who computes an op.
#[derive(Clone, Debug)]
pub enum Who {
    /// The reference in a form, or a variant.
    Named {
        /// `device/algorithm`.
        variant: String,
        /// A fault of the variant that is planted.
        plant: Option<String>,
    },
    /// A foreign kernel, in its process.
    Foreign(Arc<Kernel>),
}

impl Who {
    /// A way of that name, with a fault planted or not.
    pub(crate) fn named(variant: &str, plant: Option<&str>) -> Who {
        Who::Named { variant: variant.to_owned(), plant: plant.map(str::to_owned) }
    }
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Who::Named { variant, .. } => f.write_str(variant),
            Who::Foreign(kernel) => f.write_str(&kernel.variant()),
        }
    }
}

/// One way to compute an op.
pub(crate) enum Way<O: Op> {
    /// The reference in f32.
    Reference(Form),
    /// A variant.
    Variant(&'static dyn Variant<O>),
    /// One that was made for this: a variant with a fault, or a foreign kernel in its process.
    Made(Box<dyn Variant<O>>),
}

impl<O: Answer> Way<O> {
    /// The variant, if it is one.
    pub(crate) fn variant(&self) -> Option<&dyn Variant<O>> {
        match self {
            Way::Reference(_) => None,
            Way::Variant(variant) => Some(*variant),
            Way::Made(variant) => Some(&**variant),
        }
    }

    /// How it rounds.
    pub(crate) fn plan(&self, spec: &Spec<O::Case>) -> Plan {
        match (self, self.variant()) {
            (_, Some(variant)) => variant.plan(spec),
            (Way::Reference(form), _) => Plan::F32.form(*form),
            _ => Plan::F32,
        }
    }

    /// What it promises. The reference is one thread that takes tokens one by one, or so many at a
    /// time from the first on.
    pub(crate) fn claims(&self) -> Claims {
        let reference = |cuts| Claims { deterministic: true, batch_invariant: true, cuts };
        match self {
            Way::Reference(Form::Plain) => reference(Some(1)),
            Way::Reference(Form::Chunked(tokens) | Form::Prefixed(tokens)) => {
                reference(Some(*tokens))
            }
            _ => self.variant().map(Variant::claims).unwrap_or_default(),
        }
    }

    /// The outcome of a problem that is not to be run.
    pub(crate) fn not_run(&self, spec: &Spec<O::Case>) -> Option<Outcome> {
        self.variant().and_then(|variant| not_run(variant, spec))
    }

    /// Computes one problem, on poisoned outputs.
    pub(crate) fn run(
        &self,
        spec: &Spec<O::Case>,
        inputs: &O::Inputs<f32>,
    ) -> Result<O::Outputs<f32>, Outcome> {
        match self.variant() {
            Some(variant) => guard::once(variant, spec, inputs),
            None => Ok(O::answer(inputs, self.plan(spec).form, None)),
        }
    }
}

/// The outcome of a problem that a variant is not to run, by what it is for and what this machine has.
pub(crate) fn not_run<O: Op>(variant: &dyn Variant<O>, spec: &Spec<O::Case>) -> Option<Outcome> {
    let unfit = variant.unfit(spec).map(Outcome::Unsupported);
    unfit.or_else(|| variant.skip(&crate::host(), spec).map(Outcome::Skipped))
}
