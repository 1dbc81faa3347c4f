//! Storage types of activations, as slices of kernels see them.

use half::{bf16, f16};

/// A number as memory holds it: widened to f32 to compute, rounded to nearest even to store.
pub(crate) trait Stored: Copy + Send + Sync + 'static {
    /// What an unwritten element holds.
    const NAN: Self;
    /// The value, exactly.
    fn load(self) -> f32;
    /// The nearest number of this type.
    fn store(x: f32) -> Self;
}

impl Stored for f32 {
    const NAN: f32 = f32::NAN;
    #[inline]
    fn load(self) -> f32 {
        self
    }
    #[inline]
    fn store(x: f32) -> f32 {
        x
    }
}

impl Stored for bf16 {
    const NAN: bf16 = bf16::NAN;
    #[inline]
    fn load(self) -> f32 {
        self.to_f32()
    }
    #[inline]
    fn store(x: f32) -> bf16 {
        bf16::from_f32(x)
    }
}

impl Stored for f16 {
    const NAN: f16 = f16::NAN;
    #[inline]
    fn load(self) -> f32 {
        self.to_f32()
    }
    #[inline]
    fn store(x: f32) -> f16 {
        f16::from_f32(x)
    }
}

/// Every element widened.
pub(crate) fn widen<E: Stored>(to: &mut [f32], from: &[E]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = from.load();
    }
}
