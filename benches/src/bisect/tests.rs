//! Every fault in the wiring is found where it is, and nothing is found where there is none.

use std::{path::Path, sync::Arc};

use golden::{
    Config, Dtype, Engine, Error, Plan, Rng, Weights,
    config::{Mixer, Mlp},
    engine::INTERRUPTED,
    recording::Recording,
    synthetic::Synthetic,
    tap::Part,
};
use ndarray::ArrayD;
use reference::{Model, Place, Plant};

use super::{
    Asked, File, Progress, Report, against_file, against_recording, against_reference,
    model::Oracle, progress::Steps, walk::Text,
};
use crate::{Kept, Number};

/// A model of which no two layers are alike: every kind of fault has a place in it.
fn weights() -> Arc<dyn Weights> {
    Arc::new("synthetic:ragged".parse::<Synthetic>().unwrap())
}

/// Nobody who ends it.
fn on() -> Progress {
    Arc::new(|_, _| true)
}

fn steps() -> Steps {
    Steps::new(on())
}

fn text(config: &Config, pieces: &[usize]) -> Text {
    let mut rng = Rng::keyed("bisect", 0);
    let tokens = (0..pieces.iter().sum()).map(|_| rng.below(config.vocab_size) as u32).collect();
    Text { tokens: vec![tokens], pieces: pieces.to_vec(), drafts: true }
}

fn first(config: &Config, place: Place) -> Part {
    let mixer = |mixer| config.layer_types.iter().position(|kind| *kind == mixer).unwrap();
    match place {
        Place::Linear => Part::Layer(mixer(Mixer::Linear)),
        Place::Full => Part::Layer(mixer(Mixer::Full)),
        Place::Sparse => {
            Part::Layer(config.mlp_types.iter().position(|kind| *kind == Mlp::Sparse).unwrap())
        }
        Place::Head => Part::Head,
        Place::Mtp => Part::Mtp,
    }
}

#[test]
fn every_wiring_fault_is_found_where_it_is() {
    // Three value heads read a key head in turn as they do in a row where there are two key heads: that
    // fault takes another ratio.
    let other = |plant: Plant| plant == Plant::InterleavedValueHeads;
    let (mut found, all) = (0, Plant::ALL.len());
    for (model, here) in [("synthetic:ragged", false), ("synthetic:tiny", true)] {
        let weights: Arc<dyn Weights> = Arc::new(model.parse::<Synthetic>().unwrap());
        let plants = Plant::ALL.iter().filter(|(_, plant, _)| other(*plant) == here);
        found += named(&weights, &mut plants.map(|&(name, plant, _)| (name, plant)));
    }
    assert_eq!(found, all);
}

/// Faults that were found, each where it is.
fn named(
    weights: &Arc<dyn Weights>,
    plants: &mut dyn Iterator<Item = (&'static str, Plant)>,
) -> usize {
    let config = weights.config().clone();
    let oracle =
        Oracle::new(weights.clone(), "f32", Plan::F32, text(&config, &[11, 4, 1]), steps())
            .unwrap();
    let hold = |plant: Option<Plant>| -> Report {
        let mut engine = Model::<f32>::new(weights.clone()).with_plant(plant);
        oracle.hold(&mut engine as &mut dyn Engine).unwrap()
    };
    let honest = hold(None);
    assert!(honest.ok(), "{honest:#?}");
    assert_eq!(honest.unknown, Vec::<String>::new());
    let mut found = 0;
    for (name, plant) in plants {
        let report = hold(Some(plant));
        let (place, ops) = plant.place();
        assert_eq!(report.part(), Some(first(&config, place)), "{name}: {report:#?}");
        assert_eq!(report.blamed(), ops, "{name}: {report:#?}");
        // The layer before is not to blame, and the layer itself inherited nothing.
        let row = report.rows.iter().find(|row| !row.ok).unwrap();
        assert_eq!(row.part, first(&config, place), "{name}");
        let continued = report.ops[0].notes.iter().any(|note| note.contains("continuation"));
        assert_eq!(continued, plant.keeps_states_wrong(), "{name}: {:?}", report.ops[0].notes);
        found += 1;
    }
    found
}

/// Of a text that is too large for a dozen runs.
#[test]
fn a_relative_rule_finds_the_layer_and_accuses_nobody() {
    let weights = weights();
    let config = weights.config().clone();
    let plan = crate::engine("cpu", "bf16", weights.clone(), None).unwrap().plan();
    let text = || text(&config, &[11, 4, 1]);
    let oracle = |plan| Oracle::new(weights.clone(), "f32", plan, text(), steps()).unwrap().large();
    let mut halves = crate::engine("cpu", "bf16", weights.clone(), None).unwrap();
    let report = oracle(plan).hold(&mut *halves).unwrap();
    assert!(report.ok(), "{report:#?}");
    let loss = report.loss.unwrap();
    assert!(0.0 < loss.kl && 0.0 < loss.emulated && loss.kl <= loss.allowed, "{loss:?}");

    let oracle = oracle(Plan::F32);
    let report = oracle.hold(&mut *halves).unwrap();
    assert!(!report.ok() && report.loss.is_some_and(|loss| !loss.ok()), "{report:#?}");
    assert_eq!(report.part(), Some(Part::Layer(0)));
    let hold = |plant: Option<Plant>| -> Report {
        let mut engine = Model::<f32>::new(weights.clone()).with_plant(plant);
        oracle.hold(&mut engine as &mut dyn Engine).unwrap()
    };
    let honest = hold(None);
    assert!(honest.ok(), "{honest:#?}");
    for &(name, plant, _) in Plant::ALL {
        if plant == Plant::InterleavedValueHeads {
            continue;
        }
        let report = hold(Some(plant));
        assert_eq!(report.part(), Some(first(&config, plant.place().0)), "{name}: {report:#?}");
        assert_eq!(report.blamed(), plant.place().1, "{name}: {report:#?}");
    }
}

#[test]
fn an_emulation_is_held_to_its_own_plan() {
    let weights = weights();
    let text = text(weights.config(), &[4, 2, 1]);
    let ask = |plant| {
        let (tokens, pieces) = (text.tokens.clone(), text.pieces.clone());
        let weights = weights.clone();
        let progress = on();
        let (engine, number) = ("reference", "bf16".into());
        let asked = Asked { engine, number, plant, weights, tokens, pieces, progress };
        against_reference(&asked).unwrap()
    };
    let honest = ask(None);
    assert!(honest.ok(), "{honest:#?}");
    let report = ask(Some("dt-bias-dropped"));
    assert_eq!((report.part(), report.blamed()), (Some(Part::Layer(0)), vec!["gdn_gates"]));
}

/// It computes several ops between two taps, and is fed at those that it has.
#[test]
fn an_engine_that_tells_less_is_held_to_what_it_tells() {
    let weights = weights();
    let text = text(weights.config(), &[4, 2, 1]);
    let mut numbers = ["f32", "bf16", "int8", "int4"].map(Number::from).to_vec();
    numbers.push(Number { name: "bf16", kept: Some(Kept::Int8) });
    for number in numbers {
        let (tokens, pieces) = (text.tokens.clone(), text.pieces.clone());
        let (engine, plant, progress) = ("cpu", None, on());
        let weights = weights.clone();
        let asked = Asked { engine, number, plant, weights, tokens, pieces, progress };
        let report = against_reference(&asked).unwrap();
        assert!(report.ok(), "{number}: {report:#?}");
    }
}

/// A recording of four layers of width 64, and the weights it was made of.
fn layers() -> (Recording, Arc<dyn Weights>) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../golden/recordings/layers");
    let recording = Recording::open(&folder).unwrap();
    let source = &recording.manifest.checkpoint;
    let config = Config::parse(&source.config.to_string(), "layers").unwrap();
    let weights = Synthetic::new(config.stored_as(Dtype::F32), source.seed.unwrap());
    (recording, Arc::new(weights))
}

fn held(recording: &Recording, file: &File) -> Result<Report, Error> {
    let prompt = recording.manifest.prompts.iter().find(|prompt| prompt.id == "t3").unwrap();
    against_file(file, "f", recording, prompt)
}

#[test]
fn every_tensor_of_a_file_is_judged_under_its_own_index() {
    let (recording, _) = layers();
    let file = |names: &[&str], wrong: &[&str]| -> File {
        let value = |name: &str| {
            let x = recording.f32(&format!("t3/{name}")).unwrap();
            if wrong.contains(&name) { x * 0.0 } else { x }
        };
        names.iter().map(|&name| (name.to_owned(), value(name))).collect()
    };
    let all = ["hidden.0", "hidden.1", "hidden.2", "hidden.3", "hidden.4", "logits"];
    for (names, wrong, rows, blamed) in [
        (&all[..], &[][..], 6, None),
        (&all, &["hidden.2"], 6, Some("layer 1")),
        (&all, &["hidden.4", "logits"], 6, Some("layer 3 or the final norm")),
        (&all, &["logits"], 6, Some("head")),
        (&["hidden.2"], &[], 1, None),
        (&["hidden.2"], &["hidden.2"], 1, Some("embedding to layer 1")),
        (&["hidden.4", "logits"], &[], 2, None),
        (&["hidden.4", "logits"], &["hidden.4"], 2, Some("embedding to the final norm")),
        (&["hidden.0", "hidden.3"], &["hidden.3"], 2, Some("layer 0 to layer 2")),
        (&["hidden.3", "logits"], &["logits"], 2, Some("layer 3 to the head")),
    ] {
        let report = held(&recording, &file(names, wrong)).unwrap();
        assert_eq!(report.rows.len(), rows, "{names:?}");
        assert_eq!(report.blame().as_deref(), blamed, "{names:?}, wrong {wrong:?}");
        assert_eq!(report.ok(), wrong.is_empty());
    }
}

#[test]
fn a_file_of_another_model_is_refused() {
    let (recording, _) = layers();
    let said = |name: &str, shape: &[usize]| {
        let file = File::from([(name.to_owned(), ArrayD::zeros(shape))]);
        held(&recording, &file).unwrap_err().to_string()
    };
    for name in ["hidden.5", "hidden.x", "hidden.01", "hidden"] {
        let want = format!("f: tensor {name}: expected hidden.0 … hidden.4 or logits of layers");
        assert_eq!(said(name, &[1, 3, 64]), want);
    }
    for shape in [&[1, 3, 10][..], &[1, 2, 64], &[3, 64]] {
        let want =
            format!("f: tensor hidden.2: expected shape [1, 3, 64] of layers/t3, got {shape:?}");
        assert_eq!(said("hidden.2", shape), want);
    }
    assert!(said("logits", &[1, 3, 64]).starts_with("f: tensor logits: expected shape [1, 3, "));
}

#[test]
fn a_recording_blames_the_final_norm_and_refuses_another_model() {
    let (recording, weights) = layers();
    let ask = |weights: &Arc<dyn Weights>, plant, progress| {
        let (engine, number, weights) = ("reference", "f32".into(), weights.clone());
        let (tokens, pieces) = (Vec::new(), Vec::new());
        let asked = Asked { engine, number, plant, weights, tokens, pieces, progress };
        against_recording(&asked, &recording, &recording.manifest.prompts[1])
    };
    let report = ask(&weights, Some("missing-plus-one"), on()).unwrap();
    assert_eq!(report.blame().as_deref(), Some("head"), "{report:#?}");
    assert_eq!((report.part(), report.blamed()), (Some(Part::Head), vec!["rms_norm"]));
    let row = report.rows.iter().find(|row| !row.ok).unwrap();
    assert_eq!(row.name(), "layer 3 or the final norm");
    // In the last layer the same row is over, and the reference says that it is the layer.
    let report = ask(&weights, Some("qk-norm-missing-plus-one"), on()).unwrap();
    assert_eq!(report.blame().as_deref(), Some("layer 3"), "{report:#?}");

    for (other, want) in [
        (
            "ragged",
            "num_hidden_layers: expected 4, got 5; linear_num_value_heads: expected 4, got 6; ",
        ),
        ("ragged,layers=4", "linear_conv_kernel_dim: expected 4, got 3"),
        ("tiny,experts=8", "layers: recorded of another model: num_experts: expected 16, got 8"),
    ] {
        let other: Arc<dyn Weights> =
            Arc::new(format!("synthetic:{other}").parse::<Synthetic>().unwrap());
        let said = ask(&other, None, on()).unwrap_err().to_string();
        assert!(said.starts_with("layers: recorded of another model: "), "{said}");
        assert!(said.contains(want), "{said}");
    }

    for (plant, last) in [(None, 0), (None, 3), (Some("missing-plus-one"), 40)] {
        let stop: Progress = Arc::new(move |done, total| {
            assert!(done <= total);
            done <= last
        });
        assert_eq!(ask(&weights, plant, stop).unwrap_err().to_string(), INTERRUPTED, "{last}");
    }
}

#[test]
fn a_walk_ends_where_it_is_interrupted() {
    let weights = weights();
    for last in [0, 5, 100] {
        let Text { tokens, pieces, .. } = text(weights.config(), &[3, 1]);
        let progress: Progress = Arc::new(move |done, _| done <= last);
        let (engine, number, plant, weights) = ("reference", "f32".into(), None, weights.clone());
        let asked = Asked { engine, number, plant, weights, tokens, pieces, progress };
        assert_eq!(against_reference(&asked).unwrap_err().to_string(), INTERRUPTED, "{last}");
    }
}
