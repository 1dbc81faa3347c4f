//! The number in which the model is computed, and the few operations the formulas need.
//!
//! Every reference function is generic over [`Real`]: in `f32` it is *the* plain reference, in
//! `f64` the oracle, in [`Planned`] what a precision plan makes of it. [`Real::at`] names the places
//! where a plan may round an intermediate to a storage type, [`Real::operand`] the factors of
//! products; `f32` and `f64` pass through both unchanged.

use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub};

use golden::Number;
pub use golden::plan::Site;
pub use planned::{Planned, Rounding, under};

mod planned;

/// A real number as some arithmetic sees it.
pub trait Real:
    Number
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + MulAssign
{
    /// Its name: `f32`, `f64`, `planned`.
    const NAME: &'static str;
    /// The number nearest to a constant of a formula.
    fn of(x: f64) -> Self;
    /// The value, widened or (never for `f32`, `f64`) rounded.
    fn to_f64(self) -> f64;
    /// Square root.
    fn sqrt(self) -> Self;
    /// `e^x`.
    fn exp(self) -> Self;
    /// `ln(1 + x)`, exact to the type for small `x`.
    fn ln_1p(self) -> Self;
    /// Natural logarithm.
    fn ln(self) -> Self;

    /// Rounds where a precision plan says so; the identity for exact number types.
    #[must_use]
    fn at(self, _: Site) -> Self {
        self
    }

    /// A row of activations as a projection reads it, if not as it is.
    fn activations(_: &[Self]) -> Option<Vec<Self>> {
        None
    }

    /// A row of activations in codes, if products are of codes: scales of their groups, and all codes.
    fn codes(_: &[Self]) -> Option<(Vec<Self>, Vec<Self>)> {
        None
    }

    /// The sum of the products of a group of codes with those of a weight.
    fn of_codes(x: &[Self], w: &[Self]) -> Self {
        Self::sum(x.len(), |i| x[i] * w[i])
    }

    /// A row of keys or values as a cache keeps it, if not as it is: a step, and how many of it each is.
    fn cached(_: &[Self]) -> Option<(Self, Vec<Self>)> {
        None
    }

    /// What multiplies numbers that a cache counts in steps, if it is counted too: a query, or the weights of
    /// [`Cache::COUNTED`](golden::plan::Cache::COUNTED) keys.
    fn counted(_: &[Self]) -> Option<Vec<Self>> {
        None
    }

    /// `sum_i f(i)` for `i < n`: see [`sum`].
    fn sum(n: usize, f: impl Fn(usize) -> Self) -> Self {
        interleaved(n, LANES, f)
    }

    /// `sum_i f(i)` of products, as an inner product adds them.
    fn inner(n: usize, f: impl Fn(usize) -> Self) -> Self {
        Self::sum(n, f)
    }

    /// As a product reads it.
    #[must_use]
    fn operand(self) -> Self {
        self
    }

    /// An entry of a table of cosines or sines, which is defined in f32.
    fn table(x: f32) -> Self {
        Self::cast(x)
    }

    /// Zero.
    fn zero() -> Self {
        Self::of(0.0)
    }

    /// One.
    fn one() -> Self {
        Self::of(1.0)
    }

    /// `1 / sqrt(x)`.
    fn rsqrt(self) -> Self {
        Self::one() / self.sqrt()
    }

    /// `1 / (1 + e^-x)`, written so that neither sign overflows.
    fn sigmoid(self) -> Self {
        let one = Self::one();
        if self < Self::zero() {
            let e = self.exp();
            e / (one + e)
        } else {
            one / (one + (-self).exp())
        }
    }

    /// `x * sigmoid(x)`.
    fn silu(self) -> Self {
        self * self.sigmoid()
    }

    /// `ln(1 + e^x)`; `x` itself above 20, as torch has it.
    fn softplus(self) -> Self {
        if self > Self::of(20.0) { self } else { self.exp().ln_1p() }
    }
}

/// Partial sums of [`sum`]: enough to keep a vector unit busy, few enough to read.
const LANES: usize = 16;

/// `sum_i f(i)` for `i < n`, in 16 interleaved partial sums that are then added in order.
///
/// This *is* the order of summation of the plain reference: it is defined here once, it does not
/// depend on the machine, and in `f32` it is both faster and closer to the truth than one long
/// chain. [`Planned`] adds in another order in each random run, one long chain among them, because an
/// honest kernel may: its bound has to leave room for that.
#[inline]
pub fn sum<R: Real>(n: usize, f: impl Fn(usize) -> R) -> R {
    R::sum(n, f)
}

/// `sum_i f(i)` in up to 16 interleaved partial sums.
#[inline]
fn interleaved<R: Real>(n: usize, width: usize, f: impl Fn(usize) -> R) -> R {
    let mut lanes = [R::zero(); LANES];
    let whole = n - n % width;
    for start in (0..whole).step_by(width) {
        for (lane, total) in lanes[..width].iter_mut().enumerate() {
            *total += f(start + lane);
        }
    }
    for i in whole..n {
        lanes[i - whole] += f(i);
    }
    lanes[1..width].iter().fold(lanes[0], |sum, &lane| sum + lane)
}

/// `sum_i a_i b_i`.
///
/// # Panics
/// If the lengths differ.
#[inline]
pub fn dot<R: Real>(a: &[R], b: &[R]) -> R {
    assert_eq!(a.len(), b.len(), "dot of vectors of different lengths");
    R::inner(a.len(), |i| a[i].operand() * b[i].operand())
}

/// `sum_i x_i w_i` with weights as the checkpoint holds them.
///
/// # Panics
/// If the lengths differ.
#[inline]
pub fn dot_weight<R: Real>(x: &[R], w: &[f32]) -> R {
    assert_eq!(x.len(), w.len(), "dot of vectors of different lengths");
    R::inner(x.len(), |i| x[i].operand() * R::cast(w[i]).operand())
}

macro_rules! real {
    ($kind:ty, $name:literal, $of:expr, $to:expr) => {
        impl Real for $kind {
            const NAME: &'static str = $name;
            fn of(x: f64) -> Self {
                ($of)(x)
            }
            fn to_f64(self) -> f64 {
                ($to)(self)
            }
            fn sqrt(self) -> Self {
                self.sqrt()
            }
            fn exp(self) -> Self {
                self.exp()
            }
            fn ln_1p(self) -> Self {
                self.ln_1p()
            }
            fn ln(self) -> Self {
                self.ln()
            }
        }
    };
}
real!(f32, "f32", |x| x as f32, f64::from);
real!(f64, "f64", std::convert::identity, std::convert::identity);
