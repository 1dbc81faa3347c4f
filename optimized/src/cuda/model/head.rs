//! Behind the last layer: logits, or the choice among them, of the rows that are asked for.

use std::ops::Range;

use golden::{
    Error,
    engine::{Rows, Want},
};
use ndarray::Array2;

use super::{Context, Model, Stream, scratch::LOGITS, told::Told};
use crate::cuda::{engine::Ops, launch::Arg};

/// What the last layer's answer is made into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Head {
    Nothing,
    Logits,
    /// The greedy choice among them.
    Choice,
}

impl Head {
    pub(super) fn of(want: &Want) -> Head {
        match want.logits {
            Rows::None if want.greedy => Head::Choice,
            Rows::None => Head::Nothing,
            _ => Head::Logits,
        }
    }

    /// Rows that get logits.
    pub(super) fn rows(self, want: &Want) -> Rows {
        if self == Head::Choice { Rows::Last } else { want.logits }
    }
}

impl Model {
    /// Logits of the rows that are asked for, of the norm at hand, or what is chosen among them.
    pub(super) fn heads(
        &mut self,
        context: &mut Context,
        told: Told,
        head: Head,
        asked: usize,
    ) -> Result<(Array2<f32>, Vec<u32>), Error> {
        let (mut all, mut chosen) = (Array2::zeros((0, self.share.vocabulary.len())), Vec::new());
        for first in (0..asked).step_by(LOGITS) {
            let end = (first + LOGITS).min(asked);
            self.band(context, told, head, first..end)?;
            let (band, ids) = self.headed(head, end - first)?;
            if asked <= LOGITS {
                return Ok((band, ids));
            }
            all.append(ndarray::Axis(0), band.view())?;
            chosen.extend(ids);
        }
        Ok((all, chosen))
    }

    /// What was made of so many rows.
    pub(super) fn headed(&self, head: Head, rows: usize) -> Result<(Array2<f32>, Vec<u32>), Error> {
        let v = self.share.vocabulary.len();
        let none = || Array2::zeros((0, v));
        Ok(match head {
            Head::Nothing => (none(), Vec::new()),
            Head::Logits => (self.scratch.logits(&self.device, rows, v)?, Vec::new()),
            Head::Choice => (none(), self.scratch.chosen(&self.device, rows, v)?),
        })
    }

    /// Logits of some of the rows that are asked for, and the choice among them.
    pub(super) fn band(
        &mut self,
        context: &mut Context,
        told: Told,
        made: Head,
        rows: Range<usize>,
    ) -> Result<(), Error> {
        if rows.is_empty() {
            return Ok(());
        }
        let element = self.format.element();
        let Arg::At(asked) = told.asked() else { unreachable!("an address") };
        let chosen = Arg::At(asked + 8 * rows.start as u64);
        let head = self.lm_head.as_ref().unwrap_or(&self.embedding);
        let stream = &mut Stream { context, kernels: &mut self.kernels };
        let mut ops = Ops { stream, element, fast: self.fast };
        let (r, d) = (&self.scratch, self.config.hidden_size);
        ops.gather(&r.last, &r.normed, chosen, (rows.len(), d * element.size()))?;
        ops.wide(&r.logits, &r.last, head, rows.len())?;
        if made == Head::Choice {
            ops.greedy(&r.chosen, &r.logits, (rows.len(), self.share.vocabulary.len()))?;
        }
        Ok(())
    }
}
