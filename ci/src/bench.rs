//! `karat bench`: how fast ops are, or a model is.

mod model;
pub(crate) mod ops;

use crate::{
    exit::{Exit, refuse},
    list::{Device, Shard},
    out::Out,
};

#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    ops: ops::Args,
    #[command(flatten)]
    model: model::Args,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Say how fast a model is; the same as bench --model
    Model {
        #[command(flatten)]
        args: model::Args,
        /// The same as --engine
        #[arg(long, value_enum)]
        device: Option<Device>,
    },
}

impl Args {
    /// The part of the run that is meant, if not all of it is.
    pub(crate) fn shard(&self) -> Option<Shard> {
        self.ops.shard()
    }
}

pub(crate) fn run(args: &Args, out: &Out) -> anyhow::Result<Exit> {
    match &args.command {
        Some(Command::Model { args, device }) => {
            model::run(&args.on(device.map(Device::name)), out)
        }
        None if args.model.model.is_some() && args.ops.foreign() => {
            Err(refuse("--kernel: is timed beside ops; a whole model (--model) has none"))
        }
        None if args.model.model.is_some() && args.ops.shard().is_some() => {
            Err(refuse("--shard: is of ops; one model (--model) has no parts"))
        }
        None if args.model.model.is_some() && !args.ops.named() => {
            model::run(&args.model.on(args.ops.device()), out)
        }
        None => ops::run(&args.ops, out),
    }
}
