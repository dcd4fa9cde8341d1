//! A ring in the memory of a CUDA device: opened, fenced and closed through the driver.
//!
//! Owns the opened allocation, the daemon's `ready` events and our `done` events, in the primary context, which torch and
//! all of CUDA's runtime use. What must stay true:
//! - No call leaves another context current than it found, and none waits but [`CudaRing::read`] and closing.
//! - Without a driver nothing is called: [`driver`] asks first, and every way in comes through it.
//! - A forked child calls nothing here: [`crate::gpu::Ring`] sees to it.
#![expect(
    unsafe_code,
    reason = "the CUDA driver's interface, on handles from another process and streams of the caller's"
)]

use std::fmt::Write as _;
use std::thread::ThreadId;

use cudarc::driver::{DriverError, result, sys};
use robocache_wire::spec::{GpuRing, IpcHandle};

use crate::cure::cure;
use crate::error::GpuError;
use crate::gpu::{Closed, DeviceRing, Gpu, Noted, Recorded};

/// A CUDA stream of the device that a batch is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Stream(u64);

impl Stream {
    /// The legacy default stream, which waits for all blocking streams: torch's default one.
    pub const LEGACY: Self = Self(1);
    /// The default stream of the calling thread.
    pub const PER_THREAD: Self = Self(2);

    /// The stream whose `CUstream` (or `cudaStream_t`) has this value; 0 is the legacy default stream.
    ///
    /// # Safety
    ///
    /// - It is a stream, in the primary context of its device, and not destroyed before every batch that was
    ///   [used on](crate::Batch::use_on) it is dropped.
    pub const unsafe fn from_raw(raw: u64) -> Self {
        Self(if raw == 0 { 1 } else { raw })
    }

    /// The value of its `CUstream`.
    pub const fn raw(self) -> u64 {
        self.0
    }

    fn handle(self) -> sys::CUstream {
        // A driver of 64 bits only.
        usize::try_from(self.0).map_or(std::ptr::null_mut(), std::ptr::without_provenance_mut)
    }
}

impl Noted {
    pub(crate) fn new(stream: Stream, thread: ThreadId) -> Self {
        Self { stream, thread: (stream == Stream::PER_THREAD).then_some(thread) }
    }

    /// A stream behind which the noted one's work is done too.
    fn behind(&self, here: ThreadId) -> Stream {
        match self.thread {
            // Another thread's default stream has no name here. It is a blocking one, which the legacy stream waits for.
            Some(thread) if thread != here => Stream::LEGACY,
            _ => self.stream,
        }
    }
}

#[derive(Debug)]
pub(crate) struct CudaRing {
    gpu: Gpu,
    device: sys::CUdevice,
    context: sys::CUcontext,
    base: sys::CUdeviceptr,
    ready: Vec<sys::CUevent>,
    done: Vec<sys::CUevent>,
    /// Joins several streams of the caller's, so that none of them waits for another.
    joining: sys::CUstream,
    /// Copies to the host.
    reading: sys::CUstream,
}

// SAFETY: the handles are the driver's names for things of a context, not memory of this process; the driver's
// interface may be called from any thread, and nothing here changes between opening and closing.
unsafe impl Send for CudaRing {}
// SAFETY: as above; methods that take `&self` only pass the handles on.
unsafe impl Sync for CudaRing {}

/// Opens the daemon's ring; with it the handles of our events, one a slot. On an error nothing stays open.
pub(crate) fn open(ring: &GpuRing) -> Result<(CudaRing, Vec<IpcHandle>), GpuError> {
    driver()?;
    let (ordinal, device) = find(&ring.uuid)?;
    let mut context = std::ptr::null_mut();
    // SAFETY: `device` is one of the driver's; the result goes to a local.
    let retained = unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut context, device) };
    check("cuDevicePrimaryCtxRetain", retained)?;
    let gpu = Gpu { kind: ring.kind, ordinal, uuid: ring.uuid.clone(), name: ring.name.clone() };
    let null = std::ptr::null_mut();
    let mut opened = CudaRing {
        gpu,
        device,
        context,
        base: 0,
        ready: Vec::new(),
        done: Vec::new(),
        joining: null,
        reading: null,
    };
    match opened.fill(ring) {
        Ok(handles) => Ok((opened, handles)),
        Err(error) => {
            opened.close();
            Err(error)
        }
    }
}

impl CudaRing {
    fn fill(&mut self, ring: &GpuRing) -> Result<Vec<IpcHandle>, GpuError> {
        let _entered = self.enter()?;
        let memory = sys::CUipcMemHandle { reserved: ring.memory.0.map(u8::cast_signed) };
        let flags = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        // SAFETY: the context is current; the handle is the peer's word, which the driver checks.
        check("cuIpcOpenMemHandle", unsafe {
            sys::cuIpcOpenMemHandle_v2(&raw mut self.base, memory, flags)
        })?;
        let (mut start, mut bytes) = (0, 0);
        // SAFETY: the context is current and the address was mapped into it above.
        let asked = unsafe { sys::cuMemGetAddressRange_v2(&raw mut start, &raw mut bytes, self.base) };
        check("cuMemGetAddressRange", asked)?;
        let there = (start + bytes as u64).saturating_sub(self.base);
        if there < ring.bytes {
            let what = format!("{} bytes of memory, found {there}", ring.bytes);
            return Err(GpuError::Ring { uuid: self.gpu.uuid.clone(), what });
        }
        for handle in &ring.ready {
            let handle = sys::CUipcEventHandle { reserved: handle.0.map(u8::cast_signed) };
            let mut event = std::ptr::null_mut();
            // SAFETY: as with the memory's handle.
            check("cuIpcOpenEventHandle", unsafe { sys::cuIpcOpenEventHandle(&raw mut event, handle) })?;
            self.ready.push(event);
        }
        let flags = sys::CUevent_flags::CU_EVENT_INTERPROCESS as u32;
        let mut handles = Vec::with_capacity(ring.ready.len());
        for _ in &ring.ready {
            let event = event(flags | sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32)?;
            self.done.push(event);
            let mut handle = sys::CUipcEventHandle { reserved: [0; 64] };
            // SAFETY: an event of the current context, made for this.
            check("cuIpcGetEventHandle", unsafe { sys::cuIpcGetEventHandle(&raw mut handle, event) })?;
            handles.push(IpcHandle(handle.reserved.map(i8::cast_unsigned)));
        }
        for stream in [&raw mut self.joining, &raw mut self.reading] {
            let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
            // SAFETY: the context is current; the result goes to a field of ours.
            check("cuStreamCreate", unsafe { sys::cuStreamCreate(stream, flags) })?;
        }
        Ok(handles)
    }

    /// Makes the context current, and lets this thread do what a capture elsewhere in it would otherwise forbid, until dropped.
    fn enter(&self) -> Result<Entered, GpuError> {
        // SAFETY: the primary context, retained until `close`.
        check("cuCtxPushCurrent", unsafe { sys::cuCtxPushCurrent_v2(self.context) })?;
        let mode = exchange(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).ok();
        Ok(Entered { mode })
    }

    /// Whether `stream` can be waited on and recorded on. The context is current.
    fn capturing(stream: Stream) -> Result<bool, DriverError> {
        let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        // SAFETY: a stream, by the word of `Stream::from_raw`.
        match unsafe { sys::cuStreamIsCapturing(stream.handle(), &raw mut status) }.result() {
            Ok(()) => Ok(status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE),
            // The legacy stream, while a blocking stream is captured.
            Err(DriverError(sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_IMPLICIT)) => Ok(true),
            Err(error) => Err(error),
        }
    }

    fn wait(stream: sys::CUstream, event: sys::CUevent) -> Result<(), DriverError> {
        // SAFETY: the caller's stream (`Stream::from_raw`) or ours, and an event that was opened or made above.
        unsafe { sys::cuStreamWaitEvent(stream, event, 0) }.result()
    }

    fn record(event: sys::CUevent, stream: sys::CUstream) -> Result<(), DriverError> {
        // SAFETY: as in `wait`.
        unsafe { sys::cuEventRecord(event, stream) }.result()
    }

    /// Records `done` behind the work on all of `noted`; where all of it is over, the event says so as it is, and the GPU
    /// is spared a turn of this context. The context is current.
    fn record_behind(&self, done: sys::CUevent, noted: &[Noted]) -> Result<Recorded, DriverError> {
        let here = std::thread::current().id();
        for noted in noted {
            if Self::capturing(noted.behind(here))? {
                return Ok(Recorded::NotNow);
            }
        }
        let mut busy = Vec::new();
        for noted in noted {
            let stream = noted.behind(here);
            if !Self::idle(stream)? {
                busy.push(stream);
            }
        }
        match busy.as_slice() {
            [] => {}
            [only] => Self::record(done, only.handle())?,
            several => {
                for stream in several {
                    let event = Temporary::new()?;
                    Self::record(event.0, stream.handle())?;
                    Self::wait(self.joining, event.0)?;
                }
                Self::record(done, self.joining)?;
            }
        }
        Ok(Recorded::Done)
    }

    /// Whether all that was enqueued on a stream is done. Asks, never waits.
    fn idle(stream: Stream) -> Result<bool, DriverError> {
        // SAFETY: a stream, by the word of `Stream::from_raw`, which is not being captured: the caller asked.
        match unsafe { sys::cuStreamQuery(stream.handle()) } {
            sys::CUresult::CUDA_SUCCESS => Ok(true),
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            other => Err(DriverError(other)),
        }
    }
}

impl DeviceRing for CudaRing {
    fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    fn address(&self, at: u64) -> u64 {
        self.base + at
    }

    fn use_on(&self, slot: usize, stream: Stream, knows: bool) -> Result<(), GpuError> {
        let _entered = self.enter()?;
        if Self::capturing(stream).map_err(|error| failed("cuStreamIsCapturing", error))? {
            return Err(GpuError::Capturing { stream: stream.0 });
        }
        if knows {
            return Ok(());
        }
        let mut context = std::ptr::null_mut();
        // SAFETY: a stream, by the word of `Stream::from_raw`.
        check("cuStreamGetCtx", unsafe { sys::cuStreamGetCtx(stream.handle(), &raw mut context) })?;
        if context != self.context {
            return Err(GpuError::OtherDevice { stream: stream.0, uuid: self.gpu.uuid.clone() });
        }
        let ready = self.ready.get(slot).copied().unwrap_or(std::ptr::null_mut());
        // A slot is published when its batch is made, so the answer is yes, and what is enqueued from here on comes after
        // it. Nothing of it reaches the GPU, where a wait would cost a turn of this context (docs/adr/0007-fences.md).
        // SAFETY: the event was opened in this context and lives as long as self.
        match unsafe { sys::cuEventQuery(ready) } {
            sys::CUresult::CUDA_SUCCESS => Ok(()),
            sys::CUresult::CUDA_ERROR_NOT_READY => {
                Self::wait(stream.handle(), ready).map_err(|error| failed("cuStreamWaitEvent", error))
            }
            other => check("cuEventQuery", other),
        }
    }

    fn record_done(&self, slot: usize, noted: &[Noted]) -> Recorded {
        use sys::CUresult as Code;
        let Some(done) = self.done.get(slot) else { return Recorded::Lost };
        let Ok(_entered) = self.enter() else { return Recorded::Lost };
        match self.record_behind(*done, noted) {
            Ok(recorded) => recorded,
            // A capture begun in between, or a thread in which the driver calls back and may not be called.
            Err(DriverError(Code::CUDA_ERROR_NOT_PERMITTED | Code::CUDA_ERROR_STREAM_CAPTURE_IMPLICIT)) => {
                Recorded::NotNow
            }
            Err(_) => Recorded::Lost,
        }
    }

    fn finish(&self) -> Recorded {
        use sys::CUresult as Code;
        let Ok(_entered) = self.enter() else { return Recorded::Lost };
        // SAFETY: the context is current.
        match unsafe { sys::cuCtxSynchronize() } {
            Code::CUDA_SUCCESS => Recorded::Done,
            Code::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED | Code::CUDA_ERROR_STREAM_CAPTURE_IMPLICIT => {
                Recorded::NotNow
            }
            _ => Recorded::Lost,
        }
    }

    fn read(&self, slot: usize, at: u64, to: &mut [u8]) -> Result<(), GpuError> {
        let _entered = self.enter()?;
        let ready = self.ready.get(slot).copied().unwrap_or(std::ptr::null_mut());
        Self::wait(self.reading, ready).map_err(|error| failed("cuStreamWaitEvent", error))?;
        let from = self.base + at;
        // SAFETY: `to` is borrowed until the copy is over, below, and as long as is said; the caller proved that `at` and
        // its length lie in the allocation, which is open as long as `self`.
        let copied =
            unsafe { sys::cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from, to.len(), self.reading) };
        // SAFETY: our own stream.
        let waited = unsafe { sys::cuStreamSynchronize(self.reading) };
        check("cuMemcpyDtoHAsync", copied)?;
        check("cuStreamSynchronize", waited)
    }

    fn close(&self) -> Closed {
        let Ok(entered) = self.enter() else { return Closed::Left };
        for event in &self.done {
            // What was enqueued on the memory must be over before it is unmapped. Where that cannot be known (in a thread
            // that the driver calls back, say, or after a fault) all stays as it is until the process ends.
            // SAFETY: an event of ours; one that was never recorded is done.
            if unsafe { sys::cuEventSynchronize(*event) }.result().is_err() {
                return Closed::Left;
            }
        }
        let mut closed = Closed::All;
        let mut also = |result: sys::CUresult| {
            if result.result().is_err() {
                closed = Closed::Left;
            }
        };
        if self.base != 0 {
            // SAFETY: opened by us, closed once: `close` is called once, and the slots' batches are gone by then.
            also(unsafe { sys::cuIpcCloseMemHandle(self.base) });
        }
        for event in self.ready.iter().chain(&self.done) {
            // SAFETY: opened or made by us, destroyed once.
            also(unsafe { sys::cuEventDestroy_v2(*event) });
        }
        for stream in [self.joining, self.reading] {
            if !stream.is_null() {
                // SAFETY: made by us, destroyed once.
                also(unsafe { sys::cuStreamDestroy_v2(stream) });
            }
        }
        drop(entered);
        // SAFETY: retained once by us, and released once.
        also(unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) });
        closed
    }
}

/// Puts back what was current in this thread, and its way with captures.
struct Entered {
    mode: Option<sys::CUstreamCaptureMode>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        if let Some(mode) = self.mode {
            exchange(mode).ok();
        }
        let mut popped = std::ptr::null_mut();
        // SAFETY: pushed by this thread when `self` was made; what others pushed since, they popped.
        let result = unsafe { sys::cuCtxPopCurrent_v2(&raw mut popped) };
        // It fails when the process is about to end and the driver has gone already.
        result.result().ok();
    }
}

/// Sets the thread's mode, returns the one before.
fn exchange(mut mode: sys::CUstreamCaptureMode) -> Result<sys::CUstreamCaptureMode, DriverError> {
    // SAFETY: the driver is there; it swaps the thread's mode with the one pointed to.
    unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut mode) }.result()?;
    Ok(mode)
}

/// An event for one join: destroyed when dropped, which the driver puts off until it happened.
struct Temporary(sys::CUevent);

impl Temporary {
    fn new() -> Result<Self, DriverError> {
        let mut event = std::ptr::null_mut();
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: the result goes to a local; the context is current.
        unsafe { sys::cuEventCreate(&raw mut event, flags) }.result()?;
        Ok(Self(event))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // SAFETY: made by us, destroyed once.
        let result = unsafe { sys::cuEventDestroy_v2(self.0) };
        result.result().ok();
    }
}

fn event(flags: u32) -> Result<sys::CUevent, GpuError> {
    let mut event = std::ptr::null_mut();
    // SAFETY: the result goes to a local; the caller made a context current.
    check("cuEventCreate", unsafe { sys::cuEventCreate(&raw mut event, flags) })?;
    Ok(event)
}

/// The driver is there and ready.
fn driver() -> Result<(), GpuError> {
    // SAFETY: it only tries to open libcuda, whose initialisers run then as they would in any CUDA program.
    if !unsafe { sys::is_culib_present() } {
        return Err(GpuError::NoDriver);
    }
    // SAFETY: the library is there.
    match unsafe { sys::cuInit(0) }.result() {
        Ok(()) => Ok(()),
        // What the driver says in a child of a process that had called it.
        Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_INITIALIZED)) => Err(GpuError::Forked),
        Err(error) => Err(failed("cuInit", error)),
    }
}

/// The UUIDs of the devices that this process sees, by number.
pub(crate) fn uuids() -> Result<Vec<String>, GpuError> {
    driver()?;
    devices()?.into_iter().map(uuid).collect()
}

fn devices() -> Result<Vec<sys::CUdevice>, GpuError> {
    let mut count = 0;
    // SAFETY: the driver is ready; the result goes to a local.
    check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&raw mut count) })?;
    let mut devices = Vec::new();
    for ordinal in 0..count {
        let mut device = 0;
        // SAFETY: as above.
        check("cuDeviceGet", unsafe { sys::cuDeviceGet(&raw mut device, ordinal) })?;
        devices.push(device);
    }
    Ok(devices)
}

/// As `nvidia-smi -L` shows it.
fn uuid(device: sys::CUdevice) -> Result<String, GpuError> {
    let mut uuid = sys::CUuuid { bytes: [0; 16] };
    // SAFETY: a device of the driver's; the result goes to a local.
    check("cuDeviceGetUuid_v2", unsafe { sys::cuDeviceGetUuid_v2(&raw mut uuid, device) })?;
    let mut card = sys::CUuuid { bytes: [0; 16] };
    // SAFETY: as above.
    check("cuDeviceGetUuid", unsafe { sys::cuDeviceGetUuid(&raw mut card, device) })?;
    let name = result::device::get_name(device).map_err(|error| failed("cuDeviceGetName", error))?;
    // The first says an instance of MIG's own where there is one, the second its card's.
    let instance = uuid.bytes != card.bytes || name.contains(" MIG ");
    let mut text = if instance { "MIG" } else { "GPU" }.to_owned();
    for (i, byte) in uuid.bytes.into_iter().map(i8::cast_unsigned).enumerate() {
        let dash = if matches!(i, 0 | 4 | 6 | 8 | 10) { "-" } else { "" };
        // Writing to a String cannot fail.
        write!(text, "{dash}{byte:02x}").ok();
    }
    Ok(text)
}

/// The number of the device that is current in this thread, if one is.
pub(crate) fn current() -> Option<u32> {
    driver().ok()?;
    let mut device = 0;
    // SAFETY: the driver is ready; without a context it says so.
    unsafe { sys::cuCtxGetDevice(&raw mut device) }.result().ok()?;
    let devices = devices().ok()?;
    u32::try_from(devices.iter().position(|known| *known == device)?).ok()
}

/// The device with this UUID, and its number in this process.
fn find(wanted: &str) -> Result<(u32, sys::CUdevice), GpuError> {
    let mut seen = Vec::new();
    for (ordinal, device) in (0..).zip(devices()?) {
        let uuid = uuid(device)?;
        if crate::gpu::same(&uuid, wanted) {
            return Ok((ordinal, device));
        }
        seen.push(uuid);
    }
    Err(GpuError::NotVisible { wanted: wanted.to_owned(), seen })
}

fn check(call: &'static str, result: sys::CUresult) -> Result<(), GpuError> {
    result.result().map_err(|error| failed(call, error))
}

fn failed(call: &'static str, error: DriverError) -> GpuError {
    let name = error
        .error_name()
        .map_or_else(|_| format!("{:?}", error.0), |name| name.to_string_lossy().into_owned());
    let what = error
        .error_string()
        .map_or_else(|_| name.clone(), |text| format!("{} ({name})", text.to_string_lossy()));
    GpuError::Call { call, what, cure: cure(call, error.0).to_owned() }
}
