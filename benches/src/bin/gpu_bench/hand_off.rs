//! How long a published batch takes to be usable by a process that waits for it.
//!
//! ```text
//!   this process, the daemon's part              the client, this program started anew
//!   upload seq, record ready                     next_batch: waits for the slot
//!   announce, ask until done ──────────────────▶ wakes, if it slept
//!   clock ─▶ header.assemble_ns                  use_on: its stream waits for ready
//!   publish ───────────────────────────────────▶ synchronise ─▶ clock
//! ```
//!
//! Both sides are the libraries that the daemon and its clients are made of; only sampler, reader and kernel are left
//! out; an upload takes the GPU as long as the kernel would. Both read `CLOCK_MONOTONIC`, which is one for all processes of a host. The client checks that what it got is
//! the batch it was told of, now and then. Gaps between batches are drawn from 100 us to 2 ms, so that the client is met while it
//! still spins and when it sleeps. A batch that was there before the client asked is counted apart.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use robocache::gpu::Stream;
use robocache::{Batch, ColumnInfo, ColumnRole, DType, Loader, LoaderInfo, Next, Place};
use robocache_benches::figures;
use robocache_wire::batch::{BatchHeader, SLOT_ALIGN, first_column_offset};
use robocache_wire::fds::{Access, Connection, Listener, Receive, Received};
use robocache_wire::message::{ToClient, ToDaemon};
use robocache_wire::producer::{Filling, Producer};
use robocache_wire::ring::{Claim, Published};
use robocache_wire::segment::Shape;
use robocached::gpu::cuda::CudaDevice;
use robocached::gpu::device::{Device, Pinned, Progress, StreamId};
use robocached::gpu::ring::DeviceRing;
use robocached::gpu::sim::{SimDevice, SimOptions};
use serde_json::{Value, json};

use crate::Waiting;

const BATCH: u32 = 32;
/// Bytes of the column that carries the batch's number.
const NUMBERS: u64 = 8 * BATCH as u64;
/// The values follow, as of the benchmarks' workload: `[250, 256]` of bfloat16 a sample.
const VALUES: u64 = 2 * 250 * 256 * BATCH as u64;
/// Batches that are not counted, at the beginning.
const WARM: u64 = 500;
/// Every so many batches are compared with what they should hold.
const CHECKED: u64 = 16;
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, clap::Args)]
pub(crate) struct HandOff {
    #[arg(long, default_value_t = 24_000)]
    batches: u64,
    #[arg(long, default_value_t = 32)]
    slots: u32,
    /// Number of the GPU
    #[arg(long, default_value_t = 0)]
    gpu: u32,
    /// On a simulated GPU, to try the program where there is none
    #[arg(long)]
    simulate: bool,
    /// The client asks again and again instead of going to sleep: what of it all is the waking
    #[arg(long)]
    poll: bool,
    /// KiB that are uploaded for a batch beside its number; 512 take 10 us, as the kernel that makes such a batch does
    #[arg(long, default_value_t = 512)]
    work_kib: u64,
    /// Shortest and longest gap between two batches, in microseconds
    #[arg(long, num_args = 2, default_values_t = [100.0, 2000.0])]
    gap_us: Vec<f64>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Take {
    #[arg(long)]
    socket: PathBuf,
    #[arg(long)]
    device: String,
    #[arg(long)]
    slots: u32,
    #[arg(long)]
    poll: bool,
}

/// Nanoseconds of the clock that all processes of this host share.
fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec * 1_000_000_000 + now.tv_nsec).unwrap_or(0)
}

/// The producing side; with what the client found.
pub(crate) fn hand_off(of: &HandOff) -> anyhow::Result<Value> {
    let scratch = tempfile::Builder::new().prefix("robocache-hand-off-").tempdir()?;
    let socket = scratch.path().join("socket");
    let listener = Listener::bind(&socket, Access::Owner)?;
    let device: Arc<dyn Device> = if of.simulate {
        SimDevice::new(SimOptions { ordinal: of.gpu, ..SimOptions::default() })
    } else {
        CudaDevice::open(of.gpu)?
    };
    let name = format!("{}:{}", if of.simulate { "sim" } else { "cuda" }, of.gpu);
    let mut client = Command::new(std::env::current_exe()?)
        .args(["take", "--device", &name, "--slots", &of.slots.to_string(), "--socket"])
        .arg(&socket)
        .args(of.poll.then_some("--poll"))
        .stdout(Stdio::piped())
        .spawn()?;
    let produced =
        Ring::open(&listener, &device, of, &mut client).and_then(|ring| ring.produce(of, &mut client));
    if let Err(error) = produced {
        client.kill()?;
        client.wait()?;
        return Err(error);
    }
    let output = client.wait_with_output()?;
    ensure!(output.status.success(), "the client ended with {}", output.status);
    let mut found: Value = serde_json::from_slice(&output.stdout).context("what the client printed")?;
    found["gap_us"] = json!(of.gap_us);
    found["client_polls"] = json!(of.poll);
    found["work_kib"] = json!(of.work_kib);
    Ok(found)
}

/// A ring with its client attached.
struct Ring {
    device: Arc<dyn Device>,
    stream: StreamId,
    ring: DeviceRing,
    producer: Arc<Producer>,
    /// A line a slot: the bytes uploaded to it.
    pinned: Box<dyn Pinned>,
    /// What keeps the GPU busy for as long as making a batch would.
    work: Option<Box<dyn Pinned>>,
    /// Until the end: a hang-up would be the daemon's death.
    connection: Connection,
}

impl Ring {
    fn open(
        listener: &Listener,
        device: &Arc<dyn Device>,
        of: &HandOff,
        client: &mut Child,
    ) -> anyhow::Result<Self> {
        let connection = accept(listener, client)?;
        let ToDaemon::Open(_) = receive(&connection)? else { bail!("the client did not ask for a loader") };
        let (ring, told, device_fds) = DeviceRing::create(device, of.slots, NUMBERS + VALUES)?;
        let shape = Shape {
            slots: of.slots,
            slot_bytes: first_column_offset(BATCH).next_multiple_of(SLOT_ALIGN),
            batch_size: BATCH,
            client: 1,
            daemon_pid: std::process::id(),
        };
        let (producer, ring_fds) = Producer::create(shape)?;
        let column = |name: &str, dtype, shape: &[u64], offset| ColumnInfo {
            name: name.to_owned(),
            dtype,
            shape: shape.to_vec(),
            offset,
            role: ColumnRole::Data,
            place: Place::Device,
        };
        let info = LoaderInfo {
            client: shape.client,
            daemon_pid: shape.daemon_pid,
            fingerprint: String::new(),
            anchors: (WARM + of.batches) * u64::from(BATCH),
            batch_size: BATCH,
            rank: 0,
            world_size: 1,
            drop_last: false,
            slots: shape.slots,
            slot_bytes: shape.slot_bytes,
            columns: vec![
                column("number", DType::Int64, &[], 0),
                column("values", DType::BFloat16, &[250, 256], NUMBERS),
            ],
            text_tables: Vec::new(),
            warnings: Vec::new(),
            gpu: Some(told),
        };
        let mut fds = ring_fds.borrow(None);
        fds.extend(device_fds.iter().map(AsFd::as_fd));
        connection.send(&ToClient::Opened(Box::new(info)), &fds, PATIENCE)?;
        let ToDaemon::Attached { done } = receive(&connection)? else { bail!("the client did not attach") };
        ring.attach(&done)?;
        let pinned = device.pin(NUMBERS * u64::from(of.slots))?;
        ensure!(of.work_kib << 10 <= VALUES, "--work-kib: a batch has {} KiB", VALUES >> 10);
        let work = (of.work_kib > 0).then(|| device.pin(of.work_kib << 10)).transpose()?;
        let (device, stream) = (Arc::clone(device), device.stream()?);
        Ok(Self { device, stream, ring, producer, pinned, work, connection })
    }

    fn produce(mut self, of: &HandOff, client: &mut Child) -> anyhow::Result<()> {
        let [shortest, longest] = of.gap_us[..] else { bail!("--gap-us takes two numbers") };
        ensure!(0.0 < shortest && shortest <= longest, "gaps of {shortest} to {longest} us");
        let batches = WARM + of.batches;
        let mut random = 1_u64;
        for seq in 0..batches {
            let gap = shortest * (longest / shortest).powf(fraction(&mut random));
            rest(Duration::from_secs_f64(gap / 1e6));
            let filling = self.make(seq, client)?;
            let header = BatchHeader {
                seq,
                batch: seq,
                rows: BATCH,
                last_of_epoch: seq + 1 == batches,
                consumed_before: seq * u64::from(BATCH),
                assemble_ns: now_ns(),
                ..BatchHeader::default()
            };
            ensure!(filling.publish(&header) == Published::Ready, "batch {seq} was not taken up");
        }
        // The client says Bye, or hangs up, when it has them all.
        while !matches!(
            self.connection.receive::<ToDaemon>(Receive::Within(PATIENCE))?,
            Received::Message(ToDaemon::Bye, _) | Received::Closed
        ) {
            ensure!(client.try_wait()?.is_none(), "the client is gone");
        }
        Ok(())
    }

    /// A slot with batch `seq` in it, done.
    fn make(&mut self, seq: u64, client: &mut Child) -> anyhow::Result<Filling> {
        let filling = loop {
            match self.producer.claim(0, Duration::from_millis(100)) {
                Claim::Claimed(filling) => break filling,
                Claim::Full => ensure!(client.try_wait()?.is_none(), "the client ended at batch {seq}"),
                Claim::Stale => bail!("the client went elsewhere"),
            }
        };
        let slot = filling.slot();
        while !self.ring.is_done(slot)? {
            std::hint::spin_loop();
        }
        let line = NUMBERS * slot as u64;
        let number: Vec<u8> = (0..BATCH).flat_map(|_| seq.to_le_bytes()).collect();
        self.pinned.write(line, &number);
        if let Some(work) = &self.work {
            let busy = self.ring.slot(slot).part(NUMBERS..NUMBERS + work.bytes());
            self.device.upload(self.stream, &**work, 0..busy.bytes(), &busy)?;
        }
        let to = self.ring.slot(slot).part(0..NUMBERS);
        self.device.upload(self.stream, &*self.pinned, line..line + NUMBERS, &to)?;
        self.device.record(self.ring.ready(slot), self.stream)?;
        // As the daemon does: a client that waits is awake by then.
        self.producer.notify();
        while self.device.query(self.ring.ready(slot))? == Progress::Pending {
            std::hint::spin_loop();
        }
        Ok(filling)
    }
}

/// Passes the time: short gaps busily, since a sleep takes some 60 us at least.
fn rest(gap: Duration) {
    let start = Instant::now();
    if gap > Duration::from_micros(300) {
        std::thread::sleep(gap - Duration::from_micros(100));
    }
    while start.elapsed() < gap {
        std::hint::spin_loop();
    }
}

/// The next number from 0 to 1 of SplitMix64.
#[expect(clippy::cast_precision_loss, reason = "53 bits are enough")]
fn fraction(state: &mut u64) -> f64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
}

fn accept(listener: &Listener, client: &mut Child) -> anyhow::Result<Connection> {
    let limit = Instant::now();
    loop {
        if let Some(connection) = listener.accept()? {
            return Ok(connection);
        }
        ensure!(client.try_wait()?.is_none() && limit.elapsed() < PATIENCE, "the client did not come");
        std::thread::yield_now();
    }
}

fn receive(connection: &Connection) -> anyhow::Result<ToDaemon> {
    match connection.receive(Receive::Within(PATIENCE))? {
        Received::Message(message, _) => Ok(message),
        Received::Nothing => bail!("the client said nothing"),
        Received::Closed => bail!("the client hung up"),
    }
}

/// The client's side.
#[expect(clippy::cast_precision_loss, reason = "nanoseconds of some milliseconds")]
pub(crate) fn take(of: &Take) -> anyhow::Result<Value> {
    let builder =
        Loader::builder("hand-off").batch_size(BATCH).slots(of.slots).socket(&of.socket).no_embedded();
    let mut loader = builder.device(&of.device).connect()?;
    let waiting = Waiting::on(&loader)?;
    let batches = loader.batches();
    let (mut usable, mut leased, mut enqueued) = (Vec::new(), Vec::new(), Vec::new());
    let (mut of_spinning, mut of_asleep, mut late) = (Vec::new(), Vec::new(), 0_u64);
    for seq in 0..batches {
        let asked = now_ns();
        let batch = next(&mut loader, of.poll)?;
        let got = now_ns();
        batch.use_on(Stream::LEGACY)?;
        let told = now_ns();
        waiting.wait()?;
        let there = now_ns();

        // Not each time: a copy takes as long as a hand-off, and the next batch would find nobody waiting.
        if seq % CHECKED == 0 {
            let found = batch.device_tensor("number")?.to_host()?;
            ensure!(
                found.chunks_exact(8).all(|number| number == seq.to_le_bytes()),
                "batch {seq} holds another"
            );
        }
        let published = batch.assemble_ns();
        if seq < WARM {
            continue;
        }
        if published < asked {
            late += 1; // it was there already: that it waited is no part of the hand-off
            continue;
        }
        let took = (there - published) as f64;
        usable.push(took);
        leased.push((got - published) as f64);
        enqueued.push((told - published) as f64);
        // How long the client had waited tells what it was doing.
        if published - asked < 10_000 { &mut of_spinning } else { &mut of_asleep }.push(took);
    }
    Ok(json!({
        "usable_ns": tail(usable),
        "leased_ns": tail(leased),
        "stream_told_ns": tail(enqueued),
        "usable_ns_client_waited_under_10_us": tail(of_spinning),
        "usable_ns_client_waited_longer": tail(of_asleep),
        "not_counted_published_before_asked": late,
        "device": loader.gpu().map(ToString::to_string),
    }))
}

fn next(loader: &mut Loader, poll: bool) -> anyhow::Result<Batch> {
    if !poll {
        return loader.next_batch()?.context("the epoch ended early");
    }
    loop {
        match loader.next_timeout(Duration::ZERO)? {
            Next::Batch(batch) => return Ok(batch),
            Next::EpochEnd => bail!("the epoch ended early"),
            Next::TimedOut => {}
        }
    }
}

/// [`figures`] with the 999th of 1000.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "a rank"
)]
fn tail(mut values: Vec<f64>) -> Value {
    values.sort_by(f64::total_cmp);
    let rank = (0.999 * values.len().saturating_sub(1) as f64).round() as usize;
    let p999 = values.get(rank).copied();
    let mut all = figures(values);
    all["p999"] = json!(p999);
    all
}
