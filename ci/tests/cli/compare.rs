//! `compare`: what any engine wrote, against a recording or another file.

use std::{collections::BTreeMap, fs};

use safetensors::{Dtype, tensor::TensorView};
use serde_json::Value;

use super::home::{Home, golden, tensors};

type File = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

const DECODE: [&str; 2] = ["--golden", "golden/recordings/decode"];

fn write(home: &Home, name: &str, file: &File) {
    let views = file.iter().map(|(name, (dtype, shape, data))| {
        (name.clone(), TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    fs::write(home.path(name), safetensors::serialize(views, None).unwrap()).unwrap();
}

fn recording(id: &str) -> File {
    tensors(&golden().join("recordings").join(id).join("recording.safetensors"))
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
}

fn bytes(x: &[f32]) -> Vec<u8> {
    x.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// Tensors of one prompt of a recording, without its name.
fn prompt(id: &str, prompt: &str, taps: &[&str]) -> File {
    let file = recording(id);
    let tap = |tap: &&str| ((*tap).to_owned(), file[&format!("{prompt}/{tap}")].clone());
    taps.iter().map(tap).collect()
}

/// The `k` most likely tokens of every row in place of logits.
fn listed(file: &mut File, k: usize) {
    let (_, shape, data) = file.remove("logits").unwrap();
    let [b, t, v] = shape[..] else { panic!("{shape:?}") };
    let (mut ids, mut logprobs) = (Vec::new(), Vec::new());
    for row in floats(&data).chunks(v) {
        let sum = row.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
        let mut order: Vec<usize> = (0..v).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
        for &id in &order[..k] {
            ids.extend((id as i64).to_le_bytes());
            logprobs.extend(((f64::from(row[id]) - sum) as f32).to_le_bytes());
        }
    }
    file.insert("topk_ids".to_owned(), (Dtype::I64, vec![b, t, k], ids));
    file.insert("topk_logprobs".to_owned(), (Dtype::F32, vec![b, t, k], logprobs));
}

fn run(home: &Home, args: &[&str]) -> (i32, Vec<Value>) {
    let ran = home.karat(&[&["compare"][..], args, &["--format", "jsonl"]].concat());
    (ran.code, ran.lines())
}

fn check<'a>(line: &'a Value, what: &str) -> &'a Value {
    line["checks"].as_array().unwrap().iter().find(|check| check["what"] == what).unwrap()
}

#[test]
fn two_files_end_as_the_numbers_do() {
    let home = Home::new();
    home.tokens("t", &[&[1, 2, 3]], None);
    let logits = ["logits", "--model", "synthetic:tiny", "--out", "out", "--tokens"];
    home.ends(0, &[&logits[..], &["t"]].concat());
    fs::copy(home.path("out"), home.path("same")).unwrap();
    fs::copy(home.path("out"), home.path("other")).unwrap();
    home.poke("other", "logits", 4 * 300, &9.0_f32.to_le_bytes());
    fs::copy(home.path("out"), home.path("nan")).unwrap();
    home.poke("nan", "logits", 4 * 300, &f32::NAN.to_le_bytes());
    let (code, lines) = run(&home, &["same", "out"]);
    assert_eq!(
        (code, &lines[0]["ok"], &lines[0]["rel_rms"]["value"]),
        (0, &Value::from(true), &Value::from(0.0))
    );
    assert!(lines[0]["delta_nll"].is_null(), "no prompt beside the logits");
    let (code, lines) = run(&home, &["other", "out"]);
    assert_eq!((code, &lines[0]["ok"]), (3, &Value::from(false)));
    let (code, lines) = run(&home, &["nan", "out"]);
    assert_eq!((code, &lines[0]["first_not_finite"]), (3, &serde_json::json!([0, 1])));
    home.says(2, &["compare", "t", "out"], &["t: tensor logits: missing", "topk_ids"]);
    home.says(2, &["compare", "same", "nowhere"], &["nowhere: No such file"]);
    home.ends(2, &["compare", "same"]);
    home.says(
        2,
        &["compare", "same", "out", "--plan", "bf16"],
        &["a file has no noise of its own"],
    );
    home.tokens("t2", &[&[1, 2]], None);
    let short = ["logits", "--model", "synthetic:tiny", "--out", "short", "--tokens", "t2"];
    home.ends(0, &short);
    home.says(2, &["compare", "short", "out"], &["expected shape [1, 3, 256], got [1, 2, 256]"]);
    // With the prompt beside them the next tokens are known, and have to be the same.
    let mut with = tensors(&home.path("out"));
    with.extend(tensors(&home.path("t")));
    write(&home, "with", &with);
    let (code, lines) = run(&home, &["with", "out"]);
    assert_eq!((code, &lines[0]["delta_nll"]["n"]), (0, &Value::from(2)));
    write(&home, "else", &with);
    home.poke("else", "input_ids", 16, &4_i64.to_le_bytes());
    home.says(2, &["compare", "else", "with"], &["row 0: token 2 is 4, 3 was asked"]);
}

#[test]
fn a_recording_is_compared_prompt_by_prompt() {
    let home = Home::with(&["decode"]);
    let all = recording("decode");
    write(&home, "all", &all);
    let (code, lines) = run(&home, &[&["all"][..], &DECODE].concat());
    assert_eq!(code, 0);
    let names: Vec<_> =
        lines.iter().map(|line| (line["prompt"].as_str(), line["tap"].as_str())).collect();
    assert_eq!(
        names,
        [
            (Some("t65-n32"), Some("logits")),
            (Some("t65-n32"), Some("step_logits")),
            (Some("t1-n8"), Some("logits")),
            (Some("t1-n8"), Some("step_logits")),
            (None, None),
        ]
    );
    assert_eq!(
        (&lines[4]["kind"], &lines[4]["passed"]),
        (&Value::from("summary"), &Value::from(4))
    );
    // One prompt, by the name that it has or that it is given.
    let taps = ["input_ids", "logits", "step_logits", "generated"];
    let one = prompt("decode", "t1-n8", &taps);
    write(&home, "one", &one);
    home.says(
        2,
        &[&["compare", "one"][..], &DECODE].concat(),
        &["--prompt: expected one of t65-n32, t1-n8"],
    );
    let (code, lines) = run(&home, &[&["one", "--prompt", "t1-n8"][..], &DECODE].concat());
    assert_eq!((code, lines.len()), (0, 3));
    assert_eq!(run(&home, &[&["all", "--prompt", "t1-n8"][..], &DECODE].concat()).0, 0);
    let refused = |file: &str, prompt: &str, said: &[&str]| {
        home.says(2, &[&["compare", file, "--prompt", prompt][..], &DECODE].concat(), said);
    };
    refused("one", "t2", &["no prompt t2, expected one of t65-n32, t1-n8"]);
    refused("one", "t65-n32", &["tensor input_ids: expected shape [1, 65], got [1, 1]"]);
    home.says(8, &["compare", "one", "--golden", "nowhere"], &["nowhere/manifest.json"]);
    // Part of a recording is told, not passed over.
    let mut part = all.clone();
    part.retain(|name, _| !name.starts_with("t1-n8/"));
    write(&home, "part", &part);
    home.says(2, &[&["compare", "part"][..], &DECODE].concat(), &["tensor t1-n8/logits: missing"]);
    // Other tokens than were asked, in the prompt or after it.
    write(&home, "fed", &one);
    home.poke("fed", "input_ids", 0, &3_i64.to_le_bytes());
    refused(
        "fed",
        "t1-n8",
        &["row 0: token 0 is 3", "logits after other tokens cannot be compared"],
    );
    write(&home, "fed", &one);
    home.poke("fed", "generated", 8, &3_i64.to_le_bytes());
    refused("fed", "t1-n8", &["tensor generated: other tokens"]);
    // Another vocabulary.
    let mut narrow = one.clone();
    let (_, shape, data) = narrow.get_mut("logits").unwrap();
    shape[2] -= 1;
    data.truncate(data.len() - 4);
    write(&home, "narrow", &narrow);
    refused("narrow", "t1-n8", &["vocabulary of 255, expected 256"]);
    // A prompt taken on trust is said to be.
    let mut bare = one.clone();
    bare.remove("input_ids");
    write(&home, "bare", &bare);
    let err = home.ends(0, &[&["compare", "bare", "--prompt", "t1-n8"][..], &DECODE].concat());
    assert!(
        err.contains("input_ids: missing, so that the right tokens were fed is taken on trust"),
        "{err}"
    );
}

#[test]
fn the_plan_and_the_recordings_noise_decide() {
    let home = Home::with(&["yarn"]);
    let dir = ["--golden", "golden/recordings/yarn", "--prompt", "t200"];
    let file = recording("yarn");
    let mut bf16 = prompt("yarn", "t200", &["input_ids"]);
    bf16.insert("logits".to_owned(), file["t200/bf16.logits"].clone());
    write(&home, "bf16", &bf16);
    // The official bf16 run is bf16, and not f32.
    assert_eq!(run(&home, &[&["bf16"][..], &dir].concat()).0, 3);
    let (code, lines) = run(&home, &[&["bf16", "--plan", "bf16"][..], &dir].concat());
    assert_eq!(code, 0, "{lines:?}");
    let rms = check(&lines[0], "relative RMS");
    // Twice its own noise is allowed, so it uses half.
    let used = rms["value"].as_f64().unwrap() / rms["allowed"].as_f64().unwrap();
    assert!((used - 0.5).abs() < 1e-3, "{rms}");
    assert!(0 < lines[0]["legal_flips"].as_u64().unwrap() && lines[0]["illegal_flips"] == 0);
    // Three times as far off is too far for bf16 too.
    let want = floats(&file["t200/logits"].2);
    let far: Vec<f32> =
        floats(&bf16["logits"].2).iter().zip(&want).map(|(g, w)| w + 3.0 * (g - w)).collect();
    bf16.get_mut("logits").unwrap().2 = bytes(&far);
    write(&home, "far", &bf16);
    assert_eq!(run(&home, &[&["far", "--plan", "bf16"][..], &dir].concat()).0, 3);
    // Where bf16 was not recorded nothing says what it may be off.
    let path = home.path("golden/recordings/yarn/manifest.json");
    let text = fs::read_to_string(&path).unwrap();
    let mut manifest: Value = serde_json::from_str(&text).unwrap();
    manifest["self_noise"]["t200/logits"].as_object_mut().unwrap().remove("bf16");
    fs::write(&path, manifest.to_string()).unwrap();
    home.says(
        2,
        &[&["compare", "bf16", "--plan", "bf16"][..], &dir].concat(),
        &["no bf16 run of t200/logits was recorded"],
    );
}

#[test]
fn listed_tokens_are_compared_as_far_as_they_go() {
    let home = Home::with(&["yarn"]);
    let dir = ["--golden", "golden/recordings/yarn", "--prompt", "t200", "--plan", "bf16"];
    let file = recording("yarn");
    let mut got = prompt("yarn", "t200", &["input_ids"]);
    got.insert("logits".to_owned(), file["t200/bf16.logits"].clone());
    write(&home, "whole", &got);
    let whole = run(&home, &[&["whole"][..], &dir].concat()).1.remove(0);
    listed(&mut got, 16);
    write(&home, "listed", &got);
    let (code, lines) = run(&home, &[&["listed"][..], &dir].concat());
    assert_eq!(code, 0, "{lines:?}");
    let line = &lines[0];
    assert_eq!(
        (&line["layout"], &line["kl_is"]),
        (&Value::from("listed"), &Value::from("at least"))
    );
    // What a list cannot tell is absent, not zero.
    for absent in ["nmse", "rel_rms", "worst_row", "nmse_denominator"] {
        assert!(line[absent].is_null(), "{absent}: {line}");
    }
    for same in ["top1", "topk", "legal_flips", "illegal_flips", "smallest_margin"] {
        assert_eq!(line[same], whole[same], "{same}");
    }
    assert!(line["kl"]["mean"].as_f64().unwrap() <= whole["kl"]["mean"].as_f64().unwrap());
    assert_eq!(line["logprobs"]["n"], 16 * 200);
    // Next tokens that are not listed are not counted.
    assert!(line["delta_nll"]["n"].as_u64().unwrap() < whole["delta_nll"]["n"].as_u64().unwrap());
    let human = home.karat(&[&["compare", "listed"][..], &dir].concat());
    assert!(human.out.contains("absent: they need every logit"), "{}", human.out);
    // Wrong lists.
    let refused = |change: &dyn Fn(&mut File), said: &str| {
        let mut file = got.clone();
        change(&mut file);
        write(&home, "wrong", &file);
        home.says(2, &[&["compare", "wrong"][..], &dir].concat(), &[said]);
    };
    let poke = |name: &'static str, with: Vec<u8>| {
        move |file: &mut File| file.get_mut(name).unwrap().2[..with.len()].copy_from_slice(&with)
    };
    refused(
        &|file| drop(file.remove("topk_ids")),
        "tensor topk_ids: missing, though there are topk_logprobs",
    );
    refused(&|file| drop(file.remove("topk_logprobs")), "tensor topk_logprobs: missing");
    refused(&poke("topk_logprobs", bytes(&[0.25])), "0.25 of id");
    refused(&poke("topk_ids", (-2_i64).to_le_bytes().to_vec()), "row 0, column 0: id -2");
    refused(
        &poke("topk_ids", 256_i64.to_le_bytes().to_vec()),
        "token 256 is outside the vocabulary of 256",
    );
    refused(&poke("topk_ids", vec![0xff; 16 * 8]), "row 0, column 0: nothing is listed");
    refused(
        &|file| {
            let ids = &mut file.get_mut("topk_ids").unwrap().2;
            let (first, rest) = ids.split_at_mut(8);
            rest[..8].copy_from_slice(first);
        },
        "twice",
    );
    // A place that holds nothing is no token.
    let mut fewer = got.clone();
    poke("topk_ids", vec![])(&mut fewer);
    let last = 15 * 8;
    fewer.get_mut("topk_ids").unwrap().2[last..last + 8].fill(0xff);
    write(&home, "fewer", &fewer);
    let (code, lines) = run(&home, &[&["fewer"][..], &dir].concat());
    assert_eq!((code, &lines[0]["logprobs"]["n"]), (0, &Value::from(16 * 200 - 1)));
    // An engine that is wrong about one likely token.
    write(&home, "off", &got);
    home.poke("off", "topk_logprobs", 0, &(-7.0_f32).to_le_bytes());
    assert_eq!(run(&home, &[&["off"][..], &dir].concat()).0, 3);
}

#[test]
fn some_positions_are_enough() {
    let home = Home::with(&["left-pad"]);
    let dir = ["--golden", "golden/recordings/left-pad", "--prompt", "b4"];
    let file = prompt("left-pad", "b4", &["input_ids", "attention_mask", "logits"]);
    let (_, shape, data) = &file["logits"];
    let [b, t, v] = shape[..] else { panic!() };
    // The last row of each sequence.
    let row = |i: usize| data[4 * v * (i * t + t - 1)..][..4 * v].to_vec();
    let mut last = file.clone();
    last.insert("logits".to_owned(), (Dtype::F32, vec![b, 1, v], (0..b).flat_map(row).collect()));
    write(&home, "last", &last);
    let compare = |file: &'static str| [&["compare", file][..], &dir].concat();
    home.says(2, &compare("last"), &["expected shape [4, 70, 256], got [4, 1, 256]", "positions"]);
    let positions = |at: [i64; 4]| {
        (Dtype::I64, vec![4, 1], at.iter().flat_map(|at| at.to_le_bytes()).collect::<Vec<u8>>())
    };
    let last_column = t as i64 - 1;
    last.insert("positions".to_owned(), positions([last_column; 4]));
    write(&home, "last", &last);
    let (code, lines) = run(&home, &compare("last")[1..]);
    assert_eq!((code, &lines[0]["rows"]), (0, &Value::from(4)));
    for (at, said) in
        [(last_column + 1, "is no token"), (-1, "column -1 is no token"), (0, "is no token")]
    {
        let mut wrong = last.clone();
        wrong.insert("positions".to_owned(), positions([at; 4]));
        write(&home, "wrong", &wrong);
        home.says(2, &compare("wrong"), &["tensor positions: row", said]);
    }
    // Rows at padding hold anything.
    let mut padded = file.clone();
    let mask = &file["attention_mask"].2;
    let short = (0..b).find(|i| mask[8 * i * t] == 0).expect("some sequence is padded");
    padded.get_mut("logits").unwrap().2[4 * v * short * t..][..4]
        .copy_from_slice(&f32::NAN.to_le_bytes());
    write(&home, "padded", &padded);
    assert_eq!(run(&home, &compare("padded")[1..]).0, 0);
}

/// A recording of the official model keeps the most likely tokens alone.
#[test]
fn a_recording_of_listed_tokens_judges_whole_logits() {
    let home = Home::with(&["tied"]);
    let mut file = recording("tied");
    let got = prompt("tied", "t33", &["input_ids", "logits"]);
    write(&home, "got", &got);
    let (_, shape, data) = file.remove("t33/logits").unwrap();
    let [b, t, v] = shape[..] else { panic!() };
    let (mut ids, mut logits, mut sums) = (Vec::new(), Vec::new(), Vec::new());
    for row in floats(&data).chunks(v) {
        let mut order: Vec<usize> = (0..v).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
        ids.extend(order[..32].iter().flat_map(|&id| (id as i64).to_le_bytes()));
        logits.extend(order[..32].iter().flat_map(|&id| row[id].to_le_bytes()));
        sums.extend(row.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln().to_le_bytes());
    }
    file.insert("t33/topk.ids".to_owned(), (Dtype::I64, vec![b, t, 32], ids));
    file.insert("t33/topk.logits".to_owned(), (Dtype::F32, vec![b, t, 32], logits));
    file.insert("t33/logsumexp".to_owned(), (Dtype::F64, vec![b, t], sums));
    write(&home, "golden/recordings/tied/recording.safetensors", &file);
    let bytes = fs::read(home.path("golden/recordings/tied/recording.safetensors")).unwrap();
    let path = home.path("golden/recordings/tied/manifest.json");
    let mut manifest: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    manifest["taps"].as_array_mut().unwrap().retain(|tap| tap["name"] != "t33/logits");
    manifest["recording"]["bytes"] = bytes.len().into();
    manifest["recording"]["blake3"] = blake3::hash(&bytes).to_hex().as_str().into();
    fs::write(&path, manifest.to_string()).unwrap();
    let dir = ["--golden", "golden/recordings/tied"];
    let (code, lines) = run(&home, &[&["got"][..], &dir].concat());
    assert_eq!(
        (code, &lines[0]["layout"], &lines[0]["rows"]),
        (0, &Value::from("listed"), &Value::from(33))
    );
    assert_eq!(lines[0]["top1"]["mean"], 1.0);
    // A token that the recording does not list takes the lead.
    home.poke("got", "logits", 0, &400.0_f32.to_le_bytes());
    let (code, lines) = run(&home, &[&["got"][..], &dir].concat());
    assert_eq!((code, &lines[0]["illegal_flips"]), (3, &Value::from(1)));
}
