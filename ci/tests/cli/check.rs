//! What a check leaves behind: tensors of what fails, repro lines, derivations, the matrix of support.

use std::fs;

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use super::home::{Home, tensors};

fn f64s(bytes: &[u8]) -> Vec<f64> {
    bytes.as_chunks::<8>().0.iter().map(|&b| f64::from_le_bytes(b)).collect()
}

fn f32s(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
}

#[test]
fn failing_jobs_leave_their_tensors() {
    let home = Home::with(&["ops"]);
    let case = "rms_norm/N3-D64@reference/f32";
    home.ends(0, &["check", case, "--save-failing", "failed"]);
    assert!(home.names("failed").is_empty(), "nothing failed");
    home.ends(3, &["check", case, "--plant", "one-element", "--save-failing", "failed"]);
    assert_eq!(home.names("failed"), ["rms_norm+N3-D64+reference+f32.safetensors"]);
    let path = home.path("failed/rms_norm+N3-D64+reference+f32.safetensors");
    let file = tensors(&path);
    let of = |name: &str| file.get(name).unwrap_or_else(|| panic!("{name}: {:?}", file.keys()));
    assert_eq!((of("in.x").0, &of("in.x").1[..]), (Dtype::F32, &[3, 64][..]));
    let output = file.keys().find_map(|name| name.strip_prefix("got.")).unwrap();
    let (want, allowed) =
        (f64s(&of(&format!("want.{output}")).2), f64s(&of(&format!("allowed.{output}")).2));
    let got = f32s(&of(&format!("got.{output}")).2);
    // The file says by itself which element is over.
    let over = (0..got.len()).filter(|&i| allowed[i] < (f64::from(got[i]) - want[i]).abs()).count();
    assert_eq!((got.len(), over), (3 * 64, 1));
    let bytes = fs::read(&path).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = header.metadata().as_ref().unwrap();
    assert_eq!(metadata["repro"], format!("karat check '{case}' --plant one-element"));
    assert_eq!((metadata["outcome"].as_str(), metadata["case"].as_str()), ("failed", case));
    // What crashes leaves what it was fed; what was recorded leaves the recorded answer.
    home.ends(10, &["check", case, "--plant", "crash", "--save-failing", "crashed"]);
    let file = tensors(&home.path("crashed/rms_norm+N3-D64+reference+f32.safetensors"));
    assert!(file.contains_key("in.x") && file.keys().all(|name| name.starts_with("in.")));
    home.ends(3, &["check", "rms_norm/ops:domain", "--plant", "nan", "--save-failing", "recorded"]);
    let file = tensors(&home.path("recorded/rms_norm+ops+domain+reference+f32.safetensors"));
    assert!(
        ["in.x", "got.o", "want.o"].iter().all(|name| file.contains_key(*name)),
        "{:?}",
        file.keys()
    );
    // A folder that is none.
    fs::write(home.path("file"), "").unwrap();
    home.says(9, &["check", case, "--save-failing", "file/x"], &["file/x"]);
}

#[test]
fn what_runs_is_written_down_before_it_runs() {
    let home = Home::with(&["ops"]);
    let ran = home.karat(&["check", "l2_norm/", "-v"]);
    assert_eq!(ran.code, 0);
    let lines: Vec<&str> =
        ran.err.lines().filter(|line| line.starts_with("karat check '")).collect();
    // What this machine lacks is told as it is come to.
    let row = |line: &&str| {
        ["passed ", "skipped  ", "unsupported "].iter().any(|word| line.starts_with(word))
    };
    assert_eq!(lines.len(), ran.out.lines().filter(row).count(), "{ran:?}");
    // Each is what to type.
    let here = lines.iter().find(|line| line.contains("@reference/f32")).unwrap();
    let args: Vec<&str> = here.split(' ').skip(1).map(|word| word.trim_matches('\'')).collect();
    assert_eq!(home.karat(&args).code, 0);
    // A run that ended leaves nothing, one that died what it was doing; the next one says so, once.
    let running = home.path("target/karat/running");
    assert!(fs::read_dir(&running).unwrap().next().is_none());
    let dead = running.join("4294967294");
    fs::write(&dead, "karat check 'l2_norm/N3-D8@cpu/portable'\n").unwrap();
    let err = home.ends(0, &["check", "rms_norm/N3-D64@reference/f32"]);
    if fs::exists("/proc/self").unwrap() {
        assert!(err.contains("a run that died had these jobs running"), "{err}");
        assert!(err.contains("karat check 'l2_norm/N3-D8@cpu/portable'"), "{err}");
        assert!(!dead.exists());
    }
}

#[test]
fn the_derivation_of_a_bound_is_told() {
    let home = Home::new();
    let case = "gated_delta_rule/B1-T65-HK2-HV4-K16-V16@reference/f32";
    let ran = home.karat(&["explain", case, "--format", "jsonl"]);
    let derivation = &ran.lines()[0]["derivation"];
    assert_eq!((ran.code, &derivation["factor"]), (0, &Value::from(7.0)), "{ran:?}");
    for output in derivation["outputs"].as_array().unwrap() {
        let terms = output["terms"].as_array().unwrap();
        let largest = terms
            .iter()
            .max_by(|a, b| a["spread"].as_f64().partial_cmp(&b["spread"].as_f64()).unwrap())
            .unwrap();
        assert_eq!(output["dominant"], largest["term"]);
        assert!(1 < terms.len() && 0.0 < output["half_ulp"].as_f64().unwrap(), "{output}");
        // No source alone makes much more than all together.
        assert!(largest["spread"].as_f64() < output["spread"].as_f64().map(|all| 2.0 * all));
    }
    let human = home.karat(&["explain", case]).out;
    assert!(
        human.contains("7 x spread + half an ulp of f32") && human.contains("(dominates)"),
        "{human}"
    );
    // Every way to compute it, two forms in double among them.
    let all = home.karat(&["explain", "gated_delta_rule/B1-T65-HK2-HV4-K16-V16"]).out;
    assert!(
        all.contains(
            "@reference/f64-chunk64\n  chunked 64 against plain, both in f64: relative RMS 1e-12"
        ),
        "{all}"
    );
    let verbose = home.karat(&["check", "l2_norm/", "-v"]).out;
    assert!(verbose.contains("each source alone: f32 arithmetic"), "{verbose}");
    home.says(2, &["explain", "rms_norm/N3-X64"], &["expected D<n>"]);
    home.says(
        2,
        &["explain", "rms_norm/N3-D64@cpu/none"],
        &["expected a case as `karat list` names it"],
    );
}

#[test]
fn support_is_what_was_checked_last() {
    let home = Home::with(&["ops"]);
    let state = |dtype: &str| -> Value {
        let lines = home.karat(&["support", "rms_norm@", "--format", "jsonl"]).lines();
        let found = lines.into_iter().find(|line| {
            line["op"] == "rms_norm" && line["variant"] == "reference/f32" && line["dtype"] == dtype
        });
        found.unwrap()
    };
    assert_eq!(state("f32")["state"], "unchecked");
    home.ends(0, &["check", "rms_norm/"]);
    let passed = state("f32");
    assert_eq!(passed["state"], "passed");
    assert!(passed["checked"].as_u64().unwrap() < passed["cases"].as_u64().unwrap(), "{passed}");
    assert_eq!(state("bf16")["state"], "unchecked", "no such case is in the smoke set");
    // A planted fault says nothing of the variant.
    home.ends(3, &["check", "rms_norm/N3-D64", "--plant", "nan"]);
    assert_eq!(state("f32"), passed);
    let table = home.karat(&["support", "rms_norm@"]).out;
    assert!(table.contains("passed"), "{table}");
    let md = home.karat(&["support", "rms_norm@", "--format", "md"]).out;
    let lines: Vec<&str> = md.lines().collect();
    assert!(
        lines[0].starts_with("| op | variant | f32 |") && lines[1].starts_with("| --- |"),
        "{md}"
    );
    assert!(lines[2..].iter().all(|line| line.starts_with("| rms_norm | ")), "{md}");
    home.says(2, &["list", "--format", "md"], &["only `karat support` writes Markdown"]);
    home.says(4, &["support", "nothing@at-all"], &["nothing selected"]);
    // What another build found, and what failed.
    let path = home.path("target/karat/outcomes.json");
    let kept = fs::read_to_string(&path).unwrap();
    let mut failed: Value = serde_json::from_str(&kept).unwrap();
    let mut cases = failed["cases"].as_object_mut().unwrap().iter_mut();
    let f32 = cases.find(|(id, _)| id.ends_with("@reference/f32") && !id.contains("dtype"));
    f32.unwrap().1["outcome"] = "failed".into();
    fs::write(&path, failed.to_string()).unwrap();
    assert_eq!(
        (&state("f32")["state"], &state("f32")["outcomes"]["failed"]),
        (&"failed".into(), &1.into())
    );
    let mut other: Value = serde_json::from_str(&kept).unwrap();
    for (_, last) in other["cases"].as_object_mut().unwrap() {
        last["build"] = "another".into();
    }
    fs::write(&path, other.to_string()).unwrap();
    assert_eq!((&state("f32")["state"], &state("f32")["checked"]), (&"stale".into(), &0.into()));
    // A damaged file is no file.
    fs::write(&path, "{").unwrap();
    assert_eq!(state("f32")["state"], "unchecked");
}
