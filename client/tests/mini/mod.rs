//! A daemon in miniature over wire's producer side: anchors 0..n in order, a few columns computed from the sample id.
//!
//! It follows docs/protocol.md and docs/segment.md, so that the client is tested against the contract and not against
//! the real daemon's choices. One thread accepts, one thread a client; [`Script`] says how it misbehaves.

#![expect(dead_code, reason = "each test file uses a part of it")]
#![expect(clippy::unwrap_used, reason = "test code: a failure here is the test's")]
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    reason = "sample ids of tests are small"
)]

mod gpu;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use gpu::{Gpu, SeenGpu};
use robocache::{ColumnInfo, ColumnRole, DType, LoaderInfo, Place, Position, RefusalCode, TextTableInfo};
use robocache_wire::batch::{BatchHeader, SlotLayout};
use robocache_wire::epoch::Share;
use robocache_wire::fds::{Access, Connection, Listener, Receive, Received};
use robocache_wire::message::{ToClient, ToDaemon};
use robocache_wire::producer::{Filling, Producer};
use robocache_wire::ring::Claim;
use robocache_wire::segment::{Shape, Texts};
use robocache_wire::spec::{DatasetRef, LoaderSpec};
use robocache_wire::words::DaemonState;

/// How the daemon behaves.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Script {
    pub(crate) anchors: u64,
    /// In run 0, say `Failed` instead of batch `seq`.
    pub(crate) fail_at: Option<u64>,
    /// Say `Draining` instead of batch `seq`.
    pub(crate) drain_at: Option<u64>,
    /// Hang up instead of publishing batch `seq`.
    pub(crate) hang_up_at: Option<u64>,
    /// Publish nothing.
    pub(crate) mute: bool,
    /// Claim several slots and publish them the wrong way round.
    pub(crate) backwards: bool,
    /// On a simulated device: slots beyond those asked for.
    pub(crate) more_slots: u32,
    /// On a simulated device: publish batches whose `ready` has not happened.
    pub(crate) unready: bool,
    /// On a simulated device: write slots whose `done` has not happened.
    pub(crate) ignore_done: bool,
    /// On a simulated device: say of the memory that it is this much larger than it is.
    pub(crate) larger_by: u64,
}

/// The running daemon; stopped on drop.
#[derive(Debug)]
pub(crate) struct Mini {
    pub(crate) socket: PathBuf,
    /// Leases reaped and slots seen when clients went, for tests to look at.
    pub(crate) seen: Arc<Seen>,
    stop: Connection,
    thread: Option<JoinHandle<()>>,
    _directory: tempfile::TempDir,
}

#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) byes: AtomicU32,
    pub(crate) seeks: AtomicU32,
    pub(crate) leased_at_bye: AtomicU32,
    /// Hang-ups without `Bye`.
    pub(crate) deaths: AtomicU32,
    pub(crate) gpu: SeenGpu,
}

impl Mini {
    pub(crate) fn start(script: Script) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("robocached.sock");
        let seen = Arc::new(Seen::default());
        let (stop, stopped) = Connection::pair().unwrap();
        let listener = Listener::bind(&socket, Access::Owner).unwrap();
        let thread = {
            let seen = Arc::clone(&seen);
            named(move || serve(&listener, &stopped, script, &seen))
        };
        Self { socket, seen, stop, thread: Some(thread), _directory: directory }
    }
}

impl Drop for Mini {
    fn drop(&mut self) {
        self.stop.send_datagram(b"stop", &[], Duration::ZERO).unwrap();
        self.thread.take().unwrap().join().unwrap();
    }
}

fn named<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    std::thread::Builder::new().name("mini".to_owned()).spawn(f).unwrap()
}

/// Serve on `socket` until killed: what a child process runs.
pub(crate) fn serve_forever(socket: &Path, script: Script) {
    let listener = Listener::bind(socket, Access::Owner).unwrap();
    let (_keep, stopped) = Connection::pair().unwrap();
    serve(&listener, &stopped, script, &Arc::new(Seen::default()));
}

fn serve(listener: &Listener, stopped: &Connection, script: Script, seen: &Arc<Seen>) {
    use rustix::event::{PollFd, PollFlags, poll};
    let mut clients = Vec::new();
    let mut number = 0;
    loop {
        let mut fds = [PollFd::new(listener, PollFlags::IN), PollFd::new(stopped, PollFlags::IN)];
        poll(&mut fds, None).unwrap();
        if !fds[1].revents().is_empty() {
            break;
        }
        while let Some(connection) = listener.accept().unwrap() {
            number += 1;
            let seen = Arc::clone(seen);
            clients.push(named(move || Client::talk(&connection, number, script, &seen)));
        }
    }
    for client in clients {
        client.join().unwrap();
    }
}

struct Client {
    producer: Arc<Producer>,
    share: Share,
    run: u32,
    /// Next batch to claim for.
    seq: u64,
    entered: Position,
    batch: u64,
    columns: Vec<ColumnInfo>,
    gpu: Option<Gpu>,
    stopped: bool,
}

/// Column values, as functions of the sample id.
pub(crate) fn state_of(id: u64) -> [f32; 3] {
    [id as f32, id as f32 + 0.25, id as f32 + 0.5]
}

pub(crate) fn task_of(id: u64) -> &'static str {
    ["pick", "", "pläce"][usize::try_from(id % 3).unwrap()]
}

/// Columns, bytes of a slot, and bytes of a slot in device memory (0: none).
fn layout(spec: &LoaderSpec) -> (Vec<ColumnInfo>, u64, u64) {
    let on_gpu = spec.device != "cpu";
    let mut slot = SlotLayout::new(spec.batch_size);
    let mut columns = Vec::new();
    let mut gpu_end = 0_u64;
    for (name, dtype, shape, role) in [
        ("state", DType::Float32, vec![3], ColumnRole::Data),
        ("half", DType::BFloat16, vec![2, 2], ColumnRole::Data),
        ("state_is_pad", DType::Bool, vec![], ColumnRole::Mask),
        ("index", DType::Int64, vec![], ColumnRole::Index),
        ("task", DType::Int32, vec![], ColumnRole::Text { table: 0 }),
    ] {
        let elements = u64::from(spec.batch_size) * shape.iter().product::<u64>();
        let len_bytes = elements * dtype.size_bytes() as u64;
        let place =
            if on_gpu && role != (ColumnRole::Text { table: 0 }) { Place::Device } else { Place::Host };
        let offset = match place {
            Place::Host => slot.column(len_bytes).unwrap(),
            Place::Device => {
                let offset = gpu_end.next_multiple_of(64);
                gpu_end = offset + len_bytes;
                offset
            }
        };
        columns.push(ColumnInfo { name: name.to_owned(), dtype, shape, offset, role, place });
    }
    (columns, slot.slot_bytes().unwrap(), gpu_end.next_multiple_of(256))
}

fn texts() -> (Vec<u8>, TextTableInfo) {
    let mut bytes = Vec::new();
    for offset in [0_u32, 4, 10] {
        bytes.extend(offset.to_le_bytes());
    }
    bytes.extend("pickpläce".as_bytes());
    let len = bytes.len() as u64;
    (bytes, TextTableInfo { offset: 0, len, count: 2 })
}

impl Client {
    fn talk(connection: &Connection, number: u32, script: Script, seen: &Seen) {
        let mut client: Option<Self> = None;
        loop {
            // While there is a ring, look at the socket between batches; else wait on it.
            let patience = match &client {
                Some(client) if client.may_produce() => Receive::Now,
                _ => Receive::Within(Duration::from_secs(3600)),
            };
            match connection.receive::<ToDaemon>(patience) {
                Ok(Received::Message(ToDaemon::Open(spec), _)) => {
                    client = Self::open(connection, number, &spec, script, seen);
                }
                Ok(Received::Message(ToDaemon::Attached { done }, _)) => {
                    let gpu = client.as_mut().and_then(|client| client.gpu.as_mut());
                    gpu.expect("Attached is of a loader for a GPU").attached(&done);
                }
                Ok(Received::Message(ToDaemon::Seek { run, position }, _)) => {
                    seen.seeks.fetch_add(1, Ordering::SeqCst);
                    let client = client.as_mut().expect("Seek comes after Open");
                    client.producer.begin_run(run);
                    client.producer.set_state(DaemonState::Serving);
                    (client.run, client.seq, client.entered, client.batch) = (run, 0, position, 0);
                    client.stopped = script.mute;
                }
                Ok(Received::Message(ToDaemon::Status, _)) => {
                    let reply = ToClient::StatusReply(serde_json::json!({"pid": std::process::id()}));
                    connection.send(&reply, &[], Duration::ZERO).unwrap();
                }
                Ok(Received::Message(ToDaemon::Stop { .. }, _)) => {
                    let reply = ToClient::Stopping { pid: std::process::id() };
                    connection.send(&reply, &[], Duration::ZERO).unwrap();
                }
                Ok(Received::Message(ToDaemon::Bye, _)) => {
                    if let Some(client) = &client {
                        seen.leased_at_bye.store(client.producer.occupancy().leased, Ordering::SeqCst);
                    }
                    seen.byes.fetch_add(1, Ordering::SeqCst);
                    return;
                }
                Ok(Received::Nothing) => {}
                Ok(Received::Closed) | Err(_) => {
                    seen.deaths.fetch_add(1, Ordering::SeqCst);
                    return;
                }
            }
            if let Some(client) = client.as_mut().filter(|client| client.may_produce())
                && client.produce(connection, script).is_none()
            {
                return;
            }
        }
    }

    fn may_produce(&self) -> bool {
        !self.stopped && self.gpu.as_ref().is_none_or(Gpu::is_attached)
    }

    fn open(
        connection: &Connection,
        number: u32,
        spec: &LoaderSpec,
        script: Script,
        seen: &Seen,
    ) -> Option<Self> {
        if spec.device == "sim:9" {
            let message = "there is no device \"sim:9\"".to_owned();
            let refused = ToClient::Refused { code: RefusalCode::UnsupportedDevice, message };
            connection.send(&refused, &[], Duration::ZERO).unwrap();
            return None;
        }
        if spec.dataset == DatasetRef::Name("nowhere".to_owned()) {
            let message = "no dataset \"nowhere\"; served are [\"mini\"]".to_owned();
            let refused = ToClient::Refused { code: RefusalCode::NotFound, message };
            connection.send(&refused, &[], Duration::ZERO).unwrap();
            return None;
        }
        let (columns, slot_bytes, gpu_slot_bytes) = layout(spec);
        let on_gpu = gpu_slot_bytes > 0;
        let slots = spec.slots + if on_gpu { script.more_slots } else { 0 };
        let gpu = on_gpu.then(|| Gpu::new(slots, gpu_slot_bytes, script, &seen.gpu));
        let shape = Shape {
            slots,
            slot_bytes,
            batch_size: spec.batch_size,
            client: number,
            daemon_pid: std::process::id(),
        };
        let (producer, fds) = Producer::create(shape).unwrap();
        let (bytes, table) = texts();
        let texts = Texts::create(&bytes).unwrap();
        let info = LoaderInfo {
            client: number,
            daemon_pid: std::process::id(),
            fingerprint: "00".to_owned(),
            anchors: script.anchors,
            batch_size: spec.batch_size,
            rank: spec.rank,
            world_size: spec.world_size,
            drop_last: spec.drop_last,
            slots,
            slot_bytes,
            columns: columns.clone(),
            text_tables: vec![table],
            warnings: Vec::new(),
            gpu: gpu.as_ref().map(Gpu::info),
        };
        let opened = ToClient::Opened(Box::new(info));
        let mut fds = fds.borrow(Some(&texts));
        fds.extend(gpu.iter().flat_map(Gpu::fds));
        connection.send(&opened, &fds, Duration::ZERO).unwrap();
        let share = Share {
            anchors: script.anchors,
            consumed: 0,
            rank: spec.rank,
            world_size: spec.world_size,
            batch_size: spec.batch_size,
            drop_last: spec.drop_last,
        };
        let whole = share.batches();
        Some(Self {
            producer,
            share,
            run: 0,
            seq: 0,
            entered: spec.start,
            batch: 0,
            columns,
            gpu,
            stopped: script.mute || (whole == 0 && spec.start.consumed == 0),
        })
    }

    /// Fill what can be filled; `None` to hang up.
    fn produce(&mut self, connection: &Connection, script: Script) -> Option<()> {
        let mut filled = Vec::new();
        let at_once = if script.backwards { 2 } else { 1 };
        while filled.len() < at_once {
            if self.run == 0 && script.fail_at == Some(self.seq) {
                self.flush(filled);
                let message = "\"ep_3.parquet\": the file is cut".to_owned();
                let failed = ToClient::Failed { run: self.run, seq: self.seq, message };
                connection.send(&failed, &[], Duration::ZERO).unwrap();
                self.producer.set_state(DaemonState::Failed);
                self.stopped = true;
                return Some(());
            }
            if script.drain_at == Some(self.seq) {
                self.flush(filled);
                let draining = ToClient::Draining { reason: "SIGTERM".to_owned() };
                connection.send(&draining, &[], Duration::ZERO).unwrap();
                self.producer.set_state(DaemonState::Draining);
                self.stopped = true;
                return Some(());
            }
            if script.hang_up_at == Some(self.seq) {
                self.flush(filled);
                return None;
            }
            match self.producer.claim(self.run, Duration::from_millis(1)) {
                Claim::Claimed(filling) => {
                    if let Some(gpu) = &self.gpu {
                        gpu.claimed(filling.slot());
                    }
                    let header = self.next_header();
                    filled.push((filling, header));
                }
                Claim::Full | Claim::Stale => break,
            }
        }
        self.flush(filled);
        Some(())
    }

    fn flush(&self, filled: Vec<(Filling, BatchHeader)>) {
        for (filling, header) in filled.into_iter().rev() {
            self.fill(filling, &header);
        }
    }

    fn next_header(&mut self) -> BatchHeader {
        loop {
            let share = Share { consumed: self.entered.consumed, ..self.share };
            if self.batch < share.batches() {
                let header = BatchHeader {
                    seq: self.seq,
                    epoch: self.entered.epoch,
                    batch: self.batch,
                    rows: share.rows(self.batch),
                    last_of_epoch: self.batch + 1 == share.batches(),
                    run: self.run,
                    consumed_before: share.consumed_after(self.batch),
                    assemble_ns: 1,
                };
                self.seq += 1;
                self.batch += 1;
                return header;
            }
            self.entered = Position { epoch: self.entered.epoch + 1, consumed: 0 };
            self.batch = 0;
        }
    }

    fn fill(&self, mut filling: Filling, header: &BatchHeader) {
        let first = header.consumed_before + u64::from(self.share.rank);
        let stride = u64::from(self.share.world_size);
        let ids: Vec<u64> = (0..u64::from(header.rows)).map(|row| first + row * stride).collect();
        filling.set_ids(ids.iter().copied());
        for column in &self.columns {
            let mut values = Vec::new();
            for id in &ids {
                match column.name.as_str() {
                    "state" => values.extend(state_of(*id).iter().flat_map(|x| x.to_le_bytes())),
                    "half" => (0..4).for_each(|k| values.extend([k, *id as u8])),
                    "state_is_pad" => values.push(u8::from(id % 2 == 1)),
                    "index" => values.extend(id.to_le_bytes()),
                    _ => values.extend([0_i32, -1, 1][(id % 3) as usize].to_le_bytes()),
                }
            }
            match &self.gpu {
                Some(gpu) if column.place == Place::Device => {
                    gpu.write(filling.slot(), column.offset, &values)
                }
                _ => {
                    let at = usize::try_from(column.offset).unwrap();
                    filling.bytes_mut()[at..at + values.len()].copy_from_slice(&values);
                }
            }
        }
        if let Some(gpu) = &self.gpu {
            gpu.made(filling.slot());
        }
        filling.publish(header);
    }
}
