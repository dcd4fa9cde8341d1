//! The thread of one device: takes bursts of batches, describes and enqueues them, publishes what is done.
//!
//! ```text
//!   loaders ──bursts──▶ prepare sources ─▶ describe ─▶ upload ─▶ launch, record ready[i] ─▶ in flight
//!                                                                            ready happened ◀── ask, in order
//!                                                                                 └─▶ publish the slot
//! ```
//!
//! Everything of one device is enqueued by this thread, on one stream; transfers have another. It never waits for a
//! GPU as long as there is something to enqueue: it asks, and at most three bursts are under way. Batches come
//! in bursts because each turn of this context at the GPU takes a time slice from the trainer's. A burst for which much
//! is copied is cut, so that the kernels of one part run while the next part's copies are on their way.

use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError};
use robocache_kernels::AssemblePlan;

use crate::assemble::assemble;
use crate::assemblers::Job;
use crate::gpu::describe::{Recipe, View};
use crate::gpu::device::{
    Device, DeviceError, Event, Launch, Memory, Output, Pinned, Progress, Span, StreamId,
};
use crate::gpu::tiers::{AT_ONCE, Held, Tiers, Wanted};
use crate::loader::Loader;

/// Bursts enqueued and not done.
const IN_FLIGHT: usize = 3;
/// How long to rest between two looks at what is under way.
const REST: Duration = Duration::from_micros(20);

/// What the device did, for `status`.
#[derive(Debug, Default)]
pub struct WorkerCounters {
    pub batches: AtomicU64,
    pub bursts: AtomicU64,
    /// From the first enqueue of a burst to its end.
    pub burst_ns: AtomicU64,
    /// Time this thread spent describing and enqueuing.
    pub enqueue_ns: AtomicU64,
}

/// The state of the thread.
#[derive(Debug)]
pub struct Worker {
    device: Arc<dyn Device>,
    stream: StreamId,
    tiers: Tiers,
    descriptors: Vec<Descriptors>,
    in_flight: VecDeque<Burst>,
    counters: Arc<WorkerCounters>,
}

/// Room for the descriptors of one burst.
#[derive(Debug)]
struct Descriptors {
    pinned: Box<dyn Pinned>,
    device: Arc<Memory>,
}

/// What was enqueued together.
#[derive(Debug)]
struct Burst {
    end: Event,
    jobs: Vec<Made>,
    descriptors: Descriptors,
    started: Instant,
}

/// A batch on its way.
#[derive(Debug)]
struct Made {
    job: Job,
    /// What it reads.
    held: Held,
}

/// A batch whose sources are where the device reads them.
struct Prepared {
    job: Job,
    sources: Sources,
}

/// Where a batch's sources are.
struct Sources {
    held: Held,
    /// `[samples][positions of the recipe]`
    views: Vec<View>,
}

impl Worker {
    pub fn new(
        device: &Arc<dyn Device>,
        stream: StreamId,
        tiers: Tiers,
        counters: Arc<WorkerCounters>,
    ) -> Self {
        let (device, descriptors, in_flight) = (Arc::clone(device), Vec::new(), VecDeque::new());
        Self { device, stream, tiers, descriptors, in_flight, counters }
    }

    /// What the thread does until the last sender is gone.
    pub fn run(mut self, bursts: &Receiver<Vec<Job>>) {
        rest_exactly();
        loop {
            let next = if self.in_flight.is_empty() {
                bursts.recv().map_err(|_gone| RecvTimeoutError::Disconnected)
            } else if self.in_flight.len() < IN_FLIGHT {
                bursts.recv_timeout(REST)
            } else {
                std::thread::sleep(REST);
                Err(RecvTimeoutError::Timeout)
            };
            match next {
                Ok(jobs) => self.burst(jobs),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) if self.in_flight.is_empty() => return,
                Err(RecvTimeoutError::Disconnected) => std::thread::sleep(REST),
            }
            self.publish_done();
        }
    }

    fn burst(&mut self, jobs: Vec<Job>) {
        let (mut prepared, mut passing) = (Vec::with_capacity(jobs.len()), 0);
        let mut started = Instant::now();
        for job in jobs {
            let Some(one) = self.prepared(job) else { continue };
            passing += one.sources.held.bytes();
            prepared.push(one);
            if passing >= AT_ONCE {
                self.enqueue_counted(std::mem::take(&mut prepared), started);
                while self.in_flight.len() >= IN_FLIGHT {
                    std::thread::sleep(REST);
                    self.publish_done();
                }
                (passing, started) = (0, Instant::now());
            }
        }
        self.enqueue_counted(prepared, started);
    }

    fn enqueue_counted(&mut self, prepared: Vec<Prepared>, started: Instant) {
        if !prepared.is_empty() {
            self.enqueue(prepared, started);
        } else if let Err(error) = self.tiers.flush(self.stream) {
            // Those it is about were told.
            tracing::debug!(%error, "nothing of a burst is left to be made");
        }
        let elapsed = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.counters.enqueue_ns.fetch_add(elapsed, Ordering::Relaxed);
    }

    /// Prepares a batch; whatever fails, a bug of ours included, is told to the batch's loader and no other.
    fn prepared(&mut self, mut job: Job) -> Option<Prepared> {
        let mut held = Held::default();
        let message = match std::panic::catch_unwind(AssertUnwindSafe(|| self.prepare(&mut job, &mut held))) {
            Ok(Ok(views)) => return Some(Prepared { job, sources: Sources { held, views } }),
            Ok(Err(message)) => message,
            Err(_panic) => {
                tracing::error!(seq = job.header.seq, "making a batch for a GPU panicked; this is a bug");
                "making the batch panicked: a bug in robocached, please report it".to_owned()
            }
        };
        self.tiers.abandon(held);
        job.fail(&message);
        None
    }

    fn prepare(&mut self, job: &mut Job, held: &mut Held) -> Result<Vec<View>, String> {
        let loader = Arc::clone(&job.loader);
        let recipe = recipe(&loader);
        self.tiers.reads(&loader);
        let episodes: Vec<u32> = job.samples.iter().map(|sample| sample.place.episode).collect();
        let wanted = Wanted {
            dataset: loader.dataset.id(),
            positions: &recipe.positions,
            episodes: &episodes,
            stream: &|sample, nth| job.samples[sample].columns.stream(recipe.positions[nth]),
            rows: &|sample, nth| recipe.rows(&job.samples[sample], nth),
        };
        let views = self.tiers.prepare(wanted, held).map_err(|(row, error)| {
            let episode = loader.dataset.dataset().episodes()[episodes[row] as usize].index;
            format!("episode {episode} cannot be brought to the GPU: {error}")
        })?;
        // What lies on the host is filled here and now: text codes.
        assemble(&loader.plan, loader.dataset.dataset(), &job.samples, job.filling.bytes_mut());
        job.filling.set_ids(job.samples.iter().map(|sample| sample.anchor));
        Ok(views)
    }

    /// Enqueues what was prepared, as one upload of descriptors and a launch for each batch.
    fn enqueue(&mut self, prepared: Vec<Prepared>, started: Instant) {
        let mut jobs: Vec<Made> = Vec::with_capacity(prepared.len());
        let loaders: Vec<Arc<Loader>> = prepared.iter().map(|one| Arc::clone(&one.job.loader)).collect();
        let mut described: Vec<(Vec<Output<'_>>, AssemblePlan, u64)> = Vec::new();
        let mut bytes = 0;
        for (one, loader) in prepared.iter().zip(&loaders) {
            let gpu = loader.gpu.as_ref().expect("only loaders for a GPU come here");
            let rows = one.job.samples.len();
            let outputs = gpu.recipe.outputs(&gpu.ring.slot(one.job.filling.slot()), rows);
            let plan = gpu.recipe.plan(&outputs, rows);
            let plan = plan.expect("columns, of fewer tiles than 2^31: they fit the memory of a GPU");
            let length = gpu.recipe.bytes(&plan);
            described.push((outputs, plan, bytes));
            bytes += length.next_multiple_of(64);
        }
        let done = self.try_enqueue(&prepared, &loaders, &described, bytes);
        drop(described);
        for Prepared { job, sources } in prepared {
            jobs.push(Made { job, held: sources.held });
        }
        match done {
            Ok((end, descriptors)) => {
                announce(&loaders);
                self.in_flight.push_back(Burst { end, jobs, descriptors, started });
            }
            Err(error) => {
                // Some of it may be under way: what it reads and writes must stay until it is over.
                if let Err(lost) = self.device.finish(self.stream) {
                    tracing::error!(%lost, "the device does not finish what was enqueued");
                }
                for Made { job, held } in jobs {
                    self.tiers.abandon(held);
                    job.fail(&error.to_string());
                }
            }
        }
    }

    fn try_enqueue(
        &mut self,
        prepared: &[Prepared],
        loaders: &[Arc<Loader>],
        described: &[(Vec<Output<'_>>, AssemblePlan, u64)],
        bytes: u64,
    ) -> Result<(Event, Descriptors), DeviceError> {
        let mut descriptors = self.take_descriptors(bytes)?;
        let span = Span::whole(&descriptors.device);
        let mut encoded: Vec<u8> = Vec::with_capacity(usize::try_from(bytes).unwrap_or(0));
        for ((one, loader), (_, plan, at)) in prepared.iter().zip(loaders).zip(described) {
            encoded.resize(usize::try_from(*at).expect("descriptors fit memory"), 0);
            let at = robocache_kernels::DevicePtr(span.address().0 + at);
            recipe(loader)
                .encode(
                    loader.dataset.dataset(),
                    plan,
                    &one.job.samples,
                    at,
                    &one.sources.views,
                    &mut encoded,
                )
                .map_err(|error| self.bug("describing a batch", &error.to_string()))?;
        }
        descriptors.pinned.write(0, &encoded);
        self.tiers.flush(self.stream)?;
        let used = 0..encoded.len() as u64;
        self.device.upload(self.stream, &*descriptors.pinned, used.clone(), &span.part(used))?;
        for ((one, loader), (outputs, plan, at)) in prepared.iter().zip(loaders).zip(described) {
            let ring = &loader.gpu.as_ref().expect("asked above").ring;
            let slot = one.job.filling.slot();
            let launch = Launch::new(plan, outputs, &span.part(*at..span.bytes()));
            self.device.assemble(self.stream, &launch)?;
            self.device.record(ring.ready(slot), self.stream)?;
        }
        let end = Event::new(&self.device)?;
        self.device.record(end.id(), self.stream)?;
        Ok((end, descriptors))
    }

    /// Room for `bytes` that no burst under way uses.
    fn take_descriptors(&mut self, bytes: u64) -> Result<Descriptors, DeviceError> {
        if let Some(found) = self.descriptors.iter().position(|free| free.pinned.bytes() >= bytes) {
            return Ok(self.descriptors.swap_remove(found));
        }
        self.descriptors.pop(); // too small for what comes now
        let bytes = bytes.next_power_of_two().max(1 << 16);
        let (pinned, device) = (self.device.pin(bytes)?, Memory::allocate(&self.device, bytes)?);
        Ok(Descriptors { pinned, device })
    }

    fn publish_done(&mut self) {
        while let Some(burst) = self.in_flight.front() {
            let progress = burst.end.query();
            if matches!(progress, Ok(Progress::Pending)) {
                return;
            }
            let Burst { jobs, descriptors, started, end } =
                self.in_flight.pop_front().expect("looked at just now");
            drop(end);
            let elapsed = started.elapsed();
            self.counters.bursts.fetch_add(1, Ordering::Relaxed);
            self.counters.batches.fetch_add(jobs.len() as u64, Ordering::Relaxed);
            let burst_ns = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
            self.counters.burst_ns.fetch_add(burst_ns, Ordering::Relaxed);
            let each = elapsed / u32::try_from(jobs.len().max(1)).unwrap_or(u32::MAX);
            match progress {
                Ok(_done) => {
                    self.descriptors.push(descriptors);
                    for Made { job, held } in jobs {
                        drop(held);
                        job.publish(each);
                    }
                }
                Err(error) => {
                    tracing::error!(%error, "a burst of batches was lost");
                    for made in jobs {
                        made.job.fail(&error.to_string());
                    }
                }
            }
        }
    }

    fn bug(&self, call: &'static str, what: &str) -> DeviceError {
        DeviceError::Call { device: self.device.facts().name.clone(), call, what: what.to_owned() }
    }
}

/// Wakes clients that wait: a thread takes longer to wake than a GPU to make a batch, and one that was woken spins.
fn announce(loaders: &[Arc<Loader>]) {
    for loaders in loaders.chunk_by(Arc::ptr_eq) {
        loaders[0].producer.notify();
    }
}

/// Lets this thread rest as long as it says: by default the kernel may wake it 50 us late.
fn rest_exactly() {
    if let Err(error) = nix::sys::prctl::set_timerslack(1) {
        tracing::debug!(%error, "the thread of a GPU keeps its timer slack");
    }
}

fn recipe(loader: &Loader) -> &Recipe {
    &loader.gpu.as_ref().expect("only loaders for a GPU come here").recipe
}
