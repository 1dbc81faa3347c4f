//! `karat turns`: the process that keeps a problem ready and runs turns of it.
//!
//! Requests come as lines of JSON on standard input, replies go to standard output, one for each.

use std::{
    io::{self, BufRead, Write},
    time::Duration,
};

use golden::Error;
use rustix::{
    process::{Pid, Signal, set_parent_process_death_signal},
    thread::{CpuSet, sched_getcpu, sched_setaffinity},
};
use serde_json::{Value, json};

use super::PROTOCOL;
use crate::{
    plan::spelled,
    registry,
    report::Outcome,
    turns::{Asked, Timed, warm_up},
};

/// The longest that a problem is run before it counts.
const WARM: Duration = Duration::from_millis(300);

/// Answers until nobody asks any more.
///
/// # Errors
/// If standard input or output are not what a host gives.
pub fn serve() -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // On one of the threads that kernels use: handing work over to them is no part of it.
    rayon::scope(|_| answers())
}

fn answers() -> io::Result<()> {
    let reply = |value: &Value| {
        let mut out = io::stdout().lock();
        out.write_all(format!("{value}\n").as_bytes()).and_then(|()| out.flush())
    };
    reply(&json!({"turns": PROTOCOL, "version": env!("CARGO_PKG_VERSION")}))?;
    let mut ready = None;
    for line in io::stdin().lock().lines() {
        let request: Value = serde_json::from_str(&line?)?;
        let answer = answer(&request, &mut ready);
        reply(&answer.unwrap_or_else(|error| json!({"error": error.to_string()})))?;
    }
    Ok(())
}

fn answer(request: &Value, ready: &mut Option<Box<dyn Timed>>) -> Result<Value, Error> {
    let number = |name: &str| request[name].as_u64().unwrap_or(1) as usize;
    let asked = request["ask"].as_str().unwrap_or_default();
    if asked == "load" {
        return Ok(load(request, ready));
    }
    let timed = ready.as_mut().ok_or("nothing is loaded")?;
    Ok(match asked {
        "warm" => {
            let warm = warm_up(&mut **timed, WARM)?;
            json!({"group": warm.group, "ns": warm.ns, "stable": warm.stable})
        }
        "turn" => {
            let turn = timed.turn(number("draw"), number("calls"), number("group"))?;
            json!({"ns": turn.ns, "chain": turn.chain, "clock": turn.clock.name()})
        }
        "left" => outcome(&timed.left()),
        "where" => json!({"processor": sched_getcpu()}),
        "pin" => {
            pin(number("processor"));
            json!({})
        }
        other => {
            return Err(
                format!("ask {other:?} is none of load, warm, where, pin, turn and left").into()
            );
        }
    })
}

/// Makes a problem ready, and says what its answers come to.
fn load(request: &Value, ready: &mut Option<Box<dyn Timed>>) -> Value {
    let case = request["case"].as_str().unwrap_or_default();
    let known =
        spelled(case).and_then(|(op, spec, variant)| Some((registry::op(op)?, spec, variant?)));
    // A build may lack what the other one has.
    let Some((entry, spec, variant)) = known else {
        return json!({"outcome": "missing", "why": format!("no case {case}")});
    };
    let cost = match entry.parse(spec) {
        Ok(parsed) => parsed.cost,
        Err(why) => return json!({"outcome": "missing", "why": why}),
    };
    if !entry.variants().iter().any(|known| known == variant) {
        return json!({"outcome": "missing", "why": format!("no variant {variant}")});
    }
    let extra = request["extra"].as_f64().unwrap_or(0.0);
    let fault = request["fault"].as_str().map(str::to_owned);
    let asked = Asked { extra, fault, ..Asked::of(cost.bytes) };
    let mut timed = match entry.timed(spec, variant, &asked) {
        Ok(timed) => timed,
        Err(found) => return outcome(&found),
    };
    let mut said = if request["judged"] == true {
        outcome(&timed.judge())
    } else {
        json!({"outcome": "passed"})
    };
    said["plan"] = timed.plan().into();
    said["bytes"] = cost.bytes.into();
    said["flops"] = cost.flops.into();
    *ready = Some(timed);
    said
}

/// Sets every thread of this process on a processor. That the system does not let it makes times noisier,
/// not wrong.
fn pin(processor: usize) {
    let mut set = CpuSet::new();
    set.set(processor);
    let threads = std::fs::read_dir("/proc/self/task").into_iter().flatten().filter_map(Result::ok);
    for thread in threads {
        let id = thread.file_name().to_str().and_then(|name| name.parse().ok());
        if let Some(id) = id.and_then(Pid::from_raw) {
            let _ = sched_setaffinity(Some(id), &set);
        }
    }
}

fn outcome(outcome: &Outcome) -> Value {
    let budget = outcome.findings().iter().map(|finding| finding.budget).fold(0.0, f64::max);
    json!({"outcome": outcome.name(), "why": outcome.why(), "budget": budget})
}
