//! A foreign kernel that is timed, as its host sees it.
//!
//! Its process keeps the problem ready, runs the turns and holds the clock, or has the program or the device
//! hold it; what is judged here are answers. It is judged as in any check before anything is timed; then the
//! answers to the inputs that take turns, before the first turn and after the last; and once more, as in any
//! check, about inputs that it has never seen.

use std::{fs, sync::Arc};

use golden::{Clock, Dtype, Error, Op, Plan, Spec, plan::Activations, tensor::Read};
use serde_json::{Value, json};

use super::{
    Ended, Guest, Kernel, Said, bundle::Bundle, outcome, remote::Instead, verdict::unasked,
};
use crate::{
    answer::Answer,
    judge,
    registry::{draws_of, factors},
    report::Outcome,
    turns::{Asked, Timed, Turn},
};

/// A problem, and inputs that were drawn for it.
type Draw<O> = (Spec<<O as Op>::Case>, <O as Op>::Inputs<f32>);

/// The kernel, and the problem that it is timed on.
pub(crate) struct Far<O: Op> {
    kernel: Arc<Kernel>,
    /// The process, as long as it is timed.
    guest: Option<Guest>,
    plan: Plan,
    told: String,
    spec: Spec<O::Case>,
    draws: Vec<Draw<O>>,
}

impl<O: Answer> Far<O> {
    /// Judges it, and has its process make ready.
    ///
    /// # Errors
    /// What judging it came to, if that is not green, and why it cannot be timed.
    pub(crate) fn new(
        spec: &Spec<O::Case>,
        kernel: &Arc<Kernel>,
        asked: &Asked,
    ) -> Result<Far<O>, Outcome> {
        if let Some(early) = unasked::<O>(spec, kernel) {
            return Err(early);
        }
        let draws: Vec<Draw<O>> = draws_of::<O>(spec, asked.draws).collect();
        // As many threads as everybody beside it takes; all there are is what it takes by itself.
        let threads = rayon::current_num_threads();
        let threads = (threads != crate::host().threads).then_some(threads);
        let each = 8 * O::cost(spec).bytes;
        let walked = asked.away.map_or(0, |bytes| 2 * bytes as u64);
        let bytes = (draws.len() as u64 + 2) * each + walked;
        // The process that will be timed is there when one is asked for to be judged, and is taken where it has all
        // threads: one that imports for half a minute is started once.
        kernel.put_back(kernel.guest(bytes, threads).map_err(gone)?);
        let checked = outcome::<O>(spec, kernel, None).map_err(Outcome::Error)?;
        if !matches!(checked, Outcome::Passed(_)) {
            return Err(checked);
        }
        let guest = kernel.guest(bytes, threads).map_err(gone)?;
        let plan = kernel.plan(spec.dtype);
        let told = format!("{plan:?}");
        let (kernel, spec) = (kernel.clone(), spec.clone());
        let mut far = Far { kernel, guest: Some(guest), plan, told, spec, draws };
        let begin = json!({
            "time": "begin", "op": O::NAME, "spec": far.spec.to_string(), "draws": asked.draws,
            "away": asked.away,
        });
        far.ask(&begin, "ready")?;
        Ok(far)
    }

    /// Asks its process; a reply of another kind, or none, is what it came to.
    fn ask(&mut self, request: &Value, want: &str) -> Result<Value, Outcome> {
        let over = || Outcome::Crashed("its process is no more".to_owned());
        let guest = self.guest.as_mut().ok_or_else(over)?;
        let said = match guest.ask(request) {
            Ok(said) if said["said"] == want => return Ok(said),
            Ok(said) => Said::instead(&said, guest).answers(),
            Err(ended) => Err(gone(ended)),
        };
        // Whoever did harm is not asked again.
        self.guest = None;
        Err(said.err().unwrap_or_else(over))
    }

    /// The answers to all draws, judged.
    fn judged(&mut self, which: &str) -> Result<Outcome, Outcome> {
        let file = self.guest.as_ref().map(|guest| guest.file.clone());
        self.ask(&json!({"time": which, "file": file}), "answers")?;
        let answers = file.map(fs::read).transpose();
        let answers = answers.map_err(|e| Outcome::Crashed(format!("answers: {e}")))?;
        let mut answers =
            Bundle::open(answers.as_deref().unwrap_or_default()).map_err(Outcome::Crashed)?;
        let mut first = None;
        for (at, (spec, inputs)) in self.draws.iter().enumerate() {
            let got = O::Outputs::<f32>::read(answers.under(&format!("{at}/")));
            let got = got.map_err(Outcome::Crashed)?;
            let case = judge::Case::<O> { spec, inputs, plan: &self.plan };
            let outcome = Outcome::of(case.judge(&got));
            if outcome.is_red() {
                return Ok(outcome);
            }
            first.get_or_insert(outcome);
        }
        Ok(first.unwrap_or(Outcome::Timeout))
    }
}

/// A process that is no more.
fn gone(ended: Ended) -> Outcome {
    match ended {
        Ended::Timeout => Outcome::Timeout,
        Ended::Died(why) => Outcome::Crashed(why),
    }
}

impl<O: Answer> Timed for Far<O> {
    fn turn(&mut self, draw: usize, calls: usize, group: usize) -> Result<Turn, Error> {
        let request = json!({"time": "turn", "draw": draw, "calls": calls, "group": group});
        let said = self.ask(&request, "turn").map_err(Instead)?;
        let ns: Vec<f64> =
            said["ns"].as_array().into_iter().flatten().filter_map(Value::as_f64).collect();
        let clock = said["clock"].as_str().and_then(Clock::named).unwrap_or(Clock::Host);
        Ok(Turn { ns, chain: said["chain"].as_f64().unwrap_or(f64::NAN), clock })
    }

    fn judge(&mut self) -> Outcome {
        self.judged("now").unwrap_or_else(|outcome| outcome)
    }

    fn left(&mut self) -> Outcome {
        let left = self.judged("left").unwrap_or_else(|outcome| outcome);
        if left.is_red() {
            return left;
        }
        if self.ask(&json!({"time": "end"}), "ended").is_ok()
            && let Some(guest) = self.guest.take()
        {
            self.kernel.put_back(guest);
        }
        let seed = self.spec.seed.wrapping_add(self.draws.len() as u64);
        let fresh = Spec { seed, ..self.spec.clone() };
        outcome::<O>(&fresh, &self.kernel, None).unwrap_or_else(Outcome::Error)
    }

    fn plan(&self) -> &str {
        &self.told
    }

    fn factors(&self) -> Activations {
        // What is stored narrow may be multiplied so, whatever is declared: nothing is rounded by it.
        match self.spec.dtype {
            Dtype::Bf16 | Dtype::F16 => Activations::Bf16,
            _ => factors(&self.plan),
        }
    }
}
