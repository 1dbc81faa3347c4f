//! The header of a safetensors file, checked against the file before anything is believed.
//!
//! Eight bytes of little-endian length, that many bytes of JSON, then the tensors. The length is
//! checked before the JSON is looked at, offsets before a tensor is.

use std::{ops::Range, path::Path};

use serde_json::Value;

use super::error;
use crate::{
    Dtype,
    weights::{Meta, WeightError},
};

/// Headers of the largest known checkpoints are below 20 MB.
const MAX_HEADER: u64 = 100_000_000;

/// Every tensor of a file: name, type and shape, and where its bytes are.
pub(super) fn read(
    path: &Path,
    file: &[u8],
) -> Result<Vec<(String, Meta, Range<usize>)>, WeightError> {
    parse(file).map_err(|what| error(path, what))
}

/// The same for bytes that have no name.
pub(crate) fn parse(file: &[u8]) -> Result<Vec<(String, Meta, Range<usize>)>, String> {
    let Some(length) = file.first_chunk::<8>() else {
        return Err(format!("expected at least 8 bytes, got {}", file.len()));
    };
    let length = u64::from_le_bytes(*length);
    let rest = file.len() as u64 - 8;
    if MAX_HEADER < length || rest < length {
        return Err(format!(
            "the header claims {length} bytes, the file has {rest} after it began"
        ));
    }
    let (json, data) = file[8..].split_at(length as usize);
    let header: Value =
        serde_json::from_slice(json).map_err(|e| format!("the header is no JSON: {e}"))?;
    let header = header.as_object().ok_or("the header is no JSON object")?;
    let mut tensors = Vec::with_capacity(header.len());
    for (name, value) in header.iter().filter(|(name, _)| *name != "__metadata__") {
        let (meta, bytes) =
            tensor(value, data.len()).map_err(|what| format!("tensor {name}: {what}"))?;
        tensors.push((
            name.clone(),
            meta,
            bytes.start + 8 + json.len()..bytes.end + 8 + json.len(),
        ));
    }
    // Every byte belongs to exactly one tensor.
    let mut order: Vec<_> =
        tensors.iter().map(|(name, _, bytes)| (bytes.start, bytes.end, name)).collect();
    order.sort_unstable();
    let mut end = 8 + json.len();
    for (start, stop, name) in order {
        if start != end {
            let what = if start < end {
                "overlaps the tensor before it"
            } else {
                "leaves a gap before it"
            };
            return Err(format!(
                "tensor {name}: {what}: expected to start at {}, got {}",
                end - 8 - json.len(),
                start - 8 - json.len()
            ));
        }
        end = stop;
    }
    if end != file.len() {
        return Err(format!("{} bytes after the last tensor", file.len() - end));
    }
    Ok(tensors)
}

fn tensor(value: &Value, available: usize) -> Result<(Meta, Range<usize>), String> {
    let kind = value.get("dtype").and_then(Value::as_str).ok_or("no dtype")?;
    let dtype = match kind {
        "F64" => Dtype::F64,
        "F32" => Dtype::F32,
        "F16" => Dtype::F16,
        "BF16" => Dtype::Bf16,
        "F8_E4M3" => Dtype::Fp8,
        "I64" => Dtype::I64,
        "U8" => Dtype::U8,
        _ => return Err(format!("dtype {kind:?}: expected F32, F16, BF16 or F8_E4M3")),
    };
    let sizes = |key: &str| -> Option<Vec<usize>> {
        let list = value.get(key)?.as_array()?;
        list.iter().map(|n| n.as_u64().and_then(|n| usize::try_from(n).ok())).collect()
    };
    let shape = sizes("shape").ok_or("no shape")?;
    let offsets = sizes("data_offsets").filter(|o| o.len() == 2).ok_or("no data_offsets")?;
    let (start, end) = (offsets[0], offsets[1]);
    if end < start || available < end {
        return Err(format!("data_offsets {offsets:?} are outside the {available} bytes of data"));
    }
    let want = shape.iter().try_fold(dtype.size(), |product, &n| product.checked_mul(n));
    if want != Some(end - start) {
        return Err(format!("{kind} of shape {shape:?} does not fill data_offsets {offsets:?}"));
    }
    Ok((Meta { dtype, shape }, start..end))
}
