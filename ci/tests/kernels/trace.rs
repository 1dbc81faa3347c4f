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
    // A definition whose workloads have fills of their own.
    let of = |line: &&serde_json::Value| {
        let id = line["case"].as_str().unwrap_or_default();
        id.starts_with("rms_norm/") && id.contains("fill=")
    };
    let name = lines.iter().find(of).unwrap()["definition"].as_str().unwrap();
    one_file(&home, name, &want);
    // An axis that nobody knows, told with the place.
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

/// A file of workloads knows where the blobs of its data set are, wherever it is asked from, and a file
/// alone takes them from its own folder.
fn one_file(home: &Home, name: &str, all: &[&str]) {
    let read = |ran: super::Ran| -> Vec<String> {
        assert_eq!(ran.code, 0, "{ran:?}");
        ran.out.lines().map(str::to_owned).collect()
    };
    let workloads = format!("set/workloads/rmsnorm/{name}.jsonl");
    let definition = home.path(&format!("set/definitions/rmsnorm/{name}.json"));
    let definition = definition.to_str().unwrap();
    let want = read(home.karat(&["kernel", "import", &workloads, "--definition", definition]));
    assert!(want.iter().all(|id| all.contains(&id.as_str())), "{want:?}");
    assert!(want.iter().any(|id| id.contains("fill=")), "{want:?}");
    let inside = format!("{name}.jsonl");
    let mut command = home.command(&["kernel", "import", &inside, "--definition", definition]);
    command.current_dir(home.path("set/workloads/rmsnorm"));
    let there = command.output().unwrap();
    let there = String::from_utf8(there.stdout).unwrap();
    assert_eq!(there.lines().collect::<Vec<_>>(), want);
    fs::copy(home.path(&workloads), home.path("set/alone.jsonl")).unwrap();
    let alone = ["kernel", "import", "set/alone.jsonl", "--definition", definition];
    assert_eq!(read(home.karat(&alone)), want);
}
