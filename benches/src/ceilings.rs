//! What this machine does at most: memory and products, each with everything at hand.
//!
//! All kinds are asked in turns: what a busy neighbour takes, it takes from all of them, and the most that was seen
//! is what the machine can do.

use std::cell::RefCell;

use golden::{Error, engine::INTERRUPTED};
use optimized::{
    cpu::roof::Work,
    cuda::{peak::Products, roof},
};

use crate::{clock::time, gpu, roofline::Machine, speed::Samples};

/// Counts the ways to measure: one more whenever a way is found that reaches more, so that a ceiling from before is
/// not taken for one.
pub const METHOD: u64 = 2;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Bytes read.
    Read,
    /// Bytes read in one place and written in another, each counted twice.
    Copy,
    /// Bytes read and written in their place, each counted twice.
    Change,
    /// Operations on f32, a multiplication and an addition being two.
    F32,
    /// The same on pairs of bf16.
    Bf16,
    /// The same on pairs of whole numbers of 16 bits.
    Int16,
    /// The same on bytes.
    Int8,
    /// The same on bf16 by tensor cores.
    Tensor,
}

impl Kind {
    /// As programs read it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Read => "read",
            Kind::Copy => "copy",
            Kind::Change => "change",
            Kind::F32 => "f32",
            Kind::Bf16 => "bf16",
            Kind::Int16 => "int16",
            Kind::Int8 => "int8",
            Kind::Tensor => "tensor",
        }
    }

    /// In words, and which formats are multiplied so.
    pub fn what(self) -> &'static str {
        match self {
            Kind::Read => "memory read",
            Kind::Copy => "memory copied, reads and writes counted",
            Kind::Change => "memory changed in place, reads and writes counted",
            Kind::F32 => "fused multiply-add: f32",
            Kind::Bf16 => "dot of bf16 pairs: bf16, fp8",
            Kind::Int16 => "dot of pairs of 16 bits: attention over int8",
            Kind::Int8 => "dot of bytes: int8, int4",
            Kind::Tensor => "tensor cores: bf16",
        }
    }

    /// Whether it counts bytes; operations else.
    pub fn is_bytes(self) -> bool {
        matches!(self, Kind::Read | Kind::Copy | Kind::Change)
    }
}

/// A ceiling.
#[derive(Clone, Copy, Debug)]
pub struct Ceiling {
    /// Of the GPU; else of the processor, all threads together.
    pub gpu: bool,
    /// What.
    pub kind: Kind,
    /// Bytes or operations in a second.
    pub pace: Samples,
}

/// Measures one thing once: how much.
type Once<'a> = Box<dyn FnMut() -> Result<f64, Error> + 'a>;

/// Every ceiling of the processor, and of the GPU if there is one; `tell` is told how many samples of how many are
/// taken.
///
/// # Errors
/// If the GPU fails; [`INTERRUPTED`] when `tell` returns false.
pub fn measure(
    rounds: usize,
    tell: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<Vec<Ceiling>, Error> {
    let of_processor = rounds * OF_PROCESSOR.len();
    let all = of_processor + if gpu().is_ok() { rounds * OF_GPU.len() } else { 0 };
    let mut ceilings = processor(rounds, &mut |done| tell(done, all))?;
    if gpu().is_ok() {
        ceilings.extend(of_gpu(rounds, &mut |done| tell(of_processor + done, all))?);
    }
    Ok(ceilings)
}

const OF_PROCESSOR: [(Kind, Work); 7] = [
    (Kind::Read, Work::Read),
    (Kind::Copy, Work::Copy),
    (Kind::Change, Work::Change),
    (Kind::F32, Work::F32),
    (Kind::Bf16, Work::Bf16),
    (Kind::Int16, Work::Int16),
    (Kind::Int8, Work::Int8),
];

const OF_GPU: [Kind; 3] = [Kind::Read, Kind::Copy, Kind::Tensor];

fn processor(rounds: usize, tell: &mut dyn FnMut(usize) -> bool) -> Result<Vec<Ceiling>, Error> {
    let machine = RefCell::new(Machine::new());
    let once = |(kind, work)| -> (Kind, Once<'_>) {
        let machine = &machine;
        (kind, Box::new(move || Ok(machine.borrow_mut().at(work))))
    };
    in_turns(false, OF_PROCESSOR.into_iter().map(once).collect(), rounds, tell)
}

fn of_gpu(rounds: usize, tell: &mut dyn FnMut(usize) -> bool) -> Result<Vec<Ceiling>, Error> {
    let (mut memory, mut copies) = (roof::Memory::new()?, roof::Copies::new()?);
    let mut products = Products::new()?;
    let once: [Once<'_>; 3] = [
        Box::new(|| paced(|| memory.read())),
        Box::new(|| paced(|| copies.copy())),
        Box::new(|| paced(|| products.multiply())),
    ];
    in_turns(true, OF_GPU.into_iter().zip(once).collect(), rounds, tell)
}

/// How much in a second.
fn paced(work: impl FnOnce() -> Result<u64, Error>) -> Result<f64, Error> {
    let (done, took) = time(work);
    Ok(done? as f64 / took.as_secs_f64())
}

fn in_turns(
    gpu: bool,
    mut kinds: Vec<(Kind, Once<'_>)>,
    rounds: usize,
    tell: &mut dyn FnMut(usize) -> bool,
) -> Result<Vec<Ceiling>, Error> {
    let mut samples = vec![Vec::new(); kinds.len()];
    let mut done = 0;
    // The first round warms up.
    for round in 0..=rounds {
        for ((_, once), samples) in kinds.iter_mut().zip(&mut samples) {
            let pace = once()?;
            if 0 < round {
                samples.push(pace);
                done += 1;
            }
            if !tell(done) {
                return Err(INTERRUPTED.into());
            }
        }
    }
    let of = |((kind, _), samples): ((Kind, _), Vec<f64>)| Ceiling {
        gpu,
        kind,
        pace: Samples::of(samples),
    };
    Ok(kinds.into_iter().zip(samples).map(of).collect())
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::{Kind, Once, in_turns, measure};

    #[test]
    fn kinds_are_asked_in_turns_and_the_first_round_is_not_counted() {
        let asked = RefCell::new(Vec::new());
        let kind = |kind: Kind, first: f64| -> (Kind, Once<'_>) {
            let asked = &asked;
            let mut next = first;
            let once = move || {
                asked.borrow_mut().push(kind);
                next += 1.0;
                Ok(next)
            };
            (kind, Box::new(once))
        };
        let kinds = vec![kind(Kind::Read, 0.0), kind(Kind::F32, 10.0)];
        let mut told = 0;
        let all = in_turns(false, kinds, 3, &mut |done| {
            told = done;
            true
        });
        let all = all.unwrap();
        assert_eq!((asked.borrow().len(), told), (8, 6));
        assert!(asked.borrow().chunks(2).all(|turn| turn == [Kind::Read, Kind::F32]));
        // 1 and 11 warm up.
        assert_eq!((all[0].pace.min, all[0].pace.median, all[0].pace.max), (2.0, 3.0, 4.0));
        assert_eq!((all[1].kind, all[1].pace.max), (Kind::F32, 14.0));
        let ended = in_turns(false, vec![kind(Kind::Read, 0.0)], 3, &mut |done| done < 2);
        assert_eq!(ended.unwrap_err().to_string(), "interrupted");
    }

    #[test]
    fn this_machine_does_something() {
        let mut told = (0, 0);
        let all = measure(1, &mut |done, all| {
            told = (done, all);
            true
        });
        let all = all.unwrap();
        assert_eq!(told.0, told.1);
        let processor: Vec<_> =
            all.iter().filter(|one| !one.gpu).map(|one| one.kind.name()).collect();
        assert_eq!(processor, ["read", "copy", "change", "f32", "bf16", "int16", "int8"]);
        assert!(all.iter().all(|one| 0.0 < one.pace.median), "{all:?}");
    }
}
