//! What the devices of one model tell one another.

use super::device::{Buffer, Device, Error};

/// The devices that a model is spread over, as one of them sees the others.
pub(super) trait Peers: Send + Sync {
    /// Puts so many bytes of every rank behind one another, in the order of the ranks, on each of them. It stands in
    /// the device's stream as a launch does, and every rank has to ask for it.
    fn gather(
        &self,
        device: &Device,
        from: &Buffer,
        to: &Buffer,
        bytes: usize,
    ) -> Result<(), Error>;
}

/// The only rank: what it has is all there is.
pub(super) struct Alone;

impl Peers for Alone {
    fn gather(&self, _: &Device, _: &Buffer, _: &Buffer, _: usize) -> Result<(), Error> {
        Ok(())
    }
}
