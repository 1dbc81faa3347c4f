//! Taps: what a model or a composite op computes between its inputs and its outputs, by name.
//!
//! An engine that tells them can be held against another one op by op, and one that goes on with given
//! ones ([`Want::forced`](crate::engine::Want::forced)) shows of every op the error that it adds itself.

use std::{borrow::Cow, collections::BTreeMap, fmt};

use ndarray::ArrayD;

use crate::View;

/// Where in a model an op stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// The embedding.
    Embedding,
    /// A decoder layer.
    Layer(usize),
    /// The final norm and `lm_head`.
    Head,
    /// The MTP head.
    Mtp,
    /// Nowhere: a composite op of its own.
    Alone,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Part::Embedding => f.write_str("embedding"),
            Part::Layer(layer) => write!(f, "layer {layer}"),
            Part::Head => f.write_str("head"),
            Part::Mtp => f.write_str("MTP head"),
            Part::Alone => f.write_str("op"),
        }
    }
}

/// One intermediate.
///
/// The op is called as everywhere, the tensor as the checkpoint calls the weight that made it, or as the
/// op calls its output; what the reference calls its own is the list. Per-token tensors have the
/// tokens first, `[N, …]`.
#[derive(Clone, Debug)]
pub struct Tap {
    /// Where.
    pub part: Part,
    /// Which op computed it.
    pub op: Cow<'static, str>,
    /// Which of its tensors.
    pub tensor: Cow<'static, str>,
    /// The numbers.
    pub value: Value,
}

impl Tap {
    /// `layers.3/gated_delta_rule/o`: unique in a step.
    pub fn name(&self) -> String {
        name(self.part, &self.op, &self.tensor)
    }
}

/// The name of a [`Tap`].
pub fn name(part: Part, op: &str, tensor: &str) -> String {
    match part {
        Part::Embedding => format!("embedding/{op}/{tensor}"),
        Part::Layer(layer) => format!("layers.{layer}/{op}/{tensor}"),
        Part::Head => format!("head/{op}/{tensor}"),
        Part::Mtp => format!("mtp/{op}/{tensor}"),
        Part::Alone => format!("{op}/{tensor}"),
    }
}

/// The op of everything that is added to the residual stream; the tensor `o` of it is what the next
/// layer is fed.
pub const RESIDUAL: &str = "residual";

/// The numbers of a tap.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Numbers of any type, widened.
    Numbers(ArrayD<f64>),
    /// Ids.
    Integers(ArrayD<i64>),
}

impl Value {
    /// As any tensor is seen.
    pub fn view(&self) -> View<'_> {
        match self {
            Value::Numbers(x) => View::F64(x.view()),
            Value::Integers(x) => View::I64(x.view()),
        }
    }
}

/// Intermediates to go on with, by the name of the tap that they replace.
pub type Forced = BTreeMap<String, Value>;
