//! `karat inspect`: what a model weighs and what a token costs.

use golden::inventory::Inventory;
use serde_json::json;

use crate::{
    ceilings,
    exit::{Exit, refuse},
    out::Out,
};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A checkpoint folder, or synthetic:PRESET[,layers=N][,experts=E][,dtype=D][,seed=S][,yarn=F]
    #[arg(long, env = "KARAT_MODEL")]
    model: String,
    /// Tokens of context for operations and memory
    #[arg(long, default_value_t = 0)]
    context: u64,
    /// Memory bandwidth in GB/s, for the limit of decoding
    #[arg(long, value_name = "GBPS")]
    bandwidth: Option<f64>,
    /// Arithmetic in TFLOP/s, for the limit of prefill
    #[arg(long, value_name = "TFLOPS")]
    flops: Option<f64>,
    /// Take both from what `karat doctor --measure` found of this machine's processor: reading, products of bf16
    #[arg(long, conflicts_with_all = ["bandwidth", "flops"])]
    here: bool,
    /// Read every weight and name the first that is NaN or infinite
    #[arg(long)]
    scan: bool,
}

pub(crate) fn run(args: &Args, out: &Out) -> anyhow::Result<Exit> {
    let weights = golden::open(&args.model).map_err(refuse)?;
    let (mut bandwidth, mut arithmetic) = (args.bandwidth, args.flops);
    if args.here {
        let most = ceilings::most()?;
        (bandwidth, arithmetic) = (Some(most.read / 1e9), Some(most.bf16 / 1e12));
    }
    for (name, rate) in [("bandwidth", bandwidth), ("flops", arithmetic)] {
        if rate.is_some_and(|rate| !(rate.is_finite() && 0.0 < rate)) {
            return Err(refuse(format!("--{name}: expected a number above 0")));
        }
    }
    let inventory = Inventory::of(&*weights);
    let flops = inventory.flops_per_token(args.context);
    let bytes = inventory.bytes_per_token;
    let cache = inventory.kv_bytes_per_token.saturating_mul(args.context);
    let limits = json!({
        "decode_tokens_per_s": bandwidth.map(|rate| rate * 1e9 / (bytes as f64 + cache as f64 + 2.0 * inventory.state_bytes as f64)),
        "prefill_tokens_per_s": arithmetic.map(|rate| rate * 1e12 / flops as f64),
    });
    let answer = json!({
        "schema": "karat.result/1",
        "kind": "inspect",
        "model": args.model,
        "parameters_total": inventory.main + inventory.mtp,
        "parameters_main": inventory.main,
        "parameters_mtp": inventory.mtp,
        "active_without_embeddings": inventory.active,
        "active_with_head": inventory.active + inventory.head,
        "active_all": inventory.active + 2 * inventory.head,
        "tensors": inventory.tensors,
        "payload_bytes": inventory.payload_bytes,
        "bytes_per_token": bytes,
        "context": args.context,
        "flops_per_token": flops,
        "kv_bytes_per_token": inventory.kv_bytes_per_token,
        "state_bytes": inventory.state_bytes,
        "memory_at_context": (inventory.payload_bytes + inventory.state_bytes).saturating_add(cache),
        "limits": limits,
        "groups": inventory.groups.iter().map(|group| json!({
            "group": group.name, "tensors": group.tensors, "parameters": group.parameters, "bytes": group.bytes,
        })).collect::<Vec<_>>(),
    });
    out.json(&answer);
    for (key, value) in answer.as_object().into_iter().flatten() {
        if !matches!(key.as_str(), "schema" | "kind" | "groups" | "limits") {
            out.line(&format!(
                "{key:<28}{}",
                value.as_str().map_or_else(|| value.to_string(), str::to_owned)
            ));
        }
    }
    for (key, value) in limits.as_object().into_iter().flatten() {
        match value.as_f64() {
            Some(rate) => out.line(&format!("{key:<28}{rate:.1}")),
            None => out.line(&format!(
                "{key:<28}not known: give --{}",
                if key.starts_with("decode") { "bandwidth" } else { "flops" }
            )),
        }
    }
    let rows: Vec<Vec<String>> = inventory
        .groups
        .iter()
        .map(|group| {
            vec![
                group.name.to_owned(),
                group.tensors.to_string(),
                group.parameters.to_string(),
                group.bytes.to_string(),
            ]
        })
        .collect();
    out.table(&["group", "tensors", "parameters", "bytes"], &rows);
    if args.scan {
        return crate::logits::scan(&args.model, out);
    }
    Ok(Exit::Ok)
}
