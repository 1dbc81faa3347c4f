//! `karat doctor`: what this machine is.

use crate::{ceilings, config::InForce, env, exit::Exit, files, out::Out};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Measure what the machine does at most: memory and products, of the GPU too. Kept for `karat inspect --here`
    #[arg(long)]
    measure: bool,
    /// How often each is measured, beside a first time that is not counted
    #[arg(long, default_value_t = 20, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
}

pub(crate) fn run(args: &Args, settings: &[InForce], out: &Out) -> anyhow::Result<Exit> {
    told(settings, out);
    if args.measure {
        ceilings::measure(args.rounds as usize, out)?;
    }
    Ok(Exit::Ok)
}

/// What this machine is, and which settings are in force.
pub(crate) fn told(settings: &[InForce], out: &Out) {
    let host = benches::host();
    let gib = |bytes: u64| format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30));
    let goldens = files::golden_dir().join("recordings");
    let recordings =
        std::fs::read_dir(&goldens).map_or(0, |dir| dir.filter_map(Result::ok).count());
    let several = match benches::several() {
        None | Some((1, _)) => String::new(),
        Some((gpus, Ok(version))) => format!("; {gpus} of them, NCCL {version}"),
        Some((gpus, Err(why))) => format!("; {gpus} of them: {why}"),
    };
    let gpu = match benches::gpu() {
        Ok(gpu) => format!("{}, {}, {}{several}", gpu.name, gpu.target, gib(gpu.memory)),
        Err(why) => format!("none that karat can use: {why}"),
    };
    let rows = [
        ("processor", host.cpu.clone(), true),
        ("threads", host.threads.to_string(), true),
        ("memory", gib(host.memory), true),
        ("instruction sets", host.features.join(" "), true),
        ("GPU", gpu, benches::gpu().is_ok()),
        ("ceilings", ceilings::known(), true),
        ("recordings", format!("{recordings} in {}", goldens.display()), recordings != 0),
        ("official 80B recording", "none here: see `karat golden status`".to_owned(), true),
    ];
    for (what, value, ok) in &rows {
        out.line(&format!("{:<5}{what:<24}{value}", if *ok { "ok" } else { "warn" }));
    }
    out.line("\nsettings: flags, then KARAT_* in the environment, then karat.toml, then what is built in");
    for InForce { key, value, from } in settings {
        let value = if value.is_empty() { "-" } else { value };
        out.line(&format!("     {key:<24}{value:<24} {from}"));
    }
    // A run that begins with this row says here which it is.
    out.json(&out.record.without_head().unwrap_or_else(|| env::machine(settings)));
}
