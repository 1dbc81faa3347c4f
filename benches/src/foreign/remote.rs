//! A foreign kernel as a variant: asked, in a process of its own, about inputs that its host chooses.
//!
//! What feeds one text in many ways, or asks one question again and again, does not care where the
//! kernel runs. Each call stands alone: the kernel's process keeps nothing of it.

use std::{fmt, sync::Arc};

use golden::{Case as _, Claims, Error, Host, Op, Plan, Prepared, Spec, Variant};
use optimized::cuda::Trapped;
use rayon::current_num_threads;

use super::{
    Kernel, Question,
    bundle::{Bundle, bundled},
};
use crate::report::Outcome;

/// The kernel.
pub(crate) struct Remote {
    kernel: Arc<Kernel>,
    name: String,
}

impl Remote {
    pub(crate) fn new(kernel: Arc<Kernel>) -> Remote {
        Remote { name: kernel.variant(), kernel }
    }
}

/// A call that came to an outcome instead of an answer.
#[derive(Debug)]
pub(super) struct Instead(pub(super) Outcome);

impl fmt::Display for Instead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.why().unwrap_or(self.0.name()))
    }
}

impl std::error::Error for Instead {}

/// Why there is no answer: a broken promise or a death where a foreign kernel told it, a fault on the
/// GPU, else an error.
pub(crate) fn ended(error: Error) -> Outcome {
    match error.downcast::<Instead>() {
        Ok(ended) => ended.0,
        Err(error) if error.is::<Trapped>() => Outcome::Crashed(error.to_string()),
        Err(error) => Outcome::Error(error.to_string()),
    }
}

impl<O: Op> Variant<O> for Remote {
    fn name(&self) -> &str {
        &self.name
    }

    fn skip(&self, host: &Host, _: &Spec<O::Case>) -> Option<String> {
        self.kernel.unfit.clone().or(self.kernel.manifest.constraints.lacks(host))
    }

    fn plan(&self, spec: &Spec<O::Case>) -> Plan {
        self.kernel.plan(spec.dtype)
    }

    fn claims(&self) -> Claims {
        self.kernel.claims()
    }

    fn prepare(
        &self,
        spec: &Spec<O::Case>,
        inputs: &O::Inputs<f32>,
    ) -> Result<Box<dyn Prepared<O>>, Error> {
        // A piece of what it takes may be what it does not take.
        let sizes: Vec<_> =
            <O::Case as golden::Case>::LETTERS.iter().copied().zip(spec.case.sizes()).collect();
        if let Some(why) = self.kernel.refuses(&sizes, spec.dtype) {
            return Err(Box::new(Instead(Outcome::Unsupported(why))));
        }
        let unwritten = O::unwritten(spec, inputs);
        Ok(Box::new(Ready::<O> {
            kernel: self.kernel.clone(),
            spec: spec.clone(),
            bytes: bundled(inputs)?,
            inputs: inputs.clone(),
            outputs: unwritten.clone(),
            unwritten,
        }))
    }
}

/// A problem that the kernel is about to be asked.
struct Ready<O: Op> {
    kernel: Arc<Kernel>,
    spec: Spec<O::Case>,
    /// The inputs as they are sent.
    bytes: Vec<u8>,
    inputs: O::Inputs<f32>,
    unwritten: O::Outputs<f32>,
    outputs: O::Outputs<f32>,
}

impl<O: Op> Prepared<O> for Ready<O> {
    fn poison(&mut self) -> Result<(), Error> {
        self.outputs = self.unwritten.clone();
        Ok(())
    }

    fn inputs(&mut self) -> Result<O::Inputs<f32>, Error> {
        Ok(self.inputs.clone())
    }

    fn execute(&mut self) -> Result<(), Error> {
        let question = Question {
            op: O::NAME,
            spec: &self.spec.to_string(),
            bytes: O::cost(&self.spec).bytes,
            inputs: Some(&self.bytes),
            // As many as the pool that it is asked from.
            threads: Some(current_num_threads()),
        };
        let answers = self.kernel.ask(&question).answers().map_err(Instead)?;
        self.outputs = golden::tensor::Read::read(&Bundle::open(&answers)?)?;
        Ok(())
    }

    fn outputs(&mut self) -> Result<O::Outputs<f32>, Error> {
        Ok(self.outputs.clone())
    }
}
