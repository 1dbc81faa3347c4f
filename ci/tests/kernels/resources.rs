//! Karat's own CUDA kernels on a machine without a GPU: each is compiled for each of its targets, by the
//! assembler too, and what it takes is reviewed. With a GPU they are checked.

use std::{collections::BTreeMap, fmt::Write};

use serde_json::Value;

use super::{Needs, Test, home::Home, test};

pub(super) fn tests() -> Vec<Test> {
    vec![
        test("own::what_kernels_take", Needs::Nvrtc, what_kernels_take),
        test("own::without_a_gpu_nothing_is_green", Needs::Nothing, nothing_is_green),
        test("own::the_engine_without_a_gpu", Needs::Nothing, the_engine),
        test("own::a_compiler_that_is_not_there", Needs::Nothing, no_compiler),
    ]
}

/// Another compiler gives other numbers: `.ci/run` says which one these are of.
fn what_kernels_take() {
    let folder = std::env::var("KARAT_NVRTC").unwrap();
    let args = ["kernel", "resources", "--format", "jsonl", "--nvrtc", &folder];
    let ran = Home::new().karat(&args);
    assert_eq!(ran.code, 0, "{ran:?}");
    let mut all: BTreeMap<(usize, String), BTreeMap<String, String>> = BTreeMap::new();
    let mut targets = Vec::new();
    let mut order = Vec::new();
    for line in ran.lines() {
        let text = |name: &str| line[name].as_str().unwrap().to_owned();
        let (target, kernel) =
            (text("target"), format!("{:<31}{}", text("kernel"), text("stored")));
        if !targets.contains(&target) {
            targets.push(target.clone());
        }
        if !order.contains(&kernel) {
            order.push(kernel.clone());
        }
        let at = order.iter().position(|known| *known == kernel).unwrap();
        let used = ["registers", "shared", "stack", "spilled"].map(|name| line[name].to_string());
        all.entry((at, kernel)).or_default().insert(target, used.join(" "));
    }
    assert_eq!(targets, ["sm_80", "sm_90a", "sm_100a"]);
    let mut table = "registers, bytes of shared memory, stack and spills\n".to_owned();
    let wide = |text: &String| format!("{text:<14}");
    let head = targets.iter().map(wide).collect::<Vec<_>>().concat();
    let _ = writeln!(table, "{:<41}{}", "", head.trim_end());
    for ((_, kernel), used) in &all {
        let none = "-".to_owned();
        let used = targets.iter().map(|target| wide(used.get(target).unwrap_or(&none)));
        let used = used.collect::<Vec<_>>().concat();
        let _ = writeln!(table, "{kernel:<41}{}", used.trim_end());
    }
    insta::assert_snapshot!("resources", table);
}

fn nothing_is_green() {
    let home = Home::with(&["ops"]);
    let ran = home.karat(&["check", "rms_norm/", "--device", "cuda", "--format", "jsonl"]);
    let lines = ran.lines();
    let rows: Vec<&Value> = lines.iter().filter(|line| line["kind"] == "check").collect();
    assert!(4 < rows.len(), "{ran:?}");
    assert!(rows.iter().all(|row| row["variant"].as_str().unwrap().starts_with("cuda/")));
    if rows.iter().all(|row| row["outcome"] == "passed") {
        assert_eq!(ran.code, 0, "{ran:?}");
        return;
    }
    assert_eq!(ran.code, 9, "{ran:?}");
    for row in rows {
        let why = row["why"].as_str().unwrap();
        // Of sizes that a variant is not for.
        if row["outcome"] == "unsupported" {
            continue;
        }
        assert!(row["outcome"] == "skipped", "{row}");
        assert!(["libcuda", "libnvrtc", "driver"].iter().any(|part| why.contains(part)), "{why}");
    }
}

/// Every command of the engine passes, or says in one line what the machine lacks.
fn the_engine() {
    let model = "synthetic:tiny,layers=1";
    let commands: [&[&str]; 7] = [
        &["golden", "verify", "tied", "--engine", "cuda"],
        &["golden", "verify", "tied", "--engine", "cuda", "--number", "bf16"],
        &[
            "paths", "model/", "--engine", "cuda", "--model", model, "--tokens", "9", "--set",
            "smoke",
        ],
        &["invariance", "model/", "--engine", "cuda", "--model", model, "--set", "smoke"],
        &["bisect", "--engine", "cuda", "--model", model],
        &["bench", "--engine", "cuda", "--model", model, "--rounds", "1", "--decode", "2"],
        &["scale", "--device", "cuda", "--model", model, "--rounds", "1", "--context", "0,1k,2k"],
    ];
    for command in commands {
        let ran = Home::with(&["tied"]).karat(command);
        if ran.code == 0 {
            continue;
        }
        assert_eq!(ran.code, 9, "{command:?}: {ran:?}");
        let told = format!("{}{}", ran.out, ran.err);
        let lacks =
            |line: &&str| ["libcuda", "libnvrtc", "driver"].iter().any(|part| line.contains(part));
        assert_eq!(told.lines().filter(lacks).count(), 1, "{command:?}: {ran:?}");
    }
    let ran =
        Home::new().karat(&["bench", "--engine", "cuda", "--model", model, "--number", "int8"]);
    assert_eq!(ran.code, 2, "{ran:?}");
}

fn no_compiler() {
    let home = Home::new();
    let ran = home.karat(&["list", "l2_norm", "--nvrtc", "nowhere"]);
    assert!(ran.code == 0 && ran.err.contains("--nvrtc: nowhere"), "{ran:?}");
}
