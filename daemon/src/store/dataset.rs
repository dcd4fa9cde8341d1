//! One dataset's part of the store: the columns of its episodes, and how large those still to be read will be.
//!
//! What an episode has resident lies behind a lock of its own, so that loaders read without meeting. Only who holds
//! the ledger writes there; so what the ledger counts as resident is what is here. Columns once handed out stay as
//! they are: a read makes new ones, an eviction lets go of the store's share.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::RwLock;
use robocache_formats::{Dataset, Stream};

use super::Store;
use crate::allocator;

/// One dataset's part of the store.
#[derive(Debug)]
pub struct DatasetStore {
    id: u64,
    pub(super) store: Arc<Store>,
    dataset: Arc<Dataset>,
    episodes: Arc<Slots>,
    /// Episodes that are read together.
    pub(super) units: Vec<Vec<usize>>,
    pub(super) unit_of: Vec<u32>,
    /// What was read so far of each stream: the sizes to expect where the metadata tells none.
    seen: Vec<Seen>,
}

/// What is resident, by episode.
pub(super) type Slots = [RwLock<Option<Arc<Columns>>>];

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

impl DatasetStore {
    pub(super) fn new(id: u64, store: Arc<Store>, dataset: Arc<Dataset>) -> Self {
        let units = dataset.units();
        let count = dataset.episodes().len();
        let mut unit_of = vec![0; count];
        for (unit, episodes) in units.iter().enumerate() {
            for &episode in episodes {
                unit_of[episode] = u32::try_from(unit).expect("units are fewer than episodes");
            }
        }
        let seen = (0..dataset.streams().len()).map(|_| Seen::default()).collect();
        let episodes = (0..count).map(|_| RwLock::new(None)).collect();
        Self { id, store, dataset, episodes, units, unit_of, seen }
    }

    pub fn id(&self) -> u64 {
        self.id
    }

    pub fn dataset(&self) -> &Arc<Dataset> {
        &self.dataset
    }

    pub(super) fn slots(&self) -> &Arc<Slots> {
        &self.episodes
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
        self.store.ledger.lock().resident_of(self.id)
    }

    /// What these streams of an episode will take: from the metadata, else as episodes before it.
    pub(super) fn expected_bytes(&self, episode: u32, streams: &[usize]) -> u64 {
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
    pub(super) fn sizes_are_known(&self, episode: u32, streams: &[usize]) -> bool {
        self.dataset.episodes()[episode as usize].frames.is_some()
            || streams.iter().all(|&stream| self.seen[stream].mean_bytes().is_some())
    }

    /// Adds streams that were read to what is resident of an episode: its bytes before and after. The caller holds the
    /// ledger, and enters them there. `tight`: memory is short enough to copy rather than keep what is not needed.
    pub(super) fn put(
        &self,
        episode: u32,
        positions: &[usize],
        streams: Vec<Stream>,
        tight: bool,
    ) -> (u64, u64) {
        let mut slot = self.episodes[episode as usize].write();
        let mut columns = match slot.as_deref() {
            Some(columns) => columns.clone(),
            None => Columns { streams: vec![None; self.dataset.streams().len()] },
        };
        let before = columns.bytes();
        for (&position, mut stream) in positions.iter().zip(streams) {
            if tight && stream.values.buffer.capacity() > stream.values.buffer.len() {
                // A slice keeps the whole file's column alive, and evicting its neighbours would free nothing.
                stream.values.buffer = stream.values.buffer.as_slice().into();
            }
            let decoded = stream.values.buffer.len() as u64;
            self.store.counters.bytes_decoded.fetch_add(decoded, Ordering::Relaxed);
            let seen = &self.seen[position];
            let size = stream.values.buffer.len() + stream.clock.size_bytes();
            seen.bytes.fetch_add(size as u64, Ordering::Relaxed);
            seen.episodes.fetch_add(1, Ordering::Relaxed);
            columns.streams[position] = Some(stream);
        }
        let bytes = columns.bytes();
        *slot = Some(Arc::new(columns));
        (before, bytes)
    }
}

impl Drop for DatasetStore {
    fn drop(&mut self) {
        self.store.ledger.lock().forget(self.id);
        self.episodes.iter().for_each(|slot| *slot.write() = None);
        allocator::give_back();
    }
}
