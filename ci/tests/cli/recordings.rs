//! `golden`: what is recorded here, whether it holds, and how it changes.

use std::{fs, os::unix::fs::PermissionsExt};

use serde_json::Value;

use super::home::{DIGITS, Home, copy};

#[test]
fn status_says_plainly_that_the_official_model_is_not_recorded() {
    let home = Home::with(&["decode"]);
    let ran = home.karat(&["golden", "status"]);
    assert_eq!(ran.code, 0);
    let official = ran.out.split("\n\n").nth(1).unwrap();
    insta::assert_snapshot!(official);
    // The question that this command asks is there.
    assert!(home.path("golden/questions/official.json").exists());
    let lines = home.karat(&["golden", "status", "--format", "jsonl"]).lines();
    assert_eq!(
        (&lines[1]["recording"], &lines[1]["recorded"]),
        (&"official".into(), &false.into())
    );
    home.says(2, &["golden", "record", "official"], &["--checkpoint says where the weights are"]);
}

/// The fast engine in fewer bits is held to twice what the emulation of its plan loses.
#[test]
fn what_is_lost_in_fewer_bits_is_told() {
    let home = Home::with(&["tied"]);
    let asked = ["golden", "verify", "--engine", "cpu", "--number", "bf16,int8,int4"];
    let ran = home.karat(&[&asked[..], &["--format", "jsonl"]].concat());
    assert_eq!(ran.code, 0, "{}", ran.err);
    // A line for each prompt in each format, and then one for each format.
    let lines = ran.lines();
    let (each, all) = lines.split_at(lines.len() - 3);
    assert!(!each.is_empty() && each.len() % 3 == 0, "{lines:?}");
    for line in each {
        assert_eq!(line["kind"], "golden_format");
        assert!(
            line["mean_kl"].as_f64().unwrap() <= line["mean_kl_allowed"].as_f64().unwrap(),
            "{line}"
        );
    }
    for (line, number) in all.iter().zip(["bf16", "int8", "int4"]) {
        assert_eq!((&line["kind"], &line["number"]), (&"format".into(), &number.into()));
        assert_eq!(line["texts"].as_u64(), Some(each.len() as u64 / 3));
        let own = each.iter().filter(|line| line["number"] == number);
        let most = own.map(|line| line["mean_kl"].as_f64().unwrap()).fold(0.0, f64::max);
        assert!(line["to_f32"]["kl"]["mean"].as_f64().unwrap() <= most, "{line}");
        assert_eq!(line["to_bf16"]["kl"]["mean"] == 0.0, number == "bf16", "{line}");
    }
    let one = ["golden", "verify", "--engine", "cpu", "--number", "int8"];
    assert_eq!(home.karat(&one).code, 0);
    home.says(2, &["golden", "verify", "--engine", "cpu", "--number", "int3"], &["int3", "int8"]);
    home.says(
        2,
        &["golden", "verify", "--number", "f32,f64"],
        &["--number", "cpu and cuda engines"],
    );
}

/// Keys and values in eight bits, with any number, of the only engine that can be told.
#[test]
fn keys_and_values_are_kept_as_it_is_said() {
    let home = Home::with(&["tied"]);
    let verify = ["golden", "verify", "--engine", "cpu", "--format", "jsonl", "--kv-cache"];
    for (number, kept) in [("f32", "int8"), ("bf16", "int8"), ("int4", "f32")] {
        let ran = home.karat(&[&verify[..], &[kept, "--number", number]].concat());
        assert_eq!(ran.code, 0, "{}", ran.err);
        let line = &ran.lines()[0];
        let said = ["kind", "number", "kv_cache"].map(|key| line[key].as_str().unwrap());
        assert_eq!(said, ["golden_format", number, kept]);
    }
    let ran = home.karat(&[&verify[..], &["f32"]].concat());
    assert_eq!((ran.code, &ran.lines()[0]["kind"]), (0, &"golden".into()), "{}", ran.err);
    let bench = ["bench", "--model", "synthetic:tiny", "--rounds", "1", "--prefill", "9"];
    let more = ["--decode", "1", "--depth", "2000", "--kv-cache", "f32,bf16,int8"];
    let ran = home.karat(&[&bench[..], &more[..], &["--format", "jsonl"]].concat());
    assert_eq!(ran.code, 0, "{}", ran.err);
    let lines = ran.lines();
    let kept: Vec<_> = lines.iter().map(|line| line["kv_cache"].as_str().unwrap()).collect();
    assert_eq!(kept, ["f32", "bf16", "int8"]);
    for key in ["/memory_needed/cache", "/traffic/states"] {
        let bytes: Vec<_> =
            lines.iter().map(|line| line.pointer(key).unwrap().as_u64().unwrap()).collect();
        assert!(bytes.is_sorted_by(|a, b| a > b), "{key}: {bytes:?}");
    }
    home.tokens("t", &[&[1, 2, 3]], None);
    let model = ["--model", "synthetic:tiny", "--kv-cache", "int8"];
    let logits = ["logits", "--tokens", "t", "--out", "out"];
    home.ends(0, &[&logits[..], &model, &["--engine", "cpu"]].concat());
    // The reference keeps what it has.
    for command in [
        &logits[..],
        &["bisect"],
        &["paths", "model/"],
        &["invariance", "model/"],
        &["generate", "--tokens", "t", "--max-new", "1"],
    ] {
        home.says(2, &[command, &model].concat(), &["kv-cache int8", "reference"]);
    }
    home.says(2, &["golden", "verify", "--kv-cache", "int8"], &["kv-cache int8", "reference"]);
    let ran = home.karat(&["bisect", "--kv-cache", "int4"]);
    assert_eq!(ran.code, 2, "{}", ran.err);
    let line = ran.err.lines().next().unwrap();
    assert!(
        line.contains("int4") && line.contains("expected one of f32, bf16, int8, fp8"),
        "{line}"
    );
}

/// Who cannot keep keys and values so says what it can, whether the machine has a GPU or not.
#[test]
fn what_is_not_kept_is_refused() {
    let home = Home::with(&["tied"]);
    home.tokens("t", &[&[1, 2, 3]], None);
    for (engine, kept, can) in [("cpu", "fp8", "f32, bf16, int8"), ("cuda", "int8", "f32, fp8")] {
        let asked = ["--engine", engine, "--number", "f32", "--kv-cache", kept];
        for command in [
            &["logits", "--tokens", "t", "--out", "out"][..],
            &["generate", "--tokens", "t", "--max-new", "1"],
            &["bisect"],
            &["paths", "model/"],
            &["invariance", "model/"],
            &["bench"],
            &["scale", "--context", "9"],
        ] {
            let all = [command, &["--model", "synthetic:tiny"], &asked].concat();
            home.says(2, &all, &["kv-cache", kept, can]);
        }
        home.says(2, &[&["golden", "verify"], &asked[..]].concat(), &["kv-cache", kept, can]);
    }
    home.says(2, &["formats", "--model", "synthetic:tiny", "--kv-cache", "fp8"], &["fp8", "int8"]);
}

/// A model is timed beside what the machine can do.
#[test]
fn bench_times_a_model() {
    let home = Home::with(&[]);
    let asked = ["bench", "--model", "synthetic:tiny", "--number", "f32,int8", "--rounds", "1"];
    let more = [
        "--prefill",
        "9",
        "--decode",
        "2",
        "--batch",
        "1,3",
        "--depth",
        "0,300,1100",
        "--fed",
        "300",
        "--format",
        "jsonl",
    ];
    let ran = home.karat(&[&asked[..], &more[..]].concat());
    assert_eq!(ran.code, 0, "{}", ran.err);
    let mut lines = ran.lines();
    let fits = lines.split_off(16);
    assert_eq!(fits.len(), 4);
    for fit in fits {
        assert_eq!((&fit["kind"], &fit["depths"]), (&"bench_fit".into(), &3.into()), "{fit}");
        let finite = ["seconds_at_none", "seconds_per_token", "furthest"];
        assert!(finite.iter().all(|key| fit[key].is_number()), "{fit}");
        assert!(0.0 < fit["seconds_per_token_of_bytes"].as_f64().unwrap(), "{fit}");
    }
    let depths: Vec<_> = lines.iter().map(|line| (&line["depth"], &line["fed"])).collect();
    assert_eq!(depths[2], (&300.into(), &false.into()));
    assert_eq!(depths[6], (&300.into(), &true.into()));
    let batches: Vec<_> = lines.iter().map(|line| line["batch"].as_u64().unwrap()).collect();
    assert_eq!(batches, [[1; 8], [3; 8]].concat());
    // Three sequences read weights once, and states three times.
    for (one, three) in lines[..8].iter().zip(&lines[8..]) {
        let traffic = |key: &str| one["traffic"][key].as_f64().unwrap();
        let step = |line: &serde_json::Value| line["step_bytes"].as_f64().unwrap();
        assert_eq!(step(one), traffic("weights") + traffic("states"), "{one}");
        let [experts, states] = ["experts", "states"].map(traffic);
        let more = step(three) - step(one) - 2.0 * states;
        assert!(0.0 < more && more < 2.0 * experts, "{one} {three}");
    }
    for line in &lines {
        for pace in ["prefill_tokens_per_second", "decode_tokens_per_second"] {
            assert!(0.0 < line[pace]["median"].as_f64().unwrap(), "{line}");
        }
        let bytes = |key: &str| line["memory_needed"][key].as_i64().unwrap();
        assert!(0 < bytes("owned") && 0 < bytes("state") && 0 < bytes("scratch"), "{line}");
        assert_eq!(bytes("mapped"), 0, "a synthetic model has no file: {line}");
        // Of a tiny model everything else is the program itself.
        if let Some(beyond) = line["peak_rss_beyond_bytes"].as_i64() {
            assert!((0..300 << 20).contains(&beyond), "{line}");
            assert!(bytes("owned") < line["peak_rss_bytes"].as_i64().unwrap(), "{line}");
        }
    }
    let cache = |line: &serde_json::Value| line["memory_needed"]["cache"].as_i64().unwrap();
    assert!(cache(&lines[0]) < cache(&lines[4]), "a page more: {lines:?}");
    home.says(2, &["bench", "--model", "synthetic:tiny", "--number", "f31"], &["f31", "bf16"]);
    // What no machine has is said in one line, before it is tried.
    let deep = ["bench", "--model", "synthetic:tiny", "--depth", "9999999999999"];
    home.says(9, &deep, &["memory: cpu in bf16, at depth 9999999999999 needs", "keys and values"]);
    let wide = ["bench", "--model", "synthetic:tiny", "--batch", "65535,2", "--depth", "9M,0,9M"];
    home.says(9, &wide, &["cpu in bf16, 65535 sequences at depth 9437184 needs", "states"]);
    home.ends(2, &["bench", "--model", "synthetic:tiny", "--batch", "65536"]);
    home.ends(2, &["bench", "--model", "synthetic:tiny", "--batch", "1,0"]);
}

/// Narrowed weights are kept in a file and mapped from it; a damaged one is made anew, another stays.
#[test]
fn narrowed_weights_are_kept() {
    let home = Home::with(&[]);
    home.ends(0, &["synth", "--preset", "tiny", "--dtype", "bf16", "--out", "model"]);
    let common = ["bench", "--model", "model", "--rounds", "1", "--prefill", "9", "--decode", "1"];
    let bench =
        |more: &[&str]| home.karat(&[&common[..], &["--format", "jsonl", "--pin"], more].concat());
    let cached = ["--number", "int4", "--cache", "narrowed"];
    let sizes = |ran: &super::home::Ran| {
        assert_eq!(ran.code, 0, "{}", ran.err);
        let line = &ran.lines()[0];
        ["mapped", "owned"].map(|key| line["memory_needed"][key].as_i64().unwrap())
    };
    let [mapped, owned] = sizes(&bench(&["--number", "int4"]));
    let first = sizes(&bench(&cached));
    assert!(mapped < first[0] && first[1] < owned && first[0] + first[1] == mapped + owned);
    let whole = std::fs::read(home.path("narrowed")).unwrap();
    std::fs::write(home.path("narrowed"), &whole[..whole.len() - 9]).unwrap();
    let again = bench(&cached);
    assert!(again.err.contains("damaged") && sizes(&again) == first, "{}", again.err);
    assert!(std::fs::read(home.path("narrowed")).unwrap() == whole);
    assert!(!bench(&cached).err.contains("damaged"));
    let home_says =
        |code, more: &[&str], said: &[&str]| home.says(code, &[&common[..], more].concat(), said);
    home_says(2, &["--number", "int8,int4", "--cache", "narrowed"], &["--cache"]);
    home_says(
        2,
        &["--number", "int4", "--cache", "model/config.json"],
        &["model/config.json", "stays"],
    );
    home_says(9, &["--number", "int4", "--cache", "no/such/place"], &["no/such/place"]);
}

/// Weights of a checkpoint stay in its memory map where the format allows.
#[test]
fn bench_counts_mapped_weights_apart() {
    let home = Home::with(&[]);
    home.ends(0, &["synth", "--preset", "tiny", "--dtype", "bf16", "--out", "model"]);
    let asked = ["bench", "--model", "model", "--number", "bf16,int8", "--rounds", "1"];
    let ran = home
        .karat(&[&asked[..], &["--prefill", "600", "--decode", "1", "--format", "jsonl"]].concat());
    assert_eq!(ran.code, 0, "{}", ran.err);
    let lines = ran.lines();
    let bytes = |i: usize, key: &str| lines[i]["memory_needed"][key].as_i64().unwrap();
    let file = std::fs::metadata(home.path("model/model.safetensors")).unwrap().len() as i64;
    assert!(file / 2 < bytes(0, "mapped") && bytes(0, "mapped") < file, "{lines:?}");
    assert!(bytes(0, "owned") < bytes(1, "owned"), "{lines:?}");
    assert!(bytes(1, "mapped") < bytes(0, "mapped"), "{lines:?}");
}

/// Every fault in the wiring is caught by some recording, which names the first layer that has it.
#[test]
fn every_wiring_fault_is_caught_where_it_is() {
    let faults = [
        ("swap-b-a", "layers", "hidden.1 (layer 0)"),
        ("ungrouped-qkvz", "layers", "hidden.1 (layer 0)"),
        ("interleaved-value-heads", "layers", "hidden.1 (layer 0)"),
        ("recurrent-state-lost", "splits", "hidden.1 (layer 0)"),
        ("conv-state-lost", "splits", "hidden.1 (layer 0)"),
        ("conv-state-shifted", "splits", "hidden.1 (layer 0)"),
        ("gated-norm-plus-one", "layers", "hidden.1 (layer 0)"),
        ("dt-bias-dropped", "layers", "hidden.1 (layer 0)"),
        ("conv-flipped", "layers", "hidden.1 (layer 0)"),
        ("ungrouped-query-gate", "layers", "hidden.4 (layer 3 or the final norm)"),
        ("yarn-scale-dropped", "yarn", "hidden.4 (layer 3 or the final norm)"),
        ("qk-norm-missing-plus-one", "layers", "hidden.4 (layer 3 or the final norm)"),
        ("kv-cache-lost", "splits", "hidden.4 (layer 3 or the final norm)"),
        ("missing-plus-one", "layers", "hidden.4 (layer 3 or the final norm)"),
        ("renormalise-flipped", "layers", "hidden.1 (layer 0)"),
        ("shared-expert-dropped", "layers", "hidden.1 (layer 0)"),
        ("swap-gate-up", "layers", "hidden.1 (layer 0)"),
        ("pre-norm-mtp-hidden", "layers", "hidden.4 (layer 3 or the final norm)"),
        ("mtp-concat-order", "mtp", "mtp_logits (the MTP head)"),
    ];
    let home = Home::with(&["layers", "splits", "yarn", "mtp"]);
    let known = home.karat(&["explain", "--format", "jsonl"]).lines();
    let text = |line: &Value| {
        line["text"].as_str().unwrap().starts_with("fault that can be planted in the model")
    };
    let known: Vec<_> =
        known.iter().filter(|line| text(line)).map(|line| line["name"].clone()).collect();
    assert_eq!(known, faults.map(|(name, ..)| Value::from(name)));
    for (plant, recording, first) in faults {
        let ran = home.karat(&["golden", "verify", recording, "--plant", plant]);
        assert_eq!(ran.code, 3, "{plant}: {ran:?}");
        let found =
            ran.out.lines().find_map(|line| line.strip_prefix("  first tap over its bound: "));
        assert_eq!(found, Some(first), "{plant}: {ran:?}");
        let repro = format!("  repro: karat golden verify {recording} --plant {plant}");
        assert!(ran.out.lines().any(|line| line == repro), "{plant}: {ran:?}");
    }
    let fast = home.karat(&["golden", "verify", "--engine", "cpu", "--format", "jsonl"]);
    assert_eq!(fast.code, 0, "{fast:?}");
    // A fault that nothing shows proves nothing: this checkpoint has no YaRN.
    let unseen = home.karat(&["golden", "verify", "layers", "--plant", "yarn-scale-dropped"]);
    assert_eq!(unseen.code, 3, "{unseen:?}");
    assert!(unseen.out.contains("NOT SEEN  yarn-scale-dropped"), "{unseen:?}");
    home.says(2, &["golden", "verify", "layers", "--plant", "nope"], &["expected one of swap-b-a"]);
    assert_eq!(home.karat(&["golden", "verify", "--format", "jsonl"]).code, 0);
}

#[test]
fn another_checkpoint_is_told_from_a_wrong_one() {
    let home = Home::with(&["layers", "mtp"]);
    home.ends(0, &["golden", "verify", "layers"]);
    let fresh = |name: &str| copy(&home.path("target/karat/checkpoints/layers"), &home.path(name));
    let verify = |model: &str| home.karat(&["golden", "verify", "layers", "--model", model]);
    fresh("same");
    assert_eq!(verify("same").code, 0);

    // A weight that the prompts use.
    fresh("wrong");
    home.poke(
        "wrong/model.safetensors",
        "model.layers.2.linear_attn.out_proj.weight",
        0,
        &1.0_f32.to_le_bytes(),
    );
    let ran = verify("wrong");
    assert_eq!(ran.code, 3, "{ran:?}");
    assert!(ran.out.starts_with("layers: not as recorded: model.safetensors\n"), "{ran:?}");
    assert!(ran.out.contains("  first tap over its bound: hidden.3 (layer 2)\n"), "{ran:?}");
    let fail = ran.out.lines().skip(1).take(6).collect::<Vec<_>>().join("\n");
    insta::with_settings!({filters => DIGITS.to_vec()}, { insta::assert_snapshot!(fail) });

    // One that they do not use.
    fresh("unused");
    home.poke("unused/model.safetensors", "mtp.fc.weight", 0, &1.0_f32.to_le_bytes());
    let ran = verify("unused");
    assert_eq!(ran.code, 8, "{ran:?}");
    assert!(ran.out.starts_with("layers: not as recorded: model.safetensors\n"), "{ran:?}");
    assert!(ran.out.contains("other checkpoint"), "{ran:?}");

    // The same config in other words.
    fresh("worded");
    let config = home.path("worded/config.json");
    let value: Value = serde_json::from_str(&fs::read_to_string(&config).unwrap()).unwrap();
    fs::write(&config, value.to_string()).unwrap();
    let ran = verify("worded");
    assert_eq!(ran.code, 8, "{ran:?}");
    assert!(ran.out.starts_with("layers: not as recorded: config.json\n"), "{ran:?}");
    let json =
        home.karat(&["golden", "verify", "layers", "--model", "worded", "--format", "jsonl"]);
    assert!(
        json.lines()
            .iter()
            .all(|line| line["ok"] == true && line["other_files"][0] == "config.json")
    );

    // One that cannot be asked the same: fewer words than the prompts use.
    home.ends(0, &["synth", "--preset", "tiny", "--out", "tiny"]);
    let path = home.path("tiny/config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    config["vocab_size"] = 7.into();
    fs::write(home.path("small.json"), config.to_string()).unwrap();
    home.ends(0, &["synth", "--config", "small.json", "--out", "small"]);
    home.says(
        8,
        &["golden", "verify", "layers", "--model", "small"],
        &["of another checkpoint: config.json"],
    );
    // One that is no checkpoint.
    home.says(2, &["golden", "verify", "layers", "--model", "nowhere"], &["nowhere/config.json"]);
    home.says(2, &["golden", "verify", "--model", "same"], &["expected one recording"]);
    home.says(8, &["golden", "verify", "nope"], &["no such recording; there are layers, mtp"]);
}

#[test]
fn a_recording_that_is_damaged_or_too_new_is_not_used() {
    let home = Home::with(&["decode", "ops"]);
    let manifest = home.path("golden/recordings/decode/manifest.json");
    let data = home.path("golden/recordings/decode/recording.safetensors");
    let (text, bytes) = (fs::read_to_string(&manifest).unwrap(), fs::read(&data).unwrap());
    let broken = |said: &str| {
        for args in [
            &["golden", "verify", "decode"][..],
            &["golden", "diff", "decode"],
            &["golden", "verify"],
        ] {
            home.says(8, args, &[said]);
        }
        let status = home.karat(&["golden", "status"]);
        assert!(status.code == 8 && status.out.contains(said), "{status:?}");
        fs::write(&manifest, &text).unwrap();
        fs::write(&data, &bytes).unwrap();
    };
    let mut flipped = bytes.clone();
    flipped[bytes.len() / 2] ^= 1;
    fs::write(&data, flipped).unwrap();
    broken("recording.safetensors: damaged: blake3");
    fs::write(&data, &bytes[..bytes.len() - 1]).unwrap();
    broken("damaged: blake3");
    fs::remove_file(&data).unwrap();
    broken("recording.safetensors: No such file");
    fs::write(&manifest, text.replace("karat.golden/1", "karat.golden/2")).unwrap();
    broken(
        "schema \"karat.golden/2\", expected \"karat.golden/1\": made by another version of karat",
    );
    fs::write(&manifest, "{").unwrap();
    broken("manifest.json: EOF");
    fs::write(&manifest, text.replace("\"id\": \"decode\"", "\"id\": \"../../decode\"")).unwrap();
    broken("id: expected a plain name");
    // Per-op recordings are read by check.
    let data = home.path("golden/recordings/ops/recording.safetensors");
    let mut bytes = fs::read(&data).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&data, bytes).unwrap();
    home.says(8, &["check", "l2_norm"], &["damaged: blake3"]);
    assert_eq!(home.karat(&["golden", "verify", "decode"]).code, 0);
}

#[test]
fn a_new_recording_is_seen_before_it_is_accepted() {
    let home = Home::with(&["decode"]);
    let (old, new) =
        (home.path("golden/recordings/decode"), home.path("golden/recordings/decode.new"));
    home.says(
        8,
        &["golden", "diff", "decode"],
        &["no new recording; `karat golden record decode` makes one"],
    );
    home.ends(8, &["golden", "accept", "decode", "--reason", "because"]);
    copy(&old, &new);
    let ran = home.karat(&["golden", "diff", "decode"]);
    assert!(ran.code == 0 && ran.out.contains("taps equal, 0 not"), "{ran:?}");

    let file = "golden/recordings/decode.new/recording.safetensors";
    home.poke(file, "t1-n8/logits", 0, &9.0_f32.to_le_bytes());
    let manifest = new.join("manifest.json");
    let read = |path: &std::path::Path| -> Value {
        serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
    };
    let mut value = read(&manifest);
    let before = value["recording"]["blake3"].clone();
    value["recording"]["blake3"] =
        blake3::hash(&fs::read(home.path(file)).unwrap()).to_hex().to_string().into();
    fs::write(&manifest, value.to_string()).unwrap();
    let ran = home.karat(&["golden", "diff", "decode"]);
    assert!(
        ran.code == 3 && ran.out.contains("1 not") && ran.out.contains("t1-n8/logits"),
        "{ran:?}"
    );
    assert!(home.karat(&["golden", "status"]).out.contains("new one waits"));
    let lines = home.karat(&["golden", "diff", "decode", "--format", "jsonl"]).lines();
    assert_eq!(lines[0]["tap"], "t1-n8/logits");

    home.ends(2, &["golden", "accept", "decode"]);
    home.says(
        2,
        &["golden", "accept", "decode", "--reason", " "],
        &["why the new recording is right"],
    );
    for id in ["..", "../decode", "decode.new", "/", ""] {
        home.says(
            2,
            &["golden", "accept", id, "--reason", "x"],
            &["expected the name of a recording"],
        );
    }
    assert_eq!(home.karat(&["golden", "verify", "decode"]).code, 0);
    home.ends(0, &["golden", "accept", "decode", "--reason", "a test changes it"]);
    assert_eq!(home.names("golden/recordings"), ["decode"]);
    let value = read(&old.join("manifest.json"));
    assert_eq!(value["reason"], "a test changes it");
    assert_eq!(value["supersedes"], before);
    assert_eq!(home.karat(&["golden", "verify", "decode"]).code, 3);
}

/// A manifest whose hash of the data is right can still say things of it that are not.
#[test]
fn a_manifest_that_lies_about_its_tensors_is_refused() {
    let home = Home::with(&["decode", "left-pad"]);
    for (id, key, value) in [
        ("decode", "tokens", Value::from(1000)),
        ("decode", "tokens", 64.into()),
        ("decode", "batch", 7.into()),
        ("decode", "padded", true.into()),
        ("decode", "split", serde_json::json!([64])),
        ("decode", "id", "t2".into()),
        ("left-pad", "padded", false.into()),
        ("left-pad", "tokens", 1.into()),
        ("left-pad", "batch", 1.into()),
        ("left-pad", "kind", "decode".into()),
    ] {
        let path = home.path(&format!("golden/recordings/{id}/manifest.json"));
        let text = fs::read_to_string(&path).unwrap();
        let mut manifest: Value = serde_json::from_str(&text).unwrap();
        manifest["prompts"][0][key] = value.clone();
        fs::write(&path, manifest.to_string()).unwrap();
        let ran = home.karat(&["golden", "verify", id]);
        // A mask that the manifest hides makes other numbers.
        let want = if key == "padded" && id == "left-pad" { 3 } else { 8 };
        assert_eq!(ran.code, want, "{id} {key} {value}: {ran:?}");
        fs::write(&path, text).unwrap();
    }
}

/// How the recorder ends is how karat ends. The recorder itself needs packages that a test cannot ask for.
#[test]
fn the_recorders_end_is_told() {
    let home = Home::with(&["decode"]);
    let python = home.path("python");
    for (script, code, said) in [
        ("exit 2", 2, "refused by the recorder"),
        ("exit 8", 8, "not certain enough"),
        ("exit 9", 9, "unfit to record"),
        ("exit 1", 10, "the recorder ended with 1"),
        ("exit 130", 130, "interrupted"),
        ("kill -KILL $$", 10, "the recorder was killed"),
        ("exit 0", 8, "manifest.json: No such file"),
    ] {
        fs::write(&python, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&python, fs::Permissions::from_mode(0o755)).unwrap();
        home.says(code, &["golden", "record", "decode", "--python", "./python"], &[said]);
    }
    home.says(
        9,
        &["golden", "record", "decode", "--python", "./none"],
        &["--python names another"],
    );
    home.says(2, &["golden", "record", "../x"], &["expected the name of a recording"]);
    home.says(2, &["golden", "record", "nope"], &["questions/nope.json"]);
    home.says(2, &["golden", "record"], &["a question by name, or --all"]);
    assert_eq!(home.names("golden/recordings"), ["decode"]);
}
