//! What of the episodes a device can read, and from where: its own memory, pinned host memory, or just for one batch.
//!
//! ```text
//!   host store ──copy──▶ staging ──one upload──▶ GPU cache      read at the GPU's own speed
//!        │  no room there
//!        ├──copy──▶ pinned cache ──small windows──────▶ read over the bus by the kernel itself
//!        │               └────────large windows──────▶ passing ┐
//!        │  nor there                                           ├ just the rows of a batch, freed when it is made
//!        └──copy of windows──▶ staging ──────────────▶ passing ┘
//! ```
//!
//! A stream of an episode goes into the GPU cache when a batch first needs it and stays while a loader of its dataset
//! lives: with a random order, what is there is as likely to be needed again as what would replace it, and replacing
//! costs the bus. One thread owns this; nothing is locked. What stays is in `caches`, what does not in `passing`.
//!
//! What is not in the GPU cache comes by a copy engine wherever copies are worth their own time: a kernel that reads over
//! the bus holds the GPU's multiprocessors for as long, and a trainer's kernels wait.
//!
//! Memory that cannot be had shrinks a tier, with a warning that names sizes; only where not even one batch's worth
//! can be had does a batch fail. A copy that fails takes with it all that was asked for since the last flush.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use arrow::datatypes::ToByteSlice;
use robocache_formats::Stream;
use robocache_kernels::DevicePtr;
use robocache_types::Clock;

use crate::gpu::caches::Caches;
pub use crate::gpu::caches::TierCounters;
use crate::gpu::describe::View;
use crate::gpu::device::{Device, DeviceError, Event, Span, StreamId, Upload};
pub use crate::gpu::passing::Held;
use crate::gpu::passing::{Passing, joined};
use crate::gpu::resident::{Entry, Keep, Tier};
use crate::gpu::staging::Staging;
use crate::loader::Loader;

/// The tiers of one device.
#[derive(Debug)]
pub struct Tiers {
    device: Arc<dyn Device>,
    caches: Caches,
    passing: Passing,
    staging: Staging,
    /// Put into the GPU cache since the last flush: dataset, stream, episode.
    unsent: Vec<(u64, usize, u32)>,
    /// Where copies that are not on their way yet go, of batches that will not be made.
    abandoned: Held,
    /// Why not all that was asked for since the last flush can be on its way.
    broken: Option<DeviceError>,
    counters: Arc<TierCounters>,
}

/// What a batch reads. Streams go by their number in `positions`, samples by theirs in `episodes`.
#[derive(Clone, Copy)]
#[expect(missing_debug_implementations, reason = "functions have nothing to show")]
pub struct Wanted<'a> {
    pub dataset: u64,
    /// Streams, by their places in the dataset.
    pub positions: &'a [usize],
    /// The episode of each sample.
    pub episodes: &'a [u32],
    /// The host's columns of a sample's stream.
    pub stream: &'a dyn Fn(usize, usize) -> &'a Stream,
    /// The rows that a sample reads of a stream.
    pub rows: &'a dyn Fn(usize, usize) -> Range<usize>,
}

/// A stream of a sample that is not in the GPU cache.
struct Apart {
    episode: u32,
    stream: usize,
    sample: usize,
    /// Where it is pinned.
    pinned: Option<View>,
}

impl Tiers {
    /// `cache` and `pinned` are budgets in bytes.
    pub fn new(
        device: &Arc<dyn Device>,
        transfers: StreamId,
        cache: u64,
        pinned: u64,
        counters: Arc<TierCounters>,
    ) -> Self {
        Self {
            device: Arc::clone(device),
            caches: Caches::new(device, cache, pinned, Arc::clone(&counters)),
            passing: Passing::new(device),
            staging: Staging::new(device, transfers, Arc::clone(&counters)),
            unsent: Vec::new(),
            abandoned: Held::default(),
            broken: None,
            counters,
        }
    }

    /// A loader is about to make batches.
    pub fn reads(&mut self, loader: &Arc<Loader>) {
        self.caches.reads(loader);
    }

    /// Puts what a batch reads where the device reads it. Where that is comes back as `[samples][positions]`, to be read
    /// once what [`Tiers::flush`] gave has happened, and as long as `held` is; an error, with the sample it is about.
    pub fn prepare(
        &mut self,
        wanted: Wanted<'_>,
        held: &mut Held,
    ) -> Result<Vec<View>, (usize, DeviceError)> {
        let streams = wanted.positions.len();
        let mut views = vec![View::default(); wanted.episodes.len() * streams];
        let mut hits = [0; 3];
        let (mut apart, mut missing) = (Vec::new(), Vec::new());
        let here = self.caches.resident(wanted.dataset);
        for (stream, &position) in wanted.positions.iter().enumerate() {
            let known = here.map_or(&[][..], |resident| resident.stream(position));
            let of_stream = views.iter_mut().skip(stream).step_by(streams);
            for (sample, (&episode, view)) in wanted.episodes.iter().zip(of_stream).enumerate() {
                match known.get(episode as usize) {
                    Some(&Some(Entry { view: found, tier })) => {
                        *view = found;
                        hits[tier as usize] += 1;
                        if tier == Tier::Pinned {
                            apart.push(Apart { episode, stream, sample, pinned: Some(found) });
                        }
                    }
                    _ => missing.push((episode, stream, sample)),
                }
            }
        }
        // Samples of one episode stand together in this order; each stream of it is brought once.
        missing.sort_unstable();
        for samples in missing.chunk_by(|a, b| (a.0, a.1) == (b.0, b.1)) {
            let (episode, stream, sample) = samples[0];
            let entry = self.admit(
                wanted.dataset,
                episode,
                wanted.positions[stream],
                (wanted.stream)(sample, stream),
            );
            let entry = entry.map_err(|error| (sample, error))?;
            hits[entry.map_or(Tier::Passing, |entry| entry.tier) as usize] += samples.len() as u64;
            for &(_, _, sample) in samples {
                views[sample * streams + stream] = entry.map_or_else(View::default, |entry| entry.view);
                if entry.is_none_or(|entry| entry.tier == Tier::Pinned) {
                    apart.push(Apart { episode, stream, sample, pinned: entry.map(|entry| entry.view) });
                }
            }
        }
        apart.sort_unstable_by_key(|apart| (apart.episode, apart.stream, apart.sample));
        for samples in apart.chunk_by(|a, b| (a.episode, a.stream) == (b.episode, b.stream)) {
            let brought = self.bring(wanted, samples, &mut views, held);
            brought.map_err(|error| (samples[0].sample, error))?;
        }
        let counters = [&self.counters.gpu_hits, &self.counters.pinned_hits, &self.counters.passing];
        for (counter, hits) in counters.into_iter().zip(hits) {
            counter.fetch_add(hits, Ordering::Relaxed);
        }
        Ok(views)
    }

    /// Sends what was prepared and is not on its way yet. What is given back happens when all that was ever prepared is
    /// there; `None` where it is. An error is about all that was prepared since the last flush.
    pub fn flush(&mut self) -> Result<Option<Arc<Event>>, DeviceError> {
        let sent = self.broken.take().map_or_else(|| self.staging.flush(), Err);
        let sent = sent.and_then(|()| self.staging.sent());
        if sent.is_err() {
            self.staging.discard();
            for (dataset, position, episode) in self.unsent.drain(..) {
                self.caches.forget(dataset, position, episode);
            }
        }
        self.unsent.clear();
        // Whatever is copied to the same place comes after it, on one stream.
        self.abandoned = Held::default();
        sent
    }

    /// Sends one more copy, behind all that was flushed. What is given back happens when that and all before it is there.
    pub fn follow(&mut self, upload: Upload) -> Result<Arc<Event>, DeviceError> {
        self.staging.follow(upload)
    }

    /// Counts the time of uploads that are done.
    pub fn count_time(&mut self) {
        self.staging.count_time();
    }

    /// Bytes that batches may hold before they are made, as [`Held::bytes`] has them, while as many hold as much.
    pub const fn at_once(&self) -> u64 {
        self.passing.at_once()
    }

    /// Takes what a batch held that will not be made: copies to there may be asked for.
    pub fn abandon(&mut self, held: Held) {
        self.abandoned.join(held);
    }

    /// Puts a stream of an episode into the first tier that has room for it; `None` where none has.
    fn admit(
        &mut self,
        dataset: u64,
        episode: u32,
        position: usize,
        stream: &Stream,
    ) -> Result<Option<Entry>, DeviceError> {
        let (data, stamps) = parts(stream);
        let layout = Layout::of(data, stamps);
        let (entry, keep): (Entry, Box<dyn Keep>) = if let Some(block) = self.caches.take_gpu(layout.bytes)? {
            let span = Span::whole(block.memory()).part(block.offset()..block.offset() + layout.bytes);
            self.unsent.push((dataset, position, episode));
            self.send(data, &span.part(0..data.len() as u64))?;
            if let Some(stamps) = stamps {
                self.send(stamps, &span.part(layout.stamps..layout.bytes))?;
            }
            (Entry { view: layout.view(span.address()), tier: Tier::Cache }, Box::new(block))
        } else if let Some(block) = self.caches.take_pinned(layout.bytes)? {
            let mut pinned = block.memory().lock();
            pinned.write(block.offset(), data);
            if let Some(stamps) = stamps {
                pinned.write(block.offset() + layout.stamps, stamps);
            }
            let address = DevicePtr(pinned.address().0 + block.offset());
            drop(pinned);
            (Entry { view: layout.view(address), tier: Tier::Pinned }, Box::new(block))
        } else {
            return Ok(None);
        };
        self.caches.add(dataset, position, episode, entry, keep);
        Ok(Some(entry))
    }

    /// Copies the rows of one stream of one episode that samples are made of, where a kernel had better not read them
    /// from where they are, or cannot.
    fn bring(
        &mut self,
        wanted: Wanted<'_>,
        samples: &[Apart],
        views: &mut [View],
        held: &mut Held,
    ) -> Result<(), DeviceError> {
        let Apart { stream: nth, sample, pinned, .. } = samples[0];
        let stream = (wanted.stream)(sample, nth);
        let (data, stamps) = parts(stream);
        if pinned.is_some() && (data.len() as u64) < self.device.facts().least_copy {
            return Ok(());
        }
        let row_bytes = data.len() / stream.clock.rows();
        let rows = samples.iter().map(|apart| ((wanted.rows)(apart.sample, nth), apart.sample)).collect();
        let stamps = match (pinned, stamps) {
            (Some(view), _) => view.stamps,
            (None, None) => None,
            (None, Some(stamps)) => {
                let span = self.passing.must_take(stamps.len() as u64, held)?;
                self.send(stamps, &span)?;
                Some(span.address())
            }
        };
        for window in joined(rows) {
            let range = window.rows.start * row_bytes..window.rows.end * row_bytes;
            let (start, bytes) = (range.start as u64, range.len() as u64);
            let span = if let Some(view) = pinned {
                if bytes < self.device.facts().least_copy {
                    continue;
                }
                let Some(span) = self.passing.take(bytes, start, held)? else { continue };
                self.staging.copy(Upload::from_address(DevicePtr(view.data.0 + start), span.clone()));
                span
            } else {
                // Beside the last one, so that they travel together.
                let span = self.passing.must_take(bytes, held)?;
                self.send(&data[range], &span)?;
                span
            };
            // Where row 0 would be; an address is a number, and only the window's rows are read.
            let view = View { data: DevicePtr(span.address().0.wrapping_sub(start)), stamps };
            window.samples.iter().for_each(|sample| views[sample * wanted.positions.len() + nth] = view);
        }
        Ok(())
    }

    fn send(&mut self, data: &[u8], to: &Span) -> Result<(), DeviceError> {
        let sent = self.staging.upload(data, to);
        sent.inspect_err(|error| self.broken = Some(error.clone()))
    }
}

/// A stream's values, and its stamps where its clock has some; little-endian, as the host is, which wire sees to.
fn parts(stream: &Stream) -> (&[u8], Option<&[u8]>) {
    let stamps = match &stream.clock {
        Clock::Uniform(_) => None,
        Clock::Stamps(stamps) => Some(stamps.to_byte_slice()),
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
    fn of(data: &[u8], stamps: Option<&[u8]>) -> Self {
        let at = (data.len() as u64).next_multiple_of(16);
        let bytes = stamps.map_or(data.len() as u64, |stamps| at + stamps.len() as u64);
        Self { stamps: at, bytes, has_stamps: stamps.is_some() }
    }

    fn view(&self, at: DevicePtr) -> View {
        View { data: at, stamps: self.has_stamps.then_some(DevicePtr(at.0 + self.stamps)) }
    }
}
