//! What this machine does at most, as it was measured: kept under the machine's fingerprint.

use std::{fs, path::PathBuf};

use benches::ceilings::{self, Ceiling};
use golden::engine::INTERRUPTED;
use serde_json::{Value, json};

use crate::{
    exit::{Exit, fail, of_engine},
    files,
    machine::Machine,
    out::{self, Out},
};

fn place() -> PathBuf {
    files::cache_dir().join("ceilings").join(Machine::here().fingerprint).with_extension("json")
}

/// What was measured here before as it is measured now; nothing of a file that is none.
fn kept() -> Option<Value> {
    let bytes = fs::read(place()).ok()?;
    serde_json::from_slice(&bytes).ok().filter(is_current)
}

fn is_current(row: &Value) -> bool {
    row["kind"] == "ceilings" && row["method"] == ceilings::METHOD
}

/// Measures and keeps.
pub(crate) fn measure(rounds: usize, out: &Out) -> anyhow::Result<()> {
    let bar = out.bar(0, "ceilings", false);
    let measured = ceilings::measure(rounds, &mut |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
        !out::interrupted()
    });
    bar.finish_and_clear();
    let all = measured.map_err(|e| {
        if e.to_string() == INTERRUPTED {
            fail(Exit::Interrupted, INTERRUPTED)
        } else {
            of_engine(&e)
        }
    })?;
    let row = row(&all);
    let place = place();
    let bytes = format!("{row:#}\n");
    files::replace(&place, bytes.as_bytes())
        .map_err(|e| fail(Exit::Unfit, format!("{}: {e}", place.display())))?;
    out.line(&format!(
        "\nceilings: the most of {rounds} times, and the median; all threads together"
    ));
    out.table(
        &["of", "what", "most", "median", "least"],
        &all.iter().map(cells).collect::<Vec<_>>(),
    );
    let place = fs::canonicalize(&place).unwrap_or(place);
    out.line(&format!("kept in {}", place.display()));
    out.json(&row);
    Ok(())
}

fn device(ceiling: &Ceiling) -> &'static str {
    if ceiling.gpu { "cuda" } else { "cpu" }
}

fn cells(ceiling: &Ceiling) -> Vec<String> {
    let unit = if ceiling.kind.is_bytes() { "GB/s" } else { "Gop/s" };
    let [max, median, min] = [ceiling.pace.max, ceiling.pace.median, ceiling.pace.min]
        .map(|pace| format!("{:.1} {unit}", pace / 1e9));
    vec![device(ceiling).to_owned(), ceiling.kind.what().to_owned(), max, median, min]
}

fn row(all: &[Ceiling]) -> Value {
    let host = benches::host();
    let one = |ceiling: &Ceiling| {
        let unit = if ceiling.kind.is_bytes() { "bytes/s" } else { "operations/s" };
        json!({"device": device(ceiling), "of": ceiling.kind.name(), "unit": unit,
            "min": ceiling.pace.min, "median": ceiling.pace.median, "max": ceiling.pace.max})
    };
    json!({"schema": "karat.result/1", "kind": "ceilings", "fingerprint": Machine::here().fingerprint, "cpu": host.cpu,
        "threads": host.threads, "gpu": benches::gpu().as_ref().ok().map(|gpu| &*gpu.name),
        "version": env!("CARGO_PKG_VERSION"), "method": ceilings::METHOD, "ceilings": all.iter().map(one).collect::<Vec<_>>()})
}

/// The most of one thing, of a row that was kept.
fn of(row: &Value, device: &str, what: &str) -> Option<f64> {
    let all = row["ceilings"].as_array()?;
    let found = all.iter().find(|one| one["device"] == device && one["of"] == what)?;
    found["max"].as_f64().filter(|most| most.is_finite() && 0.0 < *most)
}

/// For `karat doctor`: what is known of this machine.
pub(crate) fn known() -> String {
    let read = |row: &Value| {
        let (read, bf16) = (of(row, "cpu", "read")?, of(row, "cpu", "bf16")?);
        Some(format!(
            "measured: {:.1} GB/s read, {:.0} Gop/s of bf16 pairs",
            read / 1e9,
            bf16 / 1e9
        ))
    };
    let known = kept().as_ref().and_then(read);
    known.unwrap_or_else(|| "not measured: `karat doctor --measure`".to_owned())
}

/// What the processor does at most in a second.
pub(crate) struct Most {
    /// Bytes read.
    pub(crate) read: f64,
    /// Operations on bf16.
    pub(crate) bf16: f64,
}

/// What was measured of this machine.
///
/// # Errors
/// If it was not.
pub(crate) fn most() -> anyhow::Result<Most> {
    let most =
        |row: Value| Some(Most { read: of(&row, "cpu", "read")?, bf16: of(&row, "cpu", "bf16")? });
    let missing = || {
        let place = place();
        fail(
            Exit::Baseline,
            format!(
                "{}: no ceilings of this machine; `karat doctor --measure` keeps them there",
                place.display()
            ),
        )
    };
    kept().and_then(most).ok_or_else(missing)
}

#[cfg(test)]
mod tests {
    use benches::{
        ceilings::{Ceiling, Kind},
        speed::Samples,
    };

    use super::{cells, is_current, of, row};

    #[test]
    fn what_is_kept_is_found() {
        let pace = Samples { min: 1e9, median: 2e9, max: 3e9 };
        let read = Ceiling { gpu: false, kind: Kind::Read, pace };
        let tensor = Ceiling { gpu: true, kind: Kind::Tensor, pace };
        let mut row = row(&[read, tensor]);
        assert_eq!(of(&row, "cpu", "read"), Some(3e9));
        assert_eq!(of(&row, "cuda", "tensor"), Some(3e9));
        assert_eq!((of(&row, "cuda", "read"), of(&row, "cpu", "bf16")), (None, None));
        assert_eq!(cells(&read)[2..], ["3.0 GB/s", "2.0 GB/s", "1.0 GB/s"]);
        assert_eq!(cells(&tensor)[0], "cuda");
        assert_eq!(cells(&tensor)[2], "3.0 Gop/s");
        assert!(is_current(&row));
        row["method"] = 1.into();
        assert!(!is_current(&row), "memory was read in a slower way");
    }
}
