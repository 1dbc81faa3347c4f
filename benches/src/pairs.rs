//! Two programs beside each other, on the same problem in turns.
//!
//! Each side is a process, `karat turns`, of one of two builds: it keeps the problem ready and runs a turn
//! when it is asked. Turns go A, B, B, A and B, A, A, B: what changes evenly while four of them run
//! falls on both sides alike. A launch is a fresh pair of processes, as where a program happens to lie in
//! memory makes it faster or slower for as long as it runs.

pub mod child;
pub mod verdict;

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use golden::Clock;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};

use crate::{stats::median, turns::throttled};

/// What the two sides speak: builds that speak another are not asked.
pub const PROTOCOL: u64 = 1;

/// The longest that a side may take for one reply, in seconds.
const PATIENCE: i64 = 600;

/// A build, and what is asked of it.
#[derive(Clone, Debug)]
pub struct Build {
    /// The program.
    pub program: PathBuf,
    /// Threads that it computes on; all there are without.
    pub threads: Option<usize>,
    /// Work that is planted in it, as a share of each problem's.
    pub extra: f64,
    /// A fault of the variant that is planted in it.
    pub fault: Option<String>,
}

/// What is asked of a launch.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Turns on each side, halved.
    pub quads: usize,
    /// Times of a turn.
    pub calls: usize,
    /// Whether answers are judged before the first turn and after the last.
    pub judged: bool,
}

/// Why there is no launch.
#[derive(Clone, Debug, PartialEq)]
pub enum Stopped {
    /// A program that cannot be started, or does not speak the protocol.
    Unfit(String),
    /// A side is no more, or takes too long.
    Died(String),
    /// Whoever watches ended it.
    Interrupted,
}

/// What a side said of a problem.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Told {
    /// The outcome's name; before the first turn or, if that was green, after the last.
    pub outcome: String,
    /// Why, where a reason belongs to it.
    pub why: Option<String>,
    /// The largest share of an allowance that an output used.
    pub budget: f64,
    /// How the variant rounds.
    pub plan: String,
    /// Bytes of the problem, and operations.
    pub work: (u64, u64),
    /// Nanoseconds of a call, turn by turn.
    pub ns: Vec<f64>,
}

impl Told {
    /// Whether its answers are right.
    pub fn passed(&self) -> bool {
        self.outcome == "passed"
    }
}

/// One launch: a pair of processes on one problem.
#[derive(Clone, Debug, Default)]
pub struct Launch {
    /// Logarithms of B over A.
    pub quads: Vec<f64>,
    /// Quads that were dropped because the processor's clock was not itself.
    pub dropped: usize,
    /// What each side said.
    pub sides: [Told; 2],
}

/// One of two processes.
struct Side {
    process: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
    name: String,
}

impl Side {
    fn start(build: &Build) -> Result<Side, Stopped> {
        let name = build.program.display().to_string();
        let unfit = |why: &dyn std::fmt::Display| Stopped::Unfit(format!("{name}: {why}"));
        let mut command = Command::new(&build.program);
        command.arg("turns").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        if let Some(threads) = build.threads {
            command.args(["--threads", &threads.to_string()]);
        }
        let mut process = command.spawn().map_err(|e| unfit(&e))?;
        let (Some(to), Some(from)) = (process.stdin.take(), process.stdout.take()) else {
            return Err(unfit(&"has no standard streams"));
        };
        let mut side = Side { process, to, from: BufReader::new(from), name: name.clone() };
        let hello = side.reply().map_err(|_| unfit(&"does not know `karat turns`"))?;
        match hello["turns"].as_u64() {
            Some(PROTOCOL) => Ok(side),
            Some(other) => {
                Err(unfit(&format!("speaks protocol {other} of `karat turns`, not {PROTOCOL}")))
            }
            None => Err(unfit(&"does not know `karat turns`")),
        }
    }

    fn ask(&mut self, request: &Value) -> Result<Value, Stopped> {
        // Who does not read does not reply.
        let _ = self.to.write_all(format!("{request}\n").as_bytes());
        let reply = self.reply()?;
        match reply["error"].as_str() {
            Some(error) => Err(Stopped::Died(format!("{}: {error}", self.name))),
            None => Ok(reply),
        }
    }

    fn reply(&mut self) -> Result<Value, Stopped> {
        let mut line = String::new();
        let patience = Timespec { tv_sec: PATIENCE, tv_nsec: 0 };
        let waited = {
            let mut ready = [PollFd::new(self.from.get_ref(), PollFlags::IN)];
            poll(&mut ready, Some(&patience))
        };
        let died = |how: String| Stopped::Died(format!("{}: {how}", self.name));
        match waited {
            Ok(0) => return Err(died(format!("no reply within {PATIENCE} s"))),
            Err(rustix::io::Errno::INTR) => return Err(Stopped::Interrupted),
            _ => {}
        }
        let read = self.from.read_line(&mut line);
        if let (Ok(_), Ok(reply)) = (read, serde_json::from_str(&line)) {
            return Ok(reply);
        }
        let _ = self.process.kill();
        let how = match self.process.wait() {
            Ok(status) => match status.signal() {
                // The other end of Ctrl-C.
                Some(2) => return Err(Stopped::Interrupted),
                Some(signal) => format!("ended by signal {signal}"),
                None => format!("ended with {status}"),
            },
            Err(error) => error.to_string(),
        };
        Err(Stopped::Died(format!("{}: {how}", self.name)))
    }

    fn load(&mut self, case: &str, build: &Build, judged: bool) -> Result<Told, Stopped> {
        let Build { extra, fault, .. } = build;
        let reply = self.ask(
            &json!({"ask": "load", "case": case, "extra": extra, "fault": fault, "judged": judged}),
        )?;
        Ok(told(&reply))
    }

    /// Nanoseconds of a call, the clock of the processor, and who held the clock.
    fn turn(
        &mut self,
        draw: usize,
        calls: usize,
        group: usize,
    ) -> Result<(f64, f64, String), Stopped> {
        let reply =
            self.ask(&json!({"ask": "turn", "draw": draw, "calls": calls, "group": group}))?;
        let ns: Vec<f64> =
            reply["ns"].as_array().into_iter().flatten().filter_map(Value::as_f64).collect();
        // Builds that do not say so held it themselves.
        let clock = reply["clock"].as_str().unwrap_or(Clock::Host.name()).to_owned();
        Ok((median(&ns), reply["chain"].as_f64().unwrap_or(f64::NAN), clock))
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What a reply says of answers.
fn told(reply: &Value) -> Told {
    let text = |name: &str| reply[name].as_str().map(str::to_owned);
    Told {
        outcome: text("outcome").unwrap_or_default(),
        why: text("why"),
        budget: reply["budget"].as_f64().unwrap_or(f64::INFINITY),
        plan: text("plan").unwrap_or_default(),
        work: (reply["bytes"].as_u64().unwrap_or(0), reply["flops"].as_u64().unwrap_or(0)),
        ns: Vec::new(),
    }
}

/// Sets both sides on one processor where each computes on one thread: they never run at once, and one
/// processor may have a busier neighbour than another. It is the one on which the system has put A.
fn together(sides: &mut [Side; 2], builds: &[Build; 2]) -> Result<(), Stopped> {
    if builds.iter().any(|build| build.threads != Some(1)) {
        return Ok(());
    }
    let processor = sides[0].ask(&json!({"ask": "where"}))?["processor"].take();
    for side in sides {
        side.ask(&json!({"ask": "pin", "processor": processor}))?;
    }
    Ok(())
}

/// Runs one launch. Answers that are red, on either side, end it: then there are no quads.
///
/// # Errors
/// If a side cannot be had or dies, or `go_on` returns false.
pub fn launch(
    case: &str,
    builds: &[Build; 2],
    plan: Plan,
    go_on: &mut dyn FnMut() -> bool,
) -> Result<Launch, Stopped> {
    let mut sides = [Side::start(&builds[0])?, Side::start(&builds[1])?];
    let mut said = Launch::default();
    for ((side, build), told) in sides.iter_mut().zip(builds).zip(&mut said.sides) {
        *told = side.load(case, build, plan.judged)?;
    }
    if !said.sides.iter().all(Told::passed) {
        return Ok(said);
    }
    let mut group = 1;
    for side in &mut sides {
        let warm = side.ask(&json!({"ask": "warm"}))?;
        group = group.max(warm["group"].as_u64().unwrap_or(1) as usize);
    }
    together(&mut sides, builds)?;
    let mut quads: Vec<(f64, [f64; 4])> = Vec::with_capacity(plan.quads);
    for quad in 0..plan.quads {
        if !go_on() {
            return Err(Stopped::Interrupted);
        }
        let order = if quad % 2 == 0 { [0, 1, 1, 0] } else { [1, 0, 0, 1] };
        let (mut sums, mut chains) = ([0.0; 2], [0.0; 4]);
        let mut clocks = [String::new(), String::new()];
        for (at, chain) in order.into_iter().zip(&mut chains) {
            let (ns, of_clock, by) = sides[at].turn(quad, plan.calls, group)?;
            clocks[at] = by;
            sums[at] += ns;
            *chain = of_clock;
            said.sides[at].ns.push(ns);
        }
        let [a, b] = &clocks;
        if a != b {
            let why = format!("{case}: one build is timed by its {a}, the other by its {b}");
            return Err(Stopped::Unfit(why));
        }
        quads.push(((sums[1] / sums[0]).ln(), chains));
    }
    let chains: Vec<f64> = quads.iter().flat_map(|(_, chains)| *chains).collect();
    let slow = throttled(&chains);
    for ((log, _), slow) in quads.iter().zip(slow.chunks(4)) {
        if slow.contains(&true) || !log.is_finite() {
            said.dropped += 1;
        } else {
            said.quads.push(*log);
        }
    }
    if plan.judged {
        for (side, told_before) in sides.iter_mut().zip(&mut said.sides) {
            let after = told(&side.ask(&json!({"ask": "left"}))?);
            told_before.outcome = after.outcome;
            told_before.why = after.why;
        }
    }
    Ok(said)
}

/// Where a side of a pair is this program itself.
pub fn both(program: &Path, threads: Option<usize>) -> [Build; 2] {
    let build = Build { program: program.to_owned(), threads, extra: 0.0, fault: None };
    [build.clone(), build]
}
