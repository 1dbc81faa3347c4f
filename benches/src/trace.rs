//! `FlashInfer` Trace: definitions and workloads of ops that both sides know.
//!
//! Schema: `flashinfer_bench/data/{definition,workload,trace}.py` of flashinfer-bench 40e6ca7 and its
//! data set `flashinfer-trace`. What is exported is karat's own formula as a definition, with the very
//! inputs that karat draws as safetensors. What is imported are sizes and types: the data set's `gdn`
//! folds the gates in, leaves normalising to the caller and keeps its state transposed, and karat asks
//! its own question at those sizes.

use std::path::{Component, Path};

use golden::DOMAIN;
use safetensors::{SafeTensors, tensor::TensorView};
use serde_json::{Map, Value, json};

use crate::registry::{self, Drawn, Entry, Parsed};

/// Names of an axis, and where its size comes from.
struct Axis {
    name: &'static str,
    /// Whether it is one of the definition, or one of each workload.
    fixed: bool,
}

/// An op as `FlashInfer` Trace describes it.
struct Described {
    op: &'static str,
    kind: &'static str,
    axes: &'static [Axis],
    /// Inputs and their axes; those that a problem does without are left out.
    inputs: &'static [(&'static str, &'static [&'static str])],
    /// karat's name of an output, the name over there (it may not be that of an input), its axes.
    outputs: &'static [(&'static str, &'static str, &'static [&'static str])],
    reference: &'static str,
    /// The same without the optional inputs.
    plain: Option<&'static str>,
}

const fn fixed(name: &'static str) -> Axis {
    Axis { name, fixed: true }
}

const fn free(name: &'static str) -> Axis {
    Axis { name, fixed: false }
}

const DESCRIBED: &[Described] = &[
    Described {
        op: "rms_norm",
        kind: "rmsnorm",
        axes: &[free("batch_size"), fixed("hidden_size")],
        inputs: &[
            ("x", &["batch_size", "hidden_size"]),
            ("residual", &["batch_size", "hidden_size"]),
            ("weight", &["hidden_size"]),
        ],
        outputs: &[
            ("o", "o", &["batch_size", "hidden_size"]),
            ("h", "h", &["batch_size", "hidden_size"]),
        ],
        reference: include_str!("trace/rms_norm.py"),
        plain: Some(include_str!("trace/rms_norm_alone.py")),
    },
    Described {
        op: "linear",
        kind: "gemm",
        axes: &[free("M"), fixed("N"), fixed("K")],
        inputs: &[("x", &["M", "K"]), ("weight", &["N", "K"])],
        outputs: &[("o", "o", &["M", "N"])],
        reference: include_str!("trace/linear.py"),
        plain: None,
    },
    Described {
        op: "gated_delta_rule",
        kind: "gdn",
        axes: &[
            free("total_seq_len"),
            free("num_seqs"),
            free("len_cu_seqlens"),
            fixed("num_k_heads"),
            fixed("num_v_heads"),
            fixed("key_dim"),
            fixed("value_dim"),
        ],
        inputs: &[
            ("q", &["total_seq_len", "num_k_heads", "key_dim"]),
            ("k", &["total_seq_len", "num_k_heads", "key_dim"]),
            ("v", &["total_seq_len", "num_v_heads", "value_dim"]),
            ("g", &["total_seq_len", "num_v_heads"]),
            ("beta", &["total_seq_len", "num_v_heads"]),
            ("state", &["num_seqs", "num_v_heads", "key_dim", "value_dim"]),
            ("cu_seqlens", &["len_cu_seqlens"]),
        ],
        outputs: &[
            ("o", "o", &["total_seq_len", "num_v_heads", "value_dim"]),
            ("state", "new_state", &["num_seqs", "num_v_heads", "key_dim", "value_dim"]),
        ],
        reference: include_str!("trace/gated_delta_rule.py"),
        plain: None,
    },
];

/// Names of the ops that can be exported.
pub fn ops() -> impl Iterator<Item = &'static str> {
    DESCRIBED.iter().map(|described| described.op)
}

/// A problem as `FlashInfer` Trace has it. Paths start from the root of the data set.
#[derive(Clone, Debug)]
pub struct Exported {
    /// Name of its definition.
    pub name: String,
    /// Kind of the definition: the folder that it is in.
    pub kind: &'static str,
    /// The definition.
    pub definition: Value,
    /// The workload, as a trace without a solution.
    pub workload: Value,
    /// Where the workload says that its tensors are.
    pub blob: String,
    /// The tensors.
    pub tensors: Vec<u8>,
}

/// Writes a problem in the words of `FlashInfer` Trace.
///
/// # Errors
/// If the op is not known there.
pub fn export(entry: &dyn Entry, spec: &str) -> Result<Exported, String> {
    let described = DESCRIBED.iter().find(|described| described.op == entry.name());
    let described = described.ok_or_else(|| {
        format!("{}: not in FlashInfer Trace; there are {}", entry.name(), known())
    })?;
    let parsed = entry.parse(spec)?;
    let drawn = entry.draw(spec)?;
    let tensor = |name: &str| drawn.tensors.iter().find(|tensor| tensor.name == name);
    let mut sizes: Map<String, Value> = Map::new();
    let mut inputs = Map::new();
    let mut given = Map::new();
    let id = format!("{}/{}", entry.name(), parsed.canonical);
    let uuid = uuid(&id);
    let whole = described.inputs.iter().all(|(name, _)| tensor(name).is_some());
    let reference = if whole { described.reference } else { described.plain.unwrap_or_default() };
    let stem = definition_name(described, &drawn, &parsed, whole);
    let blob = format!("blob/workloads/{}/{stem}/{uuid}.safetensors", described.kind);
    for (name, axes) in described.inputs {
        let Some(found) = tensor(name) else { continue };
        for (axis, size) in axes.iter().zip(&found.shape) {
            sizes.insert((*axis).to_owned(), (*size).into());
        }
        inputs.insert((*name).to_owned(), json!({"shape": axes, "dtype": dtype(found.dtype)}));
        let place = json!({"type": "safetensors", "path": blob, "tensor_key": name});
        given.insert((*name).to_owned(), place);
    }
    for (name, value) in &drawn.scalars {
        inputs.insert((*name).to_owned(), json!({"shape": null, "dtype": "float32"}));
        given.insert((*name).to_owned(), json!({"type": "scalar", "value": value}));
    }
    let mut outputs = Map::new();
    for (own, name, axes) in described.outputs {
        if *own == "h" && !whole {
            continue;
        }
        let wide = *own == "state";
        let stored = if wide { "float32" } else { storage(parsed.dtype) };
        outputs.insert((*name).to_owned(), json!({"shape": axes, "dtype": stored}));
    }
    let mut axes = Map::new();
    let mut bound = Map::new();
    for axis in described.axes {
        let Some(size) = sizes.get(axis.name) else { continue };
        if axis.fixed {
            axes.insert(axis.name.to_owned(), json!({"type": "const", "value": size}));
        } else {
            axes.insert(axis.name.to_owned(), json!({"type": "var"}));
            bound.insert(axis.name.to_owned(), size.clone());
        }
    }
    let definition = json!({
        "name": stem, "op_type": described.kind, "tags": ["model:qwen3-next"],
        "description": format!("karat's {}: see `karat explain {}`.", entry.name(), entry.name()),
        "axes": axes, "inputs": inputs, "outputs": outputs, "reference": reference,
    });
    let workload = json!({
        "definition": stem, "workload": {"uuid": uuid, "axes": bound, "inputs": given},
        "solution": null, "evaluation": null,
    });
    let tensors = serialize(&drawn, &id)?;
    Ok(Exported { name: stem, kind: described.kind, definition, workload, blob, tensors })
}

fn known() -> String {
    ops().collect::<Vec<_>>().join(", ")
}

/// One name per set of sizes that are fixed: `karat_rms_norm_add_hidden_size64_float32`.
fn definition_name(described: &Described, drawn: &Drawn, parsed: &Parsed, whole: bool) -> String {
    let mut name = format!("karat_{}", described.op);
    if whole && described.plain.is_some() {
        name.push_str("_add");
    }
    for axis in described.axes.iter().filter(|axis| axis.fixed) {
        let size = described.inputs.iter().find_map(|(input, axes)| {
            let at = axes.iter().position(|name| *name == axis.name)?;
            let found = drawn.tensors.iter().find(|tensor| tensor.name == *input)?;
            found.shape.get(at).copied()
        });
        name = format!("{name}_{}{}", axis.name, size.unwrap_or_default());
    }
    format!("{name}_{}", storage(parsed.dtype))
}

fn storage(dtype: &str) -> &'static str {
    match dtype {
        "bf16" => "bfloat16",
        "f16" => "float16",
        _ => "float32",
    }
}

fn dtype(dtype: safetensors::Dtype) -> &'static str {
    match dtype {
        safetensors::Dtype::BF16 => "bfloat16",
        safetensors::Dtype::F16 => "float16",
        safetensors::Dtype::I64 => "int64",
        _ => "float32",
    }
}

/// A name for a workload that is the same every time.
fn uuid(id: &str) -> String {
    let hash = blake3::hash(id.as_bytes()).to_hex();
    let part = |from: usize, to: usize| &hash[from..to];
    // Version 8: made from whatever its maker likes.
    let parts = [part(0, 8), part(8, 12), part(13, 16), part(17, 20), part(20, 32)];
    format!("{}-{}-8{}-8{}-{}", parts[0], parts[1], parts[2], parts[3], parts[4])
}

/// The tensors, with the problem's id beside them.
fn serialize(drawn: &Drawn, id: &str) -> Result<Vec<u8>, String> {
    let views = drawn.tensors.iter().map(|tensor| {
        let view = TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.data);
        view.map(|view| (tensor.name, view))
    });
    let views = views.collect::<Result<Vec<_>, _>>().map_err(|e| e.to_string())?;
    let note = [(NOTE.to_owned(), id.to_owned())].into();
    safetensors::serialize(views, Some(note)).map_err(|e| e.to_string())
}

/// Under this key the metadata of a blob holds the problem that it was drawn for.
const NOTE: &str = "karat";

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

#[cfg(test)]
mod tests;
