//! What is launched only where several GPUs have a share of the model each.

use golden::split::Share;

use super::{
    Arg::{At, Int},
    Ops, THREADS, at, each,
};
use crate::cuda::device::{Buffer, Error};

impl Ops<'_> {
    /// Of the experts of `n` tokens those that this GPU has: `count` from `first` on, and the shared one if it leads.
    pub(in crate::cuda) fn share(
        &mut self,
        [own_ids, own_weights]: [&Buffer; 2],
        [ids, weights]: [&Buffer; 2],
        share: &Share,
        (n, slots): (usize, usize),
    ) -> Result<(), Error> {
        let args = [
            ("own_ids", at(own_ids)),
            ("own_weights", at(own_weights)),
            ("ids", at(ids)),
            ("weights", at(weights)),
            ("first", Int(share.experts.start)),
            ("count", Int(share.experts.len())),
            ("leads", Int(usize::from(share.leads()))),
            ("N", Int(n)),
            ("SLOTS", Int(slots)),
            ("EXPERTS", Int(share.config.num_experts)),
        ];
        self.engine("engine_share", None, (each(n * slots), THREADS, 0), &args)
    }

    /// The sum of what every rank has in f32 or in E, in the order of the ranks; rounded to E or not.
    pub(in crate::cuda) fn sum(
        &mut self,
        (o, gathered): (&Buffer, &Buffer),
        from: &Buffer,
        (narrow, rounds): (bool, bool),
        (ranks, n, d): (usize, usize, usize),
    ) -> Result<(), Error> {
        let bytes = n * d * if narrow { self.element.size() } else { 4 };
        self.stream.gather(from, gathered, bytes)?;
        let args = [
            ("o", at(o)),
            ("wide", if narrow { At(0) } else { at(gathered) }),
            ("narrow", if narrow { at(gathered) } else { At(0) }),
            ("rounds", Int(usize::from(rounds))),
            ("RANKS", Int(ranks)),
            ("N", Int(n)),
            ("D", Int(d)),
        ];
        self.engine("engine_sum", None, (each(n * d), THREADS, 0), &args)
    }
}
