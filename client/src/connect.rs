//! From a builder to a loader: find the daemon, ask, check every word of the answer, map the ring.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use robocache_types::DType;
use robocache_wire::batch::{COLUMN_ALIGN, first_column_offset};
use robocache_wire::consumer::Consumer;
use robocache_wire::fds::{self, Connection, Receive, Received, SocketError};
use robocache_wire::message::{ToClient, ToDaemon};
use robocache_wire::segment::Texts;
use robocache_wire::spec::{ColumnRole, LoaderInfo};
use rustix::io::Errno;

use crate::batch::Shared;
use crate::builder::{Embed, LoaderBuilder};
use crate::embedded::Embedded;
use crate::error::{ConnectError, Named};
use crate::loader::Loader;
use crate::text::TextTable;

/// How long a small message may take to be taken up by a daemon's socket buffer.
pub(crate) const SEND_PATIENCE: Duration = Duration::from_secs(5);
/// How often a waiting caller is asked whether to go on.
const SLICE: Duration = Duration::from_millis(100);

pub(crate) fn connect(
    builder: &LoaderBuilder,
    go_on: &mut dyn FnMut() -> ControlFlow<()>,
) -> Result<Loader, ConnectError> {
    let (connection, path, embedded) = reach(builder)?;
    connection.send(&ToDaemon::Open(Box::new(builder.spec.clone())), &[], SEND_PATIENCE)?;

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
    let texts = match (fds.next(), info.text_tables.is_empty()) {
        (_, true) => Vec::new(),
        (Some(fd), false) => TextTable::open_all(&Arc::new(Texts::open(&fd)?), &info.text_tables)?,
        (None, false) => {
            return Err(protocol("Opened names text tables and came without their memfd".to_owned()));
        }
    };
    let columns = info.columns.iter().enumerate().map(|(i, column)| (column.name.clone(), i));
    let columns: HashMap<_, _> = columns.collect();
    let shared = Arc::new(Shared { info, columns, texts });
    Ok(Loader::attached(shared, consumer, connection, builder.spec.start, path, embedded))
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
        ("slots", spec.slots, info.slots),
        ("drop_last", u32::from(spec.drop_last), u32::from(info.drop_last)),
    ] {
        if asked != told {
            return Err(format!("it was asked for {what} {asked} and answers with {told}"));
        }
    }
    let first = first_column_offset(info.batch_size);
    for (i, column) in info.columns.iter().enumerate() {
        let elements = column.shape.iter().try_fold(u64::from(info.batch_size), |n, dim| n.checked_mul(*dim));
        let end = elements
            .and_then(|n| n.checked_mul(column.dtype.size_bytes() as u64))
            .and_then(|bytes| bytes.checked_add(column.offset));
        let inside = end.is_some_and(|end| end <= info.slot_bytes);
        if !inside || column.offset < first || column.offset % COLUMN_ALIGN != 0 {
            return Err(format!(
                "column {:?} of {:?} {} at {} does not lie in a slot of {} bytes",
                column.name, column.shape, column.dtype, column.offset, info.slot_bytes
            ));
        }
        if let ColumnRole::Text { table } = column.role {
            let known = usize::try_from(table).is_ok_and(|table| table < info.text_tables.len());
            if !known || column.dtype != DType::Int32 {
                return Err(format!(
                    "text column {:?} of {} names table {table} of {}",
                    column.name,
                    column.dtype,
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
