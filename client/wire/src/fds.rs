//! Connections that carry messages and file descriptors: `SOCK_SEQPACKET`, one datagram a message. `docs/protocol.md`.
//!
//! What must stay true: descriptors received are owned from the first moment (closed on every error path) and close
//! on exec; a datagram or descriptor list that was cut is an error, never a shorter message. The end that listens,
//! and the socket file it owns, are in `listener.rs`; callers find both here.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::socket::sockopt::{PeerCredentials, PeerPidfd};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sockopt::Timeout,
};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

pub use crate::listener::{Access, Listener};
use crate::message::{DATAGRAM_LIMIT, DecodeError, EncodeError, Message};

/// Descriptors that one message carries at most.
pub const FDS_MAX: usize = 5;

/// How long to wait for a daemon that listens and does not accept. One that runs accepts within microseconds.
const CONNECT: Duration = Duration::from_secs(10);

/// A socket operation that did not work.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SocketError {
    #[error("{call} failed on a RoboCache socket: {source}")]
    System { call: &'static str, source: Errno },
    #[error("cannot connect to {path:?}: {source}")]
    Connect { path: PathBuf, source: Errno },
    #[error(
        "nobody accepted a connection to {path:?} within {waited_ms} ms, though somebody listens: the daemon may be stopped (SIGSTOP, a debugger) or out of descriptors"
    )]
    NotAccepted { path: PathBuf, waited_ms: u128 },
    #[error("cannot bind {path:?}: {source}")]
    Bind { path: PathBuf, source: Errno },
    #[error("a socket path has at most 107 bytes, {path:?} has {found}; choose a shorter one")]
    PathTooLong { path: PathBuf, found: usize },
    #[error("robocached already runs on {path:?}{}; stop it first (robocached stop) or choose another --socket", with_pid(*pid))]
    AlreadyRunning { path: PathBuf, pid: Option<u32> },
    #[error("{path:?} is no socket, and is left as it is; choose another --socket")]
    NotASocket { path: PathBuf },
    #[error("cannot prepare {path:?}")]
    Directory { path: PathBuf, source: std::io::Error },
    #[error(
        "the socket's directory {path:?} must be user {wanted_uid}'s and closed to writers of other users; it is user {uid}'s with mode {mode:o}. \
         Choose another --socket, or correct it: chmod 700 {path:?}"
    )]
    UnsafeDirectory { path: PathBuf, wanted_uid: u32, uid: u32, mode: u32 },
    #[error("the peer sent a datagram of more than {DATAGRAM_LIMIT} bytes; it was cut, and is refused")]
    Truncated,
    #[error(
        "the peer sent more than {FDS_MAX} descriptors, or this process has no room for more (RLIMIT_NOFILE); some were lost"
    )]
    DescriptorsLost,
    #[error("the peer does not read: {waited_ms} ms were not enough to send {len_bytes} bytes")]
    PeerDoesNotRead { len_bytes: usize, waited_ms: u128 },
    #[error("the peer has closed the connection")]
    Closed,
    #[error(transparent)]
    Encode(#[from] EncodeError),
    #[error(transparent)]
    Decode(#[from] DecodeError),
}

fn with_pid(pid: Option<u32>) -> String {
    pid.map_or_else(String::new, |pid| format!(" as process {pid}"))
}

/// Who is at the other end, as the kernel knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// `None`: a process that this PID namespace does not show.
    pub pid: Option<u32>,
    pub uid: u32,
    pub gid: u32,
}

/// Whether to wait for a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Receive {
    /// Take what is there.
    Now,
    /// Wait this long.
    Within(Duration),
}

/// What a receive found.
#[derive(Debug)]
pub enum Received<M> {
    Message(M, Vec<OwnedFd>),
    /// Nothing (in time).
    Nothing,
    /// The peer hung up.
    Closed,
}

/// One end of a connection.
#[derive(Debug)]
pub struct Connection {
    fd: OwnedFd,
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Connection {
    /// Connect to the daemon at `path`.
    pub fn connect(path: &Path) -> Result<Self, SocketError> {
        Self::connect_within(path, CONNECT)
    }

    /// The same, waiting up to `patience` where as many as the daemon's backlog holds wait already.
    pub fn connect_within(path: &Path, patience: Duration) -> Result<Self, SocketError> {
        let fd = socket()?;
        let address = address(path)?;
        rustix::net::sockopt::set_socket_timeout(&fd, Timeout::Send, Some(patience))
            .map_err(|source| SocketError::System { call: "setsockopt", source })?;
        loop {
            match rustix::net::connect(&fd, &address) {
                Ok(()) => return Ok(Self { fd }),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let waited_ms = patience.as_millis();
                    return Err(SocketError::NotAccepted { path: path.to_owned(), waited_ms });
                }
                Err(source) => return Err(SocketError::Connect { path: path.to_owned(), source }),
            }
        }
    }

    /// The daemon's end of a connection that was accepted.
    pub(crate) fn accepted(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// Two connected ends, for tests and children.
    pub fn pair() -> Result<(Self, Self), SocketError> {
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map(|(a, b)| (Self { fd: a }, Self { fd: b }))
            .map_err(|source| SocketError::System { call: "socketpair", source })
    }

    /// Send a message with descriptors, waiting up to `patience` for room (zero: not at all).
    pub fn send<M: Message>(
        &self,
        message: &M,
        fds: &[BorrowedFd<'_>],
        patience: Duration,
    ) -> Result<(), SocketError> {
        self.send_datagram(&message.encode()?, fds, patience)
    }

    /// Send bytes that are a whole datagram.
    pub fn send_datagram(
        &self,
        datagram: &[u8],
        fds: &[BorrowedFd<'_>],
        patience: Duration,
    ) -> Result<(), SocketError> {
        let start = Instant::now();
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if fds.len() > FDS_MAX || !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(SocketError::DescriptorsLost);
            }
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match rustix::net::sendmsg(&self.fd, &[IoSlice::new(datagram)], &mut control, flags) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let left = patience.saturating_sub(start.elapsed());
                    if left.is_zero() {
                        let waited_ms = patience.as_millis();
                        return Err(SocketError::PeerDoesNotRead { len_bytes: datagram.len(), waited_ms });
                    }
                    self.poll(PollFlags::OUT, left)?;
                }
                Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => return Err(SocketError::Closed),
                Err(source) => return Err(SocketError::System { call: "sendmsg", source }),
            }
        }
    }

    /// Receive a message.
    pub fn receive<M: Message>(&self, receive: Receive) -> Result<Received<M>, SocketError> {
        Ok(match self.receive_datagram(receive)? {
            Received::Message(bytes, fds) => Received::Message(M::decode(&bytes)?, fds),
            Received::Nothing => Received::Nothing,
            Received::Closed => Received::Closed,
        })
    }

    /// Receive one datagram, whatever it holds.
    pub fn receive_datagram(&self, receive: Receive) -> Result<Received<Vec<u8>>, SocketError> {
        let start = Instant::now();
        loop {
            // Ask first, so that the usual "nothing" costs no buffer.
            let left = match receive {
                Receive::Now => Duration::ZERO,
                Receive::Within(limit) => limit.saturating_sub(start.elapsed()),
            };
            if self.poll(PollFlags::IN, left)?.is_empty() {
                if left.is_zero() {
                    return Ok(Received::Nothing);
                }
                continue;
            }
            match self.take()? {
                Received::Nothing => {}
                found => return Ok(found),
            }
        }
    }

    fn take(&self) -> Result<Received<Vec<u8>>, SocketError> {
        let mut bytes = vec![0; DATAGRAM_LIMIT];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let message =
            match rustix::net::recvmsg(&self.fd, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags) {
                Ok(message) => message,
                Err(Errno::AGAIN | Errno::INTR) => return Ok(Received::Nothing),
                Err(Errno::CONNRESET) => return Ok(Received::Closed),
                Err(source) => return Err(SocketError::System { call: "recvmsg", source }),
            };
        let fds: Vec<OwnedFd> = control
            .drain()
            .filter_map(|ancillary| match ancillary {
                RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                _ => None,
            })
            .flatten()
            .collect();
        // Alignment may leave room for one more than asked for.
        if message.flags.contains(ReturnFlags::CTRUNC) || fds.len() > FDS_MAX {
            return Err(SocketError::DescriptorsLost);
        }
        if message.flags.contains(ReturnFlags::TRUNC) {
            return Err(SocketError::Truncated);
        }
        if message.bytes == 0 {
            // An empty datagram looks the same as a hang-up, and is no message of ours either.
            return Ok(Received::Closed);
        }
        bytes.truncate(message.bytes);
        Ok(Received::Message(bytes, fds))
    }

    /// Which of `wanted` (or a hang-up) is there within `limit`; empty: none. A signal ends the wait early.
    fn poll(&self, wanted: PollFlags, limit: Duration) -> Result<PollFlags, SocketError> {
        let mut fds = [PollFd::new(&self.fd, wanted)];
        let limit = Timespec {
            tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(limit.subsec_nanos()),
        };
        match rustix::event::poll(&mut fds, Some(&limit)) {
            Ok(_) => Ok(fds[0].revents()),
            Err(Errno::INTR) => Ok(PollFlags::empty()),
            Err(source) => Err(SocketError::System { call: "poll", source }),
        }
    }

    /// A pidfd of the peer's process: readable when that is gone, even if a child of it still holds the socket.
    ///
    /// From Linux 6.5 on of any process, before that of one that this PID namespace shows; `None` where there is none
    /// to be had, as of a process that is gone already.
    pub fn peer_pidfd(&self) -> Option<OwnedFd> {
        match nix::sys::socket::getsockopt(&self.fd, PeerPidfd) {
            Ok(pidfd) => Some(pidfd),
            // Gone, as one kernel or another says it; its number may be another process's by now.
            Err(nix::Error::ESRCH | nix::Error::EINVAL) => None,
            Err(_unknown) => {
                let pid = i32::try_from(self.peer().ok()?.pid?).ok()?;
                pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()
            }
        }
    }

    /// Who is at the other end: who connected, or who listened.
    pub fn peer(&self) -> Result<Peer, SocketError> {
        let found = nix::sys::socket::getsockopt(&self.fd, PeerCredentials).map_err(|source| {
            SocketError::System {
                call: "getsockopt(SO_PEERCRED)",
                source: Errno::from_raw_os_error(source as i32),
            }
        })?;
        Ok(Peer {
            pid: u32::try_from(found.pid()).ok().filter(|pid| *pid != 0),
            uid: found.uid(),
            gid: found.gid(),
        })
    }
}

pub(crate) fn socket() -> Result<OwnedFd, SocketError> {
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .map_err(|source| SocketError::System { call: "socket", source })
}

pub(crate) fn address(path: &Path) -> Result<SocketAddrUnix, SocketError> {
    SocketAddrUnix::new(path).map_err(|source| match source {
        Errno::NAMETOOLONG => {
            SocketError::PathTooLong { path: path.to_owned(), found: path.as_os_str().len() }
        }
        source => SocketError::Connect { path: path.to_owned(), source },
    })
}

/// `$ROBOCACHE_SOCKET`, else `$XDG_RUNTIME_DIR/robocache/robocached.sock`, else `/tmp/robocache-UID/robocached.sock`.
pub fn default_socket_path() -> PathBuf {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(path) = set("ROBOCACHE_SOCKET") {
        return path;
    }
    let directory = set("XDG_RUNTIME_DIR").map_or_else(
        || PathBuf::from(format!("/tmp/robocache-{}", rustix::process::geteuid().as_raw())),
        |runtime| runtime.join("robocache"),
    );
    directory.join("robocached.sock")
}

/// Whether a client of this user may trust a daemon of user `uid` behind the socket at `path`: its own user, root, or
/// the owner of the socket's directory.
pub fn may_trust(path: &Path, uid: u32) -> bool {
    let own = rustix::process::geteuid().as_raw();
    let owner = path.parent().and_then(|parent| std::fs::metadata(parent).ok()).map(|found| found.uid());
    uid == own || uid == 0 || owner == Some(uid)
}
