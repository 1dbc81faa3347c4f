//! What is the answer, fast?

pub mod cpu;
mod cuda;
pub mod doors;
