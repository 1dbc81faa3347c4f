//! Every path of a small model passes, and every fault in the keeping of states is caught by the path
//! that is there to catch it.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use benches::{
    filter::Filter,
    formats::Watch,
    invariance,
    paths::{FAULTS, Options, Row, plan, run},
    report::Outcome,
};
use golden::Set;

fn options(plant: Option<&str>) -> Options {
    Options {
        set: Set::Smoke,
        max_length: 64,
        tokens: 28,
        models: vec!["synthetic:ragged,layers=2".to_owned()],
        engine: "reference".to_owned(),
        number: "f32".to_owned(),
        kept: None,
        device: None,
        plant: plant.map(str::to_owned),
        kernels: Vec::new(),
    }
}

fn go_on() -> Watch {
    Arc::new(|| true)
}

fn rows(options: &Options, expression: &str) -> Vec<Row> {
    let problems = plan(options, &Filter::new(&[], Some(expression)).unwrap()).unwrap();
    let mut rows = Vec::new();
    run(&problems, options, &go_on(), &mut |row| {
        rows.push(row.clone());
        true
    });
    rows
}

/// Kinds of paths of a model that do not pass, and how: `split:failed`.
fn caught(plant: &str) -> BTreeSet<String> {
    // Two drafts stand for one, three and four.
    let rows = rows(&options(Some(plant)), "op(model) & !(id(*,k1,*) | id(*,k3,*) | id(*,k4,*))");
    assert!(50 < rows.len(), "{} paths", rows.len());
    let caught = rows.iter().filter(|row| !matches!(row.outcome, Outcome::Passed(_)));
    caught.map(|row| format!("{}:{}", row.kind, row.outcome.name())).collect()
}

#[test]
fn the_reference_has_equal_bits_on_every_path() {
    let rows = rows(&options(None), "op(model)");
    let kinds: BTreeSet<&str> = rows.iter().map(|row| row.kind).collect();
    let wanted = [
        "decode", "edit", "every", "fresh", "left-pad", "mtp", "packed", "poisoned", "prompt",
        "resume", "rollback", "split", "together",
    ];
    assert_eq!(kinds, BTreeSet::from(wanted));
    for row in rows {
        assert!(row.equal() && row.claim.is_some(), "{row:?}");
    }
    // In f64 too: nothing here depends on how a number rounds.
    let wide = Options { number: "f64".to_owned(), ..options(None) };
    for row in self::rows(&wide, "id(model/*/together*)") {
        assert!(row.equal(), "{row:?}");
    }
}

#[test]
fn every_op_with_sequences_passes_on_every_path() {
    let options = Options { max_length: 141, models: Vec::new(), ..options(None) };
    let rows = rows(&options, "T=141 & fill(domain) & (dtype(f32) | op(gated_delta_rule))");
    let ops: BTreeSet<&str> = rows.iter().map(|row| row.group.as_str()).collect();
    let wanted = ["attention", "attention_layer", "causal_conv1d", "gated_delta_rule", "gdn_layer"];
    assert_eq!(ops, BTreeSet::from(wanted));
    // One variant computes bf16 problems only: it is for nothing else, and passes there.
    let narrow = |row: &&Row| row.by == "cpu/portable-chunk64-bf16";
    let (bf16, f32): (Vec<_>, Vec<_>) =
        rows.iter().filter(narrow).partition(|row| row.subject.contains("dtype=bf16"));
    assert!(!bf16.is_empty() && !f32.is_empty());
    assert!(f32.iter().all(|row| matches!(row.outcome, Outcome::Unsupported(_))));
    // What this machine lacks is skipped, and only there; what kernels of some sizes are not for is unsupported.
    let lacks = |row: &&Row| match row.outcome {
        Outcome::Skipped(_) => ["cpu/avx", "cuda/"].iter().any(|of| row.by.starts_with(of)),
        Outcome::Unsupported(_) => row.by != "cpu/portable" && !row.by.starts_with("reference/"),
        _ => false,
    };
    for row in bf16.into_iter().chain(rows.iter().filter(|row| !narrow(row) && !lacks(row))) {
        assert!(matches!(row.outcome, Outcome::Passed(_)), "{row:?}");
        assert!(row.by != "reference/f32" || row.equal(), "{row:?}");
    }
}

#[test]
fn a_fault_in_the_keeping_of_states_is_caught_by_its_path() {
    for (name, kinds) in [
        ("drafts-kept", &["prompt", "rollback", "together"][..]),
        ("accepted-off-by-one", &["prompt", "rollback", "together"]),
        ("short-prompt-is-a-draft", &["prompt"]),
        ("snapshot-is-now", &["fresh", "resume"]),
        ("slots-close-up", &["left-pad"]),
        ("draft-cache-kept", &["mtp"]),
        ("choice-of-the-neighbour", &["decode"]),
    ] {
        let wanted: BTreeSet<String> = kinds.iter().map(|kind| format!("{kind}:failed")).collect();
        assert_eq!(caught(name), wanted, "{name}");
    }
    // These are seen by more paths than are named for them.
    for (name, kind) in [
        ("slot-not-cleared", "fresh:failed"),
        ("places-swapped", "together:failed"),
        ("bits-by-batch", "packed:cheat"),
        ("bits-by-run", "split:cheat"),
    ] {
        let caught = caught(name);
        assert!(caught.contains(kind), "{name}: {caught:?}");
    }
    assert_eq!(FAULTS.len(), 11, "a fault without a test");
}

#[test]
fn a_state_that_is_lost_between_layers_is_caught() {
    for name in ["recurrent-state-lost", "conv-state-lost", "conv-state-shifted", "kv-cache-lost"] {
        let caught = caught(name);
        for kind in ["split", "every", "resume", "rollback", "left-pad"] {
            assert!(caught.contains(&format!("{kind}:failed")), "{name}: {caught:?}");
        }
        // Whole texts have no state to lose.
        assert!(!caught.iter().any(|kind| kind.starts_with("packed")), "{name}: {caught:?}");
    }
    // What is wrong on every path alike is for `check` and `golden verify` to see.
    assert_eq!(caught("missing-plus-one"), BTreeSet::new());
}

#[test]
fn invariance_of_an_engine_is_what_it_promises() {
    let options = |plant: Option<&str>| invariance::Options {
        set: Set::Smoke,
        runs: 5,
        budget: Duration::from_mins(1),
        models: vec!["synthetic:ragged,layers=2".to_owned()],
        engine: "reference".to_owned(),
        number: "f32".to_owned(),
        kept: None,
        device: None,
        plant: plant.map(str::to_owned),
        kernels: Vec::new(),
    };
    let rows = |plant: Option<&str>| {
        let filter = Filter::new(&["model/synthetic".to_owned(), "/T5/".to_owned()], None).unwrap();
        let options = options(plant);
        let mut rows = Vec::new();
        invariance::run(
            &invariance::plan(&options, &filter).unwrap(),
            &options,
            &go_on(),
            &mut |row| {
                rows.push(row.clone());
                true
            },
        );
        assert!(10 < rows.len());
        rows
    };
    assert!(rows(None).iter().all(|row| row.equal() && row.claim.is_some()));
    let caught = |plant| -> BTreeSet<String> {
        let bad = rows(Some(plant)).into_iter().filter(|row| !row.equal());
        bad.map(|row| format!("{}:{}", row.kind, row.outcome.name())).collect()
    };
    let set = |kinds: &[&str]| kinds.iter().map(|&kind| kind.to_owned()).collect::<BTreeSet<_>>();
    assert_eq!(caught("bits-by-batch"), set(&["batch:cheat", "turned:cheat"]));
    assert_eq!(caught("places-swapped"), set(&["batch:failed", "turned:failed"]));
    assert!(caught("bits-by-run").contains("runs:cheat"));
}

#[test]
fn what_cannot_be_planted_or_opened_is_refused() {
    let none = Filter::default();
    let error = plan(&options(Some("nope")), &none).err().unwrap().to_string();
    assert!(error.contains("kv-cache-lost") && error.contains("drafts-kept"), "{error}");
    let missing = Options { models: vec!["synthetic:nope".to_owned()], ..options(None) };
    assert!(plan(&missing, &none).is_err());
}
