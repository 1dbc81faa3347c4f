//! Which problems a foreign kernel gets.

use std::collections::BTreeSet;

use golden::Set;
use optimized::doors::Manifest;

use benches::{
    foreign::adapted,
    registry::{self, Entry},
};

/// A kernel of one op with these constraints.
fn manifest(op: &str, constraints: &str) -> Manifest {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("kernel.toml");
    let text = format!(
        "name = \"it\"\nabi = 1\nimplements = [\"{op}\"]\n[constraints]\n{constraints}\n\
         [door]\nkind = \"process\"\ncommand = [\"true\"]\n"
    );
    std::fs::write(&file, text).unwrap();
    Manifest::read(&file, &|name| registry::op(name).map(Entry::known)).unwrap()
}

/// Constraints that an op's own conditions on its sizes do not go well with: whole sets run all the
/// same, with every fill.
#[test]
fn problems_are_grown_to_problems() {
    for (op, constraints) in [
        ("gated_delta_rule", "HK = 16"),
        ("gated_delta_rule", "HK = 3"),
        ("gdn_layer", "HK = 3"),
        ("attention", "T = 64"),
        ("attention", "HKV = 8"),
        ("attention", "HQ = 5"),
        ("attention", "HQ = 5\nT = 64"),
        ("moe_router", "A = 10"),
        ("rope", "R = 64"),
    ] {
        let manifest = manifest(op, constraints);
        let entry = registry::op(op).unwrap();
        let specs = entry.specs(Set::Ci);
        let mut fills = BTreeSet::new();
        for spec in &specs {
            let grown = adapted(&manifest.constraints, entry, spec);
            let grown = grown.unwrap_or_else(|| panic!("{op}/{spec}: not for {constraints}"));
            let parsed = entry.parse(&grown).unwrap();
            let dtype = parsed.dtype.parse().unwrap();
            assert_eq!(manifest.constraints.refuse(&parsed.sizes, dtype), None, "{op}/{grown}");
            fills.insert(parsed.fill);
        }
        let all: BTreeSet<String> =
            specs.iter().map(|spec| entry.parse(spec).unwrap().fill).collect();
        assert_eq!(fills, all, "{op}: {constraints}");
    }
}
