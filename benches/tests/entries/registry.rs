//! What every op of the registry has in common.

use proptest::prelude::*;

use benches::{dear::TOO_DEAR, registry::ops};

#[test]
fn every_spec_of_every_set_reads_back() {
    for op in ops() {
        for spec in op.specs(golden::Set::Nightly) {
            assert_eq!(op.parse(&spec).map(|parsed| parsed.canonical), Ok(spec), "{}", op.name());
        }
    }
}

proptest! {
    #[test]
    fn no_spec_panics(text in ".{0,60}", sizes in proptest::collection::vec(
                          prop_oneof![0_u64..300, Just(1 << 24), any::<u64>()], 16),
                      fill in 0_usize..12, dtype in "f32|f16|bf16|fp8|i64|u8|f64|x", seed in any::<u64>()) {
        for op in ops() {
            let _ = op.parse(&text);
            let sized: Vec<_> =
                op.letters().iter().zip(&sizes).map(|(letter, size)| format!("{letter}{size}")).collect();
            let case = sized.join("-");
            let fill = op.fills().get(fill).map_or("domain", |fill| fill.name);
            for spec in [case.clone(), format!("{case};{text}"), format!("{case}-{text}"), format!("{text}{case}"),
                         format!("{case};dtype={dtype};fill={fill};seed={seed}")] {
                if let Ok(parsed) = op.parse(&spec) {
                    let again = op.parse(&parsed.canonical);
                    prop_assert_eq!(again, Ok(parsed), "{}/{}", op.name(), spec);
                }
            }
        }
    }
}

#[test]
fn some_problems_are_too_dear() {
    let dear = ops().iter().flat_map(|op| {
        let specs = op.specs(golden::Set::Nightly).into_iter();
        specs.filter(|spec| op.parse(spec).is_ok_and(|parsed| TOO_DEAR <= parsed.cost.flops))
    });
    assert_ne!(dear.count(), 0);
}
