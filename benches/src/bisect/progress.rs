//! How far a bisection is, and whether it is to go on.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use golden::engine::Listener;

/// Told of every layer of every walk: how many there were, and how many are known to come in all. Returns
/// whether to go on; the work then ends with the error [`golden::engine::INTERRUPTED`]. Walks run side by
/// side, so it is told from several threads.
pub type Progress = Arc<dyn Fn(u64, u64) -> bool + Send + Sync>;

/// The layers of all walks of one bisection.
#[derive(Clone)]
pub(super) struct Steps {
    done: Arc<AtomicU64>,
    total: Arc<AtomicU64>,
    progress: Progress,
}

impl Steps {
    pub(super) fn new(progress: Progress) -> Steps {
        Steps { done: Arc::default(), total: Arc::default(), progress }
    }

    /// So many more are known to come.
    pub(super) fn expect(&self, layers: usize) {
        self.total.fetch_add(layers as u64, Ordering::Relaxed);
    }

    /// For an engine that has a part in it.
    pub(super) fn listener(&self) -> Listener {
        let steps = self.clone();
        Box::new(move |_| steps.go_on(1))
    }

    /// Whether to go on after so many more.
    pub(super) fn go_on(&self, layers: u64) -> bool {
        let done = self.done.fetch_add(layers, Ordering::Relaxed) + layers;
        (self.progress)(done, self.total.load(Ordering::Relaxed).max(done))
    }
}
