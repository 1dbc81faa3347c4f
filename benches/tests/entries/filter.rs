//! What a filter selects.

use benches::{
    filter::{Filter, Subject},
    registry::op,
};

fn selects(expression: &str, id: &str) -> bool {
    let (name, rest) = id.split_once('/').unwrap();
    let (spec, variant) = rest.split_once('@').unwrap();
    let parsed = op(name).unwrap().parse(spec).unwrap();
    let subject = Subject { op: name, variant, id, parsed: &parsed };
    Filter::new(&[], Some(expression)).unwrap().selects(&subject)
}

#[test]
fn expressions_hold_as_they_read() {
    let id = "rms_norm/N3-D64;dtype=bf16;fill=outlier@reference/f32";
    for (expression, want) in [
        ("op(rms_norm)", true),
        ("op(rms*) & D>=64", true),
        ("op(rms*) & D>64", false),
        ("T>=1", false),
        ("!fill(domain) & dtype(bf16)", true),
        ("fill(domain) | (N=3 & N!=4)", true),
        ("!!op(rms_norm)", true),
        ("device(reference) & variant(*/f32)", true),
        ("id(*outlier@*)", true),
    ] {
        assert_eq!(selects(expression, id), want, "{expression}");
    }
}
