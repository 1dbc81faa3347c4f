//! How a kernel of a variant is launched: blocks, threads and memory by the sizes of the tensors.

use std::collections::BTreeMap;

use kernels::Build;

/// A parameter, and the whole number that it gets.
pub(super) type Number = (&'static str, fn(&Sizes) -> i64);

/// How a kernel is launched.
pub(super) struct Launch {
    pub(super) entry: &'static str,
    /// Blocks.
    pub(super) grid: fn(&Sizes) -> [i64; 3],
    /// Threads of a block.
    pub(super) threads: fn(&Sizes) -> i64,
    /// Bytes of dynamic shared memory.
    pub(super) shared: fn(&Sizes) -> i64,
    /// Of which builds it is; of the others there is no such launch.
    pub(super) of: fn(&Build) -> bool,
    /// Whole numbers that are of this launch, and of no tensor.
    pub(super) numbers: &'static [Number],
    /// Whether it may start before the launch before has ended, for which it waits itself.
    pub(super) early: bool,
}

/// Threads of a block, where nothing speaks for fewer.
pub(super) const THREADS: i64 = 256;

impl Launch {
    /// One block for each of so many.
    pub(super) const fn blocks(entry: &'static str, grid: fn(&Sizes) -> [i64; 3]) -> Launch {
        Launch {
            entry,
            grid,
            threads: |_| THREADS,
            shared: |_| 0,
            of: |_| true,
            numbers: &[],
            early: false,
        }
    }

    /// With dynamic shared memory.
    pub(super) const fn sharing(self, shared: fn(&Sizes) -> i64) -> Launch {
        Launch { shared, ..self }
    }

    /// Of these builds alone.
    pub(super) const fn of(self, of: fn(&Build) -> bool) -> Launch {
        Launch { of, ..self }
    }

    /// With numbers of its own.
    pub(super) const fn passing(self, numbers: &'static [Number]) -> Launch {
        Launch { numbers, ..self }
    }

    /// Started before the launch before has ended.
    pub(super) const fn early(self) -> Launch {
        Launch { early: true, ..self }
    }

    /// With so many threads.
    pub(super) const fn threads(self, threads: fn(&Sizes) -> i64) -> Launch {
        Launch { threads, ..self }
    }
}

/// Blocks for one thread for each of so many.
pub(super) fn threads(n: i64) -> [i64; 3] {
    [pieces(n, THREADS), 1, 1]
}

/// Sizes by their letter, as the shapes of the tensors have them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Sizes(pub(super) BTreeMap<String, i64>);

/// Among sizes: how many multiprocessors the device has.
pub(super) const MULTIPROCESSORS: &str = "multiprocessors";

/// Among sizes: bytes of an activation.
pub(super) const ACTIVATION_BYTES: &str = "bytes of an activation";

/// Among sizes: bytes of a weight, 1 of those that have fewer.
pub(super) const WEIGHT_BYTES: &str = "bytes of a weight";

/// The least number of pieces that hold so many.
pub(super) fn pieces(n: i64, each: i64) -> i64 {
    n.div_euclid(each) + i64::from(n % each != 0)
}

impl Sizes {
    /// One of them.
    pub(super) fn of(&self, letter: &str) -> i64 {
        *self.0.get(letter).unwrap_or_else(|| panic!("no tensor tells {letter}"))
    }
}

/// Memory between launches, which nobody outside sees.
pub(super) struct Scratch {
    /// The parameter that gets it.
    pub(super) name: &'static str,
    pub(super) bytes: fn(&Sizes) -> i64,
    /// Whether it is zero before a run, and again after it; poison otherwise.
    pub(super) zero: bool,
}

impl Scratch {
    pub(super) const fn new(name: &'static str, bytes: fn(&Sizes) -> i64) -> Scratch {
        Scratch { name, bytes, zero: false }
    }

    /// Zero before a run, and again after it.
    pub(super) const fn zero(name: &'static str, bytes: fn(&Sizes) -> i64) -> Scratch {
        Scratch { name, bytes, zero: true }
    }
}
