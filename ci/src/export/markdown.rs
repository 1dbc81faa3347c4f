//! Markdown: what a comment at a change says, and the summary of a step.

use std::{collections::BTreeMap, fmt::Write};

use crate::{
    runs::{
        Results,
        rows::{Judged, worse},
    },
    words::{self, Counts, Verdict},
};

/// Rows of what is wrong; a comment has to stay below 65536 letters.
const MOST: usize = 40;

/// A cell of a table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace(['\n', '\r'], " ")
}

/// The text. Its first line names it, so that a bot finds its own comment again.
pub(crate) fn text(results: &Results) -> String {
    let mut text = String::from("<!-- karat -->\n");
    let counts = Counts::all(results);
    let mark = match Verdict::of(results) {
        Verdict::Passed => "✅",
        Verdict::Nothing | Verdict::Incomplete => "⚠️",
        Verdict::Failed | Verdict::Slower => "❌",
    };
    let flaky =
        if counts.flaky == 0 { String::new() } else { format!(" ({} flaky)", counts.flaky) };
    let _ = writeln!(
        text,
        "### {mark} karat: {}\n\n{} passed{flaky}, {} not passed, {}\n",
        Verdict::of(results).word(),
        counts.passed,
        counts.red,
        counts.not_run()
    );
    for lost in &results.lost {
        let _ = writeln!(text, "- not whole: {}", cell(lost));
    }
    machines(results, &mut text);
    red(results, &mut text);
    gate(results, &mut text);
    let by_op = ops(results);
    if !by_op.is_empty() {
        text += "\n| op | cases | passed | not passed | skipped | unsupported | worst use of bound |\n|---|--:|--:|--:|--:|--:|--:|\n";
        for (op, (counts, budget)) in by_op {
            let _ = writeln!(
                text,
                "| {op} | {} | {} | {} | {} | {} | {} |",
                counts.rows(),
                counts.passed,
                counts.red,
                counts.skipped,
                counts.unsupported,
                words::percent(budget)
            );
        }
    }
    for m in &results.mutations {
        let _ = writeln!(
            text,
            "\n{} of {} planted faults found, {} false alarms in {} fresh problems",
            m.killed, m.planted, m.false_alarms, m.honest
        );
    }
    text
}

/// By op in the order of the rows.
fn ops(results: &Results) -> Vec<(String, (Counts, f64))> {
    let mut order: Vec<&str> = Vec::new();
    let mut by: BTreeMap<&str, Vec<&Judged>> = BTreeMap::new();
    for row in &results.judged {
        let rows = by.entry(row.of()).or_default();
        if rows.is_empty() {
            order.push(row.of());
        }
        rows.push(row);
    }
    let sum = |op: &str| {
        let rows = &by[op];
        let budget = rows.iter().map(|row| row.budget_used).fold(0.0, worse);
        (op.to_owned(), (Counts::of(rows.iter().copied()), budget))
    };
    order.into_iter().map(sum).collect()
}

fn machines(results: &Results, text: &mut String) {
    let mut told = Vec::new();
    for run in results.runs.iter().filter(|run| run.told) {
        let env = &run.env;
        let revision = env.revision.as_deref().map_or("no revision", |r| r.get(..12).unwrap_or(r));
        let dirty = if env.dirty == Some(true) { " with changes" } else { "" };
        let gpu = env.gpu.as_ref().map_or(String::new(), |gpu| format!(", {gpu}"));
        let line =
            format!("`{revision}`{dirty} on {}, {} threads{gpu}", cell(&env.cpu), env.threads);
        if !told.contains(&line) {
            told.push(line);
        }
    }
    for line in told {
        let _ = writeln!(text, "{line}  ");
    }
}

fn red(results: &Results, text: &mut String) {
    let wrong = results.judged.iter().filter(|row| row.is_red());
    let mut lines: Vec<(String, String, String)> =
        wrong.map(|row| (row.case.clone(), words::first(row), row.typed())).collect();
    let recorded = results.verified.iter().filter(|row| row.ok == Some(false));
    lines.extend(recorded.map(|row| {
        (
            words::verified(row),
            words::recorded(row),
            format!("karat golden verify {}", row.recording),
        )
    }));
    let flaky = results.judged.iter().filter(|row| row.is_flaky());
    lines.extend(flaky.map(|row| {
        let told = format!("flaky: passed in attempt {}", 1 + row.earlier.len());
        (row.case.clone(), told, row.typed())
    }));
    let more = lines.len().saturating_sub(MOST);
    for (case, told, typed) in lines.iter().take(MOST) {
        // A cell is text; what is typed stands in a block of its own.
        let _ = writeln!(
            text,
            "\n<details><summary><code>{}</code> {}</summary>\n\n```\n{typed}\n```\n</details>",
            escaped(case),
            escaped(told)
        );
    }
    if 0 < more {
        let _ = writeln!(text, "\n{more} more are in the report.");
    }
}

fn escaped(text: &str) -> String {
    let plain: String = text.chars().take(400).collect();
    plain.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('\n', " ")
}

fn gate(results: &Results, text: &mut String) {
    if results.gated.is_empty() {
        return;
    }
    let mut by: BTreeMap<&str, usize> = BTreeMap::new();
    for row in &results.gated {
        *by.entry(&row.verdict).or_default() += 1;
    }
    let told: Vec<String> = by.iter().map(|(verdict, n)| format!("{n} {verdict}")).collect();
    let _ = writeln!(text, "\nSpeed against the baseline: {}\n", told.join(", "));
    let loud = results.gated.iter().filter(|row| row.verdict != "same");
    let loud: Vec<_> = loud.take(MOST).collect();
    if !loud.is_empty() {
        text.push_str("| case | verdict |\n|---|---|\n");
        for row in loud {
            let _ = writeln!(text, "| `{}` | {} |", cell(&row.case), cell(&words::gated(row)));
        }
    }
}
