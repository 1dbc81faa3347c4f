//! Elements that begin where a line of memory does: sixteen numbers that lie across two lines are two
//! loads, and every vector of a large allocation would lie so. What is larger than a huge page lies in huge
//! pages, if the system has some: finding where small ones are costs a tenth of reading keys and values.
#![expect(unsafe_code, reason = "huge pages are asked for by address")]

use std::{
    ffi::c_void,
    ops::{Deref, DerefMut},
    ptr,
    sync::{Arc, Mutex, PoisonError},
};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use zerocopy::FromZeros;

/// Bytes of a line of memory.
pub(crate) const LINE: usize = 64;

/// Bytes of a huge page.
const HUGE: usize = 1 << 21;

/// As many elements as there were when it was made.
pub(crate) struct Aligned<T> {
    data: Data<T>,
    start: usize,
    len: usize,
}

enum Data<T> {
    /// A line more than is used.
    Own(Vec<T>),
    /// A huge page more than is used.
    Mapped(Arc<Map>),
}

/// Memory of the system, zeros at first.
struct Map {
    first: *mut c_void,
    bytes: usize,
}

// SAFETY: a map is memory that nobody else knows of, as that of a vector is.
unsafe impl Send for Map {}
// SAFETY: as above; who shares it may only read it.
unsafe impl Sync for Map {}

impl Map {
    /// So many bytes for which huge pages are asked. Where the system has none it says so, and is slower.
    fn new(bytes: usize) -> Option<Map> {
        let (read_write, own) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: a new map at a place of the system's choice takes nothing from anybody.
        let first = unsafe { mmap_anonymous(ptr::null_mut(), bytes, read_write, own) }.ok()?;
        // SAFETY: the bytes are the map's; what they hold stays as it is.
        let _ = unsafe { madvise(first, bytes, Advice::LinuxHugepage) };
        Some(Map { first, bytes })
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the map is this one's own, and nobody borrows it any more.
        let _ = unsafe { munmap(self.first, self.bytes) };
    }
}

impl<T: Copy + FromZeros> Aligned<T> {
    /// `len` times the same.
    pub(crate) fn new(x: T, len: usize) -> Aligned<T> {
        let mut new = Aligned::zeros(len);
        new.fill(x);
        new
    }

    /// Zeros; of many none is touched: memory lies near the thread that writes there first.
    pub(crate) fn zeros(len: usize) -> Aligned<T> {
        let bytes = len * size_of::<T>();
        if HUGE <= bytes
            && HUGE.is_multiple_of(size_of::<T>())
            && let Some(map) = Map::new(bytes + HUGE)
        {
            let start = map.first.align_offset(HUGE) / size_of::<T>();
            return Aligned { data: Data::Mapped(Arc::new(map)), start, len };
        }
        let more = LINE / size_of::<T>();
        let data = vec![T::new_zeroed(); len + more];
        // A type whose size does not divide a line has no such place.
        let start = data.as_ptr().align_offset(LINE).min(more);
        Aligned { data: Data::Own(data), start, len }
    }
}

/// Room for allocations that are made one after another and live together: those that are too small for a
/// huge page lie in huge pages all the same.
#[derive(Default)]
pub(crate) struct Arena(Mutex<Option<(Arc<Map>, usize)>>);

/// Bytes that an arena takes from the system at once. What is not used of them is not touched.
const CHUNK: usize = 1 << 26;

impl Arena {
    /// Zeros, as [`Aligned::zeros`].
    pub(crate) fn zeros<T: Copy + FromZeros>(&self, len: usize) -> Aligned<T> {
        let bytes = (len * size_of::<T>()).next_multiple_of(LINE);
        if CHUNK / 4 <= bytes || !LINE.is_multiple_of(size_of::<T>()) {
            return Aligned::zeros(len);
        }
        let mut chunk = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |(_, used): &&mut (Arc<Map>, usize)| *used + bytes <= CHUNK + HUGE;
        let (map, from) = if let Some((map, used)) = chunk.as_mut().filter(fits) {
            // Whoever asks next gets what lies behind.
            (map.clone(), std::mem::replace(used, *used + bytes))
        } else {
            let Some(map) = Map::new(CHUNK + HUGE).map(Arc::new) else {
                return Aligned::zeros(len);
            };
            let from = map.first.align_offset(HUGE);
            *chunk = Some((map.clone(), from + bytes));
            (map, from)
        };
        Aligned { data: Data::Mapped(map), start: from / size_of::<T>(), len }
    }
}

impl<T> Default for Aligned<T> {
    fn default() -> Aligned<T> {
        Aligned { data: Data::Own(Vec::new()), start: 0, len: 0 }
    }
}

impl<T: Copy + FromZeros> Clone for Aligned<T> {
    fn clone(&self) -> Aligned<T> {
        let mut own = Aligned::zeros(self.len);
        own.copy_from_slice(self);
        own
    }
}

impl<T> Deref for Aligned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match &self.data {
            Data::Own(data) => &data[self.start..self.start + self.len],
            Data::Mapped(map) => {
                let first = map.first.cast::<T>().wrapping_add(self.start);
                // SAFETY: `zeros` mapped as many bytes behind this place, a line of memory, which suits any type;
                // zeros are values of `T`, and nothing but a `T` was written since: an arena gives a place once.
                unsafe { std::slice::from_raw_parts(first, self.len) }
            }
        }
    }
}

impl<T> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        match &mut self.data {
            Data::Own(data) => &mut data[self.start..self.start + self.len],
            Data::Mapped(map) => {
                let first = map.first.cast::<T>().wrapping_add(self.start);
                // SAFETY: as above; who borrows this mutably is the only one who does, of an arena the only one who
                // was given the place.
                unsafe { std::slice::from_raw_parts_mut(first, self.len) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::{Aligned, Arena, CHUNK, HUGE, LINE};

    #[test]
    fn an_arena_gives_every_place_once() {
        let arena = Arena::default();
        let mut all: Vec<_> = (0..300).map(|i| arena.zeros::<u32>(i * 501)).collect();
        for (i, own) in (0..).zip(&mut all) {
            assert!(own.as_ptr().addr().is_multiple_of(LINE) && own.iter().all(|&x| x == 0));
            own.fill(i);
        }
        assert!(CHUNK < 4 * all.iter().map(|own| own.len()).sum::<usize>(), "more than one chunk");
        // Those that lie in one chunk with others stay when others go.
        all.retain(|own| own.first().is_none_or(|x| x % 3 == 0));
        drop(arena);
        assert!((0..).zip(&all).all(|(i, own)| own.iter().all(|&x| x == 3 * i)));
        let large = Arena::default().zeros::<u8>(CHUNK + 1);
        assert!(large.as_ptr().addr().is_multiple_of(HUGE) && large.len() == CHUNK + 1);
    }

    #[test]
    fn it_begins_at_a_line_or_a_huge_page() {
        for len in [0, 1, 15, 16, 1000, 1 << 19, (1 << 20) + 1] {
            let (a, b) = (Aligned::new(1.5_f32, len), Aligned::new(bf16::ONE, len));
            let at = |first: usize, bytes| {
                let unit = if HUGE <= bytes { HUGE } else { LINE };
                assert!(first.is_multiple_of(unit), "{first} of {bytes} bytes");
            };
            at(b.as_ptr().addr(), 2 * len);
            assert_eq!(&*b, vec![bf16::ONE; len]);
            let mut other = a.clone();
            for x in [&a, &other] {
                at(x.as_ptr().addr(), 4 * len);
                assert_eq!(&**x, vec![1.5; len]);
            }
            other.fill(2.5);
            assert_eq!(&*a, vec![1.5; len]);
            assert!(Aligned::<f32>::zeros(len).iter().all(|&x| x == 0.0));
        }
        // Of three numbers of four bytes there is no such place.
        assert_eq!(&*Aligned::new([7_u32; 3], 1 << 18), vec![[7; 3]; 1 << 18]);
        assert!(Aligned::<f32>::default().is_empty());
    }
}
