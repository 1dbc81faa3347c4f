//! Every input moves every output that depends on it, as far as an op does not say otherwise.

use benches::{mutate::unfelt, registry::ops};
use golden::Set;

#[test]
fn every_pair_is_felt_or_declared() {
    let found: Vec<String> = ops()
        .iter()
        .flat_map(|op| unfelt(*op, Set::Smoke).expect("the sets hold problems of their ops"))
        .collect();
    assert!(found.is_empty(), "{} pairs:\n{}", found.len(), found.join("\n"));
}
