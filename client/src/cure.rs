//! What usually helps when CUDA's driver refuses: by the call and its code, for the end of an error's message.

use cudarc::driver::sys;

/// What usually helps; empty where that is not known.
pub(crate) fn cure(call: &str, code: sys::CUresult) -> &'static str {
    use sys::CUresult as Code;
    match (call, code) {
        (_, Code::CUDA_ERROR_NO_DEVICE) => {
            "The driver shows no GPU to this process: look at CUDA_VISIBLE_DEVICES and at the GPUs that the container was given"
        }
        (_, Code::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH | Code::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE) => {
            "libcuda and the kernel's driver differ: reboot after a driver upgrade, or give the container the host's libcuda"
        }
        (_, Code::CUDA_ERROR_OPERATING_SYSTEM) => {
            "Linux refused the driver something: a process in a PID namespace of its own needs a /proc of that namespace (unshare \
             --mount-proc), and a container its /dev/nvidia* and shared memory"
        }
        (_, Code::CUDA_ERROR_SYSTEM_NOT_READY) => {
            "The system is not ready: start nvidia-fabricmanager (NVSwitch hosts)"
        }
        (_, Code::CUDA_ERROR_OUT_OF_MEMORY) => {
            "The GPU's memory is full; a process needs some 500 MB for its context: see nvidia-smi"
        }
        ("cuDevicePrimaryCtxRetain", Code::CUDA_ERROR_DEVICE_UNAVAILABLE) => {
            "The GPU is in exclusive mode and another process has it: nvidia-smi -c DEFAULT, or run MPS"
        }
        (_, Code::CUDA_ERROR_MPS_CONNECTION_FAILED | Code::CUDA_ERROR_MPS_SERVER_NOT_READY) => {
            "The daemon and its clients must use the same MPS server (CUDA_MPS_PIPE_DIRECTORY), or none of them any"
        }
        (
            "cuIpcOpenMemHandle" | "cuIpcOpenEventHandle" | "cuIpcGetEventHandle",
            Code::CUDA_ERROR_NOT_SUPPORTED,
        ) => {
            "This device has no CUDA IPC (Jetson, or another instance of MIG): use device \"cpu\", or the same MIG instance"
        }
        ("cuIpcOpenMemHandle" | "cuIpcOpenEventHandle", _) => {
            "CUDA IPC needs the daemon and this process in one PID and one IPC namespace (containers: --pid=host --ipc=host, \
             or the same pod), under one user, and both or neither under MPS"
        }
        _ => "",
    }
}
