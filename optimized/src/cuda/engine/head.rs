//! What is launched behind the last layer: rows that get logits, and the choice among these.

use super::{
    Arg::{self, Int},
    Ops, THREADS, at, each,
};
use crate::cuda::device::{Buffer, Error};

/// Threads of a block that chooses among the logits of a row.
const CHOOSERS: usize = 1024;

impl Ops<'_> {
    /// Rows of `d` bytes.
    pub(in crate::cuda) fn gather(
        &mut self,
        o: &Buffer,
        x: &Buffer,
        rows: Arg,
        (n, d): (usize, usize),
    ) -> Result<(), Error> {
        let args = [("o", at(o)), ("x", at(x)), ("rows", rows), ("N", Int(n)), ("D", Int(d))];
        self.engine("engine_gather", None, (each(n * d), THREADS, 0), &args)
    }

    /// Of `n` rows of `m` logits the id of the largest, of equal ones the lowest; `m` where one is not finite.
    pub(in crate::cuda) fn greedy(
        &mut self,
        ids: &Buffer,
        logits: &Buffer,
        (n, m): (usize, usize),
    ) -> Result<(), Error> {
        let args = [("ids", at(ids)), ("logits", at(logits)), ("N", Int(n)), ("M", Int(m))];
        self.engine("engine_greedy", None, ([n, 1, 1], CHOOSERS, 0), &args)
    }
}
