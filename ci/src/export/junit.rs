//! JUnit XML: a suite for each op, a test case for each case.

use std::{collections::BTreeMap, time::Duration};

use chrono::DateTime;
use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestRerun, TestSuite};

use crate::{
    exit::Exit,
    runs::{
        Results,
        rows::{Gated, Judged, Verified},
    },
    words,
};

/// The document.
pub(crate) fn text(results: &Results) -> anyhow::Result<String> {
    let mut suites: BTreeMap<String, TestSuite> = BTreeMap::new();
    let mut add = |suite: &str, case: TestCase| {
        let new = || TestSuite::new(suite);
        suites.entry(suite.to_owned()).or_insert_with(new).add_test_case(case);
    };
    for row in &results.judged {
        let suite = format!("{}.{}", row.kind, row.of());
        add(&suite, judged(row, &suite));
    }
    for row in &results.verified {
        let suite = format!("golden.{}", row.recording);
        add(&suite, verified(row, &suite));
    }
    for row in &results.gated {
        let op = row.case.split('/').next().unwrap_or_default();
        let suite = format!("gate.{op}");
        add(&suite, gated(row, &suite));
    }
    // A run that ended badly without a red row is a case of its own.
    for run in &results.runs {
        if matches!(
            run.exit(),
            Exit::Crashed | Exit::Internal | Exit::Unfit | Exit::Interrupted | Exit::Nothing
        ) {
            let line = run.end.as_ref().and_then(|end| end.line.clone());
            let line = line.unwrap_or_else(|| "the run did not end".to_owned());
            let mut status = TestCaseStatus::non_success(NonSuccessKind::Error);
            status.set_message(line).set_type(format!("{:?}", run.exit()).to_lowercase());
            let name = run.env.command.clone();
            let mut case = TestCase::new(name, status);
            case.set_classname("run");
            add("run", case);
        }
    }
    let mut report = Report::new("karat");
    let time = |suite: &TestSuite| suite.test_cases.iter().filter_map(|case| case.time).sum();
    let mut all = Duration::ZERO;
    let stamp =
        results.runs.first().and_then(|run| DateTime::parse_from_rfc3339(&run.env.time).ok());
    for (_, mut suite) in suites {
        let took: Duration = time(&suite);
        all += took;
        suite.set_time(took);
        if let Some(stamp) = stamp {
            suite.set_timestamp(stamp);
        }
        report.add_test_suite(suite);
    }
    report.set_time(all);
    // The schema of Jenkins counts skips in suites, and not in all of them.
    let skips = format!(" skipped=\"{}\"", report.skipped);
    Ok(report.to_string()?.replacen(&skips, "", 1))
}

fn seconds(ms: f64) -> Duration {
    Duration::try_from_secs_f64(ms / 1e3).unwrap_or_default()
}

/// Whether it is wrong, or could not be found out.
fn kind(outcome: &str) -> NonSuccessKind {
    match outcome {
        "crashed" | "timeout" | "error" => NonSuccessKind::Error,
        _ => NonSuccessKind::Failure,
    }
}

fn judged(row: &Judged, suite: &str) -> TestCase {
    let mut status = if row.is_skip() {
        let mut status = TestCaseStatus::skipped();
        status.set_message(row.why.clone().unwrap_or_default());
        status
    } else if row.is_red() {
        let mut status = TestCaseStatus::non_success(kind(&row.outcome));
        status.set_type(row.outcome.clone()).set_message(words::first(row));
        status.set_description(words::block(row).join("\n"));
        status
    } else {
        TestCaseStatus::success()
    };
    for earlier in &row.earlier {
        let mut rerun = TestRerun::new(kind(&earlier.outcome));
        rerun.set_type(earlier.outcome.clone());
        rerun.set_message(earlier.why.clone().unwrap_or_else(|| words::used(earlier.budget_used)));
        status.add_rerun(rerun);
    }
    let mut case = TestCase::new(row.case.clone(), status);
    case.set_classname(suite).set_time(seconds(row.ms));
    let used = if row.is_skip() { String::new() } else { words::used(row.budget_used) + "\n" };
    case.set_system_out(format!("{used}repro: {}", row.typed()));
    case
}

fn verified(row: &Verified, suite: &str) -> TestCase {
    let ok = row.ok == Some(true);
    let mut status = if ok {
        TestCaseStatus::success()
    } else {
        TestCaseStatus::non_success(NonSuccessKind::Failure)
    };
    if !ok {
        status.set_type("failed").set_message(words::recorded(row));
    }
    let mut case = TestCase::new(words::verified(row), status);
    case.set_classname(suite).set_time(seconds(row.seconds * 1e3));
    case.set_system_out(words::used(row.budget()));
    case
}

fn gated(row: &Gated, suite: &str) -> TestCase {
    let mut status = match row.verdict.as_str() {
        "slower" | "missing" => TestCaseStatus::non_success(NonSuccessKind::Failure),
        "ungateable" | "withheld" | "ambiguous" => TestCaseStatus::skipped(),
        _ => TestCaseStatus::success(),
    };
    if !matches!(status, TestCaseStatus::Success { .. }) {
        status.set_message(words::gated(row));
    }
    let mut case = TestCase::new(row.case.clone(), status);
    case.set_classname(suite);
    case.set_system_out(words::gated(row));
    case
}
