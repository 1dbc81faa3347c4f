//! `bisect`: where an engine, a kernel or a file of answers goes wrong.

use std::{
    fs,
    process::{Command, Stdio},
    time::Duration,
};

use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};

use super::home::{Home, copy};

fn summary(lines: &[Value]) -> (Value, Value) {
    let last = lines.last().unwrap();
    (last["part"].clone(), last["ops"].clone())
}

#[test]
fn an_engine_is_wrong_in_a_layer_and_an_op() {
    let home = Home::new();
    let ran = home.karat(&["bisect"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(ran.out.ends_with("nothing is to blame\n"), "{ran:?}");

    let ran = home.karat(&["bisect", "--plant", "kv-cache-lost"]);
    assert_eq!(ran.code, 3, "{ran:?}");
    assert!(ran.out.contains("first to blame: layer 1, rope, attention\n"), "{ran:?}");
    assert!(ran.out.contains("only tokens of a continuation"), "{ran:?}");
    assert!(ran.out.ends_with("repro: karat bisect --plant kv-cache-lost\n"), "{ran:?}");

    let lines =
        home.karat(&["bisect", "--plant", "yarn-scale-dropped", "--format", "jsonl"]).lines();
    assert_eq!(summary(&lines), (json!("layer 1"), json!(["rope"])));
    let row = lines.iter().find(|line| line["part"] == "layer 0").unwrap();
    assert_eq!((&row["kind"], &row["ok"]), (&json!("bisect"), &json!(true)));
    let op = lines.iter().find(|line| line["op"] == "rope").unwrap();
    assert!(op["first"]["at"].is_array() && op["findings"][0]["rule"] == "derived", "{op}");

    home.tokens("t.safetensors", &[&[1, 2, 3, 4, 5, 6]], None);
    let tiny = ["bisect", "--model", "synthetic:tiny", "--tokens", "t.safetensors"];
    home.ends(0, &tiny);
    home.ends(3, &[&tiny[..], &["--plant", "conv-state-lost"]].concat());
    // Fed at once no state is read: nothing can be seen of it, which proves nothing.
    let ran = home.karat(&[&tiny[..], &["--plant", "conv-state-lost", "--split", "6"]].concat());
    assert_eq!(ran.code, 3, "{ran:?}");
    assert!(!ran.out.contains("nothing is to blame"), "{ran:?}");
    assert!(ran.out.contains("conv-state-lost was not seen by this comparison: "), "{ran:?}");
    home.says(2, &[&tiny[..], &["--split", "4"]].concat(), &["sum to 6"]);
    home.says(2, &["bisect", "--plant", "nope"], &["expected one of swap-b-a"]);
    home.says(2, &["bisect", "--against", "nope"], &["expected reference or golden:DIR"]);
}

#[test]
fn a_kernel_is_wrong_in_an_op_inside() {
    let home = Home::new();
    let job = "gdn_layer/B2-T9-D24-HK2-HV4-K8-V6-W4@cpu/portable";
    home.ends(0, &["bisect", job]);
    let ran = home.karat(&["bisect", job, "--plant", "dt-bias-dropped"]);
    assert_eq!(ran.code, 3, "{ran:?}");
    assert!(ran.out.contains("OVER gdn_gates g\n"), "{ran:?}");
    assert!(ran.out.contains("  first g["), "{ran:?}");
    let lines =
        home.karat(&["bisect", job, "--plant", "dt-bias-dropped", "--format", "jsonl"]).lines();
    assert_eq!(summary(&lines).1, json!(["gdn_gates", "gdn_layer"]));
    home.says(2, &["bisect", "gdn_layer/B1"], &["expected op/spec@device/algorithm"]);
    home.says(2, &["bisect", "nope/B1@cpu/portable"], &["expected one of embedding"]);
}

#[test]
fn a_recording_names_the_layer_and_the_reference_the_op() {
    let home = Home::with(&["layers"]);
    let bisect = |more: &[&str]| {
        let args = ["bisect", "--against", "golden:layers", "--prompt", "t3", "--format", "jsonl"];
        home.karat(&[&args[..], more].concat())
    };
    let honest = bisect(&[]);
    assert_eq!(honest.code, 0, "{honest:?}");
    let wrong = bisect(&["--plant", "swap-gate-up"]);
    assert_eq!(wrong.code, 3, "{wrong:?}");
    assert_eq!(summary(&wrong.lines()), (json!("layer 0"), json!(["moe_experts"])));
    let wrong = bisect(&["--plant", "qk-norm-missing-plus-one"]);
    assert_eq!(summary(&wrong.lines()), (json!("layer 3"), json!(["rms_norm"])));
    // The steps after a prompt are asked as well.
    let home = Home::with(&["decode", "layers"]);
    let args = ["bisect", "--against", "golden:decode", "--prompt", "t1-n8", "--format", "jsonl"];
    let ran = home.karat(&[&args[..], &["--plant", "recurrent-state-lost"]].concat());
    assert_eq!((ran.code, summary(&ran.lines()).1), (3, json!(["gated_delta_rule"])), "{ran:?}");
    // The official code in bf16, by its emulation.
    assert_eq!(home.karat(&["golden", "verify", "layers", "--number", "bf16"]).code, 0);
    home.ends(3, &["golden", "verify", "layers", "--number", "bf16", "--plant", "dt-bias-dropped"]);
}

#[test]
fn sketches_name_the_layer_without_the_checkpoint() {
    let home = Home::with(&["layers"]);
    home.ends(0, &["bisect", "--against", "golden:layers", "--prompt", "t3"]);
    copy(&home.path("target/karat/checkpoints/layers"), &home.path("model"));
    home.poke(
        "model/model.safetensors",
        "model.layers.2.linear_attn.out_proj.weight",
        0,
        &9.0_f32.to_le_bytes(),
    );
    home.tokens("t.safetensors", &[&prompt(&home)], None);
    let logits = ["logits", "--model", "model", "--tokens", "t.safetensors", "--taps", "hidden"];
    home.ends(0, &[&logits[..], &["--out", "got.safetensors"]].concat());
    sketched(&home);
    // Of logits these sketches have nothing, and nothing judged is nothing passed.
    write(&home, "logits.safetensors", "logits", Dtype::F32, &[1, 3, vocabulary(&home)]);
    let few = ["bisect", "--against", "golden:./golden/recordings/few", "--prompt", "t3"];
    let file = ["--engine", "file:logits.safetensors"];
    home.says(2, &[&few[..], &file].concat(), &["it holds nothing that few has of t3"]);
    fs::remove_dir_all(home.path("model")).unwrap();
    fs::remove_dir_all(home.path("target/karat/checkpoints")).unwrap();
    let ran = home.karat(&[
        "bisect",
        "--against",
        "golden:./golden/recordings/few",
        "--engine",
        "file:got.safetensors",
        "--prompt",
        "t3",
        "--format",
        "jsonl",
    ]);
    assert_eq!(ran.code, 3, "{ran:?}");
    let lines = ran.lines();
    assert_eq!(summary(&lines), (json!("layer 2"), json!([])));
    let unknown = lines.last().unwrap()["unknown"].to_string();
    assert!(unknown.contains("only sketches") && unknown.contains("a file can be fed nothing"));
}

#[test]
fn a_file_that_answers_something_else_is_refused() {
    let home = Home::with(&["layers", "ops"]);
    let bisect = ["bisect", "--against", "golden:layers", "--prompt", "t3"];
    let file = [&bisect[..], &["--engine", "file:f"]].concat();
    write(&home, "f", "hidden.2", Dtype::F32, &[1, 3, 64]);
    home.ends(3, &file);
    home.says(2, &[&file[..], &["--plant", "swap-b-a"]].concat(), &["--plant", "file"]);
    write(&home, "f", "hidden.2", Dtype::BF16, &[1, 3, 64]);
    home.says(2, &file, &["f: tensor hidden.2: expected F32, got BF16"]);
    write(&home, "f", "hidden.2", Dtype::F32, &[1, 3, 10]);
    home.says(2, &file, &["f: tensor hidden.2: expected shape [1, 3, 64]", "got [1, 3, 10]"]);
    for name in ["hidden.9", "hidden.x"] {
        write(&home, "f", name, Dtype::F32, &[1, 3, 64]);
        let expected = format!("f: tensor {name}: expected hidden.0 … hidden.4 or logits");
        home.says(2, &file, &[&expected]);
    }
    let ragged = [&bisect[..], &["--model", "synthetic:ragged"]].concat();
    home.says(
        2,
        &ragged,
        &["layers: recorded of another model: ", "num_hidden_layers: expected 4, got 5"],
    );
    home.says(2, &["bisect", "--against", "golden:ops"], &["ops: a recording of no whole model"]);
    let final_norm = [&bisect[..], &["--plant", "missing-plus-one", "--format", "jsonl"]].concat();
    assert_eq!(summary(&home.karat(&final_norm).lines()), (json!("head"), json!(["rms_norm"])));
    // One token has no states to lose.
    let one = ["bisect", "--against", "golden:layers", "--prompt", "t1"];
    let ran = home.karat(&[&one[..], &["--plant", "conv-state-lost"]].concat());
    assert_eq!(ran.code, 3, "{ran:?}");
    assert!(ran.out.contains("conv-state-lost was not seen by this comparison: "), "{ran:?}");
}

/// Answers of an engine on another machine, held against the reference that goes on with them.
#[test]
fn answers_of_a_file_are_held_against_a_checkpoint() {
    let home = Home::new();
    home.tokens(
        "t.safetensors",
        &[&[1, 2, 3, 4, 5, 6], &[0, 7, 8, 9, 1, 2]],
        Some(&[&[1; 6], &[0, 1, 1, 1, 1, 1]]),
    );
    let asked = ["--model", "synthetic:ragged", "--tokens", "t.safetensors"];
    let taps = ["--taps", "hidden,routing", "--engine", "cpu", "--number", "bf16"];
    home.ends(0, &[&["logits"][..], &asked, &taps, &["--out", "got"]].concat());
    let file = [&["bisect", "--engine", "file:got"][..], &asked].concat();
    let ran = home.karat(&file);
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(ran.out.contains("-bf16 against reference/f64\n"), "{ran:?}");
    assert!(ran.out.contains("layer 4 to the head") && ran.out.contains("on its own: KL "));
    // It says that it rounds less than it does.
    fs::write(home.path("plan.toml"), "[plan]\noutput = \"f32\"\n").unwrap();
    let ran = home.karat(&[&file[..], &["--plan", "plan.toml", "--format", "jsonl"]].concat());
    assert_eq!((ran.code, summary(&ran.lines()).0), (3, json!("layer 0")), "{ran:?}");
    let loss = ran.lines().into_iter().find(|line| line["part"] == "logits").unwrap();
    assert!(loss["ok"] == false && loss["kl_allowed"].as_f64() < loss["kl_own"].as_f64(), "{loss}");
    fs::write(home.path("plan.toml"), "[plan]\noutput = \"f33\"\n").unwrap();
    home.says(2, &[&file[..], &["--plan", "plan.toml"]].concat(), &["plan.toml: ", "f33"]);

    let sound = fs::read(home.path("got")).unwrap();
    home.poke("got", "hidden.3", 0, &9.0_f32.to_le_bytes());
    let lines = home.karat(&[&file[..], &["--format", "jsonl"]].concat()).lines();
    assert_eq!(summary(&lines).0, json!("layer 2"));
    fs::write(home.path("got"), &sound).unwrap();
    home.says(
        2,
        &[&file[..], &["--split", "5,1"]].concat(),
        &["--split: answers of a file are as they are"],
    );
    home.says(2, &["bisect", "--engine", "file:got"], &["expected --model and --tokens"]);
    home.poke("got", "experts.1", 0, &(-1_i64).to_le_bytes());
    home.says(2, &file, &["got: tensor experts.", "got -1"]);
    home.ends(
        0,
        &[&["logits"][..], &asked, &taps[2..], &["--taps", "hidden", "--out", "got"]].concat(),
    );
    home.says(2, &file, &["got: tensor experts.", "missing, expected I64 [B, T, "]);
    write(&home, "got", "hidden.0", Dtype::F32, &[2, 6, 24]);
    home.says(2, &file, &["got: does not say how it rounds: expected --plan FILE with a [plan]"]);
}

/// Ctrl-C in the middle of walks, and of a kernel and its judge, that take minutes.
#[test]
fn an_interrupt_ends_it() {
    let home = Home::new();
    let kernel = "gated_delta_rule/B1-T4096-HK16-HV32-K128-V128@cpu/portable";
    let long =
        [&["bisect", "--model", "synthetic:slice"][..], &["bisect", kernel], &["bench", kernel]];
    for args in long {
        let mut child =
            home.command(args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(1500));
        assert!(child.try_wait().unwrap().is_none(), "{args:?}: it should still be computing");
        let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
        assert!(sent.success());
        // Minutes are left of each of them.
        let over = (0..300).any(|_| {
            std::thread::sleep(Duration::from_millis(100));
            child.try_wait().unwrap().is_some()
        });
        assert!(over, "{args:?}: still there");
        let ended = child.wait_with_output().unwrap();
        assert_eq!(ended.status.code(), Some(130), "{args:?}");
        assert_eq!(String::from_utf8_lossy(&ended.stderr).trim(), "karat: interrupted");
    }
}

/// A file with one tensor of zeros.
fn write(home: &Home, file: &str, name: &str, dtype: Dtype, shape: &[usize]) {
    let data = vec![0; shape.iter().product::<usize>() * dtype.bitsize() / 8];
    let view = TensorView::new(dtype, shape.to_vec(), &data).unwrap();
    fs::write(home.path(file), safetensors::serialize([(name, view)], None).unwrap()).unwrap();
}

fn vocabulary(home: &Home) -> usize {
    let (manifest, _) = recording(home, "layers");
    manifest["checkpoint"]["config"]["vocab_size"].as_u64().unwrap() as usize
}

fn recording(home: &Home, id: &str) -> (Value, Vec<u8>) {
    let read = |file: &str| fs::read(home.path(&format!("golden/recordings/{id}/{file}"))).unwrap();
    (serde_json::from_slice(&read("manifest.json")).unwrap(), read("recording.safetensors"))
}

fn prompt(home: &Home) -> Vec<i64> {
    let (_, data) = recording(home, "layers");
    let parsed = SafeTensors::deserialize(&data).unwrap();
    let ids = parsed.tensor("t3/input_ids").unwrap();
    ids.data().as_chunks::<8>().0.iter().map(|&b| i64::from_le_bytes(b)).collect()
}

/// The prompt `t3` of the recording `layers` as one of the official checkpoint would be kept: sketches in
/// place of hidden states.
fn sketched(home: &Home) {
    let (mut manifest, data) = recording(home, "layers");
    let parsed = SafeTensors::deserialize(&data).unwrap();
    let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for (name, tensor) in parsed.tensors() {
        if name.starts_with("t3/hidden.") {
            let x: Vec<f64> = tensor
                .data()
                .as_chunks::<4>()
                .0
                .iter()
                .map(|&b| f64::from(f32::from_le_bytes(b)))
                .collect();
            let sketch = golden::sketch::sketch(&name, x.iter().copied());
            let bytes: Vec<u8> = sketch.iter().flat_map(|x| x.to_le_bytes()).collect();
            tensors.push((format!("{name}.sketch"), Dtype::F64, vec![sketch.len()], bytes));
        } else if name == "t3/input_ids" {
            let data = tensor.data().to_vec();
            tensors.push((name, tensor.dtype(), tensor.shape().to_vec(), data));
        }
    }
    let views = tensors.iter().map(|(name, dtype, shape, data)| {
        (name.as_str(), TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    let data = safetensors::serialize(views, None).unwrap();
    let hash = |data: &[u8]| blake3::hash(data).to_hex().to_string();
    manifest["id"] = json!("few");
    manifest["prompts"].as_array_mut().unwrap().retain(|prompt| prompt["id"] == "t3");
    manifest["taps"] = tensors.iter().map(|(name, dtype, shape, data)| {
        let dtype = if *dtype == Dtype::F64 { "f64" } else { "i64" };
        json!({"name": name, "shape": shape, "dtype": dtype, "tier": "sketch", "blake3": hash(data)})
    }).collect();
    manifest["recording"]["bytes"] = json!(data.len());
    manifest["recording"]["blake3"] = json!(hash(&data));
    let folder = home.path("golden/recordings/few");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("recording.safetensors"), data).unwrap();
    fs::write(folder.join("manifest.json"), manifest.to_string()).unwrap();
}
