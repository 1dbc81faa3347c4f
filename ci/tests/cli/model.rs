//! `logits`, `generate`, `compare`, `inspect`, `synth`.

use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt, symlink},
    process::{Command, Stdio},
    time::Duration,
};

use safetensors::Dtype;
use serde_json::Value;

use super::home::{Home, tensors};

const TINY: &str = "synthetic:tiny";

fn logits<'a>(tokens: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let model = if more.contains(&"--model") { &[][..] } else { &["--model", TINY][..] };
    [&["logits", "--tokens", tokens, "--out", "out"][..], model, more].concat()
}

/// What a model does not divide into is refused before any GPU is looked for, with what would fit.
#[test]
fn gpus_are_those_that_a_model_divides_into() {
    let home = Home::new();
    home.tokens("t", &[&[1, 2, 3]], None);
    let on = |gpus: &'static str, engine: &'static str| {
        logits("t", &["--engine", engine, "--gpus", gpus])
    };
    home.says(
        2,
        &on("3", "cuda"),
        &["gpus 3", "linear_num_key_heads 2, expected a multiple of 3; 1, 2 fit"],
    );
    home.says(2, &on("2", "cpu"), &["--gpus 2: expected --engine cuda, got \"cpu\""]);
    home.says(
        2,
        &["check", "--gpus", "2"],
        &["--gpus 2: expected --engine cuda, got a command without one"],
    );
    home.ends(2, &on("0", "cuda"));
    if !matches!(benches::several(), Some((2.., Ok(_)))) {
        home.ends(9, &on("2", "cuda"));
    }
    // Of all recordings those that do not divide are left out, and one that is asked for by name is refused.
    let all = ["golden", "verify", "--engine", "cuda", "--gpus", "2"];
    let ran = home.karat(&all);
    assert!(ran.out.contains("skipped: fp8-checkpoint: 2 shares: rows of"), "{ran:?}");
    home.says(2, &[&all[..], &["fp8-checkpoint"]].concat(), &["expected a multiple of the 128"]);
    assert!(!home.names("").contains(&"out".to_owned()));
}

#[test]
fn prompts_that_mean_nothing_are_refused_and_leave_nothing() {
    let home = Home::new();
    home.tokens("t", &[&[1, 2, 3, 4, 5]], None);
    home.tokens("empty", &[&[]], None);
    home.tokens("none", &[], None);
    home.tokens("large", &[&[1, 256]], None);
    home.tokens("negative", &[&[1, -3]], None);
    home.tokens("right", &[&[1, 2, 3]], Some(&[&[1, 1, 0]]));
    home.tokens("hole", &[&[1, 2, 3]], Some(&[&[1, 0, 1]]));
    home.tokens("masked", &[&[1, 2, 3]], Some(&[&[0, 0, 0]]));
    home.tokens("two", &[&[1, 2, 3]], Some(&[&[0, 2, 1]]));
    home.tokens("long", &[&vec![1; 4097]], None);
    home.tokens("fits", &[&vec![1; 4090]], None);
    let left = home.names("");
    for (tokens, more, said) in [
        ("empty", &[][..], "an empty prompt, shape [1, 0]"),
        ("none", &[], "an empty prompt, shape [0, 0]"),
        ("large", &[], "row 0, column 1: expected an id below vocab_size 256, got 256"),
        ("negative", &[], "row 0, column 1: id -3"),
        ("right", &[], "row 0: expected zeros, then at least one 1 (left padding)"),
        ("hole", &[], "left padding"),
        ("masked", &[], "left padding"),
        ("two", &[], "left padding"),
        ("long", &[], "beyond the context of 4096 (max_position_embeddings; no YaRN)"),
        ("fits", &["--decode", "7"], "4090 tokens and 7 more are beyond the context"),
        ("t", &["--decode", "18446744073709551615"], "more are beyond the context"),
        ("t", &["--split", "2,2"], "pieces above 0 that sum to 5, got [2, 2]"),
        ("t", &["--split", "5,0"], "pieces above 0"),
        ("t", &["--split", "18446744073709551615,6"], "pieces above 0"),
        ("t", &["--engine", "gpu"], "expected reference"),
        ("t", &["--number", "f16"], "expected f32, f64 or bf16"),
        ("t", &["--model", "synthetic:huge"], "expected tiny, ragged, heads, slice or official"),
        ("t", &["--model", "synthetic:tiny,layers=0"], "expected 1 to 4096"),
        ("t", &["--model", "synthetic:tiny,experts=99999999999"], "expected 3 to 65536"),
        ("t", &["--model", "nowhere"], "nowhere/config.json"),
        ("nowhere", &[], "nowhere: No such file"),
        (".", &[], "is a directory"),
    ] {
        let err = home.ends(2, &logits(tokens, more));
        assert!(err.contains(said), "{tokens} {more:?}: expected {said:?} in {err:?}");
        assert_eq!(home.names("").into_iter().filter(|n| n != "target").collect::<Vec<_>>(), left);
    }
}

#[test]
fn logits_hold_what_was_asked_for() {
    let home = Home::new();
    home.tokens("t", &[&[1, 2, 3, 4, 5], &[0, 0, 7, 8, 9]], Some(&[&[1; 5], &[0, 0, 1, 1, 1]]));
    home.ends(0, &logits("t", &["--taps", "hidden", "--decode", "3", "--mtp", "--split", "1,3,1"]));
    let out = tensors(&home.path("out"));
    let shapes: Vec<_> =
        out.iter().map(|(name, (kind, shape, _))| (name.as_str(), *kind, shape.clone())).collect();
    let hidden = |l| {
        (
            ["hidden.0", "hidden.1", "hidden.2", "hidden.3", "hidden.4"][l],
            Dtype::F32,
            vec![2, 5, 64],
        )
    };
    let mut want = vec![("generated", Dtype::I64, vec![2, 3])];
    want.extend((0..5).map(hidden));
    want.push(("logits", Dtype::F32, vec![2, 5, 256]));
    want.push(("mtp_logits", Dtype::F32, vec![2, 4, 256]));
    want.push(("step_logits", Dtype::F32, vec![2, 4, 256]));
    assert_eq!(shapes, want);
    // Rows at padding are zeros, the next one is not.
    let row = |at: usize| &out["logits"].2[at * 1024..(at + 1) * 1024];
    assert!(row(5).iter().chain(row(6)).all(|&b| b == 0));
    assert!(row(7).iter().any(|&b| b != 0));
    // Pieces change nothing that matters.
    home.ends(0, &["logits", "--model", TINY, "--tokens", "t", "--out", "whole"]);
    home.ends(0, &["compare", "out", "whole"]);
    // One object for programs, on one line.
    let ran = home.karat(&logits("t", &["--format", "jsonl"]));
    assert_eq!(ran.lines().len(), 1);
    assert_eq!(ran.lines()[0]["kind"], "logits");
    assert_eq!(ran.err, "");
}

#[test]
fn an_output_is_whole_or_not_there() {
    let home = Home::new();
    home.tokens("t", &[&[1, 2]], None);
    fs::write(home.path("out"), "before").unwrap();
    fs::hard_link(home.path("out"), home.path("kept")).unwrap();
    home.ends(0, &logits("t", &[]));
    assert_eq!(fs::read(home.path("kept")).unwrap(), b"before", "renamed over, not written into");
    assert!(tensors(&home.path("out")).contains_key("logits"));
    assert_eq!(home.names(""), ["kept", "out", "t", "target"]);
    // A link is followed and stays.
    fs::create_dir(home.path("else")).unwrap();
    fs::write(home.path("else/where"), "").unwrap();
    fs::remove_file(home.path("out")).unwrap();
    symlink("else/where", home.path("out")).unwrap();
    home.ends(0, &logits("t", &[]));
    assert!(home.path("out").is_symlink());
    assert!(tensors(&home.path("else/where")).contains_key("logits"));
    assert_eq!(home.names("else"), ["where"]);
    // A device is written to, and is still one afterwards. The link keeps a mistake inside the folder.
    fs::remove_file(home.path("out")).unwrap();
    if fs::metadata("/dev/full").is_ok_and(|meta| meta.file_type().is_char_device()) {
        symlink("/dev/full", home.path("out")).unwrap();
        home.says(9, &logits("t", &[]), &["No space left on device"]);
        assert!(fs::metadata(home.path("out")).unwrap().file_type().is_char_device());
        fs::remove_file(home.path("out")).unwrap();
    }
    // Places that cannot be written to.
    fs::create_dir(home.path("out")).unwrap();
    home.says(9, &logits("t", &[]), &["out: is a directory"]);
    fs::remove_dir(home.path("out")).unwrap();
    home.says(9, &["logits", "--model", TINY, "--tokens", "t", "--out", "t/out"], &["t/out"]);
    // A disk that is full, as a limit on the size of files: nothing is left of the attempt.
    let mut full = Command::new("sh");
    full.args(["-c", "trap '' XFSZ; ulimit -f 1; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_karat")]);
    full.args(logits("t", &[])).current_dir(home.path("")).stdin(Stdio::null());
    let ran = home.run(&mut full);
    assert_eq!(ran.code, 9, "{ran:?}");
    assert_eq!(home.names(""), ["else", "kept", "t", "target"]);
}

/// Ctrl-C in the middle of a model that takes minutes.
#[test]
fn an_interrupt_leaves_nothing_behind() {
    let home = Home::new();
    home.tokens("t", &[&[1, 2, 3, 4, 5, 6, 7, 8]], None);
    let mut child = home
        .command(&logits("t", &["--model", "synthetic:slice"]))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    assert!(child.try_wait().unwrap().is_none(), "it should still be computing");
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(home.names(""), ["t", "target"]);
    let text = fs::read_to_string(home.path("target/karat/verdict.json")).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap()["exit"], 130);
    // A checkpoint half written is no checkpoint.
    let mut child = home
        .command(&["synth", "--preset", "slice", "--out", "m"])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(500));
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(home.names(""), ["t", "target"]);
}

#[test]
fn weights_that_are_no_numbers_are_named() {
    let home = Home::new();
    home.tokens("t", &[&[1, 2, 3]], None);
    let fresh = || {
        home.ends(0, &["synth", "--preset", "tiny", "--dtype", "f32", "--out", "m", "--force"]);
    };
    let poke = |tensor: &str, index: usize, value: f32| {
        home.poke("m/model.safetensors", tensor, 4 * index, &value.to_le_bytes());
    };
    let model = &["--model", "m"][..];
    let generate = ["generate", "--model", "m", "--tokens", "t", "--max-new", "4"];
    fresh();
    poke("model.layers.1.linear_attn.dt_bias", 2, f32::NAN);
    let named = "tensor model.layers.1.linear_attn.dt_bias: NaN at element 2";
    home.says(2, &logits("t", model), &[named]);
    home.says(2, &generate, &[named]);
    home.says(2, &["inspect", "--model", "m", "--scan"], &[named]);
    assert!(!home.path("out").exists());
    // Only the head's own answer.
    fresh();
    poke("mtp.fc.weight", 5, f32::INFINITY);
    home.ends(0, &logits("t", model));
    home.says(
        2,
        &logits("t", &["--model", "m", "--mtp"]),
        &["tensor mtp.fc.weight: inf at element 5"],
    );
    // Finite weights, infinite answers.
    fresh();
    for index in 0..64 {
        poke("model.norm.weight", index, f32::MAX);
    }
    home.says(3, &logits("t", model), &["are not finite, though every weight is"]);
    home.says(3, &generate, &["are not finite, though every weight is"]);
    fresh();
    home.ends(0, &["inspect", "--model", "m", "--scan"]);
}

#[test]
fn the_official_model_is_counted() {
    let home = Home::new();
    let lines =
        home.karat(&["inspect", "--model", "synthetic:official", "--format", "jsonl"]).lines();
    let [answer] = &lines[..] else { panic!("{lines:?}") };
    for (key, want) in [
        ("parameters_total", 81_324_862_720_u64),
        ("parameters_main", 79_674_391_296),
        ("parameters_mtp", 1_650_471_424),
        ("active_without_embeddings", 3_252_599_552),
        ("active_with_head", 3_563_764_480),
        ("tensors", 75_944),
        ("kv_bytes_per_token", 24_576),
    ] {
        assert_eq!(answer[key], want, "{key}");
    }
    home.ends(
        0,
        &["inspect", "--model", "synthetic:official", "--context", "18446744073709551615"],
    );
    home.says(
        2,
        &["inspect", "--model", TINY, "--bandwidth", "nan"],
        &["expected a number above 0"],
    );
    home.says(2, &["inspect", "--model", TINY, "--flops", "0"], &["expected a number above 0"]);
}

#[test]
fn drafts_change_no_token() {
    let home = Home::new();
    home.tokens("t", &[&[1, 2, 3, 4]], None);
    home.tokens("rows", &[&[1], &[2]], None);
    let run = |more: &[&str]| {
        let base = [
            "generate",
            "--model",
            TINY,
            "--tokens",
            "t",
            "--max-new",
            "12",
            "--format",
            "jsonl",
            "--ignore-eos",
        ];
        let ran = home.karat(&[&base[..], more].concat());
        assert_eq!(ran.code, 0, "{ran:?}");
        let lines = ran.lines();
        let [line] = &lines[..] else { panic!("{ran:?}") };
        (line["generated"].clone(), line["text"].clone())
    };
    let plain = run(&["--greedy"]);
    assert_eq!(plain.0.as_array().unwrap().len(), 12);
    for k in ["1", "3", "64"] {
        assert_eq!(run(&["--speculate", k]), plain);
    }
    assert_eq!(
        run(&["--temperature", "1", "--seed", "3"]),
        run(&["--temperature", "1", "--seed", "3"])
    );
    let none =
        ["generate", "--model", TINY, "--tokens", "t", "--max-new", "0", "--format", "jsonl"];
    assert_eq!(home.karat(&none).lines()[0]["generated"], Value::Array(Vec::new()));
    let human = home.karat(&[
        "generate",
        "--model",
        TINY,
        "--tokens",
        "t",
        "--max-new",
        "12",
        "--greedy",
        "--ignore-eos",
    ]);
    assert_eq!(human.out.trim_end(), plain.1.as_str().unwrap().trim_end());
    let refused = |more: &[&str], said: &str| {
        home.says(2, &[&["generate", "--model", TINY][..], more].concat(), &[said]);
    };
    refused(&["--prompt", "hi"], "tokenizer.json: not found");
    refused(&["--tokens", "rows"], "expected one row, got 2");
    refused(&["--tokens", "t", "--speculate", "65"], "expected at most 64");
    refused(
        &["--tokens", "t", "--speculate", "2", "--temperature", "1"],
        "--speculate needs --greedy",
    );
    refused(&["--tokens", "t", "--max-new", "18446744073709551615"], "beyond the context");
    refused(&["--tokens", "t", "--temperature", "nan"], "--temperature NaN");
    refused(&["--tokens", "t", "--top-p", "0"], "--top-p 0");
}

/// `--force` replaces a checkpoint and nothing else.
#[test]
fn synth_never_removes_what_is_not_its_own() {
    let home = Home::new();
    let synth = |out: &'static str, more: &[&'static str]| {
        [&["synth", "--preset", "tiny", "--out", out][..], more].concat()
    };
    home.ends(0, &synth("m", &["--format", "jsonl"]));
    let inode = || fs::metadata(home.path("m")).unwrap().ino();
    let first = inode();
    home.says(2, &synth("m", &[]), &["exists and is not empty; --force replaces it"]);
    assert_eq!(inode(), first);
    home.ends(0, &synth("m", &["--force", "--shard-size", "0.0001"]));
    home.ends(0, &synth("m", &["--force"]));
    assert_eq!(home.names("m"), ["config.json", "generation_config.json", "model.safetensors"]);
    fs::write(home.path("m/notes"), "mine").unwrap();
    home.says(2, &synth("m", &["--force"]), &["\"notes\" in it is no part of a checkpoint"]);
    assert_eq!(fs::read(home.path("m/notes")).unwrap(), b"mine");
    fs::remove_file(home.path("m/notes")).unwrap();
    fs::create_dir(home.path("m/model-of.safetensors")).unwrap();
    home.ends(2, &synth("m", &["--force"]));
    // Places without a name of their own. The folders above this one are its own, too.
    fs::create_dir_all(home.path("a/b")).unwrap();
    fs::write(home.path("a/mine"), "mine").unwrap();
    for place in ["a/b/..", "a/..", "."] {
        home.says(2, &synth(place, &["--force"]), &["expected the name of a folder"]);
    }
    assert_eq!(home.names("a"), ["b", "mine"]);
    fs::write(home.path("file"), "mine").unwrap();
    home.says(2, &synth("file", &["--force"]), &["exists and is no folder"]);
    symlink("a", home.path("link")).unwrap();
    home.says(2, &synth("link", &["--force"]), &["exists and is no folder"]);
    home.says(2, &synth("x", &["--layers", "0"]), &["expected 1 to 4096"]);
    home.says(2, &synth("x", &["--dtype", "i64"]), &["expected f32, f16, bf16 or fp8"]);
    home.says(2, &synth("x", &["--shard-size", "nan"]), &["expected GB above 0"]);
    home.ends(9, &synth("file/x", &[]));
    assert_eq!(home.names(""), ["a", "file", "link", "m", "target"]);
}
