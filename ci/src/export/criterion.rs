//! A folder as Criterion leaves it: for each case its samples, what they come to, and what it is called.

use std::{fs, path::Path};

use benches::stats::{median, quantile};
use golden::Rng;
use serde_json::{Value, json};

use super::{
    nothing,
    speed::{Timed, all},
};
use crate::{
    exit::{Exit, fail, refuse},
    runs::Results,
};

/// Writes `criterion/CASE/BASELINE` into a folder; how many cases there were. Other baselines that are
/// there stay.
pub(super) fn write(results: &Results, folder: &Path, baseline: &str) -> anyhow::Result<usize> {
    if !golden::file::is_plain_name(baseline) || baseline == "change" {
        return Err(refuse(format!("--baseline {baseline:?}: expected a name of a folder")));
    }
    let timed: Vec<Timed> =
        all(results).into_iter().filter(|one| !one.samples.is_empty()).collect();
    if timed.is_empty() {
        return Err(nothing("criterion: no row has samples of a time; `karat bench` writes some"));
    }
    let made = || -> std::io::Result<()> {
        fs::create_dir_all(folder.join("criterion"))?;
        // Whole before it has its name.
        let beside = tempfile::tempdir_in(folder)?;
        for one in &timed {
            let directory = directory(&one.id);
            let place = beside.path().join(&directory);
            fs::create_dir(&place)?;
            for (file, value) in files(one, &directory) {
                fs::write(place.join(file), format!("{value}\n"))?;
            }
            let home = folder.join("criterion").join(&directory);
            fs::create_dir_all(&home)?;
            let named = home.join(baseline);
            if named.exists() {
                fs::remove_dir_all(&named)?;
            }
            fs::rename(&place, &named)?;
        }
        Ok(())
    };
    made().map_err(|e| fail(Exit::Unfit, format!("{}: {e}", folder.display())))?;
    Ok(timed.len())
}

/// A name that a file system takes and no other case has.
fn directory(id: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' };
    let name: String = id.chars().map(plain).take(80).collect();
    format!("{name}-{}", &blake3::hash(id.as_bytes()).to_hex()[..8])
}

fn files(one: &Timed, directory: &str) -> [(&'static str, Value); 4] {
    let (group, function) = one.id.split_once('/').unwrap_or((&one.id, ""));
    let throughput = (0.0 < one.bytes).then(|| json!({"Bytes": one.bytes as u64}));
    let benchmark = json!({
        "group_id": group, "function_id": function, "value_str": null, "throughput": throughput,
        "full_id": one.id, "directory_name": directory, "title": one.id,
    });
    let ones = vec![1.0; one.samples.len()];
    let sample = json!({"sampling_mode": "Flat", "iters": ones, "times": one.samples});
    let [low, high] = [0.25, 0.75].map(|share| quantile(&one.samples, share));
    let fences = [-3.0, -1.5, 1.5, 3.0]
        .map(|k| if k < 0.0 { low + k * (high - low) } else { high + k * (high - low) });
    [
        ("benchmark.json", benchmark),
        ("sample.json", sample),
        ("estimates.json", estimates(&one.samples)),
        ("tukey.json", json!(fences)),
    ]
}

/// A statistic of samples.
type Statistic = fn(&[f64]) -> f64;

const STATISTICS: [(&str, Statistic); 4] =
    [("mean", mean), ("median", median), ("median_abs_dev", median_abs_dev), ("std_dev", std_dev)];

/// What the samples come to, with intervals from drawing them again.
fn estimates(samples: &[f64]) -> Value {
    const DRAWS: usize = 1_000_000;
    let rounds = (DRAWS / samples.len()).clamp(100, 1000);
    let mut rng = Rng::keyed("estimates", samples.len() as u64);
    let mut drawn: [Vec<f64>; 4] = Default::default();
    for _ in 0..rounds {
        let again: Vec<f64> =
            (0..samples.len()).map(|_| samples[rng.below(samples.len())]).collect();
        for ((_, statistic), drawn) in STATISTICS.iter().zip(&mut drawn) {
            drawn.push(statistic(&again));
        }
    }
    let mut all = serde_json::Map::new();
    for ((name, statistic), drawn) in STATISTICS.iter().zip(drawn) {
        let estimate = json!({
            "confidence_interval": {
                "confidence_level": 0.95, "lower_bound": quantile(&drawn, 0.025),
                "upper_bound": quantile(&drawn, 0.975),
            },
            "point_estimate": statistic(samples), "standard_error": std_dev(&drawn),
        });
        all.insert((*name).to_owned(), estimate);
    }
    // Calls were timed one by one: there is no line through their numbers.
    all.insert("slope".to_owned(), Value::Null);
    Value::Object(all)
}

pub(super) fn mean(samples: &[f64]) -> f64 {
    samples.iter().sum::<f64>() / samples.len() as f64
}

/// About the mean, of a sample; zero of a single one.
pub(super) fn std_dev(samples: &[f64]) -> f64 {
    let mean = mean(samples);
    let sum: f64 = samples.iter().map(|x| (x - mean).powi(2)).sum();
    (sum / (samples.len() - 1).max(1) as f64).sqrt()
}

fn median_abs_dev(samples: &[f64]) -> f64 {
    let middle = median(samples);
    median(&samples.iter().map(|x| (x - middle).abs()).collect::<Vec<_>>())
}
