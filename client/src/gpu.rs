//! Rings in a GPU's memory, as the client has them: which device, when a slot may be given back, when all may be closed.
//!
//! ```text
//!   use_on(stream) ── the stream waits for `ready`, and is noted
//!   drop(batch) ── behind the noted streams `done` is recorded ─▶ the slot goes back
//!                    ├─ not now (a capture) ─▶ later: tried again when the loader waits, or at the end
//!                    └─ failed ─▶ the slot is forfeited: better lost than overwritten under a kernel
//!   last batch and loader dropped ─▶ memory, events closed ─▶ Bye
//! ```
//!
//! `Ring` is shared by the loader and its batches and says `Bye` when the last of them goes, since the daemon frees the
//! memory then. In a forked child it does nothing at all: CUDA cannot be called there, and the ring is the parent's.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;
use std::time::Duration;

use robocache_wire::consumer::{Consumer, Lease};
use robocache_wire::fds::Connection;
use robocache_wire::message::ToDaemon;
use robocache_wire::segment::Forked;
pub use robocache_wire::spec::GpuKind;
use robocache_wire::spec::{GpuRing, IpcHandle};

pub use crate::device::Stream;
use crate::device_sim::Lateness;
use crate::drain::{Drain, Forfeited};
use crate::error::GpuError;

/// The device that a loader's batches are on.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Gpu {
    pub kind: GpuKind,
    /// Its number in this process, which `CUDA_VISIBLE_DEVICES` may make another than the daemon's.
    pub ordinal: u32,
    pub uuid: String,
    /// As its maker calls it.
    pub name: String,
}

impl fmt::Display for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            GpuKind::Cuda => write!(f, "cuda:{} ({})", self.ordinal, self.name),
            GpuKind::Sim => write!(f, "a simulated device ({})", self.name),
        }
    }
}

/// How many CUDA devices this process sees; an error where there is no driver, or none that works. Makes no context.
pub fn available() -> Result<usize, GpuError> {
    crate::device::uuids().map(|uuids| uuids.len())
}

/// `device` in the words of the wire: `cuda` and `cuda:N`, which count this process's devices, become their UUIDs;
/// `cuda` is the one current in this thread, else the first.
pub fn resolve(device: &str) -> Result<String, GpuError> {
    let wrong = || GpuError::Name { found: device.to_owned() };
    let (kind, number) = device.split_once(':').map_or((device, None), |(kind, number)| (kind, Some(number)));
    let ordinal = match (kind, number) {
        ("cpu", None) => return Ok(device.to_owned()),
        ("sim", Some(number)) => {
            return number.parse::<u32>().map(|_| device.to_owned()).or(Err(())).map_err(|()| wrong());
        }
        ("cuda", Some(uuid)) if uuid.starts_with("GPU-") || uuid.starts_with("MIG-") => {
            return Ok(device.to_owned());
        }
        ("cuda", None) => None,
        ("cuda", Some(number)) => Some(number.parse::<u32>().or(Err(())).map_err(|()| wrong())?),
        _ => return Err(wrong()),
    };
    let uuids = crate::device::uuids()?;
    let ordinal = ordinal.or_else(crate::device::current).unwrap_or(0);
    match usize::try_from(ordinal).ok().and_then(|ordinal| uuids.get(ordinal)) {
        Some(uuid) => Ok(format!("cuda:{uuid}")),
        None => Err(GpuError::NotVisible { wanted: device.to_owned(), seen: uuids }),
    }
}

/// Whether two UUIDs are of one device: drivers differ in whether they tell an instance of MIG, `MIG-`, from a card.
pub(crate) fn same(a: &str, b: &str) -> bool {
    let digits = |uuid: &str| uuid.split_once('-').map(|(_, digits)| digits.to_ascii_lowercase());
    digits(a).is_some() && digits(a) == digits(b)
}

/// What reads a batch.
#[derive(Debug, Default)]
pub(crate) struct Readers {
    streams: Vec<Noted>,
    /// Streams that nobody named, too.
    others: bool,
}

/// A stream that reads a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Noted {
    pub(crate) stream: Stream,
    /// Whose, where the stream is the calling thread's.
    pub(crate) thread: Option<ThreadId>,
}

/// What became of a try to record `done`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Recorded {
    Done,
    /// A stream is being captured, or the driver may not be called from here: try again.
    NotNow,
    /// Nobody will know when the reads are over.
    Lost,
}

/// Whether closing left anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Closed {
    All,
    /// Mapped until this process ends: the daemon must not be told that it is not.
    Left,
}

/// What differs between CUDA and the simulation. Offsets lie in the ring's memory: callers prove it.
pub(crate) trait DeviceRing: fmt::Debug + Send + Sync {
    fn gpu(&self) -> &Gpu;
    /// Where byte `at` of the memory lies, as kernels of this process call it.
    fn address(&self, at: u64) -> u64;
    /// What is enqueued on `stream` from now on comes after the making of the slot's batch, of which a stream that `knows`
    /// need not be told again. Refuses a stream that is being captured.
    fn use_on(&self, slot: usize, stream: Stream, knows: bool) -> Result<(), GpuError>;
    /// Marks the slot done with when all that is enqueued on the noted streams so far is. Never waits.
    fn record_done(&self, slot: usize, noted: &[Noted]) -> Recorded;
    /// Waits until all that this process has given the device so far is done.
    fn finish(&self) -> Recorded;
    /// Copies to the host, and waits for it.
    fn read(&self, slot: usize, at: u64, to: &mut [u8]) -> Result<(), GpuError>;
    /// Closes everything, once, after the reads that were marked are over.
    fn close(&self) -> Closed;
}

/// An opened ring.
#[derive(Debug)]
pub(crate) struct Ring {
    device: Arc<dyn DeviceRing>,
    slot_bytes: u64,
    consumer: Arc<Consumer>,
    connection: Arc<Connection>,
    unreleased: Mutex<Unreleased>,
}

/// Batches that were dropped when `done` could not be recorded.
#[derive(Debug, Default)]
struct Unreleased {
    later: Vec<(Lease, Vec<Noted>)>,
    /// Whether slots were forfeited: nobody knows when the memory is unused.
    lost: bool,
    /// Where there are readers that nobody named.
    drain: Option<Drain>,
}

impl Unreleased {
    fn settle(&mut self, recorded: Recorded, lease: Lease, noted: Vec<Noted>) {
        match recorded {
            Recorded::Done => drop(lease),
            Recorded::NotNow => self.later.push((lease, noted)),
            Recorded::Lost => {
                self.lost = true;
                lease.forfeit();
            }
        }
    }
}

impl Ring {
    /// Opens what the daemon made. With it the handles to answer with. `simulated` is the number in `sim:N`.
    pub(crate) fn open(
        ring: &GpuRing,
        fds: Option<(OwnedFd, OwnedFd)>,
        simulated: Option<u32>,
        lateness: Option<&Lateness>,
        consumer: &Arc<Consumer>,
        connection: &Arc<Connection>,
    ) -> Result<(Self, Vec<IpcHandle>), GpuError> {
        let (device, handles): (Arc<dyn DeviceRing>, _) = match (ring.kind, fds) {
            (GpuKind::Cuda, _) => {
                let (device, handles) = crate::device::open(ring)?;
                (Arc::new(device), handles)
            }
            (GpuKind::Sim, Some(fds)) => {
                let (device, handles) = crate::device_sim::open(ring, fds, simulated.unwrap_or(0), lateness)?;
                (Arc::new(device), handles)
            }
            (GpuKind::Sim, None) => {
                let what = "Opened came without its memory and events".to_owned();
                return Err(GpuError::Ring { uuid: ring.uuid.clone(), what });
            }
        };
        let opened = Self {
            device,
            slot_bytes: ring.slot_bytes,
            consumer: Arc::clone(consumer),
            connection: Arc::clone(connection),
            unreleased: Mutex::default(),
        };
        Ok((opened, handles))
    }

    pub(crate) fn gpu(&self) -> &Gpu {
        self.device.gpu()
    }

    fn at(&self, slot: usize, offset: u64) -> u64 {
        // Connecting proved `slots * slot_bytes` to lie in the memory, and the column in a slot.
        self.slot_bytes * slot as u64 + offset
    }

    pub(crate) fn address(&self, slot: usize, offset: u64) -> u64 {
        self.device.address(self.at(slot, offset))
    }

    pub(crate) fn read(&self, slot: usize, offset: u64, to: &mut [u8]) -> Result<(), GpuError> {
        self.check_process()?;
        self.device.read(slot, self.at(slot, offset), to)
    }

    /// Makes `stream` wait for the batch in `slot`, unless `readers` has it, and notes it.
    pub(crate) fn use_on(&self, slot: usize, stream: Stream, readers: &mut Readers) -> Result<(), GpuError> {
        self.check_process()?;
        let new = Noted::new(stream, std::thread::current().id());
        let knows = readers.streams.contains(&new);
        self.device.use_on(slot, stream, knows)?;
        if !knows {
            readers.streams.push(new);
        }
        Ok(())
    }

    /// Notes streams that nobody names. They need not be made to wait: what is published is made.
    pub(crate) fn use_anywhere(&self, readers: &mut Readers) -> Result<(), GpuError> {
        self.check_process()?;
        let mut unreleased = self.unreleased();
        if unreleased.drain.is_none() {
            let slots = usize::try_from(self.consumer.shape().slots).unwrap_or(usize::MAX);
            let drain = Drain::start(&self.device, slots).map_err(|error| GpuError::Call {
                call: "starting a thread",
                what: error.to_string(),
                cure: String::new(),
            })?;
            unreleased.drain = Some(drain);
        }
        readers.others = true;
        Ok(())
    }

    fn check_process(&self) -> Result<(), GpuError> {
        match self.consumer.forked() {
            Forked::Same => Ok(()),
            Forked::Child => Err(GpuError::Forked),
        }
    }

    /// Gives a slot back behind those who read it.
    pub(crate) fn release(&self, lease: Lease, readers: Readers) {
        let Readers { streams, others } = readers;
        // A child's drop of a lease does nothing, which is all that may be done there.
        if self.consumer.forked() == Forked::Child || (streams.is_empty() && !others) {
            drop(lease);
        } else if others && let Some(drain) = &self.unreleased().drain {
            drain.put(lease);
        } else {
            match self.device.record_done(lease.slot(), &streams) {
                Recorded::Done => drop(lease),
                other => self.unreleased().settle(other, lease, streams),
            }
        }
    }

    /// Tries again with what could not be given back.
    pub(crate) fn retry(&self) {
        let mut unreleased = self.unreleased();
        for (lease, noted) in std::mem::take(&mut unreleased.later) {
            let recorded = self.device.record_done(lease.slot(), &noted);
            unreleased.settle(recorded, lease, noted);
        }
    }

    fn unreleased(&self) -> MutexGuard<'_, Unreleased> {
        self.unreleased.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if self.consumer.forked() == Forked::Child {
            return;
        }
        self.retry();
        let Unreleased { later, lost, drain } = std::mem::take(&mut *self.unreleased());
        let forfeited = drain.map_or(Forfeited::None, Drain::end);
        let in_use = lost || forfeited == Forfeited::Some || !later.is_empty();
        for (lease, _) in later {
            lease.forfeit();
        }
        // Without Bye the daemon keeps the memory until this process is gone.
        if !in_use && self.device.close() == Closed::All {
            self.connection.send(&ToDaemon::Bye, &[], Duration::ZERO).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_that_need_no_driver_to_be_named_are_themselves() {
        for device in ["cpu", "sim:0", "sim:12", "cuda:GPU-6fd59a7c-0f5e-4b0b-ae8e-2ec4c5fe4d4c"] {
            assert_eq!(resolve(device).unwrap(), device);
        }
    }

    #[test]
    fn what_is_no_device_is_refused_with_those_that_are() {
        for device in ["", "gpu", "cpu:0", "cuda:", "cuda:x", "cuda:-1", "sim", "sim:x", "CUDA"] {
            let error = resolve(device).unwrap_err();
            assert_eq!(error, GpuError::Name { found: device.to_owned() });
            assert!(error.to_string().contains("\"cuda:N\""), "{error}");
        }
    }

    #[test]
    fn the_uuid_of_an_instance_is_one_whatever_it_is_called() {
        assert!(same("GPU-6fd59a7c-0f5e", "MIG-6FD59A7C-0f5e"));
        assert!(!same("GPU-6fd59a7c-0f5e", "GPU-6fd59a7c-0f5f"));
        assert!(!same("", ""));
    }
}
