//! A failing case shrinks to the smallest one that fails so.

use super::{FILE, Needs, Test, check, kernel, test};

const HEADER: &str = include_str!("../../../optimized/src/doors/karat.h");
const SOURCE: &str = include_str!("../../../optimized/src/doors/scaffold/c_gated_delta_rule.c");

pub(super) fn tests() -> Vec<Test> {
    vec![
        test("shrink::to_the_threshold", Needs::Cc, to_the_threshold),
        test("shrink::to_the_smallest_problem", Needs::Cc, to_the_smallest_problem),
    ]
}

/// The kernel of the scaffold with a line before its end.
fn broken(line: &str, case: &str) -> (i32, serde_json::Value) {
    let (body, end) = SOURCE.rsplit_once("    return 0;").unwrap();
    let source = format!("{body}    {line}\n    return 0;{end}");
    let manifest = "name = \"it\"\nabi = 1\nimplements = [\"gated_delta_rule\"]\n\
        [build]\ncommand = [\"cc\", \"-O2\", \"-shared\", \"-fPIC\", \"-o\", \"it.so\", \"kernel.c\", \"-lm\"]\n\
        sources = [\"kernel.c\"]\n[door]\nkind = \"cabi\"\nlibrary = \"it.so\"\n";
    let home = kernel(&[("karat.h", HEADER), ("kernel.c", &source), ("kernel.toml", manifest)]);
    let id = format!("gated_delta_rule/{case}");
    let (ran, rows, _) = check(&home, FILE, &[&id, "--shrink"]);
    assert_eq!(rows.len(), 1, "{ran:?}");
    let shrunk = ran.lines().into_iter().find(|line| line["kind"] == "shrunk");
    (ran.code, shrunk.unwrap_or_default())
}

/// Wrong beyond one chunk, where heads share a key.
fn to_the_threshold() {
    let line = "if (64 < v_in->shape[0] / state_in->shape[0] && hk < hv) o_all[0] += 1;";
    let (code, shrunk) = broken(line, "B2-T130-HK2-HV8-K16-V32");
    assert_eq!(code, 3);
    let smallest = "gated_delta_rule/B1-T65-HK1-HV2-K1-V1@foreign/it";
    assert_eq!(shrunk["smallest"], smallest, "{shrunk}");
    assert_eq!(shrunk["outcome"], "failed");
}

/// What dies is not shrunk to what is merely wrong: wrong everywhere, dead from seven tokens on.
fn to_the_smallest_problem() {
    let line = "o_all[0] += 1; if (7 <= v_in->shape[0]) *(volatile int *)8 = 1;";
    let (code, shrunk) = broken(line, "B2-T65-HK2-HV4-K8-V8");
    assert_eq!(code, 10);
    // Either letter may be the one that is left.
    let found = shrunk["smallest"].as_str().unwrap_or_default();
    let smallest = ["B1-T7-HK1-HV1-K1-V1", "B2-T4-HK1-HV1-K1-V1"];
    assert!(smallest.iter().any(|case| found.contains(case)), "{shrunk}");
    assert_eq!(shrunk["outcome"], "crashed");
}
