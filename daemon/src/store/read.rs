//! The reader threads' side of the store: a read is queued, done, and entered in the ledger.
//!
//! A large one is cut to pieces first (`pieces`). Decoding happens with no lock held. Whatever comes of it, whoever waits
//! is woken; a read that failed for several episodes is repeated for each alone, so that a broken one does not take its
//! neighbours with it.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use robocache_formats::{ReadError, Stream, wait_for_room};

use super::Store;
use super::dataset::DatasetStore;
use super::ledger::{Job, Ledger};
use super::want::Need;

/// How soon a read that waits for memory notices that the store closes.
const CROWDED: Duration = Duration::from_millis(100);

/// What a read had come to when it failed for the memory that other reads took.
fn crowded<T, P>(read: &Result<Result<T, ReadError>, P>) -> Option<u64> {
    match read {
        Ok(Err(ReadError::NoRoom { bytes, others: 1.., .. })) => Some(*bytes),
        _ => None,
    }
}

impl Store {
    /// What one reader thread does until the store closes.
    pub fn read_until_closed(&self) {
        while let Some(job) = self.next_job() {
            self.run(&job);
        }
    }

    fn next_job(&self) -> Option<Job> {
        let mut ledger = self.ledger.lock();
        loop {
            if self.closing.load(Ordering::SeqCst) {
                return None;
            }
            if let Some(job) = ledger.next_job() {
                return Some(job);
            }
            self.work.wait(&mut ledger);
        }
    }

    pub(super) fn run(&self, job: &Job) {
        // A panic here comes again when all of it is read, below, and is told then.
        if let Ok(Some(pieces)) = std::panic::catch_unwind(AssertUnwindSafe(|| job.pieces())) {
            tracing::debug!(
                episodes = job.episodes.len(),
                pieces = pieces.len(),
                "a large read is cut to pieces"
            );
            let mut ledger = self.ledger.lock();
            if !self.closing.load(Ordering::SeqCst) {
                ledger.divide(job, pieces);
            }
            drop(ledger);
            self.work.notify_all();
            // Whoever waits looks for what it needs among them.
            self.settled.notify_all();
            return;
        }
        let started = Instant::now();
        let episodes: Vec<usize> = job.episodes.iter().map(|&e| e as usize).collect();
        let dataset = job.dataset.dataset();
        // `formats` contains panics of the decoders; one of our own must not leave the episodes loading for ever.
        let attempt = || std::panic::catch_unwind(AssertUnwindSafe(|| dataset.read(&episodes, &job.streams)));
        let mut read = attempt();
        if crowded(&read).is_some() {
            // Those that found no room beside others take turns, so that each has it in the end.
            let _turn = self.crowded.lock();
            while let Some(bytes) = crowded(&read)
                && !self.closing.load(Ordering::SeqCst)
            {
                if wait_for_room(bytes, CROWDED) {
                    read = attempt();
                }
            }
        }
        let elapsed = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.counters.read_ns.fetch_add(elapsed, Ordering::Relaxed);
        let mut ledger = self.ledger.lock();
        ledger.ended(job);
        match read {
            Ok(Ok(read)) => {
                self.counters.episodes_read.fetch_add(job.episodes.len() as u64, Ordering::Relaxed);
                for (&episode, streams) in job.episodes.iter().zip(read) {
                    self.insert(&mut ledger, job, episode, streams);
                }
            }
            Ok(Err(error)) if job.episodes.len() > 1 => {
                // One broken episode must not take its neighbours with it: ask for each on its own.
                tracing::debug!(%error, episodes = job.episodes.len(), "read of a unit failed; reading its episodes one by one");
                for &episode in &job.episodes {
                    self.enqueue(&mut ledger, &job.dataset, vec![episode], &job.streams, Need::Now);
                }
            }
            Ok(Err(error)) => ledger.failed(job, &Arc::new(error)),
            Err(_panic) => {
                tracing::error!(dataset = ?dataset.root(), ?episodes, "reading panicked; this is a bug");
                let path = dataset.root().to_owned();
                let what = "a bug outside the decoder".to_owned();
                ledger.failed(job, &Arc::new(ReadError::Panicked { path, what }));
            }
        }
        drop(ledger);
        self.settled.notify_all();
    }

    fn insert(&self, ledger: &mut Ledger, job: &Job, episode: u32, streams: Vec<Stream>) {
        let tight = ledger.spoken_for() > self.budget() / 2;
        let (before, bytes) = job.dataset.put(episode, &job.streams, streams, tight);
        ledger.keep((job.dataset.id(), episode), job.dataset.slots(), before, bytes);
    }

    /// Queues a read and wakes a reader for it.
    pub(super) fn enqueue(
        &self,
        ledger: &mut Ledger,
        dataset: &Arc<DatasetStore>,
        episodes: Vec<u32>,
        streams: &[usize],
        need: Need,
    ) {
        ledger.enqueue(Job::new(dataset, episodes, streams, need == Need::Now));
        self.work.notify_one();
    }

    /// Moves a read that was for later to the front: somebody waits for it now.
    pub(super) fn promote(&self, ledger: &mut Ledger, dataset: u64, episode: u32) {
        for _ in 0..ledger.promote(dataset, episode) {
            self.work.notify_one();
        }
    }
}
