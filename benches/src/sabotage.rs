//! Spoiled copies of the right answer: a check that lets one through is broken.

use golden::{Tensors, View, ViewMut};
use ndarray::ArrayViewMutD;

use crate::{answer::Answer, judge::Case};

/// A way to spoil a right answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spoil {
    /// One element, the last one, off by one percent of the largest.
    OneElement,
    /// The last element NaN.
    Nan,
    /// The last quarter as it was before the kernel ran: NaN.
    UnwrittenTail,
    /// Every element in the place of the one before it.
    Shifted,
    /// Every sign.
    Sign,
    /// The answer to another problem of these sizes.
    Stale,
    /// Nothing but zeros.
    Zeros,
    /// Every element off by a tenth of the root mean square, this way or that.
    Noise,
    /// Every 64th row zero.
    ChunkBoundary,
    /// A panic in place of an answer.
    Crash,
}

impl Spoil {
    /// Every spoil by name.
    pub const ALL: &[(&str, Spoil)] = &[
        ("one-element", Spoil::OneElement),
        ("nan", Spoil::Nan),
        ("unwritten-tail", Spoil::UnwrittenTail),
        ("shifted", Spoil::Shifted),
        ("sign", Spoil::Sign),
        ("stale", Spoil::Stale),
        ("zeros", Spoil::Zeros),
        ("noise", Spoil::Noise),
        ("chunk-boundary", Spoil::ChunkBoundary),
        ("crash", Spoil::Crash),
    ];

    /// Those that spoil an answer, as opposed to giving none.
    pub fn answers() -> impl Iterator<Item = (&'static str, Spoil)> {
        Spoil::ALL.iter().copied().filter(|(_, spoil)| *spoil != Spoil::Crash)
    }

    fn floats(self, mut x: ArrayViewMutD<'_, f32>, stale: Option<&[f64]>) {
        let finite = |x: &&f32| x.is_finite();
        let largest = x.iter().filter(finite).fold(0.0_f32, |m, x| m.max(x.abs()));
        let squares: f32 = x.iter().filter(finite).map(|x| x * x).sum();
        let rms = (squares / x.len().max(1) as f32).sqrt();
        let rows = x.shape().first().copied().unwrap_or(1).max(1);
        let row = (x.len() / rows).max(1);
        let last = x.len().saturating_sub(1);
        let tail = x.len() - x.len().div_ceil(4);
        let before: Vec<f32> = x.iter().copied().collect();
        for (i, x) in x.iter_mut().enumerate() {
            match self {
                Spoil::OneElement if i == last => *x += 0.01 * largest + 1e-30,
                Spoil::Nan if i == last => *x = f32::NAN,
                Spoil::UnwrittenTail if tail <= i => *x = f32::NAN,
                Spoil::Shifted => *x = before[if i == 0 { last } else { i - 1 }],
                Spoil::Sign => *x = -*x,
                Spoil::Stale => {
                    if let Some(stale) = stale.and_then(|stale| stale.get(i)) {
                        *x = *stale as f32;
                    }
                }
                Spoil::Zeros => *x = 0.0,
                // Thue and Morse's signs: no period that a mean or a slope could miss.
                Spoil::Noise => {
                    *x += if i.count_ones().is_multiple_of(2) { 0.1 * rms } else { -0.1 * rms };
                }
                Spoil::ChunkBoundary if (i / row).is_multiple_of(64) => *x = 0.0,
                _ => {}
            }
        }
    }

    fn integers(self, mut x: ArrayViewMutD<'_, i64>, stale: Option<&[f64]>) {
        let rows = x.shape().first().copied().unwrap_or(1).max(1);
        let row = (x.len() / rows).max(1);
        let last = x.len().saturating_sub(1);
        let tail = x.len() - x.len().div_ceil(4);
        let before: Vec<i64> = x.iter().copied().collect();
        for (i, x) in x.iter_mut().enumerate() {
            match self {
                // Not the neighbour: a router's twins stand side by side, and either may be chosen.
                Spoil::OneElement if i == last => *x += 2,
                Spoil::Nan if i == last => *x = i64::MIN,
                Spoil::UnwrittenTail if tail <= i => *x = i64::MIN,
                Spoil::Shifted => *x = before[if i == 0 { last } else { i - 1 }],
                Spoil::Sign => *x = -*x,
                Spoil::Stale => {
                    if let Some(stale) = stale.and_then(|stale| stale.get(i)) {
                        *x = *stale as i64;
                    }
                }
                Spoil::Zeros => *x = 0,
                Spoil::Noise => *x += i64::from(i.count_ones() % 2),
                Spoil::ChunkBoundary if (i / row).is_multiple_of(64) => *x += 1,
                _ => {}
            }
        }
    }
}

/// Spoils every output in place, as `check --plant` does.
pub(crate) fn all(got: &mut impl Tensors, spoil: Option<Spoil>) {
    let Some(spoil) = spoil else { return };
    assert!(spoil != Spoil::Crash, "planted");
    for (_, view) in got.tensors_mut() {
        match view {
            ViewMut::F32(x) => spoil.floats(x, None),
            ViewMut::I64(x) => spoil.integers(x, None),
            _ => {}
        }
    }
}

/// One output spoiled in one way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spoiled {
    /// The way.
    pub spoil: Spoil,
    /// Its name.
    pub name: &'static str,
    /// The output.
    pub output: &'static str,
    /// Whether the check saw it; `None` where the copy is equal to the answer but for numbers below
    /// the smallest normal one.
    pub caught: Option<bool>,
}

/// Every compared output of a problem, spoiled in every way, one at a time.
pub(crate) fn each<O: Answer>(case: &Case<'_, O>, stale: &O::Outputs<f32>) -> Vec<Spoiled> {
    let right = O::plain::<f32>(case.inputs);
    let names: Vec<&'static str> = right.tensors().into_iter().map(|(name, _)| name).collect();
    let mut all = Vec::new();
    for output in names.into_iter().filter(|name| !O::TOLD.contains(name)) {
        let stale: Option<Vec<f64>> = stale
            .tensors()
            .into_iter()
            .find_map(|(name, view): (_, View<'_>)| (name == output).then(|| view.to_f64()));
        for (name, spoil) in Spoil::answers() {
            let mut copy = right.clone();
            for (tensor, view) in copy.tensors_mut() {
                match view {
                    _ if tensor != output => {}
                    ViewMut::F32(x) => spoil.floats(x, stale.as_deref()),
                    ViewMut::I64(x) => spoil.integers(x, stale.as_deref()),
                    _ => {}
                }
            }
            let applies = spoilt(&right, &copy);
            let caught = applies.then(|| !case.judge(&copy).iter().all(|finding| finding.ok));
            all.push(Spoiled { spoil, name, output, caught });
        }
    }
    all
}

/// Whether a copy differs by more than a kernel may that flushes subnormal numbers to zero.
fn spoilt<T: Tensors>(right: &T, copy: &T) -> bool {
    let (right, copy) = (right.tensors(), copy.tensors());
    right.iter().zip(&copy).any(|((_, right), (_, copy))| {
        let mut pairs = right.to_f64().into_iter().zip(copy.to_f64());
        pairs.any(|(a, b)| {
            a != b && ((a - b).is_nan() || f64::from(f32::MIN_POSITIVE) <= (a - b).abs())
        })
    })
}
