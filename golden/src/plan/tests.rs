use super::{Cache, Plan, Sums, Term};

#[test]
fn sums_of_tensor_cores_are_part_of_a_plan() {
    let plan = Plan::F32.truncated(16);
    let text = "plain; accumulator f32; dot f32; sums truncated 16; output f32";
    assert_eq!(plan.to_string(), text);
    let read = |json: &str| serde_json::from_str::<Plan>(json);
    assert_eq!(read(r#"{"sums": "truncated 16"}"#).unwrap(), plan);
    assert_eq!(read(r#"{"sums": "nearest"}"#).unwrap(), Plan::F32);
    assert_eq!(read(&serde_json::to_string(&plan).unwrap()).unwrap(), plan);
    for wrong in ["truncated", "truncated 0", "truncated 257", "truncated -1", "up"] {
        let why = format!(
            "sums {wrong:?}: expected \"nearest\", \"fp22\" or \"truncated N\", N from 1 to 256"
        );
        assert_eq!(wrong.parse::<Sums>(), Err(why));
    }
}

#[test]
fn activations_in_fp8_are_part_of_a_plan() {
    let plan = Plan { sums: Sums::Fp22, ..Plan::F32.w8a8() };
    let text = "plain; accumulator f32; dot f32; sums fp22; activations fp8; output f32";
    assert_eq!(plan.to_string(), text);
    assert!(!Plan::F32.w8a8().only_f32());
    let term = ("fp8 activations".to_owned(), Term::Activations);
    assert!(plan.terms().contains(&term) && !Plan::F32.terms().contains(&term));
    let read = |json: &str| serde_json::from_str::<Plan>(json);
    assert_eq!(read(r#"{"sums": "fp22", "activations": "fp8"}"#).unwrap(), plan);
    assert_eq!(read(&serde_json::to_string(&plan).unwrap()).unwrap(), plan);
    assert_eq!(plan.check(), Ok(()));
    let alone = Plan { sums: Sums::Fp22, ..Plan::F32 };
    assert_eq!(alone.check(), Err("sums fp22: expected activations fp8, got f32".to_owned()));
}

#[test]
fn a_cache_is_part_of_a_plan() {
    let plan = Plan { cache: Cache::Int8, ..Plan::F32 };
    assert_eq!(plan.to_string(), "plain; accumulator f32; dot f32; cache int8; output f32");
    assert!(Plan::F32.only_f32() && !plan.only_f32());
    let term = ("int8 cache".to_owned(), Term::Cache);
    assert!(plan.terms().contains(&term) && !Plan::F32.terms().contains(&term));
    let read = |json: &str| serde_json::from_str::<Plan>(json);
    assert_eq!(read(r#"{"cache": "int8"}"#).unwrap(), plan);
    let counted = Plan { cache: Cache::Int8ByInt16, ..Plan::F32 };
    assert_eq!(read(r#"{"cache": "int8_by_int16"}"#).unwrap(), counted);
    assert_eq!(counted.to_string(), plan.to_string().replace("int8", "int8_by_int16"));
    assert_eq!(read(r#"{"cache": "as_stored"}"#).unwrap(), Plan::F32);
    let written = serde_json::to_string(&plan).unwrap();
    assert_eq!(read(&written).unwrap(), plan);
    assert!(read(r#"{"cache": "int4"}"#).is_err());
}

#[test]
fn elementary_functions_are_within_a_limit() {
    let all = |ulps| {
        [
            Plan { exp_ulps: ulps, ..Plan::F32 },
            Plan { log_ulps: ulps, ..Plan::F32 },
            Plan { root_ulps: ulps, ..Plan::F32 },
            Plan { trig_ulps: ulps, ..Plan::F32 },
        ]
    };
    for ulps in [0.0, 0.5, 2.0, 64.0] {
        assert!(all(ulps).iter().all(|plan| plan.check().is_ok()), "{ulps}");
    }
    for (ulps, got) in [
        (1e7, "1e7"),
        (1e30, "1e30"),
        (64.5, "64.5"),
        (-1.0, "-1"),
        (f64::INFINITY, "inf"),
        (f64::NAN, "NaN"),
    ] {
        for (plan, key) in all(ulps).iter().zip(["exp", "log", "root", "trig"]) {
            let why = format!("{key}_ulps: expected a number from 0 to 64, got {got}");
            assert_eq!(plan.check(), Err(why));
        }
    }
}
