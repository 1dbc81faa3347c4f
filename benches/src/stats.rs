//! What samples say, and how surely.
//!
//! Everything that draws takes its seed: the same samples have the same answer everywhere.

mod bootstrap;
mod change;
mod rank;

pub use self::{
    bootstrap::{Interval, median_interval, ratio_interval},
    change::{Change, change_points},
    rank::{Ranks, equivalence, rank_sum, signed_rank},
};

/// The middle of samples; NaN of none.
pub fn median(samples: &[f64]) -> f64 {
    quantile(samples, 0.5)
}

/// The value below which a share of the samples lies, between two of them on the line; NaN of none.
pub fn quantile(samples: &[f64], share: f64) -> f64 {
    let mut samples = samples.to_vec();
    let Some(last) = samples.len().checked_sub(1) else { return f64::NAN };
    let at = share.clamp(0.0, 1.0) * last as f64;
    let (_, &mut below, above) = samples.select_nth_unstable_by(at as usize, f64::total_cmp);
    let above = above.iter().copied().min_by(f64::total_cmp).filter(|_| 0.0 < at.fract());
    above.map_or(below, |above| below + (above - below) * at.fract())
}

/// How likely a standard normal number is above `z`.
fn above(z: f64) -> f64 {
    0.5 * libm::erfc(z / std::f64::consts::SQRT_2)
}

/// Chances of many questions asked together, after Benjamini and Hochberg: of those that are called at
/// most `q`, a share of at most `q` is called wrongly.
pub fn benjamini_hochberg(chances: &[f64]) -> Vec<f64> {
    let n = chances.len() as f64;
    let mut order: Vec<usize> = (0..chances.len()).collect();
    order.sort_by(|&a, &b| chances[b].total_cmp(&chances[a]));
    let mut least = 1.0_f64;
    let mut q = vec![1.0; chances.len()];
    for (below, at) in order.into_iter().enumerate() {
        least = least.min(chances[at] * n / (n - below as f64));
        q[at] = least;
    }
    q
}

#[cfg(test)]
mod tests;
