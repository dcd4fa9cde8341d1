//! What `status` shows of a loader: counters that its threads add to and anyone may read.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Counters of one loader since it was opened.
#[derive(Debug)]
pub struct LoaderMetrics {
    opened: Instant,
    batches: AtomicU64,
    samples: AtomicU64,
    assemble_ns: AtomicU64,
    wait_slot_ns: AtomicU64,
    wait_data_ns: AtomicU64,
}

/// The counters at one moment; times in seconds.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct LoaderCounts {
    pub batches: u64,
    pub samples: u64,
    /// Time assemblers spent filling slots.
    pub assemble_s: f64,
    /// Time the ring was full: the trainer was the slower one.
    pub ring_full_s: f64,
    /// Time episodes were not in memory: files were.
    pub data_wait_s: f64,
}

impl LoaderMetrics {
    pub fn new() -> Self {
        let zero = AtomicU64::default;
        let (batches, samples, assemble_ns, wait_slot_ns, wait_data_ns) =
            (zero(), zero(), zero(), zero(), zero());
        Self { opened: Instant::now(), batches, samples, assemble_ns, wait_slot_ns, wait_data_ns }
    }

    /// Since the loader was opened.
    pub fn age(&self) -> Duration {
        self.opened.elapsed()
    }

    pub fn published(&self, samples: u64, assembling: Duration) {
        self.batches.fetch_add(1, Ordering::Relaxed);
        self.samples.fetch_add(samples, Ordering::Relaxed);
        add(&self.assemble_ns, assembling);
    }

    pub fn waited_for_slot(&self, time: Duration) {
        add(&self.wait_slot_ns, time);
    }

    pub fn waited_for_data(&self, time: Duration) {
        add(&self.wait_data_ns, time);
    }

    pub fn counts(&self) -> LoaderCounts {
        #[expect(clippy::cast_precision_loss, reason = "for people")]
        let seconds = |counter: &AtomicU64| counter.load(Ordering::Relaxed) as f64 / 1e9;
        LoaderCounts {
            batches: self.batches.load(Ordering::Relaxed),
            samples: self.samples.load(Ordering::Relaxed),
            assemble_s: seconds(&self.assemble_ns),
            ring_full_s: seconds(&self.wait_slot_ns),
            data_wait_s: seconds(&self.wait_data_ns),
        }
    }
}

impl Default for LoaderMetrics {
    fn default() -> Self {
        Self::new()
    }
}

fn add(counter: &AtomicU64, time: Duration) {
    counter.fetch_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
}
