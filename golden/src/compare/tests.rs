use ndarray::{Array2, array};

use super::{
    Bound, F32_RULE,
    listed::{self, Row},
    logits::{Allowed, Distance, distance},
    matrices,
};

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

const TENTH: Allowed = Allowed { rel_rms: 0.1, worst_row: 0.1 };

fn holds(d: &Distance, what: &str) -> bool {
    d.checks.iter().find(|check| check.what == what).unwrap().ok()
}

#[test]
fn divergence_of_two_small_distributions() {
    // p = (1/2, 1/2), q = (1/4, 3/4): KL = ln 2 - (ln 3) / 2.
    let want = array![[0.0_f32, 0.0]];
    let got = array![[0.0_f32, 3.0_f32.ln()]];
    let d = distance(&want.view(), &got.view(), &[Some(0)], TENTH);
    assert!((d.kl.mean - (2.0_f64.ln() - 3.0_f64.ln() / 2.0)).abs() < 1e-7, "{}", d.kl.mean);
    // -ln(1/4) + ln(1/2) = ln 2.
    assert!((d.delta_nll.unwrap().mean - 2.0_f64.ln()).abs() < 1e-7);
    assert_eq!(d.top1.mean, 0.0);
    // One value has no spread to speak of.
    assert_eq!((d.kl.error, d.whole.unwrap().nmse.error), (None, None));
    // An exact tie may fall either way.
    assert_eq!((d.flips.legal, d.flips.illegal, d.flips.smallest_margin), (1, 0, 0.0));
    assert!(!d.ok());
}

#[test]
fn a_flip_is_legal_by_what_may_be_off_and_not_by_what_is() {
    // Row of RMS 1 whose first token leads by 0.1: two logits may be off by 0.2 together.
    let mut want =
        Array2::<f32>::from_shape_fn((1, 1000), |(_, i)| if i % 2 == 0 { 1.0 } else { -1.0 });
    want[[0, 0]] = 1.1;
    let mut got = want.clone();
    got[[0, 2]] = 1.15;
    let d = distance(&want.view(), &got.view(), &[], TENTH);
    assert_eq!((d.flips.legal, d.flips.illegal), (1, 0));
    let flip = d.flips.widest.unwrap();
    assert_eq!((flip.want, flip.got), (0, 2));
    assert!((flip.margin - 0.1).abs() < 1e-6 && (flip.allowed - 0.2).abs() < 1e-3, "{flip:?}");
    // However far off everything else is: a larger error makes no flip legal.
    want[[0, 0]] = 1.5;
    got[[0, 0]] = 1.1;
    got.slice_mut(ndarray::s![0, 500..]).fill(-9.0);
    let d = distance(&want.view(), &got.view(), &[], TENTH);
    assert_eq!((d.flips.legal, d.flips.illegal), (0, 1));
    assert!(!holds(&d, "illegal flips") && !holds(&d, "relative RMS"));
}

#[test]
fn an_error_on_the_likely_token_alone_is_seen_by_the_divergence() {
    let mut want =
        Array2::<f32>::from_shape_fn((4, 100_000), |(_, i)| ((i * 37) % 101) as f32 / 25.0);
    want.column_mut(5).fill(14.0);
    let mut got = want.clone();
    got.column_mut(5).fill(13.0);
    let d = distance(&want.view(), &got.view(), &[], Allowed { rel_rms: 0.01, worst_row: 0.01 });
    assert!(holds(&d, "relative RMS") && holds(&d, "worst row"));
    assert!(!holds(&d, "mean KL") && !holds(&d, "KL of a row"), "{d:?}");
}

#[test]
fn errors_spread_over_a_row_give_the_divergence_of_their_share() {
    // Errors of relative size r: mean KL near r^2 s / 2, a hundredth of what ten times r allows.
    let mut rng = crate::Rng::keyed("errors spread", 0);
    let want = Array2::<f32>::from_shape_fn((200, 500), |_| rng.normal(0.0, 1.0));
    let got = want.mapv(|x| x + 0.01 * rng.normal(0.0, 1.0));
    let d = distance(&want.view(), &got.view(), &[], TENTH);
    let check = d.checks.iter().find(|check| check.what == "mean KL").unwrap();
    assert!((0.009..0.011).contains(&(check.value / check.allowed)), "{check:?}");
    assert!(d.ok(), "{d:?}");
    let whole = d.whole.unwrap();
    assert!((whole.rel_rms.value - 0.01).abs() < 4.0 * whole.rel_rms.error.unwrap(), "{whole:?}");
    assert!((whole.nmse.value - 1e-4).abs() < 4.0 * whole.nmse.error.unwrap(), "{whole:?}");
}

#[test]
fn a_row_that_is_not_finite_is_named() {
    let want = Array2::<f32>::from_shape_fn((3, 4), |(t, i)| (t + i) as f32);
    let mut got = want.clone();
    got[[1, 2]] = f32::NAN;
    let loose = Allowed { rel_rms: 1e300, worst_row: 1e300 };
    let d = distance(&want.view(), &got.view(), &[], loose);
    assert_eq!((d.not_finite, d.first_not_finite, d.ok()), (1, Some(1), false));
}

/// Rows of logits, and the same as lists of their `k` most likely tokens.
fn rows(logits: &Array2<f32>, k: usize) -> (Vec<Row>, Vec<Row>, Vec<f64>) {
    let wide: Vec<Vec<f64>> =
        logits.rows().into_iter().map(|row| row.iter().map(|&x| f64::from(x)).collect()).collect();
    let list = |x: &Vec<f64>| {
        let sum = x.iter().map(|x| x.exp()).sum::<f64>().ln();
        let mut all: Vec<(u32, f64)> =
            x.iter().enumerate().map(|(i, x)| (i as u32, x - sum)).collect();
        all.sort_by(|a, b| b.1.total_cmp(&a.1));
        all.truncate(k);
        Row::listed(all)
    };
    let lists = wide.iter().map(list).collect();
    let scales =
        wide.iter().map(|x| x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64).collect();
    (wide.into_iter().map(Row::Logits).collect(), lists, scales)
}

#[test]
fn a_list_of_everything_says_what_logits_say() {
    let mut rng = crate::Rng::keyed("listed", 0);
    let want = Array2::<f32>::from_shape_fn((20, 50), |_| 3.0 * rng.normal(0.0, 1.0));
    let got = want.mapv(|x| x + 0.2 * rng.normal(0.0, 1.0));
    let next = vec![Some(7); 20];
    let whole = distance(&want.view(), &got.view(), &next, TENTH);
    let (all, _, scales) = rows(&want, 50);
    let (_, lists, _) = rows(&got, 50);
    let d = listed::distance(&all, &lists, &scales, &next, TENTH);
    assert!((d.kl.mean - whole.kl.mean).abs() < 1e-12 && (d.kl.max - whole.kl.max).abs() < 1e-12);
    assert_eq!((d.top1, d.topk, d.k), (whole.top1, whole.topk, 10));
    assert_eq!((d.flips.legal, d.flips.illegal), (whole.flips.legal, whole.flips.illegal));
    assert!((d.delta_nll.unwrap().mean - whole.delta_nll.unwrap().mean).abs() < 1e-12);
    assert!(d.whole.is_none() && whole.listed.is_none());
    assert!((d.listed.unwrap().covered.mean - 1.0).abs() < 1e-12);
    // Of a shorter list the divergence is a lower bound, from whichever side the list comes.
    for k in [1, 5, 20] {
        let (_, short, _) = rows(&got, k);
        let d = listed::distance(&all, &short, &scales, &next, TENTH);
        assert!(d.kl.mean <= whole.kl.mean && d.k == k.min(10));
        assert_eq!(d.listed.unwrap().n, 20 * k);
        let (_, short, scales) = rows(&want, k);
        let (full, ..) = rows(&got, 50);
        let d = listed::distance(&short, &full, &scales, &next, TENTH);
        assert!(0.0 < d.kl.mean && d.kl.mean <= whole.kl.mean, "{k}");
    }
}

#[test]
fn listed_errors_beyond_their_share_fail() {
    let mut rng = crate::Rng::keyed("listed errors", 0);
    let want = Array2::<f32>::from_shape_fn((20, 50), |_| 3.0 * rng.normal(0.0, 1.0));
    let (all, _, scales) = rows(&want, 8);
    for (share, ok) in [(0.05, true), (0.3, false)] {
        let got = want.mapv(|x| x + share * 3.0 * rng.normal(0.0, 1.0));
        let (_, lists, _) = rows(&got, 8);
        let d = listed::distance(&all, &lists, &scales, &[], TENTH);
        assert_eq!(holds(&d, "log-probabilities"), ok, "{d:?}");
        assert!(d.delta_nll.is_none());
    }
    // One row alone.
    let (_, mut lists, _) = rows(&want, 8);
    if let Row::Listed(entries) = &mut lists[3] {
        for (_, logprob) in entries {
            *logprob -= 1.5;
        }
    }
    let d = listed::distance(&all, &lists, &scales, &[], TENTH);
    assert!(!holds(&d, "log-probabilities of a row"), "{d:?}");
    assert_eq!(d.listed.unwrap().worst_row_at, 3);
}
