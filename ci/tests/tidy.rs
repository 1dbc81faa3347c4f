//! Every line stands in its room: rules of ARCHITECTURE.md that a compiler does not know.
//!
//! Each is a search through the tracked files, or a question to cargo.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use golden::recording::Recording;
use safetensors::SafeTensors;
use serde_json::Value;

/// Files that may say `unsafe`, and have to say why before anything else.
const UNSAFE: &[&str] = &[
    "golden/src/map.rs",
    "optimized/src/cpu/aligned.rs",
    "optimized/src/cpu/avx2.rs",
    "optimized/src/cpu/avx512.rs",
    "optimized/src/cpu/pool.rs",
    "optimized/src/cuda/device.rs",
    "optimized/src/cuda/nccl.rs",
    "optimized/src/doors/cabi.rs",
];

/// Longer files have a second question in them, these excepted.
const MAX_LINES: usize = 650;

/// A forward pass is written flat, to be read against the paper.
const LONG: &[&str] = &["reference/src/model.rs"];

/// Recordings that are committed, in all.
const MAX_RECORDINGS: u64 = 16 << 20;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Tracked files and their bytes. This one is left out: it spells what it searches for.
fn tracked() -> Vec<(String, Vec<u8>)> {
    let output = Command::new("git").args(["ls-files", "-z"]).current_dir(root()).output().unwrap();
    assert!(output.status.success(), "git ls-files: {}", String::from_utf8_lossy(&output.stderr));
    let names = String::from_utf8(output.stdout).unwrap();
    let read = |name: &str| Some((name.to_owned(), fs::read(root().join(name)).ok()?));
    let all: Vec<_> = names
        .split('\0')
        .filter(|name| !name.is_empty() && *name != "ci/tests/tidy.rs")
        .filter_map(read)
        .collect();
    assert!(100 < all.len(), "the repository has more files than {}", all.len());
    all
}

fn is_rust(name: &str) -> bool {
    Path::new(name).extension().is_some_and(|extension| extension == "rs")
}

/// Tracked sources of Rust.
fn sources() -> Vec<(String, String)> {
    let rust = |(name, bytes): (String, Vec<u8>)| {
        is_rust(&name).then(|| (name, String::from_utf8(bytes).unwrap()))
    };
    tracked().into_iter().filter_map(rust).collect()
}

/// Lines, by number, in which `found` finds something; comments are not looked at.
fn lines<'a>(
    text: &'a str,
    found: impl Fn(&str) -> bool + 'a,
) -> impl Iterator<Item = (usize, &'a str)> {
    text.lines()
        .enumerate()
        .filter(move |(_, line)| found(line.split("//").next().unwrap_or("")))
        .map(|(i, line)| (i + 1, line))
}

/// Whether a word stands in a line by itself.
fn has_word(line: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word)
        .any(|(at, _)| !line[..at].ends_with(part) && !line[at + word.len()..].starts_with(part))
}

/// Whether a file is a test: a file of tests, or a module of them in a file of its own.
fn is_test(name: &str) -> bool {
    name.contains("/tests/") || name.ends_with("/tests.rs") || name.contains("/fuzz/")
}

#[test]
fn every_op_has_its_place_in_every_room() {
    let names: BTreeSet<String> = tracked().into_iter().map(|(name, _)| name).collect();
    let registry = fs::read_to_string(root().join("benches/src/registry.rs")).unwrap();
    let ops: Vec<&str> = names
        .iter()
        .filter_map(|name| name.strip_prefix("golden/src/ops/")?.strip_suffix(".rs"))
        .filter(|name| !name.contains('/'))
        .collect();
    assert!(20 < ops.len(), "{ops:?}");
    for op in ops {
        assert!(
            names.contains(&format!("reference/src/{op}.rs")),
            "{op}: no reference/src/{op}.rs"
        );
        let contract = fs::read_to_string(root().join(format!("golden/src/ops/{op}.rs"))).unwrap();
        assert!(
            contract.contains(&format!("const NAME: &'static str = \"{op}\"")),
            "golden/src/ops/{op}.rs: an op is named as its file"
        );
        let line = format!("ops::{op}::");
        assert_eq!(registry.matches(&line).count(), 1, "{op}: one line in benches/src/registry.rs");
    }
}

/// A kernel that nobody launches is never judged.
#[test]
fn every_kernel_is_launched() {
    let mut kernels = 0;
    for (name, bytes) in tracked() {
        let Some(op) = name.strip_prefix("kernels/src/").and_then(|name| name.strip_suffix(".cu"))
        else {
            continue;
        };
        // An op may have several sources; its name comes first.
        let mut op = op.trim_start_matches("hopper/");
        let mut variants = loop {
            match fs::read_to_string(root().join(format!("optimized/src/cuda/{op}.rs"))) {
                Ok(variants) => break variants,
                Err(e) => op = op.rsplit_once('_').unwrap_or_else(|| panic!("{name}: {e}")).0,
            }
        };
        // What the engine launches stands in more than one file.
        for part in
            fs::read_dir(root().join(format!("optimized/src/cuda/{op}"))).into_iter().flatten()
        {
            variants += &fs::read_to_string(part.unwrap().path()).unwrap();
        }
        let text = String::from_utf8(bytes).unwrap();
        for rest in text.split("extern \"C\" __global__ ").skip(1) {
            let head = rest.split("(\n").next().unwrap();
            let kernel = head.rsplit(' ').next().unwrap();
            assert!(variants.contains(&format!("\"{kernel}\"")), "{name}: {kernel}");
            kernels += 1;
        }
    }
    assert!(15 < kernels, "{kernels} kernels");
}

/// `reference` and `optimized` cannot see each other: nobody copies the answer.
#[test]
fn crates_know_only_whom_they_may() {
    let cargo = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(cargo.status.success(), "{}", String::from_utf8_lossy(&cargo.stderr));
    let metadata: Value = serde_json::from_slice(&cargo.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let members: BTreeSet<&str> = packages.iter().filter_map(|p| p["name"].as_str()).collect();
    let mut edges = BTreeMap::new();
    for package in packages {
        // Those of tests count: a test that knows the other side copies from it as well.
        let known: BTreeSet<&str> = package["dependencies"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|dependency| dependency["name"].as_str())
            .filter(|name| members.contains(name))
            .collect();
        edges.insert(package["name"].as_str().unwrap(), known);
    }
    let want = [
        ("golden", &[][..]),
        ("kernels", &[]),
        ("reference", &["golden"]),
        ("optimized", &["golden", "kernels"]),
        ("benches", &["golden", "kernels", "optimized", "reference"]),
        ("ci", &["benches", "golden"]),
    ];
    let want: BTreeMap<&str, BTreeSet<&str>> =
        want.into_iter().map(|(name, known)| (name, known.iter().copied().collect())).collect();
    assert_eq!(edges, want);
}

#[test]
fn unsafe_stands_where_it_may() {
    // What `kernel new` hands out is text here, compiled by whoever asked for it.
    let handed_out = |name: &str| name.starts_with("optimized/src/doors/scaffold/");
    for (name, text) in sources().into_iter().filter(|(name, _)| !handed_out(name)) {
        let allowed = UNSAFE.contains(&name.as_str());
        for (number, line) in lines(&text, |line| has_word(line, "unsafe")) {
            assert!(allowed, "{name}:{number}: {line}");
        }
        if allowed {
            let code = text.lines().find(|line| !line.starts_with("//")).unwrap_or_default();
            assert!(code.starts_with("#![expect("), "{name}: says why it may, before all else");
        }
    }
}

#[test]
fn only_ci_speaks_and_only_benches_has_a_clock() {
    let speaks = ["println!", "print!", "eprintln!", "eprint!", "dbg!", "process::exit"];
    let reads = [
        "env::var",
        "env::var_os",
        "env::vars",
        "env::args",
        "env::args_os",
        "env::current_dir",
        "env::temp_dir",
    ];
    let clocks = ["Instant::now", "SystemTime::now"];
    let of_ci = [&speaks[..], &reads].concat();
    for (name, text) in sources() {
        // A bench is a program of its own.
        if !name.starts_with("ci/") && !name.starts_with("benches/benches/") && !is_test(&name) {
            let found: Vec<_> = lines(&text, |line| calls(line, &of_ci)).collect();
            assert_eq!(found, [], "{name}: only ci prints, exits and reads the environment");
        }
        if name != "benches/src/clock.rs" && !is_test(&name) {
            let found: Vec<_> = lines(&text, |line| calls(line, &clocks)).collect();
            assert_eq!(found, [], "{name}: only benches/src/clock.rs reads a clock");
        }
    }
}

/// Whether a line calls one of these, whatever is before it in a path.
fn calls(line: &str, names: &[&str]) -> bool {
    names.iter().any(|name| {
        let part = |c: char| c.is_alphanumeric() || c == '_';
        line.match_indices(name).any(|(at, _)| {
            let after = &line[at + name.len()..];
            !line[..at].ends_with(part) && !after.starts_with(part)
        })
    })
}

#[test]
fn no_file_is_too_long_and_none_is_unfinished() {
    for (name, text) in sources() {
        let count = text.lines().count();
        assert!(count <= MAX_LINES || LONG.contains(&name.as_str()), "{name}: {count} lines");
    }
    let written = [".rs", ".py", ".md", ".toml", ".cu", ".cuh", ".h", ".sh", ".json"];
    for (name, bytes) in tracked() {
        if !written.iter().any(|end| name.ends_with(end)) {
            continue;
        }
        let text = String::from_utf8_lossy(&bytes);
        for word in ["TODO", "FIXME", "XXX"] {
            for (i, line) in text.lines().enumerate().filter(|(_, line)| has_word(line, word)) {
                assert!(line.contains(&format!("{word}(#")), "{name}:{}: {line}", i + 1);
            }
        }
    }
}

/// A path that exists on one machine only means that something was not thought through.
#[test]
fn no_file_knows_one_machine() {
    let here = root().canonicalize().unwrap().display().to_string();
    for (name, bytes) in tracked() {
        if name.ends_with(".safetensors") {
            continue;
        }
        let text = String::from_utf8_lossy(&bytes);
        for (i, line) in text.lines().enumerate() {
            for place in ["/home/", "/root/", "/Users/", "C:\\Users", &here] {
                let mut at = line.match_indices(place).map(|(at, _)| at);
                // A part of a longer path or address is none.
                let absolute = at.any(|at| {
                    !line[..at].ends_with(|c: char| {
                        c.is_alphanumeric() || matches!(c, '.' | '}' | '-' | '_')
                    })
                });
                assert!(!absolute, "{name}:{}: {line}", i + 1);
            }
        }
    }
}

/// What was recorded is what is committed, to the tensor, and stays small.
#[test]
fn recordings_are_as_their_manifests_say() {
    let dir = root().join("golden/recordings");
    let mut total = 0;
    let mut ids = BTreeSet::new();
    for (name, bytes) in tracked() {
        if let Some(rest) = name.strip_prefix("golden/recordings/") {
            total += bytes.len() as u64;
            ids.insert(rest.split('/').next().unwrap_or_default().to_owned());
        }
    }
    assert!(total <= MAX_RECORDINGS, "{total} bytes of recordings are committed");
    assert!(10 < ids.len(), "{ids:?}");
    for id in ids {
        let recording = Recording::open(&dir.join(&id)).unwrap_or_else(|e| panic!("{e}"));
        let manifest = &recording.manifest;
        assert_eq!(manifest.id, id);
        assert!(!manifest.reason.trim().is_empty(), "{id}: accepted for a reason");
        let bytes = fs::read(recording.dir.join("recording.safetensors")).unwrap();
        assert_eq!(manifest.recording.bytes, bytes.len() as u64, "{id}");
        let parsed = SafeTensors::deserialize(&bytes).unwrap();
        for tap in &manifest.taps {
            let hash = blake3::hash(parsed.tensor(&tap.name).unwrap().data()).to_hex();
            assert_eq!(hash.as_str(), tap.blake3, "{id}: {}", tap.name);
        }
        // A committed checkpoint is committed whole.
        if manifest.checkpoint.source == "committed" {
            let home = root().join(manifest.checkpoint.path.as_deref().unwrap());
            for file in &manifest.checkpoint.files {
                let found = golden::checkpoint::hash_file(&home, &home.join(&file.path)).unwrap();
                assert_eq!(found, *file, "{id}");
            }
        }
        let question = root().join(format!("golden/questions/{id}.json"));
        assert!(id == "ops" || question.exists(), "{id}: no question to record it again from");
    }
}
