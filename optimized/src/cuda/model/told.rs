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
    /// Numbers of all parts.
    pub(super) fn len(n: usize, s: usize) -> usize {
        4 * n + 5 * s + 3
    }

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
        let mut all: Vec<i64> = Vec::with_capacity(Told::len(n, s));
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
        debug_assert_eq!(all.len(), Told::len(n, s));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::Told;

    #[test]
    fn every_part_is_where_it_is_told_to_be() {
        let tokens = [vec![7, 8], vec![], vec![9]];
        let numbers = Told::numbers(&tokens, &[5, 2, 0], 16, &[1, 2]);
        let told = Told { address: 0, n: 3, s: 3, one_each: false };
        let part = |arg, n: usize| {
            let super::Arg::At(address) = arg else { unreachable!("an address") };
            numbers[address as usize / 8..][..n].to_vec()
        };
        assert_eq!(part(told.ids(), 3), [7, 8, 9]);
        assert_eq!(part(told.positions(), 3), [5, 6, 0]);
        assert_eq!(part(told.rows(), 3), [5, 6, 32]);
        assert_eq!(part(told.asked(), 2), [1, 2]);
        assert_eq!(part(told.cu(), 4), [0, 2, 2, 3]);
        let (queries, keys) = told.cu_gaps();
        // Each sequence, and the gap behind it.
        assert_eq!(part(queries, 7), [0, 2, 2, 2, 2, 3, 3]);
        assert_eq!(part(keys, 7), [0, 7, 16, 18, 32, 33, 48]);
        assert_eq!(numbers.len(), 4 * 3 + 5 * 3 + 3);
    }
}
