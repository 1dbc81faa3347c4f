//! How fast the GPU reads and copies its memory.

use golden::Error;

use super::{
    device::Buffer,
    engine::{Element, Ops},
    gpu::with,
    launch::{Kernels, Stream},
};

/// Memory of the GPU to read, more than its caches hold.
pub struct Memory {
    room: Buffer,
    found: Buffer,
    kernels: Kernels,
}

/// Bytes of it.
const ROOM: usize = 1 << 30;
/// How often it is read at once, so that a launch is nothing beside it.
const TIMES: usize = 8;

impl Memory {
    /// Takes it.
    ///
    /// # Errors
    /// If there is no GPU, or it has no room.
    pub fn new() -> Result<Memory, Error> {
        let [room, found] = with("reading", |context| {
            let device = &context.device;
            Ok([device.room(ROOM)?, device.room(4)?])
        })?;
        let mut memory = Memory { room, found, kernels: Kernels::default() };
        // The first time compiles.
        memory.read()?;
        Ok(memory)
    }

    /// Reads all of it a few times; how many bytes.
    ///
    /// # Errors
    /// If the GPU does not.
    pub fn read(&mut self) -> Result<u64, Error> {
        let Memory { room, found, kernels } = self;
        with("reading", |context| {
            let device = context.device.clone();
            let mut ops =
                Ops { stream: &mut Stream { context, kernels }, element: Element::F32, fast: None };
            (0..TIMES).try_for_each(|_| ops.read(found, room))?;
            device.wait()
        })?;
        Ok((TIMES * ROOM) as u64)
    }
}

/// Memory of the GPU to copy, more than its caches hold.
pub struct Copies {
    from: Buffer,
    to: Buffer,
}

impl Copies {
    /// Takes it.
    ///
    /// # Errors
    /// If there is no GPU, or it has no room.
    pub fn new() -> Result<Copies, Error> {
        let [from, to] = with("copying", |context| {
            let device = &context.device;
            Ok([device.room(ROOM / 2)?, device.room(ROOM / 2)?])
        })?;
        let mut copies = Copies { from, to };
        copies.copy()?;
        Ok(copies)
    }

    /// Copies all of it a few times; how many bytes were read and written.
    ///
    /// # Errors
    /// If the GPU does not.
    pub fn copy(&mut self) -> Result<u64, Error> {
        let Copies { from, to } = self;
        with("copying", |context| {
            let device = context.device.clone();
            (0..TIMES).try_for_each(|_| device.copy((&*from, 0), (&mut *to, 0), ROOM / 2))?;
            device.wait()
        })?;
        Ok((TIMES * ROOM) as u64)
    }
}
