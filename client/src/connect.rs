//! From a builder to a loader: find the daemon, ask, check every word of the answer, map the ring.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use robocache_types::DType;
use robocache_wire::batch::{COLUMN_ALIGN, first_column_offset};
use robocache_wire::consumer::Consumer;
use robocache_wire::fds::{self, Connection, Receive, Received, SocketError};
use robocache_wire::message::{ToClient, ToDaemon};
use robocache_wire::segment::Texts;
use robocache_wire::spec::{ColumnInfo, ColumnRole, GpuKind, GpuRing, LoaderInfo, LoaderSpec, Place};
use rustix::io::Errno;

use crate::batch::Shared;
use crate::builder::{Embed, LoaderBuilder};
use crate::embedded::Embedded;
use crate::error::{ConnectError, GpuError, Named};
use crate::gpu::{self, Ring};
use crate::loader::Loader;
use crate::text::TextTable;

/// How long a small message may take to be taken up by a daemon's socket buffer.
pub(crate) const SEND_PATIENCE: Duration = Duration::from_secs(5);
/// Slots in a GPU's memory begin at multiples of this (`docs/segment.md`).
const GPU_SLOT_ALIGN: u64 = 256;
/// How often a waiting caller is asked whether to go on.
const SLICE: Duration = Duration::from_millis(100);

pub(crate) fn connect(
    builder: &LoaderBuilder,
    go_on: &mut dyn FnMut() -> ControlFlow<()>,
) -> Result<Loader, ConnectError> {
    let device = gpu::resolve(&builder.spec.device)?;
    let (connection, path, embedded) = reach(builder)?;
    let spec = LoaderSpec { device, ..builder.spec.clone() };
    connection.send(&ToDaemon::Open(Box::new(spec)), &[], SEND_PATIENCE)?;

    let start = Instant::now();
    let (info, fds) = loop {
        match connection.receive::<ToClient>(Receive::Within(SLICE))? {
            Received::Message(ToClient::Opened(info), fds) => break (*info, fds),
            Received::Message(ToClient::Refused { code, message }, _) => {
                return Err(ConnectError::Refused { code, message });
            }
            Received::Message(ToClient::Draining { .. }, _) => {}
            Received::Message(other, _) => {
                let what = format!("it answered Open with {other:?}");
                return Err(ConnectError::Protocol { path, what });
            }
            Received::Closed => return Err(ConnectError::HungUp { path }),
            Received::Nothing if start.elapsed() >= builder.open_timeout => {
                return Err(ConnectError::TimedOut { path, limit: builder.open_timeout });
            }
            Received::Nothing => {}
        }
        if go_on().is_break() {
            return Err(ConnectError::Interrupted);
        }
    };

    let protocol = |what: String| ConnectError::Protocol { path: path.clone(), what };
    check(builder, &info).map_err(protocol)?;
    let mut fds = fds.into_iter();
    let (Some(control), Some(data)) = (fds.next(), fds.next()) else {
        return Err(protocol("Opened came without the memfds of the ring".to_owned()));
    };
    let consumer = Consumer::open(&control, &data, &info)?;
    let texts = if info.text_tables.is_empty() {
        Vec::new()
    } else {
        let fd = fds.next();
        let fd =
            fd.ok_or_else(|| protocol("Opened names text tables and came without their memfd".to_owned()))?;
        TextTable::open_all(&Arc::new(Texts::open(&fd)?), &info.text_tables)?
    };
    let connection = Arc::new(connection);
    let ring = match &info.gpu {
        None => None,
        Some(gpu) => {
            let fds = fds.next().zip(fds.next());
            Some(attach(builder, gpu, fds, &consumer, &connection)?)
        }
    };
    let columns = info.columns.iter().enumerate().map(|(i, column)| (column.name.clone(), i));
    let columns: HashMap<_, _> = columns.collect();
    let shared = Arc::new(Shared { info, columns, texts, ring });
    Ok(Loader::attached(shared, consumer, connection, builder.spec.start, path, embedded))
}

/// Opens the part of the ring that is on a GPU, and says so, or `Bye`.
fn attach(
    builder: &LoaderBuilder,
    gpu: &GpuRing,
    fds: Option<(OwnedFd, OwnedFd)>,
    consumer: &Arc<Consumer>,
    connection: &Arc<Connection>,
) -> Result<Ring, ConnectError> {
    let simulated = builder.spec.device.strip_prefix("sim:").and_then(|number| number.parse().ok());
    match Ring::open(gpu, fds, simulated, builder.lateness.as_ref(), consumer, connection) {
        Ok((ring, done)) => {
            connection.send(&ToDaemon::Attached { done }, &[], SEND_PATIENCE)?;
            Ok(ring)
        }
        Err(error) => {
            // Nothing is open: the daemon may free the memory at once.
            connection.send(&ToDaemon::Bye, &[], Duration::ZERO).ok();
            Err(with_namespaces(error, consumer.shape().daemon_pid, connection).into())
        }
    }
}

/// Adds what can be seen of why handles of the daemon's cannot be opened here.
fn with_namespaces(error: GpuError, daemon_pid: u32, connection: &Connection) -> GpuError {
    let GpuError::Call { call: call @ ("cuIpcOpenMemHandle" | "cuIpcOpenEventHandle"), what, mut cure } =
        error
    else {
        return error;
    };
    let pid = connection.peer().ok().and_then(|peer| peer.pid);
    let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/ipc")).ok();
    let found = match pid {
        Some(pid) if pid == daemon_pid => match (namespace("self"), namespace(&pid.to_string())) {
            (Some(ours), Some(theirs)) if ours != theirs => "their IPC namespaces differ",
            _ => return GpuError::Call { call, what, cure },
        },
        _ => "their PID namespaces differ",
    };
    cure.push_str("; here ");
    cure.push_str(found);
    GpuError::Call { call, what, cure }
}

/// A connection to the daemon there is, or to one started for us.
fn reach(builder: &LoaderBuilder) -> Result<(Connection, PathBuf, Option<Arc<Embedded>>), ConnectError> {
    let from_environment = std::env::var_os("ROBOCACHE_SOCKET").is_some_and(|value| !value.is_empty());
    let (path, named) = match &builder.socket {
        Some(path) => (path.clone(), Named::Explicitly),
        None if from_environment => (fds::default_socket_path(), Named::Explicitly),
        None => (fds::default_socket_path(), Named::ByDefault),
    };
    match (dial(&path, named), named) {
        (Ok(connection), _) => Ok((connection, path, None)),
        (Err(ConnectError::NoDaemon { .. }), Named::ByDefault) if builder.embed != Embed::Never => {
            let given = match &builder.embed {
                Embed::Program(program) => Some(program.clone()),
                Embed::Found | Embed::Never => None,
            };
            let Some(program) = given.or_else(crate::embedded::find_program) else {
                return Err(ConnectError::NoDaemon { path, errno: Errno::NOENT, explicit: named });
            };
            let embedded = Embedded::start(&program)?;
            let path = embedded.socket().to_owned();
            let connection = dial(&path, Named::ByDefault)?;
            Ok((connection, path, Some(embedded)))
        }
        (Err(error), _) => Err(error),
    }
}

/// Connect to a daemon that this user may trust.
pub(crate) fn dial(path: &Path, named: Named) -> Result<Connection, ConnectError> {
    let connection = Connection::connect(path).map_err(|error| match error {
        SocketError::Connect {
            path,
            source: errno @ (Errno::NOENT | Errno::CONNREFUSED | Errno::NOTDIR),
        } => ConnectError::NoDaemon { path, errno, explicit: named },
        SocketError::Connect { path, source: Errno::ACCESS | Errno::PERM } => {
            ConnectError::NotAllowed { path }
        }
        other => ConnectError::Socket(other),
    })?;
    let uid = connection.peer()?.uid;
    if fds::may_trust(path, uid) {
        Ok(connection)
    } else {
        Err(ConnectError::NotTrusted { path: path.to_owned(), uid })
    }
}

/// What arithmetic and slicing later rely on: that the answer is to our question, and its columns lie in a slot.
fn check(builder: &LoaderBuilder, info: &LoaderInfo) -> Result<(), String> {
    let spec = &builder.spec;
    for (what, asked, told) in [
        ("batch_size", spec.batch_size, info.batch_size),
        ("rank", spec.rank, info.rank),
        ("world_size", spec.world_size, info.world_size),
        ("drop_last", u32::from(spec.drop_last), u32::from(info.drop_last)),
    ] {
        if asked != told {
            return Err(format!("it was asked for {what} {asked} and answers with {told}"));
        }
    }
    let slots = if info.gpu.is_some() { info.slots >= spec.slots } else { info.slots == spec.slots };
    if !slots {
        return Err(format!("it was asked for slots {} and answers with {}", spec.slots, info.slots));
    }
    check_gpu(&spec.device, info)?;
    for (i, column) in info.columns.iter().enumerate() {
        let elements = column.shape.iter().try_fold(u64::from(info.batch_size), |n, dim| n.checked_mul(*dim));
        let end = elements
            .and_then(|n| n.checked_mul(column.dtype.size_bytes() as u64))
            .and_then(|bytes| bytes.checked_add(column.offset));
        let (first, slot_bytes) = match (column.place, &info.gpu) {
            (Place::Host, _) => (first_column_offset(info.batch_size), info.slot_bytes),
            (Place::Device, Some(gpu)) => (0, gpu.slot_bytes),
            (Place::Device, None) => {
                return Err(format!("column {:?} is on a GPU, the ring is not", column.name));
            }
        };
        let inside = end.is_some_and(|end| end <= slot_bytes);
        if !inside || column.offset < first || column.offset % COLUMN_ALIGN != 0 {
            let ColumnInfo { name, shape, dtype, offset, .. } = column;
            return Err(format!(
                "column {name:?} of {shape:?} {dtype} at {offset} does not lie in a slot of {slot_bytes} bytes"
            ));
        }
        if let ColumnRole::Text { table } = column.role {
            let known = usize::try_from(table).is_ok_and(|table| table < info.text_tables.len());
            if !known || column.dtype != DType::Int32 || column.place != Place::Host {
                return Err(format!(
                    "text column {:?} of {} ({:?}) names table {table} of {}",
                    column.name,
                    column.dtype,
                    column.place,
                    info.text_tables.len()
                ));
            }
        }
        if info.columns.iter().take(i).any(|other| other.name == column.name) {
            return Err(format!("column {:?} comes twice", column.name));
        }
    }
    Ok(())
}

/// That the ring is on a GPU if and only if one was asked for, of that kind, and as large as it must be.
fn check_gpu(device: &str, info: &LoaderInfo) -> Result<(), String> {
    let asked = match device.split(':').next() {
        Some("cuda") => Some(GpuKind::Cuda),
        Some("sim") => Some(GpuKind::Sim),
        _ => None,
    };
    let told = info.gpu.as_ref().map(|gpu| gpu.kind);
    if asked != told {
        return Err(format!("it was asked for device {device:?} and answers with a ring on {told:?}"));
    }
    let Some(gpu) = &info.gpu else { return Ok(()) };
    let needed = gpu.slot_bytes.checked_mul(u64::from(info.slots));
    let large = needed.is_some_and(|needed| needed <= gpu.bytes);
    if !large || gpu.slot_bytes % GPU_SLOT_ALIGN != 0 || u32::try_from(gpu.ready.len()) != Ok(info.slots) {
        let (slots, events) = (info.slots, gpu.ready.len());
        return Err(format!(
            "its ring on the GPU has {slots} slots of {} bytes in {} bytes, and {events} events",
            gpu.slot_bytes, gpu.bytes
        ));
    }
    Ok(())
}
