//! The CUDA driver as the daemon's device: with its parts the only calls into it from this crate.
//!
//! Owns one primary context, its streams, events, allocations and kernels. Streams, events and allocations are kept in
//! tables, so that an id or address that is none of ours is an error and never reaches the driver. Return codes are all
//! looked at; one that sticks (an illegal address, a broken chip) makes the device lost for good.
//!
//! What a table cannot know is whether work that was enqueued is done when memory goes: [`Device`] asks its callers to
//! see to that. Where they did not, the GPU would meet an address that is not mapped any more, which loses the context;
//! this process's own memory is never the driver's to write, except within the copies below.

#![expect(unsafe_code, reason = "the CUDA driver's interface")]

mod copies;
mod events;
mod found;
mod peer;
mod pinned;
mod refusals;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use cudarc::driver::result::{self, stream::StreamKind};
use cudarc::driver::sys::{self, CUevent_flags, CUresult};
use cudarc::driver::{CudaContext, DriverError};
use parking_lot::{Mutex, RwLock};
use robocache_kernels::{DevicePtr, Kernels, LaunchError};
use robocache_wire::spec::{GpuKind, IpcHandle};

use self::copies::{BATCHES, Copies, LEAST_BATCHED, LEAST_SINGLE, driver_version};
use self::events::{Event, Events, to_handle};
pub use self::found::Found;
pub use self::peer::read_shared;
use self::pinned::{CudaPinned, PinError};
use self::refusals::{dropped, is_lost, name, no_context};
use crate::gpu::device::{
    Device, DeviceError, EventId, Facts, Launch, Pinned, Progress, RingShare, Span, StreamId, Upload,
};

/// Pages of the GPU's memory. An allocation that fills whole ones shares none with another.
const PAGE: u64 = 2 << 20;
/// Allocations from here on get whole pages.
const LARGE: u64 = 1 << 20;

/// One GPU and its primary context in this process.
#[derive(Debug)]
pub struct CudaDevice {
    facts: Facts,
    label: String,
    kernels: Kernels,
    /// The driver takes many copies by one call.
    batches_copies: bool,
    streams: RwLock<Vec<Name<sys::CUstream_st>>>,
    events: Events,
    /// Bytes of each allocation, by address.
    allocations: Mutex<BTreeMap<u64, u64>>,
    /// As above, of pinned host memory.
    pinned: Arc<Mutex<BTreeMap<u64, u64>>>,
    /// Why the context is lost, once it is.
    lost: OnceLock<String>,
    context: Arc<CudaContext>,
}

/// The driver's name for a thing of a context.
#[derive(Debug, Clone, Copy)]
struct Name<T>(*mut T);

// SAFETY: it names something of the driver's, is no memory that this process reads or writes, and the driver's
// interface may be called from any thread.
unsafe impl<T> Send for Name<T> {}
// SAFETY: as above; there is nothing to change through a shared one.
unsafe impl<T> Sync for Name<T> {}

impl CudaDevice {
    /// The GPUs that the driver shows this process, in its order; none where there are none. Makes no context.
    pub fn list() -> Result<Vec<Found>, DeviceError> {
        Found::list()
    }

    /// Takes the context of GPU `ordinal`, as the driver numbers them for this process, and loads the kernels.
    pub fn open(ordinal: u32) -> Result<Arc<dyn Device>, DeviceError> {
        Self::open_as(ordinal, i32::MAX)
    }

    /// The same, using nothing that is younger than this version of the driver, as 12080.
    pub fn open_as(ordinal: u32, version: i32) -> Result<Arc<dyn Device>, DeviceError> {
        let found = Self::list()?;
        let label = format!("cuda:{ordinal}");
        let count = found.len();
        let found = found.into_iter().find(|found| found.ordinal == ordinal).ok_or_else(|| {
            let what = format!("there is no {label}: this process sees {count} GPUs");
            DeviceError::Unsupported { what, cure: "see nvidia-smi -L and CUDA_VISIBLE_DEVICES" }
        })?;
        if let Some(refused) = found.refused {
            return Err(refused);
        }
        let context = CudaContext::new(ordinal as usize)
            .map_err(|error| no_context(&label, "cuDevicePrimaryCtxRetain", error))?;
        let kernels = Kernels::load(&context).map_err(|error| match error {
            LaunchError::Driver { call, source, .. } => no_context(&label, call, source),
            other => {
                DeviceError::Unsupported { what: format!("{label}: {other}"), cure: "or use device \"cpu\"" }
            }
        })?;
        let driver = driver_version().map_err(|error| no_context(&label, "cuDriverGetVersion", error))?;
        let batches_copies = driver.min(version) >= BATCHES;
        let facts = Facts {
            kind: GpuKind::Cuda,
            ordinal,
            uuid: found.uuid,
            name: found.name,
            image: kernels.image().to_owned(),
            multiprocessors: kernels.multiprocessors(),
            memory_bytes: found.memory_bytes,
            least_copy: if batches_copies { LEAST_BATCHED } else { LEAST_SINGLE },
        };
        let device = Arc::new(Self {
            facts,
            label,
            kernels,
            batches_copies,
            streams: RwLock::default(),
            events: Events::new(&context),
            allocations: Mutex::default(),
            pinned: Arc::default(),
            lost: OnceLock::new(),
            context,
        });
        device.try_sharing()?;
        Ok(device)
    }

    /// Whether handles can be made at all: only trying tells, the attribute is younger than the drivers we serve.
    fn try_sharing(&self) -> Result<(), DeviceError> {
        let tried = self.ready_event(&RingShare::default(), 0).and_then(|(event, _)| {
            self.destroy_event(event);
            let at = self.allocate(PAGE)?;
            let exported = self.export_memory(at);
            self.free(at);
            exported.map(drop)
        });
        tried.map_err(|error| match error {
            DeviceError::Call { call, what, .. } => DeviceError::Unsupported {
                what: format!("{} cannot share memory between processes: {call} failed: {what}", self.label),
                cure: "legacy CUDA IPC is needed, or use device \"cpu\"",
            },
            other => other,
        })
    }

    /// The context for this thread, unless it is lost.
    fn enter(&self) -> Result<(), DeviceError> {
        if let Some(what) = self.lost.get() {
            return Err(DeviceError::Lost { device: self.label.clone(), what: what.clone() });
        }
        self.context.bind_to_thread().map_err(|error| self.failed("cuCtxSetCurrent", "", error))
    }

    /// What a failed call means; `about` says sizes.
    fn failed(&self, call: &'static str, about: &str, error: DriverError) -> DeviceError {
        let device = self.label.clone();
        let what = if about.is_empty() { name(error) } else { format!("{} ({about})", name(error)) };
        if is_lost(error) {
            let what = self.lost.get_or_init(|| format!("{call}: {what}")).clone();
            return DeviceError::Lost { device, what };
        }
        DeviceError::Call { device, call, what }
    }

    fn unknown(&self, call: &'static str, what: String) -> DeviceError {
        DeviceError::Call { device: self.label.clone(), call, what }
    }

    fn stream_of(&self, id: StreamId) -> Result<sys::CUstream, DeviceError> {
        let stream = usize::try_from(id.0).ok().and_then(|at| self.streams.read().get(at).copied());
        stream.map(|stream| stream.0).ok_or_else(|| self.unknown("stream", format!("there is no {id:?}")))
    }

    fn event_of(&self, id: EventId) -> Result<Arc<Event>, DeviceError> {
        self.events.get(id).ok_or_else(|| self.unknown("event", format!("there is no {id:?}")))
    }

    /// Refuses a span that is not in this device's memory.
    fn own(&self, call: &'static str, span: &Span) -> Result<(), DeviceError> {
        let inside = contains(&self.allocations.lock(), span.address().0, span.bytes());
        let what = || format!("{} bytes at {:#x} are not in its memory", span.bytes(), span.address().0);
        if inside { Ok(()) } else { Err(self.unknown(call, what())) }
    }
}

/// Whether `bytes` bytes from `at` lie in one of `ranges`.
fn contains(ranges: &BTreeMap<u64, u64>, at: u64, bytes: u64) -> bool {
    let range = ranges.range(..=at).next_back();
    range.is_some_and(|(&start, &length)| at - start <= length && bytes <= length - (at - start))
}

impl Device for CudaDevice {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn memory(&self) -> Result<(u64, u64), DeviceError> {
        self.enter()?;
        let (free, total) = result::mem_get_info().map_err(|error| self.failed("cuMemGetInfo", "", error))?;
        Ok((free as u64, total as u64))
    }

    fn allocate(&self, bytes: u64) -> Result<DevicePtr, DeviceError> {
        self.enter()?;
        let size = if bytes < LARGE { Some(bytes.max(1)) } else { bytes.checked_next_multiple_of(PAGE) };
        let refused = || DeviceError::OutOfMemory { device: self.label.clone(), bytes };
        let size = size.and_then(|size| usize::try_from(size).ok()).ok_or_else(refused)?;
        // SAFETY: it has no duty but to know that the memory holds nothing yet; no value is made of it here.
        let at = unsafe { result::malloc_sync(size) }.map_err(|error| match error.0 {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => refused(),
            _ => self.failed("cuMemAlloc", &format!("{size} bytes"), error),
        })?;
        self.allocations.lock().insert(at, size as u64);
        Ok(DevicePtr(at))
    }

    fn free(&self, at: DevicePtr) {
        if self.allocations.lock().remove(&at.0).is_none() {
            tracing::error!(
                at = at.0,
                device = self.label,
                "freed what was not allocated: a bug of robocached's"
            );
            return;
        }
        let freed = self.context.bind_to_thread().and_then(|()| {
            // SAFETY: `at` is an allocation of this context, and only now left the table: nobody frees it again.
            unsafe { result::free_sync(at.0) }
        });
        dropped("cuMemFree", freed);
    }

    fn pin(&self, bytes: u64) -> Result<Box<dyn Pinned>, DeviceError> {
        self.enter()?;
        let size = bytes.max(1);
        match CudaPinned::new(&self.context, &self.pinned, size) {
            Ok(pinned) => Ok(Box::new(pinned)),
            Err(PinError::Host(what)) => {
                Err(DeviceError::HostMemory { device: self.label.clone(), bytes, what })
            }
            Err(PinError::Driver(call, error)) => match self.failed(call, "", error) {
                DeviceError::Call { device, call, what } => {
                    Err(DeviceError::HostMemory { device, bytes, what: format!("{call}: {what}") })
                }
                lost => Err(lost),
            },
        }
    }

    fn stream(&self) -> Result<StreamId, DeviceError> {
        self.enter()?;
        // Of the lowest priority, the driver's default: under MPS, which knows priorities across processes, a trainer's
        // may be higher. Not synchronised with the default stream, which nothing here uses.
        let stream = result::stream::create(StreamKind::NonBlocking)
            .map_err(|error| self.failed("cuStreamCreate", "", error))?;
        let mut streams = self.streams.write();
        streams.push(Name(stream));
        Ok(StreamId(streams.len() as u64 - 1))
    }

    fn event(&self) -> Result<EventId, DeviceError> {
        self.enter()?;
        let made = self.events.make(CUevent_flags::CU_EVENT_DISABLE_TIMING);
        made.map_err(|(call, error)| self.failed(call, "", error))
    }

    fn timed_event(&self) -> Result<EventId, DeviceError> {
        self.enter()?;
        let made = self.events.make(CUevent_flags::CU_EVENT_DEFAULT);
        made.map_err(|(call, error)| self.failed(call, "", error))
    }

    fn elapsed(&self, from: EventId, to: EventId) -> Result<Duration, DeviceError> {
        self.enter()?;
        let (from, to) = (self.event_of(from)?, self.event_of(to)?);
        to.since(&from).map_err(|error| self.failed("cuEventElapsedTime", "", error))
    }

    fn destroy_event(&self, event: EventId) {
        if !self.events.remove(event) {
            tracing::error!(?event, device = self.label, "destroyed what is no event: a bug of robocached's");
        }
    }

    fn record(&self, event: EventId, stream: StreamId) -> Result<(), DeviceError> {
        self.enter()?;
        let (event, stream) = (self.event_of(event)?, self.stream_of(stream)?);
        // SAFETY: both are of this context; streams live as long as self.
        unsafe { event.record(stream) }.map_err(|error| self.failed("cuEventRecord", "", error))
    }

    fn wait(&self, stream: StreamId, event: EventId) -> Result<(), DeviceError> {
        self.enter()?;
        let (event, stream) = (self.event_of(event)?, self.stream_of(stream)?);
        // SAFETY: as in `record`.
        unsafe { event.hold(stream) }.map_err(|error| self.failed("cuStreamWaitEvent", "", error))
    }

    fn query(&self, event: EventId) -> Result<Progress, DeviceError> {
        self.enter()?;
        let event = self.event_of(event)?;
        event.query().map_err(|error| self.failed("cuEventQuery", "", error))
    }

    fn finish(&self, stream: StreamId) -> Result<(), DeviceError> {
        self.enter()?;
        let stream = self.stream_of(stream)?;
        // SAFETY: streams live as long as self.
        unsafe { result::stream::synchronize(stream) }
            .map_err(|error| self.failed("cuStreamSynchronize", "", error))
    }

    fn upload_all(&self, stream: StreamId, uploads: &[Upload]) -> Result<(), DeviceError> {
        self.enter()?;
        let mut copies = Copies::default();
        for Upload { from, to } in uploads.iter().filter(|upload| upload.to.bytes() > 0) {
            self.own("cuMemcpyAsync", to)?;
            if !contains(&self.pinned.lock(), from.0, to.bytes()) {
                let what = format!("{} bytes at {:#x} are not memory it pinned", to.bytes(), from.0);
                return Err(self.unknown("cuMemcpyAsync", what));
            }
            copies.push(to.address().0, from.0, to.bytes());
        }
        let stream = self.stream_of(stream)?;
        // SAFETY: the tables say that all ranges are mapped in this context; with unified addresses the driver knows
        // which is which. That they stay until the copies are done is the caller's duty, see above.
        unsafe { copies.enqueue(stream, self.batches_copies) }
            .map_err(|(call, error)| self.failed(call, &copies.about(), error))
    }

    fn download(&self, from: &Span, to: &mut [u8]) -> Result<(), DeviceError> {
        assert_eq!(from.bytes(), to.len() as u64, "as much as fits `to`");
        self.enter()?;
        if to.is_empty() {
            return Ok(());
        }
        self.own("cuMemcpyDtoH", from)?;
        // SAFETY: `from` is in this device's memory and `to`, borrowed mutably, is as long; the call returns when `to` is written.
        unsafe { result::memcpy_dtoh_sync(to, from.address().0) }
            .map_err(|error| self.failed("cuMemcpyDtoH", &format!("{} bytes", to.len()), error))
    }

    fn assemble(&self, stream: StreamId, launch: &Launch<'_>) -> Result<(), DeviceError> {
        self.enter()?;
        let stream = self.stream_of(stream)?;
        // SAFETY: the stream is of this context. `Launch::new` and `Output::column` checked that the plan's outputs, masks,
        // offsets and the descriptors are as long as the plan says, in spans that the caller keeps until an event behind
        // this has happened; what the sources point to, `describe.rs` encoded from blocks kept the same way.
        unsafe { self.kernels.assemble(stream, launch.plan, launch.fields, launch.sources, launch.anchors) }
            .map_err(|error| match error {
                LaunchError::Driver { call, what, source } => self.failed(call, &what, source),
                other => self.unknown("cuLaunchKernel", other.to_string()),
            })
    }

    fn share(&self, _slots: u32) -> Result<RingShare, DeviceError> {
        Ok(RingShare::default())
    }

    fn ready_event(&self, _ring: &RingShare, _slot: u32) -> Result<(EventId, IpcHandle), DeviceError> {
        self.enter()?;
        self.events.make_shared().map_err(|(call, error)| self.failed(call, "interprocess", error))
    }

    fn open_event(&self, _ring: &RingShare, handle: &IpcHandle) -> Result<EventId, DeviceError> {
        self.enter()?;
        self.events.open(handle).map_err(|(call, error)| self.failed(call, "the client's", error))
    }

    fn export_memory(&self, at: DevicePtr) -> Result<IpcHandle, DeviceError> {
        self.enter()?;
        let bytes = self.allocations.lock().get(&at.0).copied();
        match bytes {
            Some(bytes) if bytes >= LARGE => {}
            found => {
                let what = format!("an allocation of 1 MiB or more is wanted, found {found:?} bytes");
                return Err(self.unknown("cuIpcGetMemHandle", what));
            }
        }
        let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
        // SAFETY: `at` is an allocation of this context; the call writes `handle`, which is its type.
        unsafe { sys::cuIpcGetMemHandle(&raw mut handle, at.0) }
            .result()
            .map_err(|error| self.failed("cuIpcGetMemHandle", "", error))?;
        Ok(to_handle(handle.reserved))
    }

    fn fds(&self, _ring: &RingShare, _at: DevicePtr) -> Result<Vec<OwnedFd>, DeviceError> {
        Ok(Vec::new())
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        let entered = self.context.bind_to_thread();
        for stream in self.streams.get_mut().drain(..) {
            let destroyed = entered.and_then(|()| {
                // SAFETY: `stream()` created it, and nobody else has it; the driver lets its work end first.
                unsafe { result::stream::destroy(stream.0) }
            });
            dropped("cuStreamDestroy", destroyed);
        }
    }
}
