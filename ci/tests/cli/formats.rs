//! `formats`: what a model loses in fewer bits.

use serde_json::Value;

use super::home::Home;

const SHORT: [&str; 4] = ["--random", "24", "--judged", "8"];

fn mean(line: &Value, of: &str, what: &str) -> f64 {
    line[of][what]["mean"].as_f64().unwrap_or_else(|| panic!("{of} {what}: {line}"))
}

#[test]
fn a_model_is_told_what_its_formats_lose() {
    let home = Home::new();
    let model = ["formats", "--model", "synthetic:tiny"];
    let ran = home.karat(&[&model[..], &SHORT, &["--format", "jsonl"]].concat());
    assert_eq!(ran.code, 0, "{ran:?}");
    let lines = ran.lines();
    let numbers: Vec<_> = lines.iter().map(|line| line["number"].as_str().unwrap()).collect();
    assert_eq!(numbers, ["bf16", "int8", "int4"]);
    for line in &lines {
        assert_eq!((&line["kind"], &line["outcome"]), (&"format".into(), &"passed".into()));
        let allowed = line["mean_kl_allowed"].as_f64().unwrap();
        assert!(mean(line, "to_f32", "kl") <= allowed, "{line}");
        assert!(2.0 * mean(line, "plan_to_f32", "kl") <= allowed, "{line}");
        // The last token is followed by none.
        let n = |of: &str, what: &str| line[of][what]["n"].as_u64();
        assert_eq!((n("to_f32", "kl"), n("to_f32", "delta_nll")), (Some(8), Some(8)));
        assert_eq!((n("to_bf16", "kl"), n("to_bf16", "delta_nll")), (Some(24), Some(23)));
        assert_eq!(line["ln_vocabulary"].as_f64(), Some(256.0_f64.ln()));
    }
    // Fewer bits lose more, and bf16 is itself.
    for (wide, narrow) in lines.iter().zip(&lines[1..]) {
        assert!(mean(wide, "to_f32", "kl") < mean(narrow, "to_f32", "kl"), "{lines:?}");
        let bytes = |line: &Value| line["weights_bytes"].as_u64().unwrap();
        assert!(bytes(narrow) < bytes(wide), "{lines:?}");
    }
    for (what, itself) in [("kl", 0.0), ("top1", 1.0), ("delta_nll", 0.0)] {
        assert_eq!(mean(&lines[0], "to_bf16", what).to_bits(), f64::to_bits(itself), "{what}");
    }

    let told = home.karat(&[&model[..], &SHORT].concat());
    assert!(told.code == 0 && told.out.contains("ln V is 5.545"), "{told:?}");
    // Of a checkpoint in FP8, its own weights.
    let fp8 = ["formats", "--model", "synthetic:tiny,dtype=fp8", "--format", "jsonl"];
    let lines = home.karat(&[&fp8[..], &SHORT].concat()).lines();
    assert!(
        lines.len() == 1 && lines[0]["number"] == "bf16" && lines[0]["ok"] == true,
        "{lines:?}"
    );
    // Keys and values in eight bits are beside an engine that keeps them plainly.
    let kept = ["--number", "bf16", "--kv-cache", "int8", "--format", "jsonl"];
    let lines = home.karat(&[&model[..], &SHORT, &kept].concat()).lines();
    assert_eq!((lines.len(), &lines[0]["kv_cache"]), (1, &"int8".into()));
    assert!(lines[0]["ok"] == true && 0.0 < mean(&lines[0], "to_bf16", "kl"), "{lines:?}");
    // Of a file, whose padding is no token; what another checkpoint says is right.
    home.tokens("t", &[&[0, 1, 2], &[3, 4, 5]], Some(&[&[0, 1, 1], &[1, 1, 1]]));
    let file = ["--tokens", "t", "--judged", "2", "--against", "synthetic:tiny,dtype=f32"];
    let ran = home.karat(&[&model[..], &file, &["--number", "int8", "--format", "jsonl"]].concat());
    let lines = ran.lines();
    assert!(ran.code == 0 && lines.len() == 1, "{ran:?}");
    assert_eq!(lines[0]["to_bf16"]["kl"]["n"], 5);
    assert_eq!(lines[0]["to_f32"]["kl"]["n"], 4);
}

/// A format that has fewer bits than it says loses more than its plan does.
#[test]
fn a_format_that_is_coarser_than_it_says_is_caught() {
    let home = Home::new();
    for number in ["bf16", "int8"] {
        let asked = ["formats", "--model", "synthetic:tiny", "--number", number];
        assert_eq!(home.karat(&[&asked[..], &SHORT].concat()).code, 0);
        let ran = home.karat(&[&asked[..], &SHORT, &["--plant", "coarser"]].concat());
        assert_eq!(ran.code, 3, "{ran:?}");
        assert!(ran.out.contains(&format!("FAIL {number}: mean KL to f32 ")), "{ran:?}");
        let repro = ran.out.lines().find_map(|line| line.strip_prefix("  repro: karat "));
        let repro: Vec<_> = repro.unwrap().split(' ').collect();
        assert_eq!(home.karat(&repro).code, 3, "{repro:?}");
    }
    home.says(
        2,
        &["formats", "--model", "synthetic:tiny", "--number", "int4", "--plant", "coarser"],
        &["no number is coarser than int4"],
    );
}

#[test]
fn what_cannot_be_asked_is_refused_before_it_runs() {
    let home = Home::new();
    home.tokens("beyond", &[&[1, 256]], None);
    let says = |code: i32, model: &str, more: &[&str], said: &[&str]| {
        let ran = home.karat(&[&["formats", "--model", model][..], more].concat());
        assert_eq!((ran.code, ran.out.as_str()), (code, ""), "{more:?}: {ran:?}");
        let last = ran.err.lines().last().unwrap_or_default();
        assert!(said.iter().all(|said| ran.err.contains(said)), "{more:?}: {said:?} in {last}");
    };
    let tiny = "synthetic:tiny";
    says(2, tiny, &["--number", "int3"], &["int3", "bf16"]);
    says(2, tiny, &["--number", "bf16,int8,int3"], &["int3", "bf16"]);
    says(2, tiny, &["--plant", "nan"], &["nan", "coarser"]);
    says(2, tiny, &["--random", "1"], &["--random"]);
    says(2, tiny, &["--judged", "0"], &["--judged"]);
    says(2, tiny, &["--random", "4000000000"], &["--random", "context"]);
    says(2, tiny, &["--tokens", "nowhere"], &["nowhere"]);
    says(2, tiny, &["--tokens", "beyond"], &["input_ids", "vocab_size"]);
    says(2, tiny, &["--tokens", "beyond", "--random", "3"], &["--random"]);
    says(2, tiny, &["--against", "synthetic:slice"], &["--against", "151936", "256"]);
    says(2, tiny, &["--cache", "c", "--plant", "coarser"], &["--cache"]);
    says(2, tiny, &["--cache", "c"], &["--cache", "int8 and int4"]);
    says(2, "synthetic:tiny,dtype=fp8", &["--number", "int8"], &["FP8"]);
    says(2, "nowhere", &[], &["nowhere/config.json"]);
    says(9, "synthetic:official", &["--number", "bf16"], &["memory: cpu in bf16 needs", "weights"]);
}
