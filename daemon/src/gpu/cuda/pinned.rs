//! Pinned host memory: mapped, touched by several threads, then registered, which is a tenth of the time that allocating it
//! pinned takes (600 ms a gibibyte on an H100's host).

#![expect(unsafe_code, reason = "the CUDA driver's interface")]

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::{CudaContext, DriverError, sys};
use memmap2::{Advice, MmapMut};
use parking_lot::Mutex;
use robocache_kernels::DevicePtr;

use super::refusals::dropped;
use crate::gpu::device::Pinned;

/// What one thread touches of a new mapping.
const TOUCH_BYTES: usize = 64 << 20;
/// Threads that touch it, at most.
const TOUCH_THREADS: usize = 8;

/// Who has no memory to pin.
pub(super) enum PinError {
    Host(String),
    Driver(&'static str, DriverError),
}

/// Host memory that was mapped, touched and registered.
#[derive(Debug)]
pub(super) struct CudaPinned {
    mapping: MmapMut,
    /// Byte 0, for the device.
    at: u64,
    context: Arc<CudaContext>,
    table: Arc<Mutex<BTreeMap<u64, u64>>>,
}

impl CudaPinned {
    /// `bytes` bytes, noted in `table` as long as they live. The context is current.
    pub(super) fn new(
        context: &Arc<CudaContext>,
        table: &Arc<Mutex<BTreeMap<u64, u64>>>,
        bytes: u64,
    ) -> Result<Self, PinError> {
        let host = |call: &str, error: &dyn std::fmt::Display| PinError::Host(format!("{call}: {error}"));
        let size = usize::try_from(bytes).map_err(|error| host("addresses", &error))?;
        let mut mapping = MmapMut::map_anon(size).map_err(|error| host("mmap", &error))?;
        if let Err(error) = mapping.advise(Advice::HugePage) {
            tracing::debug!(%error, "no huge pages for pinned memory");
        }
        touch(&mut mapping).map_err(|error| host("a thread to touch it", &error))?;
        let start = mapping.as_mut_ptr().cast::<c_void>();
        let flags = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP;
        // SAFETY: the mapping is this long and anonymous, and `drop` unregisters it before it is unmapped.
        unsafe { sys::cuMemHostRegister_v2(start, size, flags) }
            .result()
            .map_err(|error| PinError::Driver("cuMemHostRegister", error))?;
        // From here on dropping it unregisters.
        let mut pinned = Self { mapping, at: 0, context: Arc::clone(context), table: Arc::clone(table) };
        // SAFETY: `start` was registered with DEVICEMAP just now; the address is written to `pinned.at`.
        unsafe { sys::cuMemHostGetDevicePointer_v2(&raw mut pinned.at, start, 0) }
            .result()
            .map_err(|error| PinError::Driver("cuMemHostGetDevicePointer", error))?;
        pinned.table.lock().insert(pinned.at, size as u64);
        Ok(pinned)
    }
}

impl Pinned for CudaPinned {
    fn bytes(&self) -> u64 {
        self.mapping.len() as u64
    }

    fn address(&self) -> DevicePtr {
        DevicePtr(self.at)
    }

    fn write(&mut self, offset: u64, from: &[u8]) {
        let start = usize::try_from(offset).expect("inside a mapping");
        self.mapping[start..][..from.len()].copy_from_slice(from);
    }
}

impl Drop for CudaPinned {
    fn drop(&mut self) {
        self.table.lock().remove(&self.at);
        let start = self.mapping.as_mut_ptr().cast::<c_void>();
        let gone = self.context.bind_to_thread().and_then(|()| {
            // SAFETY: `new` registered it, and only this unregisters it, before the mapping goes.
            unsafe { sys::cuMemHostUnregister(start) }.result()
        });
        dropped("cuMemHostUnregister", gone);
    }
}

/// Makes the kernel give it all its pages, by several threads: registering would do it by one.
fn touch(mapping: &mut [u8]) -> std::io::Result<()> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(TOUCH_THREADS);
    let share = mapping.len().div_ceil(threads).max(TOUCH_BYTES);
    let touch = |part: &mut [u8]| part.iter_mut().step_by(4096).for_each(|byte| *byte = 0);
    if mapping.len() <= share {
        touch(mapping);
        return Ok(());
    }
    std::thread::scope(|scope| {
        mapping.chunks_mut(share).try_for_each(|part| {
            std::thread::Builder::new()
                .name("pin".to_owned())
                .spawn_scoped(scope, move || touch(part))
                .map(drop)
        })
    })
}
