//! What every candidate run is watched for.

use golden::{Error, Op, Prepared, Spec, Tensors, Variant, View};

use crate::{foreign::ended, report::Outcome};

/// Runs a variant once (twice where it claims to be deterministic) on poisoned outputs.
///
/// # Errors
/// An outcome that ends the matter: it could not be run, or cheats.
pub(crate) fn run<O: Op>(
    variant: &dyn Variant<O>,
    spec: &Spec<O::Case>,
    inputs: &O::Inputs<f32>,
) -> Result<O::Outputs<f32>, Outcome> {
    let mut prepared = variant.prepare(spec, inputs).map_err(ended)?;
    let got = watched(&mut *prepared, inputs).map_err(ended)??;
    if variant.claims().deterministic {
        let again = poisoned(&mut *prepared).map_err(ended)??;
        if let Some(name) = differs(&got, &again) {
            let why = format!("output {name} differs between two runs, though it claims not to");
            return Err(Outcome::Cheat(why));
        }
    }
    Ok(got)
}

/// Runs a variant once, on poisoned outputs.
pub(crate) fn once<O: Op>(
    variant: &dyn Variant<O>,
    spec: &Spec<O::Case>,
    inputs: &O::Inputs<f32>,
) -> Result<O::Outputs<f32>, Outcome> {
    poisoned(&mut *variant.prepare(spec, inputs).map_err(ended)?).map_err(ended)?
}

/// Poisons, looks that the poison took, runs.
pub(crate) fn poisoned<O: Op>(
    prepared: &mut dyn Prepared<O>,
) -> Result<Result<O::Outputs<f32>, Outcome>, Error> {
    prepared.poison()?;
    let before = prepared.outputs()?;
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
    prepared.execute()?;
    let after = prepared.outputs()?;
    for ((name, want), (_, got)) in before.tensors().iter().zip(after.tensors()) {
        if want.shape() != got.shape() {
            let (want, got) = (want.shape(), got.shape());
            return Err(format!("output {name} has shape {got:?}, expected {want:?}").into());
        }
    }
    Ok(Ok(after))
}

/// What a variant of unknown origin answers, in the order of asking.
pub(crate) struct Answers<O: Op> {
    /// To other inputs, at the addresses of `first`.
    pub(crate) before: O::Outputs<f32>,
    /// To the inputs.
    pub(crate) first: O::Outputs<f32>,
    /// To the inputs once more at other addresses, while the first ones hold the other inputs.
    pub(crate) moved: O::Outputs<f32>,
}

/// Runs a variant that nobody knows: other inputs, then the inputs in the same memory, then the inputs
/// elsewhere. Who answers by address, or from the call before, answers wrongly.
///
/// # Errors
/// If it could not be run. The inner error is an outcome that ends the matter: a cheat.
pub(crate) fn suspect<O: Op>(
    variant: &dyn Variant<O>,
    spec: &Spec<O::Case>,
    inputs: &O::Inputs<f32>,
    others: &O::Inputs<f32>,
) -> Result<Result<Answers<O>, Outcome>, Error> {
    let mut there = variant.prepare(spec, others)?;
    let before = match watched(&mut *there, others)? {
        Ok(before) => before,
        Err(outcome) => return Ok(Err(outcome)),
    };
    reload(&mut *there, inputs)?;
    let first = match watched(&mut *there, inputs)? {
        Ok(first) => first,
        Err(outcome) => return Ok(Err(outcome)),
    };
    reload(&mut *there, others)?;
    let mut elsewhere = variant.prepare(spec, inputs)?;
    Ok(watched(&mut *elsewhere, inputs)?.map(|moved| Answers { before, first, moved }))
}

fn reload<O: Op>(prepared: &mut dyn Prepared<O>, inputs: &O::Inputs<f32>) -> Result<(), Error> {
    if prepared.load(inputs)? {
        Ok(())
    } else {
        Err("two draws of one problem differ in their shapes".into())
    }
}

/// One run, after which nothing but the outputs may have changed.
pub(crate) fn watched<O: Op>(
    prepared: &mut dyn Prepared<O>,
    inputs: &O::Inputs<f32>,
) -> Result<Result<O::Outputs<f32>, Outcome>, Error> {
    let got = match poisoned(prepared)? {
        Ok(got) => got,
        Err(outcome) => return Ok(Err(outcome)),
    };
    let changed = differs(inputs, &prepared.inputs()?);
    let changed = changed.map(|name| format!("input {name} was changed"));
    Ok(match changed.or(prepared.strayed()?) {
        Some(why) => Err(Outcome::Cheat(why)),
        None => Ok(got),
    })
}

/// Whether two tensors are the same to the bit.
fn same(a: &View<'_>, b: &View<'_>) -> bool {
    match (a, b) {
        (View::F32(a), View::F32(b)) => {
            a.shape() == b.shape() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
        }
        _ => a.shape() == b.shape() && a.to_f64() == b.to_f64(),
    }
}

/// Tensors that are the same to the bit.
pub(crate) fn unchanged(a: &impl Tensors, b: &impl Tensors) -> Vec<&'static str> {
    let (a, b) = (a.tensors(), b.tensors());
    let pairs = a.iter().zip(&b).filter(|((_, a), (_, b))| same(a, b));
    pairs.map(|((name, _), _)| *name).collect()
}

/// The first tensor that is not the same to the bit.
pub(crate) fn differs(a: &impl Tensors, b: &impl Tensors) -> Option<&'static str> {
    let (a, b) = (a.tensors(), b.tensors());
    if a.len() != b.len() {
        return a.first().map(|(name, _)| *name);
    }
    a.iter().zip(&b).find(|((_, a), (_, b))| !same(a, b)).map(|((name, _), _)| *name)
}
