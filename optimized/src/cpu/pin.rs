//! Threads that stay on a processor each.

use std::sync::OnceLock;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Processors that this process may use, if its threads are pinned to them.
static PROCESSORS: OnceLock<Vec<usize>> = OnceLock::new();

/// Pins this thread to the first processor that the process may use, and every kernel thread that begins
/// from now on to one of the others, in their order; returns how many there are. What runs already stays
/// where it is.
///
/// # Errors
/// If the machine does not say which processors there are, or refuses.
pub fn pin() -> Result<usize, String> {
    let wrong = |e: rustix::io::Errno| format!("threads cannot be pinned: {e}");
    let allowed = sched_getaffinity(None).map_err(wrong)?;
    let processors: Vec<_> = (0..CpuSet::MAX_CPU).filter(|&cpu| allowed.is_set(cpu)).collect();
    let first = *processors.first().ok_or("threads cannot be pinned: no processor is known")?;
    to(first).map_err(wrong)?;
    Ok(PROCESSORS.get_or_init(|| processors).len())
}

/// Pins this thread, the `i`-th of those that work together, if threads are pinned.
pub fn thread(i: usize) {
    if let Some(processors) = PROCESSORS.get() {
        // Which processors there are was said by the machine; one that is gone since costs pace alone.
        let _ = to(processors[i % processors.len()]);
    }
}

fn to(processor: usize) -> rustix::io::Result<()> {
    let mut set = CpuSet::new();
    set.set(processor);
    sched_setaffinity(None, &set)
}

#[cfg(test)]
mod tests {
    use rustix::thread::{CpuSet, sched_getaffinity};

    use super::{PROCESSORS, pin, thread};

    /// The processors of this thread.
    fn own() -> Vec<usize> {
        let set = sched_getaffinity(None).unwrap();
        (0..CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect()
    }

    #[test]
    fn threads_stay_where_they_are_put() {
        let before = own();
        // In threads of its own: other tests keep theirs.
        let count = std::thread::spawn(|| {
            let count = pin().unwrap();
            assert_eq!(own().len(), 1);
            count
        });
        assert_eq!(count.join().unwrap(), before.len());
        let all = PROCESSORS.get().unwrap();
        assert_eq!(*all, before);
        for i in 0..2 * before.len() {
            let of = std::thread::spawn(move || {
                thread(i);
                own()
            });
            assert_eq!(of.join().unwrap(), [all[i % all.len()]]);
        }
        assert_eq!(own(), before);
    }
}
