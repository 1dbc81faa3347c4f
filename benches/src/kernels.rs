//! Kernels that run on the GPU: where they are compiled, and what they take of it.

use optimized::cuda;
use rayon::prelude::*;

pub use optimized::cuda::{Used, compiler_in, keep_in};

/// What every kernel takes, for every target that it is compiled for: op by op.
///
/// # Errors
/// One line, and what the compiler said, of the first that does not compile.
pub fn resources(words: &[String]) -> Result<Vec<Used>, String> {
    let sources: Vec<_> = kernels::sources().collect();
    let all = sources.into_par_iter().map(cuda::resources);
    let all: Vec<Vec<Used>> = all.collect::<Result<_, _>>()?;
    let named = |used: &Used| words.iter().all(|word| used.entry.contains(word.as_str()));
    Ok(all.into_iter().flatten().filter(named).collect())
}
