//! `robocached status` and `robocached stop`: questions to a running daemon over its own socket.
//!
//! The daemon that answers is trusted as far as a client would trust it (its user, or root, or the owner of the
//! socket's directory) and no further: its JSON is shown, never acted on. The process that is waited for, and
//! killed if it must be, is the one the kernel names as the socket's peer.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use robocache_wire::fds::{Connection, Receive, Received, SocketError, default_socket_path, may_trust};
use robocache_wire::message::{ToClient, ToDaemon};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::Value;

use crate::cli::{self, StatusArgs, StopArgs};
use crate::exit::{Exit, Failure};

mod table;

/// How long a daemon may take to answer.
const ANSWER: Duration = Duration::from_secs(10);
/// How long it may take to let its clients go: its own limit, and some.
const DRAIN: Duration = Duration::from_secs(60);
/// How long it may take to go when asked to go now.
const NOW: Duration = Duration::from_secs(2);

/// A question that got no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AskError {
    #[error(
        "no daemon on {socket:?}; start one with `robocached serve --dataset NAME=PATH`, or name another --socket"
    )]
    NoDaemon { socket: PathBuf },
    #[error(
        "the daemon on {socket:?} belongs to user {uid}, who is neither you, nor root, nor the directory's owner"
    )]
    Stranger { socket: PathBuf, uid: u32 },
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error("the daemon on {socket:?} refused: {message}")]
    Refused { socket: PathBuf, message: String },
    #[error("the daemon on {socket:?} said nothing for {waited_s} s")]
    Silent { socket: PathBuf, waited_s: u64 },
    #[error("the daemon on {socket:?} answered {found}, not {wanted}")]
    Unexpected { socket: PathBuf, wanted: &'static str, found: String },
}

impl AskError {
    /// The exit code it deserves.
    pub fn exit(&self) -> Exit {
        match self {
            Self::NoDaemon { .. } => Exit::NoDaemon,
            _ => Exit::Failed,
        }
    }
}

/// With the exit code of its own, which `?` alone would lose.
fn failure(error: AskError) -> Failure {
    Failure::new(error.exit(), error)
}

/// The socket meant: the one named, else the default.
pub fn socket_path(named: Option<&Path>) -> PathBuf {
    named.map_or_else(default_socket_path, Path::to_owned)
}

/// What the daemon on `socket` says of itself.
///
/// # Errors
///
/// No daemon, one that is not trusted, or one that does not answer as it should.
pub fn ask_status(socket: &Path) -> Result<Value, AskError> {
    let (_connection, answer) = ask(socket, &ToDaemon::Status)?;
    match answer {
        ToClient::StatusReply(status) => Ok(status),
        other => Err(unexpected(socket, "a status", &other)),
    }
}

fn unexpected(socket: &Path, wanted: &'static str, found: &ToClient) -> AskError {
    AskError::Unexpected { socket: socket.to_owned(), wanted, found: format!("{found:?}") }
}

fn ask(socket: &Path, question: &ToDaemon) -> Result<(Connection, ToClient), AskError> {
    let connection = match Connection::connect(socket) {
        Err(SocketError::Connect { source: Errno::NOENT | Errno::CONNREFUSED | Errno::NOTDIR, .. }) => {
            return Err(AskError::NoDaemon { socket: socket.to_owned() });
        }
        outcome => outcome?,
    };
    let uid = connection.peer()?.uid;
    if !may_trust(socket, uid) {
        return Err(AskError::Stranger { socket: socket.to_owned(), uid });
    }
    connection.send(question, &[], ANSWER)?;
    match connection.receive(Receive::Within(ANSWER))? {
        Received::Message(ToClient::Refused { message, .. }, _) => {
            Err(AskError::Refused { socket: socket.to_owned(), message })
        }
        Received::Message(answer, _) => Ok((connection, answer)),
        Received::Nothing => Err(AskError::Silent { socket: socket.to_owned(), waited_s: ANSWER.as_secs() }),
        Received::Closed => Err(SocketError::Closed.into()),
    }
}

/// Does what `robocached status` was asked to.
///
/// # Errors
///
/// As [`ask_status`].
pub fn status(args: &StatusArgs) -> Result<Exit, Failure> {
    let status = ask_status(&socket_path(args.socket.as_deref())).map_err(failure)?;
    let text = if args.json { format!("{status:#}\n") } else { table::render(&status) };
    cli::print(&text)?;
    Ok(Exit::Ok)
}

/// Does what `robocached stop` was asked to.
///
/// # Errors
///
/// No daemon, or it does not go.
pub fn stop(args: &StopArgs) -> Result<Exit, Failure> {
    let socket = socket_path(args.socket.as_deref());
    let (connection, answer) = ask(&socket, &ToDaemon::Stop { now: args.now }).map_err(failure)?;
    let ToClient::Stopping { pid: said } = answer else {
        return Err(unexpected(&socket, "that it stops", &answer).into());
    };
    // What it says of itself may be of another PID namespace, or a lie; what the kernel says can be waited for.
    let peer = connection.peer().map_err(AskError::from)?.pid;
    let process = peer.and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?)).map(open);
    // While a client hangs on, a draining daemon waits for it.
    let (held, process) = match process {
        Some(Process::Gone) => return gone(said),
        Some(Process::Running(pidfd)) => (None, Some(pidfd)),
        Some(Process::Unwatchable) | None => (Some(connection), None),
    };
    let limit = if args.now { NOW } else { DRAIN };
    let ended = match (&process, &held) {
        (Some(pidfd), _) => ends(pidfd, limit)?,
        (None, Some(connection)) => hangs_up(connection, limit)?,
        (None, None) => true,
    };
    if ended {
        return gone(said);
    }
    match process {
        Some(pidfd) if args.now => {
            pidfd_send_signal(&pidfd, Signal::KILL)?;
            if ends(&pidfd, ANSWER)? {
                cli::print(&format!("process {said} did not go by itself and was killed\n"))?;
                return Ok(Exit::Ok);
            }
        }
        _ => {}
    }
    Err(anyhow::anyhow!(
        "process {said} is still there after {} s; look at its log, or use `robocached stop --now`",
        limit.as_secs()
    )
    .into())
}

fn gone(pid: u32) -> Result<Exit, Failure> {
    cli::print(&format!("process {pid} has stopped\n"))?;
    Ok(Exit::Ok)
}

enum Process {
    Running(OwnedFd),
    Gone,
    /// The kernel cannot watch it for us.
    Unwatchable,
}

fn open(pid: Pid) -> Process {
    match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => Process::Running(pidfd),
        Err(Errno::SRCH) => Process::Gone,
        Err(_) => Process::Unwatchable,
    }
}

/// Whether the process ends within `limit`.
fn ends(pidfd: &OwnedFd, limit: Duration) -> Result<bool, Errno> {
    let start = Instant::now();
    loop {
        let left = limit.saturating_sub(start.elapsed());
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        match rustix::event::poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&timeout)) {
            Ok(0) if left.is_zero() => return Ok(false),
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(true),
            Err(error) => return Err(error),
        }
    }
}

/// Whether the daemon closes the connection within `limit`.
fn hangs_up(connection: &Connection, limit: Duration) -> Result<bool, AskError> {
    let start = Instant::now();
    loop {
        let left = limit.saturating_sub(start.elapsed());
        match connection.receive::<ToClient>(Receive::Within(left))? {
            Received::Closed => return Ok(true),
            Received::Nothing if left.is_zero() => return Ok(false),
            Received::Nothing | Received::Message(..) => {}
        }
    }
}
