//! One way to compute an op: what it is, what it promises, and a run of it.

use golden::{Claims, Op, Plan, Spec, Variant, plan::Form};

use crate::{answer::Answer, guard, report::Outcome};

/// One way to compute an op, with a fault planted or not.
pub(crate) enum Way<O: Op> {
    /// The reference in f32.
    Reference(Form),
    /// A variant.
    Variant(&'static dyn Variant<O>),
    /// A variant with a fault.
    Planted(Box<dyn Variant<O>>),
}

impl<O: Answer> Way<O> {
    /// The variant, if it is one.
    pub(crate) fn variant(&self) -> Option<&dyn Variant<O>> {
        match self {
            Way::Reference(_) => None,
            Way::Variant(variant) => Some(*variant),
            Way::Planted(variant) => Some(&**variant),
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

    /// Why this host or problem cannot run it, if so.
    pub(crate) fn skip(&self, spec: &Spec<O::Case>) -> Option<String> {
        self.variant().and_then(|variant| variant.skip(&crate::host(), spec))
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
