//! A number computed as a precision plan says.
//!
//! In [`Rounding::Nearest`] it *emulates* the plan: what an honest implementation would return that
//! adds in the plain reference's order. In [`Rounding::Random`] it does stochastic arithmetic (Monte
//! Carlo arithmetic, as CESTAC and Verificarlo do): every rounding goes up or down at random, with the
//! odds of its distances, so that runs differ by as much as honest implementations of the plan may.
//! What needs no rounding (a product with one, a sum of small integers) is left alone, and within a run
//! equal values round alike, as they do in any implementation: a weight that is off by a rounding is
//! off in every row, and a bias over all rows follows from it.
//!
//! Each operation is done in f64 and rounded once more; for sums, products, quotients and roots of
//! f32 that gives the correctly rounded f32 (53 >= 2 x 24 + 2).

use std::{
    cell::Cell,
    cmp::Ordering,
    ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub},
};

use golden::{
    Cast, Element, Number, Plan, View, ViewMut,
    narrow::FP8_BLOCK,
    plan::{Activations, Cache, Grid, Site, Sums, Term},
    recording::Recorded,
};
use ndarray::{ArrayD, ArrayViewD, ArrayViewMutD};

use super::{LANES, Real, interleaved};

/// A number under the plan of [`under`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Planned(f64);

/// Where a rounding goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// To the nearest, ties to even.
    Nearest,
    /// Up or down at random, with the odds of the distances; the seed of the run.
    Random(u64),
    /// As [`Random`](Self::Random) in arithmetic, to the nearest where something is stored: how honest
    /// emulations of one plan differ, which add in other orders.
    Order(u64),
}

const SITES: usize = Site::ALL.len();

/// What every operation asks.
#[derive(Clone, Copy)]
struct Hot {
    accumulator: Step,
    dot: Option<Grid>,
    sums: Sums,
    seed: u64,
    random: bool,
    stored_at_random: bool,
    flush: bool,
}

impl Hot {
    /// As what is stored is rounded.
    fn stored(self) -> Hot {
        Hot { random: self.stored_at_random, ..self }
    }
}

/// A grid as rounding to it needs it.
#[derive(Clone, Copy)]
struct Step {
    grid: Option<Grid>,
    /// Bits of an f64's fraction that are dropped.
    drop: u32,
    /// Exponent field of an f64 at the smallest normal number.
    low: u64,
    /// Exponents from there on that are rounded by dropping bits: above them numbers may overflow.
    span: u64,
    /// How many of the grid's last places one of these is.
    place: f64,
}

impl Step {
    const NONE: Step = Step { grid: None, drop: 0, low: 0, span: 0, place: 1.0 };

    fn new(grid: Grid) -> Step {
        let low = (1023 + grid.min_exponent()) as u64;
        let top = (grid.max().to_bits() >> 52) & 0x7ff;
        Step { grid: Some(grid), drop: 52 - grid.bits(), low, span: top - low, place: 1.0 }
    }

    /// With so many bits fewer.
    fn without(self, bits: u32) -> Step {
        Step { drop: self.drop + bits, place: self.place * f64::from(1 << bits), ..self }
    }
}

/// What elementary functions ask: errors in units in the last place of f32.
#[derive(Clone, Copy, Default)]
struct Functions {
    exp: f64,
    log: f64,
    root: f64,
    trig: f64,
    /// How far an implementation's functions lie off on average, in `[-1, 1)` of half of what they
    /// may.
    lean: f64,
}

const IDLE: Hot = Hot {
    accumulator: Step::NONE,
    dot: None,
    sums: Sums::Nearest,
    seed: 0,
    random: false,
    stored_at_random: false,
    flush: false,
};

const EXACT: Functions = Functions { exp: 0.0, log: 0.0, root: 0.0, trig: 0.0, lean: 0.0 };

type Stores = [Option<Grid>; SITES];

/// Neighbours in a row that share a step in eight bits.
const BLOCK: usize = golden::narrow::BLOCK;

/// What codes of FP8 are divided by at the least.
const LEAST: f64 = 1e-12;

thread_local! {
    static HOT: Cell<Hot> = const { Cell::new(IDLE) };
    static FUNCTIONS: Cell<Functions> = const { Cell::new(EXACT) };
    static STORES: Cell<Stores> = const { Cell::new([None; SITES]) };
    static ACTIVATIONS: Cell<Activations> = const { Cell::new(Activations::F32) };
    static CACHE: Cell<Cache> = const { Cell::new(Cache::AsStored) };
}

/// What `f` returns with every [`Planned`] number of this thread under `plan`, or under one term of
/// it.
pub fn under<T>(plan: &Plan, only: Option<Term>, rounding: Rounding, f: impl FnOnce() -> T) -> T {
    let before = enter(settings(plan, only, rounding));
    let result = f();
    enter(before);
    result
}

type Settings = (Hot, Functions, Stores, Activations, Cache);

/// Makes the settings of this thread these, and returns those that were.
fn enter((hot, functions, stores, activations, cache): Settings) -> Settings {
    let (activations, cache) = (ACTIVATIONS.replace(activations), CACHE.replace(cache));
    (HOT.replace(hot), FUNCTIONS.replace(functions), STORES.replace(stores), activations, cache)
}

fn settings(plan: &Plan, only: Option<Term>, rounding: Rounding) -> Settings {
    let on = |term: Term| only.is_none_or(|only| only == term);
    let mut stores = [None; SITES];
    for (&site, &grid) in &plan.round {
        if on(Term::Site(site)) {
            stores[site as usize] = Some(grid);
        }
    }
    let seed = match rounding {
        Rounding::Nearest => 0,
        // Neighbouring seeds must not give neighbouring runs.
        Rounding::Random(seed) | Rounding::Order(seed) => {
            mix(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15))
        }
    };
    let hot = Hot {
        accumulator: if on(Term::Accumulator) { Step::new(plan.accumulator) } else { Step::NONE },
        dot: (plan.dot != plan.accumulator && on(Term::Dot)).then_some(plan.dot),
        sums: if on(Term::Accumulator) { plan.sums } else { Sums::Nearest },
        seed,
        random: rounding != Rounding::Nearest,
        stored_at_random: matches!(rounding, Rounding::Random(_)),
        flush: plan.flush_to_zero,
    };
    let functions = Functions {
        exp: plan.exp_ulps,
        log: plan.log_ulps,
        root: plan.root_ulps,
        trig: plan.trig_ulps,
        lean: signed(mix(seed ^ 0x1ea7)),
    };
    let functions = if on(Term::Functions) { functions } else { EXACT };
    let activations = if on(Term::Activations) { plan.activations } else { Activations::F32 };
    let cache = if on(Term::Cache) { plan.cache } else { Cache::AsStored };
    (hot, functions, stores, activations, cache)
}

/// Scrambles all bits (`murmur3`'s finaliser).
#[inline]
fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    let x = (x ^ (x >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^ (x >> 33)
}

/// The word that decides how `x` is rounded in this run; its high bits are good.
#[inline]
fn word(x: f64, seed: u64) -> u64 {
    let x = (x.to_bits() ^ seed).wrapping_mul(0xff51_afd7_ed55_8ccd);
    (x ^ (x >> 32)).wrapping_mul(0xc4ce_b9fe_1a85_ec53)
}

/// A word as a number in `[-1, 1)`.
#[inline]
fn signed(word: u64) -> f64 {
    (word >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
}

/// `x` on a grid.
#[inline]
fn round(x: f64, step: Step, hot: Hot) -> f64 {
    let bits = x.to_bits();
    let exponent = (bits >> 52) & 0x7ff;
    if exponent.wrapping_sub(step.low) < step.span {
        return drop_bits(x, step.drop, hot);
    }
    match step.grid {
        Some(grid) => at_the_ends(x, grid, step.drop, hot),
        None => x,
    }
}

#[inline]
fn drop_bits(x: f64, drop: u32, hot: Hot) -> f64 {
    let bits = x.to_bits();
    let add = if hot.random {
        word(x, hot.seed) >> (64 - drop)
    } else {
        (1 << (drop - 1)) - 1 + ((bits >> drop) & 1)
    };
    f64::from_bits(bits.wrapping_add(add) & !((1 << drop) - 1))
}

/// Zero, infinity, what may overflow, and what is below the smallest normal number, where neighbours
/// are equally far apart or there is only zero.
#[cold]
fn at_the_ends(x: f64, grid: Grid, drop: u32, hot: Hot) -> f64 {
    if x == 0.0 || !x.is_finite() {
        return x;
    }
    if 1.0 <= x.abs() {
        let rounded = drop_bits(x, drop, hot);
        return if rounded.abs() <= grid.max() {
            rounded
        } else if grid == Grid::Fp8 {
            // FP8 saturates, as the official quantiser does.
            grid.max().copysign(x)
        } else {
            f64::INFINITY.copysign(x)
        };
    }
    if hot.flush {
        // An implementation may flush or not: a run does the one or the other.
        let kept = hot.random && word(x, hot.seed) >> 63 == 0;
        return if kept { x } else { 0.0_f64.copysign(x) };
    }
    let step = 2.0_f64.powi(grid.min_exponent() - grid.bits() as i32);
    let units = x / step;
    let whole = if hot.random {
        (units + f64::midpoint(signed(word(x, hot.seed)), 1.0)).floor()
    } else {
        units.round_ties_even()
    };
    whole * step
}

/// Neighbours as whole steps of which the largest has so `many`, and the step. Of zeros there is no step.
fn in_steps(row: &[Planned], many: f64, hot: Hot) -> (f64, impl Iterator<Item = f64>) {
    let most = row.iter().fold(0.0_f64, |most, x| most.max(x.0.abs()));
    let step = most / many;
    let whole = move |x: &Planned| {
        let steps = if step == 0.0 { x.0 } else { x.0 / step };
        if hot.random {
            let up = f64::midpoint(signed(word(x.0, hot.seed)), 1.0);
            (steps + up).floor().clamp(-many, many)
        } else {
            steps.round_ties_even()
        }
    };
    (step, row.iter().map(whole))
}

/// Whether every partial sum of these terms is on the grid, whatever the order: they are multiples of
/// one power of two, and together below as many of it as the fraction can count.
fn exact_in_any_order(terms: &[f64], step: Step) -> bool {
    let (mut total, mut unit) = (0.0, i32::MAX);
    for term in terms.iter().filter(|term| **term != 0.0) {
        let exponent = ((term.to_bits() >> 52) & 0x7ff) as i32 - 1023;
        let fraction = (term.to_bits() & ((1 << 52) - 1)) | (1 << 52);
        unit = unit.min(exponent - 52 + fraction.trailing_zeros() as i32);
        total += term.abs();
    }
    unit == i32::MAX || total <= 2.0_f64.powi((unit + 53 - step.drop as i32).clamp(-1074, 1023))
}

/// What is to be added. The sums of small heads are too many for an allocation each.
struct Terms {
    few: [f64; 32],
    many: Vec<f64>,
}

impl Terms {
    fn new() -> Terms {
        Terms { few: [0.0; 32], many: Vec::new() }
    }

    fn of(&mut self, n: usize, f: impl Fn(usize) -> Planned) -> &[f64] {
        let terms: &mut [f64] = if n <= self.few.len() {
            &mut self.few[..n]
        } else {
            self.many.resize(n, 0.0);
            &mut self.many
        };
        for (i, term) in terms.iter_mut().enumerate() {
            *term = f(i).0;
        }
        terms
    }
}

/// An addition on the grid, off by up to half a unit in the last place even where this order happens
/// to be exact.
fn inexact(x: f64, hot: Hot) -> f64 {
    let Step { grid, place, .. } = hot.accumulator;
    let half = grid.map_or(0.0, |grid| place * grid.half_ulp(x));
    round(x + half * signed(word(-x, hot.seed)), hot.accumulator, hot)
}

impl Planned {
    /// The result of an operation.
    #[inline]
    fn result(x: f64) -> Planned {
        let hot = HOT.get();
        Planned(round(x, hot.accumulator, hot))
    }

    /// The result of an elementary function that is right to within `ulps` of f32.
    fn function(x: f64, ulps: impl FnOnce(Functions) -> f64) -> Planned {
        let hot = HOT.get();
        if !hot.random || x == 0.0 {
            return Planned::result(x);
        }
        let functions = FUNCTIONS.get();
        // Half an ulp is the rounding of the result itself.
        let extra = (ulps(functions) - 0.5).max(0.0) * 2.0 * Grid::F32.half_ulp(x);
        let own = signed(word(-x, hot.seed));
        Planned::result(x + extra * (functions.lean + own) / 2.0)
    }
}

impl Add for Planned {
    type Output = Planned;
    #[inline]
    fn add(self, other: Planned) -> Planned {
        Planned::result(self.0 + other.0)
    }
}
impl Sub for Planned {
    type Output = Planned;
    #[inline]
    fn sub(self, other: Planned) -> Planned {
        Planned::result(self.0 - other.0)
    }
}
impl Mul for Planned {
    type Output = Planned;
    #[inline]
    fn mul(self, other: Planned) -> Planned {
        Planned::result(self.0 * other.0)
    }
}
impl Div for Planned {
    type Output = Planned;
    fn div(self, other: Planned) -> Planned {
        Planned::function(self.0 / other.0, |f| f.root)
    }
}
impl Neg for Planned {
    type Output = Planned;
    fn neg(self) -> Planned {
        Planned(-self.0)
    }
}
impl AddAssign for Planned {
    #[inline]
    fn add_assign(&mut self, other: Planned) {
        *self = *self + other;
    }
}
impl MulAssign for Planned {
    #[inline]
    fn mul_assign(&mut self, other: Planned) {
        *self = *self * other;
    }
}
impl PartialOrd for Planned {
    fn partial_cmp(&self, other: &Planned) -> Option<Ordering> {
        self.0.partial_cmp(&other.0)
    }
}

impl Real for Planned {
    const NAME: &'static str = "planned";

    /// A random run adds from a place of its own on, in one chain or in several, and no addition is
    /// taken for exact that in another order would not be.
    fn sum(n: usize, f: impl Fn(usize) -> Planned) -> Planned {
        let hot = HOT.get();
        if !hot.random || hot.accumulator.grid.is_none() || n < 2 {
            return interleaved(n, LANES, f);
        }
        let mut terms = Terms::new();
        let terms = terms.of(n, f);
        if exact_in_any_order(terms, hot.accumulator) {
            return Planned(terms.iter().sum());
        }
        let order = mix(hot.seed ^ n as u64);
        let start = (order >> 32) as usize % n;
        // Half of the runs in one chain: the order with the most error.
        let width = [1, 1, 4, 16][(order & 3) as usize];
        let mut lanes = [0.0_f64; LANES];
        for i in 0..n {
            let at = if i + start < n { i + start } else { i + start - n };
            let lane = i % width;
            lanes[lane] = if i < width { terms[at] } else { inexact(lanes[lane] + terms[at], hot) };
        }
        let more = &lanes[1..width.min(n)];
        Planned(more.iter().fold(lanes[0], |sum, &lane| inexact(sum + lane, hot)))
    }

    fn inner(n: usize, f: impl Fn(usize) -> Planned) -> Planned {
        let hot = HOT.get();
        match hot.sums {
            Sums::Truncated(products) if 0 < n => {
                Planned(truncated::sum(Terms::new().of(n, f), products, hot))
            }
            _ => Planned::sum(n, f),
        }
    }

    fn of(x: f64) -> Planned {
        Planned::result(x)
    }
    fn to_f64(self) -> f64 {
        self.0
    }
    fn sqrt(self) -> Planned {
        Planned::function(self.0.sqrt(), |f| f.root)
    }
    fn exp(self) -> Planned {
        Planned::function(self.0.exp(), |f| f.exp)
    }
    fn ln_1p(self) -> Planned {
        Planned::function(self.0.ln_1p(), |f| f.log)
    }
    fn ln(self) -> Planned {
        Planned::function(self.0.ln(), |f| f.log)
    }
    fn at(self, site: Site) -> Planned {
        match STORES.get()[site as usize] {
            Some(grid) => Planned(round(self.0, Step::new(grid), HOT.get().stored())),
            None => self,
        }
    }
    #[inline]
    fn operand(self) -> Planned {
        let hot = HOT.get();
        match hot.dot {
            Some(grid) => Planned(round(self.0, Step::new(grid), hot.stored())),
            None => self,
        }
    }
    fn activations(row: &[Planned]) -> Option<Vec<Planned>> {
        let hot = HOT.get().stored();
        match ACTIVATIONS.get() {
            Activations::F32 | Activations::Fp8 => None,
            Activations::Bf16 => {
                let step = Step::new(Grid::Bf16);
                Some(row.iter().map(|x| Planned(round(x.0, step, hot))).collect())
            }
            Activations::Int8 => {
                let read = |block| {
                    let (step, whole) = in_steps(block, 127.0, hot);
                    whole.map(move |whole| Planned(whole * step))
                };
                Some(row.chunks(BLOCK).flat_map(read).collect())
            }
        }
    }
    fn codes(row: &[Planned]) -> Option<(Vec<Planned>, Vec<Planned>)> {
        if ACTIVATIONS.get() != Activations::Fp8 {
            return None;
        }
        let (step, hot) = (Step::new(Grid::Fp8), HOT.get().stored());
        let (mut scales, mut codes) = (Vec::new(), Vec::with_capacity(row.len()));
        for group in row.chunks(FP8_BLOCK) {
            let largest = group.iter().fold(0.0_f64, |most, x| most.max(x.0.abs()));
            let scale = Planned(largest) / Planned(Grid::Fp8.max());
            let by = Planned(scale.0.max(LEAST));
            codes.extend(group.iter().map(|&x| Planned(round((x / by).0, step, hot))));
            scales.push(scale);
        }
        Some((scales, codes))
    }
    fn of_codes(x: &[Planned], w: &[Planned]) -> Planned {
        let hot = HOT.get();
        if hot.sums == Sums::Fp22 && !x.is_empty() {
            return Planned(truncated::sum_of_codes(x, w, hot));
        }
        Planned::inner(x.len(), |i| x[i] * w[i])
    }
    fn cached(row: &[Planned]) -> Option<(Planned, Vec<Planned>)> {
        match CACHE.get() {
            Cache::AsStored => None,
            Cache::Int8 | Cache::Int8ByInt16 => {
                let (step, whole) = in_steps(row, 127.0, HOT.get().stored());
                // A row in which there is no number says nothing of the others either.
                let step = if row.iter().all(|x| x.0.is_finite()) { step } else { f64::NAN };
                Some((Planned::result(step), whole.map(Planned).collect()))
            }
        }
    }
    fn counted(row: &[Planned]) -> Option<Vec<Planned>> {
        (CACHE.get() == Cache::Int8ByInt16).then(|| {
            let (step, whole) = in_steps(row, 32767.0, HOT.get().stored());
            let step = Planned::result(step).0;
            whole.map(|whole| Planned(whole * step)).collect()
        })
    }
    fn table(x: f32) -> Planned {
        Planned::function(f64::from(x), |f| f.trig)
    }
}

impl Element for Planned {
    fn view(x: ArrayViewD<'_, Planned>) -> View<'_> {
        View::Wide(x.map(|x| x.0))
    }
    fn view_mut(_: ArrayViewMutD<'_, Planned>) -> ViewMut<'_> {
        ViewMut::Opaque
    }
    fn recorded(x: Recorded) -> Option<ArrayD<Planned>> {
        f64::recorded(x).map(|x| x.mapv(Planned))
    }
}

impl Cast<f32> for Planned {
    fn cast(x: f32) -> Planned {
        Planned(f64::from(x))
    }
}

impl Number for Planned {}

mod truncated;

#[cfg(test)]
mod tests;
