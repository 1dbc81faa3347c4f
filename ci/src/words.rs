//! What rows of results say, in words that reports share.

use crate::runs::{
    Results,
    rows::{Finding, Gated, Judged, Verified},
};

/// A share of what is allowed.
pub(crate) fn used(budget: f64) -> String {
    if budget.is_nan() {
        "no bound".to_owned()
    } else if budget <= 10.0 {
        format!("{:.1} % of the bound", 100.0 * budget)
    } else {
        format!("{budget:.3e} x the bound")
    }
}

/// A share in a table.
pub(crate) fn percent(share: f64) -> String {
    if share.is_nan() {
        "NaN".to_owned()
    } else if share <= 10.0 {
        format!("{:.1} %", 100.0 * share)
    } else {
        format!("{share:.1e} x")
    }
}

/// What is wrong with a row, in one line.
pub(crate) fn first(row: &Judged) -> String {
    if let Some(why) = &row.why {
        return format!("{}: {why}", row.outcome);
    }
    match row.findings.iter().find(|finding| !finding.ok) {
        Some(f) => format!("{}: {}", row.outcome, worst(f)),
        None => row.outcome.clone(),
    }
}

/// The worst element of an output.
fn worst(f: &Finding) -> String {
    let at = f.at.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    format!(
        "{}[{at}] got {:.6e} want {:.6e}, {} of {} elements over, {}",
        f.output,
        f.got,
        f.want,
        f.over,
        f.n,
        used(f.budget_used)
    )
}

/// What a failure block says of a row.
pub(crate) fn block(row: &Judged) -> Vec<String> {
    let mut lines: Vec<String> = row.why.iter().cloned().collect();
    for f in row.findings.iter().filter(|finding| !finding.ok) {
        lines.push(format!("{} not finite; {}", f.not_finite, worst(f)));
        lines.push(format!(
            "err {:.1e} allowed {:.1e} · rel-RMS {:.1e} of {:.1e} · ULP({}) p99 {} max {} · bound: {}{}",
            f.max_abs,
            f.allowed,
            f.rel_rms,
            f.rel_rms_allowed,
            f.output_type.as_deref().unwrap_or("f32"),
            f.ulp_p99,
            f.ulp_max,
            f.rule.as_deref().unwrap_or("-"),
            f.runs.map_or(String::new(), |runs| format!(", {runs} runs")),
        ));
        lines.extend(f.pattern.iter().map(|pattern| format!("pattern: {pattern}")));
    }
    lines.push(format!("repro: {}", row.typed()));
    lines
}

/// Which prompt of which recording, by whom.
pub(crate) fn verified(row: &Verified) -> String {
    let prompt = row.prompt.as_ref().map_or(String::new(), |prompt| format!("/{prompt}"));
    let by = [row.engine.as_deref(), row.number.as_deref()];
    let by = by.into_iter().flatten().collect::<Vec<_>>().join(" ");
    format!("{}{prompt}{}{by}", row.recording, if by.is_empty() { "" } else { "@" })
}

/// What is wrong with an answer to a recording.
pub(crate) fn recorded(row: &Verified) -> String {
    let flip = row.illegal_flip.as_ref().map(|flip| format!("routing: {flip}"));
    let bad = || {
        let f = row.findings.iter().find(|finding| !finding.ok)?;
        let tap = f.tap.as_deref().unwrap_or(&f.output);
        Some(format!("first over its bound: {tap}, {}", used(f.budget_used)))
    };
    flip.or_else(bad).unwrap_or_else(|| "wrong".to_owned())
}

/// What the gate says of a case.
pub(crate) fn gated(row: &Gated) -> String {
    let ratio =
        row.ratio.map_or(String::new(), |ratio| format!(", {ratio:.3} of the baseline's time"));
    let between = match (row.lo, row.hi) {
        (Some(lo), Some(hi)) => format!(" [{lo:.3}..{hi:.3}]"),
        _ => String::new(),
    };
    let reason = row.reason.as_ref().map_or(String::new(), |reason| format!(": {reason}"));
    format!("{}{ratio}{between}{reason}", row.verdict)
}

/// How many rows came to what.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) passed: usize,
    pub(crate) red: usize,
    pub(crate) skipped: usize,
    pub(crate) unsupported: usize,
    pub(crate) flaky: usize,
}

impl Counts {
    /// Of some rows.
    pub(crate) fn of<'a>(rows: impl IntoIterator<Item = &'a Judged>) -> Counts {
        let mut counts = Counts::default();
        for row in rows {
            counts.passed += usize::from(row.outcome == "passed");
            counts.red += usize::from(row.is_red());
            counts.skipped += usize::from(row.outcome == "skipped");
            counts.unsupported += usize::from(row.outcome == "unsupported");
            counts.flaky += usize::from(row.is_flaky());
        }
        counts
    }

    /// All of them.
    pub(crate) fn rows(self) -> usize {
        self.passed + self.red + self.skipped + self.unsupported
    }

    /// How many did not come to a verdict, and why not.
    pub(crate) fn not_run(self) -> String {
        let Counts { skipped, unsupported, .. } = self;
        format!("{skipped} skipped, {unsupported} unsupported")
    }

    /// Cases and answers to recordings.
    pub(crate) fn all(results: &Results) -> Counts {
        let mut counts = Counts::of(&results.judged);
        for row in &results.verified {
            let ok = row.ok == Some(true);
            counts.passed += usize::from(ok);
            counts.red += usize::from(!ok);
        }
        counts
    }
}

/// What all of it comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Something passed and nothing is red.
    Passed,
    /// Something is wrong.
    Failed,
    /// Something is slower.
    Slower,
    /// A run did not end, or some of it is missing.
    Incomplete,
    /// Nothing was judged.
    Nothing,
}

impl Verdict {
    /// Of some results.
    pub(crate) fn of(results: &Results) -> Verdict {
        use crate::exit::Exit;
        let counts = Counts::all(results);
        let survivors =
            results.mutations.iter().any(|m| m.killed < m.planted || 0 < m.false_alarms);
        match results.exit() {
            _ if 0 < counts.red || survivors => Verdict::Failed,
            Exit::Wrong | Exit::Cheat | Exit::Recording => Verdict::Failed,
            Exit::Slower => Verdict::Slower,
            _ if results.gated.iter().any(|row| row.verdict == "slower") => Verdict::Slower,
            Exit::Ok | Exit::Ambiguous if counts.passed == 0 => Verdict::Nothing,
            Exit::Ok | Exit::Ambiguous => Verdict::Passed,
            _ => Verdict::Incomplete,
        }
    }

    /// In a word.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Verdict::Passed => "passed",
            Verdict::Failed => "failed",
            Verdict::Slower => "slower",
            Verdict::Incomplete => "incomplete",
            Verdict::Nothing => "nothing judged",
        }
    }
}

/// A time with a unit that suits it.
pub(crate) fn time(ns: f64) -> String {
    match ns {
        x if x < 1e3 => format!("{x:.0} ns"),
        x if x < 1e6 => format!("{:.2} µs", x / 1e3),
        x if x < 1e9 => format!("{:.2} ms", x / 1e6),
        x => format!("{:.2} s", x / 1e9),
    }
}

/// Bytes with a unit that suits them.
pub(crate) fn bytes(n: f64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut n = n;
    let mut unit = 0;
    while 1024.0 <= n && unit + 1 < units.len() {
        n /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{n:.0} B") } else { format!("{n:.1} {}", units[unit]) }
}
