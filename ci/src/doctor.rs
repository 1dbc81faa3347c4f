//! `karat doctor`: what this machine is.

use crate::{config::InForce, env, exit::Exit, files, out::Out};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

pub(crate) fn run(_: &Args, settings: &[InForce], out: &Out) -> Exit {
    let host = benches::host();
    let gib = |bytes: u64| format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30));
    let goldens = files::golden_dir().join("recordings");
    let recordings =
        std::fs::read_dir(&goldens).map_or(0, |dir| dir.filter_map(Result::ok).count());
    let gpu = match benches::gpu() {
        Ok(gpu) => format!("{}, {}, {}", gpu.name, gpu.target, gib(gpu.memory)),
        Err(why) => format!("none that karat can use: {why}"),
    };
    let rows = [
        ("processor", host.cpu.clone(), true),
        ("threads", host.threads.to_string(), true),
        ("memory", gib(host.memory), true),
        ("instruction sets", host.features.join(" "), true),
        ("GPU", gpu, benches::gpu().is_ok()),
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
    Exit::Ok
}
