//! Case by case: what came out, what to type to see it again, and the samples as they were taken.

use std::{
    collections::{HashMap, HashSet},
    fmt::Write,
};

use maud::{Markup, html};

use super::tables::class;
use crate::{
    runs::{
        Results,
        rows::{Finding, Judged, OpSpeed},
    },
    words,
};

/// Letters that cases may take of a page, so that it stays below two MiB.
const ROOM: usize = 1_250_000;

/// Samples of one case that are written out.
const SAMPLES: usize = 400;

/// Which rows are shown one by one: as many as there is room for, what is wrong first.
pub(super) struct Shown {
    rows: HashSet<usize>,
    /// Those that were timed and not checked.
    speeds: Vec<usize>,
    left_out: usize,
}

/// Chooses them.
pub(super) fn choose(results: &Results) -> Shown {
    let timed: HashMap<&str, usize> =
        results.op_speeds.iter().map(|row| (row.case.as_str(), row.samples_ns.len())).collect();
    let rank = |row: &Judged| match row {
        row if row.is_red() => 0,
        row if row.is_flaky() => 1,
        row if timed.contains_key(row.case.as_str()) => 2,
        row if row.outcome == "passed" => 3,
        _ => 4,
    };
    let mut order: Vec<usize> = (0..results.judged.len()).collect();
    order.sort_by_key(|at| (rank(&results.judged[*at]), *at));
    let mut room = ROOM;
    let mut rows = HashSet::new();
    for at in order {
        let row = &results.judged[at];
        let samples = timed.get(row.case.as_str()).map_or(0, |n| 12 * n.min(&SAMPLES));
        let letters = 300 + 3 * row.case.len() + 330 * row.findings.len() + samples;
        if room < letters {
            break;
        }
        room -= letters;
        rows.insert(at);
    }
    let checked: HashSet<&str> = results.judged.iter().map(|row| row.case.as_str()).collect();
    let mut speeds = Vec::new();
    let alone = results.op_speeds.iter().enumerate();
    for (at, row) in alone.filter(|(_, row)| !checked.contains(row.case.as_str())) {
        let letters = 300 + 2 * row.case.len() + 12 * row.samples_ns.len().min(SAMPLES);
        if letters <= room {
            room -= letters;
            speeds.push(at);
        }
    }
    let left_out = results.judged.len() - rows.len();
    Shown { rows, speeds, left_out }
}

/// The name of a case, as a link where it is shown.
pub(super) fn link(at: usize, case: &str, shown: &Shown) -> Markup {
    html! {
        @if shown.rows.contains(&at) { a href=(format!("#c{at}")) { code { (case) } } } @else { code { (case) } }
    }
}

/// All of them.
pub(super) fn section(results: &Results, shown: &Shown) -> Markup {
    let mut groups: Vec<(String, Vec<usize>)> = Vec::new();
    let mut place: HashMap<String, usize> = HashMap::new();
    for (at, row) in results.judged.iter().enumerate() {
        let name = match row.kind.as_str() {
            "check" => row.of().to_owned(),
            kind => format!("{} of {kind}", row.of()),
        };
        let group = *place.entry(name.clone()).or_insert_with(|| {
            groups.push((name, Vec::new()));
            groups.len() - 1
        });
        groups[group].1.push(at);
    }
    let speeds: HashMap<&str, &OpSpeed> =
        results.op_speeds.iter().map(|row| (row.case.as_str(), row)).collect();
    html! {
        @if 0 < shown.left_out {
            p.warn {
                (shown.left_out) " of " (results.judged.len())
                " cases are counted above and not shown one by one, to keep this file small: those that passed or were skipped come last. "
                "The JSON lines hold all of them."
            }
        }
        @for (name, rows) in &groups {
            @let here: Vec<usize> = rows.iter().copied().filter(|at| shown.rows.contains(at)).collect();
            @let red = here.iter().any(|at| results.judged[*at].is_red());
            @if !here.is_empty() {
                details open[red] {
                    summary { b { (name) } " " span.soft { (rows.len()) " cases" @if here.len() < rows.len() { ", " (here.len()) " shown" } } }
                    @for at in here { (one(at, &results.judged[at], speeds.get(results.judged[at].case.as_str()).copied())) }
                }
            }
        }
        @if !shown.speeds.is_empty() {
            details {
                summary { b { "timed" } " " span.soft { (shown.speeds.len()) " cases" } }
                @for at in &shown.speeds { (timed_alone(&results.op_speeds[*at])) }
            }
        }
    }
}

fn one(at: usize, row: &Judged, speed: Option<&OpSpeed>) -> Markup {
    html! {
        details id=(format!("c{at}")) open[row.is_red()] {
            summary {
                span class=(class(&row.outcome)) { (row.outcome) } " " code { (row.case) }
                @if !row.is_skip() { " " span.soft { (words::used(row.budget_used)) } }
                @if row.is_flaky() { " " span.warn { "flaky" } }
            }
            @if let Some(why) = &row.why { p { (why) } }
            pre { (row.typed()) }
            @for earlier in &row.earlier {
                p.warn { "an attempt before: " (earlier.outcome) @if let Some(why) = &earlier.why { ", " (why) } }
            }
            @for f in &row.findings { (finding(f)) }
            @if let Some(speed) = speed { (timed(speed)) }
        }
    }
}

/// What comparing one output found.
fn finding(f: &Finding) -> Markup {
    let index = f.at.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let mut line = format!("{}: {} of {} elements over", f.output, f.over, f.n);
    if 0 < f.not_finite {
        let _ = write!(line, ", {} not finite", f.not_finite);
    }
    let _ = write!(
        line,
        "; worst [{index}] got {:.6e} want {:.6e}, {}; rel-RMS {:.1e} of {:.1e}; ULP p99 {} max {}",
        f.got,
        f.want,
        words::used(f.budget_used),
        f.rel_rms,
        f.rel_rms_allowed,
        f.ulp_p99,
        f.ulp_max
    );
    html! {
        p class=(if f.ok { "" } else { "bad" }) { (line) }
        @if let Some(pattern) = &f.pattern { p { "pattern: " (pattern) } }
    }
}

fn timed(row: &OpSpeed) -> Markup {
    html! {
        p { "median " (words::time(row.median_ns)) @if let Some(share) = row.share_of_roof { ", " (words::percent(share)) " of the roof" } }
        @if !row.samples_ns.is_empty() { (samples("ns", &row.samples_ns)) }
    }
}

fn timed_alone(row: &OpSpeed) -> Markup {
    html! { details { summary { code { (row.case) } } (timed(row)) } }
}

/// The samples as they were taken.
pub(super) fn samples(unit: &str, all: &[f64]) -> Markup {
    let digits = if all.iter().any(|x| *x < 1000.0) { 2 } else { 0 };
    let shown: Vec<String> = all.iter().take(SAMPLES).map(|x| format!("{x:.digits$}")).collect();
    html! {
        p.samples {
            (all.len()) " samples, " (unit) ": " (shown.join(" "))
            @if SAMPLES < all.len() { " … " ((all.len() - SAMPLES)) " more in the JSON lines" }
        }
    }
}
