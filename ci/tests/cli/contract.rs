//! Streams, environment, verdict, and files that nobody meant.

use std::{
    ffi::OsStr,
    fs,
    io::{Read, Write},
    os::unix::{ffi::OsStrExt, fs::symlink},
    process::{Command, Stdio},
};

use super::home::Home;

#[test]
fn answers_go_to_stdout_and_everything_else_to_stderr() {
    let home = Home::with(&["ops", "decode"]);
    home.tokens("t", &[&[1, 2]], None);
    for args in [
        &["list", "l2_norm"][..],
        &["check", "l2_norm"],
        &["golden", "status"],
        &["golden", "verify", "decode"],
        &["doctor"],
        &["inspect", "--model", "synthetic:tiny"],
        &["explain", "3"],
        &["schema"],
        &["completions", "bash"],
        &["logits", "--model", "synthetic:tiny", "--tokens", "t", "--out", "o"],
        &["generate", "--model", "synthetic:tiny", "--tokens", "t", "--max-new", "2"],
        &["compare", "o", "o"],
        &["synth", "--preset", "tiny", "--out", "m"],
    ] {
        let quiet = home.karat(&[args, &["-q"]].concat());
        assert_eq!((quiet.code, quiet.err.as_str()), (0, ""), "{args:?}: {quiet:?}");
        assert!(!quiet.out.is_empty(), "{args:?}");
        let args = if args[0] == "synth" { [args, &["--force"]].concat() } else { args.to_vec() };
        let json = home.karat(&[&args[..], &["--format", "jsonl"]].concat());
        assert_eq!(json.code, 0, "{args:?}: {json:?}");
        assert!(!json.lines().is_empty(), "{args:?}");
    }
    for args in
        [&["list", "nope"][..], &["logits", "--model", "nope", "--tokens", "t", "--out", "x"]]
    {
        let ran = home.karat(args);
        assert_eq!(ran.out, "", "{args:?}");
        assert_eq!(ran.err.lines().count(), 1, "{args:?}: {ran:?}");
    }
}

#[test]
fn flags_go_before_the_environment_before_the_defaults() {
    let home = Home::new();
    home.tokens("t", &[&[1, 2]], None);
    let run = |variable: &str, value: &str, args: &[&str]| {
        home.run(home.command(args).env(variable, value))
    };
    let list = ["list", "rms_norm/"];
    let smoke = home.karat(&list).out;
    let ci = run("KARAT_SET", "ci", &list).out;
    assert!(smoke.lines().count() < ci.lines().count());
    assert_eq!(run("KARAT_SET", "ci", &["list", "rms_norm/", "--set", "smoke"]).out, smoke);
    assert_eq!(run("KARAT_SET", "all", &list).code, 2);
    assert!(run("KARAT_FORMAT", "jsonl", &list).out.starts_with('{'));
    assert_eq!(
        run("KARAT_FORMAT", "jsonl", &["list", "rms_norm/", "--format", "human"]).out,
        smoke
    );
    for value in ["1", "0", "", "yes"] {
        assert_eq!(run("KARAT_NO_PROGRESS", value, &list).out, smoke, "{value:?}");
    }
    let logits = ["logits", "--model", "synthetic:tiny", "--tokens", "t", "--out", "o"];
    assert_eq!(run("KARAT_ENGINE", "gpu", &logits).code, 2);
    assert_eq!(
        run("KARAT_ENGINE", "gpu", &[&logits[..], &["--engine", "reference"]].concat()).code,
        0
    );
    // The verdict goes where it is wanted, also when the rest cannot be read.
    for (args, code) in [(&list[..], 0), (&["lisst"][..], 2), (&["list", "--sett", "ci"][..], 2)] {
        let ends = |command: &mut Command| command.output().unwrap().status.code();
        assert_eq!(ends(home.command(args).env("KARAT_VERDICT", "env.json")), Some(code));
        assert_eq!(
            ends(
                home.command(args)
                    .env("KARAT_VERDICT", "no.json")
                    .args(["--verdict", "a/flag.json"])
            ),
            Some(code)
        );
        for name in ["env.json", "a/flag.json"] {
            let text = fs::read_to_string(home.path(name)).unwrap();
            assert!(text.contains(&format!("\"exit\": {code}")), "{args:?}: {text}");
            fs::remove_file(home.path(name)).unwrap();
        }
        assert!(!home.path("no.json").exists());
    }
    // Help and version are no runs.
    fs::remove_dir_all(home.path("target")).unwrap();
    for args in [["--help"], ["--version"]] {
        assert_eq!(home.karat(&args).code, 0);
    }
    assert!(!home.path("target").exists());
    // A verdict that cannot be written is a remark, not an end.
    let ran = home.karat(&["list", "l2_norm", "--verdict", "t/verdict.json"]);
    assert!(ran.code == 0 && ran.err.contains("t/verdict.json"), "{ran:?}");
}

/// `karat check | head -1` must not turn green, and a full disk behind stdout is told.
#[test]
fn an_answer_that_nobody_reads_changes_no_exit_code() {
    let home = Home::new();
    let mut child = home
        .command(&["check", "rms_norm/", "--plant", "nan"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let mut err = String::new();
    child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(3), "{err}");
    assert!(!err.contains("panicked"), "{err}");
    if let Ok(full) = fs::OpenOptions::new().write(true).open("/dev/full") {
        let output = home.command(&["list", "rms_norm/"]).stdout(full).output().unwrap();
        assert_eq!(output.status.code(), Some(9));
        assert!(String::from_utf8_lossy(&output.stderr).contains("standard output: No space left"));
    }
}

#[test]
fn strange_files_are_refused_in_one_line() {
    let home = Home::new();
    home.tokens("t", &[&[1, 2]], None);
    home.ends(0, &["synth", "--preset", "tiny", "--out", "m"]);
    let pipe = |name: &str| {
        assert!(Command::new("mkfifo").arg(home.path(name)).status().unwrap().success());
    };
    let sparse = |name: &str| fs::File::create(home.path(name)).unwrap().set_len(1 << 40).unwrap();
    let header = |name: &str, length: u64, json: &[u8]| {
        let mut file = fs::File::create(home.path(name)).unwrap();
        file.write_all(&length.to_le_bytes()).unwrap();
        file.write_all(json).unwrap();
    };
    fs::create_dir(home.path("folder")).unwrap();
    pipe("pipe");
    sparse("sparse");
    symlink("loop", home.path("loop")).unwrap();
    fs::write(home.path("nul"), [0; 64]).unwrap();
    fs::write(home.path("void"), "").unwrap();
    fs::write(home.path("bom"), "\u{feff}{}").unwrap();
    fs::write(home.path("latin"), b"{\"\xe9\": 1}").unwrap();
    fs::write(home.path("deep"), "[".repeat(1 << 20)).unwrap();
    header("huge", u64::MAX, b"{}");
    let nested = [b"{\"a\":".repeat(5000), b"1".to_vec(), b"}".repeat(5000)].concat();
    header("nested", nested.len() as u64, &nested);
    let zero = br#"{"input_ids":{"dtype":"I64","shape":[4611686018427387904,4611686018427387904,0],"data_offsets":[0,0]}}"#;
    header("zero", zero.len() as u64, zero);
    let files = [
        "folder",
        "pipe",
        "sparse",
        "loop",
        "nul",
        "void",
        "bom",
        "latin",
        "deep",
        "huge",
        "nested",
        "zero",
        "/dev/zero",
    ];
    let one_line = |args: &[&str], code: i32| {
        let err = home.ends(code, args);
        assert_eq!(err.lines().count(), 1, "{args:?}: {err}");
    };
    for file in files {
        one_line(&["logits", "--model", "synthetic:tiny", "--tokens", file, "--out", "o"], 2);
        one_line(&["compare", file, "t"], 2);
        one_line(&["synth", "--config", file, "--out", "x"], 2);
        one_line(&["inspect", "--model", file], 2);
        for part in ["config.json", "model.safetensors", "model.safetensors.index.json"] {
            let place = home.path("m").join(part);
            let kept = home.path("kept");
            let there = fs::rename(&place, &kept).is_ok();
            symlink(if file.starts_with('/') { file.into() } else { home.path(file) }, &place)
                .unwrap();
            one_line(&["inspect", "--model", "m"], 2);
            fs::remove_file(&place).unwrap();
            if there {
                fs::rename(&kept, &place).unwrap();
            }
        }
        fs::create_dir_all(home.path("rec")).unwrap();
        let place = home.path("rec/manifest.json");
        symlink(if file.starts_with('/') { file.into() } else { home.path(file) }, &place).unwrap();
        one_line(&["golden", "verify", "./rec"], 8);
        one_line(&["compare", "t", "--golden", "rec"], 2);
        fs::remove_file(&place).unwrap();
    }
    home.ends(0, &["inspect", "--model", "m", "-q"]);
}

#[test]
fn names_that_are_no_utf8_are_names() {
    let home = Home::new();
    home.tokens("t", &[&[1, 2]], None);
    let odd = OsStr::from_bytes(b"o\xff\xfe.st");
    for format in ["human", "jsonl"] {
        let mut command = home.command(&[
            "logits",
            "--model",
            "synthetic:tiny",
            "--tokens",
            "t",
            "--format",
            format,
            "--out",
        ]);
        assert_eq!(home.run(command.arg(odd)).code, 0);
        let mut command =
            home.command(&["synth", "--preset", "tiny", "--force", "--format", format, "--out"]);
        assert_eq!(home.run(command.arg(OsStr::from_bytes(b"m\xff"))).code, 0);
    }
    assert!(fs::metadata(home.path("").join(odd)).is_ok());
    assert_eq!(home.run(home.command(&["list"]).arg(odd)).code, 2);
    assert_eq!(home.run(home.command(&["inspect", "--model"]).arg(odd)).code, 2);
}
