//! Sums as tensor cores have them (`golden::plan::Sums::Truncated`).

use super::{Hot, LANES, exact_in_any_order, inexact, mix, round, signed, word};

/// Bits that an addend keeps below the last of the largest one's.
const GUARD: u32 = 2;

/// Steps of a block.
const DEALT: usize = 4;

/// The sum of `terms`, so many at once.
///
/// To the nearest, it is what the hardware gives in the plain order. In a random run a block of four steps
/// is dealt its channels in pieces of some width, as kernels do whose threads read several neighbours; blocks
/// come from a place of the run's own on, in one chain or in several; and a share of the steps that is its
/// own is cut, the others being rounded at random: from what rounds to the nearest to what always cuts.
pub(super) fn sum(terms: &[f64], products: usize, hot: Hot) -> f64 {
    if exact_in_any_order(terms, hot.accumulator) {
        return terms.iter().sum();
    }
    if !hot.random {
        return terms.chunks(products).fold(0.0, |sum, step| cut(sum, step, hot));
    }
    let order = mix(hot.seed ^ terms.len() as u64);
    let cuts = signed(mix(hot.seed ^ 0xc075));
    let dealt = (products >> (order >> 8 & 7).min(4)).max(1);
    let blocks = terms.len().div_ceil(DEALT * products);
    let start = (order >> 32) as usize % blocks;
    let width = [1, 1, 4, 16][(order & 3) as usize];
    let (mut lanes, mut used) = ([0.0; LANES], 0);
    let mut step = Vec::with_capacity(products);
    for block in 0..blocks {
        let at = (block + start) % blocks * DEALT * products;
        let block = &terms[at..terms.len().min(at + DEALT * products)];
        for turn in 0..DEALT {
            step.clear();
            step.extend(block.chunks(dealt).skip(turn).step_by(DEALT).flatten());
            let Some(&first) = step.first() else { continue };
            let sum = &mut lanes[used % width];
            *sum = if signed(word(*sum + first, !hot.seed)) < cuts {
                cut(*sum, &step, hot)
            } else {
                inexact(*sum + step.iter().sum::<f64>(), hot)
            };
            used += 1;
        }
    }
    // Chains meet outside of the tensor core.
    let more = &lanes[1..width.min(used)];
    more.iter().fold(lanes[0], |sum, &lane| inexact(sum + lane, hot))
}

/// One step: every addend cut where the largest ends, the result cut as well.
fn cut(sum: f64, step: &[f64], hot: Hot) -> f64 {
    let largest = step.iter().fold(sum.abs(), |most, x| most.max(x.abs()));
    let exact = sum + step.iter().sum::<f64>();
    let bits = 52 - hot.accumulator.drop;
    if !largest.is_normal() || !exact.is_finite() || hot.accumulator.grid.is_none() {
        return round(exact, hot.accumulator, hot);
    }
    // A power of two, at the last bit that an addend keeps.
    let unit = f64::from_bits(((largest.to_bits() >> 52) - u64::from(bits + GUARD)) << 52);
    let units = |x: f64| (x / unit).trunc();
    let total = unit * step.iter().fold(units(sum), |total, &x| total + units(x));
    let kept = f64::from_bits(total.to_bits() & !((1 << hot.accumulator.drop) - 1));
    // Already on the grid but for its ends.
    round(kept, hot.accumulator, hot)
}
