//! `karat child`: the process in which a foreign kernel runs. Nobody types this.

use std::path::PathBuf;

use benches::{World, foreign::child::serve};

use crate::{exit::Exit, out};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[arg(long)]
    kernel: PathBuf,
    #[arg(long)]
    memory: u64,
    #[arg(long)]
    python: String,
}

pub(crate) fn run(args: &Args) -> Exit {
    let world = World { python: args.python.clone(), memory: args.memory };
    match serve(&args.kernel, &world) {
        Ok(()) => Exit::Ok,
        Err(error) => {
            out::warn(&format!("karat child: {error}"));
            Exit::Internal
        }
    }
}
