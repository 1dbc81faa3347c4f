//! How fast ways to compute one problem are, beside what the machine can do.
//!
//! All ways take turns, there and back, and the machine's own pace is sampled between the turns. A time is
//! told only of answers that were right before the first turn and after the last.

use golden::{Clock, plan::Activations};
use optimized::cpu::{roof::Work, timed::Cost};

use crate::{
    plan::Job,
    report::Outcome,
    roofline::{Bound, Machine, Pace},
    stats::median,
    turns::{self, Asked, Timed, Warm, throttled, warm_up},
};

/// What is asked.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Turns of each way.
    pub rounds: usize,
    /// Times of a turn.
    pub calls: usize,
    /// Bytes that are walked before each call, if caches are to hold nothing.
    pub away: Option<usize>,
    /// Bytes that the caches of this machine hold, if it tells.
    pub caches: Option<u64>,
}

/// Turns between two looks at the machine's pace.
const BETWEEN: usize = 10;

/// The share of a roof above which a time is not believed: paces are sampled, and scatter too.
const BEYOND: f64 = 1.25;

/// One way, timed.
#[derive(Clone, Debug)]
pub struct Timing {
    /// What its answers came to; where that is not green there are no times.
    pub checked: Outcome,
    /// How it rounds.
    pub plan: String,
    /// Nanoseconds of a call, as they were taken.
    pub samples: Vec<f64>,
    /// Times that were dropped because the processor's clock was not itself.
    pub throttled: usize,
    /// How it warmed up.
    pub warm: Option<Warm>,
    /// Who held the clock.
    pub clock: Option<Clock>,
    /// The least time as a share of what it takes, and what sets it.
    pub share: Option<(f64, Bound)>,
}

impl Timing {
    fn without(checked: Outcome) -> Timing {
        let (samples, plan) = (Vec::new(), String::new());
        Timing { checked, plan, samples, throttled: 0, warm: None, clock: None, share: None }
    }

    /// Nanoseconds of a call, in the middle.
    pub fn median(&self) -> Option<f64> {
        (!self.samples.is_empty()).then(|| median(&self.samples))
    }

    /// The largest share of an allowance that an output used.
    pub fn budget(&self) -> f64 {
        self.checked.findings().iter().map(|finding| finding.budget).fold(0.0, f64::max)
    }
}

/// A way that is being timed.
struct Running {
    timed: Box<dyn Timed>,
    warm: Warm,
    turns: Vec<turns::Turn>,
    checked: Outcome,
}

/// Times all these ways to compute one problem.
pub fn run(jobs: &[Job], options: &Options, machine: &mut Option<Machine>) -> Vec<Timing> {
    let mut all: Vec<Result<Running, Outcome>> =
        jobs.iter().map(|job| ready(job, options)).collect();
    let mut paces: Vec<Vec<Pace>> = jobs.iter().map(|_| Vec::new()).collect();
    let mut look = |paces: &mut [Vec<Pace>], all: &[Result<Running, Outcome>]| {
        for ((job, running), paces) in jobs.iter().zip(all).zip(paces) {
            // The roof of another device is not this one.
            if let Ok(running) = running
                && job.device() == "cpu"
            {
                let cost = cost(job, &*running.timed, options);
                paces.push(machine.get_or_insert_with(Machine::new).pace(&cost));
            }
        }
    };
    for round in 0..options.rounds {
        if round % BETWEEN == 0 {
            look(&mut paces, &all);
        }
        let mut order: Vec<usize> = (0..all.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for at in order {
            let Ok(running) = &mut all[at] else { continue };
            let group = running.warm.group;
            match running.timed.turn(round, options.calls, group) {
                Ok(turn) => running.turns.push(turn),
                Err(error) => all[at] = Err(crate::foreign::ended(error)),
            }
        }
    }
    look(&mut paces, &all);
    let told = jobs.iter().zip(all).zip(&paces);
    told.map(|((job, running), paces)| match running {
        Ok(running) => judged(job, running, paces, options),
        Err(outcome) => Timing::without(outcome),
    })
    .collect()
}

/// A job that is judged and warm.
fn ready(job: &Job, options: &Options) -> Result<Running, Outcome> {
    let asked = Asked { away: options.away, ..Asked::of(job.parsed.cost.bytes) };
    let mut timed = job.timed(&asked)?;
    let checked = timed.judge();
    if checked.is_red() {
        return Err(checked);
    }
    let most = std::time::Duration::from_millis(300);
    let warm = warm_up(&mut *timed, most).map_err(crate::foreign::ended)?;
    Ok(Running { timed, warm, turns: Vec::new(), checked })
}

fn judged(job: &Job, mut running: Running, paces: &[Pace], options: &Options) -> Timing {
    let after = running.timed.left();
    if after.is_red() {
        return Timing::without(after);
    }
    let chains: Vec<f64> = running.turns.iter().map(|turn| turn.chain).collect();
    let slow = throttled(&chains);
    let mut samples = Vec::new();
    let mut dropped = 0;
    for (turn, slow) in running.turns.iter().zip(slow) {
        if slow {
            dropped += turn.ns.len();
        } else {
            samples.extend(&turn.ns);
        }
    }
    let cost = cost(job, &*running.timed, options);
    let least: Vec<(f64, Bound)> = paces.iter().filter_map(|pace| pace.least(&cost)).collect();
    let share = least.first().map(|&(_, bound)| {
        let seconds: Vec<f64> = least.iter().map(|(least, _)| *least).collect();
        (median(&seconds) * 1e9 / median(&samples), bound)
    });
    let plan = running.timed.plan().to_owned();
    let warm = Some(running.warm);
    let clock = running.turns.first().map(|turn| turn.clock);
    let checked = running.checked;
    let mut timing = Timing { checked, plan, samples, throttled: dropped, warm, clock, share };
    if let Some((share, _)) = share
        && BEYOND < share
    {
        let why = format!("{:.0} % of what this machine can do: not believed", 100.0 * share);
        timing.checked = Outcome::Mistrusted(why);
        timing.samples.clear();
    }
    timing
}

/// What a call has to do at the least: memory counts where caches do not hold the problem.
fn cost(job: &Job, timed: &dyn Timed, options: &Options) -> Cost {
    let golden::Cost { bytes, flops } = job.parsed.cost;
    let cached = options.away.is_none() && options.caches.is_none_or(|caches| bytes <= caches);
    let word = match timed.factors() {
        // Codes of FP8 have no products of their own there.
        Activations::F32 | Activations::Fp8 => Work::F32,
        Activations::Bf16 => Work::Bf16,
        Activations::Int8 => Work::Int8,
    };
    // The pace of products is that of instructions which karat has; the matrix units of a processor, which a
    // foreign kernel may use, are faster.
    let matrix_units = || crate::host().features.contains(&"amx_bf16");
    let faster = job.foreign.is_some() && word != Work::F32 && matrix_units();
    let operations = if faster { 0 } else { flops };
    Cost { read: if cached { 0 } else { bytes }, changed: 0, operations, word }
}
