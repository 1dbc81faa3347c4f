//! The page from top to bottom.

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::{cases, compare, machine, plots, speed, tables};
use crate::{
    runs::Results,
    words::{self, Counts, Verdict},
};

/// Rows of what is wrong that the summary names.
const NAMED: usize = 30;

/// The whole file.
pub(crate) fn page(results: &Results, base: Option<&Results>) -> String {
    let shown = cases::choose(results);
    let title = format!("karat: {}", Verdict::of(results).word());
    let sections: Vec<(&str, &str, Markup)> = vec![
        ("support", "Support", tables::support(results)),
        ("ops", "Ops", html! { (tables::ops(results)) (speed::table(results)) }),
        ("roofline", "Roofline", plots::roofline(results)),
        ("context", "Tokens per second and memory against context", plots::context(results)),
        ("budget", "Error budget", plots::budget(results)),
        ("mutation", "Mutation score", tables::mutation(results)),
        ("compare", "Comparison with a baseline", compare::section(results, base)),
        ("cases", "Cases", cases::section(results, &shown)),
        ("machine", "Machine", machine::machines(results)),
        ("method", "Method", machine::method()),
    ];
    let markup = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width,initial-scale=1";
                // Nothing is fetched, and nothing runs: the browser is told so.
                meta http-equiv="Content-Security-Policy" content=(include_str!("policy.txt").trim());
                meta name="generator" content=(format!("karat {}", env!("CARGO_PKG_VERSION")));
                link rel="icon" href="data:,";
                title { (title) }
                style { (PreEscaped(include_str!("style.css"))) }
            }
            body {
                header { (summary(results, &shown)) }
                nav aria-label="sections" {
                    ul {
                        @for (id, name, _) in &sections { li { a href=(format!("#{id}")) { (name) } } }
                    }
                }
                main {
                    @for (id, name, markup) in &sections {
                        section {
                            h2 id=(id) { (name) }
                            (markup)
                        }
                    }
                }
            }
        }
    };
    markup.into_string()
}

/// What all of it comes to, in a screenful.
fn summary(results: &Results, shown: &cases::Shown) -> Markup {
    let counts = Counts::all(results);
    let verdict = Verdict::of(results);
    let class = match verdict {
        Verdict::Passed => "good",
        Verdict::Failed | Verdict::Slower => "bad",
        Verdict::Incomplete | Verdict::Nothing => "warn",
    };
    let budgets = results.judged.iter().map(|row| row.budget_used);
    let budgets = budgets.chain(results.verified.iter().map(crate::runs::rows::Verified::budget));
    let worst = budgets.fold(0.0, crate::runs::rows::worse);
    let planted: u64 = results.mutations.iter().map(|m| m.planted).sum();
    let killed: u64 = results.mutations.iter().map(|m| m.killed).sum();
    let red: Vec<_> = results.judged.iter().enumerate().filter(|(_, row)| row.is_red()).collect();
    let recorded: Vec<_> = results.verified.iter().filter(|row| row.ok == Some(false)).collect();
    let flaky: Vec<_> =
        results.judged.iter().enumerate().filter(|(_, row)| row.is_flaky()).collect();
    html! {
        h1 { "karat: " span class=(class) { (verdict.word()) } }
        (machine::line(results))
        ul.tiles {
            (tile(&counts.passed.to_string(), "passed", "good"))
            (tile(&counts.red.to_string(), "not passed", if counts.red == 0 { "" } else { "bad" }))
            (tile(&counts.skipped.to_string(), "skipped", ""))
            (tile(&counts.unsupported.to_string(), "unsupported", ""))
            @if !flaky.is_empty() { (tile(&flaky.len().to_string(), "flaky", "warn")) }
            @if 0 < counts.passed + counts.red {
                (tile(&words::percent(worst), "worst use of a bound", if worst <= 1.0 { "" } else { "bad" }))
            }
            @if 0 < planted {
                (tile(&format!("{killed} of {planted}"), "planted faults found", if killed == planted { "good" } else { "bad" }))
            }
            @if !results.gated.is_empty() {
                @let slower = results.gated.iter().filter(|row| row.verdict == "slower").count();
                (tile(&slower.to_string(), "slower than the baseline", if slower == 0 { "" } else { "bad" }))
            }
        }
        @if !results.lost.is_empty() {
            p.warn { "These results are not whole." }
            ul { @for lost in &results.lost { li { (lost) } } }
        }
        @for run in results.runs.iter().filter(|run| run.told && !matches!(run.exit() as u8, 0 | 3 | 5 | 11)) {
            p.warn {
                code { (run.env.command) } ": " (format!("{:?}", run.exit()).to_lowercase())
                @if let Some(line) = run.end.as_ref().and_then(|end| end.line.as_ref()) { ": " (line) }
            }
        }
        @if !red.is_empty() || !recorded.is_empty() {
            h3 { "Not passed" }
            ul {
                @for (at, row) in red.iter().take(NAMED) { li { (cases::link(*at, &row.case, shown)) " " (words::first(row)) } }
                @for row in recorded.iter().take(NAMED) { li { code { (words::verified(row)) } " " (words::recorded(row)) } }
                @if NAMED < red.len() { li { ((red.len() - NAMED)) " more below" } }
            }
        }
        @if !flaky.is_empty() {
            h3 { "Flaky: passed, but not at once" }
            ul {
                @for (at, row) in flaky.iter().take(NAMED) {
                    li { (cases::link(*at, &row.case, shown)) " attempt " (1 + row.earlier.len()) }
                }
            }
        }
    }
}

fn tile(value: &str, what: &str, class: &str) -> Markup {
    html! { li { b class=(class) { (value) } (what) } }
}

/// What stands where a section has nothing to show: how to get something.
pub(super) fn absent(what: &str, typed: &str) -> Markup {
    html! { p.soft { (what) " " code { (typed) } } }
}

/// A share of what is allowed, as a bar and a number.
pub(super) fn bar(share: f64) -> Markup {
    let width = if share.is_nan() { 100.0 } else { (100.0 * share).clamp(0.0, 100.0) };
    html! { span.bar { i style=(format!("width:{width:.1}%")) {} } (words::percent(share)) }
}

/// A table that scrolls on its own where it is wider than the page. Heads that begin with `#` are of
/// numbers.
pub(super) fn table(head: &[&str], rows: &[Vec<Markup>]) -> Markup {
    let number = |at: usize| head.get(at).is_some_and(|name| name.starts_with('#'));
    html! {
        div.scroll {
            table {
                thead { tr {
                    @for (at, name) in head.iter().enumerate() {
                        th.n[number(at)] { (name.trim_start_matches('#')) }
                    }
                } }
                tbody {
                    @for row in rows {
                        tr { @for (at, cell) in row.iter().enumerate() { td.n[number(at)] { (cell) } } }
                    }
                }
            }
        }
    }
}

/// Text in a cell.
pub(super) fn cell(text: impl AsRef<str>) -> Markup {
    html! { (text.as_ref()) }
}
