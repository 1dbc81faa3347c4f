//! `karat kernel new` and `karat kernel inspect`.

use std::fs;

use super::{Needs, Test, check, home::Home, kernel, test};

const HEADER: &str = include_str!("../../../optimized/src/doors/karat.h");

pub(super) fn tests() -> Vec<Test> {
    let mut tests = Vec::new();
    for (language, needs) in [
        ("c", Needs::Cc),
        ("rust", Needs::Nothing),
        ("python", Needs::Numpy),
        ("cuda", Needs::Nothing),
    ] {
        for op in ["rms_norm", "gated_delta_rule"] {
            let name = format!("scaffold::{language}::{op}");
            tests.push(test(name, needs, move || passes(language, op)));
        }
    }
    tests.push(test("scaffold::along_paths", Needs::Cc, along_paths));
    tests.push(test("scaffold::is_written_nowhere_else", Needs::Nothing, written_nowhere_else));
    tests.push(test("inspect::manifests", Needs::Nothing, manifests));
    tests.push(test("inspect::libraries", Needs::Cc, libraries));
    tests.push(test("inspect::a_source_that_does_not_compile", Needs::Cc, does_not_compile));
    tests.push(test("inspect::what_would_run", Needs::Cc, what_would_run));
    tests
}

/// It passes as it is. What needs a GPU is skipped with a reason where there is none, and a run that
/// only skips is not green.
fn passes(language: &str, op: &str) {
    let home = Home::new();
    home.ends(0, &["kernel", "new", "--lang", language, "--op", op, "--out", "mine"]);
    let (ran, rows, _) = check(&home, "mine/kernel.toml", &["--timeout", "300"]);
    assert!(4 < rows.len(), "{ran:?}");
    let skipped = rows.iter().filter(|row| row["outcome"] == "skipped").count();
    if language == "cuda" && skipped == rows.len() {
        assert_eq!(ran.code, 9, "{ran:?}");
        let why = rows[0]["why"].as_str().unwrap();
        assert!(why.contains("libnvrtc") || why.contains("driver"), "{why}");
    } else {
        assert_eq!(ran.code, 0, "{ran:?}");
        assert!(rows.iter().all(|row| row["outcome"] == "passed"), "{ran:?}");
    }
}

/// One text, fed in every way there is, has one answer from a foreign kernel too.
fn along_paths() {
    let home = Home::new();
    home.ends(0, &["kernel", "new", "--lang", "c", "--op", "gated_delta_rule", "--out", "mine"]);
    let args = ["paths", "--kernel", "mine/kernel.toml", "--format", "jsonl"];
    let ran = home.karat(&args);
    assert_eq!(ran.code, 0, "{ran:?}");
    let lines = ran.lines();
    let rows: Vec<_> = lines.iter().filter(|line| line["kind"] == "paths").collect();
    for kind in ["split", "every", "alone", "poisoned", "edit", "heads", "gate-one"] {
        assert!(rows.iter().any(|row| row["what"] == kind), "no {kind}");
    }
    assert!(
        rows.iter().all(
            |row| row["variant"] == "foreign/my-gated-delta-rule" && row["outcome"] == "passed"
        )
    );
}

fn written_nowhere_else() {
    let home = Home::new();
    fs::create_dir(home.path("full")).unwrap();
    fs::write(home.path("full/notes.txt"), "mine").unwrap();
    let new = |out| ["kernel", "new", "--lang", "c", "--out", out];
    home.says(2, &new("full"), &["full", "is not empty"]);
    assert_eq!(home.names("full"), ["notes.txt"]);
    home.says(9, &new("full/notes.txt/in"), &["notes.txt"]);
    let unknown = ["kernel", "new", "--lang", "c", "--op", "fft", "--out", "new"];
    home.says(2, &unknown, &["--op fft: expected one of rms_norm, gated_delta_rule"]);
    assert!(!home.path("new").exists());
    home.ends(2, &["kernel", "new", "--lang", "fortran", "--out", "new"]);
}

/// A manifest that is right but for one thing.
fn with(change: (&str, &str)) -> String {
    let right = "name = \"it\"\nabi = 1\nimplements = [\"rms_norm\"]\n[constraints]\nD = \">= 1\"\n\
                 [plan]\noutput = \"f32\"\n[claims]\ndeterministic = true\n\
                 [door]\nkind = \"cabi\"\nlibrary = \"it.so\"\n";
    assert!(right.contains(change.0), "{change:?}");
    right.replacen(change.0, change.1, 1)
}

fn inspected(text: &str, code: i32, said: &[&str]) {
    let home = kernel(&[("kernel.toml", text), ("it.so", "not ELF")]);
    let args = ["kernel", "inspect", "kernel.toml"];
    home.says(code, &args, &[&["kernel.toml: "], said].concat());
    // A check says the same, and so do both in one line.
    home.says(code, &["check", "--kernel", "kernel.toml"], said);
    assert_eq!(home.ends(code, &args).trim_end().lines().count(), 1, "{text}");
}

fn manifests() {
    for (change, said) in [
        (("abi = 1\n", "abi = 1\ncolour = \"red\"\n"), &["line 3", "unknown field `colour`"][..]),
        (("abi = 1", "abi = 2"), &["abi: expected 1, got 2"]),
        (("abi = 1\n", ""), &["missing field `abi`"]),
        (("name = \"it\"", "name = \"a b\""), &["name: expected letters", "got \"a b\""]),
        (("[\"rms_norm\"]", "[\"fft\"]"), &["implements: expected ops", "got \"fft\""]),
        (("[\"rms_norm\"]", "[]"), &["implements: expected at least one op"]),
        (("D = \">= 1\"", "D = \"<= 0\""), &["[constraints] D <= 0: impossible"]),
        (("D = \">= 1\"", "\"D * 2\" = 7"), &["[constraints] impossible", "D * 2 = 7"]),
        (("D = \">= 1\"", "HV = 4"), &["[constraints] HV: expected letters of N D"]),
        (("D = \">= 1\"", "D = \"about 7\""), &["[constraints]", "about 7"]),
        (("D = \">= 1\"", "\"D *\" = 7"), &["[constraints]", "D *▸"]),
        (("D = \">= 1\"", "dtype = [\"int3\"]"), &["[constraints]", "int3"]),
        (("output = \"f32\"", "output = \"fp4\""), &["[plan]", "unknown variant `fp4`"]),
        (
            ("output = \"f32\"", "root_ulps = 1e7"),
            &["[plan] root_ulps: expected a number from 0 to 64, got 1e7"],
        ),
        (("output = \"f32\"", "bf16 = { exp_ulps = inf }"), &["[plan] bf16: exp_ulps", "got inf"]),
        (("output = \"f32\"", "rounds = 1"), &["[plan]", "unknown field `rounds`"]),
        (
            ("output = \"f32\"", "round = { soul = \"bf16\" }"),
            &["[plan]", "unknown variant `soul`"],
        ),
        (("\"cabi\"", "\"pipe\""), &["unknown variant `pipe`"]),
        (("\"cabi\"", "\"process\""), &["[door] library: is of kind \"cabi\""]),
        (("library = \"it.so\"", ""), &["[door] library: missing"]),
        (
            ("library = \"it.so\"", "library = \"it.so\"\nsymbols = { fft = \"f\" }"),
            &["fft is not in implements"],
        ),
        (("library", "library ="), &["line 12"]),
    ] {
        inspected(&with(change), 2, said);
    }
    let model = "name = \"it\"\nabi = 1\nimplements = [\"model\"]\n[door]\nkind = \"process\"\ncommand = [\"true\"]\n";
    inspected(model, 2, &["model is no kernel"]);
    // Everything is right, but for the file.
    let home = kernel(&[("kernel.toml", &with(("it.so", "it.so")))]);
    home.says(2, &["kernel", "inspect", "kernel.toml"], &["[door] ", "it.so: No such file"]);
    let missing = ["kernel", "inspect", "none.toml"];
    Home::new().says(2, &missing, &["none.toml: No such file"]);
    // Bytes that are no text, and text that never ends.
    let home = Home::new();
    fs::write(home.path("kernel.toml"), [0xff, 0xfe, 0]).unwrap();
    home.says(2, &["kernel", "inspect", "kernel.toml"], &["kernel.toml", "UTF-8"]);
    inspected(&format!("a = {}", "[".repeat(100_000)), 2, &["line 1"]);
    inspected(
        &with(("D = \">= 1\"", &format!("\"{}D\" = 1", "(".repeat(9999)))),
        2,
        &["[constraints]"],
    );
}

/// A manifest of a C library of these sources.
fn built(source: &str, implements: &str) -> Home {
    let manifest = format!(
        "name = \"it\"\nabi = 1\nimplements = [{implements}]\n\
         [build]\ncommand = [\"cc\", \"-shared\", \"-fPIC\", \"-o\", \"it.so\", \"it.c\"]\nsources = [\"it.c\"]\n\
         [door]\nkind = \"cabi\"\nlibrary = \"it.so\"\n"
    );
    kernel(&[("it.c", source), ("karat.h", HEADER), ("kernel.toml", &manifest)])
}

fn libraries() {
    let norm = "int karat_rms_norm(const karat_call *call) { (void)call; return 0; }\n";
    let abi = "#include \"karat.h\"\nKARAT_DEFINE_ABI\n";
    let other = "#include \"karat.h\"\nuint32_t karat_abi(void) { return 3; }\n";
    let dies =
        "#include <stdlib.h>\n__attribute__((constructor)) static void f(void) { abort(); }\n";
    let inspect = ["kernel", "inspect", "kernel.toml"];
    for (source, code, said) in [
        (format!("#include \"karat.h\"\n{norm}"), 2, "it.so: no symbol karat_abi"),
        (abi.to_owned(), 2, "it.so: no symbol karat_rms_norm for rms_norm"),
        (format!("{other}{norm}"), 2, "it.so: karat_abi says 3, expected 1"),
        (format!("{dies}{abi}{norm}"), 10, "SIGABRT"),
        (format!("{abi}{norm}"), 0, ""),
    ] {
        built(&source, "\"rms_norm\"").says(code, &inspect, &[said]);
    }
    let home = built(&format!("{abi}{norm}"), "\"rms_norm\", \"l2_norm\"");
    home.says(2, &inspect, &["no symbol karat_l2_norm for l2_norm"]);
    // A library that is none.
    let home = kernel(&[("kernel.toml", &with(("it.so", "it.so"))), ("it.so", "not ELF")]);
    home.says(2, &inspect, &["it.so: "]);
}

/// The compiler's own words, with the developer's file and line, after karat's line.
fn does_not_compile() {
    let home = built("int x = ;\n", "\"rms_norm\"");
    let said = home.ends(2, &["kernel", "inspect", "kernel.toml"]);
    assert!(said.starts_with("karat: kernel.toml: [build] cc -shared"), "{said}");
    assert!(said.contains("it.c:1:9"), "{said}");
}

fn what_would_run() {
    let home = Home::new();
    home.ends(0, &["kernel", "new", "--lang", "c", "--out", "mine"]);
    let ran = home.karat(&["kernel", "inspect", "mine/kernel.toml"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    for said in
        ["foreign/my-rms-norm", "opens", "deterministic", "f32: plain", "problems of rms_norm"]
    {
        assert!(ran.out.contains(said), "{said}: {}", ran.out);
    }
    let lines = home.karat(&["kernel", "inspect", "mine/kernel.toml", "--format", "jsonl"]).lines();
    assert_eq!(lines.len(), 1);
    assert_eq!((&lines[0]["kind"], &lines[0]["door"]), (&"kernel".into(), &"cabi".into()));
    // What it does not take is not green.
    let problem = "rms_norm/N3-D64;dtype=bf16";
    let ran = home.karat(&["check", "--kernel", "mine/kernel.toml", problem, "--format", "jsonl"]);
    assert_eq!(ran.lines()[0]["outcome"], "unsupported", "{ran:?}");
    assert_eq!(ran.code, 9, "{ran:?}");
}
