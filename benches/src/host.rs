//! What machine this is.

use std::{fs, num::NonZeroUsize, sync::OnceLock};

use golden::Host;

/// Threads that somebody asked for.
static THREADS: OnceLock<NonZeroUsize> = OnceLock::new();

/// Spreads work over so many threads from now on. The first call counts, and only before any work.
pub fn use_threads(threads: NonZeroUsize) {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.get());
    if pool.build_global().is_ok() {
        let _ = THREADS.set(threads);
    }
}

/// Facts about this machine; what it does not tell stays empty.
pub fn host() -> Host {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = cpuinfo.lines().find(|line| line.starts_with(name))?;
        line.split_once(':').map(|(_, value)| value.trim().to_owned())
    };
    let flags = field("flags").or_else(|| field("Features")).unwrap_or_default();
    let wanted =
        ["avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "sve"];
    let features = wanted
        .into_iter()
        .filter(|name| flags.split_whitespace().any(|flag| flag == *name))
        .collect();
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = meminfo.lines().find_map(|line| {
        line.strip_prefix("MemTotal:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    });
    Host {
        cpu: field("model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
        threads: THREADS.get().map_or_else(
            || std::thread::available_parallelism().map_or(1, usize::from),
            |threads| threads.get(),
        ),
        memory: kib.unwrap_or(0) * 1024,
        features,
    }
}

/// The most memory this process has held, in bytes, where the machine tells.
pub fn peak_memory() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}
