//! Variants for tests: the reference, with something done to it.

use golden::{Claims, Error, Host, Plan, Prepared, Spec, Tensors, Variant, ViewMut};

use crate::answer::Answer;

/// What is done to the inputs before, or to the outputs after, a run: the first of a prepared problem,
/// the third, … have the number 0, the others 1.
type Touch<O, T> = fn(&Spec<<O as golden::Op>::Case>, &mut T, usize);

/// The reference in f32, touched.
pub(crate) struct Fake<O: Answer> {
    pub(crate) claims: Claims,
    pub(crate) plan: Plan,
    pub(crate) before: Touch<O, O::Inputs<f32>>,
    pub(crate) after: Touch<O, O::Outputs<f32>>,
}

impl<O: Answer> Fake<O> {
    /// As honest as the reference.
    pub(crate) const HONEST: Fake<O> = Fake {
        claims: Claims { deterministic: true, batch_invariant: true, cuts: Some(1) },
        plan: Plan::F32,
        before: |_, _, _| {},
        after: |_, _, _| {},
    };
}

impl<O: Answer> Variant<O> for Fake<O> {
    fn name(&self) -> &'static str {
        "cpu/fake"
    }

    fn skip(&self, _: &Host, _: &Spec<O::Case>) -> Option<String> {
        None
    }

    fn plan(&self, _: &Spec<O::Case>) -> Plan {
        self.plan.clone()
    }

    fn claims(&self) -> Claims {
        self.claims
    }

    fn prepare(
        &self,
        spec: &Spec<O::Case>,
        inputs: &O::Inputs<f32>,
    ) -> Result<Box<dyn Prepared<O>>, Error> {
        let answer = |run| {
            let mut touched = inputs.clone();
            (self.before)(spec, &mut touched, run);
            let mut outputs = O::answer::<f32>(&touched, self.plan.form, None);
            (self.after)(spec, &mut outputs, run);
            outputs
        };
        let said = [answer(0), answer(1)];
        Ok(Box::new(Loaded { inputs: inputs.clone(), outputs: said[0].clone(), said }))
    }
}

struct Loaded<O: Answer> {
    inputs: O::Inputs<f32>,
    /// What the next run says, and the one after it.
    said: [O::Outputs<f32>; 2],
    outputs: O::Outputs<f32>,
}

impl<O: Answer> Prepared<O> for Loaded<O> {
    fn poison(&mut self) -> Result<(), Error> {
        for (_, view) in self.outputs.tensors_mut() {
            match view {
                ViewMut::F32(mut x) => x.fill(f32::NAN),
                ViewMut::I64(mut x) => x.fill(i64::MIN),
                _ => {}
            }
        }
        Ok(())
    }

    fn inputs(&mut self) -> Result<O::Inputs<f32>, Error> {
        Ok(self.inputs.clone())
    }

    fn execute(&mut self) -> Result<(), Error> {
        self.outputs = self.said[0].clone();
        self.said.rotate_left(1);
        Ok(())
    }

    fn outputs(&mut self) -> Result<O::Outputs<f32>, Error> {
        Ok(self.outputs.clone())
    }
}
