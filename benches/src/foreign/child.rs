//! The other side: `karat child`, in which foreign code runs.
//!
//! Requests come as lines of JSON on standard input, replies go to what was standard output; foreign
//! code gets neither. It may say what it likes on standard error.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Write},
    os::fd::AsFd,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use golden::{Error, Op, Spec, Tensors, Variant, recording::serialize, tensor::Read};
use optimized::doors::{Fault, Foreign, Manifest, World};
use rustix::{
    io::dup,
    process::{Resource, Rlimit, Signal, set_parent_process_death_signal, setrlimit},
    stdio::{dup2_stdin, dup2_stdout},
};
use serde_json::{Value, json};

use super::bundle::{Bundle, bundled};
use crate::{
    evidence::held,
    guard,
    registry::{self, Entry, drawn},
    report::Outcome,
    turns::{Asked, Run, Standing},
};

/// Opens the door of a kernel and answers until nobody asks any more.
///
/// # Errors
/// If standard input or output are not what a host gives.
pub fn serve(kernel: &Path, world: &World) -> io::Result<()> {
    confine(world.memory)?;
    let requests = BufReader::new(File::from(dup(io::stdin().as_fd())?));
    let mut replies = File::from(dup(io::stdout().as_fd())?);
    dup2_stdin(File::open("/dev/null")?)?;
    dup2_stdout(io::stderr().as_fd())?;
    let mut reply = |value: Value| replies.write_all(format!("{value}\n").as_bytes());
    let ops = |name: &str| registry::op(name).map(Entry::known);
    let opened = Manifest::read(kernel, &ops)
        .map_err(Fault::Refused)
        .and_then(|manifest| Foreign::open(manifest, world));
    let foreign = match opened {
        Ok(foreign) => foreign,
        Err(fault) => {
            let (door, why) = match fault {
                Fault::Refused(why) => ("refused", why),
                Fault::Unfit(why) => ("unfit", why),
                Fault::Died(why) => ("died", why),
            };
            return reply(json!({"door": door, "why": why}));
        }
    };
    reply(json!({"door": "open"}))?;
    let mut standing = None;
    for line in requests.lines() {
        let request: Value = serde_json::from_str(&line?)?;
        let text = |name: &str| request[name].as_str().unwrap_or_default().to_owned();
        let run = || -> Result<Value, Error> {
            if request["time"].is_string() {
                return timed(&request, &foreign, &mut standing);
            }
            let entry = registry::op(&text("op")).ok_or("no such op")?;
            let inputs = request["inputs"].as_str().map(Path::new);
            entry.answer(&text("spec"), &foreign, inputs, Path::new(&text("file")))
        };
        reply(match catch_unwind(AssertUnwindSafe(run)) {
            Ok(Ok(said)) => said,
            Ok(Err(error)) => match error.downcast_ref::<Fault>() {
                Some(Fault::Unfit(why)) if request["time"].is_string() => {
                    json!({"said": "unsupported", "why": why})
                }
                Some(Fault::Refused(why) | Fault::Unfit(why)) => {
                    json!({"said": "refused", "why": why})
                }
                _ => json!({"said": "died", "why": error.to_string()}),
            },
            Err(_) => json!({"said": "died", "why": "it panicked"}),
        })?;
    }
    Ok(())
}

/// Keeps a problem ready, and runs turns of it.
fn timed(
    request: &Value,
    foreign: &Foreign,
    standing: &mut Option<Box<dyn Standing>>,
) -> Result<Value, Error> {
    let text = |name: &str| request[name].as_str().unwrap_or_default();
    let number = |name: &str| request[name].as_u64().map(|number| number as usize);
    if text("time") == "end" {
        *standing = None;
        return Ok(json!({"said": "ended"}));
    }
    if text("time") == "begin" {
        *standing = None;
        let entry = registry::op(text("op")).ok_or("no such op")?;
        let draws = number("draws").unwrap_or(1);
        let asked = Asked { draws, away: number("away"), extra: 0.0, fault: None };
        *standing = Some(entry.standing(text("spec"), foreign, &asked)?);
        return Ok(json!({"said": "ready"}));
    }
    let standing = standing.as_mut().ok_or("nothing is ready")?;
    if text("time") == "turn" {
        let [draw, calls, group] = ["draw", "calls", "group"].map(|name| number(name).unwrap_or(1));
        let turn = standing.turn(draw, calls, group)?;
        let clock = turn.clock.name();
        return Ok(json!({"said": "turn", "ns": turn.ns, "chain": turn.chain, "clock": clock}));
    }
    let run = if text("time") == "now" { Run::Now } else { Run::Before };
    Ok(match standing.answers(run, Path::new(text("file")))? {
        Ok(()) => json!({"said": "answers"}),
        Err(outcome) => told(outcome),
    })
}

/// What a kernel did that it should not have.
fn told(outcome: Outcome) -> Value {
    match outcome {
        Outcome::Cheat(why) => json!({"said": "cheat", "why": why}),
        outcome => json!({"said": "mistrusted", "why": outcome.why()}),
    }
}

/// No more memory than that, no core files, no life after the host's.
///
/// The limit is on writable private memory (`RLIMIT_DATA`), not on addresses (`RLIMIT_AS`): CUDA and
/// large frameworks reserve and map far more than they use.
fn confine(memory: u64) -> io::Result<()> {
    let limit = |bytes| Rlimit { current: Some(bytes), maximum: Some(bytes) };
    setrlimit(Resource::Data, limit(memory))?;
    setrlimit(Resource::Core, limit(0))?;
    set_parent_process_death_signal(Some(Signal::KILL))?;
    Ok(())
}

/// Runs a kernel under watch and leaves its answers in a file: one answer to the inputs that were
/// sent, or three to those that are drawn.
pub(crate) fn answer<O: Op>(
    spec: &Spec<O::Case>,
    foreign: &Foreign,
    inputs: Option<&Path>,
    file: &Path,
) -> Result<Value, Error> {
    if let Some(sent) = inputs {
        let sent = std::fs::read(sent)?;
        let inputs = O::Inputs::read(&Bundle::open(&sent)?)?;
        let mut prepared = foreign.prepare(spec, &inputs)?;
        return Ok(match guard::watched::<O>(&mut *prepared, &inputs)? {
            Ok(outputs) => {
                std::fs::write(file, bundled(&outputs)?)?;
                json!({"said": "answers"})
            }
            Err(outcome) => told(outcome),
        });
    }
    let (inputs, others) = (drawn::<O>(spec), drawn::<O>(&other(spec)));
    let answers = match guard::suspect::<O>(foreign, spec, &inputs, &others)? {
        Ok(answers) => answers,
        Err(outcome) => return Ok(told(outcome)),
    };
    let all = [("before", &answers.before), ("first", &answers.first), ("moved", &answers.moved)];
    let mut tensors = Vec::new();
    for (when, outputs) in all {
        let named = outputs.tensors().into_iter();
        tensors.extend(named.map(|(name, view)| (format!("{when}/{name}"), held(view))));
    }
    std::fs::write(file, serialize(&tensors, &[])?)?;
    Ok(json!({"said": "answers"}))
}

/// The same problem with other numbers.
pub(crate) fn other<C: golden::Case>(spec: &Spec<C>) -> Spec<C> {
    Spec { seed: spec.seed ^ 0x07e5, ..spec.clone() }
}
