//! Workloads as problems of karat.

use std::path::{Component, Path};

use golden::DOMAIN;
use safetensors::SafeTensors;
use serde_json::Value;

use super::{DESCRIBED, NOTE};
use crate::registry;

/// A workload as a problem of karat.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Imported {
    /// `op/spec`.
    pub id: String,
    /// Whether it is that very problem, or one of its sizes and type.
    pub same: bool,
    /// What is not as the workload has it.
    pub remark: Option<String>,
}

/// Reads a workload under its definition; `root` is the folder that its paths start from.
///
/// # Errors
/// One line: an op or an axis that karat does not know, by name, or sizes that are no problem.
pub fn import(definition: &Value, workload: &Value, root: &Path) -> Result<Imported, String> {
    let name = text(definition, "name")?;
    let told = |why: String| format!("definition {name}: {why}");
    let kind = text(definition, "op_type").map_err(told)?;
    let described = DESCRIBED.iter().find(|described| described.kind == kind);
    let described = described.ok_or_else(|| {
        let all: Vec<_> = DESCRIBED.iter().map(|described| described.kind).collect();
        told(format!("op_type {kind:?}: expected one of {}", all.join(", ")))
    })?;
    let entry = registry::op(described.op).ok_or("no such op")?;
    // A trace holds a workload; a workload may stand alone.
    let workload = workload.get("workload").unwrap_or(workload);
    let uuid = text(workload, "uuid").map_err(told)?;
    let told = |why: String| format!("definition {name}, workload {uuid}: {why}");
    if let Some(id) = noted(workload, root)
        && let Some(spec) = id.strip_prefix(&format!("{}/", described.op))
        && let Ok(parsed) = entry.parse(spec)
    {
        let id = format!("{}/{}", described.op, parsed.canonical);
        return Ok(Imported { id, same: true, remark: None });
    }
    let sizes = sizes(definition, workload).map_err(told)?;
    let problem = match described.op {
        "rms_norm" => plain(&sizes, &[("N", "batch_size"), ("D", "hidden_size")]),
        "linear" => plain(&sizes, &[("N", "M"), ("M", "N"), ("D", "K")]),
        "attention" => attention(&sizes),
        _ => delta_rule(&sizes),
    };
    let Problem { case, fill, remark } = problem.map_err(told)?;
    let dtype = stored(definition).map_err(told)?;
    let parsed = entry.parse(&format!("{case};dtype={dtype};fill={fill}")).map_err(told)?;
    Ok(Imported { id: format!("{}/{}", described.op, parsed.canonical), same: false, remark })
}

fn text<'a>(value: &'a Value, key: &str) -> Result<&'a str, String> {
    value.get(key).and_then(Value::as_str).ok_or_else(|| format!("{key}: expected text"))
}

/// Sizes of all axes: those of the definition, then those of the workload.
fn sizes(definition: &Value, workload: &Value) -> Result<Vec<(String, u64)>, String> {
    let axes =
        definition.get("axes").and_then(Value::as_object).ok_or("axes: expected an object")?;
    let bound =
        workload.get("axes").and_then(Value::as_object).ok_or("axes: expected an object")?;
    if let Some(axis) = bound.keys().find(|axis| !axes.contains_key(*axis)) {
        return Err(format!("axis {axis} is not in the definition"));
    }
    let size = |(axis, what): (&String, &Value)| {
        let value = match what.get("type").and_then(Value::as_str) {
            Some("const") => what.get("value"),
            Some("var") => bound.get(axis),
            _ => return Err(format!("axis {axis}: expected type const or var")),
        };
        let size = value.and_then(Value::as_u64);
        let size = size.ok_or_else(|| format!("axis {axis}: expected a size"))?;
        Ok((axis.clone(), size))
    };
    axes.iter().map(size).collect()
}

/// Sizes as karat has them.
struct Problem {
    case: String,
    fill: &'static str,
    remark: Option<String>,
}

/// Letters from axes, all of which must be known.
fn plain(sizes: &[(String, u64)], letters: &[(&str, &str)]) -> Result<Problem, String> {
    let axes: Vec<&str> = letters.iter().map(|(_, axis)| *axis).collect();
    refuse_others(sizes, &axes)?;
    let part = |(letter, axis): &(&str, &str)| {
        Ok(format!(
            "{letter}{}",
            size_of(sizes, axis).ok_or_else(|| format!("axis {axis}: missing"))?
        ))
    };
    let parts = letters.iter().map(part).collect::<Result<Vec<_>, String>>()?;
    Ok(Problem { case: parts.join("-"), fill: DOMAIN, remark: None })
}

fn size_of(sizes: &[(String, u64)], axis: &str) -> Option<u64> {
    sizes.iter().find(|(name, _)| name == axis).map(|&(_, size)| size)
}

fn refuse_others(sizes: &[(String, u64)], known: &[&str]) -> Result<(), String> {
    match sizes.iter().find(|(axis, _)| !known.contains(&axis.as_str())) {
        None => Ok(()),
        Some((axis, _)) => {
            Err(format!("axis {axis} is unknown here; expected {}", known.join(", ")))
        }
    }
}

/// The axes of the data set's prefill, decode and mtp definitions, and those that karat writes.
fn delta_rule(sizes: &[(String, u64)]) -> Result<Problem, String> {
    let known = [
        "total_seq_len",
        "num_seqs",
        "len_cu_seqlens",
        "batch_size",
        "seq_len",
        "num_q_heads",
        "num_k_heads",
        "num_v_heads",
        "head_size",
        "key_dim",
        "value_dim",
    ];
    refuse_others(sizes, &known)?;
    let get = |axis: &str| size_of(sizes, axis);
    let need = |axis: &str| get(axis).ok_or_else(|| format!("axis {axis}: missing"));
    let (hk, hv) = (need("num_k_heads")?, need("num_v_heads")?);
    if let Some(hq) = get("num_q_heads").filter(|&hq| hq != hk) {
        return Err(format!("num_q_heads {hq}: expected num_k_heads, {hk}"));
    }
    let k = get("key_dim").map_or_else(|| need("head_size"), Ok)?;
    let v = get("value_dim").map_or_else(|| need("head_size"), Ok)?;
    let case = |b: u64, t: u64| format!("B{b}-T{t}-HK{hk}-HV{hv}-K{k}-V{v}");
    let equal = |b, t| Problem { case: case(b, t), fill: DOMAIN, remark: None };
    if let Some(batch) = get("batch_size") {
        return Ok(equal(batch, need("seq_len")?));
    }
    let (total, seqs) = (need("total_seq_len")?, need("num_seqs")?);
    if get("len_cu_seqlens").is_some_and(|len| Some(len) != seqs.checked_add(1)) {
        return Err("len_cu_seqlens: expected num_seqs + 1".to_owned());
    }
    if seqs == 0 {
        return Err("num_seqs: expected at least 1, got 0".to_owned());
    }
    if total % seqs == 0 {
        return Ok(equal(seqs, total / seqs));
    }
    let tokens = total.div_ceil(seqs);
    let all = tokens.saturating_mul(seqs);
    let remark = format!("{total} tokens in {seqs} ragged sequences became {all} in ragged ones");
    Ok(Problem { case: case(seqs, tokens), fill: "packed", remark: Some(remark) })
}

/// The axes of the data set's ragged prefill definitions.
fn attention(sizes: &[(String, u64)]) -> Result<Problem, String> {
    let known = ["total_q", "total_kv", "len_indptr", "num_qo_heads", "num_kv_heads", "head_dim"];
    refuse_others(sizes, &known)?;
    let need = |axis: &str| size_of(sizes, axis).ok_or_else(|| format!("axis {axis}: missing"));
    let (queries, keys) = (need("total_q")?, need("total_kv")?);
    let seqs = need("len_indptr")?.saturating_sub(1);
    if seqs == 0 {
        return Err("len_indptr: expected at least 2".to_owned());
    }
    if keys < queries {
        return Err(format!("total_kv {keys}: expected at least total_q, {queries}"));
    }
    let (t, tk) = (queries.div_ceil(seqs), keys.div_ceil(seqs));
    let equal = t.checked_mul(seqs) == Some(queries) && tk.checked_mul(seqs) == Some(keys);
    let [hq, hkv, h] = [need("num_qo_heads")?, need("num_kv_heads")?, need("head_dim")?];
    Ok(Problem {
        case: format!("B{seqs}-T{t}-TK{tk}-HQ{hq}-HKV{hkv}-H{h}"),
        fill: if equal { DOMAIN } else { "packed" },
        remark: (!equal).then(|| {
            let (all, seen) = (t.saturating_mul(seqs), tk.saturating_mul(seqs));
            format!(
                "{queries} queries and {keys} keys in {seqs} ragged sequences became {all} and {seen} in ragged ones"
            )
        }),
    })
}

/// The storage type: that of the first input that holds numbers.
fn stored(definition: &Value) -> Result<&'static str, String> {
    let inputs = definition.get("inputs").and_then(Value::as_object);
    let inputs = inputs.ok_or("inputs: expected an object")?;
    for (name, input) in inputs {
        match input.get("dtype").and_then(Value::as_str) {
            Some("float32") => return Ok("f32"),
            Some("float16") => return Ok("f16"),
            Some("bfloat16") => return Ok("bf16"),
            Some("int64" | "int32" | "int16" | "int8" | "bool") => {}
            Some(other) => {
                let expected = "float32, float16 or bfloat16";
                return Err(format!("input {name}: dtype {other}: expected {expected}"));
            }
            None => return Err(format!("input {name}: expected a dtype")),
        }
    }
    Err("no input holds numbers".to_owned())
}

/// The problem that the blob of a workload says it was drawn for.
fn noted(workload: &Value, root: &Path) -> Option<String> {
    let inputs = workload.get("inputs")?.as_object()?;
    let path = inputs.values().find_map(|input| input.get("path")?.as_str())?;
    let inside = Path::new(path).components().all(|part| matches!(part, Component::Normal(_)));
    let bytes = inside.then(|| std::fs::read(root.join(path)).ok()).flatten()?;
    let (_, metadata) = SafeTensors::read_metadata(&bytes).ok()?;
    metadata.metadata().as_ref()?.get(NOTE).cloned()
}
