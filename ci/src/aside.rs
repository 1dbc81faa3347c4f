//! Work that looks up too seldom to be ended: it runs beside, and is left behind when interrupted.

use std::{sync::mpsc, time::Duration};

use indicatif::ProgressBar;

use crate::{
    exit::{Exit, fail},
    out,
};

/// What the work comes to.
///
/// # Errors
/// If it was interrupted, or is at fault itself.
pub(crate) fn aside<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
    bar: &ProgressBar,
) -> anyhow::Result<T> {
    let (told, result) = mpsc::channel();
    std::thread::spawn(move || {
        // Nobody listens any more where it was interrupted.
        let _ = told.send(work());
    });
    loop {
        match result.recv_timeout(Duration::from_millis(50)) {
            Ok(result) => return Ok(result),
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                return Err(fail(Exit::Internal, "a fault of karat itself; please report it"));
            }
            Err(mpsc::RecvTimeoutError::Timeout) if out::interrupted() => {
                return Err(fail(Exit::Interrupted, "interrupted"));
            }
            Err(mpsc::RecvTimeoutError::Timeout) => bar.tick(),
        }
    }
}
