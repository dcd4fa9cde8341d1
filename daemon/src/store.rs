//! The episode store: decoded columns in host memory, within a budget, shared by every loader.
//!
//! A stream of an episode is decoded once, whoever asks first, and stays until memory is needed. What goes first is
//! what every loader's own future needs last ([`Future`]): the visiting order is known, so this is Belady's rule
//! as far as the loaders look ahead, and least recently used beyond. What is needed now is always admitted, with
//! a warning where even that alone is over the budget; what is needed later is admitted only into free memory
//! or over something needed later still.
//!
//! ```text
//!            want                    read                evict
//!   Absent ────────▶ Loading ──┬──▶ Resident ─────────────────▶ Absent
//!                              └──▶ Failed ── want again ──▶ Loading
//! ```
//!
//! Locks: `ledger` before an episode's lock, never the other way round. The path taken when everything is
//! resident ([`DatasetStore::get`]) takes one episode's read lock and no other.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, RwLock};
use robocache_formats::{Dataset, ReadError, Stream};

use crate::allocator;
use crate::future::Future;

/// Units up to this many bytes are read whole, even when one episode is wanted: seeking costs more.
const WHOLE_UNIT_BYTES: u64 = 32 << 20;

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

#[derive(Debug, Default)]
struct Ledger {
    /// Bytes resident, and bytes expected of reads under way.
    used: u64,
    loading_bytes: u64,
    /// Whatever is resident, for eviction to look through.
    resident: HashMap<(u64, u32), Resident>,
    loading: HashSet<(u64, u32, usize)>,
    failed: HashMap<(u64, u32, usize), Arc<ReadError>>,
    urgent: VecDeque<Job>,
    ahead: VecDeque<Job>,
    futures: Vec<Weak<Future>>,
    tick: u64,
    warned_over_budget: bool,
}

#[derive(Debug)]
struct Resident {
    /// Not the dataset: dropping the last handle on that takes the ledger's lock, which evicting holds.
    slots: Arc<Slots>,
    bytes: u64,
    touched: u64,
}

/// What is resident, by episode.
type Slots = [RwLock<Option<Arc<Columns>>>];

#[derive(Debug)]
struct Job {
    dataset: Arc<DatasetStore>,
    episodes: Vec<u32>,
    streams: Vec<usize>,
    expected: u64,
}

/// How soon an episode is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// A batch waits for it.
    Now,
    /// In about this many batches.
    In(u64),
}

/// Whether the store took a wish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// It is resident or being read.
    Taken,
    /// There is no room for what is not needed now.
    Full,
}

/// One dataset's part of the store.
#[derive(Debug)]
pub struct DatasetStore {
    id: u64,
    store: Arc<Store>,
    dataset: Arc<Dataset>,
    episodes: Arc<Slots>,
    units: Vec<Vec<usize>>,
    unit_of: Vec<u32>,
    /// What was read so far of each stream: the sizes to expect where the metadata tells none.
    seen: Vec<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    bytes: AtomicU64,
    episodes: AtomicU64,
}

impl Seen {
    /// Bytes of an average episode, once there is one.
    fn mean_bytes(&self) -> Option<u64> {
        self.bytes.load(Ordering::Relaxed).checked_div(self.episodes.load(Ordering::Relaxed))
    }
}

/// Streams of one episode that are resident, by position in `Dataset::streams`.
#[derive(Debug, Clone)]
pub struct Columns {
    streams: Vec<Option<Stream>>,
}

impl Columns {
    /// A stream that was asked for.
    pub fn stream(&self, position: usize) -> &Stream {
        self.streams[position].as_ref().expect("columns are handed out once their streams are resident")
    }

    fn has(&self, streams: &[usize]) -> bool {
        streams.iter().all(|&stream| self.streams[stream].is_some())
    }

    fn bytes(&self) -> u64 {
        self.streams.iter().flatten().map(|s| (s.values.buffer.len() + s.clock.size_bytes()) as u64).sum()
    }
}

/// Why a wait for an episode ended without it.
#[derive(Debug, Clone)]
pub enum WaitError {
    Read(Arc<ReadError>),
    /// The waiter was told to stop.
    Stopped,
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
            counters: Counters::default(),
            next_dataset: AtomicU64::new(0),
        })
    }

    /// Changes the budget; what is over it goes at once.
    pub fn set_budget(&self, budget: u64) {
        self.budget.store(budget, Ordering::Relaxed);
        self.make_room(&mut self.ledger.lock(), 0, u64::MAX);
        allocator::give_back();
    }

    pub fn budget(&self) -> u64 {
        self.budget.load(Ordering::Relaxed)
    }

    /// Bytes resident.
    pub fn used(&self) -> u64 {
        self.ledger.lock().used
    }

    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Takes a dataset in.
    pub fn add(self: &Arc<Self>, dataset: Arc<Dataset>) -> Arc<DatasetStore> {
        let units = dataset.units();
        let count = dataset.episodes().len();
        let mut unit_of = vec![0; count];
        for (unit, episodes) in units.iter().enumerate() {
            for &episode in episodes {
                unit_of[episode] = u32::try_from(unit).expect("units are fewer than episodes");
            }
        }
        let seen = (0..dataset.streams().len()).map(|_| Seen::default()).collect();
        Arc::new(DatasetStore {
            id: self.next_dataset.fetch_add(1, Ordering::Relaxed),
            store: Arc::clone(self),
            dataset,
            episodes: (0..count).map(|_| RwLock::new(None)).collect(),
            units,
            unit_of,
            seen,
        })
    }

    /// Makes a loader's future known to eviction, as long as it lives.
    pub fn watch(&self, future: &Arc<Future>) {
        let mut ledger = self.ledger.lock();
        ledger.futures.retain(|known| known.strong_count() > 0);
        ledger.futures.push(Arc::downgrade(future));
    }

    /// Ends the reader threads.
    pub fn close(&self) {
        self.closing.store(true, Ordering::SeqCst);
        // Whoever is between its check and its wait holds the ledger: take it once, and they all see the flag.
        // Jobs hold datasets, and datasets the store: they go with the queues, outside the lock.
        let mut ledger = self.ledger.lock();
        let jobs = (std::mem::take(&mut ledger.urgent), std::mem::take(&mut ledger.ahead));
        drop(ledger);
        drop(jobs);
        self.work.notify_all();
        self.settled.notify_all();
    }

    /// Wakes whoever waits, so that it looks whether it should stop.
    pub fn nudge(&self) {
        drop(self.ledger.lock());
        self.settled.notify_all();
    }

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
            if let Some(job) = ledger.urgent.pop_front() {
                return Some(job);
            }
            if let Some(job) = ledger.ahead.pop_front() {
                return Some(job);
            }
            self.work.wait(&mut ledger);
        }
    }

    fn run(&self, job: &Job) {
        let started = Instant::now();
        let episodes: Vec<usize> = job.episodes.iter().map(|&e| e as usize).collect();
        let dataset = &job.dataset.dataset;
        // `formats` contains panics of the decoders; one of our own must not leave the episodes loading for ever.
        let read = std::panic::catch_unwind(AssertUnwindSafe(|| dataset.read(&episodes, &job.streams)));
        let elapsed = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.counters.read_ns.fetch_add(elapsed, Ordering::Relaxed);
        let mut ledger = self.ledger.lock();
        ledger.loading_bytes = ledger.loading_bytes.saturating_sub(job.expected);
        let keys =
            || job.episodes.iter().flat_map(|&e| job.streams.iter().map(move |&s| (job.dataset.id, e, s)));
        for key in keys() {
            ledger.loading.remove(&key);
        }
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
            Ok(Err(error)) => {
                let error = Arc::new(error);
                for key in keys() {
                    ledger.failed.insert(key, Arc::clone(&error));
                }
            }
            Err(_panic) => {
                tracing::error!(dataset = ?dataset.root(), ?episodes, "reading panicked; this is a bug");
                let path = dataset.root().to_owned();
                let error =
                    Arc::new(ReadError::Panicked { path, what: "a bug outside the decoder".to_owned() });
                for key in keys() {
                    ledger.failed.insert(key, Arc::clone(&error));
                }
            }
        }
        drop(ledger);
        self.settled.notify_all();
    }

    fn insert(&self, ledger: &mut Ledger, job: &Job, episode: u32, streams: Vec<Stream>) {
        let dataset = &job.dataset;
        let tight = ledger.used + ledger.loading_bytes > self.budget() / 2;
        let mut slot = dataset.episodes[episode as usize].write();
        let mut columns = match slot.as_deref() {
            Some(columns) => columns.clone(),
            None => Columns { streams: vec![None; dataset.dataset.streams().len()] },
        };
        let before = columns.bytes();
        for (&position, mut stream) in job.streams.iter().zip(streams) {
            if tight && stream.values.buffer.capacity() > stream.values.buffer.len() {
                // A slice keeps the whole file's column alive, and evicting its neighbours would free nothing.
                stream.values.buffer = stream.values.buffer.as_slice().into();
            }
            self.counters.bytes_decoded.fetch_add(stream.values.buffer.len() as u64, Ordering::Relaxed);
            let seen = &dataset.seen[position];
            let size = stream.values.buffer.len() + stream.clock.size_bytes();
            seen.bytes.fetch_add(size as u64, Ordering::Relaxed);
            seen.episodes.fetch_add(1, Ordering::Relaxed);
            columns.streams[position] = Some(stream);
        }
        let bytes = columns.bytes();
        *slot = Some(Arc::new(columns));
        drop(slot);
        ledger.used = ledger.used - before + bytes;
        ledger.tick += 1;
        let touched = ledger.tick;
        let resident = Resident { slots: Arc::clone(&dataset.episodes), bytes, touched };
        ledger.resident.insert((dataset.id, episode), resident);
    }

    fn enqueue(
        &self,
        ledger: &mut Ledger,
        dataset: &Arc<DatasetStore>,
        episodes: Vec<u32>,
        streams: &[usize],
        need: Need,
    ) {
        let expected = episodes.iter().map(|&e| dataset.expected_bytes(e, streams)).sum();
        for &episode in &episodes {
            for &stream in streams {
                ledger.failed.remove(&(dataset.id, episode, stream));
                ledger.loading.insert((dataset.id, episode, stream));
            }
        }
        ledger.loading_bytes += expected;
        let job = Job { dataset: Arc::clone(dataset), episodes, streams: streams.to_vec(), expected };
        match need {
            Need::Now => ledger.urgent.push_back(job),
            Need::In(_) => ledger.ahead.push_back(job),
        }
        self.work.notify_one();
    }

    /// Evicts until `incoming` bytes fit, taking only what is needed later than in `sooner_than` batches.
    fn make_room(&self, ledger: &mut Ledger, incoming: u64, sooner_than: u64) -> Admission {
        let budget = self.budget();
        let over = |ledger: &Ledger| ledger.used + ledger.loading_bytes + incoming > budget;
        if !over(ledger) {
            return Admission::Taken;
        }
        let futures: Vec<Arc<Future>> = ledger.futures.iter().filter_map(Weak::upgrade).collect();
        let futures: Vec<_> = futures.iter().map(|future| future.look()).collect();
        let mut candidates: Vec<(u64, u64, (u64, u32))> = ledger
            .resident
            .iter()
            .map(|(&key, resident)| {
                let next = futures.iter().filter_map(|future| future.distance(key.0, key.1)).min();
                (next.unwrap_or(u64::MAX), u64::MAX - resident.touched, key)
            })
            .filter(|(next, ..)| *next > sooner_than || sooner_than == u64::MAX)
            .collect();
        drop(futures);
        // Needed last first; among those never needed, least recently touched first. A little more than is wanted
        // goes, so that not every read has to look through all that is resident.
        candidates.sort_unstable_by(|a, b| b.cmp(a));
        let spare = budget / 64;
        for (_, _, key) in candidates {
            if ledger.used + ledger.loading_bytes + incoming + spare <= budget {
                break;
            }
            self.evict(ledger, key);
        }
        if over(ledger) { Admission::Full } else { Admission::Taken }
    }

    fn evict(&self, ledger: &mut Ledger, key: (u64, u32)) {
        let Some(resident) = ledger.resident.remove(&key) else { return };
        ledger.used -= resident.bytes;
        *resident.slots[key.1 as usize].write() = None;
        self.counters.evictions.fetch_add(1, Ordering::Relaxed);
    }
}

impl DatasetStore {
    pub fn id(&self) -> u64 {
        self.id
    }

    pub fn dataset(&self) -> &Arc<Dataset> {
        &self.dataset
    }

    /// Columns of an episode, if all these streams are resident.
    pub fn get(&self, episode: u32, streams: &[usize]) -> Option<Arc<Columns>> {
        let slot = self.episodes[episode as usize].read();
        slot.as_ref().filter(|columns| columns.has(streams)).map(Arc::clone)
    }

    /// Bytes these streams of all episodes that are not resident are expected to take, where the metadata tells.
    pub fn expected_missing(&self, streams: &[usize]) -> u64 {
        (0..self.episodes.len())
            .map(|e| u32::try_from(e).unwrap_or(u32::MAX))
            .filter(|&episode| self.get(episode, streams).is_none())
            .map(|episode| self.expected_bytes(episode, streams))
            .sum()
    }

    /// Bytes resident of this dataset, and episodes.
    pub fn resident(&self) -> (u64, usize) {
        let ledger = self.store.ledger.lock();
        let mine = ledger.resident.iter().filter(|((id, _), _)| *id == self.id);
        mine.fold((0, 0), |(bytes, count), (_, resident)| (bytes + resident.bytes, count + 1))
    }

    /// What these streams of an episode will take: from the metadata, else as episodes before it.
    fn expected_bytes(&self, episode: u32, streams: &[usize]) -> u64 {
        match self.dataset.episodes()[episode as usize].frames {
            Some(frames) => {
                let schemas = streams.iter().map(|&stream| &self.dataset.streams()[stream]);
                let row: usize = schemas.map(|schema| schema.dim() * schema.dtype.size_bytes()).sum();
                frames as u64 * row as u64
            }
            None => streams.iter().filter_map(|&stream| self.seen[stream].mean_bytes()).sum(),
        }
    }

    /// Whether sizes can be foretold at all: before the first read of a stream table they cannot.
    fn sizes_are_known(&self, episode: u32, streams: &[usize]) -> bool {
        self.dataset.episodes()[episode as usize].frames.is_some()
            || streams.iter().all(|&stream| self.seen[stream].mean_bytes().is_some())
    }

    /// Asks for episodes. Those of one unit are read together; the whole unit, where that is cheap and fits.
    pub fn want(self: &Arc<Self>, episodes: &[u32], streams: &[usize], need: Need) -> Admission {
        if episodes.iter().all(|&episode| self.get(episode, streams).is_some()) {
            return Admission::Taken;
        }
        let mut ledger = self.store.ledger.lock();
        let mut by_unit: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for &episode in episodes {
            if self.absent(&ledger, episode, streams) {
                by_unit.entry(self.unit_of[episode as usize]).or_default().push(episode);
            }
        }
        for (unit, wanted) in by_unit {
            if self.want_of_unit(&mut ledger, unit, wanted, streams, need) == Admission::Full {
                return Admission::Full;
            }
        }
        Admission::Taken
    }

    fn absent(&self, ledger: &Ledger, episode: u32, streams: &[usize]) -> bool {
        self.get(episode, streams).is_none()
            && !streams.iter().all(|&stream| ledger.loading.contains(&(self.id, episode, stream)))
    }

    fn want_of_unit(
        self: &Arc<Self>,
        ledger: &mut Ledger,
        unit: u32,
        wanted: Vec<u32>,
        streams: &[usize],
        need: Need,
    ) -> Admission {
        let store = &self.store;
        if matches!(need, Need::In(_))
            && !wanted.iter().all(|&episode| self.sizes_are_known(episode, streams))
        {
            return Admission::Full;
        }
        let number = |&e: &usize| u32::try_from(e).expect("episodes are numbered in u32");
        let unit = self.units[unit as usize].iter().map(number);
        let whole: Vec<u32> = unit.filter(|&episode| self.absent(ledger, episode, streams)).collect();
        let bytes = |episodes: &[u32]| episodes.iter().map(|&e| self.expected_bytes(e, streams)).sum::<u64>();
        let free = store.budget().saturating_sub(ledger.used + ledger.loading_bytes);
        let cheap = bytes(&whole) <= WHOLE_UNIT_BYTES || matches!(need, Need::In(_));
        let episodes = if bytes(&whole) <= free && cheap { whole } else { wanted };
        let incoming = bytes(&episodes);
        let sooner_than = match need {
            Need::Now => 0,
            Need::In(batches) => batches,
        };
        match (store.make_room(ledger, incoming, sooner_than), need) {
            (Admission::Full, Need::In(_)) => return Admission::Full,
            (Admission::Full, Need::Now) if !ledger.warned_over_budget => {
                ledger.warned_over_budget = true;
                tracing::warn!(
                    budget = store.budget(),
                    used = ledger.used,
                    incoming,
                    "the memory budget does not hold what the next batches need at once; going over it for them"
                );
            }
            _ => {}
        }
        store.enqueue(ledger, self, episodes, streams, need);
        Admission::Taken
    }

    /// Waits for an episode that was wanted; wants it again if it went meanwhile. `stop` is asked now and then.
    pub fn wait(
        self: &Arc<Self>,
        episode: u32,
        streams: &[usize],
        stop: &dyn Fn() -> bool,
    ) -> Result<Arc<Columns>, WaitError> {
        if let Some(columns) = self.get(episode, streams) {
            self.store.counters.hits.fetch_add(1, Ordering::Relaxed);
            return Ok(columns);
        }
        self.store.counters.misses.fetch_add(1, Ordering::Relaxed);
        loop {
            self.want(&[episode], streams, Need::Now); // what is needed now is always taken
            let mut ledger = self.store.ledger.lock();
            loop {
                if stop() || self.store.closing.load(Ordering::SeqCst) {
                    return Err(WaitError::Stopped);
                }
                let failed =
                    streams.iter().find_map(|&stream| ledger.failed.remove(&(self.id, episode, stream)));
                if let Some(error) = failed {
                    return Err(WaitError::Read(error));
                }
                if let Some(columns) = self.get(episode, streams) {
                    return Ok(columns);
                }
                if !streams.iter().any(|&stream| ledger.loading.contains(&(self.id, episode, stream))) {
                    break; // evicted before we looked
                }
                self.store.promote(&mut ledger, self.id, episode);
                self.store.settled.wait_for(&mut ledger, Duration::from_millis(100));
            }
        }
    }
}

impl Store {
    /// Moves a read that was for later to the front: somebody waits for it now.
    fn promote(&self, ledger: &mut Ledger, dataset: u64, episode: u32) {
        let found =
            ledger.ahead.iter().position(|job| job.dataset.id == dataset && job.episodes.contains(&episode));
        if let Some(job) = found.and_then(|position| ledger.ahead.remove(position)) {
            ledger.urgent.push_back(job);
            self.work.notify_one();
        }
    }
}

impl Drop for DatasetStore {
    fn drop(&mut self) {
        let mut ledger = self.store.ledger.lock();
        let id = self.id;
        let gone: u64 =
            ledger.resident.extract_if(|key, _| key.0 == id).map(|(_, resident)| resident.bytes).sum();
        ledger.used -= gone;
        ledger.failed.retain(|key, _| key.0 != id);
        drop(ledger);
        self.episodes.iter().for_each(|slot| *slot.write() = None);
        allocator::give_back();
    }
}
