//! The only place that reads a clock.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// What `f` returns, and how long it took.
pub fn time<T>(f: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    let result = f();
    (result, start.elapsed())
}

/// Time since some moment.
#[derive(Clone, Copy, Debug)]
pub struct Stopwatch(Instant);

impl Stopwatch {
    /// From now on.
    #[expect(clippy::new_without_default, reason = "a stopwatch is started, not defaulted")]
    pub fn new() -> Stopwatch {
        Stopwatch(Instant::now())
    }

    /// Until now.
    pub fn elapsed(&self) -> Duration {
        self.0.elapsed()
    }
}

/// Steps of the chain.
const STEPS: u64 = 2048;

/// What a fixed chain of dependent operations takes, none of which touches memory: the clock that the
/// processor runs at, on machines that do not tell it.
pub fn chain() -> Duration {
    let (end, took) = time(|| {
        (0..STEPS).fold(std::hint::black_box(1_u64), |x, step| {
            std::hint::black_box(x.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(step))
        })
    });
    std::hint::black_box(end);
    took
}

/// Seconds since 1970.
pub fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::chain;

    #[test]
    fn a_chain_takes_time() {
        assert!(0 < chain().as_nanos());
    }
}
