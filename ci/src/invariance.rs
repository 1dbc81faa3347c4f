//! `karat invariance`: the same question, asked again.

use std::{sync::Arc, time::Duration};

use benches::{
    formats::Watch,
    invariance::{Options, Problem, plan, run as run_changes},
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
    /// Most runs of one problem
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(2..))]
    runs: u32,
    /// Most time that the runs of one problem may take; two there are at least
    #[arg(long, value_name = "S", default_value_t = 2.0)]
    seconds: f64,
    /// Stop at the first answer that does not pass
    #[arg(long)]
    fail_fast: bool,
    /// Plant this fault, to see that it is caught: around an engine, in its wiring, or in a variant
    /// (karat explain names them)
    #[arg(long, value_name = "NAME", conflicts_with = "kernel")]
    plant: Option<String>,
}

pub(crate) fn run(args: &Args, out: &Out) -> anyhow::Result<Exit> {
    let budget = Duration::try_from_secs_f64(args.seconds)
        .map_err(|_| refuse(format!("--seconds {}: expected a time", args.seconds)))?;
    let (kernels, opened) = args.foreign.open(out)?;
    let options = Options {
        set: args.selection.set(),
        runs: args.runs as usize,
        budget,
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
        Tally::new(out, "invariance", args.flags(), args.fail_fast, args.plant.clone(), opened);
    let watch: Watch = Arc::new(|| !out::interrupted());
    let bar = out.bar(problems.iter().map(Problem::len).sum::<usize>() as u64, "invariance", false);
    run_changes(&problems, &options, &watch, &mut |row| {
        // What it was at is not judged.
        if out::interrupted() {
            return false;
        }
        tally.add(row);
        bar.inc(1);
        !tally.over()
    });
    bar.finish_and_clear();
    tally.end("changed")
}

impl Args {
    /// The part of the run that is meant, if not all of it is.
    pub(crate) fn shard(&self) -> Option<Shard> {
        self.selection.shard()
    }

    /// What has to be typed besides an id to see a row again.
    fn flags(&self) -> String {
        let flags = self.selection.typed() + &self.models.typed();
        let flags = flags + &self.foreign.typed();
        let plant = self.plant.as_ref().map_or(String::new(), |plant| format!(" --plant {plant}"));
        flags + &typed("runs", &self.runs, &1000) + &typed("seconds", &self.seconds, &2.0) + &plant
    }
}
