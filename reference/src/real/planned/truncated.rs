//! Sums as tensor cores have them (`golden::plan::Sums::Truncated`, `Fp22`).

use golden::plan::Grid;

use super::{Hot, LANES, Planned, exact_in_any_order, inexact, mix, round, signed, word};

/// Steps of a block.
const DEALT: usize = 4;

/// How a step adds.
#[derive(Clone, Copy)]
struct Core {
    /// Products that are added at once.
    products: usize,
    /// Bits that an addend keeps below the last of the largest one's.
    guard: u32,
    /// How its sums are rounded.
    hot: Hot,
}

/// What is added, and where the first bit of each is, or may be: numbers with that exponent.
#[derive(Clone, Copy)]
struct Terms<'a> {
    values: &'a [f64],
    tops: &'a [f64],
}

/// The sum of `terms`, so many at once.
pub(super) fn sum(terms: &[f64], products: usize, hot: Hot) -> f64 {
    of(Terms { values: terms, tops: terms }, Core { products, guard: 2, hot }, hot)
}

/// The sum of products of codes in FP8, in 13 bits.
pub(super) fn sum_of_codes(x: &[Planned], w: &[Planned], hot: Hot) -> f64 {
    let both = || x.iter().zip(w).map(|(x, w)| (x.0, w.0));
    let values: Vec<f64> = both().map(|(x, w)| x * w).collect();
    // A product is not shifted to its first bit: it is where the exponents of its factors add up to.
    let top = |(x, w): (f64, f64)| if x * w == 0.0 { 0.0 } else { first_bit(x) * first_bit(w) };
    let tops: Vec<f64> = both().map(top).collect();
    let short = Hot { accumulator: hot.accumulator.without(10), ..hot };
    let core = Core { products: 32, guard: 0, hot: short };
    of(Terms { values: &values, tops: &tops }, core, hot)
}

/// The power of two of a code; of those below the smallest normal one its.
fn first_bit(code: f64) -> f64 {
    let least = 2.0_f64.powi(Grid::Fp8.min_exponent());
    f64::from_bits(code.abs().max(least).to_bits() >> 52 << 52)
}

/// The sum of `terms` on a core; chains meet outside of it.
///
/// To the nearest, it is what the hardware gives in the plain order. In a random run a block of four steps
/// is dealt its channels in pieces of some width, as kernels do whose threads read several neighbours; blocks
/// come from a place of the run's own on, in one chain or in several; and a share of the steps that is its
/// own is cut, the others being rounded at random: from what rounds to the nearest to what always cuts.
fn of(Terms { values, tops }: Terms<'_>, core: Core, outside: Hot) -> f64 {
    let Core { products, hot, .. } = core;
    if exact_in_any_order(values, hot.accumulator) {
        return values.iter().sum();
    }
    if !hot.random {
        let steps = values.chunks(products).zip(tops.chunks(products));
        return steps.fold(0.0, |sum, (values, tops)| core.cut(sum, Terms { values, tops }));
    }
    let order = mix(hot.seed ^ values.len() as u64);
    let cuts = signed(mix(hot.seed ^ 0xc075));
    let dealt = (products >> (order >> 8 & 7).min(4)).max(1);
    let blocks = values.len().div_ceil(DEALT * products);
    let start = (order >> 32) as usize % blocks;
    let width = [1, 1, 4, 16][(order & 3) as usize];
    let (mut lanes, mut used) = ([0.0; LANES], 0);
    let (mut step, mut ends) = (Vec::with_capacity(products), Vec::with_capacity(products));
    for block in 0..blocks {
        let at = (block + start) % blocks * DEALT * products;
        let block = at..values.len().min(at + DEALT * products);
        for turn in 0..DEALT {
            for (of, to) in [(values, &mut step), (tops, &mut ends)] {
                to.clear();
                to.extend(of[block.clone()].chunks(dealt).skip(turn).step_by(DEALT).flatten());
            }
            let Some(&first) = step.first() else { continue };
            let sum = &mut lanes[used % width];
            *sum = if signed(word(*sum + first, !hot.seed)) < cuts {
                core.cut(*sum, Terms { values: &step, tops: &ends })
            } else {
                inexact(*sum + step.iter().sum::<f64>(), hot)
            };
            used += 1;
        }
    }
    let more = &lanes[1..width.min(used)];
    more.iter().fold(lanes[0], |sum, &lane| inexact(sum + lane, outside))
}

impl Core {
    /// One step: every addend cut where the largest ends, the result cut as well.
    fn cut(self, sum: f64, Terms { values, tops }: Terms<'_>) -> f64 {
        let hot = self.hot;
        let largest = tops.iter().fold(sum.abs(), |most, x| most.max(x.abs()));
        let exact = sum + values.iter().sum::<f64>();
        let bits = 52 - hot.accumulator.drop;
        if !largest.is_normal() || !exact.is_finite() || hot.accumulator.grid.is_none() {
            return round(exact, hot.accumulator, hot);
        }
        // A power of two, at the last bit that an addend keeps.
        let unit = f64::from_bits(((largest.to_bits() >> 52) - u64::from(bits + self.guard)) << 52);
        let units = |x: f64| (x / unit).trunc();
        let total = unit * values.iter().fold(units(sum), |total, &x| total + units(x));
        let kept = f64::from_bits(total.to_bits() & !((1 << hot.accumulator.drop) - 1));
        // Already on the grid but for its ends.
        round(kept, hot.accumulator, hot)
    }
}
