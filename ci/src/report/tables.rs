//! Tables of ops: what is supported, what was checked, what planted faults came to.

use std::collections::{BTreeMap, BTreeSet};

use maud::{Markup, html};

use super::page::{absent, bar, cell, table};
use crate::{
    runs::{
        Results,
        rows::{Judged, OUTCOMES, worse},
    },
    words::Counts,
};

/// How many cases came to which outcome.
type States = BTreeMap<String, usize>;

/// Ops in the order in which results name them, and their rows of checks.
fn by_op(results: &Results) -> Vec<(&str, Vec<&Judged>)> {
    let mut order: Vec<(&str, Vec<&Judged>)> = Vec::new();
    let mut at: BTreeMap<&str, usize> = BTreeMap::new();
    for row in results.judged.iter().filter(|row| row.kind == "check") {
        let place = *at.entry(row.of()).or_insert_with(|| {
            order.push((row.of(), Vec::new()));
            order.len() - 1
        });
        order[place].1.push(row);
    }
    order
}

/// Op, way to compute it, type: what it came to.
pub(super) fn support(results: &Results) -> Markup {
    let mut cells: BTreeMap<(usize, String, String), BTreeMap<String, States>> = BTreeMap::new();
    let mut why: BTreeMap<(usize, String, String), String> = BTreeMap::new();
    let mut dtypes: BTreeSet<String> = BTreeSet::new();
    let mut order: Vec<String> = Vec::new();
    let mut place = |op: &str| {
        let known = order.iter().position(|name| name == op);
        known.unwrap_or_else(|| {
            order.push(op.to_owned());
            order.len() - 1
        })
    };
    let checks = by_op(results);
    if checks.is_empty() {
        for row in &results.supported {
            let key = (place(&row.op), row.op.clone(), row.variant.clone());
            dtypes.insert(row.dtype.clone());
            let states =
                cells.entry(key.clone()).or_default().entry(row.dtype.clone()).or_default();
            let n = if row.state == "unchecked" { row.cases } else { row.checked };
            *states.entry(row.state.clone()).or_default() += n as usize;
            if let Some(reason) = &row.why {
                why.entry(key).or_insert_with(|| reason.clone());
            }
        }
    }
    for (op, rows) in &checks {
        for row in rows {
            let key = (place(op), (*op).to_owned(), row.variant.clone());
            dtypes.insert(row.dtype().to_owned());
            let states =
                cells.entry(key.clone()).or_default().entry(row.dtype().to_owned()).or_default();
            *states.entry(row.outcome.clone()).or_default() += 1;
            if let (true, Some(reason)) = (row.is_skip(), &row.why) {
                why.entry(key).or_insert_with(|| reason.clone());
            }
        }
    }
    if cells.is_empty() {
        return absent("No case was checked:", "karat check --set ci --results results.jsonl");
    }
    let order =
        |name: &String| ["f32", "f16", "bf16"].iter().position(|known| known == name).unwrap_or(9);
    let mut dtypes: Vec<String> = dtypes.into_iter().collect();
    dtypes.sort_by_key(|name| (order(name), name.clone()));
    let mut above = None;
    let rows: Vec<Vec<Markup>> = cells
        .iter()
        .map(|(key, by)| {
            let (_, op, variant) = key;
            // An op is named once.
            let named = above.replace(op) != Some(op);
            let mut row = vec![html! { @if named { code { (op) } } }, html! { code { (variant) } }];
            row.extend(dtypes.iter().map(|dtype| by.get(dtype).map_or(html! { span.soft { "–" } }, states)));
            // Why something did not run matters where nothing did.
            let ran = by.values().flat_map(BTreeMap::keys).any(|state| !matches!(state.as_str(), "skipped" | "unsupported"));
            row.push(html! { @if let Some(reason) = why.get(key).filter(|_| !ran) { span.soft { (reason) } } });
            row
        })
        .collect();
    let mut head = vec!["op", "way to compute it"];
    head.extend(dtypes.iter().map(String::as_str));
    head.push("why not");
    html! {
        p.soft { "How many cases of a type came to what. – : no case of this type was asked." }
        (table(&head, &rows))
    }
}

/// Outcomes and how many there are, the gravest first.
fn states(by: &States) -> Markup {
    let grave =
        |state: &String| OUTCOMES.iter().position(|known| known == state).unwrap_or(OUTCOMES.len());
    let mut all: Vec<_> = by.iter().collect();
    all.sort_by_key(|(state, _)| grave(state));
    html! {
        @for (at, (state, n)) in all.iter().enumerate() {
            @if 0 < at { br; }
            span class=(class(state)) { (state) } " " (n)
        }
    }
}

/// The colour of an outcome; its word is there as well.
pub(super) fn class(outcome: &str) -> &'static str {
    match outcome {
        "passed" => "good",
        "skipped" | "unsupported" | "unchecked" | "stale" => "soft",
        _ => "bad",
    }
}

/// Op by op: what was checked, how near to the bound, how near to the roof.
pub(super) fn ops(results: &Results) -> Markup {
    let checks = by_op(results);
    if checks.is_empty() {
        return absent("No case was checked:", "karat check --set ci --results results.jsonl");
    }
    let rows: Vec<Vec<Markup>> = checks
        .iter()
        .map(|(op, rows)| {
            let counts = Counts::of(rows.iter().copied());
            let budget = rows.iter().map(|row| row.budget_used).fold(0.0, worse);
            let seconds: f64 = rows.iter().map(|row| row.ms).sum::<f64>() / 1e3;
            let shares: Vec<f64> = results
                .op_speeds
                .iter()
                .filter(|row| row.op == *op)
                .filter_map(|row| row.share_of_roof)
                .collect();
            let best = shares.iter().copied().reduce(f64::max);
            vec![
                html! { code { (op) } },
                cell(rows.len().to_string()),
                cell(counts.passed.to_string()),
                html! { span class=(if counts.red == 0 { "" } else { "bad" }) { (counts.red) } },
                cell(counts.skipped.to_string()),
                cell(counts.unsupported.to_string()),
                if counts.passed + counts.red == 0 {
                    html! { span.soft { "–" } }
                } else {
                    bar(budget)
                },
                best.map_or_else(|| html! { span.soft { "–" } }, bar),
                cell(format!("{seconds:.2} s")),
            ]
        })
        .collect();
    let head = [
        "op",
        "#cases",
        "#passed",
        "#not passed",
        "#skipped",
        "#unsupported",
        "worst use of bound",
        "best share of roof",
        "#time to check",
    ];
    html! { (table(&head, &rows)) }
}

/// Planted faults and spoiled answers.
pub(super) fn mutation(results: &Results) -> Markup {
    if results.mutations.is_empty() {
        return absent(
            "Whether the checks above would see a fault is not part of these results:",
            "karat mutate --set ci --selftest --results mutate.jsonl",
        );
    }
    let survivors: Vec<_> = results.mutants.iter().filter(|mutant| !mutant.killed).collect();
    let spoiled: u64 = results.sabotaged.iter().map(|row| row.spoiled).sum();
    html! {
        @for m in &results.mutations {
            p {
                b { (m.killed) " of " (m.planted) } " faults, planted in real kernels and in the wiring of the model, were found"
                @if 0 < m.planted { " (" (format!("{:.1}", 100.0 * m.killed as f64 / m.planted as f64)) " %)" }
                @if 0 < m.honest {
                    "; " b { (m.false_alarms) " false alarms" } " in " (m.honest) " fresh problems of honest kernels"
                }
                "."
            }
            @if !m.survivors.is_empty() && survivors.is_empty() {
                ul { @for name in &m.survivors { li.bad { code { (name) } } } }
            }
        }
        @if 0 < spoiled { p { (spoiled) " spoiled answers were judged." } }
        @if !survivors.is_empty() {
            h3 { "Survivors" }
            ul { @for mutant in &survivors { li { code.bad { (mutant.id) } " " (mutant.what) " " span.soft { (mutant.cite) } } } }
        }
        @for row in results.sabotaged.iter().filter(|row| !row.missed.is_empty()) {
            h3 { "Spoiled answers that passed: " code { (row.op) } }
            ul { @for missed in &row.missed { li.bad { (missed) } } }
        }
    }
}
