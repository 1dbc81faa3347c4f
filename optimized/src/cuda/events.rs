//! How long work takes on the GPU, by the GPU's own events.
//!
//! Calls follow one another in the stream without anybody waiting in between: where a launch takes longer
//! than what is launched, the time is that of launches.

use golden::{Calls, Clock, Clocked};

use super::device::{Device, Error};

/// Times calls, each of which puts its work into the stream; one more goes before, for the caches.
pub(crate) fn clocked(
    device: &Device,
    calls: &Calls,
    call: &mut dyn FnMut() -> Result<(), Error>,
) -> Result<Clocked, Error> {
    call()?;
    let mut walked = match calls.away {
        None => None,
        Some(bytes) => Some(device.room(bytes.max(2 * device.cached()?))?),
    };
    let group = if walked.is_some() { 1 } else { calls.group };
    let mut ns = Vec::with_capacity(calls.times);
    for _ in 0..calls.times {
        if let Some(walked) = &mut walked {
            device.clear(walked)?;
        }
        let all = device.elapsed(&mut || (0..group).try_for_each(|_| call()))?;
        ns.push(all / group as f64);
    }
    Ok(Clocked { ns, clock: Clock::Events })
}
