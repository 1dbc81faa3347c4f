//! `karat turns`: the process that runs a problem for its time. Nobody types this.

use std::num::NonZeroUsize;

use crate::{exit::Exit, files, out};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

pub(crate) fn run(threads: Option<NonZeroUsize>) -> Exit {
    if let Some(threads) = threads {
        benches::use_threads(threads);
    }
    benches::bound::keep_in(&files::cache_dir().join("bounds"));
    benches::kernels::keep_in(&files::cache_dir().join("kernels"));
    match benches::pairs::child::serve() {
        Ok(()) => Exit::Ok,
        Err(error) => {
            out::warn(&format!("karat turns: {error}"));
            Exit::Internal
        }
    }
}
