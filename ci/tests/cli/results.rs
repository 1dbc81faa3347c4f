//! Files of results: written, shared, joined, gone on with; and what becomes of damaged ones.

use std::{collections::BTreeSet, fs, process::Command};

use serde_json::{Value, json};

use super::home::{Home, conforms, schema};

/// A quick check with several ways to compute an op, and some that are skipped.
const QUICK: &str = "l2_norm/";

/// A home in which a check left its rows.
fn checked() -> Home {
    let home = Home::with(&["ops"]);
    home.ends(0, &["check", QUICK, "--results", "r.jsonl"]);
    home
}

fn rows(home: &Home, file: &str) -> Vec<Value> {
    let text = fs::read_to_string(home.path(file)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn cases(rows: &[Value]) -> BTreeSet<String> {
    let checks = rows.iter().filter(|row| row["kind"] == "check");
    checks.map(|row| row["case"].as_str().unwrap().to_owned()).collect()
}

/// Refused in one line with all of `said`, and what stands at the place of the output stays.
fn refused(home: &Home, code: i32, args: &[&str], said: &[&str]) {
    fs::write(home.path("out"), "before").unwrap();
    let err = home.ends(code, &[args, &["-o", "out"]].concat());
    assert_eq!(err.lines().count(), 1, "{args:?}: {err}");
    for said in said {
        assert!(err.contains(said), "{args:?}: expected {said:?} in {err}");
    }
    assert_eq!(fs::read_to_string(home.path("out")).unwrap(), "before", "{args:?}");
}

#[test]
fn a_run_begins_with_its_machine_and_ends_with_its_exit_code() {
    let home = checked();
    let rows = rows(&home, "r.jsonl");
    for row in &rows {
        conforms(row, &schema("results")).unwrap();
    }
    let (head, end) = (&rows[0], rows.last().unwrap());
    assert_eq!((&head["kind"], &end["kind"]), (&json!("env"), &json!("end")));
    assert_eq!((&end["command"], &end["exit"]), (&json!("check"), &json!(0)));
    assert_eq!(head["command"], format!("karat check {QUICK} --results r.jsonl"));
    for field in ["run", "machine", "build", "time", "cpu", "version"] {
        assert!(!head[field].as_str().unwrap().is_empty(), "{field}");
    }
    assert!(!home.path("r.jsonl.part").exists());
    // The same rows as are printed, but for what differs from run to run.
    let printed = home.karat(&["check", QUICK, "--format", "jsonl"]).all_lines();
    assert_eq!(cases(&printed), cases(&rows));
    let kinds = |rows: &[Value]| rows.iter().map(|row| row["kind"].clone()).collect::<Vec<_>>();
    assert_eq!(kinds(&printed), kinds(&rows));
    // A run that selects nothing says so in its file.
    home.ends(4, &["check", "no-such-op", "--results", "none.jsonl"]);
    assert_eq!(self::rows(&home, "none.jsonl")[1]["exit"], 4);
    home.says(9, &["check", QUICK, "-q", "--results", "/proc/no/r.jsonl"], &["/proc/no"]);
}

#[test]
fn shards_hold_every_case_once_and_join_to_the_whole() {
    let home = checked();
    let whole = rows(&home, "r.jsonl");
    for i in ["1", "2", "3"] {
        let (shard, file) = (format!("{i}/3"), format!("{i}.jsonl"));
        home.ends(0, &["check", QUICK, "--shard", &shard, "--results", &file]);
    }
    let merged = ["merge", "1.jsonl", "2.jsonl", "3.jsonl", "-o", "m.jsonl"];
    assert_eq!(home.ends(0, &merged), "");
    let joined = rows(&home, "m.jsonl");
    assert_eq!(cases(&joined), cases(&whole));
    assert_eq!(joined.iter().filter(|row| row["kind"] == "check").count(), cases(&whole).len());
    // Rows stay as they were, byte by byte.
    let parts: String = ["1", "2", "3"]
        .map(|i| fs::read_to_string(home.path(&format!("{i}.jsonl"))).unwrap())
        .concat();
    assert_eq!(fs::read_to_string(home.path("m.jsonl")).unwrap(), parts);
    refused(
        &home,
        2,
        &["merge", "1.jsonl", "3.jsonl"],
        &["shard 2/3", "is not there", "--partial"],
    );
    let lacks = home.karat(&["merge", "1.jsonl", "3.jsonl", "--partial", "-o", "p.jsonl"]);
    assert!(lacks.code == 10 && lacks.err.contains("shard 2/3"), "{lacks:?}");
    refused(
        &home,
        2,
        &["merge", "1.jsonl", "1.jsonl", "2.jsonl", "3.jsonl"],
        &["1.jsonl:", "as well"],
    );
    // One shard that is red makes the whole red.
    home.ends(3, &["check", QUICK, "--shard", "2/3", "--plant", "nan", "--results", "2.jsonl"]);
    assert_eq!(home.karat(&merged).code, 2, "another command");
    let text =
        fs::read_to_string(home.path("2.jsonl")).unwrap().replace("\"--plant\",\"nan\",", "");
    fs::write(home.path("2.jsonl"), text).unwrap();
    assert_eq!(home.karat(&merged).code, 3);
    for shard in ["0/3", "4/3", "3", "a/b", "1/0"] {
        home.ends(2, &["check", QUICK, "--shard", shard]);
    }
    let ran =
        home.karat(&["check", "l2_norm/N3-D8@reference/f64", "--shard", "2/2", "--device", "cpu"]);
    assert!(ran.code == 0 || ran.code == 4, "{ran:?}");
    let list = |args: &[&str]| home.karat(&[&["list", QUICK][..], args].concat()).out;
    let all: String = ["1/2", "2/2"].map(|shard| list(&["--shard", shard])).concat();
    let sorted = |text: &str| text.lines().map(str::to_owned).collect::<BTreeSet<_>>();
    assert_eq!(sorted(&all), sorted(&list(&[])));
}

/// What one kind of row is about, of all that a file holds.
fn named(home: &Home, file: &str, kind: &str, key: &str) -> Vec<String> {
    let of_kind = rows(home, file).into_iter().filter(|row| row["kind"] == kind);
    let mut names: Vec<_> = of_kind.map(|row| row[key].as_str().unwrap().to_owned()).collect();
    names.sort();
    names
}

/// Shards of a command hold what the whole holds, each once, and a merge knows of one that lacks.
fn shared(command: &[&str], kinds: &[(&str, &str)]) {
    let home = Home::with(&[]);
    let run = |more: &[&str], file: &str| {
        let args = [command, more, &["--results", file]].concat();
        home.ends(0, &args);
        let shard = more.get(1).map_or(Value::Null, |&shard| shard.into());
        assert_eq!(rows(&home, file)[0]["shard"], shard, "{args:?}");
    };
    run(&[], "whole.jsonl");
    let parts = ["1/3", "2/3", "3/3"].map(|shard| {
        let file = format!("{}.jsonl", &shard[..1]);
        run(&["--shard", shard], &file);
        file
    });
    let [a, b, c] = parts.each_ref().map(String::as_str);
    home.ends(0, &["merge", a, b, c, "-o", "m.jsonl"]);
    for (kind, key) in kinds {
        let whole = named(&home, "whole.jsonl", kind, key);
        assert!(2 < whole.len(), "{kind}: {whole:?}");
        assert_eq!(named(&home, "m.jsonl", kind, key), whole, "{command:?}");
        let most = parts.iter().map(|file| named(&home, file, kind, key).len()).max().unwrap();
        assert!(most < whole.len(), "{kind}");
    }
    refused(&home, 2, &["merge", a, c], &["shard 2/3", "is not there"]);
    refused(&home, 2, &["merge", a, a, b, c], &["as well; expected each case once"]);
    home.ends(2, &[command, &["--shard", "4/3"]].concat());
}

#[test]
fn shards_of_a_bench_join_to_the_whole() {
    shared(&["bench", "l2_norm/", "--turns", "1"], &[("bench", "case")]);
    let home = Home::with(&[]);
    // A part may hold nothing, or nothing that runs here; the whole must.
    let one = ["bench", "l2_norm/N3-D8@cpu/portable", "--turns", "1", "--shard", "2/2"];
    assert!(home.ends(0, &one).is_empty());
    let skipped = ["bench", "l2_norm/N3-D8@cuda/naive", "--turns", "1"];
    if home.karat(&skipped).code == 9 {
        for shard in ["1/2", "2/2"] {
            let file = &shard[..1];
            home.ends(0, &[&skipped[..], &["--shard", shard, "--results", file]].concat());
        }
        home.ends(9, &["merge", "1", "2", "-o", "m.jsonl"]);
    }
    let model = ["bench", "--model", "synthetic:tiny", "--shard", "1/2"];
    home.says(2, &model, &["--shard", "--model"]);
}

#[test]
fn shards_of_a_hunt_join_to_the_whole() {
    shared(&["mutate", "l2_norm"], &[("mutant", "mutant")]);
}

#[test]
fn damaged_results_are_refused_in_one_line() {
    let home = checked();
    let text = fs::read_to_string(home.path("r.jsonl")).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let write = |name: &str, text: &str| fs::write(home.path(name), text).unwrap();
    let of = |lines: &[&str]| lines.join("\n") + "\n";
    let check = lines.iter().position(|line| line.contains("\"kind\":\"check\"")).unwrap();
    // Cut in the middle of a row, between two rows, and inside a letter.
    write("cut", &text[..text.len() - lines[lines.len() - 1].len() / 2]);
    write("short", &of(&lines[..lines.len() - 2]));
    fs::write(home.path("letter"), [text.as_bytes(), b"{\"schema\":\"\xe2\x80"].concat()).unwrap();
    let rows = lines.len() - 1;
    let whole = format!("cut:{}: cut in the middle of a row; {rows} whole rows", lines.len());
    for command in ["report", "merge"] {
        refused(&home, 2, &[command, "cut"], &[&whole, "--partial"]);
        refused(&home, 2, &[command, "short"], &["short: `karat check", "did not end"]);
        refused(&home, 2, &[command, "letter"], &["letter:", "cut in the middle"]);
        for (name, text, said) in [
            (
                "newer",
                of(&lines).replace("karat.result/1", "karat.result/2"),
                "newer:1: expected schema karat.result/1, got karat.result/2, which is newer",
            ),
            ("other", "{\"a\":1}\n".to_owned(), "other:1: expected a row of karat.result/1"),
            (
                "twice",
                of(&[&lines[..=check], &lines[check..]].concat()),
                "as well; expected each case once",
            ),
            ("words", format!("{text}hello\n"), "words:"),
            ("gap", text.replacen('\n', "\n\n", 1), "gap:2: an empty line"),
            (
                "outcome",
                text.replacen("\"passed\"", "\"fine\"", 1),
                "outcome \"fine\": expected one of",
            ),
            (
                "bare",
                text.replacen("\"ms\":", "\"ms\":NaN,\"x\":", 1),
                "NaN, which is no number of JSON",
            ),
            ("empty", String::new(), "empty: empty"),
        ] {
            write(name, &text);
            refused(&home, 2, &[command, name], &[said]);
        }
        refused(&home, 2, &[command, "no-such-file"], &["no-such-file: No such file"]);
        refused(&home, 2, &[command, "."], &["directory"]);
        refused(&home, 2, &[command, "/dev/zero"], &["regular file"]);
    }
    // What is whole is taken where that is asked, and what is missing is told.
    let ran = home.karat(&["report", "cut", "--partial", "-o", "p.html"]);
    assert!(ran.code == 0 && ran.err.contains("whole rows stand before it"), "{ran:?}");
    let page = fs::read_to_string(home.path("p.html")).unwrap();
    assert!(page.contains("These results are not whole") && page.contains("incomplete"));
    assert_eq!(home.karat(&["merge", "cut", "--partial", "-o", "p.jsonl"]).code, 10);
    assert_eq!(fs::read_to_string(home.path("p.jsonl")).unwrap(), of(&lines[..rows]));
    // An output that cannot be written.
    home.says(9, &["report", "r.jsonl", "-o", "/proc/no/r.html"], &["/proc/no/r.html"]);
}

/// A row of a time, with samples.
fn timed(case: &str, samples: &str) -> String {
    format!(
        "{{\"schema\":\"karat.result/1\",\"kind\":\"bench\",\"case\":\"{case}\",\"op\":\"rms_norm\",\"variant\":\"cpu/avx2\",\
         \"samples_ns\":{samples},\"median_ns\":2000.0,\"bytes\":8000,\"flops\":4000,\"share_of_roof\":0.5,\"roof\":\"memory\"}}\n"
    )
}

#[test]
fn samples_are_times_and_times_are_of_one_machine() {
    let home = checked();
    let text = fs::read_to_string(home.path("r.jsonl")).unwrap();
    let (head, rest) = text.split_once('\n').unwrap();
    let with = |name: &str, head: &str, row: &str| {
        fs::write(home.path(name), format!("{head}\n{row}{rest}")).unwrap();
    };
    let case = "rms_norm/N3-D7@cpu/avx2";
    for (samples, said) in [
        ("[2000.0,NaN]", "NaN, which is no number of JSON"),
        ("[2000.0,\"NaN\"]", "samples_ns[1] is NaN; expected a number above 0"),
        ("[2000.0,null]", "samples_ns[1] is NaN"),
        ("[2000.0,0.0]", "samples_ns[1] is 0; expected a number above 0"),
        ("[-1,2000.0]", "samples_ns[0] is -1"),
        ("[\"inf\"]", "samples_ns[0] is inf"),
        ("[\"fast\"]", "expected a number, inf, -inf or NaN"),
    ] {
        with("samples", head, &timed(case, samples));
        refused(&home, 2, &["report", "samples"], &["samples:2: ", said]);
    }
    with("here", head, &timed(case, "[1900.0,2000.0,2100.0]"));
    let mut other: Value = serde_json::from_str(head).unwrap();
    other["fingerprint"] = json!("another");
    other["cpu"] = json!("another processor");
    with("there", &other.to_string(), &timed(case, "[1900.0,2000.0,2100.0]"));
    refused(
        &home,
        7,
        &["report", "here", "--compare", "there"],
        &["the same machine", "another processor"],
    );
    refused(&home, 7, &["report", "here", "--compare", "no-such-file"], &["no such file"]);
    refused(&home, 2, &["report", "here", "--compare", "samples"], &["samples:2"]);
    // Two machines stand side by side in one report, and outcomes are compared wherever they are from.
    home.ends(0, &["report", "here", "there", "-o", "two.html"]);
    let page = fs::read_to_string(home.path("two.html")).unwrap();
    assert!(page.contains("another processor") && page.contains("1900 2000 2100"), "samples");
    let mut only = other.clone();
    only["run"] = json!("only");
    fs::write(home.path("only"), format!("{only}\n{rest}")).unwrap();
    home.ends(0, &["report", "here", "--compare", "only", "-o", "o.html"]);
    assert!(
        fs::read_to_string(home.path("o.html")).unwrap().contains("0 cases came to something else")
    );
    home.ends(0, &["report", "here", "--compare", "here", "-o", "same.html"]);
    assert!(fs::read_to_string(home.path("same.html")).unwrap().contains("1.000"));
}

#[test]
fn an_interrupted_check_goes_on_where_it_stopped() {
    let home = checked();
    let whole = fs::read_to_string(home.path("r.jsonl")).unwrap();
    let lines: Vec<&str> = whole.lines().collect();
    let resume = ["check", QUICK, "--results", "r.jsonl", "--resume"];
    // Half of its rows, one of them cut. What was found before is known by a time that nothing takes.
    let mark = |line: &str| {
        let mut row: Value = serde_json::from_str(line).unwrap();
        if row["kind"] == "check" {
            row["ms"] = json!(123_456.0);
        }
        row.to_string()
    };
    let half = lines.len() / 2;
    let before: String = lines[..half].iter().map(|line| mark(line) + "\n").collect();
    fs::write(home.path("r.jsonl.part"), format!("{before}{}", &lines[half][..20])).unwrap();
    let told = home.ends(0, &resume);
    let kept = before.lines().filter(|line| line.contains("\"kind\":\"check\"")).count();
    assert!(told.contains(&format!("{kept} problems were judged before")), "{told}");
    let found = rows(&home, "r.jsonl");
    let old: Vec<Value> = lines.iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(cases(&found), cases(&old));
    assert_eq!(found.iter().filter(|row| row["ms"] == 123_456.0).count(), kept);
    assert!(
        found.iter().filter(|row| row["kind"] == "check" && row["ms"] != 123_456.0).count() > 3
    );
    assert!(!home.path("r.jsonl.part").exists());
    home.ends(0, &["merge", "r.jsonl", "-o", "m.jsonl"]);
    // A finished one has nothing left to do; another command or build begins again.
    let told = home.ends(0, &resume);
    assert!(told.contains(&format!("{} problems were judged before", cases(&old).len())), "{told}");
    let other = ["check", "linear", "--results", "r.jsonl", "--resume"];
    home.says(2, &other, &["r.jsonl is of `karat check l2_norm/", "without --resume"]);
    let text = fs::read_to_string(home.path("r.jsonl")).unwrap();
    fs::write(home.path("r.jsonl"), text.replacen("\"build\":\"", "\"build\":\"x", 1)).unwrap();
    home.says(2, &resume, &["another build"]);
    home.says(2, &["check", QUICK, "--resume"], &["expected --results FILE"]);
    home.ends(0, &["check", QUICK, "--results", "fresh.jsonl", "--resume"]);
    // Rows that are begun anew are no loss that nobody is told of.
    fs::write(home.path("r.jsonl.part"), &before).unwrap();
    let told = home.ends(0, &["check", QUICK, "--results", "r.jsonl"]);
    assert!(told.contains("rows of an unfinished run are replaced"), "{told}");
}

#[test]
fn a_diff_selects_what_it_can_touch() {
    let home = Home::new();
    let git = |args: &[&str]| {
        let mut git = Command::new("git");
        git.current_dir(home.path(""))
            .args(["-c", "user.name=k", "-c", "user.email=k@k"])
            .args(args);
        assert!(git.output().unwrap().status.success(), "{args:?}");
    };
    let write = |name: &str| {
        fs::create_dir_all(home.path(name).parent().unwrap()).unwrap();
        fs::write(home.path(name), "x").unwrap();
    };
    let ops = |args: &[&str]| {
        let ran = home.karat(&[&["list", "--format", "jsonl"][..], args].concat());
        let of = |row: &Value| {
            (row["op"].as_str().unwrap().to_owned(), row["variant"].as_str().unwrap().to_owned())
        };
        (ran.code, ran.lines().iter().map(of).collect::<BTreeSet<_>>())
    };
    home.says(2, &["list", "--changed-since", "HEAD"], &["--changed-since HEAD: git"]);
    git(&["init", "-q"]);
    fs::write(home.path(".gitignore"), "target\n").unwrap();
    write("golden/src/ops/rms_norm.rs");
    git(&["add", "."]);
    git(&["commit", "-qm", "one"]);
    let since = ["--changed-since", "HEAD"];
    home.says(4, &["list", "--changed-since", "HEAD"], &["none of 0 files", "touches a case"]);
    write("README.md");
    home.says(4, &["check", "--changed-since", "HEAD"], &["none of 1 files"]);
    // Not yet committed, not even known to git.
    write("reference/src/rope.rs");
    let (code, found) = ops(&since);
    let names: BTreeSet<&str> = found.iter().map(|(op, _)| op.as_str()).collect();
    assert_eq!((code, names), (0, BTreeSet::from(["rope", "attention_layer", "model", "mtp"])));
    git(&["add", "."]);
    git(&["commit", "-qm", "two"]);
    assert_eq!(ops(&since).0, 4);
    assert_eq!(ops(&["--changed-since", "HEAD~1"]).1, found);
    write("kernels/src/l2_norm.cu");
    let (_, found) = ops(&since);
    assert!(found.contains(&("l2_norm".to_owned(), "cuda/naive".to_owned())), "{found:?}");
    assert!(found.iter().all(|(_, variant)| variant.starts_with("cuda/")), "{found:?}");
    write("golden/src/rng.rs");
    assert_eq!(ops(&since).1, ops(&[]).1);
    home.says(
        2,
        &["list", "--changed-since", "no-such-revision"],
        &["--changed-since no-such-revision: git merge-base"],
    );
    home.says(2, &["list", "--changed-since=--help"], &["expected a revision"]);
    // Somewhere else nothing of karat can be touched.
    let other = Home::new();
    let mut init = Command::new("git");
    assert!(init.current_dir(other.path("")).args(["init", "-q"]).status().unwrap().success());
    other.says(2, &["list", "--changed-since", "HEAD"], &["holds no sources of karat"]);
}
