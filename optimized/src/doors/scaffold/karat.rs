//! `karat.h` in Rust: what karat hands to a kernel. Version 1.

use std::{
    ffi::{CStr, c_char, c_void},
    slice,
};

/// What a tensor holds.
pub trait Element: Copy {
    /// `KARAT_F32`, …
    const DTYPE: i32;
}
impl Element for f64 {
    const DTYPE: i32 = 0;
}
impl Element for f32 {
    const DTYPE: i32 = 1;
}
impl Element for i64 {
    const DTYPE: i32 = 4;
}
impl Element for u8 {
    const DTYPE: i32 = 5;
}
/// The bits of a bf16.
#[derive(Clone, Copy)]
#[repr(transparent)]
#[allow(dead_code)]
pub struct Bf16(pub u16);
impl Element for Bf16 {
    const DTYPE: i32 = 3;
}

#[repr(C)]
pub struct Tensor {
    name: *const c_char,
    data: *mut c_void,
    dtype: i32,
    rank: i32,
    shape: *const i64,
    strides: *const i64,
}

#[repr(C)]
pub struct Number {
    name: *const c_char,
    value: f64,
}

/// One call.
#[repr(C)]
pub struct Call {
    abi: u32,
    size: u32,
    op: *const c_char,
    stream: *mut c_void,
    workspace: *mut c_void,
    workspace_bytes: u64,
    inputs: *const Tensor,
    outputs: *const Tensor,
    scalars: *const Number,
    sizes: *const Number,
    n_inputs: u32,
    n_outputs: u32,
    n_scalars: u32,
    n_sizes: u32,
    message: *mut c_char,
    message_bytes: u64,
}

fn is(name: *const c_char, wanted: &str) -> bool {
    // SAFETY: karat's names are strings that end in a zero and outlive the call.
    unsafe { CStr::from_ptr(name) }.to_str() == Ok(wanted)
}

#[allow(dead_code)]
impl Call {
    fn tensor<T: Element>(list: *const Tensor, n: u32, name: &str) -> Option<(*mut T, usize)> {
        // SAFETY: karat gives as many tensors as it says, and as many sizes as the rank.
        let found = unsafe { slice::from_raw_parts(list, n as usize) }.iter().find(|t| is(t.name, name))?;
        let shape = unsafe { slice::from_raw_parts(found.shape, found.rank as usize) };
        let size = shape.iter().product::<i64>() as usize;
        (found.dtype == T::DTYPE).then_some((found.data.cast(), size))
    }

    /// The input of a name, if it is there and of this type; rows one after another.
    pub fn input<T: Element>(&self, name: &str) -> Option<&[T]> {
        let (data, size) = Self::tensor(self.inputs, self.n_inputs, name)?;
        // SAFETY: the tensor is as large as its shape says and is not written to during the call.
        Some(unsafe { slice::from_raw_parts(data, size) })
    }

    /// The output of a name. Ask for each once: two of them would be two ways to the same memory.
    #[allow(clippy::mut_from_ref)]
    pub fn output<T: Element>(&self, name: &str) -> Option<&mut [T]> {
        let (data, size) = Self::tensor(self.outputs, self.n_outputs, name)?;
        // SAFETY: as above; nobody else has the output during the call.
        Some(unsafe { slice::from_raw_parts_mut(data, size) })
    }

    /// The scalar of a name; 0 where there is none.
    pub fn scalar(&self, name: &str) -> f64 {
        // SAFETY: karat gives as many numbers as it says.
        let all = unsafe { slice::from_raw_parts(self.scalars, self.n_scalars as usize) };
        all.iter().find(|number| is(number.name, name)).map_or(0.0, |number| number.value)
    }

    /// The size of a letter of the case.
    pub fn size(&self, letter: &str) -> usize {
        // SAFETY: karat gives as many numbers as it says.
        let all = unsafe { slice::from_raw_parts(self.sizes, self.n_sizes as usize) };
        all.iter().find(|number| is(number.name, letter)).map_or(0, |number| number.value as usize)
    }

    /// Tells karat what went wrong.
    pub fn fail(&self, why: &str) -> i32 {
        let room = (self.message_bytes as usize).saturating_sub(1);
        let n = why.len().min(room);
        // SAFETY: the room for the message is `message_bytes` large.
        let message = unsafe { slice::from_raw_parts_mut(self.message.cast::<u8>(), n + 1) };
        message[..n].copy_from_slice(&why.as_bytes()[..n]);
        message[n] = 0;
        1
    }
}

/// A kernel.
pub trait Kernel {
    /// Computes every output.
    fn run(call: &Call) -> Result<(), String>;
}

/// Exports a kernel under a symbol, and the version once.
macro_rules! export {
    ($kernel:ty, $symbol:ident) => {
        #[unsafe(no_mangle)]
        pub extern "C" fn karat_abi() -> u32 {
            1
        }

        /// # Safety
        /// karat calls this with a call that is whole.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $symbol(call: *const karat::Call) -> i32 {
            // SAFETY: see above.
            let call = unsafe { &*call };
            match <$kernel as karat::Kernel>::run(call) {
                Ok(()) => 0,
                Err(why) => call.fail(&why),
            }
        }
    };
}
pub(crate) use export;
