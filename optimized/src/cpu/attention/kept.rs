//! What keys and values are kept in.

use std::ops::Range;

use golden::Error;
use half::bf16;

use super::{
    fast::{Cache, Cached, Softmax, Task},
    paired::Paired,
};
use crate::cpu::simd::Simd;

/// What the cpu engine keeps keys and values in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kept {
    /// As they come, in f32; products are those of f32.
    F32,
    /// In bf16; products are those of bf16 pairs.
    Bf16,
    /// In eight bits, steps of a token's row in a head; products are those of pairs of whole numbers of 16 bits.
    Int8,
}

impl Kept {
    /// What was asked for.
    ///
    /// # Errors
    /// If it is none of these.
    pub(crate) fn of(asked: crate::Kept) -> Result<Kept, Error> {
        let all = [Kept::F32, Kept::Bf16, Kept::Int8];
        asked.among(&all.map(Kept::said), "the cpu engine")?;
        all.into_iter().find(|kept| kept.said() == asked).ok_or_else(|| "none of them".into())
    }

    /// As it is asked for.
    pub(crate) fn said(self) -> crate::Kept {
        match self {
            Kept::F32 => crate::Kept::F32,
            Kept::Bf16 => crate::Kept::Bf16,
            Kept::Int8 => crate::Kept::Int8,
        }
    }

    /// Its name on the command line.
    pub(crate) fn name(self) -> &'static str {
        self.said().name()
    }

    /// An empty cache.
    pub(crate) fn cache(self, heads: usize, h: usize) -> KeyValues {
        match self {
            Kept::F32 => KeyValues::Plain(Cache::new(heads, h)),
            Kept::Bf16 => KeyValues::Paired(Paired::new(heads, h)),
            Kept::Int8 => KeyValues::Int8(Paired::new(heads, h)),
        }
    }

    /// Bytes of what is kept of a token.
    pub(crate) fn token(self, heads: usize, h: usize) -> usize {
        let row = match self {
            Kept::F32 => 4 * h,
            Kept::Bf16 => 2 * h,
            Kept::Int8 => h + size_of::<f32>(),
        };
        2 * heads * row
    }
}

/// Keys and values as an engine keeps them.
#[derive(Clone)]
pub(crate) enum KeyValues {
    Plain(Cache<f32>),
    Paired(Paired<bf16>),
    Int8(Paired<i8>),
}

/// Does the same with any.
macro_rules! any {
    ($kept:expr, $cache:ident => $done:expr) => {
        match $kept {
            KeyValues::Plain($cache) => $done,
            KeyValues::Paired($cache) => $done,
            KeyValues::Int8($cache) => $done,
        }
    };
}

#[cfg(test)]
impl KeyValues {
    /// Bytes of the first page, as it was allocated.
    pub(crate) fn held(&self) -> usize {
        any!(self, cache => cache.held())
    }
}

impl Cached for KeyValues {
    fn page(&self) -> [usize; 2] {
        any!(self, cache => cache.page())
    }

    fn len(&self) -> usize {
        any!(self, cache => cache.len())
    }

    fn truncate(&mut self, len: usize) {
        any!(self, cache => cache.truncate(len));
    }

    fn push(&mut self, k: &[f32], v: &[f32]) {
        any!(self, cache => cache.push(k, v));
    }

    fn wide(&self) -> usize {
        any!(self, cache => cache.wide())
    }

    #[inline(always)]
    fn stretch<S: Simd>(&self, s: S, task: &Task<'_>, keys: Range<usize>, softmax: Softmax<'_>) {
        any!(self, cache => cache.stretch(s, task, keys, softmax));
    }
}
