//! The episode store: decoded columns in host memory, within a budget, shared by every loader.
//!
//! A stream of an episode is decoded once, whoever asks first, and stays until memory is needed. What goes first is
//! what every loader's own future needs last ([`Future`]): the visiting order is known, so this is Belady's rule
//! as far as the loaders look ahead, and what was read longest ago beyond. What is needed now is always admitted,
//! with a warning where even that alone is over the budget; what is needed later is admitted only into free memory
//! or over something needed later still.
//!
//! ```text
//!            want                    read                evict
//!   Absent ────────▶ Loading ──┬──▶ Resident ─────────────────▶ Absent
//!                              └──▶ Failed ── want again ──▶ Loading
//! ```
//!
//! A [`Store`] owns the `ledger`, in which every one of these steps is taken; a [`DatasetStore`] owns the columns of
//! its episodes. `want` is the loaders' side, `read` that of the reader threads, which cut
//! large reads to `pieces`.
//!
//! Locks: the ledger before an episode's lock, never the other way round. The path taken when everything is
//! resident ([`DatasetStore::get`]) takes one episode's read lock and no other.

mod dataset;
mod ledger;
mod pieces;
mod read;
mod want;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Condvar, Mutex};
use robocache_formats::Dataset;

pub use dataset::{Columns, DatasetStore};
pub use want::{Admission, Need, WaitError};

use crate::allocator;
use crate::future::Future;
use ledger::Ledger;

/// The store of one daemon.
#[derive(Debug)]
pub struct Store {
    budget: AtomicU64,
    ledger: Mutex<Ledger>,
    /// Something was read, failed, or the store closes.
    settled: Condvar,
    /// There is something to read, or the store closes.
    work: Condvar,
    closing: AtomicBool,
    /// Held by a read that waits for the memory of others.
    crowded: Mutex<()>,
    counters: Counters,
    next_dataset: AtomicU64,
}

/// What the store did since it was opened.
#[derive(Debug, Default)]
pub struct Counters {
    pub episodes_read: AtomicU64,
    pub bytes_decoded: AtomicU64,
    pub read_ns: AtomicU64,
    pub evictions: AtomicU64,
    pub hits: AtomicU64,
    pub misses: AtomicU64,
}

impl Store {
    /// A store that keeps at most about `budget` bytes.
    pub fn new(budget: u64) -> Arc<Self> {
        Arc::new(Self {
            budget: AtomicU64::new(budget),
            ledger: Mutex::default(),
            settled: Condvar::new(),
            work: Condvar::new(),
            closing: AtomicBool::new(false),
            crowded: Mutex::new(()),
            counters: Counters::default(),
            next_dataset: AtomicU64::new(0),
        })
    }

    /// Changes the budget; what is over it goes at once.
    pub fn set_budget(&self, budget: u64) {
        self.budget.store(budget, Ordering::Relaxed);
        self.make_room(&mut self.ledger.lock(), 0, None);
        allocator::give_back();
    }

    pub fn budget(&self) -> u64 {
        self.budget.load(Ordering::Relaxed)
    }

    /// Bytes resident.
    pub fn used(&self) -> u64 {
        self.ledger.lock().used()
    }

    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Takes a dataset in.
    pub fn add(self: &Arc<Self>, dataset: Arc<Dataset>) -> Arc<DatasetStore> {
        let id = self.next_dataset.fetch_add(1, Ordering::Relaxed);
        Arc::new(DatasetStore::new(id, Arc::clone(self), dataset))
    }

    /// Makes a loader's future known to eviction, as long as it lives.
    pub fn watch(&self, future: &Arc<Future>) {
        self.ledger.lock().watch(future);
    }

    /// Ends the reader threads.
    pub fn close(&self) {
        self.closing.store(true, Ordering::SeqCst);
        // Whoever is between its check and its wait holds the ledger: take it once, and they all see the flag.
        // Jobs hold datasets, and datasets the store: they go with the queues, outside the lock.
        let jobs = self.ledger.lock().take_jobs();
        drop(jobs);
        self.work.notify_all();
        self.settled.notify_all();
    }

    /// Wakes whoever waits, so that it looks whether it should stop.
    pub fn nudge(&self) {
        drop(self.ledger.lock());
        self.settled.notify_all();
    }

    /// [`Ledger::make_room`] within the budget of now.
    fn make_room(&self, ledger: &mut Ledger, incoming: u64, need: Option<Need>) -> Admission {
        ledger.make_room(self.budget(), incoming, need, &self.counters.evictions)
    }
}
