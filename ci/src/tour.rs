//! `karat` without a command: everything that can be checked here, in two minutes.

use std::path::Path;

use benches::{ask::argmax, filter::Filter, plan::plan};
use golden::{
    Set, Weights,
    engine::{Rows, Want},
    synthetic::Synthetic,
};
use serde_json::json;

use crate::{
    check::{self, Run, Wanted},
    config::InForce,
    doctor,
    exit::{Exit, refuse},
    export, files, golden_cmd,
    out::{self, Out},
    report,
    resume::Before,
    runs::Results,
};

/// Where the rows of the last one stand, and the page that was made of them.
const RESULTS: &str = "target/karat/results.jsonl";
const REPORT: &str = "target/karat/report.html";

pub(crate) fn run(settings: &[InForce], out: &Out) -> anyhow::Result<Exit> {
    let watch = benches::clock::Stopwatch::new();
    out.record.also(Path::new(RESULTS));
    out.record.keep();
    out.line("machine");
    doctor::told(settings, out);
    let mut exit = Exit::Ok;

    out.line("\nevery op: every way to compute it under the bound of its precision plan, f32 against the official functions");
    let jobs = plan(Set::Smoke, &Filter::default(), None).map_err(refuse)?;
    let mut checks = Run::new(out, false);
    let bar = out.bar(jobs.len() as u64, "check", false);
    benches::bound::keep_in(&files::cache_dir().join("bounds"));
    benches::plan::check(&jobs, &benches::plan::Unwatched, None, &mut |row| {
        checks.add(row);
        bar.inc(1);
        !checks.over()
    });
    bar.finish_and_clear();
    check::recorded(&mut checks, &[], None, None, &Wanted::default(), &Before::default())?;
    exit = exit.gravest(checks.end()?);

    out.line("\nthe whole model: the reference and the fast CPU engine against recordings of the official implementation, on real files");
    let ids = golden_cmd::model_ids();
    let mut rows = Vec::new();
    let in_bf16: Vec<_> = ids.iter().filter(|id| golden_cmd::in_bf16(id)).collect();
    let bar = out.bar((3 * ids.len() + in_bf16.len()) as u64, "verify", false);
    let all = || ids.iter().collect();
    for (engine, number, ids) in [
        ("reference", "f32", all()),
        ("reference", "f64", all()),
        ("reference", "bf16", in_bf16),
        ("cpu", "f32", all()),
    ] {
        for id in ids {
            let report = golden_cmd::verify_one(id, None, engine, number.into(), None)?;
            bar.inc(1);
            golden_cmd::rows(&report, engine, number, out);
            exit = exit.gravest(report.exit());
            let mut row = golden_cmd::row(&report);
            row.insert(1, if engine == "reference" { number } else { engine }.to_owned());
            rows.push(row);
        }
    }
    bar.finish_and_clear();
    out.table(
        &[
            "recording",
            "number or engine",
            "prompts",
            "tokens",
            "taps",
            "result",
            "worst use of bound",
            "time",
        ],
        &rows,
    );
    if ids.is_empty() {
        out.line("no recordings here");
        exit = exit.gravest(Exit::Recording);
    }
    out.line("skipped: Qwen/Qwen3-Next-80B-A3B itself: its recording needs the weights (`karat golden status` says how)");

    out.line("\nspeed of the plain reference (one thread, f32; synthetic weights are generated as they are used)");
    let mut rows = Vec::new();
    for (model, prompt) in [("synthetic:tiny", 256), ("synthetic:slice,layers=4,experts=16", 4)] {
        if out::interrupted() {
            break;
        }
        rows.push(speed(model, prompt, out)?);
    }
    out.table(&["model", "prefill tokens", "prefill tokens/s", "decode tokens/s"], &rows);
    let results = Results::of_text(&out.record.kept(), exit)?;
    export::write(Path::new(REPORT), &report::page(&results, None))?;
    out.line(&format!("report: {REPORT}"));
    let seconds = watch.elapsed().as_secs_f64();
    out.line(&format!(
        "{} in {seconds:.0} s",
        if exit == Exit::Ok { "everything passed" } else { "NOT everything passed" }
    ));
    out.json(&json!({"schema": "karat.result/1", "kind": "summary", "exit": exit as u8, "seconds": seconds}));
    Ok(exit)
}

fn speed(model: &str, prompt: u32, out: &Out) -> anyhow::Result<Vec<String>> {
    let weights: Synthetic = model.parse().map_err(|e: String| refuse(e))?;
    let vocab = weights.config().vocab_size as u32;
    let mut engine =
        benches::engine("reference", "f32", std::sync::Arc::new(weights), None).map_err(refuse)?;
    let internal = |e: golden::Error| anyhow::anyhow!("{e}");
    engine.reset(1).map_err(internal)?;
    let tokens: Vec<u32> = (0..prompt).map(|i| i.wrapping_mul(2_654_435_761) % vocab).collect();
    let want = Want { logits: Rows::Last, ..Want::default() };
    let (step, prefill) = benches::clock::time(|| engine.forward(&[tokens], &want));
    let mut step = step.map_err(internal)?;
    let steps = 4;
    let watch = benches::clock::Stopwatch::new();
    for _ in 0..steps {
        let next = argmax(step.logits.row(0).as_slice().unwrap_or(&[]));
        step = engine.forward(&[vec![next]], &want).map_err(internal)?;
    }
    let decode = watch.elapsed();
    let (prefill, decode) =
        (f64::from(prompt) / prefill.as_secs_f64(), f64::from(steps) / decode.as_secs_f64());
    out.json(&json!({"schema": "karat.result/1", "kind": "bench", "model": model, "prefill_tokens_per_s": prefill,
        "decode_tokens_per_s": decode}));
    Ok(vec![model.to_owned(), prompt.to_string(), format!("{prefill:.1}"), format!("{decode:.1}")])
}
