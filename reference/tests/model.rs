//! The whole model on its own: pieces, packing, snapshots and rollback must not change an answer.

use std::sync::Arc;

use golden::{
    Config, Engine, Rng, Weights,
    config::{Mixer, Mlp, Preset},
    engine::{Rows, Want},
    synthetic::Synthetic,
};
use ndarray::{Array2, Axis, concatenate, s};
use reference::{Model, Real};

/// Two full and three linear layers, a dense one, value heads three to a key head, K != V.
fn config() -> Config {
    let mut c = Preset::Tiny.config(Some(5), None).expect("a tiny config");
    c.layer_types = vec![Mixer::Linear, Mixer::Full, Mixer::Linear, Mixer::Linear, Mixer::Full];
    c.mlp_types[2] = Mlp::Dense;
    c.linear_num_value_heads = 6;
    c.linear_value_head_dim = 12;
    c
}

fn model<R: Real>() -> Model<R> {
    Model::new(Arc::new(Synthetic::new(config(), 3)))
}

fn prompt(t: usize, seed: u64) -> Vec<u32> {
    let mut rng = Rng::keyed("prompt", seed);
    (0..t).map(|_| rng.below(256) as u32).collect()
}

fn logits<R: Real>(model: &mut Model<R>, tokens: &[Vec<u32>]) -> Array2<f32> {
    model.forward(tokens, &Want::default()).expect("tokens of the vocabulary").logits
}

fn whole<R: Real>(tokens: &[Vec<u32>]) -> Array2<f32> {
    let mut model = model::<R>();
    model.reset(tokens.len()).expect("room");
    logits(&mut model, tokens)
}

fn relative(got: &Array2<f32>, want: &Array2<f32>) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let err: f64 = got.iter().zip(want).map(|(g, w)| square(g - w)).sum();
    (err / want.iter().map(|&w| square(w)).sum::<f64>()).sqrt()
}

#[test]
fn every_split_is_the_whole() {
    let tokens = prompt(77, 1);
    let want = whole::<f32>(std::slice::from_ref(&tokens));
    let mut splits: Vec<Vec<usize>> = (1..77).map(|at| vec![at, 77 - at]).collect();
    splits.extend([
        vec![1; 77],
        vec![2, 2, 73],
        vec![1, 3, 60, 13],
        vec![64, 1, 1, 11],
        vec![5, 0, 72],
    ]);
    for split in splits {
        let mut model = model::<f32>();
        model.reset(1).expect("room");
        let mut at = 0;
        let mut parts = Vec::new();
        for piece in &split {
            parts.push(logits(&mut model, &[tokens[at..at + piece].to_vec()]));
            at += piece;
        }
        let parts: Vec<_> = parts.iter().map(|x| x.view()).collect();
        let got = concatenate(Axis(0), &parts).expect("rows of one vocabulary");
        let error = relative(&got, &want);
        assert!(error <= 1e-5, "{split:?}: {error:e}");
        // Every op treats rows one by one: nothing depends on how they came.
        assert_eq!(got, want, "{split:?}");
    }
}

#[test]
fn neighbours_change_nothing() {
    let rows = [prompt(5, 1), prompt(1, 2), Vec::new(), prompt(66, 3), prompt(2, 4)];
    let all = whole::<f32>(&rows);
    let mut at = 0;
    for row in &rows {
        if !row.is_empty() {
            let alone = whole::<f32>(std::slice::from_ref(row));
            assert_eq!(all.slice(s![at..at + row.len(), ..]), alone);
        }
        at += row.len();
    }
}

#[test]
fn the_oracle_agrees() {
    let tokens = [prompt(130, 5)];
    let error = relative(&whole::<f32>(&tokens), &whole::<f64>(&tokens));
    assert!(error <= 2e-6, "{error:e}");
}

#[test]
fn a_snapshot_is_the_moment_it_was_taken() {
    let (head, one, other) = (prompt(9, 1), prompt(4, 2), prompt(6, 3));
    let mut model = model::<f32>();
    model.reset(1).expect("room");
    logits(&mut model, std::slice::from_ref(&head));
    let snapshot = model.snapshot().expect("a snapshot");
    let first = logits(&mut model, std::slice::from_ref(&one));
    logits(&mut model, std::slice::from_ref(&other));
    model.restore(snapshot).expect("it is there");
    assert_eq!(model.lengths(), [9]);
    assert_eq!(logits(&mut model, std::slice::from_ref(&one)), first);
    model.release(snapshot);
    assert!(model.restore(snapshot).is_err());
}

#[test]
fn rollback_leaves_what_was_kept() {
    for drafted in 0..=8 {
        for kept in 0..=drafted {
            let (a, b) = (prompt(7, 1), prompt(3, 2));
            let (draft, more) = (prompt(drafted, 3), prompt(3, 4));
            let mut model = model::<f32>();
            model.reset(2).expect("room");
            logits(&mut model, &[a.clone(), b.clone()]);
            let want = Want { rollback: true, ..Want::default() };
            model.forward(&[draft.clone(), draft.clone()], &want).expect("tokens");
            // The sequences keep different numbers of tokens.
            model.rollback(&[kept, drafted - kept]).expect("it was asked for");
            assert_eq!(model.lengths(), [7 + kept, 3 + drafted - kept]);
            let got = logits(&mut model, &[more.clone(), more.clone()]);
            let straight = |head: &[u32], n: usize| {
                let all = whole::<f32>(&[[head, &draft[..n], &more].concat()]);
                all.slice(s![head.len() + n.., ..]).to_owned()
            };
            assert_eq!(got.slice(s![..3, ..]), straight(&a, kept), "{kept} of {drafted}");
            assert_eq!(got.slice(s![3.., ..]), straight(&b, drafted - kept), "{kept} of {drafted}");
        }
    }
}

#[test]
fn rollback_needs_to_be_asked_for() {
    let mut model = model::<f32>();
    model.reset(1).expect("room");
    logits(&mut model, &[prompt(3, 1)]);
    assert!(model.rollback(&[1]).is_err());
    model.forward(&[prompt(3, 1)], &Want { rollback: true, ..Want::default() }).expect("tokens");
    assert!(model.rollback(&[4]).is_err());
}

#[test]
fn only_wanted_rows_get_logits() {
    let rows = [prompt(4, 1), Vec::new(), prompt(2, 2)];
    let all = whole::<f32>(&rows);
    let mut model = model::<f32>();
    model.reset(3).expect("room");
    let step =
        model.forward(&rows, &Want { logits: Rows::Last, ..Want::default() }).expect("tokens");
    assert_eq!(step.logits, all.select(Axis(0), &[3, 5]));
}

#[test]
fn the_mtp_cache_can_be_cut() {
    let tokens = prompt(6, 1);
    let mut model = model::<f32>();
    model.reset(1).expect("room");
    let hidden = model
        .forward(std::slice::from_ref(&tokens), &Want::default())
        .expect("tokens")
        .hidden
        .remove(0);
    let rows = |from: usize, to: usize| hidden.slice(s![from..to, ..]).to_owned();
    let whole = model.mtp(&[tokens[1..].to_vec()], &rows(0, 5)).expect("a head").logits;
    model.mtp_truncate(&[2]).expect("five entries");
    let again = model.mtp(&[tokens[3..].to_vec()], &rows(2, 5)).expect("a head").logits;
    assert_eq!(again, whole.slice(s![2.., ..]));
    assert!(model.mtp_truncate(&[9]).is_err());
}

#[test]
fn bad_tokens_are_refused() {
    let mut model = model::<f32>();
    model.reset(1).expect("room");
    let error =
        model.forward(&[vec![1, 256]], &Want::default()).expect_err("256 is no id").to_string();
    assert_eq!(error, "sequence 0, token 1: id 256 is not below vocab_size 256");
    assert!(model.forward(&[vec![1], vec![2]], &Want::default()).is_err());
}

#[test]
fn forty_eight_layers_stay_close_to_the_oracle() {
    let config = Preset::Tiny.config(Some(48), Some(16)).expect("a tiny config");
    let weights: Arc<dyn Weights> = Arc::new(Synthetic::new(config, 1));
    let tokens = [prompt(16, 9)];
    let run = |engine: &mut dyn Engine| {
        engine.reset(1).expect("room");
        engine.forward(&tokens, &Want::default()).expect("tokens").logits
    };
    let narrow = run(&mut Model::<f32>::new(weights.clone()));
    let wide = run(&mut Model::<f64>::new(weights));
    let error = relative(&narrow, &wide);
    assert!(error <= 1e-5, "{error:e}");
}
