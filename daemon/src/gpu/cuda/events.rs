//! Events of one context, by number, so that a number that is none of ours never reaches the driver.
//!
//! An event is destroyed with its last holder: a call that found it in the table has it until it returns. The context is
//! current wherever something here is called.

#![expect(unsafe_code, reason = "the CUDA driver's interface")]

use std::collections::HashMap;
use std::ffi::c_char;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUevent_flags, CUevent_wait_flags, CUresult};
use cudarc::driver::{CudaContext, DriverError};
use parking_lot::RwLock;
use robocache_wire::spec::IpcHandle;

use super::Name;
use super::refusals::dropped;
use crate::gpu::device::{EventId, Progress};

/// The live ones.
#[derive(Debug)]
pub(super) struct Events {
    context: Arc<CudaContext>,
    table: RwLock<Table>,
}

#[derive(Debug, Default)]
struct Table {
    made: u64,
    live: HashMap<u64, Arc<Event>>,
}

/// One event.
#[derive(Debug)]
pub(super) struct Event {
    name: Name<sys::CUevent_st>,
    context: Arc<CudaContext>,
}

/// A call that failed.
pub(super) type Failed = (&'static str, DriverError);

impl Events {
    pub(super) fn new(context: &Arc<CudaContext>) -> Self {
        Self { context: Arc::clone(context), table: RwLock::default() }
    }

    pub(super) fn get(&self, id: EventId) -> Option<Arc<Event>> {
        self.table.read().live.get(&id.0).cloned()
    }

    /// Takes it out of the table. Whether it was there.
    pub(super) fn remove(&self, id: EventId) -> bool {
        let gone = self.table.write().live.remove(&id.0);
        gone.is_some()
    }

    /// An event of this process's own.
    pub(super) fn make(&self, flags: CUevent_flags) -> Result<EventId, Failed> {
        let event = result::event::create(flags).map_err(|error| ("cuEventCreate", error))?;
        Ok(self.keep(event).0)
    }

    /// One that other processes open by what is given back. The driver shares events only if they keep no times.
    pub(super) fn make_shared(&self) -> Result<(EventId, IpcHandle), Failed> {
        let flags =
            CUevent_flags::CU_EVENT_INTERPROCESS as u32 | CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        let mut event = std::ptr::null_mut();
        // SAFETY: it writes `event`, and takes any flags.
        let made = unsafe { sys::cuEventCreate(&raw mut event, flags) }.result();
        made.map_err(|error| ("cuEventCreate", error))?;
        let (id, event) = self.keep(event);
        let mut handle = sys::CUipcEventHandle { reserved: [0; 64] };
        // SAFETY: the event was created just now, for several processes; the call writes `handle`, which is its type.
        let exported = unsafe { sys::cuIpcGetEventHandle(&raw mut handle, event.name.0) }.result();
        if let Err(error) = exported {
            self.remove(id);
            return Err(("cuIpcGetEventHandle", error));
        }
        Ok((id, to_handle(handle.reserved)))
    }

    /// Another process's event. The handle is its word.
    pub(super) fn open(&self, handle: &IpcHandle) -> Result<EventId, Failed> {
        let handle = sys::CUipcEventHandle { reserved: handle.0.map(|byte| c_char::from_le_bytes([byte])) };
        let mut event = std::ptr::null_mut();
        // SAFETY: it takes any 64 bytes, which it checks, and writes `event`.
        let opened = unsafe { sys::cuIpcOpenEventHandle(&raw mut event, handle) }.result();
        opened.map_err(|error| ("cuIpcOpenEventHandle", error))?;
        Ok(self.keep(event).0)
    }

    fn keep(&self, event: sys::CUevent) -> (EventId, Arc<Event>) {
        let event = Arc::new(Event { name: Name(event), context: Arc::clone(&self.context) });
        let mut table = self.table.write();
        table.made += 1;
        let id = table.made;
        table.live.insert(id, Arc::clone(&event));
        (EventId(id), event)
    }
}

impl Event {
    /// # Safety
    ///
    /// `stream` is of this event's context, and alive.
    pub(super) unsafe fn record(&self, stream: sys::CUstream) -> Result<(), DriverError> {
        // SAFETY: the event is alive since it is held; for the stream the caller answers.
        unsafe { result::event::record(self.name.0, stream) }
    }

    /// What is enqueued on `stream` from now on comes after it.
    ///
    /// # Safety
    ///
    /// `stream` is of this event's context, and alive.
    pub(super) unsafe fn hold(&self, stream: sys::CUstream) -> Result<(), DriverError> {
        // SAFETY: as in `record`.
        unsafe { result::stream::wait_event(stream, self.name.0, CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT) }
    }

    pub(super) fn query(&self) -> Result<Progress, DriverError> {
        // SAFETY: the event is alive since it is held.
        match unsafe { result::event::query(self.name.0) } {
            Ok(()) => Ok(Progress::Done),
            Err(DriverError(CUresult::CUDA_ERROR_NOT_READY)) => Ok(Progress::Pending),
            Err(error) => Err(error),
        }
    }

    /// The time since `from`, none if that came later; the driver refuses events that keep none, and those not done.
    pub(super) fn since(&self, from: &Self) -> Result<Duration, DriverError> {
        // SAFETY: both are alive since they are held.
        let ms = unsafe { result::event::elapsed(from.name.0, self.name.0) }?;
        Ok(Duration::from_secs_f32(ms.max(0.0) / 1e3))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let destroyed = self.context.bind_to_thread().and_then(|()| {
            // SAFETY: it was created or opened by this file, which destroys it only here; the driver allows it while
            // work before it is pending.
            unsafe { result::event::destroy(self.name.0) }
        });
        dropped("cuEventDestroy", destroyed);
    }
}

/// The driver's bytes.
pub(super) fn to_handle(bytes: [c_char; 64]) -> IpcHandle {
    IpcHandle(bytes.map(|byte| byte.to_le_bytes()[0]))
}
