//! What a failing job leaves behind: tensors with which it can be looked at elsewhere.

use golden::{Tensors, View, recording::Recorded};
use ndarray::{ArrayD, IxDyn};

use crate::bound::{Output, Outputs};

/// Named tensors of one job.
///
/// | tensor | what |
/// |---|---|
/// | `in.<input>` | what both sides were fed, as it was fed |
/// | `want.<output>` | the oracle's answer |
/// | `got.<output>` | the candidate's |
/// | `allowed.<output>` | how far each element may be off; absent where a rule is on sums only |
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Evidence {
    /// By name.
    pub tensors: Vec<(String, Recorded)>,
}

impl Evidence {
    /// Adds every tensor of a struct, under `kind.name`.
    pub(crate) fn add(&mut self, kind: &str, tensors: &impl Tensors) {
        for (name, view) in tensors.tensors() {
            self.tensors.push((format!("{kind}.{name}"), held(view)));
        }
    }

    /// Adds one tensor.
    pub(crate) fn one(&mut self, kind: &str, name: &str, x: Recorded) {
        self.tensors.push((format!("{kind}.{name}"), x));
    }

    /// Adds what a bound is made of.
    pub(crate) fn bound(&mut self, outputs: &Outputs) {
        for (name, output) in outputs {
            match output {
                Output::Numbers(derived) => {
                    let shape = IxDyn(&derived.shape);
                    let array = |x: Vec<f64>| ArrayD::from_shape_vec(shape.clone(), x).ok();
                    if let Some(want) = array(derived.want.clone()) {
                        self.one("want", name, Recorded::F64(want));
                    }
                    let allowed = derived.allowed().into_iter().map(|(allowed, _)| allowed);
                    if let Some(allowed) = array(allowed.collect()) {
                        self.one("allowed", name, Recorded::F64(allowed));
                    }
                }
                Output::Integers { want, .. } => {
                    self.one("want", name, Recorded::I64(want.clone()));
                }
            }
        }
    }
}

/// A copy of a view.
pub(crate) fn held(view: View<'_>) -> Recorded {
    match view {
        View::F32(x) => Recorded::F32(x.to_owned()),
        View::F64(x) => Recorded::F64(x.to_owned()),
        View::I64(x) => Recorded::I64(x.to_owned()),
        View::U8(x) => Recorded::U8(x.to_owned()),
        View::Wide(x) => Recorded::F64(x),
    }
}
