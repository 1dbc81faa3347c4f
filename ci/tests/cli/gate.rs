//! `bench` of ops, `calibrate`, `baseline`, `gate`, `ab` and `history`. No test depends on how fast
//! anything is, or how steadily: what is planted is four times the work again, what is proven has wide
//! margins, and what was taken at another time is written here.

use std::{
    fs,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use serde_json::{Value, json};

use super::home::{Home, Ran};

/// A problem of some 50 µs of which there are larger ones.
const CASE: &str = "linear/N8-M64-D250@cpu/portable";
const OTHER: &str = "rms_norm/N16-D64@cpu/portable";

/// Few turns: enough for what is planted.
const FEW: [&str; 8] = ["--quads", "12", "--launches", "3", "--most-launches", "3", "--aa", "3"];

/// As many more as it takes on a busy machine to prove that nothing has changed.
const MANY: [&str; 8] = ["--quads", "12", "--launches", "3", "--most-launches", "60", "--aa", "9"];

/// A rule under which a noisy machine is still gated.
const POLICY: &str = "min-effect = 0.5\nmargin = 0.9\n[floors]\n\"\" = 0.99\n";

fn home() -> Home {
    let home = Home::with(&[]);
    fs::write(home.path("gate.toml"), POLICY).unwrap();
    home
}

fn save(home: &Home, name: &str, cases: &[&str]) -> Ran {
    let few = ["--quads", "12", "--launches", "3", "--format", "jsonl"];
    home.karat(&[&["baseline", "save", name], cases, &few[..]].concat())
}

fn gate(home: &Home, more: &[&str]) -> Ran {
    gate_in(&FEW, home, more)
}

fn gate_in(turns: &[&str], home: &Home, more: &[&str]) -> Ran {
    let gate = ["gate", "--policy", "gate.toml", "--format", "jsonl"];
    home.karat(&[&gate[..], turns, more].concat())
}

fn rows(ran: &Ran) -> Vec<Value> {
    ran.lines().into_iter().filter(|line| line["kind"] == "gate").collect()
}

const BASELINE: &str = "target/karat/baselines/was.jsonl";

#[test]
fn ops_are_timed_side_by_side_after_they_were_judged() {
    let home = home();
    let words = ["bench", "rms_norm/N16-D64", "--turns", "3", "--format", "jsonl"];
    let ran = home.karat(&words);
    assert_eq!(ran.code, 0, "{ran:?}");
    let lines = ran.all_lines();
    assert_eq!(lines[0]["kind"], "env");
    assert!(lines[0]["fingerprint"].is_string());
    let timed: Vec<_> = lines.iter().filter(|line| line["checked"] == "passed").collect();
    assert!(timed.iter().any(|row| row["case"] == OTHER), "{ran:?}");
    for row in timed {
        assert_eq!(row["kind"], "bench");
        let samples = row["samples_ns"].as_array().unwrap();
        let taken = samples.len() + row["throttled"].as_u64().unwrap() as usize;
        assert_eq!(taken, 15, "{row}");
        assert!(samples.iter().all(|ns| 0.0 < ns.as_f64().unwrap()), "{row}");
        assert!(row["cold"] == false && row["bytes"].as_u64().is_some());
    }
    assert!(lines.iter().all(|line| line["variant"] != "reference/f32"));
    // Cold is walked, or refused where it cannot be proven.
    let cold = home.karat(&["bench", OTHER, "--turns", "1", "--cold", "--format", "jsonl"]);
    if cold.code != 9 {
        let lines = cold.lines();
        let row = lines.iter().find(|line| line["kind"] == "bench").unwrap();
        assert_eq!(row["cold"], true);
        let walked = row["walked_between_bytes"].as_u64().unwrap();
        assert!(row["cache_bytes"].as_u64().unwrap() < walked);
        assert_eq!(row["calls_per_sample"], 1);
    }
    home.says(4, &["bench", "rms_norm/N16-D64@reference/f32"], &["can be timed"]);
    home.says(2, &["bench", "model"], &["expected --model"]);
    home.ends(2, &["bench", OTHER, "--turns", "0"]);
}

/// Every end of a gate, on one baseline.
#[test]
fn a_gate_ends_as_what_it_finds() {
    let home = home();
    home.says(7, &["gate", "--baseline", "was"], &["no such baseline"]);
    home.says(7, &["baseline", "show"], &["no baseline is kept"]);
    home.says(2, &["gate"], &["--baseline NAME or --selftest"]);
    let saved = save(&home, "was", &[CASE]);
    assert_eq!(saved.code, 0, "{saved:?}");
    home.says(2, &["baseline", "save", "was", CASE], &["--force"]);
    home.says(2, &["baseline", "save", "../was", CASE], &["expected letters"]);
    home.says(4, &["gate", "--baseline", "was", "no_such_case"], &["nothing selected"]);
    // Four times as much work again is slower, unless the policy lets it through.
    let slower = gate(&home, &["--baseline", "was", "--plant", "4"]);
    assert_eq!(slower.code, 5, "{slower:?}");
    let row = &rows(&slower)[0];
    assert_eq!((&row["verdict"], &row["paired"]), (&"slower".into(), &true.into()), "{row}");
    assert!(1.99 < row["lo"].as_f64().unwrap() && row["launches"] == 3, "{row}");
    assert!(row["q"].as_f64().unwrap() <= 0.05, "{row}");
    let allow = "[[allow]]\ncase = \"linear/\"\nreason = \"more is done now\"\nexpires = ";
    fs::write(home.path("gate.toml"), format!("{POLICY}{allow}2999-01-01\n")).unwrap();
    let allowed = gate(&home, &["--baseline", "was", "--plant", "4"]);
    assert_eq!(allowed.code, 0, "{allowed:?}");
    assert!(rows(&allowed)[0]["reason"].as_str().unwrap().contains("more is done now"));
    fs::write(home.path("gate.toml"), format!("{POLICY}{allow}2020-01-01\n")).unwrap();
    let over = gate(&home, &["--baseline", "was", "--plant", "4"]);
    assert!(over.code == 5 && over.err.contains("was allowed until 2020-01-01"), "{over:?}");
    fs::write(home.path("gate.toml"), POLICY).unwrap();
    // The same within wide margins; with none that can be met, ambiguous.
    let same = gate_in(&MANY, &home, &["--baseline", "was"]);
    assert_eq!((same.code, &rows(&same)[0]["verdict"]), (0, &"same".into()), "{same:?}");
    fs::write(home.path("gate.toml"), POLICY.replace("margin = 0.9", "margin = 0.0000001"))
        .unwrap();
    let open = gate(&home, &["--baseline", "was"]);
    assert_eq!((open.code, &rows(&open)[0]["verdict"]), (0, &"ambiguous".into()), "{open:?}");
    assert_eq!(gate(&home, &["--baseline", "was", "--strict"]).code, 6);
    fs::write(home.path("gate.toml"), POLICY).unwrap();
    // Of wrong answers no speed is told.
    let wrong = gate(&home, &["--baseline", "was", "--plant", "ragged-tail-dropped"]);
    let row = &rows(&wrong)[0];
    assert_eq!((wrong.code, &row["verdict"]), (3, &"withheld".into()), "{wrong:?}");
    assert!(row["ratio"].is_null() && row["reason"] == "passed, is now failed", "{row}");
    home.ends(2, &["gate", "--baseline", "was", "--plant", "-1"]);
    let shown = home.karat(&["baseline", "show", "was"]);
    assert!(shown.code == 0 && shown.out.contains("its program is kept"), "{shown:?}");
    // What is exported is as good, but for the program: times are those of then. Theirs would be as far
    // off as the machine was while other tests ran, so they are written here.
    assert_eq!(home.karat(&["baseline", "export", "was", "--out", "b.jsonl"]).code, 0);
    let text = fs::read_to_string(home.path("b.jsonl")).unwrap();
    for (ns, code, verdict) in [(10.0, 5, "slower"), (1e12, 0, "faster")] {
        let then = changed(&text, |line| {
            if let Some(samples) = line["samples_ns"].as_array_mut() {
                samples.fill(ns.into());
                line["median_ns"] = ns.into();
            }
        });
        fs::write(home.path("b.jsonl"), then).unwrap();
        let apart = gate(&home, &["--baseline", "b.jsonl"]);
        let row = &rows(&apart)[0];
        let told = (apart.code, &row["verdict"], &row["paired"]);
        assert_eq!(told, (code, &verdict.into(), &false.into()), "{apart:?}");
    }
}

/// Lines of a baseline, changed one by one.
fn changed(text: &str, change: impl Fn(&mut Value)) -> String {
    let line = |line: &str| {
        let mut value: Value = serde_json::from_str(line).unwrap();
        change(&mut value);
        format!("{value}\n")
    };
    text.lines().map(line).collect()
}

/// What was right and is not, and files that are not whole: one line, the right code, nothing lost.
#[test]
fn a_baseline_that_is_damaged_or_told_otherwise_is_seen() {
    let home = home();
    let saved = save(&home, "was", &[OTHER]);
    assert_eq!(saved.code, 0, "{saved:?}");
    let text = fs::read_to_string(home.path(BASELINE)).unwrap();
    let with = |text: &str| fs::write(home.path(BASELINE), text).unwrap();
    let says = |text: &str, code, said: &[&str]| {
        with(text);
        home.says(code, &["gate", "--baseline", "was"], said);
        assert_eq!(fs::read_to_string(home.path(BASELINE)).unwrap(), text, "it is left as it is");
    };
    let bench = |value: &mut Value, key: &str, to: Value| {
        if value["kind"] == "bench" {
            value[key] = to;
        }
    };
    says(&text[..text.len() / 2], 2, &["was.jsonl:", "cut in the middle of a row"]);
    let whole_lines: Vec<_> = text.lines().collect();
    let cut = format!("{}\n", whole_lines[..whole_lines.len() - 1].join("\n"));
    says(&cut, 2, &["ends without its summary"]);
    let (first, rest) = text.split_once('\n').unwrap();
    let second = rest.lines().next().unwrap();
    let lost = text.replacen(&format!("{second}\n"), "", 1);
    says(&lost, 2, &["was.jsonl: 0 rows, its summary says 1"]);
    let twice = format!("{first}\n{second}\n{rest}");
    let once = "was.jsonl:2 as well; expected each case once";
    says(&twice, 2, &["was.jsonl:3: rms_norm/N16-D64@cpu/portable stands in", once]);
    says(&format!("{text}{text}"), 2, &["as well"]);
    let newer = text.replace("karat.result/1", "karat.result/2");
    says(
        &newer,
        2,
        &["was.jsonl:1: expected schema karat.result/1, got karat.result/2, which is newer"],
    );
    let other = text.replace("karat.result/1", "criterion");
    says(&other, 2, &["was.jsonl:1: expected schema karat.result/1, got criterion"]);
    let nan = changed(&text, |line| bench(line, "samples_ns", json!([1.0, "NaN"])));
    says(&nan, 2, &["was.jsonl:2", "samples_ns[1] is NaN; expected a number above 0"]);
    says(&text.replace("\"samples_ns\":[", "\"samples_ns\":[NaN,"), 2, &["was.jsonl:2"]);
    let elsewhere = changed(&text, |line| {
        if line["kind"] == "env" {
            line["fingerprint"] = "0123456789abcdef".into();
            line["machine"] = "an abacus".into();
        }
    });
    says(&elsewhere, 7, &["is of an abacus; this is"]);
    says(
        &changed(&text, |line| {
            line.as_object_mut().unwrap().remove("fingerprint");
        }),
        2,
        &["of which machine"],
    );
    says("", 2, &["was.jsonl: empty; expected JSON lines of a run"]);
    let none = changed(&text, |line| bench(line, "samples_ns", json!([])));
    says(&none, 2, &["was.jsonl:2", "passed, and has no samples"]);
    let unchecked = changed(&text, |line| {
        line.as_object_mut().unwrap().remove("checked");
    });
    says(&unchecked, 2, &["was.jsonl:2", "no checked"]);
    // Answers that were better.
    let found = |text: &str| {
        with(text);
        let ran = gate(&home, &["--baseline", "was", "N16-D64@"]);
        (ran.code, rows(&ran)[0].clone())
    };
    let (code, row) = found(&changed(&text, |line| bench(line, "budget_used", json!(0.001))));
    assert_eq!((code, &row["verdict"]), (3, &"withheld".into()), "{row}");
    assert!(row["reason"].as_str().unwrap().contains("of its bound, was 0.1 %"), "{row}");
    let (code, row) = found(&changed(&text, |line| bench(line, "plan", json!("tensor cores"))));
    assert!(code == 3 && row["reason"].as_str().unwrap().starts_with("fell back"), "{row}");
    let gone = changed(&text, |line| {
        if line["kind"] == "bench" {
            line["case"] = line["case"].as_str().unwrap().replace("portable", "wide").into();
        }
    });
    let (code, row) = found(&gone);
    assert_eq!((code, &row["verdict"]), (3, &"missing".into()), "{row}");
    assert!(row["reason"].as_str().unwrap().contains("no variant cpu/wide"), "{row}");
}

#[test]
fn two_programs_beside_each_other() {
    let home = home();
    let karat = env!("CARGO_BIN_EXE_karat");
    let ab_in = |turns: &[&str], more: &[&str]| {
        let ab = ["ab", karat, karat, CASE, "--policy", "gate.toml", "--format", "jsonl"];
        home.karat(&[&ab[..], turns, more].concat())
    };
    let ab = |more: &[&str]| ab_in(&FEW, more);
    let same = ab_in(&MANY, &[]);
    assert_eq!((same.code, &rows(&same)[0]["verdict"]), (0, &"same".into()), "{same:?}");
    // What A is off by itself was found on the way, and is kept.
    let floors = fs::read_to_string(home.path("target/karat/floors.json")).unwrap();
    assert!(floors.contains(CASE), "{floors}");
    let slower = ab(&["--plant", "4"]);
    assert_eq!((slower.code, &rows(&slower)[0]["verdict"]), (5, &"slower".into()), "{slower:?}");
    let wrong = ab(&["--plant", "ragged-tail-dropped"]);
    assert_eq!((wrong.code, &rows(&wrong)[0]["verdict"]), (3, &"withheld".into()), "{wrong:?}");
    fs::write(home.path("gate.toml"), POLICY.replace("margin = 0.9", "margin = 0.0000001"))
        .unwrap();
    assert_eq!(ab(&["--strict"]).code, 6);
    // A program that is no karat, a revision that is none, words that select nothing.
    home.says(9, &["ab", "/bin/true", karat, CASE], &["/bin/true"]);
    home.says(2, &["ab", "no-such-revision", karat], &["neither a revision"]);
    home.says(4, &["ab", karat, karat, "no_such_op"], &["nothing selected"]);
    home.says(2, &["ab", karat, karat, "-E", "T>"], &["expected a number"]);
    fs::write(home.path("gate.toml"), "min-effects = 1\n").unwrap();
    home.says(2, &["ab", karat, karat, "--policy", "gate.toml"], &["gate.toml:1: unknown key"]);
    // Floors that cannot be read are not thrown away.
    let place = home.path("target/karat/floors.json");
    fs::write(&place, &floors[..floors.len() / 2]).unwrap();
    home.says(2, &["ab", karat, karat, CASE], &["floors.json", "calibrate again"]);
    assert_eq!(fs::read_to_string(&place).unwrap(), floors[..floors.len() / 2]);
}

#[test]
fn floors_are_found_and_kept() {
    let home = home();
    let few = ["--quads", "8", "--launches", "4", "--format", "jsonl"];
    let ran = home.karat(&[&["calibrate", CASE], &few[..]].concat());
    assert_eq!(ran.code, 0, "{ran:?}");
    let lines = ran.all_lines();
    let row = lines.iter().find(|line| line["kind"] == "calibrate").unwrap();
    assert!(0.0 <= row["floor"].as_f64().unwrap() && row["launches"] == 4, "{row}");
    let kept = fs::read_to_string(home.path("target/karat/floors.json")).unwrap();
    let kept: Value = serde_json::from_str(&kept).unwrap();
    let fingerprint = lines[0]["fingerprint"].as_str().unwrap();
    let launches = kept["machines"][fingerprint]["cases"][CASE]["launches"].as_array().unwrap();
    assert_eq!(launches.len(), 4);
}

/// Two trials are too few to say how often, and enough to see that all of it runs.
#[test]
fn the_selftest_runs_and_ends_in_its_line() {
    let home = home();
    let ran =
        home.karat(&["gate", "--selftest", "--trials", "1", "--quads", "8", "--format", "jsonl"]);
    assert!([0, 3].contains(&ran.code), "{ran:?}");
    let lines = ran.lines();
    let last = lines.last().unwrap();
    assert_eq!(last["kind"], "gate_selftest");
    assert_eq!((&last["planted"], &last["aa"]), (&1.into(), &1.into()));
    let fine = last["fired"] == 1 && last["aa_fired"] == 0 && last["equal_after_quads"].is_number();
    assert_eq!(ran.code == 0, fine, "{last}");
}

/// Results of a machine, one case each.
fn results(ns: &[f64]) -> String {
    let env = json!({"schema": "karat.result/1", "kind": "env", "fingerprint": "f", "machine": "m", "time": "then"});
    let row = json!({"schema": "karat.result/1", "kind": "bench", "case": OTHER, "checked": "passed",
        "samples_ns": ns, "median_ns": ns[ns.len() / 2]});
    let summary = json!({"schema": "karat.result/1", "kind": "summary", "rows": 1});
    format!("{env}\n{row}\n{summary}\n")
}

#[test]
fn history_tells_where_times_change() {
    let home = home();
    home.says(4, &["history", "changepoints"], &["no history"]);
    for (i, ns) in [100.0, 101.0, 99.0, 100.5, 120.0, 121.0, 119.5, 120.5].iter().enumerate() {
        fs::write(home.path("r.jsonl"), results(&[ns - 1.0, *ns, ns + 1.0])).unwrap();
        let rev = format!("r{i}");
        assert_eq!(home.karat(&["history", "add", "r.jsonl", "--rev", &rev]).code, 0);
    }
    let ran = home.karat(&["history", "changepoints", "--level", "0.05", "--format", "jsonl"]);
    let lines = ran.lines();
    assert_eq!((ran.code, lines.len()), (0, 2), "{ran:?}");
    let change = &lines[0];
    assert_eq!(
        (&change["kind"], &change["rev"], &change["after_rev"]),
        (&"change_point".into(), &"r4".into(), &"r3".into())
    );
    let ratio = change["ratio"].as_f64().unwrap();
    assert!((1.19..1.21).contains(&ratio), "{change}");
    home.says(2, &["history", "add", "r.jsonl", "--rev", "again"], &["was added before"]);
    home.says(2, &["history", "add", "r.jsonl"], &["--rev"]);
    fs::write(home.path("r.jsonl"), "{\"schema\": \"karat.res").unwrap();
    home.says(
        2,
        &["history", "add", "r.jsonl", "--rev", "x"],
        &["r.jsonl:1", "cut in the middle of a row"],
    );
    // A history that is not whole is neither read nor added to.
    let place = home.path("target/karat/history.jsonl");
    let whole = fs::read_to_string(&place).unwrap();
    let cut = &whole[..whole.len() - 9];
    fs::write(&place, cut).unwrap();
    fs::write(home.path("r.jsonl"), results(&[7.0])).unwrap();
    for args in [&["history", "add", "r.jsonl", "--rev", "x"][..], &["history", "changepoints"]] {
        home.says(2, args, &["history.jsonl:8", "cut in the middle of a row"]);
        assert_eq!(fs::read_to_string(&place).unwrap(), cut);
    }
    // Nor is one with other rows in it, or without a time.
    for (text, said) in [
        (format!("{whole}{}", results(&[7.0])), "history.jsonl:9: expected kind history"),
        (whole.replacen("\"median_ns\":100.0", "\"median_ns\":0.0", 1), "median_ns[0] is 0"),
    ] {
        fs::write(&place, text).unwrap();
        home.says(2, &["history", "changepoints"], &[said]);
    }
}

/// A repository whose program stands in for karat: it is built in a second, and hands over to the one that
/// is tested.
struct Repository(Home);

impl Repository {
    fn new() -> Repository {
        let repository = Repository(home());
        repository.git(&["init", "--quiet"]);
        let write = |name: &str, text: &str| {
            let path = repository.0.path(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write(".gitignore", "target\n");
        write("Cargo.toml", "[workspace]\nresolver = \"3\"\nmembers = [\"ci\"]\n");
        write("Cargo.lock", "version = 4\n\n[[package]]\nname = \"ci\"\nversion = \"0.0.0\"\n");
        write(
            "ci/Cargo.toml",
            "[package]\nname = \"ci\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\n\
             [[bin]]\nname = \"karat\"\npath = \"main.rs\"\n",
        );
        repository
    }

    fn git(&self, args: &[&str]) {
        let who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"];
        let ran = Command::new("git").args(who).args(args).current_dir(self.0.path(".")).output();
        let ran = ran.unwrap();
        assert!(ran.status.success(), "{args:?}: {ran:?}");
    }

    /// A revision whose program does this.
    fn commit(&self, main: &str) {
        fs::write(self.0.path("ci/main.rs"), format!("fn main() {{ {main} }}\n")).unwrap();
        self.git(&["add", "-A"]);
        self.git(&["commit", "--quiet", "-m", "next"]);
    }
}

#[test]
fn revisions_are_built_beside_the_repository_and_kept() {
    let repository = Repository::new();
    let hands_over = |first: &str| {
        let karat = env!("CARGO_BIN_EXE_karat");
        format!(
            "{first} use std::os::unix::process::CommandExt; let all = std::env::args_os().skip(1); \
             let e = std::process::Command::new({karat:?}).args(all).exec(); panic!(\"{{e}}\");"
        )
    };
    repository.commit(&hands_over(""));
    let old = "if std::env::args().nth(1).as_deref() == Some(\"turns\") { std::process::exit(2) }";
    repository.commit(&hands_over(old));
    repository.commit(&hands_over("let _ = 2;"));
    repository.commit("this does not compile");
    let home = &repository.0;
    let args = |a, b| {
        let ab = ["ab", a, b, CASE, "--policy", "gate.toml", "--profile", "dev"];
        [&ab[..], &FEW, &["--quiet", "--format", "jsonl"]].concat()
    };
    fs::write(home.path("dirty"), "what is not committed is nobody's business").unwrap();
    let ran = home.karat(&args("HEAD~3", "HEAD~1"));
    assert_eq!((ran.code, &rows(&ran)[0]["verdict"]), (0, &"same".into()), "{ran:?}");
    assert_eq!(home.names("target/karat/ab/bin").len(), 2);
    assert!(home.path("dirty").exists());
    // From before there were turns; one that cannot be built; one that is not there.
    home.says(9, &args("HEAD~2", "HEAD~1"), &["does not know `karat turns`"]);
    home.says(2, &args("HEAD~3", "HEAD"), &["HEAD (", "it cannot be built"]);
    home.says(2, &args("HEAD~9", "HEAD~1"), &["HEAD~9", "neither a revision"]);
    // What was built before is not built again: there is nothing left to build it from.
    fs::remove_dir_all(home.path("target/karat/ab/tree")).unwrap();
    fs::remove_dir_all(home.path("target/karat/ab/target")).unwrap();
    assert_eq!(home.karat(&args("HEAD~3", "HEAD~1")).code, 0);
    assert!(!home.path("target/karat/ab/tree").exists());
}

/// Neither cargo nor what it started goes on.
#[test]
fn a_build_is_interrupted() {
    let repository = Repository::new();
    let home = &repository.0;
    let build = "fn main() { std::fs::write(\"part\", std::process::id().to_string()).unwrap(); \
                 std::fs::rename(\"part\", \"started\").unwrap(); \
                 std::thread::sleep(std::time::Duration::from_secs(300)); }";
    fs::write(home.path("ci/build.rs"), build).unwrap();
    repository.commit("");
    let ab = ["ab", "HEAD", env!("CARGO_BIN_EXE_karat"), CASE, "--quiet"];
    let mut karat = home.command(&ab).stderr(Stdio::null()).spawn().unwrap();
    let started = home.path("target/karat/ab/tree/ci/started");
    while !started.exists() {
        assert!(karat.try_wait().unwrap().is_none(), "it should be building");
        thread::sleep(Duration::from_millis(50));
    }
    let sent = Command::new("kill").args(["-INT", &karat.id().to_string()]).status().unwrap();
    assert!(sent.success());
    assert_eq!(karat.wait().unwrap().code(), Some(130));
    // What has ended has no words left, though nobody may have waited for it yet.
    let script = fs::read_to_string(&started).unwrap();
    let goes_on =
        || fs::read(format!("/proc/{script}/cmdline")).is_ok_and(|words| !words.is_empty());
    for _ in 0..100 {
        if !goes_on() {
            break;
        }
        thread::sleep(Duration::from_millis(50));
    }
    assert!(!goes_on(), "the build script goes on");
    assert!(!home.path("target/karat/ab/bin").exists());
}
