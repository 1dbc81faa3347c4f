//! What is lost in fewer bits: an engine over narrowed weights against what the official implementation
//! said in f32.
//!
//! Its plan says where it rounds, and [`reference::Emulated`] over the same narrowed weights says what an
//! honest engine of that plan loses. The engine may diverge twice as much: near ties of routers fall the
//! other way in one of the two, and neither is to blame.

use std::sync::Arc;

use golden::{
    Engine, Error, Weights,
    compare::logits::{Allowed, Distance, distance},
    recording::{Prompt, Recording},
};
use ndarray::Array2;

use crate::{Number, ask::ask, verify};

/// What one prompt came to.
#[derive(Clone, Debug)]
pub struct Told {
    /// The prompt.
    pub prompt: String,
    /// The engine against the recording.
    pub own: Distance,
    /// The emulation of its plan against the recording.
    pub emulated: Distance,
}

/// What computing in f32 alone may be off.
const F32: Allowed = Allowed { rel_rms: 2e-5, worst_row: 1e-4 };

impl Told {
    /// The mean divergence that the engine may have.
    pub fn allowed(&self) -> f64 {
        let f32 = self.own.checks.iter().find(|check| check.what == "mean KL");
        2.0 * self.emulated.kl.mean + f32.map_or(0.0, |check| check.allowed)
    }

    /// Whether it has no more, and every row is numbers.
    pub fn ok(&self) -> bool {
        self.own.not_finite == 0 && self.own.kl.mean <= self.allowed()
    }
}

/// Asks the cpu engine in a format, and the emulation of its plan, every prompt of a recording that has
/// whole logits.
///
/// # Errors
/// If there is no such format, or somebody cannot run a prompt.
pub fn told<'a>(
    weights: &Arc<dyn Weights>,
    number: impl Into<Number<'a>>,
    recording: &Recording,
    progress: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<Vec<Told>, Error> {
    let number = number.into();
    let mut engine = crate::engine("cpu", number, weights.clone(), None)?;
    let kept = crate::as_kept("cpu", number.name, weights.clone())?;
    let mut emulated = reference::Emulated::of(kept, engine.plan());
    beside(&mut *engine, &mut emulated, recording, progress)
}

fn beside(
    engine: &mut dyn Engine,
    emulated: &mut dyn Engine,
    recording: &Recording,
    progress: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<Vec<Told>, Error> {
    let mut all = Vec::new();
    for prompt in &recording.manifest.prompts {
        let real = recording.real_rows(prompt)?;
        let Some(want) = verify::rows(recording, prompt, "logits", &real, 0)? else { continue };
        let request = verify::request(recording, prompt)?;
        let next = following(recording, prompt)?;
        let held = |logits: &Array2<f32>| distance(&want.view(), &logits.view(), &next, F32);
        let own = held(&ask(engine, &request, progress)?.logits);
        let emulated = held(&ask(emulated, &request, progress)?.logits);
        all.push(Told { prompt: prompt.id.clone(), own, emulated });
    }
    Ok(all)
}

/// The token after each row, where there is one.
fn following(recording: &Recording, prompt: &Prompt) -> Result<Vec<Option<u32>>, Error> {
    let tokens = recording.tokens(prompt)?;
    Ok(tokens.iter().flat_map(|row| row[1..].iter().copied().map(Some).chain([None])).collect())
}

#[cfg(test)]
mod tests {
    use std::{path::Path, sync::Arc};

    use golden::{Config, Dtype, Weights, recording::Recording, synthetic::Synthetic};
    use reference::Emulated;

    use super::{Number, beside, told};
    use crate::Kept;

    #[test]
    fn a_format_loses_what_its_plan_says_and_not_what_a_coarser_one_would() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../golden/recordings/layers");
        let recording = Recording::open(&folder).unwrap();
        let source = &recording.manifest.checkpoint;
        let config = Config::parse(&source.config.to_string(), "layers").unwrap();
        let weights = Synthetic::new(config.stored_as(Dtype::F32), source.seed.unwrap());
        let weights: Arc<dyn Weights> = Arc::new(weights);
        let on = &mut |_, _| true;
        let mut numbers = ["bf16", "int8", "int4"].map(Number::from).to_vec();
        numbers.extend(["f32", "bf16", "int4"].map(|name| Number { name, kept: Some(Kept::Int8) }));
        numbers.push(Number { name: "int8", kept: Some(Kept::F32) });
        for number in numbers {
            let all = told(&weights, number, &recording, on).unwrap();
            assert!(!all.is_empty() && all.iter().all(super::Told::ok), "{number}: {all:#?}");
        }
        let (bf16, int8) = (Number::from("bf16"), Number { name: "bf16", kept: Some(Kept::Int8) });
        for (finer, coarser) in
            [(bf16, "int8".into()), ("int8".into(), "int4".into()), (bf16, int8)]
        {
            let plan = crate::engine("cpu", finer, weights.clone(), None).unwrap().plan();
            let kept = crate::as_kept("cpu", finer.name, weights.clone()).unwrap();
            let mut engine = crate::engine("cpu", coarser, weights.clone(), None).unwrap();
            let all = beside(&mut *engine, &mut Emulated::of(kept, plan), &recording, on).unwrap();
            assert!(all.iter().all(|told| !told.ok()), "{coarser} as {finer}: {all:#?}");
        }
    }
}
