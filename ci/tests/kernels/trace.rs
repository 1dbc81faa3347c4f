//! `karat kernel export` and `karat kernel import`.

use std::fs;

use super::{Needs, Test, home::Home, test};

pub(super) fn tests() -> Vec<Test> {
    vec![test("trace::there_and_back", Needs::Nothing, there_and_back)]
}

fn there_and_back() {
    let home = Home::new();
    let expression = "(op(rms_norm) | op(gated_delta_rule) | op(linear) | op(attention)) & variant(reference/f32)";
    let selected = home.karat(&["list", "-E", expression]);
    let mut want: Vec<&str> =
        selected.out.lines().map(|id| id.trim_end_matches("@reference/f32")).collect();
    want.sort_unstable();
    assert!(10 < want.len());
    let lines = home
        .karat(&["kernel", "export", "-E", expression, "--out", "set", "--format", "jsonl"])
        .lines();
    assert_eq!(lines.len(), want.len());
    assert_eq!(home.names("set"), ["blob", "definitions", "workloads"]);
    let back = home.karat(&["kernel", "import", "set"]);
    assert_eq!(back.code, 0, "{back:?}");
    let mut got: Vec<&str> = back.out.lines().collect();
    got.sort_unstable();
    assert_eq!(got, want);
    // An axis that nobody knows, told with the place.
    let name = lines[0]["definition"].as_str().unwrap();
    let file = home.path("set/definitions/rmsnorm").join(format!("{name}.json"));
    fs::remove_dir_all(home.path("set/blob")).unwrap();
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, text.replacen("\"batch_size\": {", "\"page_size\": {", 1)).unwrap();
    let import = ["kernel", "import", "set"];
    home.says(2, &import, &[name, ".jsonl:1", "axis batch_size is not in the definition"]);
    home.says(2, &["kernel", "import", "none"], &["none: No such file"]);
    fs::write(home.path("empty.jsonl"), "").unwrap();
    home.says(4, &["kernel", "import", "empty.jsonl"], &["no workloads"]);
    home.says(
        4,
        &["kernel", "export", "sampling/", "--out", "set"],
        &["rms_norm, linear, gated_delta_rule, attention"],
    );
}
