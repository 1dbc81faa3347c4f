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

pub(crate) fn run(args: &Args, out: &Out) -> anyhow::Result<Exit> {
    let text = match args.which {
        Which::Results => include_str!("schema/results.json"),
        Which::Golden => include_str!("schema/golden.json"),
        Which::Verdict => include_str!("schema/verdict.json"),
    };
    out.text(text);
    // As one object on one line where that was asked for.
    if out.format == Format::Jsonl {
        out.json(&serde_json::from_str(text)?);
    }
    Ok(Exit::Ok)
}
