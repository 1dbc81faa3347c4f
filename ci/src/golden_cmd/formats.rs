//! `karat golden verify --engine cpu --number bf16|int8|int4`, or with `--kv-cache`: what is lost in
//! fewer bits.

use std::sync::Arc;

use benches::{
    Kept, Number,
    formats::{Told, told},
};
use golden::Weights;
use serde_json::json;

use super::{Opened, VerifyArgs, blamed};
use crate::{
    exit::{Exit, fail, refuse},
    out::{self, Out},
};

pub(super) fn run(ids: &[String], args: &VerifyArgs, out: &Out) -> anyhow::Result<Exit> {
    if args.plant.is_some() {
        return Err(refuse("--plant: plants are of the reference's wiring"));
    }
    let number = args.keeps.number(&args.number);
    let mut exit = Exit::Ok;
    let mut rows = Vec::new();
    let bar = out.bar(ids.len() as u64, "verify", false);
    for id in ids {
        let Opened { recording, weights, other_files } = Opened::of(id, args.model.as_deref())?;
        bar.inc(1);
        if !other_files.is_empty() {
            let files = other_files.join(", ");
            out.line(&format!("{id}: not as recorded: {files}"));
            exit = exit.gravest(Exit::Recording);
        }
        let weights: Arc<dyn Weights> = weights;
        if weights.config().fp8.is_some() && ["int8", "int4"].contains(&&*args.number) {
            out.line(&format!("skipped: {id}: weights in FP8 are not narrowed further"));
            continue;
        }
        let all = told(&weights, number, &recording, &mut |_, _| !out::interrupted())
            .map_err(|e| blamed(&e, id, &other_files))?;
        for told in &all {
            if !told.ok() {
                exit = exit.gravest(Exit::Wrong);
            }
            tell(id, number, told, out);
            rows.push(row(id, told));
        }
    }
    bar.finish_and_clear();
    if rows.is_empty() {
        return Err(fail(Exit::Recording, "no recording with whole logits"));
    }
    out.table(
        &["recording", "prompt", "mean KL", "of its plan", "top-1", "mean NLL", "result"],
        &rows,
    );
    Ok(exit)
}

fn row(id: &str, told: &Told) -> Vec<String> {
    vec![
        id.to_owned(),
        told.prompt.clone(),
        format!("{:.2e}", told.own.kl.mean),
        format!("{:.2e}", told.emulated.kl.mean),
        format!("{:.1} %", 100.0 * told.own.top1.mean),
        told.own.delta_nll.map_or_else(|| "-".to_owned(), |d| format!("{:+.1e}", d.mean)),
        if told.ok() { "passed".to_owned() } else { "FAILED".to_owned() },
    ]
}

fn tell(id: &str, number: Number<'_>, told: &Told, out: &Out) {
    out.json(&json!({
        "schema": "karat.result/1", "kind": "golden_format", "recording": id, "prompt": told.prompt,
        "number": number.name, "kv_cache": number.keeps().map(Kept::name), "ok": told.ok(), "mean_kl": told.own.kl.mean, "mean_kl_allowed": told.allowed(),
        "mean_kl_of_plan": told.emulated.kl.mean, "top1_agreement": told.own.top1.mean,
        "mean_delta_nll": told.own.delta_nll.map(|d| d.mean),
    }));
}
