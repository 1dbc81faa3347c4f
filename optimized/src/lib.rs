//! What is the answer, fast?

pub mod cpu;
pub mod cuda;
pub mod doors;
