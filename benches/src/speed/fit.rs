//! How the time of a token grows with the context.

use super::Row;

/// `a + b T` seconds for a step of one token of each sequence after `T` others: least squares of the medians, each
/// relative to itself, so that a cliff at any depth weighs the same.
#[derive(Clone, Debug, PartialEq)]
pub struct Fit {
    /// The engine's name.
    pub engine: String,
    /// Sequences side by side.
    pub batch: usize,
    /// Depths it rests on.
    pub depths: usize,
    /// Seconds of a step after none.
    pub a: f64,
    /// Seconds that each token of the context adds.
    pub b: f64,
    /// What reading the keys and values of a token of each sequence takes, at the pace that memory was read at.
    pub bytes: f64,
    /// The furthest that a depth is off, relative to the line, and which: above it, slower.
    pub worst: (f64, usize),
}

impl Fit {
    /// Of an engine's rows of a batch whose states were made up, if there are three depths.
    pub(super) fn of(engine: &str, batch: usize, rows: &[Row]) -> Option<Fit> {
        let own = |row: &&Row| row.engine == engine && row.place.batch == batch;
        let rows: Vec<&Row> = rows.iter().filter(own).filter(|row| !row.place.depth.fed).collect();
        let depth = |row: &Row| row.place.depth.tokens;
        let point = |row: &&Row| Some((depth(row), batch as f64 / row.decode?.median));
        let points: Vec<_> = rows.iter().filter_map(point).collect();
        let (a, b) = line(&points)?;
        let least = rows.iter().min_by_key(|row| depth(row))?;
        let most = rows.iter().max_by_key(|row| depth(row))?;
        let grown = batch as f64 * (most.traffic.states - least.traffic.states) as f64;
        let tokens = (depth(most) - depth(least)) as f64;
        let mut paces: Vec<f64> = rows.iter().map(|row| row.read.median).collect();
        paces.sort_by(f64::total_cmp);
        let off = points.iter().map(|&(t, took)| (took / (a + b * t as f64) - 1.0, t));
        Some(Fit {
            engine: engine.to_owned(),
            batch,
            depths: points.len(),
            a,
            b,
            bytes: grown / tokens / paces[paces.len() / 2],
            worst: off.max_by(|x, y| x.0.abs().total_cmp(&y.0.abs()))?,
        })
    }
}

/// The line through at least three different depths.
fn line(points: &[(usize, f64)]) -> Option<(f64, f64)> {
    let mut depths: Vec<_> = points.iter().map(|point| point.0).collect();
    depths.sort_unstable();
    depths.dedup();
    if depths.len() < 3 {
        return None;
    }
    let (mut w, mut wx, mut wy, mut wxx, mut wxy) = (0.0, 0.0, 0.0, 0.0, 0.0);
    for &(depth, y) in points {
        let (x, weight) = (depth as f64, 1.0 / (y * y));
        w += weight;
        wx += weight * x;
        wy += weight * y;
        wxx += weight * x * x;
        wxy += weight * x * y;
    }
    let b = (w * wxy - wx * wy) / (w * wxx - wx * wx);
    Some(((wy - b * wx) / w, b))
}

#[cfg(test)]
mod tests {
    use golden::engine::Traffic;

    use super::Fit;
    use crate::speed::{Depth, Place, Row, Samples};

    fn row(tokens: usize, seconds: f64) -> Row {
        let read = Samples::of(vec![2e9]);
        Row {
            engine: "cpu".to_owned(),
            place: Place { batch: 2, depth: Depth { tokens, fed: false } },
            read,
            prefill: None,
            decode: Some(Samples::of(vec![2.0 / seconds])),
            taken: [Vec::new(), Vec::new()],
            traffic: Traffic { weights: 5, states: 7 + 500 * tokens as u64, ..Traffic::default() },
            step: 0.0,
            falls_back: None,
            factors: [None; 2],
            peak: None,
        }
    }

    #[test]
    fn a_line_is_found_and_a_cliff_is_told() {
        let line = |t: usize| row(t, 0.01 + 1e-6 * t as f64);
        let mut rows: Vec<_> = [1000, 4000, 16000, 64000].map(line).to_vec();
        assert_eq!(Fit::of("cpu", 1, &rows), None);
        let fit = Fit::of("cpu", 2, &rows).unwrap();
        assert!((fit.a - 0.01).abs() < 1e-9 && (fit.b - 1e-6).abs() < 1e-12, "{fit:?}");
        assert!((fit.bytes - 5e-7).abs() < 1e-15 && fit.worst.0.abs() < 1e-9, "{fit:?}");
        rows.push(row(32000, 2.0 * (0.01 + 1e-6 * 32000.0)));
        let fit = Fit::of("cpu", 2, &rows).unwrap();
        assert!(fit.worst.1 == 32000 && 0.3 < fit.worst.0, "{fit:?}");
    }

    #[test]
    fn two_depths_are_no_line() {
        let same = [row(1000, 0.01), row(1000, 0.02), row(2000, 0.01)];
        assert_eq!(Fit::of("cpu", 2, &same), None);
        let fed = Row {
            place: Place { batch: 2, depth: Depth { tokens: 3000, fed: true } },
            ..row(3000, 0.01)
        };
        assert_eq!(Fit::of("cpu", 2, &[row(1000, 0.01), row(2000, 0.01), fed]), None);
    }
}
