//! `karat gate --selftest`: does the gate see what is there, and nothing else?
//!
//! A trial is one question of the gate: launches of a real op beside itself. In half of the trials one
//! side does 5 % more work. What the case is off by itself is found first, from launches in which nothing
//! is planted.

use benches::pairs::{
    self, Build, Plan, launch,
    verdict::{self, Judged, Rule, Verdict, floor, paired},
};
use golden::Rng;
use serde_json::json;

use crate::{
    exit::{Exit, fail},
    out::{self, Out},
};

use super::stopped;

/// What is planted.
const EXTRA: f64 = 0.05;

/// Times of a turn: few, as all trials together are to take minutes.
const CALLS: usize = 3;

/// Launches of a trial, and those from which the floor is found.
const LAUNCHES: usize = 3;
const BEFORE: usize = 24;

/// The margin within which a pair is proven to be equal, given the time.
const EQUAL: f64 = 0.03;

/// The op: rows that are all the same work, so that a twentieth of them is a twentieth of it.
const CASE: &str = "rms_norm/N300-D512@cpu/portable";

#[derive(Clone, Copy, Debug, clap::Args)]
#[group(skip)]
pub(crate) struct Args {
    /// Show that the gate is to be believed: slow-downs of 5 % planted, and pairs with nothing planted
    #[arg(long)]
    pub(super) selftest: bool,
    /// Trials of each kind
    #[arg(long, default_value_t = 100, value_name = "N", requires = "selftest", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    trials: u32,
}

/// The order in which trials come is drawn from this.
const SEED: u64 = 11;

pub(super) fn run(args: Args, quads: u32, out: &Out) -> anyhow::Result<Exit> {
    let program = super::program()?;
    let watch = benches::clock::Stopwatch::new();
    let n = args.trials as usize;
    let bar = out.bar((BEFORE + 2 * n * LAUNCHES) as u64, "gate --selftest", false);
    let honest = pairs::both(&program, Some(1));
    let planted = {
        let [a, b] = honest.clone();
        [a, Build { extra: EXTRA, ..b }]
    };
    let mut go_on = || !out::interrupted();
    let mut one = |builds: &[Build; 2], judged: bool| -> anyhow::Result<_> {
        let plan = Plan { quads: quads as usize, calls: CALLS, judged };
        let found = launch(CASE, builds, plan, &mut go_on).map_err(stopped)?;
        bar.inc(1);
        if let Some(red) = found.sides.iter().find(|side| !side.passed()) {
            let why = red.why.clone().unwrap_or_default();
            return Err(fail(Exit::Wrong, format!("{CASE}: {}: {why}", red.outcome)));
        }
        Ok(found)
    };
    let before: Vec<_> = (0..BEFORE).map(|i| one(&honest, i == 0)).collect::<Result<_, _>>()?;
    let a_call = benches::stats::median(
        &before.iter().flat_map(|l| l.sides[0].ns.clone()).collect::<Vec<_>>(),
    );
    let floor = floor(&verdict::quads(&before), LAUNCHES, SEED);
    let rule = Rule::over(floor);
    let mut tally = Tally::default();
    for (i, plant) in order(n).into_iter().enumerate() {
        let builds = if plant { &planted } else { &honest };
        let launches: Vec<_> =
            (0..LAUNCHES).map(|_| one(builds, false)).collect::<Result<_, _>>()?;
        tally.dropped += launches.iter().map(|launch| launch.dropped).sum::<usize>();
        let logs = verdict::quads(&launches);
        let judged = paired(&logs, &rule, i as u64);
        tally.add(plant, judged, logs, i, out);
    }
    bar.finish_and_clear();
    // Answers are what they were.
    one(&honest, true)?;
    let seconds = watch.elapsed().as_secs_f64();
    Ok(tally.tell(&Ran { n, quads, floor, a_call, seconds }, out))
}

/// Which trials are planted, in the order in which they are run.
fn order(n: usize) -> Vec<bool> {
    let mut order: Vec<bool> = (0..2 * n).map(|i| i < n).collect();
    let mut rng = Rng::keyed("gate --selftest", SEED);
    for i in (1..order.len()).rev() {
        order.swap(i, rng.below(i + 1));
    }
    order
}

/// What the trials came to.
#[derive(Default)]
struct Tally {
    fired: usize,
    aa_fired: usize,
    /// Of pairs with nothing planted: those that were proven to be the same.
    same: usize,
    /// Ratios of both kinds.
    planted: Vec<f64>,
    honest: Vec<f64>,
    /// Quads of pairs with nothing planted, launch by launch.
    logs: Vec<Vec<f64>>,
    dropped: usize,
}

/// How it was run.
struct Ran {
    n: usize,
    quads: u32,
    floor: f64,
    a_call: f64,
    seconds: f64,
}

impl Tally {
    fn add(&mut self, plant: bool, judged: Judged, logs: Vec<Vec<f64>>, i: usize, out: &Out) {
        let called = judged.verdict == Verdict::Slower;
        if plant {
            self.fired += usize::from(called);
            self.planted.push(judged.ratio);
        } else {
            // Faster would be as false.
            self.aa_fired += usize::from(called || judged.verdict == Verdict::Faster);
            self.same += usize::from(judged.verdict == Verdict::Same);
            self.honest.push(judged.ratio);
            self.logs.extend(logs);
        }
        if out.verbose {
            let what = if plant { "5 % more work" } else { "nothing planted" };
            out.line(&format!(
                "trial {:>3}  {what:<16} {:<10} {:.4} [{:.4}, {:.4}]",
                i + 1,
                judged.verdict.name(),
                judged.ratio,
                judged.interval.lo,
                judged.interval.hi
            ));
        }
    }

    /// How many launches are needed, one after another, until a pair is proven to be equal; none if all
    /// are not enough.
    fn equal_after(&self, floor: f64) -> Option<usize> {
        let rule = Rule { margin: EQUAL, ..Rule::over(floor) };
        let mut n = LAUNCHES;
        while n <= self.logs.len() {
            if paired(&self.logs[..n], &rule, n as u64).verdict == Verdict::Same {
                return Some(n);
            }
            n += LAUNCHES;
        }
        None
    }

    fn tell(&self, ran: &Ran, out: &Out) -> Exit {
        let Ran { n, quads, floor, a_call, seconds } = *ran;
        out.line(&format!(
            "{CASE}, {:.2} ms a call on one thread; a trial: {LAUNCHES} launches of {quads} ABBA quads",
            a_call / 1e6
        ));
        out.line(&format!("off by itself (99 % of {BEFORE} launches): {:.2} %", 100.0 * floor));
        let middle = |ratios: &[f64]| benches::stats::median(ratios);
        let ends = |ratios: &[f64]| {
            let end = |share| benches::stats::quantile(ratios, share);
            format!("{:.3} [{:.3}..{:.3}]", middle(ratios), end(0.0), end(1.0))
        };
        out.line(&format!(
            "5 % more work planted: called slower in {} of {n} trials; ratios {}",
            self.fired,
            ends(&self.planted)
        ));
        out.line(&format!(
            "nothing planted: called slower or faster in {} of {n} trials, proven the same within 2 % in {}; ratios {}",
            self.aa_fired,
            self.same,
            ends(&self.honest)
        ));
        let equal = self.equal_after(floor);
        out.line(&match equal {
            Some(launches) => format!(
                "the same within 3 % is proven after {launches} launches, {} quads",
                self.logs[..launches].iter().map(Vec::len).sum::<usize>()
            ),
            None => "the same within 3 % is not proven by all launches together".to_owned(),
        });
        out.line(&format!(
            "{} quads dropped for the processor's clock; {seconds:.0} s",
            self.dropped
        ));
        let enough = |share: f64| (share * n as f64).round() as usize;
        let fine = enough(0.95) <= self.fired && self.aa_fired <= enough(0.01) && equal.is_some();
        out.json(&json!({
            "schema": "karat.result/1", "kind": "gate_selftest", "planted": n, "fired": self.fired, "aa": n,
            "aa_fired": self.aa_fired, "aa_same": self.same, "case": CASE, "ns": a_call, "launches": LAUNCHES,
            "quads": quads, "floor": floor, "planted_ratio": middle(&self.planted),
            "aa_ratio": middle(&self.honest), "equal_margin": EQUAL,
            "equal_after_quads": equal.map(|n| self.logs[..n].iter().map(Vec::len).sum::<usize>()),
            "seconds": seconds,
        }));
        if !fine {
            out.line("NOT TO BE BELIEVED: at least 95 of 100 are to be called slower, and at most 1 of 100 with nothing planted");
        }
        if fine { Exit::Ok } else { Exit::Wrong }
    }
}
