//! `karat golden verify --engine cpu --number bf16,int8,int4`, or with `--kv-cache`: what is lost in
//! fewer bits.

use benches::{
    Kept, Number,
    formats::{Text, Told},
    report::number as finite,
};
use golden::{Narrow, Weights};
use serde_json::json;

use super::{Opened, VerifyArgs, blamed};
use crate::{
    exit::{Exit, fail, refuse},
    formats::{Asked, Format, Right, formats, tell, why},
    out::Out,
};

pub(super) fn run(ids: &[String], args: &VerifyArgs, out: &Out) -> anyhow::Result<Exit> {
    if args.plant.is_some() {
        return Err(refuse("--plant: plants are of the reference's wiring"));
    }
    let mut exit = Exit::Ok;
    let mut rows = Vec::new();
    let mut all: Vec<Format> = Vec::new();
    for id in ids {
        let Opened { recording, weights, other_files } = Opened::of(id, args.model.as_deref())?;
        if !other_files.is_empty() {
            let files = other_files.join(", ");
            out.line(&format!("{id}: not as recorded: {files}"));
            exit = exit.gravest(Exit::Recording);
        }
        let mut numbers = args.number.clone();
        if weights.config().fp8.is_some() {
            numbers.retain(|number| Narrow::of_number(number).is_none());
        }
        if numbers.len() < args.number.len() {
            out.line(&format!("skipped: {id}: weights in FP8 are not narrowed further"));
        }
        let blame = |error: &golden::Error| blamed(error, id, &other_files);
        let recorded = Text::recorded(&recording).map_err(|e| blame(&e))?;
        if recorded.is_empty() || numbers.is_empty() {
            continue;
        }
        let (texts, right) = recorded.into_iter().unzip();
        let right = Right::Recorded(right);
        let (name, numbers, keeps) = (&**id, &*numbers, args.keeps);
        let asked = Asked {
            engine: &args.engine,
            name,
            weights,
            numbers,
            keeps,
            texts,
            right,
            plant: None,
            ready: None,
            blame: &blame,
        };
        for format in formats(&asked, out)? {
            exit = exit.gravest(format.exit());
            for told in &format.told {
                rows.push(row(id, &format.number, told));
                out.json(&object(id, (&args.engine, args.keeps.number(&format.number)), told));
                if !told.ok() {
                    out.line(&format!(
                        "FAIL {id}/{} in {}: {}",
                        told.prompt,
                        format.number,
                        why(told)
                    ));
                }
            }
            match all.iter_mut().find(|one| one.number == format.number) {
                Some(one) => one.join(format),
                None => all.push(format),
            }
        }
    }
    if rows.is_empty() {
        return Err(fail(Exit::Recording, "no recording with whole logits"));
    }
    out.table(
        &["recording", "prompt", "format", "mean KL", "of its plan", "top-1", "ΔNLL", "result"],
        &rows,
    );
    out.line("all of them, by format");
    let names = ids.join(" ");
    let keeps = args.keeps.typed();
    let again = |number: &str| {
        format!("karat golden verify {names} --engine {} --number {number}{keeps}", args.engine)
    };
    tell("recordings", &all, &again, out);
    Ok(exit)
}

fn row(id: &str, number: &str, told: &Told) -> Vec<String> {
    vec![
        id.to_owned(),
        told.prompt.clone(),
        number.to_owned(),
        format!("{:.2e}", told.own.kl.mean),
        format!("{:.2e}", told.emulated.kl.mean),
        format!("{:.1} %", 100.0 * told.own.top1.mean),
        told.own.delta_nll.map_or_else(|| "-".to_owned(), |d| format!("{:+.1e}", d.mean)),
        if told.ok() { "passed".to_owned() } else { "FAILED".to_owned() },
    ]
}

fn object(id: &str, (engine, number): (&str, Number<'_>), told: &Told) -> serde_json::Value {
    json!({
        "schema": "karat.result/1", "kind": "golden_format", "recording": id, "prompt": told.prompt,
        "number": number.name, "kv_cache": number.keeps(engine).map(Kept::name), "ok": told.ok(), "mean_kl": finite(told.own.kl.mean),
        "mean_kl_allowed": finite(told.allowed()), "mean_kl_of_plan": finite(told.emulated.kl.mean),
        "top1_agreement": told.own.top1.mean, "legal_flips": told.flips.as_ref().map_or(0, |flips| flips.0),
        "mean_delta_nll": told.own.delta_nll.map(|d| finite(d.mean)),
    })
}
