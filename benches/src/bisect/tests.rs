//! Every fault in the wiring is found where it is, and nothing is found where there is none.

use std::sync::Arc;

use golden::{
    Config, Engine, Plan, Rng, Weights,
    config::{Mixer, Mlp},
    synthetic::Synthetic,
    tap::Part,
};
use reference::{Model, Place, Plant};

use super::{Asked, Report, against_reference, model::Oracle, walk::Text};
use crate::registry::op;

/// A model of which no two layers are alike: every kind of fault has a place in it.
fn weights() -> Arc<dyn Weights> {
    Arc::new("synthetic:ragged".parse::<Synthetic>().unwrap())
}

fn text(config: &Config, pieces: &[usize]) -> Text {
    let mut rng = Rng::keyed("bisect", 0);
    let tokens = (0..pieces.iter().sum()).map(|_| rng.below(config.vocab_size) as u32).collect();
    Text { tokens: vec![tokens], pieces: pieces.to_vec() }
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
        Oracle::new(weights.clone(), "f32", Plan::F32, text(&config, &[11, 4, 1])).unwrap();
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

#[test]
fn an_emulation_is_held_to_its_own_plan() {
    let weights = weights();
    let text = text(weights.config(), &[4, 2, 1]);
    let ask = |plant| {
        let (tokens, pieces) = (text.tokens.clone(), text.pieces.clone());
        let weights = weights.clone();
        let asked = Asked { engine: "reference", number: "bf16", plant, weights, tokens, pieces };
        against_reference(&asked).unwrap()
    };
    let honest = ask(None);
    assert!(honest.ok(), "{honest:#?}");
    let report = ask(Some("dt-bias-dropped"));
    assert_eq!((report.part(), report.blamed()), (Some(Part::Layer(0)), vec!["gdn_gates"]));
}

/// Faults of composite kernels, and the op inside that answers wrong.
#[test]
fn a_kernel_is_wrong_in_an_op_inside() {
    for (problem, spec, faults) in [
        (
            "gdn_layer",
            "B2-T9-D24-HK2-HV4-K8-V6-W4",
            &[("dt-bias-dropped", "gdn_gates"), ("q-k-swapped", "gated_delta_rule")][..],
        ),
        (
            "attention_layer",
            "B2-T5-TK9-D24-HQ4-HKV2-H8-R4",
            &[("cache-lost", "attention"), ("positions-restart", "rope")],
        ),
        (
            "moe_layer",
            "N17-D24-E8-A2-F6",
            &[("shared-gate-missing", "shared_expert"), ("last-expert-dropped", "moe_experts")],
        ),
    ] {
        let entry = op(problem).unwrap();
        let honest = entry.bisect(spec, "cpu/portable", None).unwrap();
        assert!(honest.ok() && honest.unknown.is_empty(), "{honest:#?}");
        for &(fault, inside) in faults {
            let report = entry.bisect(spec, "cpu/portable", Some(fault)).unwrap();
            assert_eq!(report.ops.first().map(|op| &*op.op), Some(inside), "{fault}: {report:#?}");
            assert!(report.ops.last().is_some_and(|op| op.op == problem), "{fault}: {report:#?}");
            assert!(report.ops[0].first.is_some() || report.ops[0].finding.over == 0);
        }
    }
}
