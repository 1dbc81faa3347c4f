//! `karat schema`: what the JSON that karat writes looks like.

use crate::{
    exit::Exit,
    out::{Format, Out},
};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which.
    #[arg(value_enum, default_value = "results")]
    which: Which,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Which {
    /// Lines of --format jsonl.
    Results,
    /// manifest.json of a recording.
    Golden,
    /// verdict.json.
    Verdict,
}

pub(crate) fn run(args: &Args) -> Exit {
    let out = Out { format: Format::Human, quiet: false, verbose: false, progress: false };
    out.text(match args.which {
        Which::Results => include_str!("schema/results.json"),
        Which::Golden => include_str!("schema/golden.json"),
        Which::Verdict => include_str!("schema/verdict.json"),
    });
    Exit::Ok
}
