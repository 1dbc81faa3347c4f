//! Bounds that follow from a precision plan.
//!
//! A dozen runs of the reference in stochastic arithmetic show how far honest implementations of a
//! plan are from the oracle. From them follow, for one output:
//!
//! - of each element `7 x max(spread of the element, spread of its row) + half an ulp of the output
//!   type`, where a spread is the root mean square of the runs' distances from the oracle, a row is
//!   the last axis, and the ulp is taken at `|want|` plus the first term;
//! - of the whole, of each token (first axis) and of each head (second axis of three or more) the sum
//!   of squared errors: the runs' mean times the 7-sigma point of a chi-square distribution with as
//!   many degrees of freedom as the runs' variance says (Wilson and Hilferty's cube);
//! - of the whole and of each head the *bias*, slope and mean of `got - want`: 6.4 standard
//!   deviations, level 1e-9, around what rounding the oracle to the output type gives.
//!
//! All hold, or the finding is not ok. Where a run is not finite no bound follows, and the finding says
//! that of itself: it is no failure of whoever answered. An element alone cannot see a drift, an aggregate alone cannot
//! see a wrong element, and neither sees a scale of 1.004 under a bf16 plan.

use crate::{
    View,
    compare::{Bias, Bound, Finding, missing, pattern, unravel},
    plan::Grid,
};

/// Multiple of the spread that is allowed.
pub const SPREADS: f64 = 7.0;

/// Standard deviations of a bias that are allowed: level 1e-9, two-sided, for 256 runs.
const BIAS_SIGMAS: f64 = 6.4;

/// A bias is tested where at least so many elements carry it.
const BIAS_ELEMENTS: f64 = 64.0;

/// Running mean and variance.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Moments {
    n: f64,
    mean: f64,
    m2: f64,
}

impl Moments {
    fn add(&mut self, x: f64) {
        self.n += 1.0;
        let off = x - self.mean;
        self.mean += off / self.n;
        self.m2 += off * (x - self.mean);
    }

    fn variance(&self) -> f64 {
        if self.n < 2.0 { 0.0 } else { self.m2 / (self.n - 1.0) }
    }

    /// Count, mean, sum of squared distances from it.
    pub fn raw(&self) -> [f64; 3] {
        [self.n, self.mean, self.m2]
    }

    /// From [`raw`](Self::raw).
    pub fn from_raw([n, mean, m2]: [f64; 3]) -> Moments {
        Moments { n, mean, m2 }
    }
}

/// Which elements a slice holds: index `i` of an axis, or everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Whole,
    Token(usize),
    Head(usize),
}

/// The runs of one output, and what they allow.
#[derive(Clone, Debug, PartialEq)]
pub struct Derived {
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// The oracle's answer.
    pub want: Vec<f64>,
    /// What the output is stored in.
    pub grid: Grid,
    /// Runs so far.
    pub runs: u32,
    /// Sum of squared distances from the oracle, per element.
    pub squares: Vec<f64>,
    /// Of each run's sum of squared errors: the whole, then tokens, then heads.
    pub sums: Vec<Moments>,
    /// Of each run's slope: the whole, then heads.
    pub slopes: Vec<Moments>,
    /// Of each run's mean error: the whole, then heads.
    pub means: Vec<Moments>,
}

impl Derived {
    /// Before any run.
    pub fn new(shape: &[usize], want: Vec<f64>, grid: Grid) -> Derived {
        let (tokens, heads) = axes(shape);
        Derived {
            shape: shape.to_vec(),
            grid,
            runs: 0,
            squares: vec![0.0; want.len()],
            sums: vec![Moments::default(); 1 + tokens + heads],
            slopes: vec![Moments::default(); 1 + heads],
            means: vec![Moments::default(); 1 + heads],
            want,
        }
    }

    /// Adds a run.
    pub fn add(&mut self, run: &[f64]) {
        self.runs += 1;
        for ((square, &run), &want) in self.squares.iter_mut().zip(run).zip(&self.want) {
            let err = if run == want { 0.0 } else { run - want };
            *square += err * err;
        }
        let stats = self.stats(run);
        for (moments, part) in self.sums.iter_mut().zip(&stats) {
            moments.add(part.err2);
        }
        let (tokens, _) = axes(&self.shape);
        for (i, part) in whole_and_heads(&stats, tokens).enumerate() {
            self.slopes[i].add(part.slope());
            self.means[i].add(part.mean());
        }
    }

    /// Sums over the whole, every token and every head.
    fn stats(&self, got: &[f64]) -> Vec<Stat> {
        let (tokens, heads) = axes(&self.shape);
        let mut stats = vec![Stat::default(); 1 + tokens + heads];
        let row = row_len(&self.shape, tokens);
        let head = self.shape.get(2..).map_or(1, |rest| rest.iter().product::<usize>().max(1));
        for (i, (&got, &want)) in got.iter().zip(&self.want).enumerate() {
            let err = if got == want { 0.0 } else { got - want };
            let mut one = Stat { n: 1.0, err2: err * err, ..Stat::default() };
            if want.is_finite() {
                (one.want2, one.want4) = (want * want, want.powi(4));
                (one.err, one.cross) = (err, err * want);
            }
            stats[0].add(one);
            if 0 < tokens {
                stats[1 + i / row].add(one);
            }
            if 0 < heads {
                stats[1 + tokens + i / head % heads].add(one);
            }
        }
        stats
    }

    /// Spread of each element, at least that of its row.
    fn spreads(&self) -> Vec<f64> {
        let runs = f64::from(self.runs.max(1));
        let row = self.shape.last().copied().unwrap_or(1).max(1);
        let mut spreads = Vec::with_capacity(self.squares.len());
        for squares in self.squares.chunks(row) {
            let pooled = squares.iter().sum::<f64>() / squares.len() as f64;
            spreads.extend(squares.iter().map(|&s| (s.max(pooled) / runs).sqrt()));
        }
        spreads
    }

    /// What each element is allowed, and which share of it is the spread (the rest is the half ulp).
    pub fn allowed(&self) -> Vec<(f64, f64)> {
        let spreads = self.spreads().into_iter().zip(&self.want);
        spreads
            .map(|(spread, want)| {
                let wide = SPREADS * spread;
                let half = self.grid.half_ulp(want.abs() + wide);
                (wide + half, wide / (wide + half))
            })
            .collect()
    }

    /// Elements for which a run was not finite, so that nothing is known of them.
    pub fn unbounded(&self) -> usize {
        self.squares.iter().filter(|square| !square.is_finite()).count()
    }

    /// Root mean square of the spreads, relative to the oracle's.
    pub fn relative_spread(&self) -> f64 {
        let want2: f64 = self.want.iter().filter(|x| x.is_finite()).map(|x| x * x).sum();
        let squares: f64 = self.squares.iter().sum();
        if squares == 0.0 { 0.0 } else { (squares / f64::from(self.runs.max(1)) / want2).sqrt() }
    }

    /// Root mean square of half a unit in the last place, relative to the oracle's.
    pub fn relative_half_ulp(&self) -> f64 {
        let finite = || self.want.iter().filter(|x| x.is_finite());
        let want2: f64 = finite().map(|x| x * x).sum();
        let squares: f64 = finite().map(|&x| self.grid.half_ulp(x).powi(2)).sum();
        if want2 == 0.0 { 0.0 } else { (squares / want2).sqrt() }
    }

    /// Holds an answer against the bound.
    pub fn compare(&self, name: &str, got: &View<'_>) -> Finding {
        let bound = Bound::Derived { runs: self.runs, grid: self.grid };
        if got.shape() != self.shape {
            return missing(name, &self.shape, bound);
        }
        let got = got.to_f64();
        let allowed = self.allowed();
        let (tokens, _) = axes(&self.shape);
        let (mut over, mut not_finite) = (0, 0);
        let (mut worst, mut at) = (0.0_f64, 0);
        let mut ulps = Vec::with_capacity(got.len());
        let mut bad = vec![false; got.len()];
        for (i, ((&g, &w), &(allowed, _))) in got.iter().zip(&self.want).zip(&allowed).enumerate() {
            if g == w {
                ulps.push(0);
                continue;
            }
            not_finite += usize::from(!g.is_finite());
            let err = (g - w).abs();
            let used = if err <= allowed { err / allowed } else { (err / allowed).max(1.0 + 1e-9) };
            let used = if used.is_nan() { f64::INFINITY } else { used };
            if 1.0 < used {
                over += 1;
                bad[i] = true;
            }
            if worst < used {
                (worst, at) = (used, i);
            }
            ulps.push(if err.is_finite() {
                (err / (2.0 * self.grid.half_ulp(w))).round() as u64
            } else {
                u64::MAX
            });
        }
        let stats = self.stats(&got);
        let rounding = self.rounding();
        // The sum of squared errors of the whole, of tokens, of heads.
        let mut budget = worst;
        let (mut rel_rms_allowed, mut worst_part) = (0.0, (0.0, Part::Whole, 0.0));
        for (i, ((stat, runs), rounded)) in stats.iter().zip(&self.sums).zip(&rounding).enumerate()
        {
            let mean = runs.mean + rounded.err2;
            let variance = runs.variance() + rounded.err4;
            let most = mean * chi_square_point(2.0 * mean * mean / variance);
            let most = if mean == 0.0 { 0.0 } else { most };
            let used = if stat.err2 == 0.0 { 0.0 } else { (stat.err2 / most).sqrt() };
            let used = if used.is_nan() { f64::INFINITY } else { used };
            budget = budget.max(used);
            if i == 0 {
                rel_rms_allowed = relative(most, stat.want2);
            } else if worst_part.0 < used || i == 1 {
                let part =
                    if i <= tokens { Part::Token(i - 1) } else { Part::Head(i - 1 - tokens) };
                worst_part = (used, part, relative(most, stat.want2));
            }
        }
        let bias = self.bias(&stats, &rounding, tokens);
        budget = bias.iter().map(Bias::used).fold(budget, f64::max);
        let rel_rms = relative(stats[0].err2, stats[0].want2);
        let (worst_token, worst_token_at, worst_is) = match worst_part.1 {
            Part::Token(t) => (relative(stats[1 + t].err2, stats[1 + t].want2), t, "token"),
            Part::Head(h) => {
                let stat = &stats[1 + tokens + h];
                (relative(stat.err2, stat.want2), h, "head")
            }
            Part::Whole => (rel_rms, 0, "whole"),
        };
        let unbounded = self.unbounded();
        let ok = over == 0 && not_finite == 0 && budget <= 1.0 && unbounded == 0;
        let pattern = (!ok).then(|| {
            let aggregate = || {
                if bias.iter().any(|bias| 1.0 < bias.used()) {
                    "no single element over: a bias of the whole".to_owned()
                } else {
                    format!("no single element over: too much error in {worst_is} {worst_token_at}")
                }
            };
            if 0 < unbounded {
                return format!("no bound: of {unbounded} elements some run is not finite");
            }
            if over == 0 { aggregate() } else { pattern::axes(&self.shape, &bad) }
        });
        let mut sorted = ulps;
        sorted.sort_unstable();
        let n = got.len();
        Finding {
            output: name.to_owned(),
            n,
            over,
            rel_rms,
            rel_rms_allowed,
            worst_token,
            worst_token_at,
            worst_token_allowed: worst_part.2,
            worst_is,
            max_abs: (got.get(at).copied().unwrap_or(0.0)
                - self.want.get(at).copied().unwrap_or(0.0))
            .abs(),
            allowed: allowed.get(at).map_or(0.0, |a| a.0),
            at: unravel(at, &self.shape),
            pair: (self.want.get(at).copied().unwrap_or(0.0), got.get(at).copied().unwrap_or(0.0)),
            ulp: (
                sorted.get((n * 99).div_ceil(100).saturating_sub(1)).copied().unwrap_or(0),
                sorted.last().copied().unwrap_or(0),
            ),
            ulps: histogram(&sorted),
            not_finite,
            bound,
            budget,
            bias: bias.into_iter().max_by(|a, b| a.used().total_cmp(&b.used())),
            pattern,
            unbounded: 0 < unbounded,
            ok,
        }
    }

    /// What rounding an answer as good as the oracle's to the output type adds, for the whole, every
    /// token and every head: squared error and its variance, and the slope and mean it causes.
    fn rounding(&self) -> Vec<Rounded> {
        let (tokens, heads) = axes(&self.shape);
        let mut all = vec![Rounded::default(); 1 + tokens + heads];
        let row = row_len(&self.shape, tokens);
        let head = self.shape.get(2..).map_or(1, |rest| rest.iter().product::<usize>().max(1));
        for (i, &want) in self.want.iter().enumerate() {
            if !want.is_finite() || want == 0.0 {
                continue;
            }
            let half = self.grid.half_ulp(want);
            let off = nearest(want, half) - want;
            // A uniform error of half an ulp has variance h^2 / 3, its square 4 h^4 / 45.
            let one = Rounded {
                err2: (off * off).max(half * half / 3.0),
                err4: 4.0 / 45.0 * half.powi(4),
                cross: off * want,
                cross2: want * want * half * half / 3.0,
                off,
                off2: half * half / 3.0,
            };
            all[0].add(one);
            if 0 < tokens {
                all[1 + i / row].add(one);
            }
            if 0 < heads {
                all[1 + tokens + i / head % heads].add(one);
            }
        }
        all
    }

    /// Slope and mean of the error, over the whole and per head, where enough elements carry them.
    fn bias(&self, stats: &[Stat], rounding: &[Rounded], tokens: usize) -> Vec<Bias> {
        let mut all = Vec::new();
        let parts = whole_and_heads(stats, tokens).zip(whole_and_heads(rounding, tokens));
        for (i, (stat, rounded)) in parts.enumerate() {
            let part = if i == 0 { "whole".to_owned() } else { format!("head {}", i - 1) };
            let carried = stat.want2 * stat.want2 / stat.want4;
            if BIAS_ELEMENTS <= carried {
                let runs = &self.slopes[i];
                let sigma = (runs.variance() + rounded.cross2 / (stat.want2 * stat.want2)).sqrt();
                all.push(Bias {
                    what: "slope",
                    part: part.clone(),
                    value: stat.slope() - rounded.cross / stat.want2,
                    allowed: BIAS_SIGMAS * sigma + runs.mean.abs(),
                });
            }
            if BIAS_ELEMENTS <= stat.n {
                let runs = &self.means[i];
                let sigma = (runs.variance() + rounded.off2 / (stat.n * stat.n)).sqrt();
                all.push(Bias {
                    what: "mean",
                    part,
                    value: stat.mean() - rounded.off / stat.n,
                    allowed: BIAS_SIGMAS * sigma + runs.mean.abs(),
                });
            }
        }
        all
    }
}

/// Sums over some elements.
#[derive(Clone, Copy, Debug, Default)]
struct Stat {
    n: f64,
    err: f64,
    err2: f64,
    cross: f64,
    want2: f64,
    want4: f64,
}

impl Stat {
    fn add(&mut self, o: Stat) {
        self.n += o.n;
        self.err += o.err;
        self.err2 += o.err2;
        self.cross += o.cross;
        self.want2 += o.want2;
        self.want4 += o.want4;
    }

    /// Of `got - want` against `want`.
    fn slope(&self) -> f64 {
        if self.want2 == 0.0 { 0.0 } else { self.cross / self.want2 }
    }

    fn mean(&self) -> f64 {
        if self.n == 0.0 { 0.0 } else { self.err / self.n }
    }
}

/// The same sums of what rounding adds.
#[derive(Clone, Copy, Debug, Default)]
struct Rounded {
    err2: f64,
    err4: f64,
    cross: f64,
    cross2: f64,
    off: f64,
    off2: f64,
}

impl Rounded {
    fn add(&mut self, o: Rounded) {
        self.err2 += o.err2;
        self.err4 += o.err4;
        self.cross += o.cross;
        self.cross2 += o.cross2;
        self.off += o.off;
        self.off2 += o.off2;
    }
}

/// Tokens (first axis, of two or more) and heads (second axis, of three or more).
fn axes(shape: &[usize]) -> (usize, usize) {
    match shape {
        [tokens, heads, _, ..] => (*tokens, *heads),
        [tokens, _] => (*tokens, 0),
        _ => (0, 0),
    }
}

fn row_len(shape: &[usize], tokens: usize) -> usize {
    (shape.iter().product::<usize>() / tokens.max(1)).max(1)
}

fn whole_and_heads<T>(all: &[T], tokens: usize) -> impl Iterator<Item = &T> {
    all.iter().take(1).chain(all.iter().skip(1 + tokens))
}

/// `x` rounded to a multiple of twice `half`.
fn nearest(x: f64, half: f64) -> f64 {
    (x / (2.0 * half)).round_ties_even() * 2.0 * half
}

/// The 7-sigma point of a chi-square distribution of `k` degrees of freedom, over `k`.
fn chi_square_point(k: f64) -> f64 {
    if k.is_nan() || k == f64::INFINITY {
        return 1.0 + 1e-9;
    }
    let v = 2.0 / (9.0 * k.max(1e-3));
    (1.0 - v + SPREADS * v.sqrt()).max(0.0).powi(3)
}

fn relative(err2: f64, want2: f64) -> f64 {
    if err2 == 0.0 { 0.0 } else { (err2 / want2).sqrt() }
}

/// How many are 0, 1, 2, up to 4, 8, 16, 32, 64, and more.
pub(super) fn histogram(ulps: &[u64]) -> [usize; 9] {
    let mut counts = [0; 9];
    for &ulp in ulps {
        let bucket = match ulp {
            0 => 0,
            1 => 1,
            2 => 2,
            n => (66 - (n - 1).leading_zeros() as usize).min(8),
        };
        counts[bucket] += 1;
    }
    counts
}
