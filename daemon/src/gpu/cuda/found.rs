//! The GPUs that the driver shows this process: what is known of them without making a context.

#![expect(unsafe_code, reason = "the CUDA driver's interface")]

use std::ffi::c_char;
use std::fmt::Write as _;

use cudarc::driver::DriverError;
use cudarc::driver::result;
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUresult};
use robocache_kernels::Kernels;

use super::refusals::{by_attributes, no_context};
use crate::gpu::device::DeviceError;

/// A GPU of this host, of which no context was made.
#[derive(Debug, Clone)]
pub struct Found {
    pub ordinal: u32,
    /// As `nvidia-smi -L` shows it.
    pub uuid: String,
    pub name: String,
    pub memory_bytes: u64,
    /// Major and minor.
    pub compute_capability: (u32, u32),
    /// Why [`super::CudaDevice::open`] would refuse it, as far as that shows from outside.
    pub refused: Option<DeviceError>,
}

impl Found {
    /// The GPUs that the driver shows this process, in its order; none where there are none. Makes no context.
    pub(super) fn list() -> Result<Vec<Self>, DeviceError> {
        if !Kernels::driver_present() {
            return Err(DeviceError::Unsupported {
                what: "no CUDA driver was found (libcuda.so.1)".to_owned(),
                cure: "install NVIDIA's driver, give the container its GPUs, or use device \"cpu\"",
            });
        }
        match result::init() {
            Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)) => return Ok(Vec::new()),
            other => other.map_err(|error| no_context("cuda", "cuInit", error))?,
        }
        let count =
            result::device::get_count().map_err(|error| no_context("cuda", "cuDeviceGetCount", error))?;
        (0..count.unsigned_abs()).map(inspect).collect()
    }
}

/// What is to be known of a GPU without a context. The driver is initialised.
fn inspect(ordinal: u32) -> Result<Found, DeviceError> {
    let label = format!("cuda:{ordinal}");
    let failed = |call| {
        let label = label.clone();
        move |error| no_context(&label, call, error)
    };
    let device = result::device::get(ordinal.cast_signed()).map_err(failed("cuDeviceGet"))?;
    let name = result::device::get_name(device).map_err(failed("cuDeviceGetName"))?;
    // SAFETY: `device` was just had from the driver.
    let memory = unsafe { result::device::total_mem(device) }.map_err(failed("cuDeviceTotalMem"))?;
    let attribute = |which| {
        // SAFETY: as above.
        unsafe { result::device::get_attribute(device, which) }
    };
    let capability = |which| attribute(which).map(i32::unsigned_abs).map_err(failed("cuDeviceGetAttribute"));
    let major = capability(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = capability(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let card = result::device::get_uuid(device).map_err(failed("cuDeviceGetUuid"))?;
    let mut instance = sys::CUuuid { bytes: [0; 16] };
    // SAFETY: it writes the 16 bytes of `instance` and nothing else.
    unsafe { sys::cuDeviceGetUuid_v2(&raw mut instance, device) }
        .result()
        .map_err(failed("cuDeviceGetUuid_v2"))?;
    // The second says the MIG instance's own where there is one, the first the card's.
    let prefix = if instance.bytes != card.bytes || name.contains(" MIG ") { "MIG" } else { "GPU" };
    Ok(Found {
        ordinal,
        uuid: uuid(prefix, instance.bytes),
        name,
        memory_bytes: memory as u64,
        compute_capability: (major, minor),
        refused: by_attributes(&label, attribute),
    })
}

/// As `nvidia-smi -L` writes it.
fn uuid(prefix: &str, bytes: [c_char; 16]) -> String {
    let mut text = prefix.to_owned();
    for (at, byte) in bytes.into_iter().enumerate() {
        if [0, 4, 6, 8, 10].contains(&at) {
            text.push('-');
        }
        // Writing to a string does not fail.
        write!(text, "{:02x}", byte.to_le_bytes()[0]).ok();
    }
    text
}
