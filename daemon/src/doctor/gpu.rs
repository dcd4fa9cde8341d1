//! The GPUs: driver, what each can do, memory shared between two processes, and how fast pinned memory gets there.
//!
//! Sharing is tried, not guessed: this program starts itself as the other process ([`peer`]). A look takes a context on
//! each GPU for its time, some half a gigabyte of GPU memory.

use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use robocache_wire::spec::IpcHandle;
use serde::{Deserialize, Serialize};

use super::Finding;
use crate::exit::{Exit, Failure};
use crate::gpu::cuda::{CudaDevice, Found, read_shared};
use crate::gpu::device::{Device, DeviceError, Event, Memory, Progress, Span};
use crate::host;
use crate::loader::chain;
use crate::size::Bytes;

/// What is uploaded to see how fast it goes, and how often.
const UPLOAD: (u64, u32) = (64 << 20, 8);
/// Below this a GPU waits for its episodes: half of what PCIe 3.0 x16 brings.
const SLOW: f64 = 6e9;
/// What the other process reads.
const SHARED: u64 = 4096;

/// What the other process is told, on its standard input.
#[derive(Serialize, Deserialize)]
struct Task {
    uuid: String,
    memory: IpcHandle,
    ready: IpcHandle,
}

pub(super) fn findings() -> Vec<Finding> {
    let gpus = match CudaDevice::list() {
        Ok(gpus) => gpus,
        Err(error) => return vec![no_driver(&error)],
    };
    let mut findings = vec![driver(gpus.len())];
    for gpu in &gpus {
        findings.extend(examine(gpu));
    }
    if !gpus.is_empty() {
        findings.push(mps());
    }
    findings
}

fn kernel_module() -> Option<String> {
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").ok()?;
    text.lines().next().map(str::to_owned)
}

fn no_driver(error: &DeviceError) -> Finding {
    let check = "gpu";
    match (host::libcuda(), kernel_module()) {
        (None, None) => Finding::ok(check, "no NVIDIA driver; device cpu is served"),
        (None, Some(module)) => Finding::warn(
            check,
            format!("{module}, but no libcuda.so.1 where the loader looks"),
            "in a container use the NVIDIA runtime (docker run --gpus all), or add its directory to LD_LIBRARY_PATH",
        ),
        (Some(library), _) => Finding::warn(
            check,
            format!("{} is there, but: {}", library.display(), chain(error)),
            "mend the driver (nvidia-smi says what it sees); until then device cpu is served",
        ),
    }
}

fn driver(gpus: usize) -> Finding {
    let module = kernel_module().unwrap_or_else(|| "driver of unknown version".to_owned());
    if gpus == 0 {
        return Finding::warn(
            "gpu",
            format!("{module}; it shows this process no GPU"),
            "see nvidia-smi -L and CUDA_VISIBLE_DEVICES; in a container, docker run --gpus all",
        );
    }
    Finding::ok("gpu", format!("{module}; {gpus} GPU{}", if gpus == 1 { "" } else { "s" }))
}

fn examine(gpu: &Found) -> Vec<Finding> {
    let Found { ordinal, uuid, name, memory_bytes, compute_capability: (major, minor), .. } = gpu;
    let what =
        format!("{ordinal}: {name}, {}, compute capability {major}.{minor}, {uuid}", Bytes(*memory_bytes));
    let refuse = |error: &DeviceError| {
        let cure = "its loaders can use device \"cpu\" meanwhile";
        vec![Finding::warn("gpu-device", format!("{what}: {}", chain(error)), cure)]
    };
    if let Some(error) = &gpu.refused {
        return refuse(error);
    }
    let device = match CudaDevice::open(*ordinal) {
        Ok(device) => device,
        Err(error) => return refuse(&error),
    };
    let image = &device.facts().image;
    let found = match device.memory() {
        Ok((free, _)) => format!("{what}; kernels of {image}; {} free", Bytes(free)),
        Err(error) => return refuse(&error),
    };
    vec![Finding::ok("gpu-device", found), sharing(&device), bandwidth(&device)]
}

/// Memory and an event of ours, opened and read by another process.
fn sharing(device: &Arc<dyn Device>) -> Finding {
    let (check, ordinal) = ("gpu-ipc", device.facts().ordinal);
    let cure = "trainers and daemon must see the same GPU and share PID and IPC namespaces (--pid=host --ipc=host, or one pod)";
    match share(device) {
        Ok(us) => Finding::ok(
            check,
            format!("{ordinal}: another process read our memory behind our event ({us} ms)"),
        ),
        Err(error) => Finding::warn(check, format!("{ordinal}: {error:#}"), cure),
    }
}

fn share(device: &Arc<dyn Device>) -> anyhow::Result<u128> {
    let started = Instant::now();
    let memory = Memory::allocate(device, 2 << 20)?;
    let pattern: Vec<u8> = (0..SHARED).map(|byte| byte.wrapping_mul(31).to_le_bytes()[0]).collect();
    let mut staging = device.pin(SHARED)?;
    staging.write(0, &pattern);
    let (stream, ring) = (device.stream()?, device.share(1)?);
    device.upload(stream, &*staging, 0..SHARED, &Span::whole(&memory).part(0..SHARED))?;
    let (event, ready) = device.ready_event(&ring, 0)?;
    let event = Event::adopt(device, event);
    device.record(event.id(), stream)?;
    device.finish(stream)?;
    anyhow::ensure!(event.query()? == Progress::Done, "an event is not done behind a finished stream");
    let task = Task { uuid: device.facts().uuid.clone(), memory: device.export_memory(memory.at())?, ready };
    let mut child = Command::new(std::env::current_exe()?)
        .args(["doctor", "--gpu-peer"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(&serde_json::to_vec(&task)?)?;
    }
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "the other process failed: {}", said.trim());
    anyhow::ensure!(output.stdout == pattern, "the other process read other bytes than were written");
    Ok(started.elapsed().as_millis())
}

/// What `robocached doctor --gpu-peer` does: the other process of [`sharing`].
///
/// # Errors
///
/// The memory cannot be opened or read, which is what is to be found out.
pub(super) fn peer() -> Result<Exit, Failure> {
    let read = || -> anyhow::Result<()> {
        let task: Task = serde_json::from_reader(std::io::stdin())?;
        let mut bytes = vec![0; usize::try_from(SHARED)?];
        read_shared(&task.uuid, &task.memory, &task.ready, &mut bytes)?;
        std::io::stdout().write_all(&bytes)?;
        Ok(())
    };
    read().map(|()| Exit::Ok).map_err(|error| Failure::new(Exit::Failed, error))
}

fn bandwidth(device: &Arc<dyn Device>) -> Finding {
    let (check, ordinal) = ("gpu-upload", device.facts().ordinal);
    match upload(device) {
        Ok(rate) if rate < SLOW => Finding::warn(
            check,
            format!("{ordinal}: {:.1} GB/s from pinned memory", rate / 1e9),
            "the GPU's link may be narrow or of an old generation: nvidia-smi -q -d PCIE; or the process is far from it: numactl",
        ),
        Ok(rate) => Finding::ok(check, format!("{ordinal}: {:.1} GB/s from pinned memory", rate / 1e9)),
        Err(error) => Finding::warn(
            check,
            format!("{ordinal}: {}", chain(&error)),
            "ulimit -l unlimited, LimitMEMLOCK=infinity, docker --ulimit memlock=-1, or a smaller pinned_cache",
        ),
    }
}

/// Bytes a second from pinned memory to the device.
fn upload(device: &Arc<dyn Device>) -> Result<f64, DeviceError> {
    let (bytes, times) = UPLOAD;
    let (staging, stream) = (device.pin(bytes)?, device.stream()?);
    let span = Span::whole(&Memory::allocate(device, bytes)?);
    device.upload(stream, &*staging, 0..bytes, &span)?;
    device.finish(stream)?;
    let started = Instant::now();
    for _ in 0..times {
        device.upload(stream, &*staging, 0..bytes, &span)?;
    }
    device.finish(stream)?;
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    Ok((bytes * u64::from(times)) as f64 / started.elapsed().as_secs_f64())
}

fn mps() -> Finding {
    let pipes = std::env::var_os("CUDA_MPS_PIPE_DIRECTORY").unwrap_or_else(|| "/tmp/nvidia-mps".into());
    if std::path::Path::new(&pipes).join("control").exists() {
        return Finding::ok("mps", "CUDA MPS runs: the daemon and trainers share GPUs without time slices");
    }
    let mut finding = Finding::ok("mps", "CUDA MPS does not run: processes take turns at a GPU");
    finding.cure =
        Some("worth a try with several trainers on one GPU: nvidia-cuda-mps-control -d".to_owned());
    finding
}
