//! Launches on the CUDA stream of a caller's, in the context that its library uses.
//!
//! Owns the kernels of this process, loaded once for each device and kept until it ends. What must stay true: a launch
//! neither waits nor allocates nor leaves another context current than it found, so that it can be captured into a
//! CUDA graph and the caller's library notices nothing. Without a driver nothing here is called: [`fuse`] asks first.
#![expect(unsafe_code, reason = "the CUDA driver's interface, on addresses and a stream of the caller's")]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaContext, DriverError, result, sys};
use robocache_kernels::{FusePlan, FuseStream, FuseTargets, Kernels, LaunchError, PlanError};

/// Why nothing was launched.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CudaError {
    #[error("{call} failed (device {device})")]
    Driver { call: &'static str, device: usize, source: DriverError },
    #[error(transparent)]
    Launch(#[from] LaunchError),
    #[error(transparent)]
    Plan(#[from] PlanError),
}

/// By device. The primary contexts are retained with them.
static LOADED: Mutex<BTreeMap<usize, Arc<Kernels>>> = Mutex::new(BTreeMap::new());

/// Enqueues a fusion on `stream`, the number of a `CUstream` of `device`'s primary context.
///
/// The addresses in `streams` and `onto` are those of arrays of the caller's on `device`, as long as their shapes say
/// ([`crate::given::Given`]), and `stream` is the one that its library uses them on. Python cannot prove more, which
/// is why only this package calls it.
pub(crate) fn fuse(
    device: usize,
    stream: u64,
    streams: &[FuseStream],
    onto: FuseTargets,
) -> Result<(), CudaError> {
    if !Kernels::driver_present() {
        return Err(LaunchError::NoDriver.into());
    }
    let failed = |call| move |source| CudaError::Driver { call, device, source };
    result::init().map_err(failed("cuInit"))?;
    let _context = Current::save().map_err(failed("cuCtxGetCurrent"))?;
    let kernels = kernels(device)?;
    let plan = FusePlan::new(streams, onto, kernels.multiprocessors())?;
    let stream = usize::try_from(stream).map_or(std::ptr::null_mut(), std::ptr::without_provenance_mut);
    // SAFETY: stream and addresses are the caller's, as said above; its library frees and reuses memory in the order of
    // that stream. Times that do not ascend choose other rows, but rows of the same arrays.
    unsafe { kernels.fuse(stream, &plan) }?;
    Ok(())
}

/// Those of `device`, loaded by the first who asks.
fn kernels(device: usize) -> Result<Arc<Kernels>, CudaError> {
    // Nothing is changed where a panic could leave it half done.
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(kernels) = loaded.get(&device) {
        return Ok(Arc::clone(kernels));
    }
    let failed = |call| move |source| CudaError::Driver { call, device, source };
    let context = CudaContext::new(device).map_err(failed("cuDevicePrimaryCtxRetain"))?;
    // Loading code is refused while a stream of the thread is captured, unless the thread says that it means it.
    let _mode = Relaxed::enter().map_err(failed("cuThreadExchangeStreamCaptureMode"))?;
    let kernels = Arc::new(Kernels::load(&context)?);
    loaded.insert(device, Arc::clone(&kernels));
    Ok(kernels)
}

/// Puts back the context that was current in this thread: CUDA's runtime derives the current device from it.
struct Current(sys::CUcontext);

impl Current {
    fn save() -> Result<Self, DriverError> {
        Ok(Self(result::ctx::get_current()?.unwrap_or(std::ptr::null_mut())))
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        // SAFETY: it was current in this thread a moment ago, or null, which is none; nobody destroys contexts that
        // are current here meanwhile.
        let restored = unsafe { result::ctx::set_current(self.0) };
        debug_assert!(restored.is_ok(), "cuCtxSetCurrent: {restored:?}");
    }
}

/// This thread's calls may do what a capture would otherwise forbid.
struct Relaxed(sys::CUstreamCaptureMode);

impl Relaxed {
    fn enter() -> Result<Self, DriverError> {
        exchange(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).map(Self)
    }
}

impl Drop for Relaxed {
    fn drop(&mut self) {
        let restored = exchange(self.0);
        debug_assert!(restored.is_ok(), "cuThreadExchangeStreamCaptureMode: {restored:?}");
    }
}

/// Sets the thread's mode, returns the one before.
fn exchange(mut mode: sys::CUstreamCaptureMode) -> Result<sys::CUstreamCaptureMode, DriverError> {
    // SAFETY: the driver is there (`launch` asked); it swaps the thread's mode with the one pointed to.
    unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut mode) }.result()?;
    Ok(mode)
}
