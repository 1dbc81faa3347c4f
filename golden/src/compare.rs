//! The one place where two answers are held side by side.
//!
//! Conditions are written `error <= allowed`: a NaN is not `<=` anything.

use ndarray::{Array2, ArrayView2};

use crate::{Tensors, View, plan::Grid};

pub mod derived;
pub mod listed;
pub mod logits;
mod pattern;
#[cfg(test)]
mod tests;

/// How close is close enough.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bound {
    /// On aggregates, for comparisons with an answer whose own error is known.
    Relative {
        /// `sqrt(sum (got - want)^2 / sum want^2)` of the whole tensor.
        rel_rms: f64,
        /// The largest `|got_t - want_t| / |want_t|` of any slice of the first axis.
        worst_token: f64,
    },
    /// The same, where it follows from the error of the reference emulated at the candidate's precision
    /// plan: for problems that are too dear for [`derived`] bounds.
    Twice {
        /// As of [`Relative`](Self::Relative).
        rel_rms: f64,
        /// As of [`Relative`](Self::Relative).
        worst_token: f64,
        /// Emulations that it follows from.
        runs: u32,
    },
    /// What honest implementations of a precision plan show: see [`derived`].
    Derived {
        /// Runs in stochastic arithmetic that it rests on.
        runs: u32,
        /// What the output is stored in.
        grid: Grid,
    },
    /// Equal values.
    Exact,
}

/// The rule for two runs of one reference in different number types.
pub const F32_RULE: Bound = Bound::Relative { rel_rms: 2e-5, worst_token: 1e-4 };

/// What comparing one tensor found.
#[derive(Clone, Debug, PartialEq)]
pub struct Finding {
    /// Name of the tensor.
    pub output: String,
    /// Elements.
    pub n: usize,
    /// Elements over their own bound.
    pub over: usize,
    /// Relative RMS error.
    pub rel_rms: f64,
    /// What was allowed of it.
    pub rel_rms_allowed: f64,
    /// Relative error of the worst slice.
    pub worst_token: f64,
    /// That slice.
    pub worst_token_at: usize,
    /// What was allowed of it.
    pub worst_token_allowed: f64,
    /// What that slice is: a token (or whatever the first axis is), a head, the whole.
    pub worst_is: &'static str,
    /// Absolute error of the worst element.
    pub max_abs: f64,
    /// What was allowed of it.
    pub allowed: f64,
    /// Index of that element.
    pub at: Vec<usize>,
    /// What it should be and what it is.
    pub pair: (f64, f64),
    /// Distance in units in the last place of the output type (of f32 where none is known): 99th
    /// percentile and largest.
    pub ulp: (u64, u64),
    /// Elements that are so many such units off: 0, 1, 2, up to 4, 8, 16, 32, 64, more.
    pub ulps: [usize; 9],
    /// Elements that are NaN or infinite where they should not be.
    pub not_finite: usize,
    /// What was allowed.
    pub bound: Bound,
    /// Largest share of an allowance that was used; above one fails. NaN counts as infinite.
    pub budget: f64,
    /// The worst bias, where one was tested.
    pub bias: Option<Bias>,
    /// Where the errors are, in words, if it failed.
    pub pattern: Option<String>,
    /// No bound could be derived: runs under the plan are not finite. Nothing is known, so it is not ok.
    pub unbounded: bool,
    /// Whether the bound holds.
    pub ok: bool,
}

/// An error that all elements share.
#[derive(Clone, Debug, PartialEq)]
pub struct Bias {
    /// `slope` (of `got - want` against `want`) or `mean` (of `got - want`).
    pub what: &'static str,
    /// `whole`, or which head.
    pub part: String,
    /// How large it is.
    pub value: f64,
    /// How large it may be.
    pub allowed: f64,
}

impl Bias {
    /// Share of the allowance; above one is too much.
    pub fn used(&self) -> f64 {
        if self.value == 0.0 {
            0.0
        } else if self.value.abs() <= self.allowed {
            self.value.abs() / self.allowed
        } else {
            (self.value.abs() / self.allowed).max(1.0 + 1e-9)
        }
    }
}

/// Compares every output of `got` with the output of the same name of `want`.
///
/// Integer outputs are compared exactly whatever the bound; those in `told` are left out (see
/// [`Op::TOLD`](crate::Op::TOLD)).
pub fn outputs(
    want: &impl Tensors,
    got: &impl Tensors,
    bound: Bound,
    told: &[&str],
) -> Vec<Finding> {
    let want = want.tensors();
    let mut got = got.tensors();
    want.iter()
        .filter(|(name, _)| !told.contains(name))
        .map(|(name, want)| match got.iter().position(|(other, _)| other == name) {
            Some(at) => views(name, want, &got.swap_remove(at).1, bound),
            None => missing(name, want.shape(), bound),
        })
        .collect()
}

/// Compares two tensors.
pub fn views(name: &str, want: &View<'_>, got: &View<'_>, bound: Bound) -> Finding {
    if want.shape() != got.shape() {
        return missing(name, want.shape(), bound);
    }
    let bound = if matches!(want, View::I64(_) | View::U8(_)) { Bound::Exact } else { bound };
    slices(name, want.shape(), &want.to_f64(), &got.to_f64(), bound)
}

/// Compares two matrices, one row per token.
pub fn matrices(name: &str, want: &Array2<f32>, got: &Array2<f32>, bound: &Bound) -> Finding {
    let wide = |x: ArrayView2<'_, f32>| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
    if want.dim() != got.dim() {
        return missing(name, want.shape(), *bound);
    }
    slices(name, want.shape(), &wide(want.view()), &wide(got.view()), *bound)
}

/// Compares two sketches of a tap of `n` elements; the worst "token" is the worst sample.
pub fn sketches(name: &str, want: &[f64], got: &[f64], n: usize, bound: Bound) -> Finding {
    let (rel_rms, worst_token) = crate::sketch::distance(want, got, n);
    let Bound::Relative { rel_rms: allowed, worst_token: allowed_token } = bound else {
        return slices(name, &[want.len()], want, got, bound);
    };
    let ok = rel_rms <= allowed && worst_token <= allowed_token;
    Finding {
        rel_rms,
        worst_token,
        budget: (rel_rms / allowed).max(worst_token / allowed_token),
        pattern: (!ok).then(|| "only a sketch was recorded: no place can be named".to_owned()),
        ok,
        ..slices(name, &[1, want.len()], want, got, bound)
    }
}

/// An output that is not there, or of another shape.
fn missing(name: &str, shape: &[usize], bound: Bound) -> Finding {
    Finding {
        output: name.to_owned(),
        n: shape.iter().product(),
        over: shape.iter().product(),
        rel_rms: f64::INFINITY,
        rel_rms_allowed: 0.0,
        worst_token: f64::INFINITY,
        worst_token_at: 0,
        worst_token_allowed: 0.0,
        worst_is: "whole",
        max_abs: f64::INFINITY,
        allowed: 0.0,
        at: Vec::new(),
        pair: (f64::NAN, f64::NAN),
        ulp: (u64::MAX, u64::MAX),
        ulps: [0; 9],
        not_finite: 0,
        bound,
        budget: f64::INFINITY,
        bias: None,
        pattern: Some(format!("missing, or not of shape {shape:?}")),
        unbounded: false,
        ok: false,
    }
}

fn slices(name: &str, shape: &[usize], want: &[f64], got: &[f64], bound: Bound) -> Finding {
    let n = want.len();
    let rows = shape.first().copied().unwrap_or(1).max(1);
    let row = (n / rows).max(1);
    let (mut err2, mut want2) = (0.0, 0.0);
    let (mut worst_token, mut worst_token_at) = (0.0_f64, 0);
    let (mut max_abs, mut at, mut not_finite) = (0.0_f64, 0, 0);
    let mut per_row = Vec::with_capacity(rows);
    let mut ulps = Vec::with_capacity(n);
    for (t, (w, g)) in want.chunks(row).zip(got.chunks(row)).enumerate() {
        let (mut row_err2, mut row_want2) = (0.0, 0.0);
        for (i, (&w, &g)) in w.iter().zip(g).enumerate() {
            ulps.push(ulp(w, g));
            // Equal infinities (the margin of a router that chose every expert) are no error.
            if w == g {
                row_want2 += if w.is_finite() { w * w } else { 0.0 };
                continue;
            }
            let err = if (g - w).is_nan() { f64::INFINITY } else { (g - w).abs() };
            not_finite += usize::from(!g.is_finite());
            row_err2 += err * err;
            row_want2 += w * w;
            if max_abs < err {
                (max_abs, at) = (err, t * row + i);
            }
        }
        err2 += row_err2;
        want2 += row_want2;
        let relative = ratio(row_err2, row_want2);
        per_row.push(relative);
        if worst_token < relative {
            (worst_token, worst_token_at) = (relative, t);
        }
    }
    let rel_rms = ratio(err2, want2);
    ulps.sort_unstable();
    let ulp = (
        ulps.get((n * 99).div_ceil(100).saturating_sub(1)).copied().unwrap_or(0),
        ulps.last().copied().unwrap_or(0),
    );
    let (budget, ok) = match bound {
        Bound::Relative { rel_rms: allowed, worst_token: allowed_token }
        | Bound::Twice { rel_rms: allowed, worst_token: allowed_token, .. } => (
            share(rel_rms, allowed).max(share(worst_token, allowed_token)),
            rel_rms <= allowed && worst_token <= allowed_token && not_finite == 0,
        ),
        Bound::Exact | Bound::Derived { .. } => {
            (if max_abs == 0.0 { 0.0 } else { f64::INFINITY }, max_abs <= 0.0)
        }
    };
    let (rel_rms_allowed, worst_token_allowed) = match bound {
        Bound::Relative { rel_rms, worst_token } | Bound::Twice { rel_rms, worst_token, .. } => {
            (rel_rms, worst_token)
        }
        Bound::Exact | Bound::Derived { .. } => (0.0, 0.0),
    };
    let bad: Vec<bool> =
        per_row.iter().map(|&row| row.is_nan() || worst_token_allowed < row).collect();
    // An error of the emulation that is infinite, though there is something to be relative to.
    let unbounded = matches!(bound, Bound::Twice { rel_rms, .. } if !rel_rms.is_finite())
        && 0.0 < want2
        && want2.is_finite();
    let ok = ok && !unbounded;
    let pattern = (!ok).then(|| pattern::describe("row", &bad));
    Finding {
        output: name.to_owned(),
        n,
        over: bad.iter().filter(|&&bad| bad).count(),
        rel_rms,
        rel_rms_allowed,
        worst_token,
        worst_token_at,
        worst_token_allowed,
        worst_is: "row",
        max_abs,
        allowed: f64::NAN,
        at: unravel(at, shape),
        pair: (want.get(at).copied().unwrap_or(0.0), got.get(at).copied().unwrap_or(0.0)),
        ulp,
        ulps: derived::histogram(&ulps),
        not_finite,
        bound,
        budget,
        bias: None,
        pattern,
        unbounded,
        ok,
    }
}

/// `sqrt(err2 / want2)`; an error where nothing should be is infinite.
fn ratio(err2: f64, want2: f64) -> f64 {
    if err2 == 0.0 { 0.0 } else { (err2 / want2).sqrt() }
}

/// Share of an allowance; where nothing is allowed and nothing is off, none.
fn share(used: f64, allowed: f64) -> f64 {
    if used == 0.0 { 0.0 } else { used / allowed }
}

/// The index, in a tensor of this shape, of an element of its row-major order.
pub fn unravel(mut flat: usize, shape: &[usize]) -> Vec<usize> {
    let mut index: Vec<usize> = shape
        .iter()
        .rev()
        .map(|&n| {
            let i = flat % n.max(1);
            flat /= n.max(1);
            i
        })
        .collect();
    index.reverse();
    index
}

/// Representable f32 numbers between two values.
pub fn ulp(a: f64, b: f64) -> u64 {
    // Order-preserving integers: negative floats count down from zero.
    let rank = |x: f64| {
        let bits = i64::from((x as f32).to_bits() as i32);
        if bits < 0 { i64::from(i32::MIN) - bits } else { bits }
    };
    if a.is_nan() || b.is_nan() { u64::MAX } else { rank(a).abs_diff(rank(b)) }
}
