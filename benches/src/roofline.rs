//! The least time that a call can take on this machine, and how much of what it took that is.
//!
//! Memory and products each have a pace of their own, measured right before and right after the call;
//! the slower of the two is the roof.

use optimized::cpu::{
    roof::{self, Work},
    timed::Cost,
};

use crate::{clock::time, speed::Samples};

/// What the machine does in a second: of what was not asked, without end.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Bytes read.
    pub read: f64,
    /// Bytes read and written in their place, each counted twice.
    pub change: f64,
    /// Operations of the word that a call uses.
    pub products: f64,
}

/// What sets the pace of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// Memory.
    Memory,
    /// Products.
    Products,
}

impl Pace {
    /// Between two.
    pub fn between(a: Pace, b: Pace) -> Pace {
        Pace {
            read: f64::midpoint(a.read, b.read),
            change: f64::midpoint(a.change, b.change),
            products: f64::midpoint(a.products, b.products),
        }
    }

    /// The least seconds that a call takes, and what is to blame; `None` of a call that has to do nothing.
    ///
    /// One memory serves what is read and what is changed, one after the other; products go on meanwhile.
    pub fn least(&self, cost: &Cost) -> Option<(f64, Bound)> {
        let memory = cost.read as f64 / self.read + 2.0 * cost.changed as f64 / self.change;
        let products = cost.operations as f64 / self.products;
        let bound = if products < memory { Bound::Memory } else { Bound::Products };
        let least = memory.max(products);
        (0.0 < least).then_some((least, bound))
    }
}

/// Samples the machine's pace.
pub struct Machine(roof::Memory);

impl Machine {
    /// With memory to go through.
    #[expect(clippy::new_without_default, reason = "it takes memory")]
    pub fn new() -> Machine {
        Machine(roof::Memory::new())
    }

    /// How much of some work it does in a second.
    pub fn at(&mut self, kind: Work) -> f64 {
        let (work, took) = time(|| roof::work(kind, &mut self.0));
        work as f64 / took.as_secs_f64()
    }

    /// The paces that bound a call.
    pub fn pace(&mut self, cost: &Cost) -> Pace {
        let mut pace = |kind, asked| if asked == 0 { f64::INFINITY } else { self.at(kind) };
        Pace {
            read: pace(Work::Read, cost.read),
            change: pace(Work::Change, cost.changed),
            products: pace(cost.word, cost.operations),
        }
    }
}

/// A call's time, and the machine's pace before and after it.
#[derive(Clone, Copy, Debug)]
pub struct Turn {
    /// Seconds of a call.
    pub seconds: f64,
    /// Before the calls.
    pub before: Pace,
    /// After them.
    pub after: Pace,
}

/// What some turns say of a piece.
#[derive(Clone, Copy, Debug)]
pub struct Summary {
    /// Seconds of a call.
    pub seconds: Samples,
    /// The least time as a share of a call's, turn by turn, and what sets the pace in most of them.
    pub share: Option<(Samples, Bound)>,
}

impl Summary {
    /// Of at least one turn.
    pub fn of(cost: &Cost, turns: &[Turn]) -> Summary {
        let seconds = Samples::of(turns.iter().map(|turn| turn.seconds).collect());
        let shares: Vec<(f64, Bound)> = turns
            .iter()
            .filter_map(|turn| {
                let (least, bound) = Pace::between(turn.before, turn.after).least(cost)?;
                Some((least / turn.seconds, bound))
            })
            .collect();
        let memory = shares.iter().filter(|(_, bound)| *bound == Bound::Memory).count();
        let bound = if shares.len() < 2 * memory { Bound::Memory } else { Bound::Products };
        let shares: Vec<f64> = shares.into_iter().map(|(share, _)| share).collect();
        Summary { seconds, share: (!shares.is_empty()).then(|| (Samples::of(shares), bound)) }
    }
}

#[cfg(test)]
mod tests {
    use optimized::cpu::{roof::Work, timed::Cost};

    use super::{Bound, Pace, Summary, Turn};

    const PACE: Pace = Pace { read: 40e9, change: 20e9, products: 1e12 };
    const NONE: Cost = Cost { read: 0, changed: 0, operations: 0, word: Work::F32 };

    fn close(got: f64, want: f64) {
        assert!((got - want).abs() <= 1e-12 * want.abs(), "{got} for {want}");
    }

    #[test]
    fn the_slower_of_memory_and_products_is_the_roof() {
        let (least, bound) = PACE.least(&Cost { read: 40_000_000, ..NONE }).unwrap();
        close(least, 1e-3);
        assert_eq!(bound, Bound::Memory);
        // What is changed is read and written.
        let (least, _) = PACE.least(&Cost { changed: 10_000_000, ..NONE }).unwrap();
        close(least, 1e-3);
        let both = Cost { read: 40_000_000, changed: 10_000_000, ..NONE };
        let (least, bound) = PACE.least(&Cost { operations: 1_000_000_000, ..both }).unwrap();
        close(least, 2e-3);
        assert_eq!(bound, Bound::Memory);
        let (least, bound) = PACE.least(&Cost { operations: 3_000_000_000, ..both }).unwrap();
        close(least, 3e-3);
        assert_eq!(bound, Bound::Products);
    }

    #[test]
    fn what_was_not_asked_bounds_nothing() {
        let pace = Pace { read: f64::INFINITY, change: f64::INFINITY, ..PACE };
        let (least, bound) = pace.least(&Cost { operations: 1_000_000_000, ..NONE }).unwrap();
        close(least, 1e-3);
        assert_eq!(bound, Bound::Products);
        assert_eq!(PACE.least(&NONE), None);
    }

    #[test]
    fn a_share_is_that_of_its_turn() {
        let cost = Cost { read: 40_000_000, ..NONE };
        let turn = |slower: f64| Turn {
            seconds: 1.25e-3 * slower,
            before: Pace { read: 50e9 / slower, ..PACE },
            after: Pace { read: 30e9 / slower, ..PACE },
        };
        // A neighbour that takes half of the memory takes it from both.
        let summary = Summary::of(&cost, &[turn(1.0), turn(2.0), turn(1.5)]);
        let (share, bound) = summary.share.unwrap();
        close(share.median, 0.8);
        close(share.min, 0.8);
        close(share.max, 0.8);
        assert_eq!(bound, Bound::Memory);
        close(summary.seconds.median, 1.875e-3);
        assert!(Summary::of(&NONE, &[turn(1.0)]).share.is_none());
    }
}
