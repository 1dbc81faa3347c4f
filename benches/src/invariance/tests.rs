//! Answers that change are seen, and what they come to depends on what was promised.

use std::time::Duration;

use golden::{
    Claims, Rng, Spec,
    ops::{gated_delta_rule::GatedDeltaRule, linear::Linear, rms_norm::RmsNorm},
};

use super::{Change, ops};
use crate::{answer::Answer, fake::Fake, report::Outcome, same::Row, way::Way};

fn run<O: Answer>(fake: Fake<O>, spec: &str, changes: &[Change]) -> Vec<Row> {
    let spec: Spec<O::Case> = spec.parse().unwrap();
    let draw =
        |spec: &Spec<O::Case>| O::inputs(spec, &mut Rng::keyed(&spec.to_string(), spec.seed));
    let way = Way::Made(Box::new(fake));
    ops::run(&way, "cpu/fake", &spec, &draw, changes, Duration::from_mins(1))
}

type Norm = Fake<RmsNorm>;

fn norm() -> Norm {
    Norm::HONEST
}

/// One unit in the last place, in every second run.
const TREMBLES: fn(&Spec<golden::ops::rms_norm::Case>, &mut golden::ops::rms_norm::Outputs, usize) =
    |_, o, run| {
        if run == 1 {
            o.o[[0, 2]] = f32::from_bits(o.o[[0, 2]].to_bits() + 1);
        }
    };

#[test]
fn honest_variants_never_change() {
    let changes = [
        Change::Runs(40),
        Change::Threads(3),
        Change::Batch { of: 3, place: 1 },
        Change::Batch { of: 65, place: 64 },
    ];
    for row in [
        run(norm(), "N3-D8", &changes),
        run(Fake::<Linear>::HONEST, "N2-M5-D7", &changes),
        run(Fake::<GatedDeltaRule>::HONEST, "B2-T5-HK1-HV2-K4-V4", &changes),
    ]
    .concat()
    {
        assert!(row.equal(), "{row:?}");
    }
    let packed = "B4-T5-HK1-HV2-K4-V4;fill=packed";
    let turned = run(Fake::<GatedDeltaRule>::HONEST, packed, &[1, 2, 3].map(Change::Turned));
    assert!(turned.iter().all(Row::equal), "{turned:?}");
}

#[test]
fn two_runs_that_differ_break_a_promise() {
    let trembles = Norm { after: TREMBLES, ..norm() };
    let rows = run(trembles, "N3-D8", &[Change::Runs(100)]);
    assert!(
        matches!(&rows[0].outcome, Outcome::Cheat(why) if why.contains("two runs")),
        "{rows:?}"
    );
    let difference = rows[0].difference.as_ref().unwrap();
    assert_eq!(
        (difference.output.as_str(), &difference.at[..], difference.ulp),
        ("o", &[0, 2][..], 1)
    );
    assert!(rows[0].runs.is_some_and(|runs| runs < 100), "it ends at the first difference");
    // Where nothing is promised the difference is measured, and inside the bound it passes.
    let humble = Norm { claims: Claims::default(), after: TREMBLES, ..norm() };
    let rows = run(humble, "N3-D8", &[Change::Runs(100)]);
    assert_eq!(rows[0].outcome.name(), "passed");
    assert!(rows[0].difference.is_some() && !rows[0].equal());
}

#[test]
fn outside_the_bound_it_is_wrong_whatever_is_promised() {
    let wild = |_: &Spec<_>, o: &mut golden::ops::rms_norm::Outputs, run: usize| {
        if run == 1 {
            o.o[[0, 2]] += 0.1;
        }
    };
    for claims in [Claims::default(), norm().claims] {
        let rows = run(Norm { claims, after: wild, ..norm() }, "N3-D8", &[Change::Runs(100)]);
        assert_eq!(rows[0].outcome.name(), "failed");
    }
}

#[test]
fn a_batch_that_changes_an_answer_is_seen() {
    // Rows are off by one in batches of more than five.
    let shifted = |spec: &Spec<golden::ops::rms_norm::Case>,
                   o: &mut golden::ops::rms_norm::Outputs,
                   _: usize| {
        if 5 < spec.case.n {
            let first = o.o.row(0).to_owned();
            o.o.row_mut(3).assign(&first);
        }
    };
    let changes = [Change::Batch { of: 3, place: 2 }, Change::Batch { of: 8, place: 3 }];
    let rows = run(Norm { after: shifted, ..norm() }, "N1-D8", &changes);
    assert!(rows[0].equal());
    assert_eq!(rows[1].outcome.name(), "failed");
    // The last sequence of a batch does not see its state.
    let last = Fake::<GatedDeltaRule> {
        before: |_, x, _| {
            let last = x.state.dim().0 - 1;
            if 0 < last {
                x.state.index_axis_mut(ndarray::Axis(0), last).fill(0.0);
            }
        },
        ..Fake::HONEST
    };
    let changes = [Change::Batch { of: 3, place: 2 }, Change::Turned(1)];
    let rows = run(last, "B2-T5-HK1-HV2-K4-V4", &changes);
    assert!(rows.iter().all(|row| row.outcome.name() == "failed"), "{rows:?}");
}
