//! `karat gate`: is anything slower than it was, or wrong that was right?

mod against;
mod selftest;

use std::path::PathBuf;

use benches::pairs::Stopped;

use crate::{
    exit::{Exit, fail, refuse},
    out::Out,
    sampling::{Plant, Sampling},
    told,
};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Words that must be in the id of a case of the baseline
    filter: Vec<String>,
    /// What it was: the name of a baseline, or a file of one
    #[arg(long, value_name = "NAME|FILE", conflicts_with = "selftest")]
    baseline: Option<String>,
    /// What may be slower, by how much, why and until when
    #[arg(long, value_name = "gate.toml")]
    policy: Option<PathBuf>,
    /// End with 6 where neither a change nor the same is shown
    #[arg(long)]
    strict: bool,
    #[command(flatten)]
    sampling: Sampling,
    /// Plant this in what is new: so much more work (0.05 is 5 %), or a fault of a variant
    #[arg(long, value_name = "SHARE|NAME")]
    plant: Option<Plant>,
    #[command(flatten)]
    selftest: selftest::Args,
    #[command(flatten)]
    told: told::Told,
}

impl Args {
    /// Whether something is told beside the answer.
    pub(crate) fn tells(&self) -> bool {
        self.told.any()
    }
}

pub(crate) fn run(args: &Args, out: &Out) -> anyhow::Result<Exit> {
    match &args.baseline {
        _ if args.selftest.selftest => selftest::run(args.selftest, args.sampling.quads, out),
        Some(name) => {
            args.told.begin(out);
            let exit = against::run(name, args, out)?;
            args.told.end(exit, out)?;
            Ok(exit)
        }
        None => Err(refuse("gate: expected --baseline NAME or --selftest")),
    }
}

/// This program.
pub(crate) fn program() -> anyhow::Result<PathBuf> {
    std::env::current_exe().map_err(|e| fail(Exit::Unfit, format!("this program: {e}")))
}

/// Why there is no launch, as an end of the run.
pub(crate) fn stopped(why: Stopped) -> anyhow::Error {
    match why {
        Stopped::Unfit(why) => fail(Exit::Unfit, why),
        Stopped::Died(why) => fail(Exit::Crashed, why),
        Stopped::Interrupted => fail(Exit::Interrupted, "interrupted"),
    }
}
