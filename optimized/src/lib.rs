//! What is the answer, fast?

pub mod cpu;
pub mod cuda;
pub mod doors;
mod kept;

pub use kept::Kept;
