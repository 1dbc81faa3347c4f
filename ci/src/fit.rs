//! Whether what is asked fits into this machine: said before anything is allocated.

use benches::Number;
use golden::{
    Weights,
    engine::{Demand, Memory},
};

use crate::exit::{Exit, fail, of_engine, refuse};

/// What the engine will need, refused with exit code 9 where the machine does not have it; `None` of an
/// engine that does not say.
///
/// # Errors
/// If the engine has no such number, or it does not fit.
pub(crate) fn check(
    engine: &str,
    number: Number<'_>,
    weights: &dyn Weights,
    demand: &Demand,
) -> anyhow::Result<Option<Memory>> {
    let memory = benches::memory(engine, number, weights, demand).map_err(refuse)?;
    if let Some(memory) = &memory {
        let what = format!("{engine} in {number}");
        let available = benches::available(engine).map_err(|e| of_engine(&e))?;
        fits(&what, memory, available).map_err(|line| fail(Exit::Unfit, line))?;
    }
    Ok(memory)
}

/// Whether what must be in memory fits into what there is; a machine that does not tell is believed to
/// have it.
pub(crate) fn fits(what: &str, memory: &Memory, available: Option<u64>) -> Result<(), String> {
    match available {
        Some(available) if available < memory.must_fit() => Err(format!(
            "memory: {what} needs {} ({}), the machine has {} available: {} would fit",
            size(memory.must_fit()),
            parts(memory),
            size(available),
            fitting(memory, available),
        )),
        _ => Ok(()),
    }
}

/// What of all that there would be room for.
fn fitting(memory: &Memory, available: u64) -> String {
    let beside = Memory { cache: 0, ..*memory }.must_fit();
    if beside < available {
        // As many as contexts are long, and as there are sequences.
        format!("{} of keys and values", size(available - beside))
    } else if memory.owned < available {
        "the weights alone, so that fewer sequences or a shorter piece".to_owned()
    } else {
        "fewer layers or experts, or weights in fewer bits,".to_owned()
    }
}

/// The parts of what must fit, largest words first.
pub(crate) fn parts(memory: &Memory) -> String {
    format!(
        "weights {}, states {}, keys and values {}, intermediates {}",
        size(memory.owned),
        size(memory.state),
        size(memory.cache),
        size(memory.scratch)
    )
}

/// Bytes for people.
pub(crate) fn size(bytes: u64) -> String {
    let wide = bytes as f64;
    match bytes {
        0..0x10_0000 => format!("{:.1} KiB", wide / 1024.0),
        0x10_0000..0x4000_0000 => format!("{:.1} MiB", wide / (1024.0 * 1024.0)),
        _ => format!("{:.1} GiB", wide / (1024.0 * 1024.0 * 1024.0)),
    }
}

#[cfg(test)]
mod tests {
    use golden::engine::Memory;

    use super::{fits, size};

    #[test]
    fn what_must_fit_fits_or_is_refused() {
        let memory =
            Memory { mapped: 1 << 40, owned: 1 << 30, state: 1 << 20, cache: 1 << 20, scratch: 0 };
        let enough = memory.must_fit();
        assert_eq!(enough, (1 << 30) + (2 << 20));
        assert_eq!(fits("cpu", &memory, Some(enough)), Ok(()));
        assert_eq!(fits("cpu", &memory, None), Ok(()));
        let line = fits("cpu in int8", &memory, Some(enough - 1)).unwrap_err();
        for word in ["cpu in int8", "1.0 GiB", "weights", "available"] {
            assert!(line.contains(word), "{line}");
        }
        let refused = |available| fits("cpu", &memory, Some(available)).unwrap_err();
        for (available, fitting) in [
            (enough - 1, "available: 1024.0 KiB of keys and values would fit"),
            (enough - (3 << 18), "available: 256.0 KiB of keys and values would fit"),
            (enough - (1 << 20), "the weights alone, so that fewer sequences"),
            (1 << 30, "fewer layers or experts, or weights in fewer bits, would fit"),
        ] {
            assert!(refused(available).contains(fitting), "{}", refused(available));
        }
        assert!(!line.contains('\n'));
        assert_eq!(size(u64::MAX), "17179869184.0 GiB");
    }
}
