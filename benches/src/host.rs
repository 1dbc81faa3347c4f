//! What machine this is.

use std::{fs, num::NonZeroUsize, sync::OnceLock};

use golden::Host;
use optimized::cpu::pin;

/// Threads that somebody asked for.
static THREADS: OnceLock<NonZeroUsize> = OnceLock::new();

/// Spreads work over so many threads from now on. The first call counts, and only before any work.
pub fn use_threads(threads: NonZeroUsize) {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.get());
    if pool.build_global().is_ok() {
        let _ = THREADS.set(threads);
    }
}

/// GPUs that somebody asked for.
static GPUS: OnceLock<NonZeroUsize> = OnceLock::new();

/// Spreads a model over so many GPUs from now on, where one computes it. The first call counts.
pub fn use_gpus(gpus: NonZeroUsize) {
    let _ = GPUS.set(gpus);
}

/// GPUs that a model is spread over.
pub fn gpus() -> usize {
    GPUS.get().map_or(1, |gpus| gpus.get())
}

/// Pins threads to a processor each from now on, as many as somebody asks for or as there are processors
/// for this process. Only before any work.
///
/// # Errors
/// If the machine does not let them be.
pub fn pin_threads(threads: Option<NonZeroUsize>) -> Result<(), String> {
    let processors = pin::pin()?;
    let threads = threads.or(NonZeroUsize::new(processors)).unwrap_or(NonZeroUsize::MIN);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.get());
    if pool.start_handler(pin::thread).build_global().is_ok() {
        let _ = THREADS.set(threads);
    }
    Ok(())
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
    Host {
        cpu: field("model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
        threads: THREADS.get().map_or_else(
            || std::thread::available_parallelism().map_or(1, usize::from),
            |threads| threads.get(),
        ),
        memory: kept_in("/proc/meminfo", "MemTotal:").unwrap_or(0),
        features,
    }
}

/// A line of a file of the kernel's, `NAME: 12 kB`, in bytes.
fn kept_in(file: &str, name: &str) -> Option<u64> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Bytes that the largest cache of this processor holds, where the machine tells.
pub fn caches() -> Option<u64> {
    let sizes = fs::read_dir("/sys/devices/system/cpu/cpu0/cache").ok()?.filter_map(|entry| {
        let text = fs::read_to_string(entry.ok()?.path().join("size")).ok()?;
        let text = text.trim();
        let (number, unit) = match text.as_bytes().last()? {
            b'K' => (&text[..text.len() - 1], 1 << 10),
            b'M' => (&text[..text.len() - 1], 1 << 20),
            _ => (text, 1),
        };
        Some(number.parse::<u64>().ok()? * unit)
    });
    sizes.max()
}

/// Memory that can be had without anybody losing any, in bytes, where the machine tells.
pub fn available_memory() -> Option<u64> {
    kept_in("/proc/meminfo", "MemAvailable:")
}

/// The most memory this process has held, in bytes, where the machine tells: since it began, or since
/// [`forget_peak`]. Pages of mapped files that it has read count.
pub fn peak_memory() -> Option<u64> {
    kept_in("/proc/self/status", "VmHWM:")
}

/// Begins [`peak_memory`] anew; whether the machine can.
pub fn forget_peak() -> bool {
    fs::write("/proc/self/clear_refs", "5").is_ok()
}

#[cfg(test)]
mod tests {
    use super::{available_memory, forget_peak, host, kept_in, peak_memory};

    #[test]
    fn memory_is_told_where_there_is_linux() {
        if !std::path::Path::new("/proc/meminfo").exists() {
            return;
        }
        let available = available_memory().unwrap();
        assert!(0 < available && available <= host().memory);
        assert_eq!(kept_in("/proc/meminfo", "NoSuchLine:"), None);
        assert_eq!(kept_in("/proc/no/such/file", "MemTotal:"), None);
    }

    #[test]
    fn a_peak_is_forgotten() {
        const MUCH: usize = 64 << 20;
        if peak_memory().is_none() || !forget_peak() {
            return;
        }
        let before = peak_memory().unwrap();
        drop(std::hint::black_box(vec![1_u8; MUCH]));
        let with = peak_memory().unwrap();
        assert!(before + MUCH as u64 / 2 < with, "{before} {with}");
        forget_peak();
        assert!(peak_memory().unwrap() < with);
    }
}
