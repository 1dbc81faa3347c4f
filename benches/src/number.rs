//! What an engine computes in.

use std::fmt;

use optimized::{Kept, cpu, cuda};

/// The number type of an engine, by name, and what it keeps keys and values in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Number<'a> {
    /// Its name.
    pub name: &'a str,
    /// What keys and values are kept in; without, what the engine has for the number type. The cpu and the cuda
    /// engine can be told.
    pub kept: Option<Kept>,
}

impl Number<'_> {
    /// What an engine keeps keys and values in; `None` if it has no such number type, or says nothing of it.
    pub fn keeps(self, engine: &str) -> Option<Kept> {
        let own = match engine {
            "cpu" => cpu::model::kept(self.name).ok(),
            "cuda" => cuda::model::kept(self.name).ok(),
            _ => None,
        };
        own.map(|own| self.kept.unwrap_or(own))
    }
}

impl<'a> From<&'a str> for Number<'a> {
    fn from(name: &'a str) -> Number<'a> {
        Number { name, kept: None }
    }
}

impl fmt::Display for Number<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)?;
        self.kept.map_or(Ok(()), |kept| write!(f, ", keys and values in {kept}"))
    }
}
