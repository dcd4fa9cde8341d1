//! What a client's process does with shared GPU memory, in one go: for `doctor`, which starts itself as such a process.

#![expect(unsafe_code, reason = "the CUDA driver's interface")]

use std::ffi::c_char;

use cudarc::driver::sys::{self, CUevent_wait_flags, CUipcEventHandle, CUipcMemHandle};
use cudarc::driver::{CudaContext, DriverError, result};
use robocache_wire::spec::IpcHandle;

use super::found::Found;
use super::refusals::{name, no_context};
use crate::gpu::device::DeviceError;

/// Opens `memory` and `ready` of another process on the device `uuid`, waits for the event on the default stream, and
/// reads the first bytes of the memory.
pub fn read_shared(
    uuid: &str,
    memory: &IpcHandle,
    ready: &IpcHandle,
    to: &mut [u8],
) -> Result<(), DeviceError> {
    let found = Found::list()?.into_iter().find(|found| found.uuid == uuid).ok_or_else(|| {
        let what = format!("{uuid} is not among the GPUs that the other process sees");
        DeviceError::Unsupported { what, cure: "give both the same CUDA_VISIBLE_DEVICES" }
    })?;
    let label = format!("cuda:{}", found.ordinal);
    let context = CudaContext::new(found.ordinal as usize)
        .map_err(|error| no_context(&label, "cuDevicePrimaryCtxRetain", error))?;
    let failed = |call: &'static str| {
        let device = label.clone();
        move |error: DriverError| DeviceError::Call { device, call, what: name(error) }
    };
    context.bind_to_thread().map_err(failed("cuCtxSetCurrent"))?;
    let signed = |handle: &IpcHandle| handle.0.map(|byte| c_char::from_le_bytes([byte]));
    let mut at = 0;
    let flags = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
    // SAFETY: the handle is 64 bytes that the driver checks; it writes an address to `at` and nothing else.
    unsafe { sys::cuIpcOpenMemHandle_v2(&raw mut at, CUipcMemHandle { reserved: signed(memory) }, flags) }
        .result()
        .map_err(failed("cuIpcOpenMemHandle"))?;
    let mut event = std::ptr::null_mut();
    // SAFETY: as above, an event's name.
    unsafe { sys::cuIpcOpenEventHandle(&raw mut event, CUipcEventHandle { reserved: signed(ready) }) }
        .result()
        .map_err(failed("cuIpcOpenEventHandle"))?;
    let waits = CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
    // SAFETY: the null stream is this context's default one, and the event was just opened in it.
    unsafe { result::stream::wait_event(std::ptr::null_mut(), event, waits) }
        .map_err(failed("cuStreamWaitEvent"))?;
    // SAFETY: `at` was just opened and is at least as long as `to`: doctor exports a whole page and asks for less. The
    // copy is over when the call returns, and the default stream's wait comes before it.
    unsafe { result::memcpy_dtoh_sync(to, at) }.map_err(failed("cuMemcpyDtoH"))?;
    // SAFETY: opened above, used by nothing any more.
    unsafe { result::event::destroy(event) }.map_err(failed("cuEventDestroy"))?;
    // SAFETY: as above.
    unsafe { sys::cuIpcCloseMemHandle(at) }.result().map_err(failed("cuIpcCloseMemHandle"))
}
