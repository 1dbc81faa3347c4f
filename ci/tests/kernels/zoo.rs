//! Kernels that are not honest, and those that are broken.

use super::{FILE, Needs, Test, check, home::Home, kernel, test};

const HEADER: &str = include_str!("../../../optimized/src/doors/karat.h");
const SOURCE: &str = include_str!("zoo/rms_norm.c");
const LIAR: &str = include_str!("zoo/liar.py");

/// The problem on which the kernels of `rms_norm.c` misbehave.
const VICTIM: &str = "N3-D7";

/// In which way, how it must end, a part of why, and how the run must.
const WAYS: &[(&str, &str, &str, i32)] = &[
    ("HONEST", "passed", "", 0),
    ("BY_POINTER", "cheat", "new inputs at the addresses of the call before", 11),
    ("PREVIOUS", "cheat", "the answer of that call: o", 11),
    ("BEYOND", "cheat", "4 bytes after o were written, the first 0 beyond its end", 11),
    ("FAR", "cheat", "4 bytes after o were written, the first 60000 beyond its end", 11),
    ("AHEAD", "cheat", "4 bytes before o were written, the last 1 ahead of its start", 11),
    ("TAIL", "failed", "", 3),
    ("MUTATES", "cheat", "input x was changed", 11),
    ("NOT_FINITE", "failed", "", 3),
    ("SLEEPS", "timeout", "", 10),
    ("SEGFAULTS", "crashed", "SIGSEGV, segmentation fault", 10),
    ("ALLOCATES", "crashed", "memory limit", 10),
    ("NARROW", "failed", "", 3),
    ("FAILS", "crashed", "it returned status 1: no room on the chip", 10),
    ("EXITS", "crashed", "its process ended with exit status: 0", 10),
    ("RANDOM", "cheat", "differs between two runs, though it claims not to", 11),
];

/// The ways of `liar.py`, how they end and a part of why; none of them passes.
const LIES: &[(&str, &str, &str)] = &[
    ("garbage", "crashed", "it wrote no frame: expected KRT1"),
    ("garbage-tensors", "crashed", "it wrote no tensors"),
    ("too-much", "crashed", "it wrote too much"),
    ("claims-too-much", "crashed", "it wrote too much: 1099511627776 bytes"),
    ("too-little", "crashed", "it wrote too little"),
    ("nothing", "crashed", "it ended (exit status: 0) without an answer"),
    ("leaves", "crashed", "it ended (exit status: 7) without an answer"),
    ("silence", "timeout", ""),
    ("other-shape", "crashed", "output o has shape"),
    ("other-dtype", "crashed", "it wrote o as I32, expected F32"),
    ("other-output", "crashed", "it wrote extra, which is no output"),
    ("fewer-outputs", "crashed", "it did not write h"),
    ("no-status", "crashed", "it wrote status null, expected ok"),
    ("header-no-json", "crashed", "it wrote a header that is no JSON"),
    ("says-error", "crashed", "it says: out of luck and of lines"),
    ("dies-with-words", "crashed", "liar: no such GPU"),
    ("zeros", "failed", ""),
];

/// What hangs is given so long. A loaded machine must open a door in that time too.
const TIMEOUT: &str = "5";

pub(super) fn tests() -> Vec<Test> {
    let c = WAYS.iter().map(|&(way, outcome, why, code)| {
        test(format!("zoo::c::{}", way.to_lowercase()), Needs::Cc, move || {
            mischief(way, outcome, why, code);
        })
    });
    let lies = LIES.iter().map(|&(way, outcome, why)| {
        test(format!("zoo::process::{way}"), Needs::Python, move || lie(way, outcome, why))
    });
    let more = [
        test("zoo::narrow_but_declared", Needs::Cc, narrow_but_declared),
        test("zoo::a_plan_without_a_bound", Needs::Cc, a_plan_without_a_bound),
        test("zoo::random_without_a_claim", Needs::Cc, random_without_a_claim),
        test("zoo::invariance_that_is_claimed", Needs::Cc, invariance_that_is_claimed),
        test("zoo::invariance_that_is_not", Needs::Cc, invariance_that_is_not),
        test("zoo::flaky", Needs::Cc, flaky),
        test("zoo::nobody_else_is_harmed", Needs::Cc, nobody_else_is_harmed),
        test("zoo::process::refused", Needs::Python, refused),
        test("zoo::process::never_opens", Needs::Python, never_opens),
    ];
    c.chain(lies).chain(more).collect()
}

/// A manifest of `rms_norm.c`.
fn manifest(name: &str, way: &str, more: &str) -> String {
    format!(
        "name = \"{name}\"\nabi = 1\nimplements = [\"rms_norm\"]\n{more}\n\
         [constraints]\ndtype = [\"f32\"]\n[build]\n\
         command = [\"cc\", \"-O1\", \"-shared\", \"-fPIC\", \"-DMISCHIEF={way}\", \"-o\", \"lib{name}.so\", \"rms_norm.c\", \"-lm\"]\n\
         sources = [\"rms_norm.c\", \"karat.h\"]\n[door]\nkind = \"cabi\"\nlibrary = \"lib{name}.so\"\n"
    )
}

fn of(way: &str, more: &str) -> Home {
    kernel(&[
        ("karat.h", HEADER),
        ("rms_norm.c", SOURCE),
        ("kernel.toml", &manifest("it", way, more)),
    ])
}

const DETERMINISTIC: &str = "claims = { deterministic = true }";

fn mischief(way: &str, outcome: &str, why: &str, code: i32) {
    let home = of(way, DETERMINISTIC);
    let limits = ["--memory", "256MiB", "--timeout", if way == "SLEEPS" { TIMEOUT } else { "60" }];
    let (ran, rows, summary) = check(&home, FILE, &limits);
    assert_eq!(ran.code, code, "{ran:?}");
    assert!(4 < rows.len(), "{ran:?}");
    for row in &rows {
        if row["spec"] == VICTIM {
            assert_eq!(row["outcome"], outcome, "{row}");
            assert!(row["why"].as_str().unwrap_or_default().contains(why), "{row}");
        } else {
            assert_eq!(row["outcome"], "passed", "{row}");
        }
    }
    assert_eq!(summary["exit"], code);
}

/// The same kernel passes under a plan that says what it does.
fn narrow_but_declared() {
    let home = of("NARROW", "plan = { round = { norm = \"bf16\" } }");
    let (ran, rows, _) = check(&home, FILE, &[]);
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(rows.iter().all(|row| row["outcome"] == "passed"), "{ran:?}");
}

/// What passes only when it is run again is told as such, and fails without another try.
fn flaky() {
    let home = of("ONCE", "");
    let once = home.path("once");
    let text = std::fs::read_to_string(home.path(FILE)).unwrap();
    let file = format!("\"-DONCE_FILE=\\\"{}\\\"\", \"-o\"", once.display());
    std::fs::write(home.path(FILE), text.replace("\"-o\"", &file)).unwrap();
    let of_victim = |rows: &[serde_json::Value]| {
        rows.iter().find(|row| row["spec"] == VICTIM).cloned().unwrap()
    };
    let (ran, rows, summary) = check(&home, FILE, &[]);
    assert_eq!((ran.code, &summary["flaky"]), (10, &0.into()), "{ran:?}");
    assert_eq!(of_victim(&rows)["outcome"], "crashed");
    std::fs::remove_file(&once).unwrap();
    let (ran, rows, summary) = check(&home, FILE, &["--retries", "2", "--junit", "j.xml"]);
    assert_eq!((ran.code, &summary["flaky"]), (0, &1.into()), "{ran:?}");
    let row = of_victim(&rows);
    assert_eq!(
        (&row["outcome"], row["earlier"].as_array().unwrap().len()),
        (&"passed".into(), 1),
        "{row}"
    );
    assert_eq!(row["earlier"][0]["outcome"], "crashed", "{row}");
    assert!(rows.iter().all(|row| row["spec"] == VICTIM || row["earlier"].is_null()), "{ran:?}");
    let junit = std::fs::read_to_string(home.path("j.xml")).unwrap();
    assert!(junit.contains("<flakyError") && junit.contains("type=\"crashed\""), "{junit}");
    std::fs::remove_file(&once).unwrap();
    let ran = home.karat(&["check", "--kernel", FILE, "--retries", "1", "--report", "r.html"]);
    assert!(
        ran.code == 0 && ran.out.contains("FLAKY rms_norm/N3-D7@") && ran.out.contains("(1 flaky)"),
        "{ran:?}"
    );
    assert!(
        std::fs::read_to_string(home.path("r.html"))
            .unwrap()
            .contains("Flaky: passed, but not at once")
    );
    // What fails every time is no more flaky than before.
    let ran = home.karat(&["check", "--kernel", FILE, "--retries", "2", "--plant", "nan"]);
    assert_eq!(ran.code, 3, "{ran:?}");
}

/// Squares of tiny rows are zero in fp8, and one over their root is not finite: nobody fails for that.
fn a_plan_without_a_bound() {
    let home = of("HONEST", "plan = { accumulator = \"fp8\" }");
    let (ran, rows, _) = check(&home, FILE, &["rms_norm/N5-D64;fill=tiny-rows"]);
    assert_eq!(ran.code, 3, "{ran:?}");
    assert_eq!(rows[0]["outcome"], "mistrusted", "{ran:?}");
    assert!(rows[0]["why"].as_str().unwrap_or_default().contains("no bound can be derived"));
}

/// Another last bit is no wrong answer; only who claims otherwise cheats.
fn random_without_a_claim() {
    let (ran, _, _) = check(&of("RANDOM", ""), FILE, &[]);
    assert_eq!(ran.code, 0, "{ran:?}");
}

/// `karat invariance --kernel`: its rows.
fn invariance(home: &Home, code: i32) -> Vec<serde_json::Value> {
    let args = ["invariance", "--kernel", FILE, "--runs", "40", "--format", "jsonl"];
    let ran = home.karat(&args);
    assert_eq!(ran.code, code, "{ran:?}");
    let rows: Vec<_> =
        ran.lines().into_iter().filter(|line| line["kind"] == "invariance").collect();
    for kind in ["runs", "threads", "batch"] {
        assert!(rows.iter().any(|row| row["what"] == kind), "{ran:?}");
    }
    rows
}

/// In which way, what it claims, and where that shows.
const BROKEN: &[(&str, &str, &str)] = &[
    ("RANDOM", "deterministic", "runs"),
    ("BY_THREADS", "deterministic", "threads"),
    ("BY_BATCH", "batch_invariant", "batch"),
];

fn invariance_that_is_claimed() {
    let claims = "claims = { deterministic = true, batch_invariant = true }";
    let rows = invariance(&of("HONEST", claims), 0);
    assert!(rows.iter().all(|row| row["equal"] == true && row["claim"].is_string()));
    for (way, claim, kind) in BROKEN {
        let rows = invariance(&of(way, &format!("claims = {{ {claim} = true }}")), 11);
        let cheats: Vec<_> = rows.iter().filter(|row| row["outcome"] != "passed").collect();
        assert!(cheats.iter().any(|row| row["what"] == *kind), "{way}: {cheats:?}");
        for row in cheats {
            assert_eq!(row["outcome"], "cheat", "{row}");
            assert_eq!(row["difference"]["ulp"], 1, "{row}");
            assert_eq!(row["difference"]["at"], serde_json::json!([0, 0]), "{row}");
        }
    }
}

/// What is not claimed is measured.
fn invariance_that_is_not() {
    for (way, _, kind) in BROKEN {
        let rows = invariance(&of(way, ""), 0);
        let apart = |row: &&serde_json::Value| row["what"] == *kind && row["equal"] == false;
        assert!(rows.iter().any(|row| apart(&row)), "{way}");
        assert!(rows.iter().all(|row| row["outcome"] == "passed"), "{way}");
    }
    let rows = invariance(&of("SEGFAULTS", ""), 10);
    assert!(rows.iter().any(|row| row["outcome"] == "crashed"));
    assert!(rows.iter().any(|row| row["outcome"] == "passed"));
}

/// One run with a kernel that dies, one that hangs, one that cheats and one that is honest.
fn nobody_else_is_harmed() {
    let home = kernel(&[("karat.h", HEADER), ("rms_norm.c", SOURCE)]);
    let ways = [("a", "SEGFAULTS"), ("b", "SLEEPS"), ("c", "MUTATES"), ("kernel", "HONEST")];
    let mut args = vec!["--timeout", TIMEOUT];
    let files = ways.map(|(name, _)| format!("{name}.toml"));
    for ((name, way), file) in ways.iter().zip(&files) {
        std::fs::write(home.path(file), manifest(name, way, "")).unwrap();
    }
    for file in &files[..3] {
        args.extend(["--kernel", file]);
    }
    let (ran, rows, summary) = check(&home, FILE, &args);
    // Cheating is the gravest of what was found.
    assert_eq!(ran.code, 11, "{ran:?}");
    let red: Vec<_> = rows.iter().filter(|row| row["outcome"] != "passed").collect();
    assert_eq!(red.len(), 3, "{ran:?}");
    for (variant, outcome) in
        [("foreign/a", "crashed"), ("foreign/b", "timeout"), ("foreign/c", "cheat")]
    {
        let found = red.iter().find(|row| row["variant"] == variant);
        assert_eq!(found.expect(variant)["outcome"], outcome);
    }
    assert!(rows.iter().any(|row| row["variant"] == "foreign/kernel"));
    assert_eq!(summary["passed"], rows.len() - 3);
}

fn liar(way: &str) -> Home {
    let manifest = format!(
        "name = \"liar\"\nabi = 1\nimplements = [\"rms_norm\"]\n[door]\nkind = \"process\"\n\
         command = [\"{{python}}\", \"liar.py\", \"{way}\"]\n"
    );
    kernel(&[("liar.py", LIAR), ("kernel.toml", &manifest)])
}

fn lie(way: &str, outcome: &str, why: &str) {
    let timeout = if way == "silence" { TIMEOUT } else { "60" };
    let (ran, rows, _) = check(&liar(way), FILE, &["rms_norm/N3-D7", "--timeout", timeout]);
    assert_eq!(ran.code, if outcome == "failed" { 3 } else { 10 }, "{ran:?}");
    assert_eq!(rows.len(), 1, "{ran:?}");
    assert_eq!(rows[0]["outcome"], outcome, "{ran:?}");
    assert!(rows[0]["why"].as_str().unwrap_or_default().contains(why), "{ran:?}");
}

/// A program that is there but cannot be called is refused; one that says nonsense has died.
fn refused() {
    for (way, code, why) in [
        ("another-version", 2, "it speaks version 7, expected 1"),
        ("other-ops", 2, "does not know rms_norm"),
        ("hello-garbage", 10, "expected KRT1, got \"Tracebac\""),
    ] {
        let python = super::python();
        let args = ["check", "--kernel", FILE, "--python", &python];
        liar(way).says(code, &args, &["kernel.toml", why]);
    }
}

fn never_opens() {
    let manifest = "name = \"it\"\nabi = 1\nimplements = [\"rms_norm\"]\n[door]\nkind = \"process\"\n\
                    command = [\"{python}\", \"-c\", \"import time; time.sleep(3600)\"]\n";
    let home = kernel(&[("kernel.toml", manifest)]);
    let python = super::python();
    let args = ["kernel", "inspect", FILE, "--timeout", TIMEOUT, "--python", &python];
    home.says(10, &args, &["kernel.toml", "did not open in time"]);
}
