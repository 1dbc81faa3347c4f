//! `FlashInfer` Trace: definitions and workloads of ops that both sides know.
//!
//! Schema: `flashinfer_bench/data/{definition,workload,trace}.py` of flashinfer-bench 40e6ca7 and its
//! data set `flashinfer-trace`. What is exported is karat's own formula as a definition, with the very
//! inputs that karat draws as safetensors. What is imported are sizes and types: the data set's `gdn`
//! folds the gates in, leaves normalising to the caller and keeps its state transposed, its `gqa_ragged`
//! has no output gate, and karat asks its own question at those sizes.

mod import;

use safetensors::tensor::TensorView;
use serde_json::{Map, Value, json};

pub use self::import::{Imported, import};
use crate::registry::{Drawn, Entry, Parsed};

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
    Described {
        op: "attention",
        kind: "gqa_ragged",
        axes: &[
            free("total_q"),
            free("total_kv"),
            free("len_indptr"),
            fixed("num_qo_heads"),
            fixed("num_kv_heads"),
            fixed("head_dim"),
        ],
        inputs: &[
            ("q", &["total_q", "num_qo_heads", "head_dim"]),
            ("k", &["total_kv", "num_kv_heads", "head_dim"]),
            ("v", &["total_kv", "num_kv_heads", "head_dim"]),
            ("gate", &["total_q", "num_qo_heads", "head_dim"]),
            ("cu_seqlens_q", &["len_indptr"]),
            ("cu_seqlens_k", &["len_indptr"]),
        ],
        outputs: &[("o", "o", &["total_q", "num_qo_heads", "head_dim"])],
        reference: include_str!("trace/attention.py"),
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
