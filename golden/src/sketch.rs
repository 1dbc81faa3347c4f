//! Sketches: a large tap in 99 numbers, enough to say how far another answer is from it.
//!
//! `[0]` sum, `[1]` sum of squares, `[2]` largest magnitude, `[3 .. 67]` samples, `[67 .. 99]`
//! projections, all in f64. With `key` the first eight bytes of blake3 of the tap's name
//! (little-endian), `mix` the finaliser of `SplitMix64` and `h(k, i) = mix(k + (i + 1) *
//! 0x9e3779b97f4a7c15)`: sample `i` is element `(h(key, i) * n) >> 64`; projection `j` sums the
//! elements, element `e` negated where bit `j` of `h(mix(key), e)` is set.
//!
//! The difference of a projection of two taps is a random sum of their differences, so its square is
//! an unbiased estimate of `|got - want|^2`; 32 of them estimate it to about 25 %.

/// Numbers in a sketch.
pub const LEN: usize = 3 + SAMPLES + PROJECTIONS;

const SAMPLES: usize = 64;
const PROJECTIONS: usize = 32;

/// The sketch of a tap.
pub fn sketch(name: &str, x: impl ExactSizeIterator<Item = f64> + Clone) -> Vec<f64> {
    let n = x.len();
    let hash = blake3::hash(name.as_bytes());
    let key = hash.as_bytes().first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    let values: Vec<f64> = x.collect();
    let (mut sum, mut squares, mut largest) = (0.0, 0.0, 0.0_f64);
    let mut projections = [0.0; PROJECTIONS];
    let signs = mix(key);
    for (e, &x) in values.iter().enumerate() {
        sum += x;
        squares += x * x;
        largest = largest.max(x.abs());
        let bits = draw(signs, e as u64);
        for (j, projection) in projections.iter_mut().enumerate() {
            *projection += if bits >> j & 1 == 0 { x } else { -x };
        }
    }
    let sample = |i: u64| {
        values.get(((u128::from(draw(key, i)) * n as u128) >> 64) as usize).copied().unwrap_or(0.0)
    };
    let head = [sum, squares, largest];
    head.into_iter().chain((0..SAMPLES as u64).map(sample)).chain(projections).collect()
}

/// How far apart two sketches say their taps are: relative RMS, and the largest difference of a sample
/// relative to the RMS of the tap. `n` is the number of elements. A NaN anywhere is infinite.
pub fn distance(want: &[f64], got: &[f64], n: usize) -> (f64, f64) {
    let (Some(&squares), LEN, LEN) = (want.get(1), want.len(), got.len()) else {
        return (f64::INFINITY, f64::INFINITY);
    };
    let difference = |range: std::ops::Range<usize>| {
        want[range.clone()].iter().zip(&got[range]).map(|(w, g)| g - w)
    };
    let error = difference(3 + SAMPLES..LEN).map(|d| d * d).sum::<f64>() / PROJECTIONS as f64;
    let rms = (squares / n.max(1) as f64).sqrt();
    let worst = difference(3..3 + SAMPLES)
        .fold(0.0_f64, |m, d| if d.is_nan() { f64::INFINITY } else { m.max(d.abs()) });
    let finite = |x: f64| if x.is_nan() { f64::INFINITY } else { x };
    (finite((error / squares).sqrt()), finite(worst / rms))
}

fn mix(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn draw(key: u64, index: u64) -> u64 {
    mix(key.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}

#[cfg(test)]
mod tests {
    use super::{LEN, distance, sketch};

    #[test]
    fn the_distance_is_estimated() {
        let x: Vec<f64> = (0..5000).map(|i| f64::from(i * 7919 % 1000) - 500.0).collect();
        let y: Vec<f64> =
            x.iter().enumerate().map(|(i, x)| x * (1.0 + 1e-4 * ((i % 13) as f64 - 6.0))).collect();
        let (a, b) = (sketch("tap", x.iter().copied()), sketch("tap", y.iter().copied()));
        assert_eq!(a.len(), LEN);
        let true_distance = {
            let err: f64 = x.iter().zip(&y).map(|(x, y)| (x - y) * (x - y)).sum();
            (err / x.iter().map(|x| x * x).sum::<f64>()).sqrt()
        };
        let (estimate, _) = distance(&a, &b, x.len());
        assert!(
            estimate / true_distance < 2.0 && 0.5 < estimate / true_distance,
            "{estimate} {true_distance}"
        );
        assert_eq!(distance(&a, &a, x.len()), (0.0, 0.0));
        let mut broken = b;
        broken[98] = f64::NAN;
        assert_eq!(distance(&a, &broken, x.len()).0, f64::INFINITY);
    }
}
