//! Streams of episodes that stay where a device reads them: the GPU cache, the pinned cache, what is in them.
//!
//! Datasets without a loader go when room is wanted: a batch under way has a loader, so what it reads stays. A cache that
//! cannot grow to its budget is cut to what it has, with a warning that names sizes.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use crate::gpu::arena::{Arena, Block};
use crate::gpu::device::{Device, DeviceError, Memory, Pinned};
use crate::gpu::resident::{Entry, Keep, Resident};
use crate::loader::Loader;

/// Slabs of device memory, and of pinned memory.
const SLAB: u64 = 256 << 20;
const PINNED_SLAB: u64 = 64 << 20;

/// What the tiers did, for `status`. Bytes and counts since the start.
#[derive(Debug, Default)]
pub struct TierCounters {
    /// Streams of samples read from the GPU cache, the pinned cache, and neither.
    pub gpu_hits: AtomicU64,
    pub pinned_hits: AtomicU64,
    pub passing: AtomicU64,
    pub uploaded_bytes: AtomicU64,
    /// Time the device took for it.
    pub upload_ns: AtomicU64,
    pub gpu_used: AtomicU64,
    pub gpu_budget: AtomicU64,
    pub pinned_used: AtomicU64,
    pub pinned_budget: AtomicU64,
}

/// Pinned memory, written by the device's thread only.
type PinnedSlab = Mutex<Box<dyn Pinned>>;

/// Both caches of a device.
#[derive(Debug)]
pub(super) struct Caches {
    device: Arc<dyn Device>,
    gpu: Arena<Arc<Memory>>,
    pinned: Arena<PinnedSlab>,
    /// By dataset, of which there are few.
    entries: Vec<(u64, Resident)>,
    /// Loaders that have made batches of a dataset here.
    readers: HashMap<u64, Vec<Weak<Loader>>>,
    counters: Arc<TierCounters>,
}

impl Caches {
    /// `gpu` and `pinned` are budgets in bytes.
    pub(super) fn new(device: &Arc<dyn Device>, gpu: u64, pinned: u64, counters: Arc<TierCounters>) -> Self {
        let (gpu, pinned) = (Arena::new(gpu, SLAB), Arena::new(pinned, PINNED_SLAB));
        let (device, entries, readers) = (Arc::clone(device), Vec::new(), HashMap::new());
        let caches = Self { device, gpu, pinned, entries, readers, counters };
        caches.publish();
        caches
    }

    /// A loader is about to make batches.
    pub(super) fn reads(&mut self, loader: &Arc<Loader>) {
        let readers = self.readers.entry(loader.dataset.id()).or_default();
        if !readers.iter().any(|known| std::ptr::eq(known.as_ptr(), Arc::as_ptr(loader))) {
            readers.retain(|known| known.strong_count() > 0);
            readers.push(Arc::downgrade(loader));
        }
    }

    /// What is here of a dataset.
    pub(super) fn resident(&self, dataset: u64) -> Option<&Resident> {
        self.entries.iter().find(|(id, _)| *id == dataset).map(|(_, resident)| resident)
    }

    /// Notes what was put into a block that was taken here.
    pub(super) fn add(
        &mut self,
        dataset: u64,
        position: usize,
        episode: u32,
        entry: Entry,
        keep: Box<dyn Keep>,
    ) {
        let known = self.entries.iter().position(|(id, _)| *id == dataset);
        let known = known.unwrap_or_else(|| {
            self.entries.push((dataset, Resident::default()));
            self.entries.len() - 1
        });
        self.entries[known].1.add(position, episode, entry, keep);
        self.publish();
    }

    /// Forgets an entry whose bytes never came.
    pub(super) fn forget(&mut self, dataset: u64, position: usize, episode: u32) {
        if let Some((_, resident)) = self.entries.iter_mut().find(|(id, _)| *id == dataset) {
            resident.forget(position, episode);
        }
    }

    /// Room for a stream in the GPU cache, if there is some or some can be made.
    pub(super) fn take_gpu(&mut self, bytes: u64) -> Result<Option<Block<Arc<Memory>>>, DeviceError> {
        let device = Arc::clone(&self.device);
        loop {
            match self.gpu.take(bytes, |slab| Memory::allocate(&device, slab)) {
                Ok(Some(block)) => return Ok(Some(block)),
                Ok(None) => {
                    if !self.forget_unread() {
                        return Ok(None);
                    }
                }
                Err(error @ DeviceError::Lost { .. }) => return Err(error),
                Err(error) => {
                    tracing::warn!(
                        device = self.device.facts().name,
                        budget = self.gpu.budget(),
                        cached = self.gpu.bytes(),
                        wanted = bytes,
                        %error,
                        "the GPU cache cannot grow to its budget; the rest is served from pinned memory"
                    );
                    self.gpu.stop_growing();
                    self.publish();
                }
            }
        }
    }

    /// The same in the pinned cache.
    pub(super) fn take_pinned(&mut self, bytes: u64) -> Result<Option<Block<PinnedSlab>>, DeviceError> {
        let device = Arc::clone(&self.device);
        match self.pinned.take(bytes, |slab| device.pin(slab).map(Mutex::new)) {
            Ok(block) => Ok(block),
            Err(error @ DeviceError::Lost { .. }) => Err(error),
            Err(error) => {
                tracing::warn!(
                    budget = self.pinned.budget(),
                    pinned = self.pinned.bytes(),
                    wanted = bytes,
                    %error,
                    "the pinned cache cannot grow to its budget; what does not fit is copied for each batch"
                );
                self.pinned.stop_growing();
                self.publish();
                Ok(None)
            }
        }
    }

    /// Drops what no loader reads any more. Whether there was anything.
    fn forget_unread(&mut self) -> bool {
        self.readers.retain(|_, loaders| {
            loaders.retain(|loader| loader.strong_count() > 0);
            !loaders.is_empty()
        });
        let before = self.entries.len();
        let readers = &self.readers;
        self.entries.retain(|(dataset, _)| readers.contains_key(dataset));
        self.publish();
        self.entries.len() < before
    }

    fn publish(&self) {
        let store = |counter: &AtomicU64, value| counter.store(value, Ordering::Relaxed);
        store(&self.counters.gpu_used, self.gpu.used());
        store(&self.counters.gpu_budget, self.gpu.budget());
        store(&self.counters.pinned_used, self.pinned.used());
        store(&self.counters.pinned_budget, self.pinned.budget());
    }
}
