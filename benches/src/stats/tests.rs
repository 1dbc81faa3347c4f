use golden::Rng;

use super::{
    above, benjamini_hochberg, change_points, equivalence, median, median_interval, quantile,
    rank_sum, ratio_interval, signed_rank,
};

fn close(got: f64, want: f64, within: f64) {
    assert!((got - want).abs() <= within, "{got} for {want}");
}

fn normals(rng: &mut Rng, n: usize, mean: f32, spread: f32) -> Vec<f64> {
    (0..n).map(|_| f64::from(rng.normal(mean, spread))).collect()
}

#[test]
fn quantiles_lie_between_samples() {
    assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
    assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    assert_eq!(quantile(&[1.0, 2.0, 3.0, 4.0, 5.0], 0.25), 2.0);
    assert_eq!(quantile(&[1.0, 2.0], 0.99), 1.99);
    assert_eq!(quantile(&[7.0], 0.3), 7.0);
    assert!(median(&[]).is_nan());
}

#[test]
fn tails_of_the_normal_law() {
    close(above(0.0), 0.5, 1e-15);
    close(above(1.959963984540054), 0.025, 1e-12);
    close(above(-1.0), 0.8413447460685429, 1e-12);
}

/// Numbers that R gives: `wilcox.test(c(1.1, 2.2, 3.3, -0.4, 5.5), alternative = "greater")`, and of
/// two samples with `exact = FALSE`.
#[test]
fn rank_tests_have_the_known_chances() {
    let few = signed_rank(&[1.1, 2.2, 3.3, -0.4, 5.5], 0.0);
    close(few.above, 2.0 / 32.0, 1e-12);
    close(few.below, 31.0 / 32.0, 1e-12);
    close(few.either(), 4.0 / 32.0, 1e-12);
    // Nothing differs, nothing is said.
    assert_eq!(signed_rank(&[2.0, 2.0], 2.0).either(), 1.0);
    // 30 differences, all above: W = 465, mean 232.5, spread sqrt(2363.75).
    let many: Vec<f64> = (1..=30).map(f64::from).collect();
    close(signed_rank(&many, 0.0).above, above((232.5 - 0.5) / 2363.75_f64.sqrt()), 1e-15);
    // U = 9 of 9 wins of b over a: z = (9 - 4.5 - 0.5) / sqrt(3 * 3 * 7 / 12).
    let sums = rank_sum(&[1.0, 2.0, 3.0], &[4.0, 5.0, 6.0]);
    close(sums.above, above(4.0 / 5.25_f64.sqrt()), 1e-15);
    assert!(0.9 < sums.below);
    // With all equal there is no order.
    assert_eq!(rank_sum(&[1.0; 4], &[1.0; 4]).either(), 1.0);
}

/// By chance a test at 5 % calls 5 %.
#[test]
fn rank_tests_are_wrong_as_often_as_they_say() {
    let mut rng = Rng::keyed("rank tests", 1);
    let trials = 4000;
    let (mut paired, mut apart, mut exact) = (0, 0, 0);
    for _ in 0..trials {
        let (a, b) = (normals(&mut rng, 40, 1.0, 0.3), normals(&mut rng, 50, 1.0, 0.3));
        paired += usize::from(signed_rank(&a, 1.0).either() <= 0.05);
        apart += usize::from(rank_sum(&a, &b).either() <= 0.05);
        exact += usize::from(signed_rank(&a[..12], 1.0).either() <= 0.05);
    }
    for fired in [paired, apart, exact] {
        close(f64::from(u32::try_from(fired).unwrap()) / f64::from(trials), 0.05, 0.013);
    }
}

#[test]
fn intervals_hold_the_median_as_often_as_they_say() {
    let mut rng = Rng::keyed("intervals", 2);
    let trials = 300;
    let (mut held, mut moved, mut ratio) = (0, 0, 0);
    for trial in 0..trials {
        let groups: Vec<Vec<f64>> = (0..3).map(|_| normals(&mut rng, 20, 0.5, 1.0)).collect();
        let interval = median_interval(&groups, 0.95, trial);
        held += u32::from(interval.lo <= 0.5 && 0.5 <= interval.hi);
        // Groups that are off together, each in its own way.
        let middles: Vec<_> = (0..9).map(|_| rng.normal(0.5, 1.0)).collect();
        let groups: Vec<Vec<f64>> =
            middles.into_iter().map(|middle| normals(&mut rng, 20, middle, 0.1)).collect();
        let interval = median_interval(&groups, 0.95, trial);
        moved += u32::from(interval.lo <= 0.5 && 0.5 <= interval.hi);
        let a: Vec<Vec<f64>> = (0..6).map(|_| normals(&mut rng, 10, 10.0, 1.0)).collect();
        let b: Vec<Vec<f64>> = (0..6).map(|_| normals(&mut rng, 10, 11.0, 1.0)).collect();
        let interval = ratio_interval(&a, &b, 0.95, trial);
        ratio += u32::from(interval.lo <= 1.1 && 1.1 <= interval.hi);
    }
    // Of groups that differ by chance alone the interval is too wide, of few that differ otherwise it is
    // a little too narrow.
    for held in [held, moved, ratio] {
        close(f64::from(held) / trials as f64, 0.95, 0.06);
    }
    // The same seed, the same interval.
    let groups = [normals(&mut rng, 30, 0.0, 1.0)];
    assert_eq!(median_interval(&groups, 0.95, 7), median_interval(&groups, 0.95, 7));
    // Ends are samples, so that two seeds may well agree, and many do not.
    let first = median_interval(&groups, 0.95, 7);
    assert!((8..40).any(|seed| median_interval(&groups, 0.95, seed) != first));
}

#[test]
fn equivalence_is_proven_of_what_is_equal_and_of_nothing_else() {
    let mut rng = Rng::keyed("equivalence", 3);
    let (mut same, mut edge, mut few) = (0, 0, 0);
    for _ in 0..400 {
        same += u32::from(equivalence(&normals(&mut rng, 200, 0.0, 0.05), 0.03) <= 0.05);
        // A true ratio at the end of the margin is called within it no more often than 5 %.
        let at = 0.03_f32.ln_1p();
        edge += u32::from(equivalence(&normals(&mut rng, 200, at, 0.05), 0.03) <= 0.05);
        few += u32::from(equivalence(&normals(&mut rng, 4, 0.0, 0.05), 0.03) <= 0.05);
    }
    assert!(396 <= same, "{same}");
    assert!(edge <= 36, "{edge}");
    assert_eq!(few, 0, "four samples prove nothing");
}

/// The example of the paper of 1995.
#[test]
fn many_questions_are_corrected_together() {
    let p = [
        0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262,
        0.5719, 0.6528, 0.7590, 1.0,
    ];
    let q = benjamini_hochberg(&p);
    assert_eq!(q.iter().filter(|&&q| q <= 0.05).count(), 4);
    close(q[0], 0.0015, 1e-12);
    close(q[3], 0.035625, 1e-12);
    // In whatever order they are asked.
    let mut turned = p;
    turned.reverse();
    let mut back = benjamini_hochberg(&turned);
    back.reverse();
    assert_eq!(back, q);
    assert!(q.windows(2).all(|q| q[0] <= q[1]));
    assert!(benjamini_hochberg(&[]).is_empty());
}

#[test]
fn changes_are_found_where_they_are() {
    let mut rng = Rng::keyed("changes", 4);
    let mut series = normals(&mut rng, 20, 100.0, 1.0);
    series.extend(normals(&mut rng, 15, 105.0, 1.0));
    series.extend(normals(&mut rng, 20, 98.0, 1.0));
    // One bad night is no change.
    series[8] = 140.0;
    let found = change_points(&series, 0.05, 0);
    let at: Vec<usize> = found.iter().map(|change| change.at).collect();
    assert_eq!(at, [20, 35]);
    close(found[0].before, 100.0, 1.0);
    close(found[0].after, 105.0, 1.0);
    close(found[1].after, 98.0, 1.0);
    assert!(change_points(&series[..5], 0.05, 0).is_empty(), "too short to say");
    assert!(change_points(&[3.0; 30], 0.05, 0).is_empty(), "nothing changes");
}

#[test]
fn a_series_without_a_change_seldom_has_one() {
    let mut rng = Rng::keyed("no changes", 5);
    let found: usize = (0..60)
        .map(|seed| change_points(&normals(&mut rng, 30, 1.0, 0.1), 0.01, seed).len().min(1))
        .sum();
    assert!(found <= 3, "{found} of 60");
}
