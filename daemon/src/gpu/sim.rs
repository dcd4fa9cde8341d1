//! A device without hardware: host memory, streams that run late, the CPU twin for a kernel, and faults on order.
//!
//! For tests of everything above [`Device`] where there is no GPU, two processes included: memory and a ring's events are
//! memfds (`robocache_wire::sim`). All of it is safe code. Addresses are numbers that mean nothing to the host
//! (`memory`), so that every access is looked up: what lies outside, was freed, or was written by the host while work
//! that reads it was under way is a fault, and a fault makes the device lost, as an illegal address does on CUDA.
//!
//! - `memory`: allocations and pinned memory, and what is wrong about an access.
//! - `stream`: a thread for each stream, which does its work in order, late.
//! - `launch`: the work of `assemble`, from descriptors read out of simulated memory.

mod launch;
mod memory;
mod stream;

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use robocache_kernels::DevicePtr;
use robocache_wire::segment::SegmentError;
use robocache_wire::sim::{self, Events};
use robocache_wire::spec::{GpuKind, IpcHandle};

use self::launch::Work;
use self::memory::SimPinned;
use self::stream::{Op, Shared, SimEvent, Stream};
use crate::gpu::device::{
    Device, DeviceError, EventId, Facts, Launch, Pinned, Progress, RingShare, Span, StreamId, Upload,
};

/// As CUDA: what is exported fills whole pages.
const PAGE: u64 = 2 << 20;
const LARGE: u64 = 1 << 20;

/// What to simulate.
#[derive(Debug, Clone)]
pub struct SimOptions {
    pub ordinal: u32,
    /// Of the device.
    pub memory_bytes: u64,
    /// Each piece of work begins up to this much after the one before has ended.
    pub late: Duration,
    /// Of the delays.
    pub seed: u64,
}

impl Default for SimOptions {
    fn default() -> Self {
        Self { ordinal: 0, memory_bytes: 1 << 30, late: Duration::from_micros(100), seed: 1 }
    }
}

/// What shall go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// The next so many allocations find no memory.
    Allocations(u32),
    /// The next so many times no host memory can be pinned.
    Pins(u32),
    /// The device has so many bytes of memory, from now on.
    MemoryBytes(u64),
    /// After so many more, an upload is refused.
    Upload(u32),
    /// After so many more, a launch breaks the device when its turn comes.
    Launch(u32),
    /// The device is lost, now.
    Lost,
}

/// Faults that are still to come.
#[derive(Debug, Default)]
struct Ordered {
    allocations: u32,
    pins: u32,
    upload: Option<u32>,
    launch: Option<u32>,
}

/// Whether it is time, and one step nearer otherwise.
fn due(after: &mut Option<u32>) -> bool {
    match after {
        None => false,
        Some(0) => {
            *after = None;
            true
        }
        Some(more) => {
            *more -= 1;
            false
        }
    }
}

/// A simulated device.
#[derive(Debug)]
pub struct SimDevice {
    facts: Facts,
    options: SimOptions,
    shared: Arc<Shared>,
    streams: RwLock<Vec<Stream>>,
    events: RwLock<HashMap<u64, SimEvent>>,
    made: Mutex<u64>,
    ordered: Mutex<Ordered>,
}

impl SimDevice {
    pub fn new(options: SimOptions) -> Arc<Self> {
        let facts = Facts {
            kind: GpuKind::Sim,
            ordinal: options.ordinal,
            uuid: format!("SIM-00000000-0000-0000-0000-{:012x}", options.ordinal),
            name: "simulated GPU".to_owned(),
            image: "twin".to_owned(),
            multiprocessors: 132,
            memory_bytes: options.memory_bytes,
            // Windows of real recordings are on both sides of it.
            least_copy: 4 << 10,
        };
        let shared = Arc::new(Shared::new(format!("sim:{}", options.ordinal), options.memory_bytes));
        Arc::new(Self {
            facts,
            options,
            shared,
            streams: RwLock::default(),
            events: RwLock::default(),
            made: Mutex::default(),
            ordered: Mutex::default(),
        })
    }

    /// Orders a fault.
    pub fn inject(&self, fault: Fault) {
        let mut ordered = self.ordered.lock();
        match fault {
            Fault::Allocations(next) => ordered.allocations = next,
            Fault::Pins(next) => ordered.pins = next,
            Fault::Upload(after) => ordered.upload = Some(after),
            Fault::Launch(after) => ordered.launch = Some(after),
            Fault::MemoryBytes(bytes) => self.shared.memory.lock().set_limit(bytes),
            Fault::Lost => self.shared.lose("it was ordered to be"),
        }
    }

    /// Stops all streams before their next piece of work, until [`SimDevice::go_on`].
    pub fn hold(&self) {
        self.shared.hold(true);
    }

    pub fn go_on(&self) {
        self.shared.hold(false);
    }

    /// Bytes allocated and not freed.
    pub fn used(&self) -> u64 {
        self.shared.memory.lock().used()
    }

    fn check(&self) -> Result<(), DeviceError> {
        self.shared.check()
    }

    fn call(&self, call: &'static str, what: impl ToString) -> DeviceError {
        self.shared.call(call, what)
    }

    fn segment(&self, call: &'static str) -> impl FnOnce(SegmentError) -> DeviceError {
        move |error| self.call(call, error)
    }

    fn event_of(&self, id: EventId) -> Result<SimEvent, DeviceError> {
        let event = self.events.read().get(&id.0).cloned();
        event.ok_or_else(|| self.call("event", format!("there is no {id:?}")))
    }

    fn keep(&self, event: SimEvent) -> EventId {
        let mut made = self.made.lock();
        *made += 1;
        self.events.write().insert(*made, event);
        EventId(*made)
    }

    /// Queues work on a stream; waits where the queue is full.
    fn enqueue(&self, stream: StreamId, op: Op) -> Result<(), DeviceError> {
        let at = usize::try_from(stream.0).unwrap_or(usize::MAX);
        let queue = self.streams.read().get(at).map(Stream::queue);
        let queue = queue.ok_or_else(|| self.call("stream", format!("there is no {stream:?}")))?;
        queue.send(op).map_err(|_gone| self.call("stream", "its thread is gone"))
    }

    fn events<'a>(&self, ring: &'a RingShare) -> Result<&'a Arc<Events>, DeviceError> {
        ring.0.as_ref().ok_or_else(|| self.call("ring", "it has no events: it is not this device's"))
    }
}

impl Device for SimDevice {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn memory(&self) -> Result<(u64, u64), DeviceError> {
        self.check()?;
        let memory = self.shared.memory.lock();
        Ok((memory.limit().saturating_sub(memory.used()), memory.limit()))
    }

    fn allocate(&self, bytes: u64) -> Result<DevicePtr, DeviceError> {
        self.check()?;
        let refused = || DeviceError::OutOfMemory { device: self.shared.label.clone(), bytes };
        let mut ordered = self.ordered.lock();
        if ordered.allocations > 0 {
            ordered.allocations -= 1;
            return Err(refused());
        }
        drop(ordered);
        let charged = if bytes < LARGE { Some(bytes.max(1)) } else { bytes.checked_next_multiple_of(PAGE) };
        let mut memory = self.shared.memory.lock();
        let charged = charged.filter(|&charged| charged <= memory.limit().saturating_sub(memory.used()));
        let charged = charged.ok_or_else(refused)?;
        memory.allocate(bytes.max(1), charged).map(DevicePtr).map_err(|what| self.call("allocate", what))
    }

    fn free(&self, at: DevicePtr) {
        if let Err(what) = self.shared.memory.lock().free(at.0) {
            self.shared.lose(&what);
        }
    }

    fn pin(&self, bytes: u64) -> Result<Box<dyn Pinned>, DeviceError> {
        self.check()?;
        let mut ordered = self.ordered.lock();
        let refused =
            |what: String| DeviceError::HostMemory { device: self.shared.label.clone(), bytes, what };
        if ordered.pins > 0 {
            ordered.pins -= 1;
            return Err(refused("it was ordered to be so".to_owned()));
        }
        drop(ordered);
        Ok(Box::new(SimPinned::new(&self.shared, bytes.max(1)).map_err(refused)?))
    }

    fn stream(&self) -> Result<StreamId, DeviceError> {
        self.check()?;
        let mut streams = self.streams.write();
        let number = streams.len() as u64;
        let seed = self.options.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(number);
        let stream = Stream::start(&self.shared, number, self.options.late, seed);
        streams.push(stream.map_err(|error| self.call("stream", error))?);
        Ok(StreamId(number))
    }

    fn event(&self) -> Result<EventId, DeviceError> {
        self.check()?;
        Ok(self.keep(SimEvent::own()))
    }

    fn timed_event(&self) -> Result<EventId, DeviceError> {
        self.check()?;
        Ok(self.keep(SimEvent::timed()))
    }

    fn elapsed(&self, from: EventId, to: EventId) -> Result<Duration, DeviceError> {
        self.check()?;
        let at = |id| self.event_of(id)?.at().map_err(|what| self.call("elapsed", what));
        let (from, to) = (at(from)?, at(to)?);
        Ok(to.saturating_duration_since(from))
    }

    fn destroy_event(&self, event: EventId) {
        if self.events.write().remove(&event.0).is_none() {
            self.shared.lose(&format!("{event:?} was destroyed, and is none"));
        }
    }

    fn record(&self, event: EventId, stream: StreamId) -> Result<(), DeviceError> {
        self.check()?;
        let event = self.event_of(event)?;
        let number = event.record().map_err(self.segment("record"))?;
        self.enqueue(stream, Op::Record { event, number })
    }

    fn wait(&self, stream: StreamId, event: EventId) -> Result<(), DeviceError> {
        self.check()?;
        let event = self.event_of(event)?;
        let number = event.latest().map_err(self.segment("wait"))?;
        self.enqueue(stream, Op::Wait { event, number })
    }

    fn query(&self, event: EventId) -> Result<Progress, DeviceError> {
        self.check()?;
        let event = self.event_of(event)?;
        let done =
            event.latest().and_then(|number| event.is_complete(number)).map_err(self.segment("query"))?;
        Ok(if done { Progress::Done } else { Progress::Pending })
    }

    fn finish(&self, stream: StreamId) -> Result<(), DeviceError> {
        self.check()?;
        let (reached, end) = crossbeam::channel::bounded(1);
        self.enqueue(stream, Op::Reach(reached))?;
        // A stream of a lost device drops its work unreached.
        end.recv().ok();
        self.check()
    }

    fn upload_all(&self, stream: StreamId, uploads: &[Upload]) -> Result<(), DeviceError> {
        self.check()?;
        if due(&mut self.ordered.lock().upload) {
            return Err(self.call("upload", "it was ordered to fail"));
        }
        let since = self.shared.memory.lock().now();
        let copies = uploads.iter().map(|Upload { from, to }| (from.0, to.address().0, to.bytes()));
        self.enqueue(stream, Op::Upload { copies: copies.collect(), since })
    }

    fn download(&self, from: &Span, to: &mut [u8]) -> Result<(), DeviceError> {
        assert_eq!(from.bytes(), to.len() as u64, "as much as fits `to`");
        self.check()?;
        let memory = self.shared.memory.lock();
        let read = memory.read(from.address().0, from.bytes(), memory.now());
        drop(memory);
        let bytes = read.map_err(|what| self.shared.fault("download", &what))?;
        to.copy_from_slice(&bytes);
        Ok(())
    }

    fn assemble(&self, stream: StreamId, launch: &Launch<'_>) -> Result<(), DeviceError> {
        self.check()?;
        let breaks = due(&mut self.ordered.lock().launch);
        let since = self.shared.memory.lock().now();
        self.enqueue(stream, Op::Launch { work: Box::new(Work::new(launch)), since, breaks })
    }

    fn share(&self, slots: u32) -> Result<RingShare, DeviceError> {
        self.check()?;
        let events = Events::create(2 * u64::from(slots)).map_err(self.segment("share"))?;
        Ok(RingShare(Some(Arc::new(events))))
    }

    fn ready_event(&self, ring: &RingShare, slot: u32) -> Result<(EventId, IpcHandle), DeviceError> {
        self.check()?;
        let (events, place) = (self.events(ring)?, u64::from(slot));
        if place >= events.count() / 2 {
            return Err(self.call("ready_event", format!("slot {slot} of {}", events.count() / 2)));
        }
        Ok((self.keep(SimEvent::Shared(Arc::clone(events), place)), sim::handle(place)))
    }

    fn open_event(&self, ring: &RingShare, handle: &IpcHandle) -> Result<EventId, DeviceError> {
        self.check()?;
        let (events, place) = (self.events(ring)?, sim::number(handle));
        if !(events.count() / 2..events.count()).contains(&place) {
            return Err(self.call("open_event", "the client's handle is none of its events"));
        }
        Ok(self.keep(SimEvent::Shared(Arc::clone(events), place)))
    }

    fn export_memory(&self, at: DevicePtr) -> Result<IpcHandle, DeviceError> {
        self.check()?;
        match self.shared.memory.lock().region(at.0) {
            Some(region) if region.bytes() >= LARGE => Ok(sim::handle(0)),
            found => {
                let bytes = found.map(|region| region.bytes());
                let what = format!("an allocation of 1 MiB or more is wanted, found {bytes:?} bytes");
                Err(self.call("export_memory", what))
            }
        }
    }

    fn fds(&self, ring: &RingShare, at: DevicePtr) -> Result<Vec<OwnedFd>, DeviceError> {
        self.check()?;
        let region = self.shared.memory.lock().region(at.0);
        let region = region.ok_or_else(|| self.call("fds", "there is no such allocation"))?;
        let copies = [region.fd().try_clone_to_owned(), self.events(ring)?.fd().try_clone_to_owned()];
        copies.into_iter().collect::<Result<_, _>>().map_err(|error| self.call("fds", error))
    }
}

impl Drop for SimDevice {
    fn drop(&mut self) {
        self.shared.stop();
        for stream in self.streams.get_mut().drain(..) {
            stream.end();
        }
    }
}
