//! What runs on the GPU?
//!
//! CUDA C++ as text, one file per op, plainest entry first. It is freestanding: `#include "common/….cuh"`
//! is spliced in here, and nothing else is included, so that a compiler alone is enough. A parameter is
//! bound by its name, and its shape is the comment behind it ([`Parameter`]).

mod signature;

pub use signature::{Entry, Kind, Parameter, Size};

use std::{collections::BTreeSet, fmt::Write};

/// The targets of portable entries: plain f32 code, on every architecture from Ampere on.
pub const PORTABLE: &[&str] = &["sm_80", "sm_90a", "sm_100a"];

/// The target of entries that use what Hopper alone has: warp-group products, bulk copies.
pub const HOPPER: &[&str] = &["sm_90a"];

/// The kernels of an op.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// The op, and what for, where an op has several sources.
    pub op: &'static str,
    /// The file, as messages name it.
    pub file: &'static str,
    /// What it is compiled for.
    pub targets: &'static [&'static str],
    /// What its tensors may be stored in: activations, and weight matrices where those are of a type of
    /// their own.
    stored: &'static [(&'static str, &'static str)],
    text: &'static str,
}

/// Activations and weights of one type.
const WIDE: &[(&str, &str)] = &[("f32", "f32"), ("bf16", "bf16"), ("f16", "f16")];

/// The same, and narrowed weights.
const NARROW: &[(&str, &str)] = &[
    ("f32", "f32"),
    ("bf16", "bf16"),
    ("f16", "f16"),
    ("f32", "Fp8"),
    ("f32", "Int8"),
    ("f32", "Int4"),
];

/// Weights in FP8.
const FP8: &[(&str, &str)] = &[("f32", "Fp8"), ("bf16", "Fp8")];

macro_rules! sources {
    ($all:ident: $targets:ident in $folder:literal; $($source:ident = $op:literal of $stored:expr,)*) => {
        $(
            #[doc = concat!("`", $op, "`.")]
            pub const $source: Source = Source {
                op: $op,
                file: concat!("kernels/src/", $folder, $op, ".cu"),
                targets: $targets,
                stored: $stored,
                text: include_str!(concat!($folder, $op, ".cu")),
            };
        )*

        pub(crate) const $all: &[Source] = &[$($source,)*];
    };
}

sources! {
    PLAIN: PORTABLE in "";
    EMBEDDING = "embedding" of WIDE,
    RMS_NORM = "rms_norm" of WIDE,
    LINEAR = "linear" of NARROW,
    LINEAR_W8A8 = "linear_w8a8" of FP8,
    CAUSAL_CONV1D = "causal_conv1d" of WIDE,
    L2_NORM = "l2_norm" of WIDE,
    GDN_GATES = "gdn_gates" of WIDE,
    GATED_DELTA_RULE = "gated_delta_rule" of WIDE,
    RMS_NORM_GATED = "rms_norm_gated" of WIDE,
    ROPE = "rope" of WIDE,
    ATTENTION = "attention" of WIDE,
    MOE_ROUTER = "moe_router" of WIDE,
    MOE_EXPERTS = "moe_experts" of NARROW,
    MOE_EXPERTS_W8A8 = "moe_experts_w8a8" of FP8,
    SHARED_EXPERT = "shared_expert" of NARROW,
    LM_HEAD = "lm_head" of NARROW,
    SAMPLING = "sampling" of WIDE,
    FP8_DEQUANT = "fp8_dequant" of WIDE,
    ENGINE = "engine" of MODELS,
    ENGINE_EXPERTS = "engine_experts" of MODELS,
    PEAK = "peak" of &[("bf16", "bf16")],
}

/// What the whole model is computed in: activations, and weights as a checkpoint has them.
const MODELS: &[(&str, &str)] = &[
    ("f32", "f32"),
    ("f32", "bf16"),
    ("f32", "f16"),
    ("f32", "Fp8"),
    ("bf16", "f32"),
    ("bf16", "bf16"),
    ("bf16", "f16"),
    ("bf16", "Fp8"),
];

/// Kernels for Hopper.
pub mod hopper {
    use super::{HOPPER, Source, WIDE};

    sources! {
        ALL: HOPPER in "hopper/";
        LINEAR = "linear" of READ,
        GATED_DELTA_RULE = "gated_delta_rule" of ONE,
        GATED_DELTA_RULE_FUSED = "gated_delta_rule_fused" of ONE,
        GATED_DELTA_RULE_FEW = "gated_delta_rule_few" of WIDE,
        ATTENTION_DECODE = "attention_decode" of ONE,
        ATTENTION_DECODE_FP8 = "attention_decode_fp8" of ONE,
        ATTENTION_PREFILL = "attention_prefill" of ONE,
        ATTENTION_PREFILL_FP8 = "attention_prefill_fp8" of ONE,
        MOE_ROUTER = "moe_router" of ONE,
        MOE_EXPERTS = "moe_experts" of READ,
        ENGINE_DELTA = "engine_delta" of ONE,
        PEAK = "peak" of ONE,
    }

    const ONE: &[(&str, &str)] = &[("bf16", "bf16")];

    /// Weights as tensor cores read them, or in FP8.
    const READ: &[(&str, &str)] =
        &[("bf16", "bf16"), ("f32", "bf16"), ("f32", "Fp8"), ("bf16", "Fp8")];
}

/// Every source: ops in the model's order, then what the whole model needs beside them; the portable ones
/// first.
pub fn sources() -> impl Iterator<Item = &'static Source> {
    PLAIN.iter().chain(hopper::ALL)
}

/// Headers, by the one name under which they are included.
const HEADERS: &[(&str, &str)] = &[
    ("common/activation.cuh", include_str!("common/activation.cuh")),
    ("common/attention_decode.cuh", include_str!("common/attention_decode.cuh")),
    ("common/attention_prefill.cuh", include_str!("common/attention_prefill.cuh")),
    ("common/block.cuh", include_str!("common/block.cuh")),
    ("common/codes.cuh", include_str!("common/codes.cuh")),
    ("common/delta_chunk.cuh", include_str!("common/delta_chunk.cuh")),
    ("common/delta_parts.cuh", include_str!("common/delta_parts.cuh")),
    ("common/delta_rule.cuh", include_str!("common/delta_rule.cuh")),
    ("common/delta_walk.cuh", include_str!("common/delta_walk.cuh")),
    ("common/early.cuh", include_str!("common/early.cuh")),
    ("common/fp8.cuh", include_str!("common/fp8.cuh")),
    ("common/gemm.cuh", include_str!("common/gemm.cuh")),
    ("common/gemm_w8a8.cuh", include_str!("common/gemm_w8a8.cuh")),
    ("common/gemv.cuh", include_str!("common/gemv.cuh")),
    ("common/grouped_attention.cuh", include_str!("common/grouped_attention.cuh")),
    ("common/keep.cuh", include_str!("common/keep.cuh")),
    ("common/mma.cuh", include_str!("common/mma.cuh")),
    ("common/order.cuh", include_str!("common/order.cuh")),
    ("common/rows.cuh", include_str!("common/rows.cuh")),
    ("common/stored.cuh", include_str!("common/stored.cuh")),
    ("common/w8a8.cuh", include_str!("common/w8a8.cuh")),
    ("common/weight.cuh", include_str!("common/weight.cuh")),
    ("common/wgmma.cuh", include_str!("common/wgmma.cuh")),
];

/// What tensors of a build are stored in, as the text names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Build {
    /// Of activations, `E`.
    pub activations: &'static str,
    /// Of weight matrices, `W`; of sources that may have narrow ones.
    pub weights: Option<&'static str>,
}

impl Source {
    /// The text that a compiler gets: every header once, and every line under the name of its file.
    ///
    /// # Panics
    /// If a header is included that there is not.
    pub fn text(&self) -> String {
        let mut text = String::new();
        splice(self.file, self.text, &mut BTreeSet::new(), &mut text);
        text
    }

    /// Its kernels, in the order of the file.
    ///
    /// # Panics
    /// If a signature is written in another way than those here.
    pub fn entries(&self) -> Vec<Entry> {
        signature::entries(self.file, self.text)
    }

    /// The number of a fault that can be planted, by its name in a table of faults.
    pub fn plant(&self, name: &str) -> Option<i32> {
        let text = self.text();
        let list = text.split_once("enum Plant {")?.1.split_once('}')?.0;
        let name = name.replace('-', "_").to_uppercase();
        let at = list.split(',').position(|known| known.trim() == name)?;
        i32::try_from(at).ok()
    }

    /// Whether weight matrices have a type of their own.
    pub fn narrow(&self) -> bool {
        self.stored.iter().any(|(activations, weights)| activations != weights)
    }

    /// What it can be compiled for.
    pub fn builds(&self) -> Vec<Build> {
        let of = |&(activations, weights): &(&'static str, &'static str)| Build {
            activations,
            weights: Some(weights).filter(|_| self.narrow()),
        };
        self.stored.iter().map(of).collect()
    }
}

fn splice(file: &str, from: &str, seen: &mut BTreeSet<&'static str>, to: &mut String) {
    let _ = writeln!(to, "#line 1 \"{file}\"");
    for (at, line) in from.lines().enumerate() {
        if let Some(name) = line.strip_prefix("#include ") {
            let name = name.trim_matches('"');
            let found = HEADERS.iter().find(|(known, _)| *known == name);
            let (name, text) = found.unwrap_or_else(|| panic!("{file}: no header {name}"));
            if seen.insert(name) {
                splice(&format!("kernels/src/{name}"), text, seen, to);
            }
            let _ = writeln!(to, "#line {} \"{file}\"", at + 2);
        } else {
            to.push_str(line);
            to.push('\n');
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{HEADERS, PLAIN, Source, sources};

    #[test]
    fn every_line_is_told_of_its_own_file() {
        for source in sources() {
            let text = source.text();
            let (mut file, mut number) = (String::new(), 0);
            for line in text.lines() {
                if let Some(rest) = line.strip_prefix("#line ") {
                    let (at, name) = rest.split_once(' ').unwrap();
                    (file, number) = (name.trim_matches('"').to_owned(), at.parse().unwrap());
                    continue;
                }
                let header = HEADERS.iter().find(|(name, _)| file == format!("kernels/src/{name}"));
                let of = header.map_or(source.text, |(_, text)| text);
                assert_eq!(of.lines().nth(number - 1), Some(line), "{file}:{number}");
                number += 1;
            }
            assert_eq!(file, source.file);
            for (_, header) in HEADERS {
                assert!(text.matches(header.lines().next().unwrap()).count() <= 1, "{file}");
            }
        }
    }

    #[test]
    fn entries_are_named_after_their_op_and_told_at_the_head_of_the_file() {
        for source in sources() {
            let entries = source.entries();
            assert!(!entries.is_empty(), "{}", source.file);
            let head = source.text.split("\n\n").next().unwrap();
            for entry in entries {
                let of_op = |plain: &Source| {
                    source.op.starts_with(plain.op) && entry.name.starts_with(plain.op)
                };
                assert!(PLAIN.iter().any(of_op), "{}", entry.name);
                assert!(head.contains(&format!("// {}:", entry.name)), "{}", entry.name);
            }
        }
    }
}
