//! What is exported comes back, and what is not known is refused by name.

use std::{fs, path::Path};

use golden::Set;
use proptest::prelude::*;
use serde_json::{Value, json};

use benches::{
    registry,
    trace::{self, Imported, export, import},
};

#[test]
fn every_problem_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    for op in trace::ops() {
        let entry = registry::op(op).unwrap();
        for spec in entry.specs(Set::Smoke).into_iter().chain(["N1-D1;dtype=bf16".to_owned()]) {
            let Ok(parsed) = entry.parse(&spec) else { continue };
            let trace = export(entry, &spec).unwrap();
            let id = format!("{op}/{spec}");
            // Without the tensors, sizes and type are left.
            let alone = import(&trace.definition, &trace.workload, Path::new("none")).unwrap();
            let (_, alone_spec) = alone.id.split_once('/').unwrap();
            let again = entry.parse(alone_spec).unwrap();
            if parsed.fill != "packed" {
                assert_eq!((&again.sizes, again.dtype), (&parsed.sizes, parsed.dtype), "{id}");
            }
            // With them, everything.
            let place = folder.path().join(&trace.blob);
            fs::create_dir_all(place.parent().unwrap()).unwrap();
            fs::write(&place, &trace.tensors).unwrap();
            let want = Imported { id, same: true, remark: None };
            assert_eq!(import(&trace.definition, &trace.workload, folder.path()), Ok(want));
        }
    }
}

/// As the data set writes them.
fn prefill(change: &dyn Fn(&mut Value, &mut Value)) -> Result<Imported, String> {
    let fixed = |size: u64| json!({"type": "const", "value": size});
    let mut definition = json!({
        "name": "gdn_prefill_qk4_v8_d128_k_last", "op_type": "gdn",
        "axes": {"total_seq_len": {"type": "var"}, "num_seqs": {"type": "var"}, "num_q_heads": fixed(4),
                 "num_k_heads": fixed(4), "num_v_heads": fixed(8), "head_size": fixed(128),
                 "len_cu_seqlens": {"type": "var"}},
        "inputs": {"q": {"shape": ["total_seq_len", "num_q_heads", "head_size"], "dtype": "bfloat16"}},
    });
    let mut workload = json!({"uuid": "u", "axes": {"total_seq_len": 66, "num_seqs": 2, "len_cu_seqlens": 3}, "inputs": {}});
    change(&mut definition, &mut workload);
    import(&definition, &workload, Path::new("."))
}

#[test]
fn the_data_set_is_read() {
    let got = prefill(&|_, _| {}).unwrap();
    assert_eq!(got.id, "gated_delta_rule/B2-T33-HK4-HV8-K128-V128;dtype=bf16");
    let got = prefill(&|_, w| w["axes"]["total_seq_len"] = json!(67)).unwrap();
    assert_eq!(got.id, "gated_delta_rule/B2-T34-HK4-HV8-K128-V128;dtype=bf16;fill=packed");
    assert!(got.remark.unwrap().contains("67 tokens in 2 ragged sequences became 68"));
    // A whole trace, and a workload of its own.
    let got =
        prefill(&|_, w| *w = json!({"definition": "d", "workload": w.clone(), "solution": null}))
            .unwrap();
    assert!(!got.same);
}

/// As the data set writes ragged prefill.
fn ragged(total_q: u64, total_kv: u64, len_indptr: u64) -> Result<Imported, String> {
    let (fixed, free) =
        (|size: u64| json!({"type": "const", "value": size}), json!({"type": "var"}));
    let definition = json!({
        "name": "gqa_ragged_prefill_causal_h32_kv8_d128", "op_type": "gqa_ragged",
        "axes": {"num_qo_heads": fixed(32), "num_kv_heads": fixed(8), "head_dim": fixed(128),
                 "len_indptr": free, "total_q": free, "total_kv": free},
        "inputs": {"q": {"shape": ["total_q", "num_qo_heads", "head_dim"], "dtype": "bfloat16"}},
    });
    let axes = json!({"len_indptr": len_indptr, "total_q": total_q, "total_kv": total_kv});
    import(&definition, &json!({"uuid": "u", "axes": axes, "inputs": {}}), Path::new("."))
}

#[test]
fn ragged_attention_is_read() {
    let got = ragged(66, 130, 3).unwrap();
    assert_eq!(got.id, "attention/B2-T33-TK65-HQ32-HKV8-H128;dtype=bf16");
    let got = ragged(67, 130, 3).unwrap();
    assert_eq!(got.id, "attention/B2-T34-TK65-HQ32-HKV8-H128;dtype=bf16;fill=packed");
    assert!(got.remark.unwrap().contains("67 queries and 130 keys in 2 ragged sequences"));
    assert!(ragged(9, 9, 1).unwrap_err().contains("len_indptr: expected at least 2"));
    assert!(ragged(9, 8, 2).unwrap_err().contains("total_kv 8: expected at least total_q, 9"));
    assert!(ragged(u64::MAX, u64::MAX, 2).is_err());
}

#[test]
fn what_is_not_known_is_refused_by_name() {
    let axis = |name: &str| json!({"type": "const", "value": name.len()});
    for (change, said) in [
        (
            &(|d: &mut Value, _: &mut Value| d["axes"]["page_size"] = axis("page_size"))
                as &dyn Fn(&mut Value, &mut Value),
            "axis page_size is unknown here",
        ),
        (&|_, w| w["axes"]["pages"] = json!(1), "axis pages is not in the definition"),
        (
            &|d, _| d["op_type"] = json!("mla_paged"),
            "op_type \"mla_paged\": expected one of rmsnorm, gemm, gdn, gqa_ragged",
        ),
        (&|_, w| w["axes"]["num_seqs"] = json!(0), "len_cu_seqlens: expected num_seqs + 1"),
        (
            &|_, w| w["axes"] = json!({"total_seq_len": 1, "num_seqs": 0, "len_cu_seqlens": 1}),
            "num_seqs: expected at least 1",
        ),
        (&|_, w| w["axes"] = json!({"total_seq_len": 66}), "axis num_seqs: expected a size"),
        (&|_, w| w["axes"]["total_seq_len"] = json!(-4), "axis total_seq_len: expected a size"),
        (&|_, w| w["axes"]["total_seq_len"] = json!(u64::MAX), "expected T<n>"),
        (
            &|d, _| d["axes"]["num_q_heads"] = json!({"type": "const", "value": 2}),
            "num_q_heads 2: expected num_k_heads, 4",
        ),
        (&|d, _| d["axes"]["num_v_heads"] = json!({"type": "const", "value": 7}), "HV"),
        (
            &|d, _| d["axes"]["head_size"] = json!({"type": "perhaps"}),
            "axis head_size: expected type const or var",
        ),
        (&|d, _| d["inputs"]["q"]["dtype"] = json!("float4_e2m1"), "input q: dtype float4_e2m1"),
        (&|d, _| d["inputs"] = json!([]), "inputs: expected an object"),
        (&|d, _| *d = json!("no"), "name: expected text"),
        (&|_, w| *w = Value::Null, "uuid: expected text"),
    ] {
        let error = prefill(change).expect_err(said);
        assert!(error.contains(said), "{error}");
    }
}

#[test]
fn a_blob_is_looked_for_inside_only() {
    let folder = tempfile::tempdir().unwrap();
    let entry = registry::op("rms_norm").unwrap();
    let trace = export(entry, "N3-D7;fill=outlier").unwrap();
    fs::create_dir(folder.path().join("root")).unwrap();
    fs::write(folder.path().join("outside"), &trace.tensors).unwrap();
    let mut workload = trace.workload.clone();
    workload["workload"]["inputs"]["x"]["path"] = json!("../outside");
    for input in ["residual", "weight"] {
        workload["workload"]["inputs"][input] = json!({"type": "random"});
    }
    let got = import(&trace.definition, &workload, &folder.path().join("root")).unwrap();
    assert_eq!((got.id.as_str(), got.same), ("rms_norm/N3-D7", false));
}

proptest! {
    #[test]
    fn nothing_panics(key in "axes|inputs|name|op_type|uuid|[a-z]{1,8}", text in ".{0,40}", number in any::<u64>()) {
        for value in [json!(text), json!(number), json!([number]), json!({ text.clone(): number }),
                      json!({ text.clone(): {"type": "const", "value": number} }), Value::Null] {
            let _ = prefill(&|d, _| d[&key] = value.clone());
            let _ = prefill(&|_, w| w[&key] = value.clone());
            let _ = prefill(&|d, w| { d["axes"][&key] = value.clone(); w["axes"][&text] = value.clone(); });
        }
    }
}
