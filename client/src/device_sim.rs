//! A ring on a simulated device: memory and events are memfds (`robocache_wire::sim`), streams are names without work.
//!
//! For tests of the whole path on hosts without a GPU. What a GPU would do late is done at once, unless the loader was
//! told to be late ([`crate::LoaderBuilder::late_reads`]): then the reads of a batch's kernels end that much after its
//! release, on a thread of the ring's, which sees whether anything was written over them meanwhile.

use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use robocache_wire::segment::SegmentError;
use robocache_wire::sim::{self, Events, Region};
use robocache_wire::spec::{GpuRing, IpcHandle};

use crate::device::Stream;
use crate::error::GpuError;
use crate::gpu::{Closed, DeviceRing, Gpu, Noted, Recorded};

/// What the late reads of a simulated device found.
#[derive(Debug, Default)]
pub struct LateReads {
    /// Slots read to their late end.
    pub checked: u64,
    /// Of them: changed before it.
    pub overwritten: Vec<usize>,
}

/// How late reads end, and where to say what they found.
#[derive(Debug, Clone)]
pub(crate) struct Lateness {
    pub(crate) by: Duration,
    pub(crate) found: Arc<Mutex<LateReads>>,
}

#[derive(Debug)]
pub(crate) struct SimRing {
    gpu: Gpu,
    shared: Arc<Shared>,
    /// Places of the `ready` events.
    ready: Vec<u64>,
    late: Mutex<Option<Late>>,
}

#[derive(Debug)]
struct Shared {
    memory: Region,
    events: Events,
    slot_bytes: u64,
    slots: u64,
}

#[derive(Debug)]
struct Late {
    reads: SyncSender<Read>,
    thread: JoinHandle<()>,
    by: Duration,
}

/// A read that is under way.
#[derive(Debug)]
struct Read {
    slot: usize,
    record: u64,
    bytes: Vec<u8>,
    until: Instant,
}

impl Shared {
    fn slot(&self, slot: usize) -> Result<Vec<u8>, SegmentError> {
        let mut bytes = vec![0; usize::try_from(self.slot_bytes).unwrap_or(0)];
        self.memory.read(self.slot_bytes.saturating_mul(slot as u64), &mut bytes)?;
        Ok(bytes)
    }

    /// The place of a slot's `done` event: behind those of `ready`.
    const fn done(&self, slot: usize) -> u64 {
        self.slots + slot as u64
    }

    fn read_late(&self, reads: &Receiver<Read>, found: &Mutex<LateReads>) {
        for Read { slot, record, bytes, until } in reads {
            std::thread::sleep(until.saturating_duration_since(Instant::now()));
            let unchanged = self.slot(slot).is_ok_and(|now| now == bytes);
            let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
            found.checked += 1;
            if !unchanged {
                found.overwritten.push(slot);
            }
            drop(found);
            // A failure leaves the slot undone: the daemon does not use it again.
            self.events.complete(self.done(slot), record).ok();
        }
    }
}

/// Opens the daemon's ring; with it the handles of our events, one a slot.
pub(crate) fn open(
    ring: &GpuRing,
    fds: (OwnedFd, OwnedFd),
    ordinal: u32,
    lateness: Option<&Lateness>,
) -> Result<(SimRing, Vec<IpcHandle>), GpuError> {
    let wrong = |what: String| GpuError::Ring { uuid: ring.uuid.clone(), what };
    let memory = Region::open("memory", fds.0).map_err(|error| wrong(error.to_string()))?;
    let events = Events::open(fds.1).map_err(|error| wrong(error.to_string()))?;
    let slots = ring.ready.len() as u64;
    if memory.bytes() < ring.bytes || events.count() < 2 * slots {
        let (bytes, count) = (memory.bytes(), events.count());
        return Err(wrong(format!(
            "{} bytes and {} events, found {bytes} and {count}",
            ring.bytes,
            2 * slots
        )));
    }
    let shared = Arc::new(Shared { memory, events, slot_bytes: ring.slot_bytes, slots });
    let late = lateness.map(|lateness| Late::start(&shared, lateness)).transpose();
    let late = late.map_err(|error| wrong(format!("no thread for late reads: {error}")))?;
    let gpu = Gpu { kind: ring.kind, ordinal, uuid: ring.uuid.clone(), name: ring.name.clone() };
    let ready = ring.ready.iter().map(sim::number).collect();
    let handles = (0..ring.ready.len()).map(|slot| sim::handle(shared.done(slot))).collect();
    Ok((SimRing { gpu, shared, ready, late: Mutex::new(late) }, handles))
}

impl Late {
    fn start(shared: &Arc<Shared>, lateness: &Lateness) -> std::io::Result<Self> {
        // A slot has one read at most, until it is told done.
        let (reads, received) = sync_channel(usize::try_from(shared.slots).unwrap_or(1));
        let (shared, found) = (Arc::clone(shared), Arc::clone(&lateness.found));
        let thread = std::thread::Builder::new().name("robocache-late".to_owned());
        let thread = thread.spawn(move || shared.read_late(&received, &found))?;
        Ok(Self { reads, thread, by: lateness.by })
    }
}

impl SimRing {
    fn record(&self, slot: usize) -> Result<(), SegmentError> {
        let shared = &self.shared;
        let record = shared.events.record(shared.done(slot))?;
        let late = self.late.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(late) = &*late else { return shared.events.complete(shared.done(slot), record) };
        let read = Read { slot, record, bytes: shared.slot(slot)?, until: Instant::now() + late.by };
        // The thread ends with this sender only.
        late.reads.send(read).ok();
        Ok(())
    }

    /// A stream would wait here. By the contract there is nothing to wait for, which this holds the daemon to.
    fn is_ready(&self, slot: usize) -> Result<(), GpuError> {
        let wrong = |what| GpuError::Ring { uuid: self.gpu.uuid.clone(), what };
        let event = self.ready.get(slot).copied().unwrap_or(u64::MAX);
        let happened =
            self.shared.events.latest(event).and_then(|record| self.shared.events.is_complete(event, record));
        match happened {
            Ok(true) => Ok(()),
            Ok(false) => Err(wrong(format!("slot {slot} was published before its batch was made"))),
            Err(error) => Err(wrong(error.to_string())),
        }
    }
}

impl DeviceRing for SimRing {
    fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    fn address(&self, at: u64) -> u64 {
        at
    }

    fn use_on(&self, slot: usize, _stream: Stream, knows: bool) -> Result<(), GpuError> {
        if knows { Ok(()) } else { self.is_ready(slot) }
    }

    fn record_done(&self, slot: usize, _noted: &[Noted]) -> Recorded {
        self.record(slot).map_or(Recorded::Lost, |()| Recorded::Done)
    }

    fn finish(&self) -> Recorded {
        Recorded::Done
    }

    fn read(&self, slot: usize, at: u64, to: &mut [u8]) -> Result<(), GpuError> {
        self.is_ready(slot)?;
        self.shared
            .memory
            .read(at, to)
            .map_err(|error| GpuError::Ring { uuid: self.gpu.uuid.clone(), what: error.to_string() })
    }

    fn close(&self) -> Closed {
        let late = self.late.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Late { reads, thread, .. }) = late {
            drop(reads);
            // It ends when it has taken what was sent.
            thread.join().ok();
        }
        Closed::All
    }
}
