//! The words mean the same on every instruction set.

use half::{bf16, f16};

use super::{Factor, LANES, PAIRS, Plain, QUADS, Rows, Simd, Wide};
#[cfg(target_arch = "x86_64")]
use crate::cpu::{avx2::Avx2, avx512::Avx512};

/// Numbers of all sizes, ends of ranges among them.
fn numbers() -> Vec<f32> {
    let ends = [0.0, -0.0, 1.0, -1.0, 88.7, 88.8, -87.3, -87.4, -103.9, -104.1, 1e-40, 3e38];
    let of_two = [127.99, 128.0, 128.5, -126.0, -126.5, -149.0, -149.5, -150.0, -151.5, -1e-10];
    let more = (0..500).map(|i| (f64::from(i) * 0.37 - 90.0) as f32);
    let small = (0..490).map(|i| ((i as f32) * 0.7).sin() * 2.0_f32.powi(i % 40 - 20));
    ends.into_iter().chain(of_two).chain(more).chain(small).collect()
}

fn map<S: Simd>(s: S, x: &[f32], word: impl Fn(S, S::F) -> S::F) -> Vec<f32> {
    let mut o = x.to_vec();
    for o in o.as_chunks_mut::<LANES>().0 {
        let result = word(s, s.load(o));
        s.store(o, result);
    }
    o.truncate(x.len() / LANES * LANES);
    o
}

fn words<S: Simd>() {
    let Some(s) = S::new() else { return };
    let x = numbers();
    let powers = |word: fn(S, S::F) -> S::F, base: f64| {
        let power = move |x: &f32| f64::from(*x) * base.log2();
        x.iter().map(power).zip(s.run(|| map(s, &x, word))).zip(&x)
    };
    let both = powers(S::exp, std::f64::consts::E).chain(powers(S::exp2, 2.0));
    for ((power, got), x) in both {
        let want = power.exp2();
        let ulp = if want < f64::from(f32::MIN_POSITIVE) {
            f64::from(f32::from_bits(1))
        } else {
            2.0_f64.powi(want.log2().floor() as i32 - 23)
        };
        let right = if (want as f32).is_finite() {
            (f64::from(got) - want).abs() <= 2.0 * ulp
        } else {
            got == f32::INFINITY
        };
        assert!(right, "{}: of {x} {got}, not {want}", S::NAME);
    }
    let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1000.0, -1000.0];
    let odd: Vec<f32> = odd.into_iter().cycle().take(LANES).collect();
    for word in [S::exp as fn(S, S::F) -> S::F, S::exp2] {
        let got = s.run(|| map(s, &odd, word));
        assert!(got[0].is_nan());
        assert_eq!(got[1..5], [f32::INFINITY, 0.0, f32::INFINITY, 0.0]);
    }
    for (word, plain) in [
        (S::round as fn(S, S::F) -> S::F, <Plain as Simd>::round as fn(_, _) -> _),
        (S::sigmoid, Plain::sigmoid),
        (S::silu, Plain::silu),
    ] {
        let x: Vec<f32> = x.iter().map(|x| x.clamp(-80.0, 80.0)).collect();
        let (got, want) = (s.run(|| map(s, &x, word)), map(Plain, &x, plain));
        for ((x, got), want) in x.iter().zip(got).zip(want) {
            assert!((got - want).abs() <= 4e-7 * want.abs(), "{}: {x}: {got} {want}", S::NAME);
        }
    }
    for x in x.as_chunks::<LANES>().0 {
        let of = |word: fn(S, S::F) -> f32| s.run(|| word(s, s.load(x)));
        assert_eq!(of(S::sum), Plain.sum(*x), "one order");
        let mut words = [99; PAIRS];
        let small = x.map(|x| x.clamp(-16383.5, 16383.5));
        let other = small.map(|x| -x);
        s.run(|| s.sixteens(&mut words, [s.load(&small), s.load(&other)], s.splat(2.0)));
        let want = |i: usize| [small, other].as_flattened()[i] * 2.0;
        let want = std::array::from_fn(|i| want(i).round_ties_even() as i16);
        assert_eq!(words, want, "{}", S::NAME);
        for odd in [0.0, -1e38, f32::NEG_INFINITY, f32::NAN] {
            let mut other = *x;
            other[5] = odd;
            let most = x.iter().chain(&[odd]).fold(0.0_f32, |most, x| most.max(x.abs()));
            let want = if odd.is_nan() { odd } else { most };
            let got = s.run(|| s.size(s.sizes(s.sizes(s.splat(0.0), s.load(x)), s.load(&other))));
            assert_eq!(got.to_bits(), want.to_bits(), "{}", S::NAME);
        }
    }
    for first in [-127, -64, 0, 64] {
        let x: [i8; QUADS] = std::array::from_fn(|i| (first + i as i32).min(127) as i8);
        let words = |s: S| s.words(x.first_chunk().expect("half of them"));
        for pair in [[1, 0], [0, 1], [-32767, 32767], [12345, -321]] {
            let mut got = [0.0; LANES];
            s.run(|| {
                let sums = s.word_pairs(s.int(7), words(s), s.word_pair(pair));
                s.store(&mut got, s.number(sums));
            });
            let of = |i: usize| i32::from(x[i]) * i32::from(pair[i % 2]);
            let want = std::array::from_fn(|r| (7 + of(2 * r) + of(2 * r + 1)) as f32);
            assert_eq!(got, want, "{}", S::NAME);
        }
    }
}

#[test]
fn words_mean_the_same() {
    words::<Plain>();
    #[cfg(target_arch = "x86_64")]
    words::<Avx2>();
    #[cfg(target_arch = "x86_64")]
    words::<Avx512>();
}

fn codes<S: Simd>() {
    let Some(s) = S::new() else { return };
    let all: [u8; 256] = std::array::from_fn(|code| code as u8);
    for codes in all.as_chunks::<QUADS>().0 {
        let mut got = [[0.0; LANES]; 4];
        let wide = s.run(|| s.fp8_wide(codes));
        got.iter_mut().zip(wide).for_each(|(o, x)| s.store(o, x));
        for (&code, got) in codes.iter().zip(got.as_flattened()) {
            let want = golden::fp8::to_f32(code);
            let same = got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan());
            assert!(same, "{}: {code}: {got}, not {want}", S::NAME);
        }
    }
}

#[test]
fn every_code_of_fp8_is_its_number() {
    codes::<Plain>();
    #[cfg(target_arch = "x86_64")]
    codes::<Avx2>();
    #[cfg(target_arch = "x86_64")]
    codes::<Avx512>();
}

fn inner<S: Simd, W: Wide, X: Wide>() {
    let Some(s) = S::new() else { return };
    for len in [0, 1, 7, 8, 15, 16, 17, 31, 33, 64, 130, 2048] {
        let of = |seed: usize| -> Vec<f32> {
            (0..len).map(|i| (((i * 7 + seed * 13) % 29) as f32 - 14.0) / 8.0).collect()
        };
        let w: [Vec<W>; 3] = std::array::from_fn(|r| of(r).iter().map(|&x| W::store(x)).collect());
        let x: [Vec<X>; 4] =
            std::array::from_fn(|t| of(t + 9).iter().map(|&x| X::store(x)).collect());
        let got = s.run(|| s.dots(w.each_ref().map(|w| &w[..]), x.each_ref().map(|x| &x[..])));
        for (r, w) in w.iter().enumerate() {
            for (t, x) in x.iter().enumerate() {
                // Eighths of small integers: exact in any order.
                let want: f32 = w.iter().zip(x).map(|(w, x)| w.load() * x.load()).sum();
                assert_eq!(got[r][t], want, "{} len {len} row {r} column {t}", S::NAME);
            }
        }
    }
}

fn matrices<S: Simd, W: Wide>() {
    let Some(s) = S::new() else { return };
    let of = |len: usize, seed: usize| -> Vec<f32> {
        (0..len).map(|i| (((i * 7 + seed * 13) % 29) as f32 - 14.0) / 8.0).collect()
    };
    for (i, l, j) in [(1, 1, 1), (3, 5, 16), (7, 64, 33), (13, 17, 128), (20, 600, 40)] {
        let (a, b) = (of(i * l, 1), of(l * j, 2));
        let stored: Vec<W> = b.iter().map(|&x| W::store(x)).collect();
        let want: Vec<f32> = (0..i * j)
            .map(|at| 1.0 + (0..l).map(|l2| a[at / j * l + l2] * b[l2 * j + at % j]).sum::<f32>())
            .collect();
        let mut got = vec![1.0; i * j];
        s.run(|| s.accumulate(&mut got, Factor { data: &a, row: l, column: 1 }, &stored, j));
        assert_eq!(got, want, "{} a b {i} {l} {j}", S::NAME);
        let turned: Vec<f32> = (0..i * l).map(|at| a[at % i * l + at / i]).collect();
        let mut got = vec![1.0; i * j];
        s.run(|| {
            s.accumulate(&mut got, Factor { data: &turned, row: 1, column: i }, &stored, j);
        });
        assert_eq!(got, want, "{} a' b {i} {l} {j}", S::NAME);
        let turned: Vec<W> = (0..l * j).map(|at| W::store(b[at % l * j + at / l])).collect();
        let mut got = vec![1.0; i * j];
        s.run(|| {
            s.products(Rows::whole(&turned, l), Rows::whole(&a, l), |r, t, x| {
                got[t * j + r] += x;
            });
        });
        assert_eq!(got, want, "{} a b' {i} {l} {j}", S::NAME);
    }
}

#[test]
fn inner_products_are_exact_where_they_can_be() {
    macro_rules! all {
        ($($s:ty)*) => { $(
            inner::<$s, f32, f32>();
            inner::<$s, bf16, f32>();
            inner::<$s, f16, f32>();
            inner::<$s, bf16, bf16>();
            inner::<$s, f32, f16>();
            matrices::<$s, f32>();
            matrices::<$s, bf16>();
        )* };
    }
    all!(Plain);
    #[cfg(target_arch = "x86_64")]
    all!(Avx2 Avx512);
}
