//! The official code as a candidate, under the plans that it is declared with.

use super::{Needs, Test, check, home::Home, test};

/// A length that is no multiple of a chunk, packed sequences, and gates that forget everything.
const PROBLEMS: &[&str] = &[
    "gated_delta_rule/B1-T65-HK2-HV4-K16-V16",
    "gated_delta_rule/B3-T23-HK2-HV4-K16-V12;fill=packed",
    "gated_delta_rule/B3-T23-HK2-HV4-K16-V12;fill=mixed-gates",
    "gated_delta_rule/B1-T9-HK1-HV2-K8-V8;dtype=bf16",
];

pub(super) fn tests() -> Vec<Test> {
    ["chunk", "recurrent"]
        .map(|way| {
            let name = format!("peers::transformers::{way}");
            test(name, Needs::Transformers, move || official(way))
        })
        .into()
}

fn official(way: &str) {
    let file =
        format!("{}/../benches/peers/transformers/kernel-{way}.toml", env!("CARGO_MANIFEST_DIR"));
    for problem in PROBLEMS {
        let (ran, rows, _) = check(&Home::new(), &file, &[problem, "--timeout", "600"]);
        assert_eq!((ran.code, rows.len()), (0, 1), "{problem}: {ran:?}");
    }
}
