//! The device under test, and what tests put on it.

use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::{Duration, Instant};

use robocached::gpu::cuda::CudaDevice;
use robocached::gpu::device::{Device, DeviceError, Event, Memory, Pinned, Progress, Span, StreamId};
use robocached::gpu::sim::{SimDevice, SimOptions};

/// A test that waits this long for a device hangs.
const HANGS: Duration = Duration::from_secs(60);

/// What `ROBOCACHE_TEST_DEVICE` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Under {
    Simulation,
    Cuda(u32),
}

pub(crate) fn under() -> Under {
    match std::env::var("ROBOCACHE_TEST_DEVICE") {
        Err(_unset) => Under::Simulation,
        Ok(name) => match name.strip_prefix("cuda:").map(str::parse) {
            Some(Ok(ordinal)) => Under::Cuda(ordinal),
            _ if name.starts_with("sim") => Under::Simulation,
            _ => panic!("ROBOCACHE_TEST_DEVICE is {name:?}, wanted cuda:N or sim"),
        },
    }
}

/// A device and a stream of a test's own. Keep it until everything else of the test is gone.
#[derive(Debug, Clone)]
pub(crate) struct Bench {
    pub(crate) device: Arc<dyn Device>,
    pub(crate) stream: StreamId,
    _turn: Option<Arc<Turn>>,
}

/// One test at a time on the GPU: they share its context, where one test's freeing of memory waits for another's stream
/// that waits for what that test does next.
#[derive(Debug)]
struct Turn;

static BUSY: (Mutex<bool>, Condvar) = (Mutex::new(false), Condvar::new());

impl Turn {
    fn take() -> Self {
        let busy = BUSY.0.lock().unwrap();
        *BUSY.1.wait_while(busy, |busy| *busy).unwrap() = true;
        Self
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        *BUSY.0.lock().unwrap() = false;
        BUSY.1.notify_one();
    }
}

impl Bench {
    /// On a new simulated device, or on the GPU, which all tests share.
    pub(crate) fn new() -> Self {
        static GPU: OnceLock<Arc<dyn Device>> = OnceLock::new();
        match under() {
            Under::Simulation => Self::on(SimDevice::new(SimOptions::default())),
            Under::Cuda(ordinal) => {
                let turn = Turn::take();
                let device = Arc::clone(GPU.get_or_init(|| CudaDevice::open(ordinal).unwrap()));
                Self { _turn: Some(Arc::new(turn)), ..Self::on(device) }
            }
        }
    }

    /// The same, but a GPU's driver is taken for one of CUDA 12.1.
    pub(crate) fn with_old_driver() -> Self {
        match under() {
            Under::Simulation => Self::new(),
            Under::Cuda(ordinal) => {
                let turn = Turn::take();
                let device = CudaDevice::open_as(ordinal, 12_010).unwrap();
                Self { _turn: Some(Arc::new(turn)), ..Self::on(device) }
            }
        }
    }

    pub(crate) fn on(device: Arc<dyn Device>) -> Self {
        let stream = device.stream().unwrap();
        Self { device, stream, _turn: None }
    }

    /// So many bytes that moving them takes a while.
    pub(crate) fn large() -> u64 {
        if under() == Under::Simulation { 1 << 20 } else { 256 << 20 }
    }

    pub(crate) fn pinned(&self, bytes: &[u8]) -> Box<dyn Pinned> {
        let mut pinned = self.device.pin(bytes.len() as u64).unwrap();
        pinned.write(0, bytes);
        pinned
    }

    pub(crate) fn memory(&self, bytes: u64) -> Span {
        Span::whole(&Memory::allocate(&self.device, bytes).unwrap())
    }

    pub(crate) fn upload(&self, stream: StreamId, from: &dyn Pinned, to: &Span) {
        self.device.upload(stream, from, 0..to.bytes(), to).unwrap();
    }

    /// These bytes on the device, now.
    pub(crate) fn put(&self, bytes: &[u8]) -> Span {
        let span = self.memory(bytes.len().max(1) as u64);
        let pinned = self.pinned(bytes);
        self.upload(self.stream, &*pinned, &span.part(0..bytes.len() as u64));
        self.device.finish(self.stream).unwrap();
        span
    }

    pub(crate) fn get(&self, span: &Span) -> Vec<u8> {
        let mut bytes = vec![0xee; usize::try_from(span.bytes()).unwrap()];
        self.device.download(span, &mut bytes).unwrap();
        bytes
    }

    pub(crate) fn event(&self) -> Event {
        Event::new(&self.device).unwrap()
    }

    /// Until another stream did more than one that was not held up would have done by then, most likely.
    pub(crate) fn let_pass(&self) {
        let (stream, event) = (self.device.stream().unwrap(), self.event());
        for _ in 0..50 {
            self.record(&event, stream);
        }
        self.device.finish(stream).unwrap();
    }

    pub(crate) fn record(&self, event: &Event, stream: StreamId) {
        self.device.record(event.id(), stream).unwrap();
    }
}

/// Asks until it is so.
pub(crate) fn until(what: &str, mut so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !so() {
        assert!(start.elapsed() < HANGS, "{what}: not after {HANGS:?}");
        std::thread::yield_now();
    }
}

pub(crate) fn until_done(event: &Event) {
    until("an event", || event.query().unwrap() == Progress::Done);
}

/// The device is lost, and says why.
pub(crate) fn lost<T: std::fmt::Debug>(result: Result<T, DeviceError>) -> String {
    match result {
        Err(DeviceError::Lost { what, .. }) => what,
        other => panic!("wanted a lost device, found {other:?}"),
    }
}
