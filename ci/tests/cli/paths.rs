//! `paths` and `invariance`.

use super::home::Home;

/// A small model and a short text.
const SMALL: [&str; 4] = ["--model", "synthetic:ragged,layers=2", "--tokens", "16"];

fn paths<'a>(args: &[&'a str]) -> Vec<&'a str> {
    [&["paths"], &SMALL[..], args].concat()
}

#[test]
fn paths_of_a_model_and_of_an_op_pass() {
    let home = Home::new();
    let lines = home.karat(&paths(&["model/", "=at3", "--format", "jsonl"])).lines();
    let (summary, rows) = lines.split_last().unwrap();
    assert!(rows.iter().all(|row| row["kind"] == "paths" && row["outcome"] == "passed"));
    assert!(rows.iter().all(|row| row["equal"] == true && row["claim"].is_string()));
    assert_eq!(summary["kind"], "summary");
    assert_eq!((&summary["exit"], &summary["rows"]), (&0.into(), &rows.len().into()));
    assert_eq!(summary["equal"], rows.len());
    // Of two forms one promises equal bits, the other holds its bound.
    let op = ["gated_delta_rule/B1-T141-HK2-HV6", "split=65,76@reference"];
    let lines = home.karat(&[&["paths", "--format", "jsonl"], &op[..]].concat()).lines();
    let equal: Vec<_> = lines
        .iter()
        .filter_map(|row| Some((row["variant"].as_str()?, row["equal"] == true)))
        .collect();
    let wanted =
        [("reference/f32", true), ("reference/chunk64", false), ("reference/chunk7", false)];
    assert_eq!(equal, wanted);
    assert!(lines.iter().all(|row| row["outcome"] == "passed" || row["kind"] == "summary"));
    let human = home.karat(&[&["paths"], &op[..]].concat());
    assert_eq!(human.code, 0, "{human:?}");
    assert!(human.out.contains("3 passed (1 with equal bits), 0 not passed"), "{human:?}");
}

/// Every fault ends in its code, with the first element that differs, and its repro line shows it again.
#[test]
fn a_planted_fault_is_caught_and_its_repro_line_reproduces() {
    let home = Home::new();
    for (plant, path, code) in [
        ("recurrent-state-lost", "split=8,8", 3),
        ("conv-state-lost", "every=7", 3),
        ("conv-state-shifted", "left-pad=7", 3),
        ("kv-cache-lost", "rollback=at3,k2,n1@", 3),
        ("drafts-kept", "rollback=at3,k2,n1,nan", 3),
        ("snapshot-is-now", "resume=3", 3),
        ("bits-by-batch", "packed=rising", 11),
    ] {
        let first = home.karat(&paths(&[path, "model/", "--plant", plant]));
        assert_eq!(first.code, code, "{plant}: {first:?}");
        let block = |out: &str| out.split("\n┌").next().unwrap().to_owned();
        let told = block(&first.out);
        assert!(told.contains("first difference") && told.contains(" elements of "), "{told}");
        let repro = told.lines().find_map(|line| line.strip_prefix("  repro: karat ")).unwrap();
        let args: Vec<&str> = repro.split(' ').map(|word| word.trim_matches('\'')).collect();
        let again = home.karat(&args);
        assert_eq!((again.code, block(&again.out)), (code, told.clone()), "{repro}");
    }
    // A fault that all paths share is not for this command to see.
    let shared = home.karat(&paths(&["split=8,8", "--plant", "missing-plus-one"]));
    assert_eq!(shared.code, 3, "{shared:?}");
    assert!(shared.out.contains("NOT SEEN  missing-plus-one"), "{shared:?}");
    let stopped = home.karat(&paths(&[
        "split=",
        "model/",
        "--plant",
        "kv-cache-lost",
        "--fail-fast",
        "--format",
        "jsonl",
    ]));
    assert_eq!(stopped.lines().len(), 2, "{stopped:?}");
}

#[test]
fn what_is_promised_of_runs_threads_and_batches_is_held() {
    let home = Home::new();
    let model = ["--model", "synthetic:ragged,layers=2", "--runs", "4"];
    let args = |more: &[&'static str]| [&["invariance"], &model[..], more].concat();
    let lines = home.karat(&args(&["rms_norm/N3-D7/", "--format", "jsonl"])).lines();
    let (summary, rows) = lines.split_last().unwrap();
    assert_eq!((&summary["kind"], &summary["exit"]), (&"summary".into(), &0.into()));
    for what in ["runs", "threads", "batch"] {
        assert!(rows.iter().any(|row| row["what"] == what && row["variant"] == "cpu/portable"));
    }
    assert!(rows.iter().all(|row| row["kind"] == "invariance"));
    let ran =
        || rows.iter().filter(|row| row["outcome"] != "skipped" && row["outcome"] != "unsupported");
    assert!(ran().all(|row| row["equal"] == true));
    assert!(rows.iter().any(|row| row["runs"] == 4));
    assert_eq!(home.karat(&args(&["model/synthetic", "/T5/"])).code, 0);
    for (plant, row, code) in [
        ("bits-by-batch", "/T5/batch=3,place=2", 11),
        ("bits-by-run", "/T5/runs", 11),
        ("places-swapped", "/T5/batch=3,place=0", 3),
    ] {
        let ran = home.karat(&args(&["model/synthetic", row, "--plant", plant]));
        assert_eq!(ran.code, code, "{plant}: {ran:?}");
        assert!(ran.out.contains("first difference logits["), "{ran:?}");
    }
}

#[test]
fn what_cannot_be_fed_is_refused() {
    let home = Home::new();
    for command in ["paths", "invariance"] {
        home.says(4, &[command, "no_such_op"], &["nothing selected"]);
        home.says(2, &[command, "--plant", "nope"], &["kv-cache-lost", "drafts-kept"]);
        home.says(2, &[command, "--model", "synthetic:nope"], &["preset"]);
        home.says(2, &[command, "--engine", "nope", "model/"], &["expected reference"]);
        home.says(2, &[command, "--number", "f16", "model/"], &["expected f32, f64 or bf16"]);
    }
    home.says(2, &["paths", "--tokens", "4"], &["too few"]);
    home.says(2, &["invariance", "--seconds=-1"], &["expected a time"]);
    home.ends(2, &["invariance", "--runs", "1"]);
}
