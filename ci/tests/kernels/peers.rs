//! Public packages as candidates, under the plans that they are declared with.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use super::{Needs, Test, check, home::Home, test};

/// Packed sequences, gates that forget everything, and heads that share a key.
const PROBLEMS: &str = "fill(packed) | fill(mixed-gates) | (T<=3 & HK<2)";

pub(super) fn tests() -> Vec<Test> {
    let official = ["chunk", "recurrent"].map(|way| {
        let name = format!("peers::transformers::{way}");
        test(name, Needs::Transformers, move || official(way))
    });
    let all = test("peers::are_skipped_with_what_installs_them", Needs::Python, skipped);
    official.into_iter().chain([all]).collect()
}

/// Every kernel.toml of the peers.
fn manifests() -> Vec<PathBuf> {
    let peers = Path::new(env!("CARGO_MANIFEST_DIR")).join("../benches/peers");
    let folders = fs::read_dir(peers).unwrap().map(|entry| entry.unwrap().path());
    let files =
        folders.filter(|path| path.is_dir()).flat_map(|folder| fs::read_dir(folder).unwrap());
    let files = files.map(|entry| entry.unwrap().path());
    files.filter(|path| path.extension().is_some_and(|end| end == "toml")).collect()
}

/// With a Python that has no packages nobody is wrong, and nobody passes.
fn skipped() {
    let home = Home::new();
    let (bare, python) = (home.path("bare"), super::python());
    fs::write(&bare, format!("#!/bin/sh\nexec {python} -S \"$@\"\n")).unwrap();
    fs::set_permissions(&bare, fs::Permissions::from_mode(0o755)).unwrap();
    let all = manifests();
    assert!(14 < all.len(), "{all:?}");
    let mut args = vec!["check".into(), "--python".into(), bare.display().to_string()];
    for file in &all {
        args.extend(["--kernel".to_owned(), file.display().to_string()]);
    }
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let ran = home.karat(&args);
    assert_eq!(ran.code, 9, "{ran:?}");
    for file in &all {
        let text = fs::read_to_string(file).unwrap();
        let name = text.lines().find_map(|line| line.strip_prefix("name = \"")).unwrap();
        let by = format!("@foreign/{}: ", name.trim_end_matches('"'));
        let line = ran.out.lines().find(|line| line.starts_with("skipped: ") && line.contains(&by));
        let line = line.unwrap_or_else(|| panic!("{by}: {ran:?}"));
        assert!(line.contains("pip install"), "{line}");
        assert!(text.lines().nth(1).unwrap().starts_with("#   pip install "), "{}", file.display());
    }
}

fn official(way: &str) {
    let file =
        format!("{}/../benches/peers/transformers/kernel-{way}.toml", env!("CARGO_MANIFEST_DIR"));
    let (ran, rows, _) = check(&Home::new(), &file, &["-E", PROBLEMS, "--timeout", "600"]);
    assert_eq!((ran.code, rows.len()), (0, 4), "{ran:?}");
}
