//! `karat synth`: a synthetic checkpoint on disk.

use std::path::PathBuf;

use golden::{
    Config, Dtype,
    config::Preset,
    synth::{self, SynthError},
    synthetic::Synthetic,
};
use serde_json::json;

use crate::{
    exit::{Exit, fail, refuse},
    out::{self, Out},
};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A model known by name: tiny, slice (official sizes, 4 layers, 64 experts) or official
    #[arg(long, required_unless_present = "config", conflicts_with = "config")]
    preset: Option<Preset>,
    /// A config.json instead of a preset
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Layers, instead of the preset's
    #[arg(long, conflicts_with = "config")]
    layers: Option<usize>,
    /// Experts, instead of the preset's
    #[arg(long, conflicts_with = "config")]
    experts: Option<usize>,
    /// Storage type: f32, f16, bf16 or fp8
    #[arg(long, default_value = "bf16")]
    dtype: Dtype,
    /// Seed of the weights
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Folder to write
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Largest shard, in GB
    #[arg(long, default_value_t = 5.0, value_name = "GB")]
    shard_size: f64,
    /// Replace a folder that is there
    #[arg(long)]
    force: bool,
}

pub(crate) fn run(args: &Args, out: &Out) -> anyhow::Result<Exit> {
    let config = match (&args.config, args.preset) {
        (Some(path), _) => {
            let text =
                golden::file::text(path).map_err(|e| refuse(format!("{}: {e}", path.display())))?;
            Config::parse(&text, &path.display().to_string()).map_err(refuse)?
        }
        (None, Some(preset)) => {
            preset.config(args.layers, args.experts).map_err(|e| refuse(format!("synth: {e}")))?
        }
        (None, None) => return Err(refuse("synth: --preset or --config")),
    };
    if !matches!(args.dtype, Dtype::F32 | Dtype::F16 | Dtype::Bf16 | Dtype::Fp8) {
        return Err(refuse(format!("--dtype {}: expected f32, f16, bf16 or fp8", args.dtype)));
    }
    if !(1e-6..=1e6).contains(&args.shard_size) {
        return Err(refuse(format!("--shard-size {}: expected GB above 0", args.shard_size)));
    }
    let weights = Synthetic::new(config.stored_as(args.dtype), args.seed);
    let bar = out.bar(0, "synth", true);
    let options = synth::Options { shard_bytes: (args.shard_size * 1e9) as u64, force: args.force };
    let mut bytes = 0;
    let written = synth::write(&weights, &args.out, options, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
        bytes = total;
        !out::interrupted()
    });
    bar.finish_and_clear();
    match written {
        Ok(()) => {}
        Err(SynthError::Interrupted) => {
            return Err(fail(Exit::Interrupted, "interrupted; nothing was left behind"));
        }
        Err(error @ (SynthError::Exists(_) | SynthError::Refused { .. })) => {
            return Err(refuse(error));
        }
        Err(error) => return Err(fail(Exit::Unfit, error.to_string())),
    }
    out.line(&format!("{}: {:.3} GB", args.out.display(), bytes as f64 / 1e9));
    out.json(&json!({"schema": "karat.result/1", "kind": "synth", "out": args.out.display().to_string(), "payload_bytes": bytes}));
    Ok(Exit::Ok)
}
