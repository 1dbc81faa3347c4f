//! `karat bench --kernel`: kernels of other hands beside ours. No test depends on how fast anything is.

use std::fs;

use serde_json::{Value, json};

use super::{FILE, Needs, Test, home::Home, home::Ran, kernel, python, test};

const HELPER: &str = include_str!("../../../optimized/src/doors/karat_kernel.py");
const PROGRAM: &str = include_str!("zoo/clock.py");

const PROBLEM: &str = "rms_norm/N3-D64";

/// In which way `clock.py` is off when it is timed, what comes of it, a part of why, and how the run ends.
const WAYS: &[(&str, &str, &str, i32)] = &[
    ("honest", "passed", "", 0),
    ("prepared", "passed", "", 0),
    ("backwards", "crashed", "it told samples_ns that are no times above 0", 10),
    ("few", "crashed", "it told 0 samples_ns, expected 3", 10),
    ("host", "crashed", "it told the clock \"host clock\", expected \"program clock\"", 10),
    ("lazy", "failed", "", 3),
    ("writes", "cheat", "input x was changed", 11),
    ("slow", "timeout", "", 10),
    ("dies", "crashed", "it ended (exit status: 3) without an answer", 10),
];

pub(super) fn tests() -> Vec<Test> {
    let ways = WAYS.iter().map(|&(way, outcome, why, code)| {
        test(format!("bench::{way}"), Needs::Numpy, move || off(way, outcome, why, code))
    });
    let more = [
        test("bench::beside_ours", Needs::Cc, beside_ours),
        test("bench::what_is_missing_is_skipped", Needs::Numpy, missing),
        test("bench::who_does_not_time_is_unsupported", Needs::Numpy, no_time),
    ];
    ways.chain(more).collect()
}

fn bench(home: &Home, args: &[&str]) -> (Ran, Vec<Value>) {
    let python = python();
    let always = ["bench", "--turns", "2", "--format", "jsonl", "--python", &python];
    let ran = home.karat(&[&always[..], args].concat());
    let rows = ran.lines().into_iter().filter(|line| line["kind"] == "bench").collect();
    (ran, rows)
}

fn by<'a>(rows: &'a [Value], variant: &str) -> &'a Value {
    rows.iter()
        .find(|row| row["variant"] == variant)
        .unwrap_or_else(|| panic!("{variant}: {rows:?}"))
}

fn program(way: &str, helper: &str) -> Home {
    let manifest = format!(
        "name = \"clock\"\nabi = 1\nimplements = [\"rms_norm\"]\n[door]\nkind = \"process\"\n\
         command = [\"{{python}}\", \"clock.py\", \"{way}\"]\n"
    );
    kernel(&[("clock.py", PROGRAM), ("karat_kernel.py", helper), (FILE, &manifest)])
}

fn off(way: &str, outcome: &str, why: &str, code: i32) {
    let home = program(way, HELPER);
    let timeout = if way == "slow" { "6" } else { "60" };
    // Words select ids: ours are left out by one that none of them has.
    let args = [PROBLEM, "foreign", "--kernel", FILE, "--timeout", timeout];
    let (ran, rows) = bench(&home, &args);
    assert_eq!((ran.code, rows.len()), (code, 1), "{ran:?}");
    let row = &rows[0];
    assert_eq!(row["checked"], outcome, "{row}");
    assert!(row["why"].as_str().unwrap_or_default().contains(why), "{row}");
    let samples = row["samples_ns"].as_array().unwrap();
    if outcome == "passed" {
        let taken = samples.len() + row["throttled"].as_u64().unwrap() as usize;
        assert_eq!((taken, &row["timed"]), (10, &json!("program clock")), "{row}");
    } else {
        // Nothing is told of the time of what is not right.
        assert!(samples.is_empty() && row["median_ns"].is_null(), "{row}");
    }
}

/// A shared library and what karat has, on one problem that no set holds.
fn beside_ours() {
    let home = Home::new();
    home.ends(0, &["kernel", "new", "--lang", "c", "--op", "rms_norm", "--out", "mine"]);
    let (ran, rows) = bench(&home, &["rms_norm/N4-D96", "--kernel", "mine/kernel.toml"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    for variant in ["cpu/portable", "foreign/my-rms-norm"] {
        let row = by(&rows, variant);
        assert_eq!((&row["checked"], &row["spec"]), (&json!("passed"), &json!("N4-D96")), "{row}");
        assert_eq!((&row["timed"], &row["device"]), (&json!("host clock"), &json!("cpu")));
        let samples = row["samples_ns"].as_array().unwrap();
        assert!(samples.iter().all(|ns| 0.0 < ns.as_f64().unwrap()), "{row}");
        assert!(row["share_of_roof"].as_f64().is_some(), "{row}");
    }
    assert_eq!(by(&rows, "foreign/my-rms-norm")["kernel"], "mine/kernel.toml");
    assert!(rows.iter().all(|row| row["variant"] != "reference/f32"), "{rows:?}");
    // What is read back is what was written.
    let args = ["bench", "rms_norm/N4-D96", "--kernel", "mine/kernel.toml", "--turns", "1"];
    home.ends(0, &[&args[..], &["--results", "r.jsonl"]].concat());
    home.ends(0, &["merge", "r.jsonl", "-o", "m.jsonl"]);
    home.says(4, &["bench", "linear/", "--kernel", "mine/kernel.toml"], &["nothing of these"]);
    home.says(
        2,
        &["bench", "--model", "synthetic:tiny", "--kernel", "mine/kernel.toml"],
        &["--kernel", "--model"],
    );
    home.says(2, &["bench", "rms_norm/", "--kernel", "no.toml"], &["no.toml"]);
}

/// A package that is not there is no failure, and nothing green.
fn missing() {
    let home = program("lacks", HELPER);
    let why = "pip install a-package-of-no-name";
    let (ran, rows) = bench(&home, &[PROBLEM, "--kernel", FILE]);
    assert_eq!(ran.code, 0, "{ran:?}");
    let row = by(&rows, "foreign/clock");
    assert_eq!(row["checked"], "skipped", "{row}");
    assert!(row["why"].as_str().unwrap().contains(why), "{row}");
    assert_eq!(by(&rows, "cpu/portable")["checked"], "passed");
    let summary = ran.lines().pop().unwrap();
    assert!(1 <= summary["skipped"].as_u64().unwrap(), "{summary}");
    // Alone it is a run in which nothing ran.
    let python = python();
    let args = ["check", PROBLEM, "--kernel", FILE, "--python", &python];
    let ran = home.karat(&args);
    assert!(ran.code == 9 && ran.out.contains(why), "{ran:?}");
}

/// Programs that know only `run` are judged, and not timed through their pipe.
fn no_time() {
    let old = HELPER.replace(", \"times\": True", "");
    assert_ne!(old, HELPER);
    let home = program("honest", &old);
    let (ran, rows) = bench(&home, &[PROBLEM, "--kernel", FILE]);
    assert_eq!(ran.code, 0, "{ran:?}");
    let row = by(&rows, "foreign/clock");
    assert_eq!(row["checked"], "unsupported", "{row}");
    assert!(row["why"].as_str().unwrap().contains("does not answer `time`"), "{row}");
    fs::write(home.path("karat_kernel.py"), HELPER).unwrap();
    let (_, rows) = bench(&home, &[PROBLEM, "--kernel", FILE]);
    assert_eq!(by(&rows, "foreign/clock")["checked"], "passed");
}
