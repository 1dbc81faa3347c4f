//! Which machine a time is of.

use serde_json::{Value, json};

use crate::env::moment;

/// What a time depends on, and its hash.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Machine {
    /// As a person would say it.
    pub(crate) name: String,
    /// What times of other machines do not have.
    pub(crate) fingerprint: String,
}

impl Machine {
    /// This one: processor, threads, instruction sets, memory in whole GiB, GPU.
    pub(crate) fn here() -> Machine {
        let host = benches::host();
        let gpu = benches::gpu().as_ref().ok().map(|gpu| gpu.name.clone());
        // A kernel keeps some memory for itself, not always as much.
        let gib = (host.memory as f64 / f64::from(1 << 30)).round();
        let name = format!(
            "{}, {} threads, {gib} GiB{}",
            host.cpu,
            host.threads,
            gpu.as_ref().map_or(String::new(), |gpu| format!(", {gpu}"))
        );
        let all = format!("{name} {} {}", host.features.join(" "), std::env::consts::OS);
        let fingerprint = blake3::hash(all.as_bytes()).to_hex()[..16].to_owned();
        Machine { name, fingerprint }
    }

    /// The line with which a baseline begins.
    pub(crate) fn json(&self) -> Value {
        let host = benches::host();
        json!({
            "schema": "karat.result/1", "kind": "env", "cpu": host.cpu, "threads": host.threads,
            "memory": host.memory, "features": host.features, "machine": self.name,
            "fingerprint": self.fingerprint, "version": env!("CARGO_PKG_VERSION"),
            "time": moment(benches::clock::now()),
        })
    }
}
