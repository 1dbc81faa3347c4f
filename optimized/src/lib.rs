//! What is the answer, fast?

pub mod cpu;
pub mod doors;
