//! Times for tools that follow them.

use benches::stats::quantile;
use serde_json::{Map, Value, json};

use super::{
    criterion::{mean, std_dev},
    nothing,
};
use crate::runs::{Results, rows::ModelSpeed};

/// Something that was timed.
pub(crate) struct Timed {
    pub(crate) id: String,
    /// On which machine.
    pub(crate) machine: String,
    /// Nanoseconds of a call, or of a token.
    pub(super) samples: Vec<f64>,
    pub(crate) median: f64,
    /// That a call has to move.
    pub(super) bytes: f64,
    /// What else is known of it.
    pub(super) more: Option<String>,
}

/// Calls of ops, tokens of models.
pub(crate) fn all(results: &Results) -> Vec<Timed> {
    let mut all = Vec::new();
    let machine = |run: usize| results.runs[run].env.fingerprint.clone();
    for row in results.op_speeds.iter().filter(|row| row.timed()) {
        all.push(Timed {
            id: row.case.clone(),
            machine: machine(row.run),
            samples: row.samples_ns.clone(),
            median: row.median_ns,
            bytes: row.bytes,
            more: row.share_of_roof.map(|share| format!("{:.1} % of the roof", 100.0 * share)),
        });
    }
    for row in &results.model_speeds {
        for (way, samples, median) in ways(row) {
            let Some(median) = median else { continue };
            let engine = if row.engine.is_empty() { "reference" } else { &row.engine };
            let cache = row.kv_cache.as_ref().map_or(String::new(), |kept| format!(" kv={kept}"));
            let fed = if row.fed { " fed" } else { "" };
            let batch =
                if row.batch == 1 { String::new() } else { format!(" batch={}", row.batch) };
            all.push(Timed {
                id: format!("model/{way}/{}/{engine}{cache}{batch}@{}{fed}", row.model, row.depth),
                machine: machine(row.run),
                samples: samples.iter().map(|pace| 1e9 / pace).collect(),
                median: 1e9 / median,
                bytes: 0.0,
                more: Some(format!("{median:.2} tokens/s")),
            });
        }
    }
    for row in &results.scales {
        let number = row.number.as_ref().map_or(String::new(), |number| format!(" {number}"));
        // A layer alone is another thing than the model.
        let layer = if row.part == "model" { String::new() } else { format!(" {}", row.part) };
        for point in &row.points {
            all.push(Timed {
                id: format!("scale/{}{layer}/{}{number}@{}", row.model, row.engine, point.context),
                machine: machine(row.run),
                samples: point.samples_ns.concat(),
                median: 1e6 * point.ms_per_token,
                bytes: 0.0,
                more: point.memory_bytes.map(|bytes| format!("{bytes} bytes of memory")),
            });
        }
    }
    all
}

/// Tokens fed at once and one by one: samples and median of tokens in a second.
fn ways(row: &ModelSpeed) -> [(&'static str, &[f64], Option<f64>); 2] {
    let median = |samples: Option<crate::runs::rows::Samples>, one: Option<f64>| {
        samples.map(|samples| samples.median).or(one).filter(|pace| 0.0 < *pace)
    };
    [
        (
            "prefill",
            &row.prefill_samples,
            median(row.prefill_tokens_per_second, row.prefill_tokens_per_s),
        ),
        (
            "decode",
            &row.decode_samples,
            median(row.decode_tokens_per_second, row.decode_tokens_per_s),
        ),
    ]
}

fn some(results: &Results) -> anyhow::Result<Vec<Timed>> {
    let all = all(results);
    if all.is_empty() {
        return Err(nothing("no row has a time; `karat bench` writes some"));
    }
    Ok(all)
}

/// Least and most.
fn ends(samples: &[f64]) -> Option<(f64, f64)> {
    let low = samples.iter().copied().reduce(f64::min)?;
    Some((low, samples.iter().copied().fold(low, f64::max)))
}

/// Bencher Metric Format: nanoseconds, with the least and the most of the samples.
pub(super) fn bmf(results: &Results) -> anyhow::Result<(String, usize)> {
    let timed = some(results)?;
    let mut all = Map::new();
    for one in &timed {
        let mut latency = json!({"value": one.median});
        if let Some((low, high)) = ends(&one.samples) {
            latency["lower_value"] = json!(low);
            latency["upper_value"] = json!(high);
        }
        all.insert(one.id.clone(), json!({"latency": latency}));
    }
    Ok((format!("{:#}\n", Value::Object(all)), timed.len()))
}

/// github-action-benchmark: nanoseconds, of which fewer are better.
pub(super) fn action(results: &Results) -> anyhow::Result<(String, usize)> {
    let timed = some(results)?;
    let entry = |one: &Timed| {
        let mut entry = json!({"name": one.id, "unit": "ns", "value": one.median});
        if 1 < one.samples.len() {
            let half = (quantile(&one.samples, 0.75) - quantile(&one.samples, 0.25)) / 2.0;
            entry["range"] = json!(format!("± {half:.0}"));
        }
        if let Some(more) = &one.more {
            entry["extra"] = json!(more);
        }
        entry
    };
    let all: Vec<Value> = timed.iter().map(entry).collect();
    Ok((format!("{:#}\n", Value::Array(all)), timed.len()))
}

/// A line for the prompt and one for the tokens that follow, as llama-bench has them.
pub(super) fn llama(results: &Results) -> anyhow::Result<(String, usize)> {
    let mut lines = Vec::new();
    // It has no word for sequences side by side.
    for row in results.model_speeds.iter().filter(|row| row.batch == 1) {
        let env = &results.runs[row.run].env;
        for (way, pace, _) in ways(row) {
            let tokens = if way == "prefill" { row.prefill } else { row.decode };
            if pace.is_empty() || tokens == 0 {
                continue;
            }
            let ns: Vec<f64> = pace.iter().map(|pace| 1e9 * tokens as f64 / pace).collect();
            let (prompt, gen_) = if way == "prefill" { (tokens, 0) } else { (0, tokens) };
            lines.push(json!({
                "build_commit": env.revision.as_deref().map(|r| r.get(..8).unwrap_or(r)), "cpu_info": env.cpu,
                "gpu_info": env.gpu.clone().unwrap_or_default(), "backends": row.engine, "model_filename": row.model,
                "model_type": "qwen3_next", "n_threads": env.threads, "type_k": row.kv_cache, "type_v": row.kv_cache,
                "n_prompt": prompt, "n_gen": gen_, "n_depth": row.depth, "test_time": env.time,
                "avg_ns": mean(&ns).round(), "stddev_ns": std_dev(&ns).round(), "avg_ts": mean(pace),
                "stddev_ts": std_dev(pace), "samples_ns": ns.iter().map(|ns| ns.round()).collect::<Vec<_>>(),
                "samples_ts": pace,
            }));
        }
    }
    if lines.is_empty() {
        return Err(nothing(
            "llama-bench: no row has samples of tokens in a second; `karat bench --model` writes some",
        ));
    }
    let text: Vec<String> = lines.iter().map(Value::to_string).collect();
    let text = text.join("\n") + "\n";
    Ok((text, lines.len()))
}
