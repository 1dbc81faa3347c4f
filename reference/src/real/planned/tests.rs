use golden::{
    Dtype, Plan,
    plan::{Cache, Grid, Sums, Term},
};

use super::{HOT, Planned, Rounding, Site, Step, round, under};
use crate::Real;

fn nearest(plan: &Plan, f: impl FnOnce() -> Planned) -> f64 {
    under(plan, None, Rounding::Nearest, f).to_f64()
}

#[test]
fn nearest_is_the_arithmetic_of_f32() {
    let mut rng = golden::Rng::keyed("planned", 0);
    for _ in 0..20_000 {
        let (a, b) = (rng.normal(0.0, 3.0), rng.normal(0.0, 3.0));
        let wide = |x: f32| Planned::of(f64::from(x));
        let got = |f: fn(Planned, Planned) -> Planned| nearest(&Plan::F32, || f(wide(a), wide(b)));
        assert_eq!(got(|a, b| a + b), f64::from(a + b));
        assert_eq!(got(|a, b| a - b), f64::from(a - b));
        assert_eq!(got(|a, b| a * b), f64::from(a * b));
        assert_eq!(got(|a, b| a / b), f64::from(a / b));
        assert_eq!(nearest(&Plan::F32, || wide(a.abs()).sqrt()), f64::from(a.abs().sqrt()));
    }
}

#[test]
fn nearest_stores_as_the_storage_types_do() {
    let mut rng = golden::Rng::keyed("store", 0);
    for (grid, dtype) in
        [(Grid::Bf16, Dtype::Bf16), (Grid::F16, Dtype::F16), (Grid::Fp8, Dtype::Fp8)]
    {
        for i in 0..20_000 {
            // From far below the smallest normal number to above the largest.
            let x = rng.normal(0.0, 1.0) * 2.0_f32.powi(i % 40 - 22);
            let plan = Plan::F32.round(Site::Norm, grid);
            let got = nearest(&plan, || Planned::of(f64::from(x)).at(Site::Norm));
            assert_eq!(got, f64::from(dtype.round(x)), "{grid} {x}");
        }
    }
}

#[test]
fn random_rounding_is_fair_and_leaves_exact_numbers_alone() {
    let third = 1.0 / 3.0;
    let bf16 = |x| round(x, Step::new(Grid::Bf16), HOT.get());
    let (mut sum, mut low, mut high) = (0.0, f64::MAX, f64::MIN);
    let n = 20_000_u32;
    for seed in 0..u64::from(n) {
        under(&Plan::F32, None, Rounding::Random(seed), || {
            let x = bf16(third);
            assert_eq!(x, bf16(third), "alike within a run");
            sum += x;
            (low, high) = (low.min(x), high.max(x));
            assert_eq!(bf16(0.375), 0.375);
            assert_eq!((Planned::of(3.0) + Planned::of(4.0)).to_f64(), 7.0);
        });
    }
    assert_eq!(high - low, 2.0_f64.powi(-9), "one step of bf16 below a half");
    let mean = sum / f64::from(n);
    // Standard error of the mean of n draws at the odds 1/3 : 2/3.
    let sigma = (high - low) * (2.0 / 9.0 / f64::from(n)).sqrt();
    assert!((mean - third).abs() < 6.0 * sigma, "{mean}");
}

#[test]
fn sums_of_small_integers_are_exact_in_every_run_and_others_in_none() {
    let spread = |terms: &[f64]| {
        let runs = (0..64).map(|seed| {
            under(&Plan::F32, None, Rounding::Random(seed), || {
                Planned::sum(terms.len(), |i| Planned::of(terms[i])).to_f64()
            })
        });
        let all: Vec<f64> = runs.collect();
        all.iter().fold(f64::MIN, |a, &b| a.max(b)) - all.iter().fold(f64::MAX, |a, &b| a.min(b))
    };
    let small: Vec<f64> = (0..300).map(|i| f64::from(i % 17 - 8)).collect();
    assert_eq!(spread(&small), 0.0);
    // In this order every partial sum is exact; from the middle on, none is.
    let mut ordered = vec![2.0_f64.powi(24), -(2.0_f64.powi(24))];
    ordered.extend([1.0; 6]);
    assert!(1.0 <= spread(&ordered));
}

#[test]
fn seeds_give_different_runs_and_the_same_seed_the_same() {
    let run = |seed| {
        under(&Plan::F32, None, Rounding::Random(seed), || {
            (1..100)
                .map(|i| Planned::one() / Planned::of(f64::from(i)))
                .fold(Planned::zero(), |a, b| a + b)
        })
        .to_f64()
    };
    assert_eq!(run(1), run(1));
    assert!((2..20).any(|seed| run(seed) != run(1)));
}

#[test]
fn a_cache_in_eight_bits_counts_steps_of_a_row() {
    let plan = Plan { cache: Cache::Int8, ..Plan::F32 };
    let cached = |x: &[f64], rounding| {
        let row: Vec<Planned> = x.iter().map(|&x| Planned(x)).collect();
        let (step, whole) = under(&plan, None, rounding, || Planned::cached(&row)).unwrap();
        (step.0, whole.into_iter().map(|x| x.0).collect::<Vec<_>>())
    };
    // The largest of the row is 127 steps, a half goes to the even one.
    let row = [-254.0, 3.0, 5.0, 2.0, 0.0, 100.9];
    assert_eq!(cached(&row, Rounding::Nearest), (2.0, vec![-127.0, 2.0, 2.0, 1.0, 0.0, 50.0]));
    assert_eq!(cached(&[0.0; 3], Rounding::Nearest), (0.0, vec![0.0; 3]));
    assert!(cached(&[1.0, f64::NAN], Rounding::Nearest).0.is_nan());
    let (mut sum, runs) = (0.0, 2000);
    for seed in 0..runs {
        let (step, whole) = cached(&row, Rounding::Random(seed));
        assert_eq!((step, whole[0], whole[3], whole[4]), (2.0, -127.0, 1.0, 0.0));
        assert!([1.0, 2.0].contains(&whole[1]) && [50.0, 51.0].contains(&whole[5]));
        sum += whole[5];
    }
    // Six standard errors of draws at the odds 0.45 : 0.55.
    let (mean, n) = (sum / runs as f64, runs as f64);
    assert!((mean - 50.45).abs() < 6.0 * (0.45 * 0.55 / n).sqrt(), "{mean}");
    // What multiplies them has finer steps where the plan says so, and none where it does not.
    let counted = |plan: &Plan, x: &[f64]| {
        let row: Vec<Planned> = x.iter().map(|&x| Planned(x)).collect();
        let read = under(plan, None, Rounding::Nearest, || Planned::counted(&row));
        read.map(|row| row.into_iter().map(|x| x.0).collect::<Vec<_>>())
    };
    let fine = Plan { cache: Cache::Int8ByInt16, ..Plan::F32 };
    let row = [-65534.0, 3.0, 5.0, 2.0, 0.0, 100.9];
    assert_eq!(counted(&fine, &row), Some(vec![-65534.0, 4.0, 4.0, 2.0, 0.0, 100.0]));
    assert_eq!(counted(&plan, &row), None);
    assert!(under(&fine, None, Rounding::Nearest, || Planned::cached(&[]).is_some()));
    let alone = |term| {
        under(&plan, Some(term), Rounding::Nearest, || Planned::cached(&[Planned(1.0)]).is_some())
    };
    assert!(alone(Term::Cache) && !alone(Term::Dot));
    assert!(under(&Plan::F32, None, Rounding::Nearest, || Planned::cached(&[]).is_none()));
}

/// `1` and then, from the 17th factor on, `rest`: an inner product with ones, less one.
fn beside_one(rest: &[f64], rounding: Rounding) -> f64 {
    let mut x = vec![0.0; 64];
    x[0] = 1.0;
    x[16..16 + rest.len()].copy_from_slice(rest);
    let sum = || Planned::inner(x.len(), |i| Planned(x[i]));
    under(&Plan::F32.truncated(16), None, rounding, sum).to_f64() - 1.0
}

/// What an H200 answered, with mma as with wgmma (m16n8k16 and a product of torch, bf16 into f32).
#[test]
fn a_tensor_core_is_emulated_to_the_bit() {
    let small = |bits: i32| 2.0_f64.powi(-bits);
    let nearest = |rest: &[f64]| beside_one(rest, Rounding::Nearest);
    assert_eq!(nearest(&[small(24); 16]), small(20));
    assert_eq!(nearest(&[small(25); 16]), small(21));
    assert_eq!(nearest(&[small(26); 16]), 0.0, "cut before they are added");
    assert_eq!(nearest(&[small(27); 16]), 0.0);
    assert_eq!(nearest(&[1.5 * small(24)]), 0.0, "towards zero, not to the nearest");
    assert_eq!(nearest(&[-small(25)]), -small(24));
    for apart in 1..=20 {
        let mut two = vec![0.0; apart + 1];
        (two[0], two[apart]) = (small(24), small(24));
        let together = apart < 16;
        assert_eq!(nearest(&two), if together { small(23) } else { 0.0 }, "{apart} apart");
    }
}

/// What an H200 answered of 128 products of codes (`wgmma`, m64n8k32): codes drawn from a normal
/// distribution, from all, and a third of any size.
#[test]
fn sums_of_codes_on_a_tensor_core_are_emulated_to_the_bit() {
    let code = |hex: &[u8]| {
        let digits = std::str::from_utf8(hex).unwrap();
        Planned(f64::from(golden::fp8::to_f32(u8::from_str_radix(digits, 16).unwrap())))
    };
    let codes = |hex: &str| hex.as_bytes().chunks(2).map(code).collect::<Vec<_>>();
    let plan = Plan { sums: Sums::Fp22, ..Plan::F32.w8a8() };
    for (x, w, answer) in FP22 {
        let (x, w) = (codes(x), codes(w));
        assert_eq!(nearest(&plan, || Planned::of_codes(&x, &w)), *answer);
        // Nobody else adds them up so.
        assert_ne!(nearest(&Plan::F32, || Planned::of_codes(&x, &w)), *answer);
    }
    // 13 bits after the first: of 448 the last is 1/32.
    let beside = |small: f64| {
        let (x, w) = ([448.0, small].map(Planned), [1.0, 1.0].map(Planned));
        nearest(&plan, || Planned::of_codes(&x, &w))
    };
    assert_eq!((beside(1.0 / 32.0), beside(1.0 / 64.0)), (448.0 + 1.0 / 32.0, 448.0));
    assert_eq!((beside(-1.0 / 32.0), beside(-1.0 / 64.0)), (448.0 - 1.0 / 32.0, 448.0));
}

#[test]
fn activations_in_fp8_are_codes_of_a_group() {
    let plan = Plan::F32.w8a8();
    let codes = |x: &[f64], rounding| {
        let row: Vec<Planned> = x.iter().map(|&x| Planned(x)).collect();
        let (scales, codes) = under(&plan, None, rounding, || Planned::codes(&row)).unwrap();
        let values = |x: Vec<Planned>| x.into_iter().map(|x| x.0).collect::<Vec<_>>();
        (values(scales), values(codes))
    };
    // The largest of a group is 448; a half goes to the even code.
    let mut row = [0.0; 130];
    (row[0], row[1], row[2], row[127]) = (2.0, 1.0, 0.074_218_75, -896.0);
    row[129] = -1e-3;
    let (low, high) = (0.035_156_25, 0.039_062_5);
    let (scales, of_row) = codes(&row, Rounding::Nearest);
    assert_eq!((scales.len(), scales[0]), (2, 2.0));
    assert!((scales[1] * 448.0 / 1e-3 - 1.0).abs() < 1e-6, "{scales:?}");
    assert_eq!(of_row[..3], [1.0, 0.5, high]);
    assert_eq!(of_row[127..], [-448.0, 0.0, -448.0]);
    // Of zeros, and of what is hardly more, there are no codes.
    assert_eq!(codes(&[0.0; 3], Rounding::Nearest), (vec![0.0], vec![0.0; 3]));
    assert_eq!(codes(&[1e-30; 2], Rounding::Nearest).1, [0.0; 2]);
    assert!(codes(&[1.0, f64::NAN], Rounding::Nearest).1[1].is_nan());
    let runs: Vec<f64> = (0..200).map(|seed| codes(&row, Rounding::Random(seed)).1[2]).collect();
    assert!(runs.iter().all(|x| [low, high].contains(x)));
    assert!(runs.contains(&low) && runs.contains(&high));
    let alone =
        |term| under(&plan, Some(term), Rounding::Nearest, || Planned::codes(&[Planned(1.0)]));
    assert!(alone(Term::Activations).is_some() && alone(Term::Dot).is_none());
}

#[test]
fn random_runs_of_a_tensor_core_are_too_small_on_average_and_nearest_ones_are_not() {
    let mut rng = golden::Rng::keyed("truncated", 0);
    let rows: Vec<Vec<f64>> =
        (0..64).map(|_| (0..272).map(|_| f64::from(rng.normal(0.0, 1.0))).collect()).collect();
    // The slope of the error against the sum, as the judge has it.
    let slope = |plan: &Plan, rounding| {
        under(plan, None, rounding, || {
            let (mut cross, mut square) = (0.0, 0.0);
            for row in &rows {
                let want: f64 = row.iter().sum();
                let got = Planned::inner(row.len(), |i| Planned(row[i])).to_f64();
                cross += (got - want) * want;
                square += want * want;
            }
            cross / square
        })
    };
    let cut = Plan::F32.truncated(16);
    let hardware = slope(&cut, Rounding::Nearest);
    let mean = |plan| (0..64).map(|seed| slope(plan, Rounding::Random(seed))).sum::<f64>() / 64.0;
    let (of_cuts, of_nearest) = (mean(&cut), mean(&Plan::F32));
    assert!(hardware < -1e-7, "{hardware}");
    assert!(of_cuts < hardware / 5.0 && 2.0 * hardware < of_cuts, "{of_cuts} of {hardware}");
    assert!(of_nearest.abs() < hardware.abs() / 5.0, "{of_nearest} of {hardware}");
}

/// Codes, codes, and the sum of their products.
#[rustfmt::skip]
const FP22: &[(&str, &str, f64)] = &[
    ("f6eeecf7d7ebf1f7ed63efe1e0786169edf36d5f7061ec6f72ddfbf651ecefda79d35cef5f4e5be9d863dcc97bf277ecf16a52e8\
      6e6873795a71deec76f0feeec7f2ebf1e0b9783ceddef1f0e9eb67f1e957ec6ef5e95ddc62e9f26ef2e963796c736ff175eff172\
      756bd8dbfaecf6f370eb746f5f636ae87ce1c079f9785765",
     "ec61f873d4ee76ed76ec6fe6f7d577c86bedefd4e2f9e36ce8f773e35aedd977f2f23c704762f8eddac2f0f3cb6e70f0f55876ef\
      70f1dc63794adeec6f664876ed74efda6aedf16374ed79ecf176766c3af3eeed627a526bdee073e66c64e8d9e4fae260e173dce6\
      ecf466f32d635d71dee66aef61cb71e873626be06bf8cffa",
     -457_760.0),
    ("0c798ece23f000f54459414c944df72122ac38414f0dc408acaf5b52e53334531cb20a6aa27065d3afc5f45a91c8287442f647c2\
      60670417aa3196ae568cca33932314e0e907cbe4883f58a4093394ce9b258c6780bc5f1be0691d8b663b4c7dd7bcca8def341534\
      9ba1c3c4ac963f5a2fc0739eab4449095611007109ca5840",
     "c7ab077dbad1a2800c36b48e014e3fdef18e013cc850a5edc030c244bab8c4bb7c483531be2291e5e10922e9dc46902917e3f45c\
      80c45fec5d803d64fbaf666c9f0ec05b0ac1abaefeaa00c1dacc1909321ed87aab38aba3ce21a8fcaccb3807f41ed608f29451f8\
      18a0e6d7663ac76f9e27dad37374d30d103e008b74e714be",
     41_204.0),
    ("80808080800181808d80808024008002b260378000808080808080008096800c80006380808000344d04008000808d0000008000\
      8000008000000080808080d78080ac80f800806449000097800500b680008000000080808086006b0000b5800b808000e86d0000\
      80f045804580972d00000030834080000003808000000000",
     "4380f02400800000091f5700005e008092dff40006bc1e00a0db0000bc80808080008012568071418080800000449a800080cc00\
      c15200f9da60c1806580000171809a6babe700710000808000008000008000808000808000008bb5000080800000808000808000\
      808000cd0000808080868000008080000059c5d480000080",
     5_790.5),
];
