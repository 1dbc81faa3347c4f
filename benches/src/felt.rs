//! Whether a case can see its inputs: one is drawn anew, and every output that depends on it has to
//! move beyond its bound.
//!
//! An output depends on every input but for those that the op holds [apart](golden::Op::APART). What a
//! fill or a size cannot show is [declared](golden::Op::unfelt) with its reason. A declaration that a case
//! does not bear out is as wrong as one that is missing.

use golden::{Apart, Spec, Tensors, View, ViewMut};

use crate::{
    answer::Answer,
    bound::{Output, SCREEN},
    judge::Case,
};

/// One input and one output of a case.
#[derive(Clone, Debug, PartialEq)]
pub struct Felt {
    /// The input that was drawn anew.
    pub input: &'static str,
    /// The output that was looked at.
    pub output: &'static str,
    /// How many times its bound the element moved that moved most; integers that change count as
    /// infinite.
    pub moved: f64,
    /// What is declared of the pair.
    pub declared: Declared,
}

/// What an op says of an input and an output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Declared {
    /// Nothing: the one moves the other.
    Dependent,
    /// By the formula it never does.
    Apart,
    /// Not as this fill draws, or not at these sizes.
    Unfelt,
}

impl Felt {
    /// Whether the check would see a wrong input here.
    pub fn felt(&self) -> bool {
        1.0 < self.moved
    }
}

/// Every input against every compared output. Inputs whose two draws are equal are left out.
pub(crate) fn each<O: Answer>(case: &Case<'_, O>, other: &O::Inputs<f32>) -> Vec<Felt> {
    let derived = case.question(None).derive(SCREEN);
    let inputs: Vec<&'static str> =
        case.inputs.tensors().into_iter().map(|(name, _)| name).collect();
    let mut all = Vec::new();
    // Offsets belong together: one alone is no problem.
    for input in inputs.into_iter().filter(|name| !name.starts_with("cu_seqlens")) {
        let mut changed = case.inputs.clone();
        if !replace(&mut changed, other, input) {
            continue;
        }
        let want = O::plain::<f64>(&O::wide(&changed));
        let moved: Vec<_> =
            want.tensors().into_iter().map(|(name, view)| (name, view.to_f64())).collect();
        for (output, bound) in derived.iter().filter(|(name, _)| !O::TOLD.contains(name)) {
            let Some((_, now)) = moved.iter().find(|(name, _)| name == output) else { continue };
            let moved =
                match bound {
                    Output::Numbers(derived) => {
                        let elements = now.iter().zip(&derived.want).zip(derived.allowed());
                        let used = elements.map(|((now, want), (allowed, _))| {
                            if now == want { 0.0 } else { (now - want).abs() / allowed }
                        });
                        used.fold(0.0, f64::max)
                    }
                    Output::Integers { want, .. } => {
                        let same = now.iter().zip(want).all(|(&now, &want)| now == want as f64);
                        if same { 0.0 } else { f64::INFINITY }
                    }
                };
            let declared = declared::<O>(case.spec, input, output);
            all.push(Felt { input, output, moved, declared });
        }
    }
    all
}

/// What an op says of a pair in a case.
fn declared<O: Answer>(spec: &Spec<O::Case>, input: &str, output: &str) -> Declared {
    let apart = |pair: &Apart| pair.output == output && pair.inputs.contains(&input);
    if O::APART.iter().any(apart) {
        Declared::Apart
    } else if O::unfelt(spec, input, output).is_some() {
        Declared::Unfelt
    } else {
        Declared::Dependent
    }
}

/// Puts the tensor called `name` of `other` in the place of that of `inputs`; false where that
/// changes nothing or cannot be done.
fn replace<T: Tensors>(inputs: &mut T, other: &T, name: &str) -> bool {
    let from = other.tensors().into_iter().find(|(other, _)| *other == name);
    let to = inputs.tensors_mut().into_iter().find(|(other, _)| *other == name);
    let (Some((_, from)), Some((_, to))) = (from, to) else { return false };
    match (to, from) {
        (ViewMut::F32(mut to), View::F32(from)) if to.shape() == from.shape() => {
            let changes = to != from;
            to.assign(&from);
            changes
        }
        (ViewMut::I64(mut to), View::I64(from)) if to.shape() == from.shape() => {
            let changes = to != from;
            to.assign(&from);
            changes
        }
        (ViewMut::U8(mut to), View::U8(from)) if to.shape() == from.shape() => {
            let changes = to != from;
            to.assign(&from);
            changes
        }
        _ => false,
    }
}
