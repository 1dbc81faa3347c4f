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

/// The kernels of an op.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// The op.
    pub op: &'static str,
    /// The file, as messages name it.
    pub file: &'static str,
    /// What it is compiled for.
    pub targets: &'static [&'static str],
    text: &'static str,
}

macro_rules! sources {
    ($($source:ident = $op:literal,)*) => {
        $(
            #[doc = concat!("`", $op, "`.")]
            pub const $source: Source = Source {
                op: $op,
                file: concat!("kernels/src/", $op, ".cu"),
                targets: PORTABLE,
                text: include_str!(concat!($op, ".cu")),
            };
        )*

        /// Every source: ops in the model's order, then what the whole model needs beside them.
        pub const SOURCES: &[Source] = &[$($source,)*];
    };
}

sources! {
    EMBEDDING = "embedding",
    RMS_NORM = "rms_norm",
    LINEAR = "linear",
    CAUSAL_CONV1D = "causal_conv1d",
    L2_NORM = "l2_norm",
    GDN_GATES = "gdn_gates",
    GATED_DELTA_RULE = "gated_delta_rule",
    RMS_NORM_GATED = "rms_norm_gated",
    ROPE = "rope",
    ATTENTION = "attention",
    MOE_ROUTER = "moe_router",
    MOE_EXPERTS = "moe_experts",
    SHARED_EXPERT = "shared_expert",
    LM_HEAD = "lm_head",
    SAMPLING = "sampling",
    FP8_DEQUANT = "fp8_dequant",
    ENGINE = "engine",
}

/// What the whole model is computed in: activations, and weights as a checkpoint has them.
const OF_MODELS: [(&str, &str); 8] = [
    ("f32", "f32"),
    ("f32", "bf16"),
    ("f32", "f16"),
    ("f32", "Fp8"),
    ("bf16", "f32"),
    ("bf16", "bf16"),
    ("bf16", "f16"),
    ("bf16", "Fp8"),
];

/// Headers, by the one name under which they are included.
const HEADERS: &[(&str, &str)] = &[
    ("common/activation.cuh", include_str!("common/activation.cuh")),
    ("common/block.cuh", include_str!("common/block.cuh")),
    ("common/fp8.cuh", include_str!("common/fp8.cuh")),
    ("common/order.cuh", include_str!("common/order.cuh")),
    ("common/rows.cuh", include_str!("common/rows.cuh")),
    ("common/stored.cuh", include_str!("common/stored.cuh")),
    ("common/weight.cuh", include_str!("common/weight.cuh")),
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
        let list = self.text.split_once("enum Plant {")?.1.split_once('}')?.0;
        let name = name.replace('-', "_").to_uppercase();
        let at = list.split(',').position(|known| known.trim() == name)?;
        i32::try_from(at).ok()
    }

    /// Whether weight matrices may be narrowed.
    pub fn narrow(&self) -> bool {
        self.text.contains("#include \"common/weight.cuh\"")
    }

    /// What it can be compiled for.
    pub fn builds(&self) -> Vec<Build> {
        if self.op == ENGINE.op {
            let of = |(activations, weights)| Build { activations, weights: Some(weights) };
            return OF_MODELS.map(of).to_vec();
        }
        let wide = ["f32", "bf16", "f16"];
        let of = |activations, weights| Build {
            activations,
            weights: Some(weights).filter(|_| self.narrow()),
        };
        let narrow = ["Fp8", "Int8", "Int4"].map(|weights| of("f32", weights));
        let narrow = narrow.into_iter().filter(|_| self.narrow());
        wide.map(|stored| of(stored, stored)).into_iter().chain(narrow).collect()
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
    use super::{HEADERS, SOURCES};

    #[test]
    fn every_line_is_told_of_its_own_file() {
        for source in SOURCES {
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
        for source in SOURCES {
            let entries = source.entries();
            assert!(!entries.is_empty(), "{}", source.file);
            let head = source.text.split("\n\n").next().unwrap();
            for entry in entries {
                assert!(entry.name.starts_with(&format!("{}_", source.op)), "{}", entry.name);
                assert!(head.contains(&format!("// {}:", entry.name)), "{}", entry.name);
            }
        }
    }
}
