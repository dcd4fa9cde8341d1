//! What the driver's codes and a device's attributes mean for the daemon: lost, out of memory, or refused with a cure.

use std::path::Path;

use cudarc::driver::DriverError;
use cudarc::driver::sys::{CUdevice_attribute as Attribute, CUresult};

use crate::gpu::device::DeviceError;

/// The code's name, as `CUDA_ERROR_ILLEGAL_ADDRESS`.
pub(super) fn name(error: DriverError) -> String {
    error
        .error_name()
        .map_or_else(|_unnamed| format!("{:?}", error.0), |name| name.to_string_lossy().into_owned())
}

/// A failure where nobody is left to tell.
pub(super) fn dropped(call: &'static str, result: Result<(), DriverError>) {
    match result {
        Err(error) if is_lost(error) => tracing::debug!(call, error = name(error), "the device is lost"),
        Err(error) => tracing::warn!(call, error = name(error), "a GPU resource was not given back"),
        Ok(()) => {}
    }
}

/// Whether the context does nothing any more. These stick: every later call says the same.
pub(super) const fn is_lost(error: DriverError) -> bool {
    matches!(
        error.0,
        CUresult::CUDA_ERROR_DEINITIALIZED
            | CUresult::CUDA_ERROR_ECC_UNCORRECTABLE
            | CUresult::CUDA_ERROR_NVLINK_UNCORRECTABLE
            | CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
            | CUresult::CUDA_ERROR_LAUNCH_TIMEOUT
            | CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED
            | CUresult::CUDA_ERROR_ASSERT
            | CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUresult::CUDA_ERROR_MISALIGNED_ADDRESS
            | CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUresult::CUDA_ERROR_INVALID_PC
            | CUresult::CUDA_ERROR_LAUNCH_FAILED
            | CUresult::CUDA_ERROR_MPS_RPC_FAILURE
            | CUresult::CUDA_ERROR_MPS_CLIENT_TERMINATED
            | CUresult::CUDA_ERROR_EXTERNAL_DEVICE
            | CUresult::CUDA_ERROR_UNKNOWN
    )
}

/// Why no context can be had.
pub(super) fn no_context(device: &str, call: &str, error: DriverError) -> DeviceError {
    let cure = match error.0 {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
            "free memory of that GPU (nvidia-smi shows who has it): a context takes about 600 MiB"
        }
        CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE => {
            "another process has it for itself: set compute mode DEFAULT (nvidia-smi -c DEFAULT) or run MPS"
        }
        CUresult::CUDA_ERROR_NO_DEVICE | CUresult::CUDA_ERROR_INVALID_DEVICE => {
            "give the container its GPUs, see CUDA_VISIBLE_DEVICES, or use device \"cpu\""
        }
        CUresult::CUDA_ERROR_OPERATING_SYSTEM => {
            "in a PID namespace of its own the daemon needs a /proc of that namespace (unshare --mount-proc); a container, its \
             /dev/nvidia*"
        }
        CUresult::CUDA_ERROR_SYSTEM_NOT_READY => "start nvidia-fabricmanager, or wait until it is up",
        CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH => {
            "the kernel's module and libcuda.so.1 are of two versions: reboot after the driver's update, or correct the container's"
        }
        CUresult::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE => {
            "take the forward-compatibility libcuda out of the library path: this GPU does not allow it"
        }
        CUresult::CUDA_ERROR_MPS_CONNECTION_FAILED
        | CUresult::CUDA_ERROR_MPS_SERVER_NOT_READY
        | CUresult::CUDA_ERROR_MPS_MAX_CLIENTS_REACHED
        | CUresult::CUDA_ERROR_MPS_MAX_CONNECTIONS_REACHED => {
            "see the control daemon of MPS, or unset CUDA_MPS_PIPE_DIRECTORY"
        }
        _ => "see whether nvidia-smi works as this user, or use device \"cpu\"",
    };
    DeviceError::Unsupported { what: format!("{device}: {call} failed: {}", name(error)), cure }
}

/// What its attributes say against a device, before a context is made of it.
pub(super) fn by_attributes(
    device: &str,
    attribute: impl Fn(Attribute) -> Result<i32, DriverError>,
) -> Option<DeviceError> {
    use Attribute::{
        CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY as MAPS_HOST, CU_DEVICE_ATTRIBUTE_COMPUTE_MODE as MODE,
        CU_DEVICE_ATTRIBUTE_INTEGRATED as INTEGRATED, CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING as UNIFIED,
    };
    let get = |which| attribute(which).map_err(|error| no_context(device, "cuDeviceGetAttribute", error));
    let refused =
        |what: &str, cure| Some(DeviceError::Unsupported { what: format!("{device} {what}"), cure });
    let found = || -> Result<Option<DeviceError>, DeviceError> {
        Ok(match (get(MODE)?, get(INTEGRATED)?, get(UNIFIED)?, get(MAPS_HOST)?) {
            (2, ..) => {
                refused("is in compute mode PROHIBITED", "nvidia-smi -c DEFAULT, or use device \"cpu\"")
            }
            (3, ..) if !mps_runs() => refused(
                "is in compute mode EXCLUSIVE_PROCESS, so that daemon and trainer cannot share it",
                "nvidia-smi -c DEFAULT, or start MPS",
            ),
            (_, 1, ..) => refused(
                "shares its memory with the CPU (Jetson and the like) and has no legacy CUDA IPC",
                "use device \"cpu\": its batches are in the same memory",
            ),
            (_, _, 0, _) | (_, _, _, 0) => {
                refused("has no unified addresses for pinned host memory", "use device \"cpu\"")
            }
            _ => None,
        })
    };
    found().unwrap_or_else(Some)
}

/// Whether MPS's control daemon has its pipe where a client would look for it.
fn mps_runs() -> bool {
    let directory = std::env::var_os("CUDA_MPS_PIPE_DIRECTORY").unwrap_or_else(|| "/tmp/nvidia-mps".into());
    Path::new(&directory).join("control").exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(mode: i32, integrated: i32, unified: i32) -> Option<String> {
        let of = |attribute| {
            Ok(match attribute {
                Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_MODE => mode,
                Attribute::CU_DEVICE_ATTRIBUTE_INTEGRATED => integrated,
                Attribute::CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING => unified,
                _ => 1,
            })
        };
        by_attributes("cuda:0", of).map(|error| error.to_string())
    }

    #[test]
    fn a_device_that_cannot_share_memory_is_refused_with_a_cure() {
        assert_eq!(refusal(0, 0, 1), None);
        assert!(
            refusal(2, 0, 1)
                .is_some_and(|said| said.contains("PROHIBITED") && said.contains("nvidia-smi -c"))
        );
        assert!(refusal(0, 1, 1).is_some_and(|said| said.contains("Jetson") && said.contains("\"cpu\"")));
        assert!(refusal(0, 0, 0).is_some_and(|said| said.contains("unified addresses")));
    }
}
