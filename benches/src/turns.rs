//! One problem, run again and again for its time.
//!
//! A turn takes inputs that the turn before did not have, poisons the outputs, runs the kernel once for the
//! caches and then for the clock. What is timed is what is judged: the answers of the first turn before
//! anything counts, those that the last turn left after everything has.

use std::{path::Path, sync::Arc, time::Duration};

use golden::{Clock, Error, plan::Activations};
use optimized::doors::Foreign;

use crate::{
    clock::{self, time},
    foreign::Kernel,
    report::Outcome,
    stats::median,
};

/// How a problem is run.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Inputs that take turns, each drawn from a seed of its own.
    pub draws: usize,
    /// Work that is done besides, as a share of the problem's: a slow-down that is planted.
    pub extra: f64,
    /// A fault of the variant that is planted.
    pub fault: Option<String>,
    /// Bytes that are walked before each call, so that caches hold nothing of it.
    pub away: Option<usize>,
}

impl Asked {
    /// Warm, nothing planted, few enough draws for a problem that moves so many bytes.
    pub fn of(bytes: u64) -> Asked {
        const ALL: u64 = 1 << 28;
        let draws = (ALL / bytes.max(1)).clamp(2, 4) as usize;
        Asked { draws, extra: 0.0, fault: None, away: None }
    }
}

/// What one turn took.
#[derive(Clone, Debug, PartialEq)]
pub struct Turn {
    /// Nanoseconds of a call, each the mean of a group.
    pub ns: Vec<f64>,
    /// Nanoseconds of a fixed chain of operations right before: the clock of the processor.
    pub chain: f64,
    /// Who held the clock.
    pub clock: Clock,
}

impl Turn {
    /// What the turn says of a call.
    pub fn middle(&self) -> f64 {
        median(&self.ns)
    }
}

/// A problem that is ready to be run.
pub trait Timed {
    /// One turn on the inputs of that number: `calls` times are taken, each of `group` calls in a row.
    ///
    /// # Errors
    /// If it cannot be run.
    fn turn(&mut self, draw: usize, calls: usize, group: usize) -> Result<Turn, Error>;
    /// What its answers come to, of every draw, run once under guard.
    fn judge(&mut self) -> Outcome;
    /// What the answers come to that the last turns left.
    fn left(&mut self) -> Outcome;
    /// How it rounds, as one line: another one is another computation.
    fn plan(&self) -> &str;
    /// What its products read.
    fn factors(&self) -> Activations;
}

/// Who can be timed.
pub trait Times: Sync {
    /// A problem, ready to be run.
    ///
    /// # Errors
    /// The outcome, if it does not come to that.
    fn timed(&self, spec: &str, variant: &str, asked: &Asked) -> Result<Box<dyn Timed>, Outcome>;
    /// The same of a foreign kernel, which is kept ready in a process of its own.
    ///
    /// # Errors
    /// The outcome, if it does not come to that.
    fn timed_foreign(
        &self,
        spec: &str,
        kernel: &Arc<Kernel>,
        asked: &Asked,
    ) -> Result<Box<dyn Timed>, Outcome>;
    /// In that process: a problem that an opened kernel is ready for.
    ///
    /// # Errors
    /// If it is not.
    fn standing(
        &self,
        spec: &str,
        kernel: &Foreign,
        asked: &Asked,
    ) -> Result<Box<dyn Standing>, Error>;
}

/// A problem that a foreign kernel is ready for, as its process has it. Nothing is judged there.
pub trait Standing {
    /// See [`Timed::turn`].
    ///
    /// # Errors
    /// If it cannot be run.
    fn turn(&mut self, draw: usize, calls: usize, group: usize) -> Result<Turn, Error>;
    /// Leaves the answers to all draws in a file: those of a run under guard, or those that the last turns
    /// left. What it did that it should not have, if anything.
    ///
    /// # Errors
    /// If there are none.
    fn answers(&mut self, run: Run, file: &Path) -> Result<Result<(), Outcome>, Error>;
}

/// Whose answers are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Run {
    /// One more run, under guard.
    Now,
    /// What was timed last.
    Before,
}

/// How a problem warmed up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Warm {
    /// Calls that are timed together, so that what is timed is longer than the clock's step.
    pub group: usize,
    /// Nanoseconds of a call in the end.
    pub ns: f64,
    /// Whether the last turns agreed before the time was over.
    pub stable: bool,
}

/// The shortest time that is taken, in nanoseconds. Between an event of a device and the first launch after it
/// pass some microseconds, which are to be less than a hundredth.
fn shortest(clock: Clock) -> f64 {
    match clock {
        Clock::Host | Clock::Program => 20e3,
        Clock::Events | Clock::Replays => 1e6,
    }
}

/// How far the last turns may be apart, and how many they are.
const APART: f64 = 0.03;
const LAST: usize = 4;

/// Runs a problem until its time no longer changes, or so long.
///
/// # Errors
/// If it cannot be run.
pub fn warm_up(timed: &mut dyn Timed, most: Duration) -> Result<Warm, Error> {
    let watch = clock::Stopwatch::new();
    let first = timed.turn(0, 3, 1)?;
    let shortest = shortest(first.clock);
    let group = (shortest / first.middle().max(1.0)).ceil().clamp(1.0, 1e5) as usize;
    let mut last: Vec<f64> = Vec::new();
    loop {
        last.push(timed.turn(last.len(), 3, group)?.middle());
        let tail = &last[last.len().saturating_sub(LAST)..];
        let middle = median(tail);
        let agree = tail.iter().all(|x| (x - middle).abs() <= APART * middle);
        let stable = tail.len() == LAST && agree;
        if stable || most <= watch.elapsed() {
            let group = (shortest / middle.max(0.1)).ceil().clamp(1.0, 1e6) as usize;
            return Ok(Warm { group, ns: middle, stable });
        }
    }
}

/// Memory that is walked so that caches hold nothing else.
pub(crate) struct Away(Vec<u64>);

impl Away {
    pub(crate) fn new(bytes: usize) -> Away {
        Away(vec![1; bytes / size_of::<u64>()])
    }

    /// Bytes.
    pub(crate) fn bytes(&self) -> usize {
        size_of_val(&*self.0)
    }

    /// Reads and writes a word of every line of it.
    pub(crate) fn walk(&mut self) {
        for word in self.0.iter_mut().step_by(8) {
            *word = std::hint::black_box(word.wrapping_add(1));
        }
    }
}

/// One turn of something that is called.
pub(crate) fn turn(
    calls: usize,
    group: usize,
    away: &mut Option<Away>,
    call: &mut dyn FnMut() -> Result<(), Error>,
) -> Result<Turn, Error> {
    if away.is_none() {
        call()?;
    }
    let chain = clock::chain().as_nanos() as f64;
    let mut ns = Vec::with_capacity(calls);
    for _ in 0..calls {
        // What was walked past is cold for one call, not for a group.
        let group = if let Some(away) = away {
            away.walk();
            1
        } else {
            group
        };
        let (done, took) = time(|| (0..group).try_for_each(|_| call()));
        done?;
        ns.push(took.as_nanos() as f64 / group as f64);
    }
    Ok(Turn { ns, chain, clock: Clock::Host })
}

/// Which of some turns were taken while the processor went at less than three quarters of its usual
/// pace: a clock that was throttled, or somebody else who was served.
pub fn throttled(chains: &[f64]) -> Vec<bool> {
    let usual = median(chains);
    chains.iter().map(|&chain| chain.is_nan() || usual < 0.75 * chain).collect()
}

#[cfg(test)]
mod tests {
    use golden::{Clock, Error, plan::Activations};

    use super::{Away, Timed, Turn, throttled, turn, warm_up};
    use crate::report::Outcome;

    /// Turns whose times are given.
    struct Told(Vec<f64>, usize);

    impl Timed for Told {
        fn turn(&mut self, _: usize, calls: usize, _: usize) -> Result<Turn, Error> {
            let ns = self.0[self.1.min(self.0.len() - 1)];
            self.1 += 1;
            Ok(Turn { ns: vec![ns; calls], chain: 1.0, clock: Clock::Host })
        }

        fn judge(&mut self) -> Outcome {
            Outcome::Timeout
        }

        fn left(&mut self) -> Outcome {
            Outcome::Timeout
        }

        fn plan(&self) -> &'static str {
            ""
        }

        fn factors(&self) -> Activations {
            Activations::F32
        }
    }

    #[test]
    fn warming_up_ends_when_turns_agree() {
        let most = std::time::Duration::from_secs(10);
        let mut told = Told(vec![900.0, 800.0, 500.0, 200.0, 101.0, 100.0, 99.0, 100.0], 0);
        let warm = warm_up(&mut told, most).unwrap();
        assert_eq!((told.1, warm.group, warm.stable), (8, 200, true));
        let mut never = Told((0..1 << 20).map(|i| f64::from(1 + i % 7)).collect(), 0);
        let warm = warm_up(&mut never, std::time::Duration::ZERO).unwrap();
        assert!(!warm.stable);
    }

    #[test]
    fn a_turn_runs_once_for_the_caches_and_then_in_groups() {
        let mut calls = 0;
        let mut call = || {
            calls += 1;
            Ok(())
        };
        let warm = turn(5, 3, &mut None, &mut call).unwrap();
        assert_eq!(warm.ns.len(), 5);
        // A cold call has nobody before it.
        let cold = turn(2, 3, &mut Some(Away::new(1 << 12)), &mut call).unwrap();
        assert_eq!(cold.ns.len(), 2);
        assert_eq!(calls, 16 + 2);
        assert!(turn(1, 1, &mut None, &mut || Err("no".into())).is_err());
    }

    #[test]
    fn slow_clocks_are_told() {
        assert_eq!(throttled(&[10.0, 10.0, 11.0, 14.0, 10.0]), [false, false, false, true, false]);
        assert_eq!(throttled(&[10.0, f64::NAN, 10.0]), [false, true, false]);
        assert!(throttled(&[]).is_empty());
    }
}
