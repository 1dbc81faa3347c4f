//! What keys and values are kept in, as it is asked of an engine.

use std::{fmt, str::FromStr};

use golden::Error;

/// What an engine is asked to keep keys and values in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// In f32.
    F32,
    /// In bf16.
    Bf16,
    /// In eight bits, steps of a token's row in a head: the cpu engine.
    Int8,
    /// In FP8 under a scale of 1: the cuda engine.
    Fp8,
}

impl Kept {
    /// All of them.
    pub const ALL: [Kept; 4] = [Kept::F32, Kept::Bf16, Kept::Int8, Kept::Fp8];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Kept::F32 => "f32",
            Kept::Bf16 => "bf16",
            Kept::Int8 => "int8",
            Kept::Fp8 => "fp8",
        }
    }

    /// Refuses, for an engine, what is none of those that it can.
    pub(crate) fn among(self, can: &[Kept], engine: &str) -> Result<Kept, Error> {
        if can.contains(&self) {
            return Ok(self);
        }
        let can: Vec<_> = can.iter().map(|kept| kept.name()).collect();
        let can = can.join(", ");
        Err(format!("kv-cache {self}: {engine} keeps keys and values in one of {can}").into())
    }
}

impl fmt::Display for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Kept {
    type Err = String;

    fn from_str(name: &str) -> Result<Kept, String> {
        let found = Kept::ALL.into_iter().find(|kept| kept.name() == name);
        let known = || Kept::ALL.map(Kept::name).join(", ");
        found.ok_or_else(|| format!("expected one of {}", known()))
    }
}
