//! What every candidate run is watched for.

use golden::{Op, Prepared, Spec, Tensors, Variant, View};

use crate::report::Outcome;

/// Runs a variant once (twice where it claims to be deterministic) on poisoned outputs.
///
/// # Errors
/// If it could not be run. The inner error is an outcome that ends the matter: a cheat.
pub(crate) fn run<O: Op>(
    variant: &dyn Variant<O>,
    spec: &Spec<O::Case>,
    inputs: &O::Inputs<f32>,
) -> Result<Result<O::Outputs<f32>, Outcome>, String> {
    let mut prepared = variant.prepare(spec, inputs).map_err(|e| e.to_string())?;
    let got = match poisoned(&mut *prepared)? {
        Ok(got) => got,
        Err(outcome) => return Ok(Err(outcome)),
    };
    let after = prepared.inputs().map_err(|e| e.to_string())?;
    if let Some(name) = differs(inputs, &after) {
        return Ok(Err(Outcome::Cheat(format!("input {name} was changed"))));
    }
    if variant.claims().deterministic {
        let again = match poisoned(&mut *prepared)? {
            Ok(again) => again,
            Err(outcome) => return Ok(Err(outcome)),
        };
        if let Some(name) = differs(&got, &again) {
            let why = format!("output {name} differs between two runs, though it claims not to");
            return Ok(Err(Outcome::Cheat(why)));
        }
    }
    Ok(Ok(got))
}

/// Runs a variant once, on poisoned outputs.
pub(crate) fn once<O: Op>(
    variant: &dyn Variant<O>,
    spec: &Spec<O::Case>,
    inputs: &O::Inputs<f32>,
) -> Result<O::Outputs<f32>, Outcome> {
    let text = |e: golden::Error| Outcome::Error(e.to_string());
    poisoned(&mut *variant.prepare(spec, inputs).map_err(text)?).map_err(Outcome::Error)?
}

/// Poisons, looks that the poison took, runs.
pub(crate) fn poisoned<O: Op>(
    prepared: &mut dyn Prepared<O>,
) -> Result<Result<O::Outputs<f32>, Outcome>, String> {
    let text = |e: golden::Error| e.to_string();
    prepared.poison().map_err(text)?;
    let before = prepared.outputs().map_err(text)?;
    for (name, view) in before.tensors() {
        let poisoned = match view {
            View::F32(x) => x.iter().all(|x| x.is_nan()),
            View::I64(x) => x.iter().all(|&x| x == i64::MIN),
            _ => true,
        };
        if !poisoned {
            let why = format!("output {name} does not take poison: it may be of an earlier call");
            return Ok(Err(Outcome::Mistrusted(why)));
        }
    }
    prepared.execute().map_err(text)?;
    prepared.outputs().map(Ok).map_err(text)
}

/// The first tensor that is not the same to the bit.
pub(crate) fn differs(a: &impl Tensors, b: &impl Tensors) -> Option<&'static str> {
    let same = |a: &View<'_>, b: &View<'_>| match (a, b) {
        (View::F32(a), View::F32(b)) => {
            a.shape() == b.shape() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
        }
        _ => a.shape() == b.shape() && a.to_f64() == b.to_f64(),
    };
    let (a, b) = (a.tensors(), b.tensors());
    if a.len() != b.len() {
        return a.first().map(|(name, _)| *name);
    }
    a.iter().zip(&b).find(|((_, a), (_, b))| !same(a, b)).map(|((name, _), _)| *name)
}
