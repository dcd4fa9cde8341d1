//! Loads the kernels into a CUDA context and launches them.
//!
//! Owns the modules of one context and the only calls into the driver. What is launched was cut and checked in
//! `device.rs` and `fuse.rs`; whether addresses point to what they should is the caller's word, and the launches are
//! unsafe for it. A launch only enqueues: it neither waits nor allocates, and can be captured into a CUDA graph.

#![expect(unsafe_code, reason = "the CUDA driver's interface")]

use std::ffi::{CString, c_void};
use std::sync::Arc;

use cudarc::driver::{CudaContext, DriverError, result, sys};

use crate::device::{AssemblePlan, DevicePtr, THREADS};
use crate::fuse::{FUSE_STREAMS, FusePlan, TIMES, VALUES};
use crate::images::{Image, Source};

/// Why kernels cannot be loaded or launched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LaunchError {
    #[error(
        "no CUDA driver was found (libcuda.so.1): install NVIDIA's driver, give the container its GPUs, or use \
         device \"cpu\""
    )]
    NoDriver,
    #[error(
        "the GPU has compute capability {major}.{minor}, kernels are built for 8.0 (Ampere) and later; use device \"cpu\""
    )]
    TooOld { major: u32, minor: u32 },
    #[error("the embedded image {image} is damaged: reinstall robocached")]
    Damaged { image: &'static str, source: std::io::Error },
    #[error("{call} failed ({what})")]
    Driver { call: &'static str, what: String, source: DriverError },
}

impl LaunchError {
    fn driver(call: &'static str, what: impl Into<String>) -> impl FnOnce(DriverError) -> Self {
        let what = what.into();
        move |source| Self::Driver { call, what, source }
    }
}

/// The kernels, loaded into one context. Cheap to use from several threads.
#[derive(Debug)]
pub struct Kernels {
    context: Arc<CudaContext>,
    image: &'static str,
    multiprocessors: u32,
    /// Whether a grid may be placed on the chip while the one before it in its stream runs: kernels that wait for that
    /// one themselves, and a driver that knows of it.
    overlaps: bool,
    modules: [sys::CUmodule; 2],
    assemble: sys::CUfunction,
    /// By [`FusePlan`]'s `kernel`.
    resample: Vec<sys::CUfunction>,
}

// SAFETY: module and function handles are the driver's names for things of a context, not memory of this process;
// the driver's interface may be called from any thread, and nothing here changes after `load`.
unsafe impl Send for Kernels {}
// SAFETY: as above; every method takes `&self` and only passes the handles on.
unsafe impl Sync for Kernels {}

impl Kernels {
    /// Whether there is a driver to call. `CudaContext::new` panics where there is none: ask this first.
    pub fn driver_present() -> bool {
        // SAFETY: it only tries to open libcuda, whose initialisers run then as they would in any CUDA program.
        unsafe { sys::is_culib_present() }
    }

    /// Loads the image that the context's device takes.
    pub fn load(context: &Arc<CudaContext>) -> Result<Self, LaunchError> {
        let attribute = |attribute| {
            context
                .attribute(attribute)
                .map(i32::unsigned_abs)
                .map_err(LaunchError::driver("cuDeviceGetAttribute", format!("{attribute:?}")))
        };
        let major = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let multiprocessors = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let image = Image::for_device(major, minor).ok_or(LaunchError::TooOld { major, minor })?;
        context.bind_to_thread().map_err(LaunchError::driver("cuCtxSetCurrent", "before loading kernels"))?;
        let [assembling, resampling] =
            [Source::Assemble, Source::Resample].map(|source| load(&image, source));
        let modules = [assembling?, resampling?];
        let assemble = function(modules[0], "assemble")?;
        let mut resample = Vec::new();
        for (_, value) in VALUES {
            for (_, time) in TIMES {
                for most in FUSE_STREAMS {
                    resample.push(function(modules[1], &format!("resample_{value}_{time}_{most}"))?);
                }
            }
        }
        let overlaps = image.awaits && driver_version()? >= OVERLAP_IN_GRAPHS;
        Ok(Self {
            context: context.clone(),
            image: image.name,
            multiprocessors,
            overlaps,
            modules,
            assemble,
            resample,
        })
    }

    /// The image in use, as `sm_90`.
    pub fn image(&self) -> &'static str {
        self.image
    }

    /// The GPU's, which plans are cut for.
    pub fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    /// Enqueues a whole batch: `plan`'s columns from `sources` at `anchors`.
    ///
    /// `fields` holds [`AssemblePlan::fields`], `sources` `[columns][batch]` encoded streams, `anchors` `[batch]`
    /// encoded anchors, each aligned to 8 bytes.
    ///
    /// # Safety
    ///
    /// Until the work enqueued here is done:
    /// - `stream` is a stream of this context, `fields`, `sources` and `anchors` hold what is said above;
    /// - every address in them is one of this GPU's, aligned to its element, and as long as its shape says: offsets,
    ///   `out` and mask as in [`crate::Column`], data and stamps as in [`crate::DeviceStream`], with the stamps of
    ///   its clock;
    /// - no one else writes any of it, or reads `out` or a mask, except in order after this stream.
    pub unsafe fn assemble(
        &self,
        stream: sys::CUstream,
        plan: &AssemblePlan,
        fields: DevicePtr,
        sources: DevicePtr,
        anchors: DevicePtr,
    ) -> Result<(), LaunchError> {
        let (mut fields, mut sources, mut anchors) = (fields.0, sources.0, anchors.0);
        let (mut n_fields, mut batch) = (plan.n_fields, plan.batch);
        // assemble(fields, n_fields, sources, anchors, batch), as cuda/assemble.cu declares it
        let mut arguments = [
            (&raw mut fields).cast::<c_void>(),
            (&raw mut n_fields).cast(),
            (&raw mut sources).cast(),
            (&raw mut anchors).cast(),
            (&raw mut batch).cast(),
        ];
        // SAFETY: the arguments are the kernel's parameters, in its order, and are read during the call; the plan
        // cut as many blocks as its fields have tiles. The rest is the caller's word, given above.
        unsafe { self.launch(self.assemble, plan.blocks, stream, &mut arguments) }.map_err(
            LaunchError::driver(
                "cuLaunchKernel",
                format!(
                    "assemble, {} columns of {} samples, {} blocks",
                    plan.n_fields, plan.batch, plan.blocks
                ),
            ),
        )
    }

    /// Enqueues a resampling or a fusion.
    ///
    /// # Safety
    ///
    /// Until the work enqueued here is done:
    /// - `stream` is a stream of this context;
    /// - the addresses `plan` was made of are of this GPU, aligned to their elements, and as long as the shapes say,
    ///   `times` ascending in each batch element;
    /// - no one else writes any of it, or reads `out`, except in order after this stream.
    pub unsafe fn fuse(&self, stream: sys::CUstream, plan: &FusePlan) -> Result<(), LaunchError> {
        let [value, time, many] = plan.kernel;
        let function = self.resample[(value * TIMES.len() + time) * FUSE_STREAMS.len() + many];
        let mut arguments = [plan.words.as_ptr().cast_mut().cast::<c_void>()];
        // SAFETY: the kernel's one parameter is a Plan<8> or Plan<80>; `words` was made as long as it, is aligned as
        // it, and is only read, during the call. The rest is the caller's word, given above.
        unsafe { self.launch(function, plan.blocks, stream, &mut arguments) }
            .map_err(LaunchError::driver("cuLaunchKernel", format!("resample, {} blocks", plan.blocks)))
    }

    /// # Safety
    ///
    /// `arguments` point to the parameters of `function`, in order; and as for the kernel's own launcher.
    unsafe fn launch(
        &self,
        function: sys::CUfunction,
        blocks: u32,
        stream: sys::CUstream,
        arguments: &mut [*mut c_void],
    ) -> Result<(), DriverError> {
        self.context.bind_to_thread()?;
        let mut overlap = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: blocks,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: THREADS,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: 0,
            hStream: stream,
            attrs: &raw mut overlap,
            numAttrs: u32::from(self.overlaps),
        };
        // SAFETY: `function` is of a module that lives as long as self; the caller answers for the arguments; the
        // configuration and its attribute live through the call.
        unsafe {
            sys::cuLaunchKernelEx(&raw const config, function, arguments.as_mut_ptr(), std::ptr::null_mut())
        }
        .result()
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        // A context that is gone took its modules with it; then there is nothing to unload.
        if self.context.bind_to_thread().is_ok() {
            for module in self.modules {
                // SAFETY: `load` loaded it, into this context, and no one else has the handle. The driver defers
                // the unloading of code that still runs.
                let unloaded = unsafe { result::module::unload(module) };
                debug_assert!(unloaded.is_ok(), "cuModuleUnload: {unloaded:?}");
            }
        }
    }
}

/// The driver's version that takes an overlapping launch into a captured graph: CUDA 12.3.
const OVERLAP_IN_GRAPHS: i32 = 12_030;

fn driver_version() -> Result<i32, LaunchError> {
    let mut version = 0;
    // SAFETY: it writes the one number.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }
        .result()
        .map_err(LaunchError::driver("cuDriverGetVersion", "before loading kernels"))?;
    Ok(version)
}

fn load(image: &Image, source: Source) -> Result<sys::CUmodule, LaunchError> {
    let bytes = image.unpack(source).map_err(|source| LaunchError::Damaged { image: image.name, source })?;
    // SAFETY: a whole cubin, or PTX that ends in a zero (Image::unpack); the driver copies what it keeps.
    unsafe { result::module::load_data(bytes.as_ptr().cast()) }
        .map_err(LaunchError::driver("cuModuleLoadData", format!("{source:?} kernels, image {}", image.name)))
}

fn function(module: sys::CUmodule, name: &str) -> Result<sys::CUfunction, LaunchError> {
    let c_name = CString::new(name).expect("kernel names hold no zero");
    // SAFETY: the module was just loaded and is alive.
    unsafe { result::module::get_function(module, c_name) }
        .map_err(LaunchError::driver("cuModuleGetFunction", name))
}
