use golden::Rng;
use half::bf16;

use super::{Code, Paired};
use crate::cpu::{
    attention::fast::{Cached, Sizes, attention},
    simd::Plain,
};

/// An odd number of pairs of channels.
const SIZES: Sizes = Sizes { hq: 4, hkv: 2, h: 6 };

/// Keys and values of tokens, `[HKV, H]` each.
type Tokens = Vec<[Vec<f32>; 2]>;

fn tokens(n: usize) -> Tokens {
    let mut rng = Rng::keyed("paired", 0);
    let mut row = || (0..SIZES.hkv * SIZES.h).map(|_| rng.normal(0.0, 1.0)).collect();
    (0..n).map(|_| [row(), row()]).collect()
}

fn cache<C: Code>(tokens: &Tokens) -> Paired<C> {
    let mut cache = Paired::new(SIZES.hkv, SIZES.h);
    tokens.iter().for_each(|[k, v]| cache.push(k, v));
    cache
}

/// The answers to the last `n` tokens of a cache, `[N][HQ H]`.
fn answers<C: Code>(cache: &Paired<C>, n: usize) -> Vec<Vec<u32>> {
    let width = SIZES.hq * SIZES.h;
    let q: Vec<f32> = (0..n * width).map(|i| (i * 7 % 11) as f32 / 4.0 - 1.0).collect();
    let (gate, mut o) = (vec![0.5; q.len()], vec![f32::NAN; q.len()]);
    attention(Plain, &mut o, (&q, &gate), &[cache], &[0, n], SIZES);
    let bits = |o: &[f32]| o.iter().map(|o| o.to_bits()).collect();
    o.chunks_exact(width).map(bits).collect()
}

#[test]
fn eight_bits_count_steps_of_a_row() {
    let kept = |x: &[f32]| {
        let mut codes = vec![99; x.len()];
        let step = i8::row(x, |i, code| codes[i] = code);
        (step, codes)
    };
    // A half goes to the even one.
    let row = [-254.0, 3.0, 5.0, 2.0, 0.0, 100.9, 254.0];
    assert_eq!(kept(&row), (2.0, vec![-127, 2, 2, 1, 0, 50, 127]));
    assert_eq!(kept(&[0.0, -0.0]), (0.0, vec![0, 0]));
    // Steps below the smallest normal number are none.
    assert_eq!(kept(&[1e-37, -1e-38]), (0.0, vec![0, 0]));
    for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let (step, codes) = kept(&[1.0, odd]);
        assert!(step.is_nan() && codes == [0, 0]);
    }
}

#[test]
fn factors_count_finer_steps() {
    let factors =
        |to: &mut [i16; 18], from: &[f32]| i8::factors(Plain, to, from, i8::largest(Plain, from));
    let mut to = [99; 18];
    let row: Vec<f32> = (0..18).map(|i| [-65534.0, 3.0, 5.0, 2.0, 0.0, 100.9][i % 6]).collect();
    assert_eq!(factors(&mut to, &row), 2.0);
    // A half goes to the even one.
    assert_eq!(to[12..], [-32767, 2, 2, 1, 0, 50]);
    for none in [0.0, 1e-35] {
        assert_eq!((factors(&mut to, &[none; 18]), to), (0.0, [0; 18]));
    }
    for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for at in [0, 17] {
            let mut row = row.clone();
            row[at] = odd;
            assert!(factors(&mut to, &row).is_nan());
        }
    }
}

/// More channels than sums of 32 bits have room for.
#[test]
fn sums_of_many_channels_do_not_overflow() {
    let sizes = Sizes { hq: 1, hkv: 1, h: 1200 };
    let mut cache = Paired::<i8>::new(1, sizes.h);
    // All that is as large as it gets, of one sign: a sum that overflowed would favour the other key.
    for sign in [1.0, -1.0] {
        cache.push(&vec![sign; sizes.h], &vec![sign; sizes.h]);
    }
    let (q, gate, mut o) = (vec![1.0; sizes.h], vec![100.0; sizes.h], vec![f32::NAN; sizes.h]);
    attention(Plain, &mut o, (&q, &gate), &[&cache], &[0, 1], sizes);
    assert!(o.iter().all(|o| (o - 1.0).abs() < 1e-6), "{o:?}");
}

fn unseen<C: Code>() {
    let honest = tokens(70);
    let want = answers(&cache::<C>(&honest), 6);
    for at in 64..70 {
        let mut spoilt = honest.clone();
        spoilt[at] = [vec![f32::NAN; 12], vec![f32::NAN; 12]];
        let got = answers(&cache::<C>(&spoilt), 6);
        for (token, (got, want)) in (64..70).zip(got.iter().zip(&want)) {
            if token < at {
                assert_eq!(got, want, "token {token} before {at}");
            } else {
                assert!(got.iter().all(|&o| f32::from_bits(o).is_nan()), "token {token} sees {at}");
            }
        }
    }
}

#[test]
fn what_is_not_seen_does_not_count() {
    unseen::<bf16>();
    unseen::<i8>();
}

fn cut<C: Code>() {
    let all = tokens(200);
    let whole = cache::<C>(&all);
    let mut other = whole.clone();
    other.truncate(65);
    tokens(300)[200..].iter().for_each(|[k, v]| other.push(v, k));
    other.truncate(65);
    all[65..].iter().for_each(|[k, v]| other.push(k, v));
    assert_eq!(answers(&other, 9), answers(&whole, 9));
}

#[test]
fn a_cache_that_was_cut_is_one_that_never_was_longer() {
    cut::<bf16>();
    cut::<i8>();
}

#[test]
fn a_token_that_sees_itself_alone_answers_its_value() {
    let all = tokens(1);
    let open = 1.0 / (1.0 + (-0.5_f32).exp());
    for (head, o) in answers(&cache::<i8>(&all), 1)[0].chunks_exact(SIZES.h).enumerate() {
        let v = &all[0][1][head / 2 * SIZES.h..][..SIZES.h];
        let most = v.iter().fold(0.0_f32, |most, v| most.max(v.abs()));
        for (o, v) in o.iter().zip(v) {
            let off = (f32::from_bits(*o) / open - v).abs();
            // Half a step; its weight is one, and the largest.
            assert!(off <= most * 0.501 / 127.0, "{v} is off by {off}");
        }
    }
}

/// Neither a query that is no number, nor scores that are all below every number, become an answer.
#[test]
fn no_scores_no_answer() {
    let sizes = Sizes { hq: 2, hkv: 1, h: 3 };
    let mut cache = Paired::<bf16>::new(1, sizes.h);
    for _ in 0..150 {
        cache.push(&[3e38; 3], &[1.0; 3]);
    }
    for odd in [f32::NAN, -3e38] {
        let q = [odd, odd, odd, 0.0, 0.0, 0.0];
        let mut o = [9.0; 6];
        attention(Plain, &mut o, (&q, &[100.0; 6]), &[&cache], &[0, 1], sizes);
        assert!(o[..3].iter().all(|o| o.is_nan()), "{odd}: {o:?}");
        assert_eq!(o[3..], [1.0; 3], "{odd}");
    }
}
