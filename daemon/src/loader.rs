//! One loader: a thread that keeps one client's ring full.
//!
//! ```text
//!   look ahead ─▶ ask the store ─▶ wait for episodes ─▶ claim a slot ─▶ hand to the assemblers ─┐
//!       ▲                                                                                       │
//!       └───────────────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! The thread owns the order; the assemblers fill slots, several at once, and publish them in any order (the client
//! takes them by number). It stops within a futex time-out of being told, whatever it waits for. A loader that
//! meets a broken file publishes what it can, tells its client which batch failed and why, and waits for a seek.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use robocache_wire::message::ToClient;
use robocache_wire::producer::{Filling, Producer};
use robocache_wire::ring::Claim;
use robocache_wire::spec::{IpcHandle, LoaderSpec, Position};
use robocache_wire::words::DaemonState;

use crate::assemble::Sample;
use crate::assemblers::{Assemblers, Job};
use crate::future::Future;
use crate::gpu::feed::Feed;
use crate::gpu::host::GpuLoader;
use crate::lookahead::{Lookahead, Planned};
use crate::metrics::LoaderMetrics;
use crate::plan::Plan;
use crate::store::{Admission, Columns, DatasetStore, Need, Store, WaitError};

/// How far a loader looks ahead when memory is short, in batches and samples: the further, the better the store
/// knows what to keep; each sample looked at takes 24 bytes.
const FAR: (usize, usize) = (1024, 1 << 16);

/// What a loader's thread and the rest of the daemon share.
#[derive(Debug)]
pub struct Loader {
    pub spec: LoaderSpec,
    pub plan: Arc<Plan>,
    pub dataset: Arc<DatasetStore>,
    pub producer: Arc<Producer>,
    /// Its part on a GPU, where its batches go to one.
    pub gpu: Option<GpuLoader>,
    pub metrics: LoaderMetrics,
    orders: Mutex<Orders>,
    ordered: Condvar,
    /// Set once, and looked at by every wait.
    stopping: AtomicBool,
    /// Slots handed to the assemblers and not yet published.
    in_flight: AtomicU64,
}

/// What the thread is to do next.
#[derive(Debug, Default)]
struct Orders {
    seek: Option<(u32, Position)>,
    /// The client's events, once it has its ring on the GPU open.
    attach: Option<Vec<IpcHandle>>,
    drain: Option<String>,
    /// Batch `seq` of the current run cannot be made, and why.
    failed: Option<(u64, String)>,
    /// The daemon is about to go: seeks come too late.
    drained: bool,
}

/// What ends a run.
#[derive(Debug)]
pub(crate) enum Interrupt {
    Stop,
    Seek,
    Drain,
    /// Batch `seq` cannot be made.
    Failed {
        seq: u64,
        message: String,
    },
}

impl Loader {
    pub fn new(
        spec: LoaderSpec,
        plan: Arc<Plan>,
        dataset: Arc<DatasetStore>,
        producer: Arc<Producer>,
        gpu: Option<GpuLoader>,
    ) -> Arc<Self> {
        let start = spec.start;
        let orders = Orders { seek: Some((producer.run(), start)), ..Orders::default() };
        Arc::new(Self {
            spec,
            plan,
            dataset,
            producer,
            gpu,
            metrics: LoaderMetrics::default(),
            orders: Mutex::new(orders),
            ordered: Condvar::new(),
            stopping: AtomicBool::new(false),
            in_flight: AtomicU64::new(0),
        })
    }

    /// Goes on at `position` as run `run`; runs only ever grow.
    pub fn seek(&self, run: u32, position: Position) {
        let mut orders = self.orders.lock();
        let newest = orders.seek.map_or_else(|| self.producer.run(), |(pending, _)| pending);
        if run <= newest {
            tracing::warn!(run, newest, "a client sent a seek to a run that is past; ignored");
            return;
        }
        orders.seek = Some((run, position));
        self.interrupt(&orders);
    }

    /// The client has its ring on the GPU open; `done` are its events.
    pub fn attach(&self, done: Vec<IpcHandle>) {
        let mut orders = self.orders.lock();
        orders.attach = Some(done);
        self.interrupt(&orders);
    }

    /// Batch `seq` cannot be made: what an assembler found.
    pub fn fail(&self, seq: u64, message: &str) {
        let mut orders = self.orders.lock();
        if orders.failed.as_ref().is_none_or(|(first, _)| seq < *first) {
            orders.failed = Some((seq, message.to_owned()));
        }
        self.interrupt(&orders);
    }

    /// Makes no more batches; those that are ready stay so.
    pub fn drain(&self, reason: &str) {
        let mut orders = self.orders.lock();
        orders.drain = Some(reason.to_owned());
        self.interrupt(&orders);
    }

    /// Ends the thread: the client is gone, or the daemon goes.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.interrupt(&self.orders.lock());
    }

    /// `_orders` is held so that nobody checks before and waits after.
    fn interrupt(&self, _orders: &Orders) {
        self.ordered.notify_all();
        self.producer.interrupt();
    }

    pub(crate) fn interrupted(&self) -> Option<Interrupt> {
        if self.stopping.load(Ordering::SeqCst) {
            return Some(Interrupt::Stop);
        }
        let mut orders = self.orders.lock();
        if orders.seek.is_some() {
            return Some(Interrupt::Seek);
        }
        if let Some((seq, message)) = orders.failed.take() {
            return Some(Interrupt::Failed { seq, message });
        }
        orders.drain.is_some().then_some(Interrupt::Drain)
    }

    /// What the thread does. `tell` sends a message to the client.
    pub fn run(self: &Arc<Self>, store: &Arc<Store>, assemblers: &Assemblers, tell: &dyn Fn(&ToClient)) {
        let future = Arc::new(Future::new(self.dataset.id()));
        store.watch(&future);
        let mut lookahead = Lookahead::new(Arc::clone(&self.plan), &self.spec, Arc::clone(&future));
        let tight = store.used() + self.dataset.expected_missing(&self.plan.streams) > store.budget();
        loop {
            let interrupt = match self.next_order() {
                Order::Stop => Interrupt::Stop,
                Order::Begin(run, position) => {
                    self.producer.begin_run(run);
                    self.producer.set_state(DaemonState::Serving);
                    lookahead.begin(run, position);
                    self.produce(&mut lookahead, &future, store, assemblers, tight)
                }
                Order::Attach(done) => match self.gpu.as_ref().map(|gpu| gpu.ring.attach(&done)) {
                    Some(Ok(())) => continue,
                    None => {
                        Interrupt::Failed { seq: 0, message: "Attached is for rings on a GPU".to_owned() }
                    }
                    Some(Err(error)) => {
                        let message = format!("the client's events cannot be opened: {}", chain(&error));
                        Interrupt::Failed { seq: 0, message }
                    }
                },
                Order::Drain(reason) => {
                    self.wait_for_assemblers();
                    tell(&ToClient::Draining { reason });
                    self.producer.set_state(DaemonState::Draining);
                    continue;
                }
            };
            match interrupt {
                Interrupt::Stop => break,
                Interrupt::Seek | Interrupt::Drain => {}
                Interrupt::Failed { seq, message } => {
                    // Batches before it come first: the client takes them by number.
                    self.wait_for_assemblers();
                    // One that was handed on earlier may have failed meanwhile; the client waits for the first.
                    let first = self.orders.lock().failed.take().filter(|(first, _)| *first < seq);
                    let (seq, message) = first.unwrap_or((seq, message));
                    tracing::error!(
                        client = self.producer.shape().client,
                        seq,
                        message,
                        "a batch cannot be made"
                    );
                    let run = self.producer.run();
                    tell(&ToClient::Failed { run, seq, message });
                    self.producer.set_state(DaemonState::Failed);
                }
            }
        }
        self.wait_for_assemblers();
        self.producer.set_state(DaemonState::Gone);
    }

    fn next_order(&self) -> Order {
        let mut orders = self.orders.lock();
        loop {
            if self.stopping.load(Ordering::SeqCst) {
                return Order::Stop;
            }
            if let Some(reason) = orders.drain.take() {
                orders.drained = true;
                return Order::Drain(reason);
            }
            if let Some(done) = orders.attach.take() {
                return Order::Attach(done);
            }
            if self.is_open()
                && let Some((run, position)) = orders.seek.take()
                && !orders.drained
            {
                orders.failed = None; // of the run before
                return Order::Begin(run, position);
            }
            self.ordered.wait(&mut orders);
        }
    }

    /// Whether the client has all of its ring.
    fn is_open(&self) -> bool {
        self.gpu.as_ref().is_none_or(|gpu| gpu.ring.done(0).is_some())
    }

    fn produce(
        self: &Arc<Self>,
        lookahead: &mut Lookahead,
        future: &Future,
        store: &Store,
        assemblers: &Assemblers,
        tight: bool,
    ) -> Interrupt {
        if !lookahead.is_endless() {
            // Nothing will ever come; the client knows that from the same arithmetic.
            return self.idle();
        }
        let near = (self.producer.shape().slots as usize + 2, usize::MAX);
        let mut feed = self.gpu.as_ref().map(|gpu| Feed::new(self, gpu));
        loop {
            let tight = tight || store.counters().evictions.load(Ordering::Relaxed) > 0;
            let (batches, samples) = if tight { FAR } else { near };
            lookahead.extend_to(batches, samples);
            self.read_ahead(lookahead);
            let planned = lookahead.pop().expect("looked at just now");
            if let Some(feed) = &mut feed
                && !planned.episodes.iter().all(|&e| self.dataset.get(e, &self.plan.streams).is_some())
            {
                feed.flush(); // what follows takes a while
            }
            let started = Instant::now();
            let samples = match self.collect(&planned) {
                Ok(samples) => samples,
                Err(interrupt) => return interrupt,
            };
            self.metrics.waited_for_data(started.elapsed());
            future.done(planned.header.seq, &planned.episodes);
            let claimed = match &mut feed {
                None => self.claim(planned.header.run),
                Some(feed) => feed.claim(planned.header.run, planned.header.seq),
            };
            let filling = match claimed {
                Ok(filling) => filling,
                Err(interrupt) => return interrupt,
            };
            self.in_flight.fetch_add(1, Ordering::SeqCst);
            let job = Job { loader: Arc::clone(self), header: planned.header, samples, filling };
            match &mut feed {
                None => assemblers.submit(job),
                Some(feed) => feed.push(job),
            }
            if let Some(interrupt) = self.interrupted() {
                return interrupt;
            }
        }
    }

    /// Waits for whatever comes next.
    fn idle(&self) -> Interrupt {
        loop {
            if let Some(interrupt) = self.interrupted() {
                return interrupt;
            }
            let mut orders = self.orders.lock();
            if !self.stopping.load(Ordering::SeqCst) && orders.seek.is_none() && orders.drain.is_none() {
                self.ordered.wait(&mut orders);
            }
        }
    }

    /// Asks the store for what lies ahead and was not asked for yet, as far as it takes it.
    fn read_ahead(&self, lookahead: &mut Lookahead) {
        let wanted = lookahead.next_episodes();
        if !wanted.is_empty() {
            self.dataset.want(wanted, &self.plan.streams, Need::Now);
        }
        while let Some((distance, episodes)) = lookahead.to_ask() {
            if self.dataset.want(&episodes, &self.plan.streams, Need::In(distance)) == Admission::Full {
                break;
            }
            lookahead.asked();
        }
    }

    /// Holds the episodes of a batch, waiting for those that are still read.
    fn collect(&self, planned: &Planned) -> Result<Vec<Sample>, Interrupt> {
        let stop = || self.interrupted().is_some();
        let mut held: Vec<Arc<Columns>> = Vec::with_capacity(planned.episodes.len());
        for &episode in &planned.episodes {
            match self.dataset.wait(episode, &self.plan.streams, &stop) {
                Ok(columns) => held.push(columns),
                Err(WaitError::Stopped) => return Err(self.interrupted().unwrap_or(Interrupt::Stop)),
                Err(WaitError::Read(error)) => {
                    let episode = self.dataset.dataset().episodes()[episode as usize].index;
                    let message = format!("episode {episode}: {}", chain(&*error));
                    return Err(Interrupt::Failed { seq: planned.header.seq, message });
                }
            }
        }
        let sample = |&(anchor, place): &(u64, crate::anchors::Place)| {
            let nth = planned.episodes.binary_search(&place.episode).expect("its episode is listed");
            Sample { anchor, place, columns: Arc::clone(&held[nth]) }
        };
        Ok(planned.samples.iter().map(sample).collect())
    }

    fn claim(&self, run: u32) -> Result<Filling, Interrupt> {
        let started = Instant::now();
        loop {
            match self.producer.claim(run, Duration::from_millis(50)) {
                Claim::Claimed(filling) => {
                    self.metrics.waited_for_slot(started.elapsed());
                    return Ok(filling);
                }
                Claim::Full => {}
                Claim::Stale => return Err(Interrupt::Seek),
            }
            if let Some(interrupt) = self.interrupted() {
                return Err(interrupt);
            }
        }
    }

    /// Whether a drain was ordered and carried out.
    pub fn is_drained(&self) -> bool {
        self.orders.lock().drained && self.in_flight.load(Ordering::SeqCst) == 0
    }

    /// Batches handed on and not published yet.
    pub fn in_flight(&self) -> usize {
        usize::try_from(self.in_flight.load(Ordering::SeqCst)).unwrap_or(usize::MAX)
    }

    /// An assembler is done with a slot, one way or the other.
    pub fn landed(&self) {
        if self.in_flight.fetch_sub(1, Ordering::SeqCst) == 1 {
            drop(self.orders.lock());
            self.ordered.notify_all();
        }
    }

    fn wait_for_assemblers(&self) {
        let mut orders = self.orders.lock();
        while self.in_flight.load(Ordering::SeqCst) > 0 {
            self.ordered.wait(&mut orders);
        }
    }
}

enum Order {
    Attach(Vec<IpcHandle>),
    Begin(u32, Position),
    Drain(String),
    Stop,
}

/// An error and what caused it, on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
