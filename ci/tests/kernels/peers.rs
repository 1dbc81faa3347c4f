//! The official code as a candidate, under the plans that it is declared with.

use super::{Needs, Test, check, home::Home, test};

/// Packed sequences, gates that forget everything, and heads that share a key.
const PROBLEMS: &str = "fill(packed) | fill(mixed-gates) | (T<=3 & HK<2)";

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
    let (ran, rows, _) = check(&Home::new(), &file, &["-E", PROBLEMS, "--timeout", "600"]);
    assert_eq!((ran.code, rows.len()), (0, 4), "{ran:?}");
}
