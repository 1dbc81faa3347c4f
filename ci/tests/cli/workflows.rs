//! The workflows and guides in `docs`, as far as they go without a server: what they run is run.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use saphyr::{LoadableYamlNode, YamlOwned};

use super::home::Home;

fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs")
}

fn workflow(name: &str) -> YamlOwned {
    let text = fs::read_to_string(docs().join("ci").join(name)).unwrap();
    let mut all = YamlOwned::load_from_str(&text).unwrap();
    assert_eq!(all.len(), 1, "{name}");
    all.remove(0)
}

fn text<'a>(node: &'a YamlOwned, key: &str) -> Option<&'a str> {
    node.as_mapping_get(key).and_then(YamlOwned::as_str)
}

fn keys(node: &YamlOwned) -> Vec<String> {
    let map = node.as_mapping().unwrap();
    map.keys().map(|key| key.as_str().unwrap().to_owned()).collect()
}

/// Runs a step of a workflow in a folder where karat is on the path and checks are quick.
fn step(home: &Home, script: &str, variables: &[(&str, &str)], code: i32) {
    let karat = Path::new(env!("CARGO_BIN_EXE_karat")).parent().unwrap();
    let path = format!("{}:{}", karat.display(), std::env::var("PATH").unwrap());
    let mut shell = Command::new("bash");
    shell.args(["-e", "-o", "pipefail", "-c", script]).current_dir(home.path(""));
    shell.env("PATH", path).env("KARAT_FILTER", "l2_norm/").env("KARAT_NO_PROGRESS", "1");
    shell.envs(variables.iter().copied());
    let ran = shell.output().unwrap();
    let told = String::from_utf8_lossy(&ran.stderr);
    assert_eq!(
        ran.status.code(),
        Some(code),
        "{script}: {told} {}",
        String::from_utf8_lossy(&ran.stdout)
    );
}

/// What is dear in a workflow is asked here of less.
fn quick(script: &str) -> String {
    script
        .replace("karat mutate --set ci --selftest", "karat mutate l2_norm@ --seeds 1 --selftest")
        .replace("karat golden verify", "karat golden verify decode")
        .replace(
            "karat paths",
            "karat paths gated_delta_rule/B1-T141-HK2-HV6 split=65,76@reference",
        )
}

#[test]
fn the_workflow_for_github_runs() {
    let all = workflow("github.yml");
    let jobs = all.as_mapping_get("jobs").unwrap();
    let names = keys(jobs);
    assert_eq!(names, ["check", "model", "karat", "publish"]);
    for job in &names {
        let job = jobs.as_mapping_get(job).unwrap();
        assert!(job.as_mapping_get("runs-on").is_some());
        let needs = job.as_mapping_get("needs");
        let needs = needs.map_or(Vec::new(), |needs| match needs.as_sequence() {
            Some(all) => all.iter().map(|one| one.as_str().unwrap()).collect(),
            None => vec![needs.as_str().unwrap()],
        });
        assert!(needs.iter().all(|need| names.iter().any(|name| name == need)), "{needs:?}");
    }
    let home = Home::with(&["ops", "decode"]);
    let summary = home.path("summary.md").display().to_string();
    let run = |job: &str, shard: &str, skip: &[&str]| {
        let steps = jobs.as_mapping_get(job).unwrap().as_mapping_get("steps").unwrap();
        let mut ran = 0;
        for one in steps.as_sequence().unwrap() {
            let Some(script) = text(one, "run") else {
                // What is fetched is of a version.
                assert!(text(one, "uses").unwrap().contains("@v"));
                continue;
            };
            let name = text(one, "name").unwrap();
            if name == "install" {
                assert_eq!(script, "cargo install --path ci --locked");
            } else if !skip.contains(&name) {
                let script = quick(&script.replace("${{ matrix.shard }}", shard));
                assert!(!script.contains("${{"), "{script}");
                step(&home, &script, &[("GITHUB_STEP_SUMMARY", &summary)], 0);
                ran += 1;
            }
        }
        ran
    };
    let matrix = jobs.as_mapping_get("check").unwrap().as_mapping_get("strategy").unwrap();
    let matrix = matrix.as_mapping_get("matrix").unwrap().as_mapping_get("shard").unwrap();
    let shards: Vec<i64> =
        matrix.as_sequence().unwrap().iter().map(|one| one.as_integer().unwrap()).collect();
    assert_eq!(shards, [1, 2, 3, 4]);
    for shard in shards {
        assert_eq!(run("check", &shard.to_string(), &[]), 1);
    }
    assert_eq!(run("model", "", &[]), 3);
    assert_eq!(run("karat", "", &[]), 2);
    for name in
        ["index.html", "badge.svg", "junit.xml", "summary.md", "check-1.jsonl", "golden.jsonl"]
    {
        assert!(home.path("public").join(name).exists(), "{name}");
    }
    assert!(fs::read_to_string(&summary).unwrap().contains("karat: passed"));
    // A shard that died is red, and the report is written all the same.
    fs::rename(home.path("results/check-3.jsonl"), home.path("results/check-3.jsonl.part"))
        .unwrap();
    step(&home, "karat merge results/*.jsonl -o results.jsonl", &[], 2);
    run("karat", "", &["verdict"]);
    assert!(fs::read_to_string(home.path("public/index.html")).unwrap().contains("shard 3/4"));
}

#[test]
fn the_workflow_for_gitlab_runs() {
    let all = workflow("gitlab.yml");
    let stages = all.as_mapping_get("stages").unwrap().as_sequence().unwrap();
    let stages: Vec<&str> = stages.iter().map(|stage| stage.as_str().unwrap()).collect();
    let home = Home::with(&["ops", "decode"]);
    let parallel = all.as_mapping_get("check").unwrap().as_mapping_get("parallel").unwrap();
    for (job, times) in
        [("check", parallel.as_integer().unwrap()), ("model", 1), ("verdict", 1), ("pages", 1)]
    {
        let job = all.as_mapping_get(job).unwrap();
        assert!(stages.contains(&text(job, "stage").unwrap()));
        for i in 1..=times {
            for line in job.as_mapping_get("script").unwrap().as_sequence().unwrap() {
                let (index, total) = (i.to_string(), times.to_string());
                let variables =
                    [("CI_NODE_INDEX", index.as_str()), ("CI_NODE_TOTAL", total.as_str())];
                step(&home, &quick(line.as_str().unwrap()), &variables, 0);
            }
        }
    }
    for name in ["public/index.html", "public/badge.svg", "results/check-4.xml"] {
        assert!(home.path(name).exists(), "{name}");
    }
}

/// Every command line in the guides is one that karat reads.
#[test]
fn guides_name_commands_that_there_are() {
    let home = Home::new();
    let mut found = 0;
    for guide in ["ci.md", "validate.md", "publish.md", "kernels.md", "compare.md"] {
        let text = fs::read_to_string(docs().join(guide)).unwrap();
        let mut inside = false;
        for line in text.lines() {
            inside ^= line.starts_with("```");
            if inside && line.starts_with("karat ") && !line.starts_with("karat  ") {
                // What stands behind it, far to the right, says what it is for.
                let typed = line.split("   ").next().unwrap();
                let words: Vec<&str> =
                    typed.split_whitespace().skip(1).map(|word| word.trim_matches('\'')).collect();
                let ran = home.karat(&[&words[..1], &["--help"]].concat());
                assert_eq!(ran.code, 0, "{guide}: {line}");
                // A command line that cannot be read ends before anything runs, and names its usage.
                let mut help = words.clone();
                help.push("--no-such-flag");
                let err = home.ends(2, &help);
                assert!(err.contains("'--no-such-flag'"), "{guide}: {line}: {err}");
                found += 1;
            }
        }
    }
    assert!(30 < found, "{found}");
}
