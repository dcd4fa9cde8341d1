//! What the GPU pipeline needs of a device, and the guards around it.
//!
//! [`Device`] is implemented by `cuda.rs` and, for hosts without a GPU, by `sim.rs`; `daemon/tests/gpu` holds both to the
//! same conduct. Work is enqueued on streams and done later, in order; events say how far a stream is. Nothing here
//! waits but [`Device::finish`] and [`Device::download`].
//!
//! Addresses are numbers and only mean something to their device. [`Memory`] owns an allocation, [`Span`] is a checked
//! part of one and keeps it; whoever enqueues work keeps the spans it touches until an event behind it has happened.

use std::fmt;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use robocache_kernels::{AssemblePlan, Column, DevicePtr, FieldKernel};
use robocache_wire::spec::{GpuKind, IpcHandle};

/// What is known of a device without asking it again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    pub kind: GpuKind,
    /// Its number in this process.
    pub ordinal: u32,
    /// As `nvidia-smi -L` shows it.
    pub uuid: String,
    pub name: String,
    /// The kernels' image in use, as `sm_90`.
    pub image: String,
    /// Launches are cut for as many.
    pub multiprocessors: u32,
    pub memory_bytes: u64,
    /// A kernel had better read fewer bytes than this over the bus than have them copied: each copy costs its time.
    pub least_copy: u64,
}

/// What a device refused or broke on.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    #[error("{device}: no memory left for {bytes} bytes")]
    OutOfMemory { device: String, bytes: u64 },
    #[error(
        "{device}: cannot pin {bytes} bytes of host memory: {what}; lower gpu.pinned_cache, or raise the limits of the \
         control group and of locked memory (ulimit -l)"
    )]
    HostMemory { device: String, bytes: u64, what: String },
    #[error("{device}: {call} failed: {what}")]
    Call { device: String, call: &'static str, what: String },
    #[error("{what}; {cure}")]
    Unsupported { what: String, cure: &'static str },
    /// Every later call fails too: the context is lost.
    #[error("{device} is lost ({what}); restart robocached")]
    Lost { device: String, what: String },
}

/// A stream of a device: work on it is done in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StreamId(pub u64);

/// An event of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct EventId(pub u64);

/// How far the work before an event is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// All of it is done, or the event was never recorded.
    Done,
    Pending,
}

/// Host memory that the device reads by itself, pinned. Freed when dropped: not before the device is done with it.
pub trait Pinned: fmt::Debug + Send + Sync {
    fn bytes(&self) -> u64;
    /// Where the device sees byte 0.
    fn address(&self) -> DevicePtr;
    /// Copies `from` to `offset`. Panics where it does not fit: lengths are ours.
    fn write(&mut self, offset: u64, from: &[u8]);
}

/// One device. Every call may be made from any thread.
pub trait Device: fmt::Debug + Send + Sync {
    fn facts(&self) -> &Facts;
    /// Free and total bytes of its memory, now.
    fn memory(&self) -> Result<(u64, u64), DeviceError>;
    /// Uninitialised memory, aligned to 256. Large ones (from 1 MiB) get whole pages of 2 MiB.
    fn allocate(&self, bytes: u64) -> Result<DevicePtr, DeviceError>;
    /// Frees what `allocate` returned. What is enqueued on it must be done.
    fn free(&self, at: DevicePtr);
    /// Pinned host memory that this device can read, and copy from.
    fn pin(&self, bytes: u64) -> Result<Box<dyn Pinned>, DeviceError>;
    /// A stream, which lives as long as the device.
    fn stream(&self) -> Result<StreamId, DeviceError>;

    /// An event of this process's own.
    fn event(&self) -> Result<EventId, DeviceError>;
    /// One that also keeps when the work before it was done.
    fn timed_event(&self) -> Result<EventId, DeviceError>;
    /// The time from what one timed event last marked to what another did, none if that came first; both are done.
    fn elapsed(&self, from: EventId, to: EventId) -> Result<Duration, DeviceError>;
    fn destroy_event(&self, event: EventId);
    /// Marks the work enqueued on `stream` so far.
    fn record(&self, event: EventId, stream: StreamId) -> Result<(), DeviceError>;
    /// What is enqueued on `stream` from now on comes after what `event` last marked.
    fn wait(&self, stream: StreamId, event: EventId) -> Result<(), DeviceError>;
    /// Whether what `event` last marked is done. Asks, never waits.
    fn query(&self, event: EventId) -> Result<Progress, DeviceError>;
    /// Waits until all work on `stream` is done.
    fn finish(&self, stream: StreamId) -> Result<(), DeviceError>;

    /// Enqueues copies of pinned memory, in any order. What is copied must stay as it is until done, and no two may
    /// write to one place.
    fn upload_all(&self, stream: StreamId, uploads: &[Upload]) -> Result<(), DeviceError>;
    /// Enqueues a copy of `range` of pinned memory to `to`, which is as long.
    fn upload(
        &self,
        stream: StreamId,
        from: &dyn Pinned,
        range: Range<u64>,
        to: &Span,
    ) -> Result<(), DeviceError> {
        self.upload_all(stream, &[Upload::new(from, range, to)])
    }
    /// Copies from the device and waits for it; other streams' work may be under way meanwhile. For tests and `doctor`.
    fn download(&self, from: &Span, to: &mut [u8]) -> Result<(), DeviceError>;
    /// Enqueues the making of a batch.
    fn assemble(&self, stream: StreamId, launch: &Launch<'_>) -> Result<(), DeviceError>;

    /// What a ring of `slots` slots shares with its client beside handles. CUDA: nothing.
    fn share(&self, slots: u32) -> Result<RingShare, DeviceError>;
    /// The event that says slot `slot` of a ring is ready, and its handle.
    fn ready_event(&self, ring: &RingShare, slot: u32) -> Result<(EventId, IpcHandle), DeviceError>;
    /// Opens the client's event, to be destroyed like one of our own. The handle is a peer's word.
    fn open_event(&self, ring: &RingShare, handle: &IpcHandle) -> Result<EventId, DeviceError>;
    /// A handle with which another process opens an allocation, of 1 MiB or more.
    fn export_memory(&self, at: DevicePtr) -> Result<IpcHandle, DeviceError>;
    /// The descriptors that go with the handles of a ring in the allocation `at`: memory, events. CUDA: none.
    fn fds(&self, ring: &RingShare, at: DevicePtr) -> Result<Vec<OwnedFd>, DeviceError>;
}

/// What a simulated device shares with a ring's client: the events. Nothing on CUDA.
#[derive(Debug, Clone, Default)]
pub struct RingShare(pub Option<Arc<robocache_wire::sim::Events>>);

/// An allocation of a device's. Freed when dropped.
#[derive(Debug)]
pub struct Memory {
    device: Arc<dyn Device>,
    at: DevicePtr,
    bytes: u64,
}

impl Memory {
    pub fn allocate(device: &Arc<dyn Device>, bytes: u64) -> Result<Arc<Self>, DeviceError> {
        let at = device.allocate(bytes)?;
        Ok(Arc::new(Self { device: Arc::clone(device), at, bytes }))
    }

    pub const fn at(&self) -> DevicePtr {
        self.at
    }

    pub const fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.device.free(self.at);
    }
}

/// A part of an allocation, which it keeps.
#[derive(Debug, Clone)]
pub struct Span {
    memory: Arc<Memory>,
    offset: u64,
    bytes: u64,
}

impl Span {
    pub fn whole(memory: &Arc<Memory>) -> Self {
        Self { memory: Arc::clone(memory), offset: 0, bytes: memory.bytes }
    }

    /// `range` of it. Panics where it does not fit: offsets are ours.
    #[must_use]
    pub fn part(&self, range: Range<u64>) -> Self {
        assert!(range.start <= range.end && range.end <= self.bytes, "{range:?} of {} bytes", self.bytes);
        Self {
            memory: Arc::clone(&self.memory),
            offset: self.offset + range.start,
            bytes: range.end - range.start,
        }
    }

    /// How far `next` begins behind this span's beginning, if it is in the same allocation, behind its end.
    pub fn distance_to(&self, next: &Self) -> Option<u64> {
        let behind = Arc::ptr_eq(&self.memory, &next.memory) && next.offset >= self.offset + self.bytes;
        behind.then(|| next.offset - self.offset)
    }

    /// This span, longer: up to the end of `next`, which lies behind it in the same allocation.
    #[must_use]
    pub fn through(&self, next: &Self) -> Self {
        let distance = self.distance_to(next).expect("the spans are of one allocation, in order");
        Self { bytes: distance + next.bytes, ..self.clone() }
    }

    pub fn address(&self) -> DevicePtr {
        DevicePtr(self.memory.at.0 + self.offset)
    }

    pub const fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// A copy of pinned memory to the device's.
#[derive(Debug, Clone)]
pub struct Upload {
    pub(crate) from: DevicePtr,
    pub(crate) to: Span,
}

impl Upload {
    /// Of `range` of `from` to `to`, which is as long. Panics where it is not: lengths are ours.
    pub fn new(from: &dyn Pinned, range: Range<u64>, to: &Span) -> Self {
        assert!(range.start <= range.end && range.end <= from.bytes(), "{range:?} of {} bytes", from.bytes());
        assert_eq!(range.end - range.start, to.bytes(), "as much as fits `to`");
        Self { from: DevicePtr(from.address().0 + range.start), to: to.clone() }
    }

    /// Of as much as fits `to`, from where the device sees pinned memory that its caller keeps.
    pub(crate) const fn from_address(from: DevicePtr, to: Span) -> Self {
        Self { from, to }
    }

    pub const fn bytes(&self) -> u64 {
        self.to.bytes()
    }

    /// With `next` as one, where both begin as far apart here as there, and at most `gap` bytes lie between them.
    pub(crate) fn joined(&self, next: &Self, gap: u64) -> Option<Self> {
        let distance = self.to.distance_to(&next.to)?;
        let joins =
            next.from.0.checked_sub(self.from.0) == Some(distance) && distance - self.to.bytes() < gap;
        joins.then(|| Self { from: self.from, to: self.to.through(&next.to) })
    }
}

/// An event of ours. Destroyed when dropped.
#[derive(Debug)]
pub struct Event {
    device: Arc<dyn Device>,
    id: EventId,
}

impl Event {
    pub fn new(device: &Arc<dyn Device>) -> Result<Self, DeviceError> {
        Ok(Self::adopt(device, device.event()?))
    }

    /// One that keeps the time.
    pub fn timed(device: &Arc<dyn Device>) -> Result<Self, DeviceError> {
        Ok(Self::adopt(device, device.timed_event()?))
    }

    /// Takes over an event that was made otherwise.
    pub fn adopt(device: &Arc<dyn Device>, id: EventId) -> Self {
        Self { device: Arc::clone(device), id }
    }

    pub const fn id(&self) -> EventId {
        self.id
    }

    pub fn query(&self) -> Result<Progress, DeviceError> {
        self.device.query(self.id)
    }

    /// The time since what `from` last marked; both are timed, and done.
    pub fn since(&self, from: &Self) -> Result<Duration, DeviceError> {
        self.device.elapsed(from.id, self.id)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        self.device.destroy_event(self.id);
    }
}

/// One batch to be made: what [`Device::assemble`] is told. Made by [`Launch::new`] only, which checks the places.
#[derive(Debug)]
pub struct Launch<'a> {
    pub(crate) plan: &'a AssemblePlan,
    /// The columns that `plan` was made of, for a device that runs the twin.
    pub(crate) columns: &'a [Output<'a>],
    pub(crate) fields: DevicePtr,
    pub(crate) sources: DevicePtr,
    pub(crate) anchors: DevicePtr,
}

/// One column of a batch in device memory.
#[derive(Debug, Clone)]
pub struct Output<'a> {
    pub kernel: &'a FieldKernel,
    /// The kernel's offsets, `[steps]` of `i64`.
    pub offsets: Span,
    /// `[batch, steps, dim]`.
    pub values: Span,
    /// `[batch, steps]` of bytes.
    pub mask: Option<Span>,
}

impl Output<'_> {
    /// The column as the kernels have it. Panics where a span is too short for `batch` samples: sizes are ours.
    pub fn column(&self, batch: usize) -> Column<'_> {
        let field = self.kernel.field();
        let steps = self.kernel.steps();
        let values = batch * steps * field.dim * field.to.size_bytes();
        assert!(self.offsets.bytes() >= (steps * 8) as u64, "offsets of {} bytes", self.offsets.bytes());
        assert!(
            self.values.bytes() >= values as u64,
            "a column of {} bytes for {values}",
            self.values.bytes()
        );
        if let Some(mask) = &self.mask {
            assert!(mask.bytes() >= (batch * steps) as u64, "a mask of {} bytes", mask.bytes());
        }
        Column {
            kernel: self.kernel,
            offsets: self.offsets.address(),
            out: self.values.address(),
            mask: self.mask.as_ref().map(Span::address),
        }
    }
}

impl<'a> Launch<'a> {
    /// A batch described at `descriptors`, where the plan's fields, then `[columns][batch]` sources, then `[batch]`
    /// anchors lie once the stream comes to the launch, as [`robocache_kernels`] encodes them.
    ///
    /// What the sources point to is the word of whoever encoded them (`describe.rs`), from spans that it keeps.
    pub fn new(plan: &'a AssemblePlan, columns: &'a [Output<'a>], descriptors: &Span) -> Self {
        let (fields, sources, anchors) = descriptor_bytes(plan);
        let wanted = fields + sources + anchors;
        assert!(
            descriptors.bytes() >= wanted,
            "descriptors of {} bytes, {wanted} wanted",
            descriptors.bytes()
        );
        assert!(columns.len() == plan.columns(), "{} columns of {}", columns.len(), plan.columns());
        let at = descriptors.address().0;
        Self {
            plan,
            columns,
            fields: DevicePtr(at),
            sources: DevicePtr(at + fields),
            anchors: DevicePtr(at + fields + sources),
        }
    }
}

/// Bytes of a plan's fields, sources and anchors.
pub fn descriptor_bytes(plan: &AssemblePlan) -> (u64, u64, u64) {
    let (columns, batch) = (plan.columns(), plan.batch());
    let sources = columns * batch * robocache_kernels::SOURCE_BYTES;
    (plan.fields().len() as u64, sources as u64, (batch * robocache_kernels::ANCHOR_BYTES) as u64)
}
