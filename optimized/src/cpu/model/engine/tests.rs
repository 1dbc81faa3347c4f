use std::sync::Arc;

use golden::{
    Engine,
    config::Preset,
    engine::{Rows, Step, Want},
    synthetic::Synthetic,
    tap::Forced,
};
use ndarray::Array2;

use super::super::{Loading, Model, pieces::PIECE};
use super::{Format, Kept};
use crate::cpu::simd::Plain;

fn model(format: Format, piece: usize) -> Model<Plain> {
    kept((format, format.kept()), piece)
}

fn kept(format: (Format, Kept), piece: usize) -> Model<Plain> {
    let config = Preset::Tiny.config(Some(4), None).unwrap();
    let mut loading = Loading { tell: &mut |_, _| true, store: None };
    let mut model = Model::new(Plain, &Synthetic::new(config, 3), format, &mut loading).unwrap();
    model.piece = piece;
    model.reset(3).unwrap();
    model
}

/// Tokens of three sequences.
fn text(model: &Model<Plain>, lengths: [usize; 3]) -> Vec<Vec<u32>> {
    let vocab = model.config.vocab_size;
    lengths.map(|n| (0..n).map(|i| ((i * 7919 + n) % vocab) as u32).collect()).to_vec()
}

fn everything() -> Want {
    Want { hidden: true, routing: true, taps: true, ..Want::default() }
}

/// Bits are the same, and there is something to compare.
fn same(a: &Step, b: &Step) {
    let bits = |x: &Array2<f32>| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert!(!a.logits.is_empty() && a.logits.iter().all(|x| x.is_finite()));
    assert_eq!(bits(&a.logits), bits(&b.logits));
    assert_eq!(a.hidden.len(), b.hidden.len());
    assert!(a.hidden.iter().zip(&b.hidden).all(|(a, b)| bits(a) == bits(b)));
    assert_eq!(a.routing.len(), b.routing.len());
    for (a, b) in a.routing.iter().flatten().zip(b.routing.iter().flatten()) {
        assert!(a.ids == b.ids && a.margins == b.margins);
    }
    assert_eq!(a.taps.len(), b.taps.len());
    for (a, b) in a.taps.iter().zip(&b.taps) {
        assert!(a.name() == b.name() && a.value == b.value, "{}", a.name());
    }
}

#[test]
fn pieces_answer_what_the_whole_does() {
    let all = [Format::F32, Format::Bf16, Format::Int8].map(|format| (format, format.kept()));
    for format in all.into_iter().chain([(Format::Bf16, Kept::Int8)]) {
        let (mut whole, mut cut) = (kept(format, usize::MAX), kept(format, 64));
        for lengths in [[130, 3, 67], [1, 0, 99]] {
            let text = text(&whole, lengths);
            let want = whole.forward(&text, &everything()).unwrap();
            let got = cut.forward(&text, &everything()).unwrap();
            assert!(!want.taps.is_empty() && !want.routing.is_empty());
            same(&got, &want);
            assert_eq!(cut.lengths(), whole.lengths());
        }
        let states = |model: &Model<Plain>| model.linear_states().unwrap();
        for (a, b) in states(&cut).iter().flatten().zip(states(&whole).iter().flatten()) {
            assert!(a.conv == b.conv && a.recurrent == b.recurrent);
        }
    }
}

#[test]
fn pieces_answer_only_the_rows_that_are_asked_for() {
    let (mut whole, mut cut) = (model(Format::F32, usize::MAX), model(Format::F32, 64));
    let text = text(&whole, [130, 0, 67]);
    for (logits, last) in [(Rows::Last, Rows::Last), (Rows::All, Rows::None)] {
        let want = Want { logits, last, ..Want::default() };
        let want = [whole.forward(&text, &want).unwrap(), cut.forward(&text, &want).unwrap()];
        same(&want[1], &want[0]);
        let rows =
            |rows: Rows| if rows == Rows::All { 197 } else { 2 * usize::from(rows == Rows::Last) };
        assert_eq!(want[0].logits.nrows(), rows(logits));
        assert_eq!(want[0].hidden[0].nrows(), rows(last));
    }
}

#[test]
fn what_is_forced_reaches_its_rows() {
    let (mut whole, mut cut) = (model(Format::F32, usize::MAX), model(Format::F32, 64));
    let text = text(&whole, [130, 3, 67]);
    let told = whole.forward(&text, &everything()).unwrap();
    let name = "layers.2/residual/o";
    let mut value = told.taps.iter().find(|tap| tap.name() == name).unwrap().value.clone();
    let golden::tap::Value::Numbers(x) = &mut value else { panic!("numbers") };
    x.indexed_iter_mut().for_each(|(at, x)| *x = (at[0] * 31 % 17) as f64 / 8.0 - *x);
    let want = |value| Want {
        forced: Some(Arc::new(Forced::from([(name.to_owned(), value)]))),
        ..everything()
    };
    whole.reset(3).unwrap();
    let forced = whole.forward(&text, &want(value.clone())).unwrap();
    assert_ne!(forced.logits, told.logits);
    same(&cut.forward(&text, &want(value)).unwrap(), &forced);
    let short = golden::tap::Value::Numbers(ndarray::ArrayD::zeros(vec![199, 64]));
    let refused = cut.forward(&text, &want(short)).unwrap_err().to_string();
    assert!(refused.contains(name), "{refused}");
}

#[test]
fn the_draft_head_in_pieces() {
    let (mut whole, mut cut) = (model(Format::Bf16, usize::MAX), model(Format::Bf16, 64));
    let text = text(&whole, [70, 1, 90]);
    let step = whole.forward(&text, &Want::default()).unwrap();
    cut.forward(&text, &Want::default()).unwrap();
    let want = whole.mtp(&text, &step.hidden[0]).unwrap();
    same(&cut.mtp(&text, &step.hidden[0]).unwrap(), &want);
    // A head that was only fed goes on as one that answered.
    cut.mtp_truncate(&[0, 0, 0]).unwrap();
    cut.mtp_feed(&text, &step.hidden[0]).unwrap();
    assert_eq!(cut.mtp_lengths(), [70, 1, 90]);
    let (next, hidden) = (vec![vec![5]; 3], want.hidden[0].slice(ndarray::s![..3, ..]).to_owned());
    same(&cut.mtp(&next, &hidden).unwrap(), &whole.mtp(&next, &hidden).unwrap());
}

#[test]
fn a_piece_of_the_usual_size_changes_nothing() {
    let (mut whole, mut cut) = (model(Format::Int4, usize::MAX), model(Format::Int4, PIECE));
    let text = text(&whole, [PIECE + 3, 2, PIECE - 1]);
    let want = Want { logits: Rows::Last, ..Want::default() };
    same(&cut.forward(&text, &want).unwrap(), &whole.forward(&text, &want).unwrap());
}
