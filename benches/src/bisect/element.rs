//! The first element that is over its bound, and what the places of the others have in common.

use golden::{
    View,
    compare::{derived::Derived, unravel},
};
use ndarray::ArrayD;
use serde_json::{Value, json};

use crate::report::number;

/// An element.
#[derive(Clone, Debug)]
pub struct First {
    /// Its index.
    pub at: Vec<usize>,
    /// What it should be.
    pub want: f64,
    /// What it is.
    pub got: f64,
    /// How far it may be off.
    pub allowed: f64,
}

impl First {
    pub(super) fn json(&self) -> Value {
        json!({"at": self.at, "want": number(self.want), "got": number(self.got), "allowed": number(self.allowed)})
    }
}

/// Which elements are over.
pub(super) fn over(bound: &Derived, got: &View<'_>) -> Vec<bool> {
    let allowed = bound.allowed();
    let got = got.to_f64();
    if got.len() != bound.want.len() {
        return vec![true; bound.want.len()];
    }
    let fits = |((&got, &want), &(allowed, _)): ((&f64, &f64), &(f64, f64))| {
        got == want || (got - want).abs() <= allowed
    };
    got.iter().zip(&bound.want).zip(&allowed).map(|pair| !fits(pair)).collect()
}

/// The first that is over; of an answer in which no single element is, the first of the worst.
pub(super) fn first(bound: &Derived, got: &View<'_>, over: &[bool]) -> Option<First> {
    let values = got.to_f64();
    let at = over.iter().position(|&over| over)?;
    Some(First {
        at: unravel(at, &bound.shape),
        want: *bound.want.get(at)?,
        got: values.get(at).copied().unwrap_or(f64::NAN),
        allowed: bound.allowed().get(at)?.0,
    })
}

/// Rows of the first axis that hold an element that is over.
pub(super) fn rows(shape: &[usize], over: &[bool]) -> Vec<bool> {
    let rows = shape.first().copied().unwrap_or(1).max(1);
    let row = (over.len() / rows).max(1);
    over.chunks(row).map(|row| row.contains(&true)).collect()
}

/// The expert that all bad tokens were routed to and no good one, if there is one.
pub(super) fn expert(ids: &ArrayD<i64>, bad: &[bool]) -> Option<String> {
    let tokens = ids.len_of(ndarray::Axis(0));
    if bad.len() != tokens || bad.iter().all(|&bad| bad) || !bad.contains(&true) {
        return None;
    }
    let routed = |expert: i64| -> Vec<bool> {
        ids.outer_iter().map(|row| row.iter().any(|&id| id == expert)).collect()
    };
    let mut experts: Vec<i64> = ids.iter().copied().collect();
    experts.sort_unstable();
    experts.dedup();
    let found = experts.into_iter().find(|&expert| routed(expert) == bad)?;
    Some(format!("exactly the tokens that expert {found} has a part in"))
}
