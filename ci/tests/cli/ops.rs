//! `list`, `check`, `explain`, `schema`.

use serde_json::Value;

use super::home::{DIGITS, Home, schema, words};

#[test]
fn list_names_what_a_filter_selects() {
    let home = Home::new();
    insta::assert_snapshot!(home.karat(&["list", "l2_norm"]).out);
    let selected = |args: &[&str]| home.karat(&[&["list", "--set", "ci"], args].concat()).out;
    let by_expression =
        selected(&["-E", "op(gated_delta_rule) & T>=64 & !fill(domain) & variant(*chunk7)"]);
    insta::assert_snapshot!(by_expression);
    // Words narrow an expression, and the other way round.
    let both =
        selected(&["f64", "-E", "op(gated_delta_rule) & T>=64 & !fill(domain) & variant(*chunk7)"]);
    assert!(both.lines().all(|line| line.contains("f64") && by_expression.contains(line)));
    let lines = home.karat(&["list", "rms_norm/", "--format", "jsonl"]).lines();
    assert!(lines.iter().all(|line| line["kind"] == "list" && line["op"] == "rms_norm"));
    assert!(!lines.is_empty());
}

#[test]
fn what_is_not_there_is_nothing_and_what_is_wrong_is_refused() {
    let home = Home::new();
    for command in ["list", "check"] {
        home.says(4, &[command, "no_such_op"], &["nothing selected"]);
        home.says(4, &[command, "no_such_op/N1"], &["nothing selected"]);
        home.says(4, &[command, "rms_norm/N3-D64@cuda/none"], &["nothing selected"]);
        home.says(4, &[command, "gdn_layer", "--device", "cuda"], &["nothing selected"]);
        home.says(2, &[command, "rms_norm/N3-X64"], &["expected D<n>"]);
        home.says(2, &[command, "rms_norm/N3-D64;fill=nope"], &["no fill \"nope\""]);
        home.says(2, &[command, "rms_norm/N99999999999999999999-D1"], &["expected N<n>"]);
        home.says(2, &[command, "-E", "op(rms_norm) & T>"], &["T>▸", "expected a number"]);
        home.ends(2, &[command, "--set", "all"]);
    }
    home.says(2, &["explain", "nope"], &["expected an exit code"]);
    home.says(
        2,
        &["check", "--plant", "nope"],
        &["one-element, nan, unwritten-tail", "chunk-boundary, crash"],
    );
}

#[test]
fn check_of_one_op_passes() {
    let home = Home::with(&["ops"]);
    // Other variants are skipped where the processor lacks what they need.
    let ran = home.karat(&["check", "rms_norm/", "portable"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    insta::with_settings!({filters => DIGITS.to_vec()}, { insta::assert_snapshot!(words(&ran.out)) });
    let lines = home.karat(&["check", "rms_norm/", "--format", "jsonl"]).lines();
    let (summary, rows) = lines.split_last().unwrap();
    assert_eq!((&summary["kind"], &summary["exit"]), (&"summary".into(), &0.into()));
    assert_eq!(summary["rows"], rows.len());
    let fine = |row: &&Value| {
        matches!(row["outcome"].as_str(), Some("passed" | "skipped" | "unsupported"))
    };
    assert!(rows.iter().all(|row| fine(&row) && row["kind"] == "check"));
    assert!(rows.iter().any(|row| row["spec"] == "ops:domain"), "recorded cases are checked too");
}

/// Every way to spoil an answer is seen, and the repro line shows it again.
#[test]
fn every_plant_fails_and_its_repro_line_reproduces() {
    let home = Home::with(&["ops"]);
    for (plant, code) in [("one-element", 3), ("nan", 3), ("chunk-boundary", 3), ("crash", 10)] {
        for case in ["rms_norm/N3-D64@cpu/portable", "rms_norm/ops:domain"] {
            let first = home.karat(&["check", case, "--plant", plant]);
            assert_eq!(first.code, code, "{plant} {case}: {first:?}");
            if case == "rms_norm/N3-D64@cpu/portable" {
                insta::with_settings!({filters => DIGITS.to_vec()}, {
                    insta::assert_snapshot!(format!("check_plant_{plant}"), words(&first.out));
                });
            }
            let repro =
                first.out.lines().find_map(|line| line.strip_prefix("  repro: karat ")).unwrap();
            let args: Vec<&str> = repro.split(' ').map(|word| word.trim_matches('\'')).collect();
            let again = home.karat(&args);
            assert_eq!(again.code, code, "{repro}: {again:?}");
            let block = |out: &str| out.split("  repro").next().unwrap().to_owned();
            assert_eq!(block(&first.out), block(&again.out), "{repro}");
        }
        let rows = home
            .karat(&["check", "rms_norm/N3-D64", "--plant", plant, "--format", "jsonl"])
            .lines();
        assert_eq!(rows[0]["outcome"], if plant == "crash" { "crashed" } else { "failed" });
        assert_eq!(rows.last().unwrap()["exit"], code);
    }
    let all = home.karat(&["check", "linear", "--plant", "nan", "--format", "jsonl"]).lines().len();
    let fast =
        home.karat(&["check", "linear", "--plant", "nan", "--format", "jsonl", "--fail-fast"]);
    assert_eq!(fast.lines().len(), 2);
    assert!(2 < all);
}

#[test]
fn explain_and_schema_answer() {
    let home = Home::new();
    for code in ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "130"] {
        let ran = home.karat(&["explain", code]);
        assert!(ran.code == 0 && ran.out.contains("exit code"), "{ran:?}");
    }
    assert!(home.karat(&["explain", "rms_norm"]).out.contains("letters N-D"));
    for which in ["results", "golden", "verdict"] {
        let ran = home.karat(&["schema", which]);
        assert_eq!(serde_json::from_str::<serde_json::Value>(&ran.out).unwrap(), schema(which));
        let ran = home.karat(&["schema", which, "--format", "jsonl"]);
        assert_eq!(ran.lines(), [schema(which)]);
    }
}
