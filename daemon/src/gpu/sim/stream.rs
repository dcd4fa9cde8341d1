//! Simulated streams: a thread each, which takes work in order and begins it late; and events.
//!
//! What must stay true: an event's record is complete only when all work before it on its stream is done. A stream that
//! waits for an event that nobody completes waits for ever, as on CUDA (`docs/adr/0007-fences.md`), and ends with the
//! device. Once the device is lost its streams do nothing more.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, bounded};
use parking_lot::{Condvar, Mutex};
use robocache_wire::segment::SegmentError;
use robocache_wire::sim::Events;

use super::launch::Work;
use super::memory::Memory;
use crate::gpu::device::DeviceError;

/// Pieces of work that a stream holds before whoever enqueues has to wait, as a driver's queue does.
const QUEUE: usize = 1024;
/// Between two looks at an event.
const LOOK: Duration = Duration::from_micros(50);

/// What the streams of a device share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) label: String,
    pub(super) memory: Mutex<Memory>,
    lost: OnceLock<String>,
    stopped: AtomicBool,
    held: Mutex<bool>,
    changed: Condvar,
}

impl Shared {
    pub(super) fn new(label: String, memory_bytes: u64) -> Self {
        Self {
            label,
            memory: Mutex::new(Memory::new(memory_bytes)),
            lost: OnceLock::new(),
            stopped: AtomicBool::new(false),
            held: Mutex::new(false),
            changed: Condvar::new(),
        }
    }

    pub(super) fn check(&self) -> Result<(), DeviceError> {
        match self.lost.get() {
            None => Ok(()),
            Some(what) => Err(DeviceError::Lost { device: self.label.clone(), what: what.clone() }),
        }
    }

    pub(super) fn call(&self, call: &'static str, what: impl ToString) -> DeviceError {
        DeviceError::Call { device: self.label.clone(), call, what: what.to_string() }
    }

    /// The first reason stays.
    pub(super) fn lose(&self, what: &str) {
        let what = self.lost.get_or_init(|| what.to_owned());
        tracing::debug!(device = self.label, what, "a simulated device is lost");
        self.changed.notify_all();
    }

    /// What an access that was wrong does.
    pub(super) fn fault(&self, work: &str, what: &str) -> DeviceError {
        self.lose(&format!("{work}: {what}"));
        DeviceError::Lost { device: self.label.clone(), what: format!("{work}: {what}") }
    }

    pub(super) fn hold(&self, held: bool) {
        *self.held.lock() = held;
        self.changed.notify_all();
    }

    pub(super) fn stop(&self) {
        // SYNC stop: read by the streams between two looks; nothing else hangs on it.
        self.stopped.store(true, Ordering::Relaxed);
        self.hold(false);
    }

    fn over(&self) -> bool {
        // SYNC stop
        self.stopped.load(Ordering::Relaxed) || self.lost.get().is_some()
    }

    fn wait_while_held(&self) {
        let mut held = self.held.lock();
        while *held && !self.over() {
            self.changed.wait(&mut held);
        }
    }
}

/// An event: how often it was recorded, and up to which record the work is done.
#[derive(Debug, Clone)]
pub(super) enum SimEvent {
    Own(Arc<Mutex<Records>>),
    /// One that another process sees, and its place.
    Shared(Arc<Events>, u64),
}

/// Of an event of this process's own.
#[derive(Debug, Default)]
pub(super) struct Records {
    made: u64,
    done: u64,
    timed: bool,
    /// When the last one that is done was.
    at: Option<Instant>,
}

impl SimEvent {
    pub(super) fn own() -> Self {
        Self::Own(Arc::default())
    }

    pub(super) fn timed() -> Self {
        Self::Own(Arc::new(Mutex::new(Records { timed: true, ..Records::default() })))
    }

    /// When the latest record was done.
    pub(super) fn at(&self) -> Result<Instant, &'static str> {
        match self {
            Self::Own(own) => match &*own.lock() {
                Records { timed: false, .. } => Err("the event keeps no time"),
                Records { made, done, at: Some(at), .. } if made == done => Ok(*at),
                _ => Err("the event is not done"),
            },
            Self::Shared(..) => Err("the event keeps no time"),
        }
    }

    pub(super) fn record(&self) -> Result<u64, SegmentError> {
        match self {
            Self::Own(own) => {
                let mut own = own.lock();
                own.made += 1;
                Ok(own.made)
            }
            Self::Shared(events, place) => events.record(*place),
        }
    }

    fn complete(&self, number: u64) -> Result<(), SegmentError> {
        match self {
            Self::Own(own) => {
                let mut own = own.lock();
                if number > own.done {
                    (own.done, own.at) = (number, Some(Instant::now()));
                }
                Ok(())
            }
            Self::Shared(events, place) => events.complete(*place, number),
        }
    }

    pub(super) fn latest(&self) -> Result<u64, SegmentError> {
        match self {
            Self::Own(own) => Ok(own.lock().made),
            Self::Shared(events, place) => events.latest(*place),
        }
    }

    pub(super) fn is_complete(&self, number: u64) -> Result<bool, SegmentError> {
        match self {
            Self::Own(own) => Ok(own.lock().done >= number),
            Self::Shared(events, place) => events.is_complete(*place, number),
        }
    }
}

/// A piece of work. `since`: the host's writes when it was enqueued.
#[derive(Debug)]
pub(super) enum Op {
    /// From, to, bytes; the last one first, since any order is right.
    Upload {
        copies: Vec<(u64, u64, u64)>,
        since: u64,
    },
    Launch {
        work: Box<Work>,
        since: u64,
        breaks: bool,
    },
    Record {
        event: SimEvent,
        number: u64,
    },
    Wait {
        event: SimEvent,
        number: u64,
    },
    /// Tells whoever waits in `finish`.
    Reach(Sender<()>),
}

impl Op {
    fn run(self, shared: &Shared) -> Result<(), String> {
        let said = |error: SegmentError| error.to_string();
        match self {
            Self::Upload { copies, since } => {
                let memory = shared.memory.lock();
                let copy = |(from, to, bytes)| memory.write(to, &memory.read(from, bytes, since)?);
                copies.into_iter().rev().try_for_each(copy).map_err(|what| format!("upload: {what}"))
            }
            Self::Launch { breaks: true, .. } => Err("launch: it was ordered to fail".to_owned()),
            Self::Launch { work, since, .. } => {
                work.run(&shared.memory.lock(), since).map_err(|what| format!("launch: {what}"))
            }
            Self::Record { event, number } => event.complete(number).map_err(said),
            Self::Wait { event, number } => {
                while !event.is_complete(number).map_err(said)? {
                    if shared.over() {
                        return Ok(());
                    }
                    std::thread::sleep(LOOK);
                }
                Ok(())
            }
            Self::Reach(reached) => {
                reached.send(()).ok(); // nobody waits any more
                Ok(())
            }
        }
    }
}

/// One stream.
#[derive(Debug)]
pub(super) struct Stream {
    queue: Sender<Op>,
    thread: JoinHandle<()>,
}

impl Stream {
    pub(super) fn start(
        shared: &Arc<Shared>,
        number: u64,
        late: Duration,
        seed: u64,
    ) -> std::io::Result<Self> {
        let (queue, work) = bounded(QUEUE);
        let shared = Arc::clone(shared);
        let thread = std::thread::Builder::new().name(format!("sim-stream-{number}"));
        let thread = thread.spawn(move || run(&shared, &work, Delays { late, state: seed | 1 }))?;
        Ok(Self { queue, thread })
    }

    pub(super) fn queue(&self) -> Sender<Op> {
        self.queue.clone()
    }

    /// Ends it; the device is stopped.
    pub(super) fn end(self) {
        drop(self.queue);
        if self.thread.join().is_err() {
            tracing::error!("the thread of a simulated stream panicked; this is a bug");
        }
    }
}

fn run(shared: &Shared, work: &Receiver<Op>, mut delays: Delays) {
    for op in work {
        if let Some(delay) = delays.next() {
            std::thread::sleep(delay);
        }
        shared.wait_while_held();
        if shared.over() {
            continue;
        }
        if let Err(what) = op.run(shared) {
            shared.lose(&what);
        }
    }
}

/// Random delays (xorshift64*).
struct Delays {
    late: Duration,
    state: u64,
}

impl Delays {
    fn next(&mut self) -> Option<Duration> {
        if self.late.is_zero() {
            return None;
        }
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        let bits = self.state.wrapping_mul(0x2545_f491_4f6c_dd1d);
        let share = u32::try_from(bits >> 48).unwrap_or(0);
        Some(self.late * share / (1 << 16))
    }
}
