//! Kernels that run on the GPU: where they are compiled, and what they take of it.

use std::path::Path;

use optimized::cuda;
use rayon::prelude::*;

pub use optimized::cuda::Used;

/// Keeps their machine code in a folder from now on.
pub fn keep_in(folder: &Path) {
    cuda::keep_in(folder);
}

/// Takes their compiler from a folder, where the system would not find it. Only before any work.
///
/// # Errors
/// If it is not there.
pub fn compiler_in(folder: &Path) -> Result<(), String> {
    cuda::compiler_in(folder)
}

/// What every kernel takes, for every target that it is compiled for: op by op.
///
/// # Errors
/// One line, and what the compiler said, of the first that does not compile.
pub fn resources(words: &[String]) -> Result<Vec<Used>, String> {
    let all = kernels::sources().par_bridge().map(cuda::resources);
    let all: Vec<Vec<Used>> = all.collect::<Result<_, _>>()?;
    let named = |used: &Used| words.iter().all(|word| used.entry.contains(word.as_str()));
    Ok(all.into_iter().flatten().filter(named).collect())
}
