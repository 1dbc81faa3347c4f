use golden::Narrow;

use super::{BLOCK, Bits, Quantised};
use crate::cpu::{
    aligned::Arena,
    linear::fast::{Source, linear},
    simd::{Plain, Simd},
    weight::Weight,
};

fn number(i: usize) -> f32 {
    ((i * 2_654_435_761) % 1000) as f32 / 500.0 - 1.0
}

/// Activations as 127 steps of the largest of a block.
fn in_steps(x: &[f32]) -> Vec<f64> {
    let block = |x: &[f32]| -> Vec<f64> {
        let step = f64::from(x.iter().fold(0.0_f32, |most, x| most.max(x.abs())) / 127.0);
        x.iter().map(|&x| (f64::from(x) / step).round_ties_even() * step).collect()
    };
    x.chunks(BLOCK).flat_map(block).collect()
}

fn products<S: Simd>(narrow: Narrow) {
    let Some(s) = S::new() else { return };
    let bits = if narrow == Narrow::Int8 { Bits::Eight } else { Bits::Four };
    for (rows, d, tokens) in [(1, 1, 1), (5, 31, 2), (40, 70, 3), (16, 128, 20), (100, 96, 7)] {
        let w: Vec<f32> = (0..rows * d).map(number).collect();
        let x: Vec<f32> = (0..tokens * d).map(|i| number(i + 77)).collect();
        let mut wide = w.clone();
        narrow.round(&mut wide, d);
        let weight = Weight::own(w, d).narrowed(bits, &Arena::default());
        let mut o = vec![f32::NAN; tokens * rows];
        linear(s, &mut o, &x, &weight);
        for r in 0..rows {
            let mut row = vec![0.0; d];
            weight.row(s, r, &mut row);
            assert_eq!(row, wide[r * d..][..d], "{narrow} {r}");
            for t in 0..tokens {
                let x = in_steps(&x[t * d..][..d]);
                let terms = row.iter().zip(&x).map(|(w, x)| f64::from(*w) * x);
                let (want, size) =
                    terms.fold((0.0, 0.0), |(sum, size), x| (sum + x, size + x.abs()));
                let got = f64::from(o[t * rows + r]);
                let allowed = 2e-6 * size;
                assert!(
                    (got - want).abs() <= allowed,
                    "{} {narrow} {r} {t}: {got} {want}",
                    S::NAME
                );
            }
        }
        assert_eq!((weight.rows(), weight.columns()), (rows, d));
    }
}

#[test]
fn a_product_is_that_of_narrowed_weights_and_activations() {
    for narrow in [Narrow::Int8, Narrow::Int4] {
        products::<Plain>(narrow);
        #[cfg(target_arch = "x86_64")]
        products::<crate::cpu::avx2::Avx2>(narrow);
        #[cfg(target_arch = "x86_64")]
        products::<crate::cpu::avx512::Avx512>(narrow);
    }
}

#[test]
fn what_is_no_number_stays_none() {
    let (d, tokens) = (64, 3);
    let mut x = vec![1.0; tokens * d];
    x[d + 40] = f32::NAN;
    x[2 * d] = f32::INFINITY;
    let weight =
        Weight::own((0..4 * d).map(number).collect(), d).narrowed(Bits::Eight, &Arena::default());
    let mut o = vec![0.0; tokens * 4];
    linear(Plain, &mut o, &x, &weight);
    assert!(o[..4].iter().all(|o| o.is_finite()) && o[4..].iter().all(|o| !o.is_finite()));
    let whole = Quantised::new(Bits::Four, (1, d), &Arena::default(), |_, o| o.fill(f32::NAN));
    let mut row = vec![0.0; d];
    whole.row(0, &mut row);
    assert!(row.iter().all(|w| w.is_nan()));
}
