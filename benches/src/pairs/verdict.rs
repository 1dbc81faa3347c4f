//! What launches come to: slower, faster, the same, or not to be said.

use crate::stats::{
    Interval, equivalence, median, median_interval, quantile, rank_sum, ratio_interval, signed_rank,
};

use super::Launch;

/// What has to be shown.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rule {
    /// The smallest change that counts.
    pub effect: f64,
    /// What the case shows by itself: the 99 % quantile of what it is off when nothing has changed.
    pub floor: f64,
    /// The margin within which the same is proven.
    pub margin: f64,
    /// Launches that have to agree.
    pub launches: usize,
    /// Whether somebody said what the floor is to be: then it is not too high to gate over.
    pub gated: bool,
}

impl Rule {
    /// The rule of the house, over a case's own floor.
    pub fn over(floor: f64) -> Rule {
        Rule { effect: 0.02, floor, margin: 0.02, launches: 3, gated: false }
    }

    /// What an interval has to clear.
    pub fn bar(&self) -> f64 {
        self.floor.max(self.effect)
    }

    /// Whether a case is too noisy to be gated.
    pub fn ungateable(&self) -> bool {
        !self.floor.is_finite() || (!self.gated && UNGATEABLE < self.floor)
    }
}

/// A floor above which nothing is said of a case.
pub const UNGATEABLE: f64 = 0.03;

/// What is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// Slower, by more than the case is off by itself.
    Slower,
    /// Faster, in the same way.
    Faster,
    /// Proven to be within the margin.
    Same,
    /// None of these is shown.
    Ambiguous,
    /// The case is too noisy on this machine.
    Ungateable,
    /// Answers are wrong: of wrong answers no speed is told.
    Withheld,
    /// One side does not have the case, or no longer runs it.
    Missing,
}

impl Verdict {
    /// One word.
    pub fn name(self) -> &'static str {
        match self {
            Verdict::Slower => "slower",
            Verdict::Faster => "faster",
            Verdict::Same => "same",
            Verdict::Ambiguous => "ambiguous",
            Verdict::Ungateable => "ungateable",
            Verdict::Withheld => "withheld",
            Verdict::Missing => "missing",
        }
    }
}

/// What the samples of one case say.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Judged {
    /// What is said before other cases are looked at.
    pub verdict: Verdict,
    /// B over A, in the middle.
    pub ratio: f64,
    /// Where it lies, at 95 %.
    pub interval: Interval,
    /// How likely ranks are to be so one-sided by chance.
    pub p: f64,
    /// How likely it is to look so equal if it is not.
    pub p_same: f64,
}

/// The share of intervals that hold what they are of.
const LEVEL: f64 = 0.95;

/// How often a claim may be made of what is not so.
pub const CHANCE: f64 = 0.05;

/// The ratio in the middle of some launches.
pub fn ratio(launches: &[Vec<f64>]) -> f64 {
    median(&launches.concat()).exp()
}

/// Judges pairs that were run in turns, by logarithms of their ratios, launch by launch.
pub fn paired(launches: &[Vec<f64>], rule: &Rule, seed: u64) -> Judged {
    let all = launches.concat();
    let interval = median_interval(launches, LEVEL, seed);
    let interval = Interval { lo: interval.lo.exp(), hi: interval.hi.exp() };
    let (p, p_same) = (signed_rank(&all, 0.0).either(), equivalence(&all, rule.margin));
    let ratios: Vec<f64> =
        launches.iter().filter(|quads| !quads.is_empty()).map(|quads| median(quads)).collect();
    decided(median(&all).exp(), interval, [p, p_same], &ratios, rule)
}

/// The verdict of some numbers; `logs` are the launches' own.
pub(crate) fn decided(
    ratio: f64,
    interval: Interval,
    [p, p_same]: [f64; 2],
    logs: &[f64],
    rule: &Rule,
) -> Judged {
    let agree = |side: f64| rule.launches <= logs.len() && logs.iter().all(|log| 0.0 < side * log);
    let bar = 1.0 + rule.bar();
    let verdict = if !ratio.is_finite() {
        Verdict::Ambiguous
    } else if rule.ungateable() {
        Verdict::Ungateable
    } else if bar < interval.lo && agree(1.0) && p <= CHANCE {
        Verdict::Slower
    } else if interval.hi < 1.0 / bar && agree(-1.0) && p <= CHANCE {
        Verdict::Faster
    } else if 1.0 / (1.0 + rule.margin) < interval.lo
        && interval.hi < 1.0 + rule.margin
        && p_same <= CHANCE
    {
        Verdict::Same
    } else {
        Verdict::Ambiguous
    };
    Judged { verdict, ratio, interval, p, p_same }
}

/// How far launches in which nothing changed are off, taken so many together: the 99 % quantile over
/// draws of as many of them. Of few launches no more are taken together than half: fewer are further
/// off.
pub fn floor(launches: &[Vec<f64>], together: usize, seed: u64) -> f64 {
    /// Draws of launches.
    const DRAWS: usize = 1000;
    let mut rng = golden::Rng::keyed("floor", seed);
    let together = together.min(launches.len() / 2).max(1);
    let mut order: Vec<usize> = (0..launches.len()).collect();
    let off: Vec<f64> = (0..DRAWS)
        .map(|_| {
            // None is drawn twice: one bad launch is one bad launch.
            for i in 0..together {
                order.swap(i, i + rng.below(launches.len() - i));
            }
            let drawn: Vec<f64> =
                order[..together].iter().flat_map(|&at| launches[at].iter().copied()).collect();
            (median(&drawn).exp() - 1.0).abs()
        })
        .collect();
    quantile(&off, 0.99)
}

/// Judges times that were taken one after the other, launch by launch: of what was, and of what is.
pub fn apart(was: &[Vec<f64>], is: &[Vec<f64>], rule: &Rule, seed: u64) -> Judged {
    let (a, b) = (was.concat(), is.concat());
    let middle = median(&a);
    let interval = ratio_interval(was, is, LEVEL, seed);
    let scaled = |by: f64| a.iter().map(|ns| ns * by).collect::<Vec<_>>();
    let margin = 1.0 + rule.margin;
    let p_same = rank_sum(&scaled(1.0 / margin), &b).above.max(rank_sum(&scaled(margin), &b).below);
    let logs: Vec<f64> = is.iter().map(|ns| (median(ns) / middle).ln()).collect();
    let p = rank_sum(&a, &b).either();
    decided(median(&b) / middle, interval, [p, p_same], &logs, rule)
}

/// What so many launches are off the middle of all of them, at 99 %: times, not pairs.
pub fn floor_apart(launches: &[Vec<f64>], together: usize, seed: u64) -> f64 {
    let middle = median(&launches.concat()).ln();
    let logs: Vec<Vec<f64>> =
        launches.iter().map(|ns| ns.iter().map(|ns| ns.ln() - middle).collect()).collect();
    floor(&logs, together, seed)
}

/// Quads of launches.
pub fn quads(launches: &[Launch]) -> Vec<Vec<f64>> {
    launches.iter().map(|launch| launch.quads.clone()).collect()
}

#[cfg(test)]
mod tests {
    use golden::Rng;

    use super::{Rule, Verdict, apart, floor, floor_apart, paired};

    fn launches(rng: &mut Rng, n: usize, quads: usize, ratio: f32, spread: f32) -> Vec<Vec<f64>> {
        let one =
            |rng: &mut Rng| (0..quads).map(|_| f64::from(rng.normal(ratio.ln(), spread))).collect();
        (0..n).map(|_| one(rng)).collect()
    }

    #[test]
    fn verdicts_are_those_of_what_was_drawn() {
        let mut rng = Rng::keyed("verdicts", 1);
        let rule = Rule::over(0.005);
        for (ratio, spread, want) in [
            (1.05, 0.05, Verdict::Slower),
            (0.95, 0.05, Verdict::Faster),
            (1.0, 0.05, Verdict::Same),
            (1.0, 0.5, Verdict::Ambiguous),
        ] {
            for seed in 0..20 {
                let judged = paired(&launches(&mut rng, 3, 240, ratio, spread), &rule, seed);
                assert_eq!(judged.verdict, want, "{ratio}: {judged:?}");
            }
        }
    }

    #[test]
    fn a_noisy_case_says_so_and_two_launches_prove_no_change() {
        let mut rng = Rng::keyed("noisy", 2);
        let slow = launches(&mut rng, 3, 100, 1.1, 0.02);
        assert_eq!(paired(&slow, &Rule::over(0.031), 0).verdict, Verdict::Ungateable);
        assert_eq!(paired(&slow, &Rule::over(f64::NAN), 0).verdict, Verdict::Ungateable);
        assert_eq!(paired(&slow[..2], &Rule::over(0.01), 0).verdict, Verdict::Ambiguous);
        // A launch that goes the other way keeps the verdict back.
        let mut mixed = launches(&mut rng, 4, 100, 1.1, 0.02);
        mixed[2] = launches(&mut rng, 1, 20, 0.97, 0.01).remove(0);
        assert_eq!(paired(&mixed, &Rule::over(0.01), 0).verdict, Verdict::Ambiguous);
        assert_eq!(paired(&[], &Rule::over(0.01), 0).verdict, Verdict::Ambiguous);
    }

    #[test]
    fn times_that_were_kept_are_judged_too() {
        let mut rng = Rng::keyed("apart", 4);
        let times = |rng: &mut Rng, n, ratio| -> Vec<Vec<f64>> {
            let exp = |logs: Vec<f64>| logs.iter().map(|log| 2e5 * log.exp()).collect();
            launches(rng, n, 120, ratio, 0.03).into_iter().map(exp).collect()
        };
        let was = times(&mut rng, 9, 1.0);
        let floor = floor_apart(&was, 3, 0);
        assert!(floor < 0.01, "{floor}");
        let rule = Rule::over(floor);
        for (ratio, want) in
            [(1.06, Verdict::Slower), (0.94, Verdict::Faster), (1.0, Verdict::Same)]
        {
            let judged = apart(&was, &times(&mut rng, 3, ratio), &rule, 0);
            assert_eq!(judged.verdict, want, "{ratio}: {judged:?}");
        }
    }

    #[test]
    fn a_floor_is_what_nothing_looks_like() {
        let mut rng = Rng::keyed("floors", 3);
        let same = launches(&mut rng, 120, 60, 1.0, 0.1);
        // The median of 180 has a spread of 1.2533 * 0.1 / sqrt(180), and its 99 % quantile is 2.576 of these.
        let got = floor(&same, 3, 0);
        let want = 1.2533 * 0.1 / 180.0_f64.sqrt() * 2.576;
        assert!((got / want - 1.0).abs() <= 0.2, "{got} for {want}");
    }
}
