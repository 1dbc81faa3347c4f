//! Threads for kernels: parallel regions that cost microseconds.
//!
//! A decoding step has hundreds of regions of some 20 µs each. Workers therefore spin for a moment
//! between regions before they sleep. Each thread has a share of the tasks, one after another, the same
//! share of as many tasks every time: what it walks through in memory goes on where its last task ended, and
//! on a machine of several nodes a share that a pinned thread has written first lies in its own node. Tasks
//! are taken one by one, and who has none left takes those of others: a worker that the operating
//! system has put aside holds up one task, not the region. A region uses as many threads as rayon
//! would here (`rayon::current_num_threads`), so that one setting governs both; regions inside a
//! region, or beside one, run on the calling thread alone.
#![expect(unsafe_code, reason = "a region lends borrowed data to threads that outlive it")]

use std::{
    any::Any,
    cell::UnsafeCell,
    hint,
    marker::PhantomData,
    ops::Range,
    panic::{self, AssertUnwindSafe},
    sync::{
        Condvar, Mutex, MutexGuard, TryLockError,
        atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
    thread,
};

use super::{pin, simd::Simd};

/// Calls `task(i)` once for every `i` below `tasks`, on several threads, and waits.
///
/// # Panics
/// If a task does.
pub(crate) fn each(tasks: usize, task: impl Fn(usize) + Sync) {
    let threads = rayon::current_num_threads().min(tasks);
    let region = match POOL.region.try_lock() {
        Ok(region) => Some(region),
        // A task panicked; what the lock guards was put in order while it unwound.
        Err(TryLockError::Poisoned(region)) => Some(region.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    };
    match region {
        Some(region) if 1 < threads => POOL.run(region, threads, tasks, &task),
        _ => (0..tasks).for_each(task),
    }
}

/// Cuts `data` into pieces of `len` (the last may be shorter) and calls `task(i, piece)` for each.
pub(crate) fn pieces<T: Send>(data: &mut [T], len: usize, task: impl Fn(usize, &mut [T]) + Sync) {
    parts(data, &[0, 1], len, |_, mut part| task(part.columns.start / len.max(1), part.row(0)));
}

/// Calls `row(i, row)` for each row of `width` elements, `together` of them in a task, on vectors.
pub(crate) fn rows<S: Simd, T: Send>(
    s: S,
    data: &mut [T],
    (width, together): (usize, usize),
    row: impl Fn(usize, &mut [T]) + Sync,
) {
    pieces(data, together * width, |task, rows| {
        s.run(
            #[inline(always)]
            || {
                for (i, own) in rows.chunks_exact_mut(width).enumerate() {
                    row(task * together + i, own);
                }
            },
        );
    });
}

/// The same for two slices that have equally many pieces.
pub(crate) fn pieces2<A: Send, B: Send>(
    (a, len_a): (&mut [A], usize),
    (b, len_b): (&mut [B], usize),
    task: impl Fn(usize, &mut [A], &mut [B]) + Sync,
) {
    let (a, b) = (Parts::new(a, &[0, 1], len_a), Parts::new(b, &[0, 1], len_b));
    assert_eq!(a.count(), b.count(), "as many pieces of one as of the other");
    each(a.count(), |i| {
        // SAFETY: `each` calls this once for every `i`.
        let (_, mut own) = unsafe { a.part(i) };
        // SAFETY: the same.
        let (_, mut other) = unsafe { b.part(i) };
        task(i, own.row(0), other.row(0));
    });
}

/// Cuts a matrix into parts: its rows at `starts` (the first is 0, the last the number of rows), its
/// columns every `width`; calls `task(i, part)` for each, `i` counting the cuts of the rows. Parts
/// without rows are left out.
pub(crate) fn parts<T: Send>(
    data: &mut [T],
    starts: &[usize],
    width: usize,
    task: impl Fn(usize, Part<'_, T>) + Sync,
) {
    let parts = Parts::new(data, starts, width);
    each(parts.count(), |i| {
        // SAFETY: `each` calls this once for every `i`.
        let (cut, part) = unsafe { parts.part(i) };
        task(cut, part);
    });
}

/// A matrix cut into parts.
struct Parts<'a, T> {
    data: *mut T,
    columns: usize,
    width: usize,
    starts: &'a [usize],
    /// Which cuts have rows, where not all have.
    cuts: Option<Vec<usize>>,
    of: PhantomData<&'a mut [T]>,
}

// SAFETY: a part is handed to one thread only, and `T` may be sent there.
unsafe impl<T: Send> Sync for Parts<'_, T> {}

impl<'a, T> Parts<'a, T> {
    fn new(data: &'a mut [T], starts: &'a [usize], width: usize) -> Parts<'a, T> {
        let all = starts.last().copied().unwrap_or(0);
        let columns = data.len().checked_div(all).unwrap_or(0);
        assert_eq!(columns * all, data.len(), "whole rows");
        assert!(starts.is_sorted() && starts.first() == Some(&0), "rows are cut in their order");
        let full = |cut: &usize| starts[*cut] < starts[cut + 1];
        let each = 0..starts.len() - 1;
        let cuts = (!each.clone().all(|cut| full(&cut))).then(|| each.filter(full).collect());
        Parts {
            data: data.as_mut_ptr(),
            columns,
            width: width.max(1),
            starts,
            cuts,
            of: PhantomData,
        }
    }

    /// Parts side by side.
    fn across(&self) -> usize {
        self.columns.div_ceil(self.width)
    }

    fn count(&self) -> usize {
        self.cuts.as_ref().map_or(self.starts.len() - 1, Vec::len) * self.across()
    }

    /// Part `i`, and which cut of the rows it is of. Nothing counts what was handed out: that would be one more
    /// line of memory that goes from one thread's caches to another's.
    ///
    /// # Panics
    /// If there is no such part.
    ///
    /// # Safety
    /// As long as a part is there, it is not asked for again.
    unsafe fn part(&self, i: usize) -> (usize, Part<'_, T>) {
        let cut = i / self.across();
        let cut = self.cuts.as_ref().map_or(cut, |cuts| cuts[cut]);
        let rows = self.starts[cut]..self.starts[cut + 1];
        let from = i % self.across() * self.width;
        let columns = from..(from + self.width).min(self.columns);
        (cut, Part { data: self.data, stride: self.columns, rows, columns, of: PhantomData })
    }
}

/// Some columns of some rows of a matrix, for one task alone.
pub(crate) struct Part<'a, T> {
    data: *mut T,
    stride: usize,
    /// Which rows.
    pub(crate) rows: Range<usize>,
    /// Which columns.
    pub(crate) columns: Range<usize>,
    of: PhantomData<&'a mut [T]>,
}

impl<T> Part<'_, T> {
    /// These columns of the `i`-th of these rows.
    pub(crate) fn row(&mut self, i: usize) -> &mut [T] {
        assert!(i < self.rows.len(), "row {i} of {}", self.rows.len());
        let start = (self.rows.start + i) * self.stride + self.columns.start;
        // SAFETY: the row and the columns are inside the matrix that `Parts::new` was given, and so
        // is `start`.
        let data = unsafe { self.data.add(start) };
        // SAFETY: the elements are inside the matrix (above), which is borrowed for as long as the
        // part; no other part has them, each part exists once (`Parts::part`), and `&mut self` keeps two
        // rows of one part from being borrowed together.
        unsafe { std::slice::from_raw_parts_mut(data, self.columns.len()) }
    }
}

/// What a region does, without its lifetime.
#[derive(Clone, Copy)]
struct Job {
    task: *const (dyn Fn(usize) + Sync),
    tasks: usize,
    /// How many shares they are cut into.
    shares: usize,
}

impl Job {
    /// The first task of a share.
    fn start(&self, share: usize) -> usize {
        // Tasks are elements of memory at most, and shares few: no overflow.
        self.tasks * share / self.shares
    }
}

/// The next task of a share, alone in its lines of memory: its owner alone writes it, until others are done.
#[repr(align(128))]
struct Next(AtomicUsize);

/// Shares at most; of more threads some begin with the same one.
const SHARES: usize = 256;

struct Pool {
    /// Held by the one region that runs; how many workers there are.
    region: Mutex<usize>,
    job: UnsafeCell<Option<Job>>,
    next: [Next; SHARES],
    /// Seats left (upper half) and workers inside (lower half).
    seats: AtomicU64,
    /// Counts regions; what waiting workers watch.
    turn: AtomicU32,
    asleep: AtomicUsize,
    bed: Mutex<()>,
    bell: Condvar,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is written only by the region's holder while no worker is inside and no seat is
// open, and read only by workers inside, which the opening of seats lets in.
unsafe impl Sync for Pool {}

static POOL: Pool = Pool {
    region: Mutex::new(0),
    job: UnsafeCell::new(None),
    next: [const { Next(AtomicUsize::new(0)) }; SHARES],
    seats: AtomicU64::new(0),
    turn: AtomicU32::new(0),
    asleep: AtomicUsize::new(0),
    bed: Mutex::new(()),
    bell: Condvar::new(),
    panic: Mutex::new(None),
};

const SEAT: u64 = 1 << 32;

/// Looks at the clock of regions before a worker goes to sleep: some tens of microseconds.
const PATIENCE: u32 = 4000;

impl Pool {
    fn run(
        &'static self,
        mut workers: MutexGuard<'_, usize>,
        threads: usize,
        tasks: usize,
        task: &(dyn Fn(usize) + Sync),
    ) {
        while *workers < threads - 1 {
            let name = format!("kernel-{}", *workers + 1);
            let (own, pool) = (*workers + 1, self);
            let work = move || {
                pin::thread(own);
                pool.work(own);
            };
            if thread::Builder::new().name(name).spawn(work).is_err() {
                break; // with fewer, then
            }
            *workers += 1;
        }
        // SAFETY: only the lifetime is changed. `Open` below waits, also when it unwinds, until no
        // worker is inside, and workers do not keep the pointer.
        let task = unsafe {
            std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(task)
        };
        let job = Job { task, tasks, shares: threads.min(SHARES) };
        // SAFETY: this thread holds the region, the last one let no worker stay inside, and no seat
        // is open: nobody reads.
        unsafe { *self.job.get() = Some(job) };
        for (share, next) in self.next[..job.shares].iter().enumerate() {
            next.0.store(job.start(share), Ordering::Relaxed);
        }
        let open = Open(self);
        self.seats.store((threads as u64 - 1) * SEAT, Ordering::Release);
        self.turn.fetch_add(1, Ordering::SeqCst);
        if 0 < self.asleep.load(Ordering::SeqCst) {
            drop(self.bed.lock());
            self.bell.notify_all();
        }
        self.tasks(0, job, task);
        drop(open);
        drop(workers);
        let panicked = self.panic.lock().ok().and_then(|mut panic| panic.take());
        if let Some(panicked) = panicked {
            panic::resume_unwind(panicked);
        }
    }

    /// The tasks of a thread's own share, then those of others.
    fn tasks(&self, own: usize, job: Job, task: &(dyn Fn(usize) + Sync)) {
        for share in (own..own + job.shares).map(|i| i % job.shares) {
            loop {
                let i = self.next[share].0.fetch_add(1, Ordering::Relaxed);
                if job.start(share + 1) <= i {
                    break;
                }
                task(i);
            }
        }
    }

    /// Nobody is given another task.
    fn stop(&self) {
        self.next.iter().for_each(|next| next.0.store(usize::MAX / 2, Ordering::Relaxed));
    }

    fn work(&self, own: usize) {
        let mut seen = self.turn.load(Ordering::SeqCst);
        loop {
            if self.sit() {
                // SAFETY: inside; whoever opened the seats wrote the job before, and waits.
                let job = unsafe { *self.job.get() };
                if let Some(job) = job {
                    // SAFETY: the region that lent it waits until this worker is outside.
                    let task = unsafe { &*job.task };
                    let done = panic::catch_unwind(AssertUnwindSafe(|| self.tasks(own, job, task)));
                    if let (Err(panicked), Ok(mut panic)) = (done, self.panic.lock()) {
                        self.stop();
                        panic.get_or_insert(panicked);
                    }
                }
                self.seats.fetch_sub(1, Ordering::Release);
            }
            seen = self.wait(seen);
        }
    }

    /// Takes a seat, if one is free.
    fn sit(&self) -> bool {
        let take = |seats| (SEAT <= seats).then(|| seats - SEAT + 1);
        self.seats.fetch_update(Ordering::Acquire, Ordering::Relaxed, take).is_ok()
    }

    /// Waits until there was a region after the `seen`th.
    fn wait(&self, seen: u32) -> u32 {
        for _ in 0..PATIENCE {
            let turn = self.turn.load(Ordering::Acquire);
            if turn != seen {
                return turn;
            }
            hint::spin_loop();
        }
        let Ok(mut bed) = self.bed.lock() else { return seen };
        self.asleep.fetch_add(1, Ordering::SeqCst);
        while self.turn.load(Ordering::SeqCst) == seen {
            let Ok(woken) = self.bell.wait(bed) else { break };
            bed = woken;
        }
        self.asleep.fetch_sub(1, Ordering::SeqCst);
        self.turn.load(Ordering::SeqCst)
    }
}

/// A region with open seats; closes them and waits for those inside.
struct Open<'a>(&'a Pool);

impl Drop for Open<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.stop();
        }
        self.0.seats.fetch_and(SEAT - 1, Ordering::Relaxed);
        let mut looks = 0_u32;
        while self.0.seats.load(Ordering::Acquire) != 0 {
            looks += 1;
            if looks < PATIENCE { hint::spin_loop() } else { thread::yield_now() }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::{each, parts, pieces};

    #[test]
    fn every_task_runs_once() {
        for tasks in [0, 1, 2, 3, 100, 1000] {
            let runs: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            each(tasks, |i| _ = runs[i].fetch_add(1, Ordering::Relaxed));
            assert!(runs.iter().all(|n| n.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn many_regions_from_many_threads() {
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for round in 0..2000 {
                        let mut data = [0_usize; 37];
                        pieces(&mut data, 5, |i, piece| piece.fill(round + i));
                        assert!(data.iter().enumerate().all(|(at, &x)| x == round + at / 5));
                    }
                });
            }
        });
    }

    #[test]
    fn parts_cover_a_matrix() {
        let mut data = [0; 5 * 10];
        parts(&mut data, &[0, 2, 2, 5], 4, |cut, mut part| {
            assert_eq!(part.rows, [0..2, 2..2, 2..5][cut]);
            let (first, columns) = (part.rows.start, part.columns.clone());
            for row in 0..part.rows.len() {
                for (x, column) in part.row(row).iter_mut().zip(columns.clone()) {
                    *x = (first + row) * 10 + column;
                }
            }
        });
        assert!(data.iter().enumerate().all(|(at, &x)| at == x));
    }

    #[test]
    fn a_panic_in_a_task_comes_out() {
        for at in [0, 50, 99] {
            let caught = std::panic::catch_unwind(|| each(100, |i| assert_ne!(i, at, "planted")));
            assert!(caught.is_err());
            each(100, |_| ());
        }
    }

    #[test]
    fn a_region_inside_a_region() {
        let sum = AtomicUsize::new(0);
        each(8, |_| each(8, |i| _ = sum.fetch_add(i, Ordering::Relaxed)));
        assert_eq!(sum.into_inner(), 8 * 28);
    }
}
