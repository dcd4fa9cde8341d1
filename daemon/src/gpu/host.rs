//! The GPUs of this host: which there are, which are open, and what each loader has of its own on one.
//!
//! A device is opened when the first loader asks for it (a context costs half a gigabyte of its memory) and stays open.
//! Each has its own thread, stream, tiers and budget; GPUs share nothing but the host's episode store.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use crate::assemblers::Job;
use crate::config::GpuConfig;
use crate::gpu::cuda::{CudaDevice, Found};
use crate::gpu::describe::Recipe;
use crate::gpu::device::{Device, DeviceError, StreamId};
use crate::gpu::ring::{DeviceRing, slot_bytes};
use crate::gpu::sim::{Fault, SimDevice, SimOptions};
use crate::gpu::tiers::{TierCounters, Tiers};
use crate::gpu::worker::{Worker, WorkerCounters};
use crate::host::Memory;
use crate::loader::Loader;
use crate::plan::Plan;
use crossbeam::channel::{Sender, bounded};
use parking_lot::{Mutex, RwLock};
use robocache_wire::spec::{GpuRing, LoaderSpec};

/// Batches made together: a turn at the GPU costs a trainer some 300 us, as much as two dozen batches of a usual size.
const BURST: u32 = 30;
/// Slots beside those of two bursts: a client holds some while it waits, and a burst that needed them would wait for it.
pub const SPARE: u32 = 4;
/// Bursts that wait for a device's thread.
const QUEUE: usize = 64;
/// Most slots of a ring on a GPU that the daemon makes of itself.
const SLOTS: u32 = 256;

/// The GPUs of a daemon.
#[derive(Debug)]
pub struct Gpus {
    config: GpuConfig,
    /// The episode store's budget, which the pinned cache's default is a part of.
    memory: u64,
    open: RwLock<BTreeMap<u32, Arc<Gpu>>>,
    /// Held while one is opened, which takes a while: nobody who only looks waits for that.
    opening: Mutex<()>,
}

/// One open GPU.
#[derive(Debug)]
pub struct Gpu {
    pub device: Arc<dyn Device>,
    /// For what is set up outside the thread, one at a time.
    setup: Mutex<StreamId>,
    queue: Sender<Vec<Job>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    pub tiers: Arc<TierCounters>,
    pub work: Arc<WorkerCounters>,
    /// Batches produced together.
    pub burst: u32,
    ring_bytes: u64,
}

/// What a loader has on its GPU.
#[derive(Debug)]
pub struct GpuLoader {
    pub gpu: Arc<Gpu>,
    pub ring: DeviceRing,
    pub recipe: Recipe,
}

impl Loader {
    /// Its part on a GPU. Panics without one: only loaders for a GPU come to the thread of one.
    pub(super) fn on_gpu(&self) -> &GpuLoader {
        self.gpu.as_ref().expect("only loaders for a GPU come here")
    }
}

/// Why a client cannot have a device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GpuError {
    #[error("device {asked:?}: wanted \"cpu\", \"cuda\", \"cuda:N\" or \"cuda:GPU-...\"")]
    Name { asked: String },
    #[error(
        "this daemon has no GPUs (`gpu.enabled = false`); use device \"cpu\", or switch them on and restart it"
    )]
    Disabled,
    #[error("{asked:?} is not one of this daemon's GPUs, which are {}; {cure}", list(.found))]
    NoSuch { asked: String, found: Vec<Found>, cure: &'static str },
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("cannot start the thread of a GPU")]
    Thread(#[from] std::io::Error),
}

fn list(found: &[Found]) -> String {
    if found.is_empty() {
        return "none".to_owned();
    }
    let line = |found: &Found| format!("{}: {} ({})", found.ordinal, found.name, found.uuid);
    found.iter().map(line).collect::<Vec<_>>().join(", ")
}

/// A device name, taken apart.
enum Asked<'a> {
    Ordinal(u32),
    Uuid(&'a str),
    Simulated(u32),
}

impl Gpus {
    pub fn new(config: GpuConfig, memory: u64) -> Self {
        Self { config, memory, open: RwLock::default(), opening: Mutex::default() }
    }

    /// The devices that are open.
    pub fn open_devices(&self) -> Vec<Arc<Gpu>> {
        self.open.read().values().map(Arc::clone).collect()
    }

    /// The GPU a client asked for, opened if it is the first.
    pub fn get(&self, asked: &str) -> Result<Arc<Gpu>, GpuError> {
        let name = || GpuError::Name { asked: asked.to_owned() };
        let parsed = match asked.split_once(':') {
            None if asked == "cuda" => Asked::Ordinal(0),
            Some(("cuda", uuid)) if uuid.contains('-') => Asked::Uuid(uuid),
            Some(("cuda", number)) => Asked::Ordinal(number.parse().map_err(|_no_number| name())?),
            Some(("sim", number)) => Asked::Simulated(number.parse().map_err(|_no_number| name())?),
            _ => return Err(name()),
        };
        let no_such = |found, cure| GpuError::NoSuch { asked: asked.to_owned(), found, cure };
        let ordinal = match parsed {
            Asked::Simulated(number) if number < self.config.simulate.unwrap_or(0) => number,
            Asked::Simulated(_) => {
                return Err(no_such(Vec::new(), "start it with --simulate-gpus, for tests"));
            }
            _ if !self.config.enabled.unwrap_or(true) => return Err(GpuError::Disabled),
            Asked::Ordinal(number) => number,
            Asked::Uuid(uuid) => {
                let found = CudaDevice::list()?;
                let same = found.iter().find(|found| found.uuid.eq_ignore_ascii_case(uuid));
                let cure = "give the daemon that GPU (CUDA_VISIBLE_DEVICES, or its container's devices)";
                same.ok_or_else(|| no_such(found.clone(), cure))?.ordinal
            }
        };
        let simulated = matches!(parsed, Asked::Simulated(_));
        // A simulated device never takes the number of a real one.
        let key = if simulated { u32::MAX - ordinal } else { ordinal };
        let _opening = self.opening.lock();
        if let Some(gpu) = self.open.read().get(&key) {
            return Ok(Arc::clone(gpu));
        }
        let device: Arc<dyn Device> =
            if simulated { simulated_device(ordinal) } else { CudaDevice::open(ordinal)? };
        let gpu = Gpu::start(device, &self.config, self.memory)?;
        self.open.write().insert(key, Arc::clone(&gpu));
        Ok(gpu)
    }

    /// Ends the threads, once no loader is left.
    pub fn finish(&self) {
        for (_, gpu) in std::mem::take(&mut *self.open.write()) {
            let thread = gpu.thread.lock().take();
            drop(gpu);
            if let Some(thread) = thread
                && thread.join().is_err()
            {
                tracing::error!("the thread of a GPU panicked; this is a bug");
            }
        }
    }
}

/// A simulated device, the first one with the fault that a test may have ordered: `launch=20` or `allocations=2`.
fn simulated_device(ordinal: u32) -> Arc<dyn Device> {
    let device = SimDevice::new(SimOptions { ordinal, ..SimOptions::default() });
    if let (0, Some(ordered)) = (ordinal, std::env::var_os("ROBOCACHE_SIMULATE_FAULT")) {
        let ordered = ordered.to_string_lossy();
        match ordered.split_once('=').map(|(fault, number)| (fault, number.parse())) {
            Some(("launch", Ok(after))) => device.inject(Fault::Launch(after)),
            Some(("allocations", Ok(count))) => device.inject(Fault::Allocations(count)),
            Some(("pins", Ok(count))) => device.inject(Fault::Pins(count)),
            _ => tracing::error!(
                found = %ordered,
                "ROBOCACHE_SIMULATE_FAULT must be launch=N, allocations=N or pins=N; no fault was ordered"
            ),
        }
    }
    device
}

impl Gpu {
    fn start(device: Arc<dyn Device>, config: &GpuConfig, memory: u64) -> Result<Arc<Self>, GpuError> {
        let (free, total) = device.memory()?;
        // A trainer needs the most of a GPU: a quarter of what is free, an eighth of all at most.
        let cache = config.gpu_cache.map_or_else(|| (free / 4).min(total / 8), |bytes| bytes.0);
        let pinned = config
            .pinned_cache
            .map_or_else(|| (memory / 4).min(Memory::now().default_budget()), |bytes| bytes.0);
        let (stream, transfers, setup) = (device.stream()?, device.stream()?, device.stream()?);
        let (tiers, work) = (Arc::new(TierCounters::default()), Arc::new(WorkerCounters::default()));
        let worker = Worker::new(
            &device,
            stream,
            Tiers::new(&device, transfers, cache, pinned, Arc::clone(&tiers)),
            Arc::clone(&work),
        );
        let (queue, bursts) = bounded(QUEUE);
        let facts = device.facts();
        tracing::info!(
            device = facts.name,
            ordinal = facts.ordinal,
            uuid = facts.uuid,
            image = facts.image,
            gpu_cache = cache,
            pinned_cache = pinned,
            "opened a GPU"
        );
        let name = format!("gpu-{}", facts.ordinal);
        let thread = std::thread::Builder::new().name(name).spawn(move || worker.run(&bursts))?;
        let (thread, setup) = (Mutex::new(Some(thread)), Mutex::new(setup));
        let burst = config.burst.map_or(BURST, u32::from);
        let ring_bytes = config.ring.map_or_else(|| (total / 16).min(1 << 30), |bytes| bytes.0);
        Ok(Arc::new(Self { device, setup, queue, thread, tiers, work, burst, ring_bytes }))
    }

    /// Most bytes of one ring.
    pub const fn ring_bytes(&self) -> u64 {
        self.ring_bytes
    }

    /// Slots for a loader: what it asked for, and enough to fill a burst while another one is read, if they fit. Feeds
    /// take so many less [`SPARE`] for two bursts.
    pub fn slots(&self, spec: &LoaderSpec, plan: &Plan) -> u32 {
        let fit = self.ring_bytes / slot_bytes(plan.device_end);
        let deep = self
            .burst
            .saturating_mul(2)
            .saturating_add(SPARE)
            .min(SLOTS)
            .min(u32::try_from(fit).unwrap_or(SLOTS));
        spec.slots.max(deep)
    }

    /// Makes a loader's part on this GPU.
    pub fn loader(
        self: &Arc<Self>,
        plan: &Arc<Plan>,
        slots: u32,
    ) -> Result<(GpuLoader, GpuRing, Vec<OwnedFd>), DeviceError> {
        let (ring, told, fds) = DeviceRing::create(&self.device, slots, plan.device_end)?;
        let setup = self.setup.lock();
        let recipe = Recipe::new(plan, &self.device, *setup)?;
        drop(setup);
        Ok((GpuLoader { gpu: Arc::clone(self), ring, recipe }, told, fds))
    }

    /// Queues a burst; waits while the queue is full. Gives it back if the thread is gone.
    pub fn submit(&self, jobs: Vec<Job>) -> Result<(), Vec<Job>> {
        self.queue.send(jobs).map_err(|refused| refused.0)
    }
}
