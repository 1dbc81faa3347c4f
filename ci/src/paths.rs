//! `karat paths`: one text, fed in every way there is, has one answer.

use std::sync::Arc;

use benches::{
    formats::Watch,
    paths::{Options, Problem, plan, run as run_paths},
};

use crate::{
    exit::{Exit, refuse},
    foreign,
    list::{Selection, Shard},
    out::{self, Out},
    same::{Models, Tally, typed},
};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    selection: Selection,
    #[command(flatten)]
    models: Models,
    #[command(flatten)]
    foreign: foreign::Kernels,
    /// Tokens of the text that a model is fed
    #[arg(long, value_name = "T", default_value_t = 141)]
    tokens: usize,
    /// Longest sequence of an op; the ladder up to 65536 is in --set nightly
    #[arg(long, value_name = "T", default_value_t = 65536)]
    max_length: usize,
    /// Stop at the first path that does not pass
    #[arg(long)]
    fail_fast: bool,
    /// Plant this fault, to see that it is caught: of the wiring, of the keeping of states, or of a
    /// variant (karat explain names them)
    #[arg(long, value_name = "NAME", conflicts_with = "kernel")]
    plant: Option<String>,
}

pub(crate) fn run(args: &Args, out: &Out) -> anyhow::Result<Exit> {
    let (kernels, opened) = args.foreign.open(out)?;
    let options = Options {
        set: args.selection.set(),
        max_length: args.max_length,
        tokens: args.tokens,
        models: args.models.model.clone(),
        engine: args.models.engine.clone(),
        number: args.models.number.clone(),
        kept: args.models.keeps.kv_cache,
        device: args.selection.device().map(str::to_owned),
        plant: args.plant.clone(),
        kernels,
    };
    let problems = plan(&options, &args.selection.filter()?).map_err(refuse)?;
    let some = !problems.is_empty();
    let problems = args.selection.held(problems);
    if some && problems.is_empty() {
        out.line("no problem falls on this shard");
        return Ok(opened);
    }
    let mut tally =
        Tally::new(out, "paths", args.flags(), args.fail_fast, args.plant.clone(), opened);
    let watch: Watch = Arc::new(|| !out::interrupted());
    let bar = out.bar(problems.iter().map(Problem::len).sum::<usize>() as u64, "paths", false);
    run_paths(&problems, &options, &watch, &mut |row| {
        // What it was at is not judged.
        if out::interrupted() {
            return false;
        }
        tally.add(row);
        bar.inc(1);
        !tally.over()
    });
    bar.finish_and_clear();
    tally.end("path")
}

impl Args {
    /// The part of the run that is meant, if not all of it is.
    pub(crate) fn shard(&self) -> Option<Shard> {
        self.selection.shard()
    }

    /// What has to be typed besides an id to see a path again.
    fn flags(&self) -> String {
        let flags = self.selection.typed() + &self.models.typed();
        let flags = flags + &self.foreign.typed();
        let plant = self.plant.as_ref().map_or(String::new(), |plant| format!(" --plant {plant}"));
        flags + &typed("tokens", &self.tokens, &141) + &plant
    }
}
