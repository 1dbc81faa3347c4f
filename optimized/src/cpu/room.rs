//! Room for intermediates, used again: fresh pages cost more time than what is computed in them.

use std::{
    cell::RefCell,
    mem,
    ops::{Deref, DerefMut},
    thread::LocalKey,
};

use half::bf16;

use super::{aligned::Aligned, linear::activations::BlockPart};

/// What room is made for.
pub(crate) trait Kept: Copy + zerocopy::FromZeros + 'static {
    /// What room holds that was never used, and in tests all of it.
    const NONE: Self;

    fn shelf() -> &'static LocalKey<Shelf<Self>>;
}

/// Pieces that wait to be used again, a thread's own: a lock goes to and fro between threads that begin a task
/// together, 0.6 µs each time where their caches lie on two chiplets.
type Shelf<T> = RefCell<Vec<Aligned<T>>>;

macro_rules! kept {
    ($($kind:ty = $none:expr),*) => {$(
        impl Kept for $kind {
            const NONE: $kind = $none;

            fn shelf() -> &'static LocalKey<Shelf<$kind>> {
                thread_local!(static SHELF: Shelf<$kind> = const { RefCell::new(Vec::new()) });
                &SHELF
            }
        }
    )*};
}

kept!(
    f32 = f32::NAN,
    bf16 = bf16::NAN,
    i16 = i16::MIN,
    i8 = i8::MIN,
    BlockPart = BlockPart { scale: f32::NAN, total: f32::NAN, offset: 0 }
);

/// So many elements, whatever they are; given back when dropped.
pub(crate) struct Room<T: Kept> {
    data: Aligned<T>,
    len: usize,
}

/// Pieces on a shelf.
const SHELF: usize = 24;

/// So many elements, whatever they are: each has to be written before it is read.
pub(crate) fn room<T: Kept>(len: usize) -> Room<T> {
    let mut data = T::shelf().with_borrow_mut(|shelf| {
        // The least that is enough, but not one that others will want.
        let enough =
            shelf.iter().enumerate().filter(|(_, x)| (len..=4 * len + 4096).contains(&x.len()));
        let at = enough.min_by_key(|(_, x)| x.len()).map(|(at, _)| at);
        at.map(|at| shelf.swap_remove(at)).unwrap_or_default()
    });
    if data.len() < len {
        data = Aligned::new(T::NONE, len);
    }
    if cfg!(debug_assertions) {
        data.fill(T::NONE);
    }
    Room { data, len }
}

impl<T: Kept> Deref for Room<T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        &self.data[..self.len]
    }
}

impl<T: Kept> DerefMut for Room<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.data[..self.len]
    }
}

impl<T: Kept> Drop for Room<T> {
    fn drop(&mut self) {
        let data = mem::take(&mut self.data);
        // Where the thread ends, so does what it kept.
        _ = T::shelf().try_with(|shelf| {
            let mut shelf = shelf.borrow_mut();
            if shelf.len() < SHELF {
                shelf.push(data);
            } else if let Some(least) = shelf.iter_mut().min_by_key(|x| x.len())
                && least.len() < data.len()
            {
                *least = data;
            }
        });
    }
}
