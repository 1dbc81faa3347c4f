//! What the device is told of a step: ids, positions, rows of the cache, where sequences begin and end.

use crate::cuda::launch::Arg;

/// What the device is told of a step: the places of its parts in one buffer of `i64`.
#[derive(Clone, Copy)]
pub(super) struct Told {
    pub(super) address: u64,
    pub(super) n: usize,
    pub(super) s: usize,
    /// Whether every sequence has one token.
    pub(super) one_each: bool,
}

impl Told {
    fn part(self, before: usize) -> Arg {
        Arg::At(self.address + 8 * before as u64)
    }

    pub(super) fn ids(self) -> Arg {
        self.part(0)
    }

    pub(super) fn positions(self) -> Arg {
        self.part(self.n)
    }

    pub(super) fn rows(self) -> Arg {
        self.part(2 * self.n)
    }

    /// Rows that are asked for.
    pub(super) fn asked(self) -> Arg {
        self.part(3 * self.n)
    }

    pub(super) fn cu(self) -> Arg {
        self.part(4 * self.n)
    }

    /// Of queries and of keys, with gaps.
    pub(super) fn cu_gaps(self) -> (Arg, Arg) {
        let before = 4 * self.n + self.s + 1;
        (self.part(before), self.part(before + 2 * self.s + 1))
    }

    /// All parts, in order.
    pub(super) fn numbers(
        tokens: &[Vec<u32>],
        lengths: &[usize],
        capacity: usize,
        asked: &[usize],
    ) -> Vec<i64> {
        let n: usize = tokens.iter().map(Vec::len).sum();
        let s = tokens.len();
        let mut all: Vec<i64> = Vec::with_capacity(4 * n + 5 * s + 3);
        all.extend(tokens.iter().flatten().map(|&id| i64::from(id)));
        let each = || tokens.iter().zip(lengths).enumerate();
        for (_, (tokens, &length)) in each() {
            all.extend((length..length + tokens.len()).map(|position| position as i64));
        }
        for (i, (tokens, &length)) in each() {
            let first = i * capacity + length;
            all.extend((first..first + tokens.len()).map(|row| row as i64));
        }
        all.extend(asked.iter().map(|&row| row as i64));
        all.resize(4 * n, 0);
        let mut end = 0;
        let mut ends = vec![0];
        for tokens in tokens {
            end += tokens.len() as i64;
            ends.push(end);
        }
        all.extend(&ends);
        // A gap begins where its sequence ends, and has no queries.
        all.push(0);
        all.extend(ends[1..].iter().flat_map(|&end| [end, end]));
        all.push(0);
        for (i, (tokens, &length)) in each() {
            all.push((i * capacity + length + tokens.len()) as i64);
            all.push(((i + 1) * capacity) as i64);
        }
        debug_assert_eq!(all.len(), 4 * n + 5 * s + 3);
        all
    }
}
