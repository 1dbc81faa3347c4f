//! How fast ops are, case by case, beside what the machine can do.

use maud::{Markup, html};

use super::{
    page::{self, absent, bar, cell},
    tables::class,
};
use crate::{
    runs::{Results, rows::OpSpeed},
    words,
};

/// Lines of the table.
const MOST: usize = 400;

fn lines(rows: &[&OpSpeed]) -> Markup {
    let per_ns = |work: f64, row: &OpSpeed| {
        if work == 0.0 { "–".to_owned() } else { format!("{:.1}", work / row.median_ns) }
    };
    let rows: Vec<Vec<Markup>> = rows
        .iter()
        .map(|row| {
            let least = row.samples_ns.iter().copied().reduce(f64::min);
            let most = row.samples_ns.iter().copied().reduce(f64::max);
            let range = least.zip(most).map_or("–".to_owned(), |(least, most)| {
                format!("{} to {}", words::time(least), words::time(most))
            });
            let problem = row.case.split('@').next().unwrap_or_default();
            let checked = row.checked.as_deref().unwrap_or("–");
            vec![
                html! { code { (problem) } },
                html! { code { (row.variant) } },
                cell(words::time(row.median_ns)),
                cell(range),
                cell(per_ns(row.bytes, row)),
                cell(per_ns(row.flops, row)),
                html! {
                    @match row.share_of_roof {
                        Some(share) => { (bar(share)) @if let Some(roof) = &row.roof { " of " (roof) } }
                        None => "–",
                    }
                },
                cell(match row.cold {
                    Some(true) => "cold",
                    Some(false) => "warm",
                    None => "–",
                }),
                cell(row.timed.as_deref().unwrap_or("–")),
                html! { span class=(class(checked)) { (checked) } },
            ]
        })
        .collect();
    let head = [
        "problem",
        "way",
        "#median",
        "#least to most",
        "#GB/s",
        "#Gop/s",
        "share of roof",
        "caches",
        "timed by",
        "checked",
    ];
    page::table(&head, &rows)
}

/// All that was timed.
pub(super) fn table(results: &Results) -> Markup {
    let mut rows: Vec<&OpSpeed> = results.op_speeds.iter().filter(|row| row.timed()).collect();
    if rows.is_empty() {
        return absent("No op was timed:", "karat bench rms_norm --results bench.jsonl");
    }
    let all = rows.len();
    rows.truncate(MOST);
    html! {
        h3 { "How fast" }
        (lines(&rows))
        @if MOST < all { p.warn { ((all - MOST)) " more are in the JSON lines." } }
    }
}
