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

/// Year, month and day of some seconds since 1970, by the calendar of Gregory.
pub fn date(seconds: u64) -> (u64, u64, u64) {
    // Years begin in March here, so that a leap day is the last of its year; days count from 0000-03-01.
    let days = seconds / 86_400 + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let of_month = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (400 * era + year + u64::from(month <= 2), month, of_month)
}

#[cfg(test)]
mod tests {
    use super::{chain, date};

    #[test]
    fn days_have_their_dates() {
        for (seconds, want) in [
            (0, (1970, 1, 1)),
            (951_782_400, (2000, 2, 29)),
            (1_709_164_799, (2024, 2, 28)),
            (1_709_164_800, (2024, 2, 29)),
            (1_767_225_599, (2025, 12, 31)),
            (4_107_542_400, (2100, 3, 1)),
        ] {
            assert_eq!(date(seconds), want);
        }
    }

    #[test]
    fn a_chain_takes_time() {
        assert!(0 < chain().as_nanos());
    }
}
