//! `karat bench`: how fast ops are, or a model is.

mod model;
pub(crate) mod ops;

use crate::{exit::Exit, list::Device, out::Out};

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

pub(crate) fn run(args: &Args, out: &Out) -> anyhow::Result<Exit> {
    match &args.command {
        Some(Command::Model { args, device }) => {
            model::run(&args.on(device.map(Device::name)), out)
        }
        None if args.model.model.is_some() && !args.ops.named() => {
            model::run(&args.model.on(args.ops.device()), out)
        }
        None => ops::run(&args.ops, out),
    }
}
