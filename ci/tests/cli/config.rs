//! `karat.toml`, below the environment and above what is built in.

use std::fs;

use serde_json::Value;

use super::home::Home;

/// Value and origin of a setting, as doctor shows it.
fn setting(home: &Home, key: &str, env: &[(&str, &str)], args: &[&str]) -> (String, String) {
    let args = [&["doctor", "--format", "jsonl"][..], args].concat();
    let ran = home.run(home.command(&args).envs(env.iter().copied()));
    assert_eq!(ran.code, 0, "{ran:?}");
    let line = ran.lines().remove(0);
    let found = line["settings"].as_array().unwrap().iter().find(|one| one["key"] == key).unwrap();
    let text = |name: &str| found[name].as_str().unwrap().to_owned();
    (text("value"), text("from"))
}

#[test]
fn each_layer_wins_over_the_one_below() {
    let home = Home::new();
    home.tokens("t", &[&[1, 2]], None);
    let list = ["list", "rms_norm/"];
    let smoke = home.karat(&list).out;
    let ci = home.karat(&["list", "rms_norm/", "--set", "ci"]).out;
    assert_ne!(smoke, ci);
    assert_eq!(setting(&home, "set", &[], &[]), ("smoke".to_owned(), "built-in".to_owned()));
    fs::write(
        home.path("karat.toml"),
        "# here\nset = \"ci\"\nmodel = \"synthetic:tiny\"\nthreads = 1\n\nfilter = [\"l2_norm\", \"reference\"]\n",
    )
    .unwrap();
    let place = |line: usize| {
        format!("{}:{line}", fs::canonicalize(home.path("karat.toml")).unwrap().display())
    };
    let from = |key: &str, env: &[(&str, &str)], args: &[&str]| {
        let (value, from) = setting(&home, key, env, args);
        let file = from.rsplit_once(':').filter(|(path, _)| path.ends_with("karat.toml"));
        let from = file.map_or(from.clone(), |(path, line)| {
            format!("{}:{line}", fs::canonicalize(path).unwrap().display())
        });
        (value, from)
    };
    assert_eq!(home.karat(&list).out, ci);
    assert_eq!(from("set", &[], &[]), ("ci".to_owned(), place(2)));
    let environment = [("KARAT_SET", "smoke")];
    assert_eq!(home.run(home.command(&list).envs(environment)).out, smoke);
    assert_eq!(
        from("set", &environment, &[]),
        ("smoke".to_owned(), "environment KARAT_SET".to_owned())
    );
    let flag =
        home.command(&["list", "rms_norm/", "--set", "ci"]).env("KARAT_SET", "smoke").output();
    assert_eq!(String::from_utf8(flag.unwrap().stdout).unwrap(), ci);
    // A model need not be typed any more, a filter still can.
    home.ends(0, &["logits", "--tokens", "t", "--out", "out"]);
    let filtered = home.karat(&["list"]).out;
    assert!(
        filtered.lines().all(|line| line.contains("l2_norm") && line.contains("reference")),
        "{filtered}"
    );
    assert_eq!(from("filter", &[], &[]).0, "l2_norm reference");
    // Words of the environment, and flags that every command has.
    let words = home.run(home.command(&["list"]).env("KARAT_FILTER", "rope chunk"));
    assert_eq!(words.code, 4, "no such way to compute it: {words:?}");
    assert_eq!(from("threads", &[], &[]), ("1".to_owned(), place(4)));
    assert_eq!(
        from("threads", &[], &["--threads", "2"]),
        ("2".to_owned(), "flag --threads".to_owned())
    );
    // That of the folder above, if there is none here.
    fs::create_dir(home.path("below")).unwrap();
    let below = home.command(&list).current_dir(home.path("below")).output().unwrap();
    assert_eq!(String::from_utf8(below.stdout).unwrap(), ci);
}

#[test]
fn a_wrong_file_is_refused_by_line() {
    let home = Home::new();
    for (text, said) in [
        ("set = \"ci\"\n\nsett = 1\n", "karat.toml:3: unknown key `sett`, expected one of `model`"),
        ("threads = \"two\"\n", "karat.toml:1: invalid type: string \"two\""),
        ("# one\nthreads = 0\n", "karat.toml:2: threads: expected at least 1"),
        ("set = \"all\"\n", "karat.toml:1: set \"all\": expected smoke, ci, nightly"),
        ("\nformat = \"xml\"\n", "karat.toml:2: format \"xml\": expected human, jsonl, md"),
        ("seeds = 0\n", "karat.toml:1: seeds: expected 1 to 1000000"),
        ("memory-gib = -1.0\n", "karat.toml:1: memory-gib: expected a number above 0"),
        ("set = \n", "karat.toml:1: "),
        ("set = \"ci\"\nset = \"ci\"\n", "karat.toml:2: duplicate key"),
        ("[set]\nx = 1\n", "karat.toml:1: invalid type: map"),
    ] {
        fs::write(home.path("karat.toml"), text).unwrap();
        let ran = home.karat(&["list"]);
        assert_eq!((ran.code, ran.err.lines().count()), (2, 1), "{text:?}: {ran:?}");
        assert!(ran.err.contains(said), "{text:?}: {}", ran.err);
    }
    // The verdict goes where the file wants it, as far as the file can be read.
    fs::write(home.path("karat.toml"), "verdict = \"elsewhere.json\"\n").unwrap();
    let ended = home.command(&["list", "--no-such-flag"]).output().unwrap();
    assert_eq!(ended.status.code(), Some(2));
    let verdict: Value =
        serde_json::from_slice(&fs::read(home.path("elsewhere.json")).unwrap()).unwrap();
    assert_eq!(verdict["exit"], 2);
    fs::remove_file(home.path("karat.toml")).unwrap();
    fs::create_dir(home.path("karat.toml")).unwrap();
    home.says(2, &["list"], &["karat.toml: is a directory"]);
}
