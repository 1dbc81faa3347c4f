//! A plan is what a variant is held to: rounding where it does not say so fails.

use benches::{
    registry,
    report::{Outcome, Row},
};
use golden::{
    Dtype, Plan,
    plan::{Form, Sums},
};

const SPEC: &str = "B1-T129-HK2-HV4-K32-V32;dtype=bf16";
const NARROW: &str = "cpu/portable-chunk64-bf16";

fn outcome(row: &Row) -> (&'static str, f64) {
    (row.outcome.name(), row.budget())
}

#[test]
fn chunks_in_bf16_pass_under_their_own_plan_only() {
    let op = registry::op("gated_delta_rule").expect("an op of that name");
    let own = op.check(SPEC, NARROW, None);
    assert!(matches!(own.outcome, Outcome::Passed(_)), "{:?}", outcome(&own));
    let f32 = Plan::stored(Dtype::Bf16);
    for plan in [f32.clone(), f32.form(Form::Chunked(64))] {
        let row = op.check_as(SPEC, NARROW, &plan);
        assert!(matches!(row.outcome, Outcome::Failed(_)), "{plan}: {:?}", outcome(&row));
        assert!(10.0 < row.budget(), "{plan}: not a near miss: {:?}", outcome(&row));
    }
}

/// Decays as differences of prefix sums lose digits where a gate forgets everything: honest, if declared.
#[test]
fn decays_from_prefix_sums_are_a_plan_of_their_own() {
    let op = registry::op("gated_delta_rule").expect("an op of that name");
    let spec = "B3-T23-HK2-HV4-K16-V12;fill=mixed-gates";
    let own = op.check(spec, "reference/prefix64", None);
    assert!(matches!(own.outcome, Outcome::Passed(_)), "{:?}", outcome(&own));
    let other = Plan::F32.form(Form::Chunked(64));
    let row = op.check_as(spec, "reference/prefix64", &other);
    assert!(matches!(row.outcome, Outcome::Failed(_)), "{:?}", outcome(&row));
    // In double the two are one formula, but for the digits that even double loses.
    let wide = op.check("B3-T23-HK2-HV4-K16-V12", "reference/f64-prefix64", None);
    assert!(matches!(wide.outcome, Outcome::Passed(_)), "{:?}", outcome(&wide));
    for text in ["plain", "chunked 64", "chunked 64, prefix sums"] {
        assert_eq!(text.parse::<Form>().map(|form| form.to_string()), Ok(text.to_owned()));
    }
    for text in
        ["chunked 0", "chunked 4097", "prefix sums", "plain, prefix sums", "chunked , prefix sums"]
    {
        assert!(text.parse::<Form>().is_err(), "{text}");
    }
}

#[test]
fn a_variant_may_round_less_than_a_plan_allows() {
    let op = registry::op("gated_delta_rule").expect("an op of that name");
    for variant in ["cpu/portable", "cpu/portable-chunk64"] {
        let row = op.check_as(SPEC, variant, &Plan::fla_bf16(64));
        assert!(matches!(row.outcome, Outcome::Passed(_)), "{variant}: {:?}", outcome(&row));
    }
}

#[test]
fn what_a_variant_does_not_compute_is_known_before_running() {
    let op = registry::op("gated_delta_rule").expect("an op of that name");
    let spec = "B1-T3-HK1-HV2-K8-V4";
    assert!(op.not_run(spec, NARROW).is_some());
    assert!(op.not_run(SPEC, NARROW).is_none());
    for row in [op.check(spec, NARROW, None), op.check_planted(spec, NARROW, "no-delta-rule")] {
        assert!(matches!(row.outcome, Outcome::Unsupported(_)), "{:?}", outcome(&row));
    }
}

/// Two plans over one checkpoint in FP8: exact, and activations in codes too.
#[test]
fn activations_in_fp8_pass_under_their_own_plan_only() {
    let w8a8 = Plan::F32.w8a8();
    let fp22 = Plan { sums: Sums::Fp22, ..w8a8.clone() };
    for (name, spec) in
        [("linear", "N5-M40-D300;weights=fp8"), ("moe_experts", "N4-D144-E3-A2-F40;weights=fp8")]
    {
        let op = registry::op(name).expect("an op of that name");
        let own = op.check(spec, "cpu/portable-w8a8", None);
        assert!(matches!(own.outcome, Outcome::Passed(_)), "{name}: {:?}", outcome(&own));
        let exact = op.check_as(spec, "cpu/portable-w8a8", &Plan::F32);
        assert!(matches!(exact.outcome, Outcome::Failed(_)), "{name}: {:?}", outcome(&exact));
        assert!(1000.0 < exact.budget(), "{name}: not a near miss: {:?}", outcome(&exact));
        for (variant, plan) in [("cpu/portable", &w8a8), ("cpu/portable-w8a8", &fp22)] {
            let row = op.check_as(spec, variant, plan);
            assert!(matches!(row.outcome, Outcome::Passed(_)), "{variant}: {:?}", outcome(&row));
        }
    }
}
