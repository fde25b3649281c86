//! Where the threads of an engine wait between two batches while its state is looked at as a whole.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::peer::lock;

#[derive(Default)]
pub struct Gate {
    closed: AtomicBool,
    waiting: Mutex<usize>,
    changed: Condvar,
}

impl Gate {
    /// One relaxed load: cheap enough for every turn of a packet loop.
    #[inline]
    pub fn closed(&self) -> bool {
        self.closed.load(Relaxed)
    }

    pub fn close(&self) {
        self.closed.store(true, Relaxed);
    }

    pub fn open(&self) {
        let _count = lock(&self.waiting);
        self.closed.store(false, Relaxed);
        self.changed.notify_all();
    }

    pub fn waiting(&self) -> usize {
        *lock(&self.waiting)
    }

    /// Waits until the gate opens. `arrived` is called once this thread counts as waiting.
    pub fn wait(&self, arrived: impl FnOnce()) {
        let mut count = lock(&self.waiting);
        *count += 1;
        self.changed.notify_all();
        drop(count);
        arrived();
        count = lock(&self.waiting);
        while self.closed() {
            count = self.changed.wait(count).unwrap_or_else(PoisonError::into_inner);
        }
        *count -= 1;
    }

    /// Whether `threads` wait within `patience`.
    pub fn gathered(&self, threads: usize, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        let mut count = lock(&self.waiting);
        while *count < threads {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            count = self.changed.wait_timeout(count, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}
