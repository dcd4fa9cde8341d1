//! What of the episodes a device can read, and from where: its own memory, pinned host memory, or just for one batch.
//!
//! ```text
//!   host store ──copy──▶ staging ──one upload──▶ GPU cache      read at the GPU's own speed
//!        │  no room there
//!        ├──copy──▶ pinned cache                                read over the bus by the kernel itself
//!        │  nor there
//!        └──copy──▶ staging ──upload──▶ passing                 freed when its batch is made
//! ```
//!
//! A stream of an episode goes into the GPU cache when a batch first needs it and stays while a loader of its dataset
//! lives: with a random order, what is there is as likely to be needed again as what would replace it, and replacing
//! costs the bus. Datasets without a loader go when room is wanted: a batch under way has a loader, so what it reads
//! stays. One thread owns this; nothing is locked.
//!
//! Memory that cannot be had shrinks a tier, with a warning that names sizes; only where not even one batch's worth
//! can be had does a batch fail.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use robocache_formats::Stream;
use robocache_kernels::DevicePtr;
use robocache_types::Clock;

use crate::gpu::arena::{Arena, Block};
use crate::gpu::describe::View;
use crate::gpu::device::{Device, DeviceError, Memory, Pinned, Span, StreamId};
use crate::gpu::resident::{Entry, Keep, Resident, Tier};
use crate::gpu::staging::{Staging, write_stamps};
use crate::loader::Loader;

/// Slabs of device memory, and of pinned memory.
const SLAB: u64 = 256 << 20;
const PINNED_SLAB: u64 = 64 << 20;
/// Device memory kept for what only passes, whose slabs are smaller. Beyond it each stream is an allocation.
const PASSING: (u64, u64) = (512 << 20, 64 << 20);

/// What the tiers did, for `status`. Bytes and counts since the start.
#[derive(Debug, Default)]
pub struct TierCounters {
    /// Streams of samples read from the GPU cache, the pinned cache, and neither.
    pub gpu_hits: AtomicU64,
    pub pinned_hits: AtomicU64,
    pub passing: AtomicU64,
    pub uploaded_bytes: AtomicU64,
    pub gpu_used: AtomicU64,
    pub gpu_budget: AtomicU64,
    pub pinned_used: AtomicU64,
    pub pinned_budget: AtomicU64,
}

/// Pinned memory, written by the device's thread only.
type PinnedSlab = Mutex<Box<dyn Pinned>>;

/// The tiers of one device.
#[derive(Debug)]
pub struct Tiers {
    device: Arc<dyn Device>,
    cache: Arena<Arc<Memory>>,
    pinned: Arena<PinnedSlab>,
    passing: Arena<Arc<Memory>>,
    staging: Staging,
    /// By dataset, of which there are few.
    entries: Vec<(u64, Resident)>,
    /// Loaders that have made batches of a dataset here.
    readers: HashMap<u64, Vec<Weak<Loader>>>,
    counters: Arc<TierCounters>,
}

/// What passes for a batch, held until it is made.
#[derive(Debug, Default)]
pub struct Held(Vec<Box<dyn Keep>>);

impl Tiers {
    /// `cache` and `pinned` are budgets in bytes.
    pub fn new(
        device: &Arc<dyn Device>,
        transfers: StreamId,
        cache: u64,
        pinned: u64,
        counters: Arc<TierCounters>,
    ) -> Self {
        let staging = Staging::new(device, transfers, Arc::clone(&counters));
        let (device, cache, pinned) =
            (Arc::clone(device), Arena::new(cache, SLAB), Arena::new(pinned, PINNED_SLAB));
        let tiers = Self {
            device,
            cache,
            pinned,
            passing: Arena::new(PASSING.0, PASSING.1),
            staging,
            entries: Vec::new(),
            readers: HashMap::new(),
            counters,
        };
        tiers.publish();
        tiers
    }

    /// A loader is about to make batches.
    pub fn reads(&mut self, loader: &Arc<Loader>) {
        let readers = self.readers.entry(loader.dataset.id()).or_default();
        if !readers.iter().any(|known| std::ptr::eq(known.as_ptr(), Arc::as_ptr(loader))) {
            readers.retain(|known| known.strong_count() > 0);
            readers.push(Arc::downgrade(loader));
        }
    }

    /// Puts streams of a batch's samples where the device reads them: those at `positions` in the dataset, of the
    /// episode of each sample. `stream_of` gives the host's columns of a sample and position. Where they are comes back
    /// as `[samples][positions]`, to be read once [`Tiers::flush`] is waited for; an error, with the sample it is about.
    pub fn prepare<'a>(
        &mut self,
        dataset: u64,
        positions: &[usize],
        episodes: &[u32],
        stream_of: &dyn Fn(usize, usize) -> &'a Stream,
        held: &mut Held,
    ) -> Result<Vec<View>, (usize, DeviceError)> {
        let mut views = vec![View::default(); episodes.len() * positions.len()];
        let mut hits = [0; 3];
        // Those that are not here yet: episode, position, and which view.
        let mut missing = Vec::new();
        let here = self.entries.iter().find(|(id, _)| *id == dataset).map(|(_, resident)| resident);
        for (nth, &position) in positions.iter().enumerate() {
            let known = here.map_or(&[][..], |resident| resident.stream(position));
            let of_stream = views.iter_mut().enumerate().skip(nth).step_by(positions.len());
            for (&episode, (place, view)) in episodes.iter().zip(of_stream) {
                if let Some(Some(entry)) = known.get(episode as usize) {
                    *view = entry.view;
                    hits[entry.tier as usize] += 1;
                } else {
                    missing.push((episode, position, place));
                }
            }
        }
        // Samples of one episode stand together in this order; each stream of it is brought once.
        missing.sort_unstable();
        for samples in missing.chunk_by(|a, b| (a.0, a.1) == (b.0, b.1)) {
            let (episode, position, place) = samples[0];
            let row = place / positions.len();
            let entry = self.admit(dataset, episode, position, stream_of(row, position), held);
            let entry = entry.map_err(|error| (row, error))?;
            hits[entry.tier as usize] += samples.len() as u64;
            samples.iter().for_each(|&(_, _, place)| views[place] = entry.view);
        }
        let counters = [&self.counters.gpu_hits, &self.counters.pinned_hits, &self.counters.passing];
        for (counter, hits) in counters.into_iter().zip(hits) {
            counter.fetch_add(hits, Ordering::Relaxed);
        }
        Ok(views)
    }

    /// Uploads what was prepared and is not on its way yet; `stream` waits for all of it.
    pub fn flush(&mut self, stream: StreamId) -> Result<(), DeviceError> {
        self.staging.flush()?;
        self.staging.wait(stream)
    }

    fn admit(
        &mut self,
        dataset: u64,
        episode: u32,
        position: usize,
        stream: &Stream,
        held: &mut Held,
    ) -> Result<Entry, DeviceError> {
        let (data, stamps) = parts(stream);
        let layout = Layout::of(data, stamps);
        let (entry, keep): (Entry, Box<dyn Keep>) = if let Some(block) = self.take_cache(layout.bytes)? {
            let span = Span::whole(block.memory()).part(block.offset()..block.offset() + layout.bytes);
            self.copy(data, stamps, &layout, &span)?;
            (Entry { view: layout.view(span.address()), tier: Tier::Cache }, Box::new(block))
        } else if let Some(block) = self.take_pinned(layout.bytes)? {
            let mut pinned = block.memory().lock();
            pinned.write(block.offset(), data);
            if let Some(stamps) = stamps {
                write_stamps(&mut **pinned, block.offset() + layout.stamps, stamps);
            }
            let address = DevicePtr(pinned.address().0 + block.offset());
            drop(pinned);
            (Entry { view: layout.view(address), tier: Tier::Pinned }, Box::new(block))
        } else {
            let (span, keep) = self.take_passing(layout.bytes)?;
            self.copy(data, stamps, &layout, &span)?;
            held.0.push(keep);
            return Ok(Entry { view: layout.view(span.address()), tier: Tier::Passing });
        };
        let known = self.entries.iter().position(|(id, _)| *id == dataset);
        let known = known.unwrap_or_else(|| {
            self.entries.push((dataset, Resident::default()));
            self.entries.len() - 1
        });
        self.entries[known].1.add(position, episode, entry, keep);
        self.publish();
        Ok(entry)
    }

    fn copy(
        &mut self,
        data: &[u8],
        stamps: Option<&[i64]>,
        layout: &Layout,
        to: &Span,
    ) -> Result<(), DeviceError> {
        self.staging.upload(data, &to.part(0..data.len() as u64))?;
        match stamps {
            Some(stamps) => self.staging.upload_stamps(stamps, &to.part(layout.stamps..layout.bytes)),
            None => Ok(()),
        }
    }

    fn take_passing(&mut self, bytes: u64) -> Result<(Span, Box<dyn Keep>), DeviceError> {
        let device = Arc::clone(&self.device);
        // A slab that cannot be had leaves the stream's own allocation to try.
        if let Ok(Some(block)) = self.passing.take(bytes, |slab| Memory::allocate(&device, slab)) {
            let span = Span::whole(block.memory()).part(block.offset()..block.offset() + bytes);
            return Ok((span, Box::new(block)));
        }
        let memory = Memory::allocate(&device, bytes)?;
        Ok((Span::whole(&memory), Box::new(memory)))
    }

    fn take_cache(&mut self, bytes: u64) -> Result<Option<Block<Arc<Memory>>>, DeviceError> {
        let device = Arc::clone(&self.device);
        loop {
            match self.cache.take(bytes, |slab| Memory::allocate(&device, slab)) {
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
                        budget = self.cache.budget(),
                        cached = self.cache.bytes(),
                        wanted = bytes,
                        %error,
                        "the GPU cache cannot grow to its budget; the rest is served from pinned memory"
                    );
                    self.cache.stop_growing();
                    self.publish();
                }
            }
        }
    }

    fn take_pinned(&mut self, bytes: u64) -> Result<Option<Block<PinnedSlab>>, DeviceError> {
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
        store(&self.counters.gpu_used, self.cache.used());
        store(&self.counters.gpu_budget, self.cache.budget());
        store(&self.counters.pinned_used, self.pinned.used());
        store(&self.counters.pinned_budget, self.pinned.budget());
    }
}

/// A stream's values, and its stamps where its clock has some.
fn parts(stream: &Stream) -> (&[u8], Option<&[i64]>) {
    let stamps = match &stream.clock {
        Clock::Uniform(_) => None,
        Clock::Stamps(stamps) => Some(&**stamps),
    };
    (stream.values.buffer.as_slice(), stamps)
}

/// Where values and stamps lie in a block.
struct Layout {
    stamps: u64,
    bytes: u64,
    has_stamps: bool,
}

impl Layout {
    fn of(data: &[u8], stamps: Option<&[i64]>) -> Self {
        let at = (data.len() as u64).next_multiple_of(16);
        let bytes = stamps.map_or(data.len() as u64, |stamps| at + size_of_val(stamps) as u64);
        Self { stamps: at, bytes, has_stamps: stamps.is_some() }
    }

    fn view(&self, at: DevicePtr) -> View {
        View { data: at, stamps: self.has_stamps.then_some(DevicePtr(at.0 + self.stamps)) }
    }
}
