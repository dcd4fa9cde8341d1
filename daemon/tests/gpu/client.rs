//! The other process: this executable, started again by a test, which opens a ring and does as it is told.
//!
//! One JSON value a line over a Unix socket. On a simulated device it opens memfds, through their `/proc` names; on CUDA it
//! calls the driver, with handles and in a context of its own.

#![expect(unsafe_code, reason = "a client's side of CUDA IPC, in the driver's interface")]

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use cudarc::driver::result::{self, stream::StreamKind};
use cudarc::driver::{CudaContext, sys};
use robocache_wire::sim::{self, Events, Region};
use robocache_wire::spec::{GpuKind, GpuRing, IpcHandle};
use serde::{Deserialize, Serialize};

/// Names the socket to whoever shall play the client.
const SOCKET: &str = "ROBOCACHE_TEST_CLIENT";

#[derive(Debug, Serialize, Deserialize)]
enum Order {
    /// Open a ring, made of these files where it is simulated.
    Open {
        ring: GpuRing,
        ordinal: u32,
        files: Vec<String>,
    },
    /// Wait for the slot's `ready`, on a stream, and read it.
    Read {
        slot: usize,
    },
    /// Begin work that takes long, and record the slot's `done` behind it.
    Begin {
        slot: usize,
    },
    /// End the work that does not end by itself.
    End,
    Close,
}

#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Opened(Vec<IpcHandle>),
    Bytes(Vec<u8>),
    Did,
}

/// A process that plays the client. Killed when dropped.
#[derive(Debug)]
pub(crate) struct Client {
    child: Child,
    socket: BufReader<UnixStream>,
}

impl Client {
    pub(crate) fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("client");
        let listener = UnixListener::bind(&path).unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["client::plays_the_client", "--exact", "--ignored", "--nocapture"]).env(SOCKET, &path);
        let child = command.stdout(Stdio::null()).spawn().unwrap();
        let (socket, _) = listener.accept().unwrap();
        Self { child, socket: BufReader::new(socket) }
    }

    fn ask(&mut self, order: &Order) -> Answer {
        let mut line = serde_json::to_string(order).unwrap();
        line.push('\n');
        self.socket.get_mut().write_all(line.as_bytes()).unwrap();
        let mut answer = String::new();
        self.socket.read_line(&mut answer).unwrap();
        serde_json::from_str(&answer)
            .unwrap_or_else(|error| panic!("{order:?} was answered {answer:?}: {error}"))
    }

    /// Its handles.
    pub(crate) fn open(&mut self, ring: GpuRing, ordinal: u32, fds: &[OwnedFd]) -> Vec<IpcHandle> {
        let us = std::process::id();
        let files = fds.iter().map(|fd| format!("/proc/{us}/fd/{}", fd.as_raw_fd())).collect();
        match self.ask(&Order::Open { ring, ordinal, files }) {
            Answer::Opened(handles) => handles,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn read(&mut self, slot: usize) -> Vec<u8> {
        match self.ask(&Order::Read { slot }) {
            Answer::Bytes(bytes) => bytes,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn begin(&mut self, slot: usize) {
        assert!(matches!(self.ask(&Order::Begin { slot }), Answer::Did));
    }

    pub(crate) fn end(&mut self) {
        assert!(matches!(self.ask(&Order::End), Answer::Did));
    }

    pub(crate) fn close(&mut self) {
        assert!(matches!(self.ask(&Order::Close), Answer::Did));
    }

    /// `kill -9`, and until it is gone.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.kill();
    }
}

#[test]
#[ignore = "the other tests start it"]
fn plays_the_client() {
    let path = std::env::var_os(SOCKET).expect("started by a test");
    let socket = UnixStream::connect(path).unwrap();
    let mut answers = socket.try_clone().unwrap();
    let mut ring: Option<Box<dyn Ring>> = None;
    for line in BufReader::new(socket).lines() {
        // The test is gone: so is whatever it wanted.
        let Ok(line) = line else { return };
        let answer = match serde_json::from_str(&line).unwrap() {
            Order::Open { ring: told, ordinal, files } => {
                let (new, handles): (Box<dyn Ring>, _) = match told.kind {
                    GpuKind::Sim => SimRing::open(told, &files),
                    GpuKind::Cuda => CudaRing::open(told, ordinal),
                };
                ring = Some(new);
                Answer::Opened(handles)
            }
            Order::Read { slot } => Answer::Bytes(opened(&mut ring).read(slot)),
            Order::Begin { slot } => {
                opened(&mut ring).begin(slot);
                Answer::Did
            }
            Order::End => {
                opened(&mut ring).end();
                Answer::Did
            }
            Order::Close => {
                ring = None;
                Answer::Did
            }
        };
        let mut line = serde_json::to_string(&answer).unwrap();
        line.push('\n');
        answers.write_all(line.as_bytes()).unwrap();
    }
}

fn opened(ring: &mut Option<Box<dyn Ring>>) -> &mut dyn Ring {
    ring.as_deref_mut().expect("a ring is opened first")
}

/// A ring on the client's side.
trait Ring {
    fn read(&mut self, slot: usize) -> Vec<u8>;
    fn begin(&mut self, slot: usize);
    fn end(&mut self);
}

struct SimRing {
    told: GpuRing,
    memory: Region,
    events: Events,
    /// Records whose work goes on.
    begun: Vec<(u64, u64)>,
}

impl SimRing {
    fn open(told: GpuRing, files: &[String]) -> (Box<dyn Ring>, Vec<IpcHandle>) {
        let file = |at: usize| {
            let file = std::fs::File::options().read(true).write(true).open(&files[at]).unwrap();
            OwnedFd::from(file)
        };
        let memory = Region::open("memory", file(0)).unwrap();
        let events = Events::open(file(1)).unwrap();
        let slots = told.ready.len() as u64;
        let handles = (slots..2 * slots).map(sim::handle).collect();
        (Box::new(Self { told, memory, events, begun: Vec::new() }), handles)
    }
}

impl Ring for SimRing {
    fn read(&mut self, slot: usize) -> Vec<u8> {
        let ready = sim::number(&self.told.ready[slot]);
        while !self.events.is_complete(ready, self.events.latest(ready).unwrap()).unwrap() {
            std::thread::yield_now();
        }
        let mut bytes = vec![0; self.told.slot_bytes as usize];
        self.memory.read(slot as u64 * self.told.slot_bytes, &mut bytes).unwrap();
        bytes
    }

    fn begin(&mut self, slot: usize) {
        let done = self.told.ready.len() as u64 + slot as u64;
        self.begun.push((done, self.events.record(done).unwrap()));
    }

    fn end(&mut self) {
        for (done, number) in self.begun.drain(..) {
            self.events.complete(done, number).unwrap();
        }
    }
}

/// Copies of this many bytes within the device, so often, are work: some milliseconds. A gate behind them keeps it
/// from ending by itself, however slow the test before it is.
const WORK_BYTES: usize = 512 << 20;
const WORK_TIMES: usize = 20;

struct CudaRing {
    context: Arc<CudaContext>,
    told: GpuRing,
    base: sys::CUdeviceptr,
    ready: Vec<sys::CUevent>,
    done: Vec<sys::CUevent>,
    stream: sys::CUstream,
    scratch: sys::CUdeviceptr,
    /// A word of the device's that counts ends, and how many there were.
    gate: sys::CUdeviceptr,
    ends: u32,
}

fn chars(handle: IpcHandle) -> [std::ffi::c_char; 64] {
    handle.0.map(|byte| std::ffi::c_char::from_le_bytes([byte]))
}

impl CudaRing {
    fn open(told: GpuRing, ordinal: u32) -> (Box<dyn Ring>, Vec<IpcHandle>) {
        let context = CudaContext::new(ordinal as usize).unwrap();
        let mut base = 0;
        let handle = sys::CUipcMemHandle { reserved: chars(told.memory) };
        let flags = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        // SAFETY: the handle is the daemon's; the address goes to `base`.
        unsafe { sys::cuIpcOpenMemHandle_v2(&raw mut base, handle, flags) }.result().unwrap();
        let open = |handle: &IpcHandle| {
            let mut event = std::ptr::null_mut();
            let handle = sys::CUipcEventHandle { reserved: chars(*handle) };
            // SAFETY: as above.
            unsafe { sys::cuIpcOpenEventHandle(&raw mut event, handle) }.result().unwrap();
            event
        };
        let ready: Vec<_> = told.ready.iter().map(open).collect();
        let flags = sys::CUevent_flags::CU_EVENT_INTERPROCESS as u32
            | sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        let make = |_: &sys::CUevent| {
            let mut event = std::ptr::null_mut();
            // SAFETY: the event goes to `event`.
            unsafe { sys::cuEventCreate(&raw mut event, flags) }.result().unwrap();
            let mut handle = sys::CUipcEventHandle { reserved: [0; 64] };
            // SAFETY: the event was just made, for this.
            unsafe { sys::cuIpcGetEventHandle(&raw mut handle, event) }.result().unwrap();
            (event, IpcHandle(handle.reserved.map(|byte| byte.to_le_bytes()[0])))
        };
        let (done, handles) = ready.iter().map(make).unzip();
        let stream = result::stream::create(StreamKind::NonBlocking).unwrap();
        // SAFETY: nothing is made of what the memory holds.
        let scratch = unsafe { result::malloc_sync(2 * WORK_BYTES) }.unwrap();
        // SAFETY: it is written next.
        let gate = unsafe { result::malloc_sync(4) }.unwrap();
        let ends = 0;
        // SAFETY: the word was just allocated.
        unsafe { sys::cuMemsetD32_v2(gate, ends, 1) }.result().unwrap();
        (Box::new(Self { context, told, base, ready, done, stream, scratch, gate, ends }), handles)
    }
}

impl Ring for CudaRing {
    fn read(&mut self, slot: usize) -> Vec<u8> {
        let mut bytes = vec![0; self.told.slot_bytes as usize];
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        let at = self.base + slot as u64 * self.told.slot_bytes;
        // SAFETY: stream and event are open.
        unsafe { result::stream::wait_event(self.stream, self.ready[slot], flags) }.unwrap();
        // SAFETY: the slot lies in the opened memory; `bytes` stays until the stream is done.
        unsafe { result::memcpy_dtoh_async(&mut bytes, at, self.stream) }.unwrap();
        // SAFETY: the stream is open.
        unsafe { result::stream::synchronize(self.stream) }.unwrap();
        bytes
    }

    fn begin(&mut self, slot: usize) {
        for _ in 0..WORK_TIMES {
            let to = self.scratch + WORK_BYTES as u64;
            // SAFETY: both halves are of the scratch memory.
            unsafe { result::memcpy_dtod_async(to, self.scratch, WORK_BYTES, self.stream) }.unwrap();
        }
        let until = sys::CUstreamWaitValue_flags::CU_STREAM_WAIT_VALUE_GEQ as u32;
        // SAFETY: stream and gate are open.
        unsafe { sys::cuStreamWaitValue32_v2(self.stream, self.gate, self.ends + 1, until) }
            .result()
            .unwrap();
        // SAFETY: stream and event are open.
        unsafe { result::event::record(self.done[slot], self.stream) }.unwrap();
    }

    fn end(&mut self) {
        self.ends += 1;
        // SAFETY: the gate is open; this stream is another than the one that waits, and non-blocking ones do not
        // wait for it.
        unsafe { sys::cuMemsetD32_v2(self.gate, self.ends, 1) }.result().unwrap();
    }
}

impl Drop for CudaRing {
    fn drop(&mut self) {
        self.context.bind_to_thread().unwrap();
        self.end();
        // SAFETY: the stream is open.
        unsafe { result::stream::synchronize(self.stream) }.unwrap();
        for event in self.ready.drain(..).chain(self.done.drain(..)) {
            // SAFETY: each was opened or made by `open`.
            unsafe { result::event::destroy(event) }.unwrap();
        }
        // SAFETY: `open` opened it.
        unsafe { sys::cuIpcCloseMemHandle(self.base) }.result().unwrap();
        for memory in [self.scratch, self.gate] {
            // SAFETY: `open` allocated it; the stream that uses it is done.
            unsafe { result::free_sync(memory) }.unwrap();
        }
        // SAFETY: `open` made it; its work is done.
        unsafe { result::stream::destroy(self.stream) }.unwrap();
    }
}
