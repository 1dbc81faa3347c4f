//! Whether a case can see its inputs: one is drawn anew, and an output has to move beyond its bound.

use golden::{Tensors, View, ViewMut};

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
            all.push(Felt { input, output, moved });
        }
    }
    all
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
