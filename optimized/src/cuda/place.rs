//! Tensors on the device: bytes between guard bands, as [`Block`] has them.

use super::device::{Buffer, Device, Error};
use crate::doors::block::Block;

/// Where tensors start on the device: at multiples of this.
const ALIGN: usize = 256;

/// A block's memory on the device: guard bands too.
pub(crate) struct Place {
    buffer: Buffer,
    /// Bytes ahead of the image.
    ahead: usize,
    /// Bytes of the image ahead of the tensor.
    start: usize,
}

impl Place {
    /// Room for a block.
    pub(crate) fn new(device: &Device, block: &Block) -> Result<Place, Error> {
        let (image, start) = block.image();
        // Buffers are aligned; what is ahead of the image makes the tensor so.
        let ahead = start.next_multiple_of(ALIGN) - start;
        Ok(Place { buffer: device.room(ahead + image.len())?, ahead, start })
    }

    /// Where the tensor starts.
    pub(crate) fn address(&self, device: &Device) -> u64 {
        device.address(&self.buffer) + (self.ahead + self.start) as u64
    }

    /// Copies a block to the device.
    pub(crate) fn put(&mut self, device: &Device, block: &Block) -> Result<(), Error> {
        let (image, _) = block.image();
        device.put(&[&vec![0; self.ahead], image].concat(), &mut self.buffer)
    }

    /// Waits for the device, and copies a block back.
    pub(crate) fn get(&self, device: &Device, block: &mut Block) -> Result<(), Error> {
        let mut all = vec![0; self.ahead + block.image().0.len()];
        device.get(&self.buffer, &mut all)?;
        block.image_mut().copy_from_slice(&all[self.ahead..]);
        Ok(())
    }
}
