//! The thread of one device: takes bursts of batches, describes and enqueues them, publishes what is done.
//!
//! ```text
//!   loaders ──bursts──▶ prepare sources ─▶ send copies ─▶ describe, send that ─▶ parts
//!                                                              copies there ◀── ask
//!                                                                  └─▶ launch, record ready[i] ─▶ in flight
//!                                                                               ready happened ◀── ask, in order
//!                                                                                   └─▶ publish the slot
//! ```
//!
//! Everything of one device is enqueued by this thread, launches on one stream, transfers on another. It never waits for a
//! GPU as long as there is something to enqueue: it asks, and at most three bursts are under way. Batches come
//! in bursts because each turn of this context at the GPU takes a time slice from the trainer's; for the same reason the
//! stream of launches waits for nothing: a part is enqueued when what it reads is there. A burst that reads more than
//! what passes may hold is cut.

use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError};

use crate::assemble::assemble;
use crate::assemblers::Job;
use crate::gpu::describe::View;
use crate::gpu::descriptors::{Described, Rooms};
use crate::gpu::device::{Device, DeviceError, Event, Progress, StreamId};
use crate::gpu::tiers::{Held, Tiers, Wanted};

/// Bursts that are not done, those that wait for copies included: each has room for what its launches are told.
const IN_FLIGHT: usize = 3;
/// How long to rest between two looks at what is under way.
const REST: Duration = Duration::from_micros(20);

/// What the device did, for `status`.
#[derive(Debug, Default)]
pub struct WorkerCounters {
    pub batches: AtomicU64,
    pub bursts: AtomicU64,
    /// From the first step of a burst to its end.
    pub burst_ns: AtomicU64,
    /// From the first launch of a burst to the end of its last, on the device.
    pub kernel_ns: AtomicU64,
    /// Time this thread spent describing and enqueuing.
    pub enqueue_ns: AtomicU64,
}

fn add(to: &AtomicU64, elapsed: Duration) {
    to.fetch_add(u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
}

/// The state of the thread.
#[derive(Debug)]
pub struct Worker {
    device: Arc<dyn Device>,
    stream: StreamId,
    tiers: Tiers,
    rooms: Rooms,
    parts: VecDeque<Part>,
    in_flight: VecDeque<Burst>,
    counters: Arc<WorkerCounters>,
}

/// A burst, or a part of one, that is enqueued when what it reads is there.
#[derive(Debug)]
struct Part {
    batches: Vec<Prepared>,
    described: Described,
    sent: Option<Arc<Event>>,
    started: Instant,
}

/// What was enqueued together.
#[derive(Debug)]
struct Burst {
    begin: Event,
    end: Event,
    jobs: Vec<Made>,
    described: Described,
    started: Instant,
}

/// A batch on its way.
#[derive(Debug)]
struct Made {
    job: Job,
    /// What it reads.
    held: Held,
}

/// A batch whose sources are where the device reads them, or on their way there.
#[derive(Debug)]
struct Prepared {
    job: Job,
    sources: Sources,
}

/// Where a batch's sources are.
#[derive(Debug)]
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
        let (rooms, device) = (Rooms::new(device, IN_FLIGHT), Arc::clone(device));
        let (parts, in_flight) = (VecDeque::new(), VecDeque::new());
        Self { device, stream, tiers, rooms, parts, in_flight, counters }
    }

    /// What the thread does until the last sender is gone.
    pub fn run(mut self, bursts: &Receiver<Vec<Job>>) {
        rest_exactly();
        loop {
            let idle = self.in_flight.is_empty() && self.parts.is_empty();
            let next = if idle {
                bursts.recv().map_err(|_gone| RecvTimeoutError::Disconnected)
            } else if self.has_room() {
                bursts.recv_timeout(REST)
            } else {
                std::thread::sleep(REST);
                Err(RecvTimeoutError::Timeout)
            };
            match next {
                Ok(jobs) => self.burst(jobs),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) if idle => return,
                Err(RecvTimeoutError::Disconnected) => std::thread::sleep(REST),
            }
            self.go_on();
        }
    }

    /// Whether another burst, or part of one, may be prepared.
    fn has_room(&self) -> bool {
        let of_parts = self.parts.iter().flat_map(|part| &part.batches).map(|batch| &batch.sources.held);
        let of_bursts = self.in_flight.iter().flat_map(|burst| &burst.jobs).map(|made| &made.held);
        let passing = of_parts.chain(of_bursts).map(Held::bytes).sum::<u64>();
        self.in_flight.len() + self.parts.len() < IN_FLIGHT && passing <= self.tiers.at_once()
    }

    /// Does what it is time for.
    fn go_on(&mut self) {
        self.enqueue_arrived();
        self.publish_done();
    }

    fn burst(&mut self, jobs: Vec<Job>) {
        let (mut batches, mut passing) = (Vec::with_capacity(jobs.len()), 0);
        let mut started = Instant::now();
        for job in jobs {
            let Some(batch) = self.prepared(job) else { continue };
            let bytes = batch.sources.held.bytes();
            passing += bytes;
            batches.push(batch);
            // One more of its size would be too much.
            if passing + bytes > self.tiers.at_once() {
                self.send(std::mem::take(&mut batches), started);
                while !self.has_room() {
                    std::thread::sleep(REST);
                    self.go_on();
                }
                (passing, started) = (0, Instant::now());
            }
        }
        self.send(batches, started);
    }

    /// Sends copies on their way, and what the launches are told: with the copies, which hold up others on any stream, or
    /// where everything is there, on the stream of the launches.
    fn send(&mut self, batches: Vec<Prepared>, started: Instant) {
        let sent = self.tiers.flush();
        if !batches.is_empty() {
            match sent.and_then(|sent| self.tell(&batches, sent)) {
                Ok((described, sent)) => {
                    self.parts.push_back(Part { batches, described, sent, started });
                }
                Err(error) => batches.into_iter().for_each(|batch| self.give_up(batch, &error)),
            }
        }
        add(&self.counters.enqueue_ns, started.elapsed());
    }

    /// Describes batches whose sources are there when `sent` has happened, and sends that; what says that both are there.
    fn tell(
        &mut self,
        batches: &[Prepared],
        sent: Option<Arc<Event>>,
    ) -> Result<(Described, Option<Arc<Event>>), DeviceError> {
        let told = batches.iter().map(|batch| (&batch.job, &batch.sources.views[..]));
        let described = self.rooms.describe(told)?;
        let upload = described.upload();
        let sent = match sent {
            Some(_) => self.tiers.follow(upload).map(Some),
            None => self.device.upload_all(self.stream, &[upload]).map(|()| None),
        };
        match sent {
            Ok(sent) => Ok((described, sent)),
            Err(error) => {
                self.rooms.give_back(described);
                Err(error)
            }
        }
    }

    /// Enqueues the parts whose copies are there.
    fn enqueue_arrived(&mut self) {
        let mut at = 0;
        while let Some(part) = self.parts.get(at) {
            match part.sent.as_ref().map_or(Ok(Progress::Done), |sent| sent.query()) {
                Ok(Progress::Pending) => at += 1,
                Ok(Progress::Done) => {
                    let part = self.parts.remove(at).expect("looked at just now");
                    let started = Instant::now();
                    self.tiers.count_time();
                    self.enqueue(part);
                    add(&self.counters.enqueue_ns, started.elapsed());
                }
                Err(error) => {
                    let part = self.parts.remove(at).expect("looked at just now");
                    self.rooms.give_back(part.described);
                    part.batches.into_iter().for_each(|batch| self.give_up(batch, &error));
                }
            }
        }
    }

    /// A batch that will not be made.
    fn give_up(&mut self, batch: Prepared, error: &DeviceError) {
        self.tiers.abandon(batch.sources.held);
        batch.job.fail(&error.to_string());
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
        let recipe = &loader.on_gpu().recipe;
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

    /// Enqueues what is there: a launch for each batch.
    fn enqueue(&mut self, part: Part) {
        let Part { batches, described, started, .. } = part;
        match self.try_enqueue(&batches, &described) {
            Ok((begin, end)) => {
                announce(&batches);
                let made = |Prepared { job, sources }| Made { job, held: sources.held };
                let jobs = batches.into_iter().map(made).collect();
                self.in_flight.push_back(Burst { begin, end, jobs, described, started });
            }
            Err(error) => {
                // Some of it may be under way: what it reads and writes must stay until it is over.
                if let Err(lost) = self.device.finish(self.stream) {
                    tracing::error!(%lost, "the device does not finish what was enqueued");
                }
                self.rooms.give_back(described);
                batches.into_iter().for_each(|batch| self.give_up(batch, &error));
            }
        }
    }

    /// What is before it and behind it on the stream.
    fn try_enqueue(
        &self,
        batches: &[Prepared],
        described: &Described,
    ) -> Result<(Event, Event), DeviceError> {
        let begin = Event::timed(&self.device)?;
        self.device.record(begin.id(), self.stream)?;
        for (nth, Prepared { job, .. }) in batches.iter().enumerate() {
            described.launch(nth, job, &*self.device, self.stream)?;
            self.device.record(job.loader.on_gpu().ring.ready(job.filling.slot()), self.stream)?;
        }
        let end = Event::timed(&self.device)?;
        self.device.record(end.id(), self.stream)?;
        Ok((begin, end))
    }

    /// Counts a burst that is made.
    fn count(&self, batches: usize, elapsed: Duration, kernels: Result<Duration, DeviceError>) {
        self.counters.bursts.fetch_add(1, Ordering::Relaxed);
        self.counters.batches.fetch_add(batches as u64, Ordering::Relaxed);
        add(&self.counters.burst_ns, elapsed);
        match kernels {
            Ok(kernels) => add(&self.counters.kernel_ns, kernels),
            Err(error) => tracing::debug!(%error, "the time of a burst's kernels is not known"),
        }
    }

    fn publish_done(&mut self) {
        while let Some(burst) = self.in_flight.front() {
            let progress = burst.end.query();
            if matches!(progress, Ok(Progress::Pending)) {
                return;
            }
            let Burst { begin, end, jobs, described, started } =
                self.in_flight.pop_front().expect("looked at just now");
            self.rooms.give_back(described);
            match progress {
                Ok(_done) => {
                    let elapsed = started.elapsed();
                    let each = elapsed / u32::try_from(jobs.len().max(1)).unwrap_or(u32::MAX);
                    self.count(jobs.len(), elapsed, end.since(&begin));
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
}

/// Wakes clients that wait: a thread takes longer to wake than a GPU to make a batch, and one that was woken spins.
fn announce(batches: &[Prepared]) {
    for of_loader in batches.chunk_by(|a, b| Arc::ptr_eq(&a.job.loader, &b.job.loader)) {
        of_loader[0].job.loader.producer.notify();
    }
}

/// Lets this thread rest as long as it says: by default the kernel may wake it 50 us late.
fn rest_exactly() {
    if let Err(error) = nix::sys::prctl::set_timerslack(1) {
        tracing::debug!(%error, "the thread of a GPU keeps its timer slack");
    }
}
