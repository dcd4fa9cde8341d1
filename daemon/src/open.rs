//! From an `Open` message to a running loader, on the session's own thread.
//!
//! Whatever goes wrong before the ring exists is a `Refused` with a code and a sentence; the connection stays. After
//! that the thread is the loader's until it is stopped.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use robocache_formats::TextTable;
use robocache_wire::message::{RefusalCode, ToClient};
use robocache_wire::producer::Producer;
use robocache_wire::segment::{RingFds, Shape, Texts};
use robocache_wire::spec::{GpuRing, LoaderInfo, LoaderSpec, TextTableInfo};

use crate::assemblers::Assemblers;
use crate::catalog::{Catalog, CatalogError};
use crate::gpu::device::DeviceError;
use crate::gpu::host::{Gpu, GpuError, GpuLoader, Gpus};
use crate::loader::{Loader, chain};
use crate::plan::{Limits, Plan, PlanError};
use crate::session::Shared;
use crate::store::Store;

/// Most steps of one window: a batch of one sample of it fits a few megabytes.
const STEP_LIMIT: u64 = 1 << 20;

/// What sessions need of their daemon.
#[derive(Debug)]
pub struct Host {
    /// The daemon is about to end.
    pub stopping: AtomicBool,
    pub gpus: Gpus,
    pub store: Arc<Store>,
    pub catalog: Catalog,
    pub assemblers: Assemblers,
}

/// A refusal, before it is sent.
#[derive(Debug)]
struct Refusal {
    code: RefusalCode,
    message: String,
}

/// Opens a loader for a client and runs it until it is stopped.
pub fn serve(session: &Arc<Shared>, spec: LoaderSpec, host: &Arc<Host>) {
    let started = Instant::now();
    let opened = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| open(session, spec, host)));
    let opened = opened.unwrap_or_else(|_panic| {
        tracing::error!(client = session.client, "opening a loader panicked; this is a bug");
        let message = "opening the loader panicked: a bug in robocached, please report it".to_owned();
        Err(Refusal { code: RefusalCode::Internal, message })
    });
    match opened {
        Err(Refusal { code, message }) => {
            tracing::info!(client = session.client, pid = session.peer.pid, ?code, message, "refused");
            session.refuse(code, message);
        }
        Ok((loader, info, fds)) => {
            tracing::info!(
                client = session.client,
                pid = session.peer.pid,
                dataset = ?loader.dataset.dataset().root(),
                anchors = info.anchors,
                rank = info.rank,
                world_size = info.world_size,
                slots = info.slots,
                slot_bytes = info.slot_bytes,
                ms = started.elapsed().as_millis(),
                "attached"
            );
            session.set_loader(Some(Arc::clone(&loader)));
            session.send(&ToClient::Opened(Box::new(info)), &fds.borrow());
            drop(fds); // the client's now
            let tell = |message: &ToClient| {
                session.send(message, &[]);
                loader.producer.notify();
            };
            loader.run(&host.store, &host.assemblers, &tell);
            session.set_loader(None);
            if loader.gpu.is_some() {
                session.wait_until_unmapped(&host.stopping);
            }
            let counts = loader.metrics.counts();
            drop(loader); // and its ring with it
            tracing::info!(client = session.client, ?counts, "detached");
        }
    }
}

type Opened = (Arc<Loader>, LoaderInfo, Fds);

/// What goes with `Opened`.
struct Fds {
    ring: RingFds,
    texts: Option<OwnedFd>,
    /// A simulated GPU's memory and events.
    device: Vec<OwnedFd>,
}

impl Fds {
    /// In the order of `docs/protocol.md`.
    fn borrow(&self) -> Vec<BorrowedFd<'_>> {
        let mut fds = self.ring.borrow(self.texts.as_ref());
        fds.extend(self.device.iter().map(AsFd::as_fd));
        fds
    }
}

fn open(session: &Shared, spec: LoaderSpec, host: &Host) -> Result<Opened, Refusal> {
    let dataset = host.catalog.get(&spec.dataset, spec.manifest.as_deref(), session.trust)?;
    let gpu = (spec.device != "cpu").then(|| host.gpus.get(&spec.device)).transpose()?;
    let limits = Limits {
        steps: STEP_LIMIT,
        ring_bytes: (host.store.budget() / 2).max(256 << 20),
        gpu_ring_bytes: gpu.as_deref().map(Gpu::ring_bytes),
    };
    let plan = Arc::new(Plan::new(dataset.dataset(), &spec, limits)?);
    let (slots, on_gpu) = match &gpu {
        None => (spec.slots, None),
        Some(gpu) => {
            let (slots, loader, told, fds) = ring_on(gpu, &plan, gpu.slots(&spec, &plan), spec.slots)?;
            (slots, Some((loader, told, fds)))
        }
    };
    let shape = Shape {
        client: session.client,
        slots,
        batch_size: spec.batch_size,
        slot_bytes: plan.slot_end.next_multiple_of(robocache_wire::batch::SLOT_ALIGN),
        daemon_pid: std::process::id(),
    };
    let ring = |source: &dyn std::error::Error| Refusal {
        code: RefusalCode::Internal,
        message: format!(
            "cannot make a ring of {} slots of {} bytes: {}",
            shape.slots,
            shape.slot_bytes,
            chain(source)
        ),
    };
    let (producer, ring_fds) = Producer::create(shape).map_err(|error| ring(&error))?;
    let (text_tables, texts) = encode_texts(&plan.texts)?;
    let texts = (!text_tables.is_empty()).then(|| Texts::create(&texts)).transpose();
    let (gpu, told, device) = match on_gpu {
        None => (None, None, Vec::new()),
        Some((loader, told, fds)) => (Some(loader), Some(told), fds),
    };
    let fds = Fds { ring: ring_fds, texts: texts.map_err(|error| ring(&error))?, device };
    let info = LoaderInfo {
        client: session.client,
        daemon_pid: std::process::id(),
        fingerprint: plan.fingerprint.iter().map(|byte| format!("{byte:02x}")).collect(),
        anchors: plan.anchors.len(),
        batch_size: spec.batch_size,
        rank: spec.rank,
        world_size: spec.world_size,
        drop_last: spec.drop_last,
        slots,
        slot_bytes: shape.slot_bytes,
        columns: plan.infos.clone(),
        text_tables,
        warnings: plan.warnings.clone(),
        gpu: told,
    };
    Ok((Loader::new(spec, plan, dataset, producer, gpu), info, fds))
}

/// A loader's part on a GPU: `slots` slots, or fewer where its memory is short, but `least`.
fn ring_on(
    gpu: &Arc<Gpu>,
    plan: &Arc<Plan>,
    mut slots: u32,
    least: u32,
) -> Result<(u32, GpuLoader, GpuRing, Vec<OwnedFd>), DeviceError> {
    loop {
        match gpu.loader(plan, slots) {
            Ok((loader, told, fds)) => return Ok((slots, loader, told, fds)),
            Err(error @ DeviceError::OutOfMemory { .. }) if slots > least => {
                let fewer = (slots / 2).max(least);
                tracing::warn!(slots, fewer, %error, "the GPU has no room for the whole ring; making it smaller");
                slots = fewer;
            }
            Err(error) => return Err(error),
        }
    }
}

/// The tables one behind the other, as `docs/segment.md` has them.
fn encode_texts(tables: &[TextTable]) -> Result<(Vec<TextTableInfo>, Vec<u8>), Refusal> {
    let too_long = |table: usize| Refusal {
        code: RefusalCode::Dataset,
        message: format!("text table {table} of this loader takes more than 4 GiB; leave its column out"),
    };
    let (mut infos, mut bytes) = (Vec::new(), Vec::new());
    for (number, table) in tables.iter().enumerate() {
        let start = bytes.len();
        let mut end = 0_u32;
        bytes.extend_from_slice(&end.to_le_bytes());
        for text in table.iter() {
            let len = u32::try_from(text.len()).ok().and_then(|len| end.checked_add(len));
            end = len.ok_or_else(|| too_long(number))?;
            bytes.extend_from_slice(&end.to_le_bytes());
        }
        for text in table.iter() {
            bytes.extend_from_slice(text.as_bytes());
        }
        let count = u32::try_from(table.len()).map_err(|_too_many| too_long(number))?;
        infos.push(TextTableInfo { offset: start as u64, len: (bytes.len() - start) as u64, count });
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    Ok((infos, bytes))
}

impl From<CatalogError> for Refusal {
    fn from(error: CatalogError) -> Self {
        let code = match &error {
            CatalogError::NoName { .. } => RefusalCode::NotFound,
            CatalogError::NotAllowed { .. } => RefusalCode::NotAllowed,
            CatalogError::Relative { .. } => RefusalCode::BadRequest,
            CatalogError::Manifest { .. } | CatalogError::Open(_) => RefusalCode::Dataset,
        };
        Self { code, message: chain(&error) }
    }
}

impl From<GpuError> for Refusal {
    fn from(error: GpuError) -> Self {
        let code = match &error {
            GpuError::Name { .. } => RefusalCode::BadRequest,
            GpuError::Thread(_) => RefusalCode::Internal,
            _ => RefusalCode::UnsupportedDevice,
        };
        Self { code, message: chain(&error) }
    }
}

impl From<DeviceError> for Refusal {
    fn from(error: DeviceError) -> Self {
        let code = match &error {
            DeviceError::OutOfMemory { .. } => RefusalCode::Busy,
            _ => RefusalCode::UnsupportedDevice,
        };
        Self { code, message: chain(&error) }
    }
}

impl From<PlanError> for Refusal {
    fn from(error: PlanError) -> Self {
        let code = match &error {
            PlanError::Read(_) => RefusalCode::Dataset,
            _ => RefusalCode::BadRequest,
        };
        Self { code, message: chain(&error) }
    }
}
