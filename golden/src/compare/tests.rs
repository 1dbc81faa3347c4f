use ndarray::{Array2, array};

use super::{Bound, F32_RULE, logits::distance, matrices};

fn want() -> Array2<f32> {
    Array2::from_shape_fn((130, 8), |(t, d)| ((t * 8 + d) as f32 * 0.37).sin() + 1.5)
}

#[test]
fn the_same_answer_passes_and_uses_nothing() {
    let finding = matrices("o", &want(), &want(), &F32_RULE);
    assert!(finding.ok);
    assert_eq!((finding.budget, finding.ulp.1, finding.pattern), (0.0, 0, None));
}

#[test]
fn one_nan_fails_whatever_the_bound() {
    for value in [f32::NAN, f32::INFINITY] {
        let mut got = want();
        got[[129, 7]] = value;
        let loose = Bound::Relative { rel_rms: 1e30, worst_token: 1e30 };
        for bound in [F32_RULE, loose, Bound::Exact] {
            let finding = matrices("o", &want(), &got, &bound);
            assert!(!finding.ok, "{value} under {bound:?}");
            assert_eq!(finding.not_finite, 1);
        }
    }
}

#[test]
fn one_wrong_token_fails_though_the_whole_is_close() {
    let mut got = want();
    got.row_mut(77).mapv_inplace(|x| x * (1.0 + 2e-4));
    let finding = matrices("o", &want(), &got, &F32_RULE);
    assert!(finding.rel_rms <= 2e-5 && !finding.ok, "{finding:?}");
    assert_eq!(finding.worst_token_at, 77);
    assert_eq!(finding.pattern.as_deref(), Some("only row 77 of 130"));
}

#[test]
fn a_period_is_called_by_its_name() {
    let mut got = want();
    for t in (0..130).step_by(64) {
        got.row_mut(t).fill(0.0);
    }
    let pattern = matrices("o", &want(), &got, &F32_RULE).pattern.unwrap();
    assert!(pattern.starts_with("only rows with row % 64 == 0 -> chunk boundary"), "{pattern}");
}

#[test]
fn another_shape_is_a_finding() {
    let got = Array2::zeros((130, 7));
    assert!(!matrices("o", &want(), &got, &F32_RULE).ok);
}

#[test]
fn an_error_where_zeros_should_be_fails() {
    let want = Array2::zeros((2, 2));
    let mut got = want.clone();
    assert!(matrices("o", &want, &got, &F32_RULE).ok);
    got[[1, 1]] = 1e-30;
    assert!(!matrices("o", &want, &got, &F32_RULE).ok);
}

#[test]
fn divergence_of_two_small_distributions() {
    // p = (1/2, 1/2), q = (1/4, 3/4): KL = ln 2 - (ln 3) / 2.
    let want = array![[0.0_f32, 0.0]];
    let got = array![[0.0_f32, 3.0_f32.ln()]];
    let d = distance(&want.view(), &got.view(), &[Some(0)]);
    assert!((d.kl.mean - (2.0_f64.ln() - 3.0_f64.ln() / 2.0)).abs() < 1e-7, "{}", d.kl.mean);
    // -ln(1/4) + ln(1/2) = ln 2.
    assert!((d.delta_nll.unwrap().mean - 2.0_f64.ln()).abs() < 1e-7);
    assert_eq!(d.top1, 0.0);
    assert_eq!((d.legal_flips, d.illegal_flips), (1, 0));
}

#[test]
fn a_flip_beyond_the_error_of_its_row_is_illegal() {
    let mut want = Array2::<f32>::zeros((1, 1000));
    want[[0, 3]] = 5.0;
    let mut got = want.clone();
    got[[0, 4]] = 5.1;
    let d = distance(&want.view(), &got.view(), &[]);
    assert_eq!((d.legal_flips, d.illegal_flips), (0, 1));
}
