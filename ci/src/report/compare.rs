//! What changed since a baseline: outcomes, times, and what the gate says of them.

use std::{collections::HashMap, path::Path};

use maud::{Markup, html};

use super::{
    page::{absent, cell, table},
    tables::class,
};
use crate::{
    exit::{Exit, fail},
    export::speed,
    runs::{Results, rows::Gated},
    words,
};

/// Lines of a table.
const MOST: usize = 200;

/// Times of two machines are not compared.
pub(super) fn refuse_other_machines(
    results: &Results,
    base: &Results,
    path: &Path,
) -> anyhow::Result<()> {
    let timed = |of: &Results| {
        !of.op_speeds.is_empty() || !of.model_speeds.is_empty() || !of.scales.is_empty()
    };
    if !timed(results) || !timed(base) {
        return Ok(());
    }
    let machines = |of: &Results| {
        let mut all: Vec<(String, String)> = Vec::new();
        for run in of.runs.iter().filter(|run| run.told) {
            let env = &run.env;
            let gpu = env.gpu.as_ref().map_or(String::new(), |gpu| format!(", {gpu}"));
            let one =
                (env.fingerprint.clone(), format!("{}, {} threads{gpu}", env.cpu, env.threads));
            if !all.contains(&one) {
                all.push(one);
            }
        }
        all
    };
    let (here, there) = (machines(results), machines(base));
    let known = |(machine, _): &&(String, String)| here.iter().any(|(known, _)| known == machine);
    if there.iter().any(|one| known(&one)) {
        return Ok(());
    }
    let name = |all: &[(String, String)]| {
        all.first().map_or("a machine that is not told".to_owned(), |(_, name)| name.clone())
    };
    Err(fail(
        Exit::Baseline,
        format!(
            "--compare {}: expected times of the same machine ({}), got those of {}",
            path.display(),
            name(&here),
            name(&there)
        ),
    ))
}

pub(super) fn section(results: &Results, base: Option<&Results>) -> Markup {
    if base.is_none() && results.gated.is_empty() {
        return absent(
            "Nothing to compare with was given:",
            "karat report results.jsonl --compare base.jsonl",
        );
    }
    html! {
        @if !results.gated.is_empty() { (gate(&results.gated)) }
        @if let Some(base) = base { (outcomes(results, base)) (times(results, base)) }
    }
}

/// What the gate decided; what is the same is counted.
fn gate(gated: &[Gated]) -> Markup {
    let order = ["slower", "missing", "withheld", "ambiguous", "ungateable", "faster", "same"];
    let count = |verdict: &str| gated.iter().filter(|row| row.verdict == verdict).count();
    let told: Vec<String> = order
        .iter()
        .filter(|verdict| 0 < count(verdict))
        .map(|verdict| format!("{} {verdict}", count(verdict)))
        .collect();
    let rank =
        |row: &&Gated| order.iter().position(|known| *known == row.verdict).unwrap_or(order.len());
    let mut loud: Vec<&Gated> = gated.iter().filter(|row| row.verdict != "same").collect();
    loud.sort_by_key(rank);
    let number = |x: Option<f64>| cell(x.map_or("–".to_owned(), |x| format!("{x:.3}")));
    let rows: Vec<Vec<Markup>> = loud
        .iter()
        .take(MOST)
        .map(|row| {
            let bad = matches!(row.verdict.as_str(), "slower" | "missing");
            vec![
                html! { code { (row.case) } },
                html! { span class=(if bad { "bad" } else { "" }) { (row.verdict) } },
                number(row.ratio),
                number(row.lo),
                number(row.hi),
                number(row.floor),
                cell(row.reason.as_deref().unwrap_or_default()),
            ]
        })
        .collect();
    html! {
        p { "The gate's verdicts: " (told.join(", ")) ". A ratio above 1 is slower than the baseline; its 95 % interval has to clear the noise floor." }
        @if !rows.is_empty() { (table(&["case", "verdict", "#ratio", "#from", "#to", "#noise floor", "why"], &rows)) }
    }
}

/// Cases whose outcome is another one.
fn outcomes(results: &Results, base: &Results) -> Markup {
    let before: HashMap<(&str, &str), &str> = base
        .judged
        .iter()
        .map(|row| ((row.kind.as_str(), row.case.as_str()), row.outcome.as_str()))
        .collect();
    let now: HashMap<(&str, &str), &str> = results
        .judged
        .iter()
        .map(|row| ((row.kind.as_str(), row.case.as_str()), row.outcome.as_str()))
        .collect();
    let mut changed: Vec<(&str, Option<&str>, Option<&str>)> = Vec::new();
    let (mut new, mut gone) = (0, 0);
    for row in &results.judged {
        match before.get(&(row.kind.as_str(), row.case.as_str())) {
            Some(old) if *old == row.outcome => {}
            Some(old) => changed.push((&row.case, Some(old), Some(&row.outcome))),
            None => new += 1,
        }
    }
    for row in &base.judged {
        gone += usize::from(!now.contains_key(&(row.kind.as_str(), row.case.as_str())));
    }
    let red =
        |outcome: Option<&str>| !matches!(outcome, Some("passed" | "skipped" | "unsupported"));
    changed.sort_by_key(|(case, _, now)| (!red(*now), (*case).to_owned()));
    let rows: Vec<Vec<Markup>> = changed
        .iter()
        .take(MOST)
        .map(|(case, old, now)| {
            let word = |outcome: Option<&str>| {
                let outcome = outcome.unwrap_or("–");
                html! { span class=(class(outcome)) { (outcome) } }
            };
            vec![html! { code { (case) } }, word(*old), word(*now)]
        })
        .collect();
    html! {
        p {
            (changed.len()) " cases came to something else than in the baseline; "
            (new) " are new, " (gone) " are not here."
        }
        @if !rows.is_empty() { (table(&["case", "baseline", "here"], &rows)) }
        @if MOST < changed.len() { p.warn { ((changed.len() - MOST)) " more are not listed." } }
    }
}

/// Medians, those that differ most first. Whether a difference is one is not decided here.
fn times(results: &Results, base: &Results) -> Markup {
    let (then, here) = (speed::all(base), speed::all(results));
    let before: HashMap<(&str, &str), f64> =
        then.iter().map(|one| ((one.machine.as_str(), one.id.as_str()), one.median)).collect();
    let pair = |one: &'_ speed::Timed| {
        Some((*before.get(&(one.machine.as_str(), one.id.as_str()))?, one.median))
    };
    let pairs =
        here.iter().filter_map(|one| pair(one).map(|(old, now)| (one.id.as_str(), old, now)));
    let mut pairs: Vec<(&str, f64, f64)> = pairs.collect();
    let far = |(_, old, now): &(&str, f64, f64)| (now / old).ln().abs();
    pairs.sort_by(|a, b| far(b).total_cmp(&far(a)));
    let rows: Vec<Vec<Markup>> = pairs
        .iter()
        .take(MOST)
        .map(|(case, old, now)| {
            vec![
                html! { code { (case) } },
                cell(words::time(*old)),
                cell(words::time(*now)),
                cell(format!("{:.3}", now / old)),
            ]
        })
        .collect();
    html! {
        @if !rows.is_empty() {
            p.soft { "Medians of two runs, those that differ most first. Two runs of one program differ as well: " code { "karat gate" } " decides whether a difference is one." }
            (table(&["call or token", "#baseline", "#here", "#ratio"], &rows))
        }
    }
}
