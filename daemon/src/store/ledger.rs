//! The ledger: what is resident, what is being read or waits for a reader, and what goes when memory is needed.
//!
//! All of it lies behind the one lock of a [`Store`](super::Store); nothing here waits, reads or logs, and what it
//! locks besides (an episode to empty it, a future to look) it lets go of at once. What must stay true whenever the
//! lock is free:
//!
//! - `used` is the sum of what is resident, and `loading_bytes` of what reads, queued or under way, are expected to take;
//! - a stream in `loading` is to come with such a read (with two, where wishes for several episodes overlap: the first
//!   to end strikes it out), and one in `failed` stays there until somebody takes the error or asks for it again;
//! - a job goes out before it is dropped: dropping the last handle on a dataset takes the lock.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use robocache_formats::ReadError;

use super::dataset::{DatasetStore, Slots};
use super::want::{Admission, Need};
use crate::future::Future;

/// An episode: its dataset's number and its own.
type EpisodeKey = (u64, u32);
/// A stream of an episode, by position.
type StreamKey = (u64, u32, usize);

#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// Bytes resident, and bytes expected of reads under way.
    used: u64,
    loading_bytes: u64,
    /// Whatever is resident, for eviction to look through.
    resident: HashMap<EpisodeKey, Resident>,
    loading: HashSet<StreamKey>,
    failed: HashMap<StreamKey, Arc<ReadError>>,
    urgent: VecDeque<Job>,
    ahead: VecDeque<Job>,
    futures: Vec<Weak<Future>>,
    tick: u64,
    pub(super) warned_over_budget: bool,
}

#[derive(Debug)]
struct Resident {
    /// Not the dataset: dropping the last handle on that takes the ledger's lock, which evicting holds.
    slots: Arc<Slots>,
    bytes: u64,
    /// When it was last read into, in ticks. Being used does not count: that path never comes here.
    since: u64,
}

/// A read: some streams of some episodes of one unit.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) dataset: Arc<DatasetStore>,
    pub(super) episodes: Vec<u32>,
    pub(super) streams: Vec<usize>,
    /// Bytes, as far as can be foretold.
    pub(super) expected: u64,
    /// Whether a batch waits for it.
    pub(super) urgent: bool,
}

impl Job {
    pub(super) fn new(
        dataset: &Arc<DatasetStore>,
        episodes: Vec<u32>,
        streams: &[usize],
        urgent: bool,
    ) -> Self {
        let expected = episodes.iter().map(|&e| dataset.expected_bytes(e, streams)).sum();
        Self { dataset: Arc::clone(dataset), episodes, streams: streams.to_vec(), expected, urgent }
    }

    fn keys(&self) -> impl Iterator<Item = StreamKey> {
        let dataset = self.dataset.id();
        self.episodes.iter().flat_map(move |&e| self.streams.iter().map(move |&s| (dataset, e, s)))
    }
}

impl Ledger {
    /// Bytes resident.
    pub(super) fn used(&self) -> u64 {
        self.used
    }

    /// Bytes resident, and those that reads queued and under way are expected to add.
    pub(super) fn spoken_for(&self) -> u64 {
        self.used + self.loading_bytes
    }

    /// Bytes resident of a dataset, and episodes.
    pub(super) fn resident_of(&self, dataset: u64) -> (u64, usize) {
        let its = self.resident.iter().filter(|((id, _), _)| *id == dataset);
        its.fold((0, 0), |(bytes, count), (_, resident)| (bytes + resident.bytes, count + 1))
    }

    pub(super) fn is_loading(&self, dataset: u64, episode: u32, stream: usize) -> bool {
        self.loading.contains(&(dataset, episode, stream))
    }

    /// Makes a loader's future known to eviction, as long as it lives.
    pub(super) fn watch(&mut self, future: &Arc<Future>) {
        self.futures.retain(|known| known.strong_count() > 0);
        self.futures.push(Arc::downgrade(future));
    }

    /// Queues a read.
    pub(super) fn enqueue(&mut self, job: Job) {
        for key in job.keys() {
            self.failed.remove(&key);
            self.loading.insert(key);
        }
        self.loading_bytes += job.expected;
        if job.urgent {
            self.urgent.push_back(job);
        } else {
            self.ahead.push_back(job);
        }
    }

    /// Puts the pieces of a read that a reader took in its place: all of it, to be read next.
    pub(super) fn divide(&mut self, job: &Job, pieces: Vec<Job>) {
        debug_assert_eq!(job.keys().collect::<HashSet<_>>(), pieces.iter().flat_map(Job::keys).collect());
        let expected: u64 = pieces.iter().map(|piece| piece.expected).sum();
        self.loading_bytes = self.loading_bytes.saturating_sub(job.expected) + expected;
        let queue = if job.urgent { &mut self.urgent } else { &mut self.ahead };
        pieces.into_iter().rev().for_each(|piece| queue.push_front(piece));
    }

    /// Moves reads of an episode that were for later to those that are urgent. How many there were.
    pub(super) fn promote(&mut self, dataset: u64, episode: u32) -> usize {
        let wanted = |job: &Job| job.dataset.id() == dataset && job.episodes.contains(&episode);
        if !self.ahead.iter().any(wanted) {
            return 0;
        }
        let (promoted, ahead): (VecDeque<_>, _) =
            std::mem::take(&mut self.ahead).into_iter().partition(wanted);
        self.ahead = ahead;
        let count = promoted.len();
        self.urgent.extend(promoted.into_iter().map(|job| Job { urgent: true, ..job }));
        count
    }

    /// What to read next.
    pub(super) fn next_job(&mut self) -> Option<Job> {
        self.urgent.pop_front().or_else(|| self.ahead.pop_front())
    }

    /// Takes out what nobody will read any more, for the caller to drop without the lock. It stays in `loading`: only
    /// when the store closes, and nobody waits for it then.
    pub(super) fn take_jobs(&mut self) -> [VecDeque<Job>; 2] {
        [std::mem::take(&mut self.urgent), std::mem::take(&mut self.ahead)]
    }

    /// A read is over, one way or the other.
    pub(super) fn ended(&mut self, job: &Job) {
        self.loading_bytes = self.loading_bytes.saturating_sub(job.expected);
        for key in job.keys() {
            self.loading.remove(&key);
        }
    }

    /// A read brought nothing but an error, for whoever waits.
    pub(super) fn failed(&mut self, job: &Job, error: &Arc<ReadError>) {
        for key in job.keys() {
            self.failed.insert(key, Arc::clone(error));
        }
    }

    /// The error that reading one of these streams ended with. It is told once.
    pub(super) fn take_failure(
        &mut self,
        dataset: u64,
        episode: u32,
        streams: &[usize],
    ) -> Option<Arc<ReadError>> {
        streams.iter().find_map(|&stream| self.failed.remove(&(dataset, episode, stream)))
    }

    /// An episode, which had `before` bytes resident, now has `bytes` in its slot.
    pub(super) fn keep(&mut self, key: EpisodeKey, slots: &Arc<Slots>, before: u64, bytes: u64) {
        self.used = self.used - before + bytes;
        self.tick += 1;
        let since = self.tick;
        self.resident.insert(key, Resident { slots: Arc::clone(slots), bytes, since });
    }

    /// Evicts until `incoming` bytes fit into `budget`, taking only what is needed later than `need`; without that,
    /// whatever there is. For a wish for later nothing goes unless that makes room enough.
    pub(super) fn make_room(
        &mut self,
        budget: u64,
        incoming: u64,
        need: Option<Need>,
        evictions: &AtomicU64,
    ) -> Admission {
        let over = |ledger: &Self| ledger.spoken_for() + incoming > budget;
        if !over(self) {
            return Admission::Taken;
        }
        let futures: Vec<Arc<Future>> = self.futures.iter().filter_map(Weak::upgrade).collect();
        let futures: Vec<_> = futures.iter().map(|future| future.look()).collect();
        let may_go = |next: u64| match need {
            None => true,
            Some(Need::Now) => next > 0,
            Some(Need::In(batches)) => next > batches,
        };
        let (mut candidates, mut could_go) = (Vec::new(), 0);
        for (&key, resident) in &self.resident {
            let next = futures.iter().filter_map(|future| future.distance(key.0, key.1)).min();
            let next = next.unwrap_or(u64::MAX);
            if may_go(next) {
                candidates.push((next, u64::MAX - resident.since, key));
                could_go += resident.bytes;
            }
        }
        drop(futures);
        if matches!(need, Some(Need::In(_))) && self.spoken_for() - could_go + incoming > budget {
            return Admission::Full;
        }
        // Needed last first; among those never needed, the longest here first. A little more than is wanted
        // goes, so that not every read has to look through all that is resident.
        candidates.sort_unstable_by(|a, b| b.cmp(a));
        let spare = budget / 64;
        for (_, _, key) in candidates {
            if self.spoken_for() + incoming + spare <= budget {
                break;
            }
            self.evict(key);
            evictions.fetch_add(1, Ordering::Relaxed);
        }
        if over(self) { Admission::Full } else { Admission::Taken }
    }

    fn evict(&mut self, key: EpisodeKey) {
        let Some(resident) = self.resident.remove(&key) else { return };
        self.used -= resident.bytes;
        *resident.slots[key.1 as usize].write() = None;
    }

    /// Strikes out a dataset that is gone.
    pub(super) fn forget(&mut self, dataset: u64) {
        let gone: u64 =
            self.resident.extract_if(|key, _| key.0 == dataset).map(|(_, resident)| resident.bytes).sum();
        self.used -= gone;
        self.failed.retain(|key, _| key.0 != dataset);
    }
}
