//! Everything that can be wrong with a checkpoint gets one line that names it.

use std::{fs, path::Path};

use proptest::prelude::*;
use serde_json::{Value, json};

use super::{Checkpoint, header, parse_index};
use crate::{Dtype, Weights, config::Preset, synth, synthetic::Synthetic};

/// A tiny checkpoint in a folder of its own, in shards of `shard` bytes.
fn write(dtype: Dtype, shard: u64) -> (tempfile::TempDir, std::path::PathBuf, Synthetic) {
    let mut config = Preset::Tiny.config(Some(4), Some(4)).unwrap();
    config.hidden_size = 24;
    config.moe_intermediate_size = 20;
    let mut config = config.stored_as(dtype);
    if let Some(fp8) = &mut config.fp8 {
        fp8.weight_block_size = [16, 16];
    }
    let weights = Synthetic::new(config, 5);
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("model");
    let options = synth::Options { shard_bytes: shard, force: false };
    synth::write(&weights, &dir, options, &mut |_, _| true).unwrap();
    (root, dir, weights)
}

fn refused(dir: &Path) -> String {
    let line = Checkpoint::open(dir).expect_err("it is damaged").0;
    assert!(!line.contains('\n'), "{line}");
    line
}

/// Rewrites the header of the only shard.
fn edit(dir: &Path, change: impl FnOnce(&mut Value)) {
    let path = dir.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let length = u64::from_le_bytes(*bytes.first_chunk::<8>().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    change(&mut header);
    let text = header.to_string();
    let mut new = (text.len() as u64).to_le_bytes().to_vec();
    new.extend(text.as_bytes());
    new.extend(&bytes[8 + length..]);
    fs::write(&path, new).unwrap();
}

/// Where a tensor's bytes are in the only shard.
fn place(dir: &Path, name: &str) -> (usize, usize) {
    let bytes = fs::read(dir.join("model.safetensors")).unwrap();
    let found =
        header::parse(&bytes).unwrap().into_iter().find(|(tensor, ..)| tensor == name).unwrap();
    (found.2.start, found.2.end)
}

fn poke(dir: &Path, at: usize, with: &[u8]) {
    let path = dir.join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    bytes[at..at + with.len()].copy_from_slice(with);
    fs::write(&path, bytes).unwrap();
}

#[test]
fn what_was_written_is_read_back() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::Fp8] {
        for shard in [1 << 40, 20_000] {
            let (_root, dir, weights) = write(dtype, shard);
            let checkpoint = Checkpoint::open(&dir).unwrap();
            assert_eq!(checkpoint.config(), weights.config());
            let mut names = weights.names();
            names.sort();
            assert_eq!(checkpoint.names(), names);
            for name in names {
                let (a, b) = (checkpoint.fetch(&name).unwrap(), weights.fetch(&name).unwrap());
                assert_eq!((a.dtype, &a.shape, &a.data), (b.dtype, &b.shape, &b.data), "{name}");
                let once = checkpoint.pass(&name).unwrap();
                assert_eq!((&once.meta.shape, once.data()), (&b.shape, &*b.data), "{name}");
                if 1 < a.shape[0] {
                    let rows = checkpoint.fetch_rows(&name, 1..2).unwrap();
                    assert_eq!(rows.data, weights.fetch_rows(&name, 1..2).unwrap().data, "{name}");
                }
            }
            let sharded = dir.join("model.safetensors.index.json").exists();
            assert_eq!(sharded, shard == 20_000);
        }
    }
}

#[test]
fn a_file_that_was_cut_meanwhile_is_refused() {
    let (_root, dir, weights) = write(Dtype::F32, 1 << 40);
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let file = fs::OpenOptions::new().write(true).open(dir.join("model.safetensors")).unwrap();
    file.set_len(5000).unwrap();
    let last = weights.names().into_iter().map(|name| checkpoint.pass(&name)).find_map(Result::err);
    let told = last.unwrap().to_string();
    assert!(told.contains("expected at least") && told.ends_with("got 5000"), "{told}");
}

#[test]
fn fused_experts_answer_one_by_one() {
    let (_root, dir, weights) = write(Dtype::F32, 1 << 40);
    // Put the experts of every layer side by side, as some writers do.
    let mut tensors = Vec::new();
    for entry in crate::names::entries(weights.config(), true) {
        if !entry.name.contains(".experts.") {
            tensors.push((
                entry.name.clone(),
                entry.shape.clone(),
                weights.fetch(&entry.name).unwrap().data.into_owned(),
            ));
        }
    }
    for prefix in (0..4).map(|i| format!("model.layers.{i}")).chain(["mtp.layers.0".to_owned()]) {
        let (mut gate_up, mut down) = (Vec::new(), Vec::new());
        for e in 0..4 {
            let get = |p: &str| {
                weights
                    .fetch(&format!("{prefix}.mlp.experts.{e}.{p}.weight"))
                    .unwrap()
                    .data
                    .into_owned()
            };
            gate_up.extend(get("gate_proj"));
            gate_up.extend(get("up_proj"));
            down.extend(get("down_proj"));
        }
        tensors.push((format!("{prefix}.mlp.experts.gate_up_proj"), vec![4, 40, 24], gate_up));
        tensors.push((format!("{prefix}.mlp.experts.down_proj"), vec![4, 24, 20], down));
    }
    let views: Vec<_> = tensors
        .iter()
        .map(|(name, shape, data)| {
            let view =
                safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), data)
                    .unwrap();
            (name.as_str(), view)
        })
        .collect();
    fs::write(dir.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    let checkpoint = Checkpoint::open(&dir).unwrap();
    for name in weights.names() {
        assert_eq!(
            checkpoint.fetch(&name).unwrap().data,
            weights.fetch(&name).unwrap().data,
            "{name}"
        );
    }
}

#[test]
fn damaged_files_are_named() {
    let (_root, dir, _) = write(Dtype::F32, 1 << 40);
    let path = dir.join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    for (bytes, expected) in [
        (Vec::new(), "expected at least 8 bytes, got 0"),
        (whole[..5].to_vec(), "expected at least 8 bytes, got 5"),
        (whole[..whole.len() - 1].to_vec(), "outside the"),
        ([whole.clone(), vec![0]].concat(), "1 bytes after the last tensor"),
        (
            [u64::MAX.to_le_bytes().to_vec(), whole[8..].to_vec()].concat(),
            "the header claims 18446744073709551615 bytes",
        ),
        (
            [(whole.len() as u64).to_le_bytes().to_vec(), whole[8..].to_vec()].concat(),
            "the header claims",
        ),
        ([2_u64.to_le_bytes().to_vec(), b"[]".to_vec()].concat(), "no JSON object"),
    ] {
        fs::write(&path, bytes).unwrap();
        let line = refused(&dir);
        assert!(line.contains("model.safetensors") && line.contains(expected), "{line}");
    }
    fs::remove_file(&path).unwrap();
    assert!(refused(&dir).contains("neither model.safetensors nor model.safetensors.index.json"));
}

/// A change to a header or an index.
type Damage = fn(&mut Value);

#[test]
fn wrong_headers_name_the_tensor() {
    let cases: &[(&str, Damage, &str)] = &[
        (
            "overlap",
            |h| h["model.norm.weight"]["data_offsets"] = json!([0, 96]),
            "overlaps the tensor before it: expected to start at 96, got 0",
        ),
        (
            "beyond",
            |h| h["model.norm.weight"]["data_offsets"] = json!([0, 1_u64 << 40]),
            "model.norm.weight: data_offsets",
        ),
        (
            "reversed",
            |h| h["model.norm.weight"]["data_offsets"] = json!([96, 0]),
            "model.norm.weight: data_offsets",
        ),
        (
            "shape",
            |h| h["model.norm.weight"]["shape"] = json!([4, 6]),
            "model.norm.weight: expected shape [24], got [4, 6]",
        ),
        (
            "product",
            |h| h["model.norm.weight"]["shape"] = json!([u64::MAX, u64::MAX]),
            "model.norm.weight",
        ),
        (
            "dtype",
            |h| h["model.norm.weight"]["dtype"] = json!("I32"),
            "model.norm.weight: dtype \"I32\"",
        ),
        (
            "integers",
            |h| {
                h["model.norm.weight"]["dtype"] = json!("I64");
                h["model.norm.weight"]["shape"] = json!([12]);
            },
            "model.norm.weight: expected shape [24], got [12]",
        ),
        (
            "missing expert",
            |h| rename(h, "model.layers.1.mlp.experts.2.up_proj.weight", "x"),
            "model.layers.1.mlp.experts.2.up_proj.weight: missing, expected shape [20, 24]",
        ),
        (
            "extra expert",
            |h| {
                rename(
                    h,
                    "model.layers.1.mlp.experts.3.up_proj.weight",
                    "model.layers.1.mlp.experts.4.up_proj.weight",
                );
            },
            "experts.3.up_proj.weight: missing",
        ),
        (
            "extra tensor",
            |h| h["model.extra"] = json!({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),
            "model.extra: expected a tensor of this config",
        ),
    ];
    for (what, change, expected) in cases {
        let (_root, dir, _) = write(Dtype::F32, 1 << 40);
        edit(&dir, change);
        let line = refused(&dir);
        assert!(line.contains(expected), "{what}: {line}");
    }
}

fn rename(header: &mut Value, from: &str, to: &str) {
    let object = header.as_object_mut().unwrap();
    let value = object.remove(from).unwrap();
    object.insert(to.to_owned(), value);
}

#[test]
fn wrong_scales_name_the_tensor() {
    let weight = "model.layers.0.linear_attn.out_proj.weight";
    let scale = "model.layers.0.linear_attn.out_proj.weight_scale_inv";
    for (value, expected) in [
        (0.0_f32, "got 0 at block 0"),
        (-1.0, "got -1 at block 0"),
        (f32::NAN, "got NaN at block 0"),
    ] {
        let (_root, dir, _) = write(Dtype::Fp8, 1 << 40);
        poke(&dir, place(&dir, scale).0, &value.to_le_bytes());
        let line = refused(&dir);
        assert!(line.contains(scale) && line.contains(expected), "{line}");
    }
    let (_root, dir, _) = write(Dtype::Fp8, 1 << 40);
    edit(&dir, |h| rename(h, scale, "unused"));
    assert!(refused(&dir).contains(&format!("{scale}: missing")));
    let (_root, dir, _) = write(Dtype::Fp8, 1 << 40);
    edit(&dir, |h| h[scale]["shape"] = json!([8, 1]));
    assert!(refused(&dir).contains("expected shape [2, 4], got [8, 1]"));
    // A module that must not be quantised, and a config that knows of no quantisation.
    let (_root, dir, _) = write(Dtype::Fp8, 1 << 40);
    let path = dir.join("config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    let whole = config.clone();
    config["quantization_config"]["modules_to_not_convert"] =
        json!([weight.strip_suffix(".weight")]);
    fs::write(&path, config.to_string()).unwrap();
    assert!(refused(&dir).contains("modules_to_not_convert"));
    config = whole;
    config["quantization_config"] = Value::Null;
    fs::write(&path, config.to_string()).unwrap();
    assert!(refused(&dir).contains("no quantization_config"));
}

#[test]
fn weights_that_are_no_numbers_are_found() {
    let (_root, dir, _) = write(Dtype::F32, 1 << 40);
    let name = "model.layers.2.mlp.experts.1.up_proj.weight";
    poke(&dir, place(&dir, name).0 + 4 * 7, &f32::INFINITY.to_le_bytes());
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let found = checkpoint.first_not_finite(&mut |_, _| true).unwrap();
    assert_eq!(found, Some((name.to_owned(), 7, f32::INFINITY)));
    poke(&dir, place(&dir, "model.layers.0.linear_attn.A_log").0, &f32::NEG_INFINITY.to_le_bytes());
    assert!(refused(&dir).contains("A_log: expected finite values, got -inf at 0"));
}

#[test]
fn wrong_indices_name_the_shard() {
    let (_root, dir, _) = write(Dtype::F32, 20_000);
    let path = dir.join("model.safetensors.index.json");
    let whole: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    let cases: &[(Damage, &str)] = &[
        (
            |i| i["weight_map"]["model.norm.weight"] = json!("model-00099-of-00002.safetensors"),
            "names the shard model-00099",
        ),
        (
            |i| i["weight_map"]["model.norm.weight"] = json!("../outside.safetensors"),
            "a file inside the folder",
        ),
        (
            |i| i["weight_map"]["model.norm.weight"] = json!("/etc/passwd"),
            "a file inside the folder",
        ),
        (|i| i["weight_map"]["model.norm.weight"] = json!(3), "expected a file name, got 3"),
        (
            |i| i["weight_map"]["model.ghost"] = i["weight_map"]["model.norm.weight"].clone(),
            "tensor model.ghost: named by the index",
        ),
        (|i| i["weight_map"] = json!({}), "names no tensor"),
        (|i| i["weight_map"] = json!([]), "no object weight_map"),
    ];
    for (change, expected) in cases {
        let mut index = whole.clone();
        change(&mut index);
        fs::write(&path, index.to_string()).unwrap();
        let line = refused(&dir);
        assert!(line.contains(expected), "{line}");
    }
}

#[test]
fn a_stopped_or_failed_write_leaves_nothing() {
    let root = tempfile::tempdir().unwrap();
    let weights = Synthetic::new(Preset::Tiny.config(None, None).unwrap(), 0);
    let options = synth::Options { shard_bytes: 1 << 40, force: false };
    let dir = root.path().join("model");
    let stopped = synth::write(&weights, &dir, options, &mut |done, _| done < 100_000);
    assert!(matches!(stopped, Err(synth::SynthError::Interrupted)));
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    // A place that is taken stays as it is.
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("mine"), "x").unwrap();
    assert!(matches!(
        synth::write(&weights, &dir, options, &mut |_, _| true),
        Err(synth::SynthError::Exists(_))
    ));
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    assert!(dir.join("mine").exists());
}

proptest! {
    #[test]
    fn no_header_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200), text in "\\PC{0,120}") {
        let _ = header::parse(&bytes);
        let mut framed = (text.len() as u64).to_le_bytes().to_vec();
        framed.extend(text.as_bytes());
        framed.extend(&bytes);
        let _ = header::parse(&framed);
    }

    #[test]
    fn no_tensor_entry_panics(shape in proptest::collection::vec(any::<u64>(), 0..4), a in any::<u64>(), b in any::<u64>(), n in 0_usize..64) {
        let text = json!({"x": {"dtype": "F32", "shape": shape, "data_offsets": [a, b]}}).to_string();
        let mut framed = (text.len() as u64).to_le_bytes().to_vec();
        framed.extend(text.as_bytes());
        framed.extend(vec![0; n]);
        let _ = header::parse(&framed);
    }

    #[test]
    fn no_index_panics(text in "\\PC{0,120}") {
        let _ = parse_index(&text);
        let _ = parse_index(&json!({"weight_map": {"a": text}}).to_string());
    }

    #[test]
    fn no_name_of_a_synthetic_model_panics(text in ".{0,40}", key in "layers|experts|dtype|seed|[a-z]{0,5}",
                                           number in any::<u64>(), preset in "tiny|slice") {
        let _ = text.parse::<Synthetic>();
        // More layers than this are right, and slow.
        prop_assume!(!(32..=4096).contains(&number));
        for value in [text.clone(), number.to_string(), format!("-{number}"), format!("{number}0")] {
            let _ = format!("synthetic:{preset},{key}={value}").parse::<Synthetic>();
        }
    }
}
