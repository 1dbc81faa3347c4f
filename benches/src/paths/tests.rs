//! Faults in variants are seen by the path that is there to see them, and honest variants pass.

use golden::{
    Claims, Plan, Rng, Spec,
    ops::{
        attention::Attention, causal_conv1d::CausalConv1d, gated_delta_rule::GatedDeltaRule,
        rms_norm::RmsNorm,
    },
    plan::{Form, Grid},
};

use super::{Parity, Path, lengths, ops};
use crate::{
    fake::Fake,
    registry::{Bench, Entry},
    report::Outcome,
    same::Row,
    sequence::Sequence,
    way::{Way, Who},
};

const DELTA: &str = "B1-T70-HK1-HV2-K4-V4";
const PACKED: &str = "B8-T26-HK1-HV2-K4-V4";

fn run<O: Sequence>(fake: Fake<O>, spec: &str, paths: &[Path]) -> Vec<Row> {
    let spec: Spec<O::Case> = spec.parse().unwrap();
    let inputs = O::inputs(&spec, &mut Rng::keyed("paths", 0));
    ops::run(&Way::Made(Box::new(fake)), "cpu/fake", &spec, inputs, paths)
}

/// The outcome of one path of a fake.
fn outcome<O: Sequence>(fake: Fake<O>, spec: &str, path: Path) -> &'static str {
    run(fake, spec, &[path])[0].outcome.name()
}

type Delta = Fake<GatedDeltaRule>;

fn delta() -> Delta {
    Delta::HONEST
}

#[test]
fn an_honest_variant_keeps_its_promises() {
    let paths = [Path::Split(vec![64, 6]), Path::Every(1), Path::Edit(3), Path::Heads];
    assert!(run(delta(), DELTA, &paths).iter().all(Row::equal));
    assert!(run(delta(), DELTA, &[Path::GateOne]).iter().all(Row::equal));
    let paths = [Path::Alone, Path::Poisoned(Parity::Even), Path::Poisoned(Parity::Odd)];
    assert!(run(delta(), PACKED, &paths).iter().all(Row::equal));
    let conv = run(Fake::<CausalConv1d>::HONEST, "B1-T9-C6-W4", &[Path::Split(vec![1, 1, 7])]);
    assert!(conv[0].equal());
    let attention =
        run(Fake::<Attention>::HONEST, "B1-T9-TK12-HQ4-HKV2-H4", &[Path::Every(2), Path::Heads]);
    assert!(attention.iter().all(Row::equal));
}

#[test]
fn a_state_that_is_not_read_fails() {
    let lost = Delta { before: |_, x, _| x.state.fill(0.0), ..delta() };
    assert_eq!(outcome(lost, DELTA, Path::Split(vec![64, 6])), "failed");
    let lost = Fake::<CausalConv1d> { before: |_, x, _| x.state.fill(0.0), ..Fake::HONEST };
    assert_eq!(outcome(lost, "B1-T9-C6-W4", Path::Every(4)), "failed");
}

#[test]
fn a_state_that_is_written_too_narrow_fails() {
    let narrow = Delta {
        after: |_, o, _| o.state.mapv_inplace(|s| golden::Dtype::Bf16.round(s)),
        ..delta()
    };
    assert_eq!(outcome(narrow, DELTA, Path::Every(1)), "failed");
    // Where the plan says so, and no bits are promised, it is right: the bound is that of this path.
    let declared = Delta {
        claims: Claims::default(),
        plan: Plan { state: Grid::Bf16, ..Plan::F32 },
        after: |_, o, _| o.state.mapv_inplace(|s| golden::Dtype::Bf16.round(s)),
        ..delta()
    };
    let rows = run(declared, DELTA, &[Path::Every(1), Path::Split(vec![64, 6])]);
    assert!(rows.iter().all(|row| row.outcome.name() == "passed" && !row.equal()), "{rows:?}");
}

#[test]
fn a_neighbour_that_leaks_fails() {
    // Each sequence but the first starts from the state that the one before it was given.
    let leaks = Delta {
        before: |_, x, _| {
            let count = x.state.dim().0;
            for i in (1..count).rev() {
                let other = x.state.index_axis(ndarray::Axis(0), i - 1).to_owned();
                x.state.index_axis_mut(ndarray::Axis(0), i).assign(&other);
            }
        },
        ..delta()
    };
    for path in [Path::Alone, Path::Poisoned(Parity::Odd)] {
        assert_eq!(outcome(Delta { before: leaks.before, ..delta() }, PACKED, path), "failed");
    }
}

#[test]
fn an_effect_before_its_cause_fails() {
    // The first output is of the last token.
    let early = Delta {
        after: |_, o, _| {
            let last = o.o.index_axis(ndarray::Axis(0), o.o.dim().0 - 1).to_owned();
            o.o.index_axis_mut(ndarray::Axis(0), 0).assign(&last);
        },
        ..delta()
    };
    assert_eq!(outcome(early, DELTA, Path::Edit(69)), "failed");
    let deaf = Delta { before: |_, x, _| x.q.fill(1.0), after: |_, o, _| o.o.fill(1.0), ..delta() };
    assert_eq!(outcome(deaf, DELTA, Path::Edit(3)), "mistrusted");
}

#[test]
fn a_gate_that_is_none_fails() {
    let gated = Delta { before: |_, x, _| x.g.mapv_inplace(|g| g - 1e-3), ..delta() };
    assert_eq!(outcome(gated, DELTA, Path::GateOne), "failed");
    let mixed = Delta {
        before: |_, x, _| {
            let first = x.beta.column(0).to_owned();
            x.beta.column_mut(1).assign(&first);
        },
        ..delta()
    };
    assert_eq!(outcome(mixed, DELTA, Path::Heads), "failed");
}

/// One unit in the last place is inside every bound, and outside a promise of equal bits.
#[test]
fn a_broken_promise_is_a_cheat() {
    let last = |spec: &Spec<golden::ops::gated_delta_rule::Case>,
                o: &mut golden::ops::gated_delta_rule::Outputs,
                _: usize| {
        if spec.case.t < 70 {
            o.o[[0, 0, 0]] = f32::from_bits(o.o[[0, 0, 0]].to_bits() + 1);
        }
    };
    let path = Path::Split(vec![64, 6]);
    let rows = run(Delta { after: last, ..delta() }, DELTA, std::slice::from_ref(&path));
    assert!(matches!(&rows[0].outcome, Outcome::Cheat(why) if why.contains("however it is cut")));
    let difference = rows[0].difference.as_ref().unwrap();
    assert_eq!(
        (difference.at.as_slice(), difference.differing, difference.ulp),
        (&[0, 0, 0][..], 2, 1)
    );
    let humble = Delta { claims: Claims::default(), after: last, ..delta() };
    let rows = run(humble, DELTA, &[path]);
    assert_eq!(rows[0].outcome.name(), "passed");
    assert!(rows[0].difference.is_some() && 0.0 < rows[0].budget());
}

/// The chunked form promises equal bits where it is cut at whole chunks, and elsewhere holds its bound.
#[test]
fn chunks_are_equal_at_their_ends() {
    let spec: Spec<_> = "B1-T30-HK1-HV2-K4-V4".parse().unwrap();
    let inputs = <GatedDeltaRule as golden::Op>::inputs(&spec, &mut Rng::keyed("paths", 0));
    let way = Way::<GatedDeltaRule>::Reference(Form::Chunked(7));
    let paths = [Path::Split(vec![14, 16]), Path::Every(7), Path::Split(vec![13, 17])];
    let rows = ops::run(&way, "reference/chunk7", &spec, inputs, &paths);
    assert!(rows[0].equal() && rows[0].claim.is_some());
    assert!(rows[1].equal() && rows[1].claim.is_some());
    assert!(!rows[2].equal() && rows[2].claim.is_none());
    assert_eq!(rows[2].outcome.name(), "passed");
}

#[test]
fn what_no_path_can_say_is_said() {
    let nothing = |path| outcome(delta(), DELTA, path);
    assert_eq!(nothing(Path::Resume(3)), "unsupported");
    let nan = Delta { after: |_, o, _| o.o[[0, 0, 0]] = f32::NAN, ..delta() };
    assert_eq!(outcome(nan, DELTA, Path::Every(1)), "mistrusted");
    let norm = Bench::<RmsNorm>(&[]);
    let rows = norm.paths("N3-D8", &Who::named("reference/f32", None), &[Path::Every(1)]);
    assert_eq!(rows[0].outcome.name(), "unsupported");
}

#[test]
fn lengths_have_their_sum() {
    assert_eq!(lengths(8, 208), [1, 2, 3, 4, 63, 64, 65, 6]);
    for (count, total) in [(1, 1), (2, 2), (3, 9), (8, 8), (8, 100), (20, 1000)] {
        let lengths = lengths(count, total);
        assert_eq!((lengths.len(), lengths.iter().sum::<usize>()), (count, total));
        assert!(lengths.iter().all(|&length| 0 < length));
    }
}
