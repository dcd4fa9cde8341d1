//! Sockets that carry messages and file descriptors: `SOCK_SEQPACKET`, one datagram a message. `docs/protocol.md`.
//!
//! What must stay true: descriptors received are owned from the first moment (closed on every error path) and close
//! on exec; a datagram or descriptor list that was cut is an error, never a shorter message; the socket file is
//! never reachable by others, not even between `bind` and a `chmod`.

use std::fs::{File, OpenOptions};
use std::io::{IoSlice, IoSliceMut, Read as _, Seek as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::socket::sockopt::PeerCredentials;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{FlockOperation, Mode};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

use crate::message::{DATAGRAM_LIMIT, DecodeError, EncodeError, Message};

/// Descriptors that one message carries at most.
pub const FDS_MAX: usize = 5;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// A socket operation that did not work.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SocketError {
    #[error("{call} failed on a RoboCache socket: {source}")]
    System { call: &'static str, source: Errno },
    #[error("cannot connect to {path:?}: {source}")]
    Connect { path: PathBuf, source: Errno },
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
        let fd = socket()?;
        let address = address(path)?;
        loop {
            match rustix::net::connect(&fd, &address) {
                Ok(()) => return Ok(Self { fd }),
                Err(Errno::INTR) => {}
                Err(source) => return Err(SocketError::Connect { path: path.to_owned(), source }),
            }
        }
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

/// Who may connect, as far as the file system says. The daemon also looks at [`Connection::peer`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// This user: mode 0600.
    Owner,
    /// This user and the group of this number: mode 0660.
    Group(u32),
}

/// A bound socket that accepts connections. It is non-blocking: poll it. Dropping it removes the socket file.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
    path: PathBuf,
    inode: (u64, u64),
    /// Locked as long as we live.
    _lock: File,
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Listener {
    /// Bind `path`, replacing what a dead daemon left there. A live one is [`SocketError::AlreadyRunning`].
    ///
    /// Sets the process's umask for a moment: call it before other threads create files.
    pub fn bind(path: &Path, access: Access) -> Result<Self, SocketError> {
        let address = address(path)?;
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        prepare_directory(directory.unwrap_or_else(|| Path::new(".")))?;
        let lock = lock(path)?;
        // We have the lock, so nobody of this version listens; look all the same before removing anything.
        match Connection::connect(path) {
            Ok(live) => {
                let pid = live.peer()?.pid;
                return Err(SocketError::AlreadyRunning { path: path.to_owned(), pid });
            }
            Err(SocketError::Connect { source: Errno::NOENT, .. }) => {}
            Err(SocketError::Connect { source: Errno::CONNREFUSED, .. }) => {
                // A plain file refuses connections too, and is not ours to remove.
                let found = std::fs::symlink_metadata(path).map_err(failed_at(path))?;
                if !found.file_type().is_socket() {
                    return Err(SocketError::NotASocket { path: path.to_owned() });
                }
                std::fs::remove_file(path).map_err(failed_at(path))?;
            }
            Err(other) => return Err(other),
        }
        let failed = |source| SocketError::Bind { path: path.to_owned(), source };
        let fd = socket()?;
        rustix::io::ioctl_fionbio(&fd, true).map_err(failed)?;
        let before = rustix::process::umask(Mode::from_raw_mode(0o177));
        let bound = rustix::net::bind(&fd, &address);
        rustix::process::umask(before);
        bound.map_err(failed)?;
        if let Access::Group(group) = access {
            // The group first: 0660 for the wrong group must never exist.
            std::os::unix::fs::chown(path, None, Some(group)).map_err(failed_at(path))?;
            rustix::fs::chmod(path, Mode::from_raw_mode(0o660)).map_err(failed)?;
        }
        rustix::net::listen(&fd, BACKLOG).map_err(failed)?;
        let inode = inode(path).map_err(failed_at(path))?;
        Ok(Self { fd, path: path.to_owned(), inode, _lock: lock })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A connection that waits, if there is one.
    pub fn accept(&self) -> Result<Option<Connection>, SocketError> {
        loop {
            match rustix::net::accept_with(&self.fd, SocketFlags::CLOEXEC) {
                Ok(fd) => return Ok(Some(Connection { fd })),
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(source) => return Err(SocketError::System { call: "accept", source }),
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Only our own file: somebody may have put another there.
        if inode(&self.path).is_ok_and(|found| found == self.inode) {
            std::fs::remove_file(&self.path).ok();
        }
    }
}

fn failed_at(path: &Path) -> impl Fn(std::io::Error) -> SocketError {
    move |source| SocketError::Directory { path: path.to_owned(), source }
}

fn inode(path: &Path) -> std::io::Result<(u64, u64)> {
    std::fs::symlink_metadata(path).map(|found| (found.dev(), found.ino()))
}

fn socket() -> Result<OwnedFd, SocketError> {
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .map_err(|source| SocketError::System { call: "socket", source })
}

fn address(path: &Path) -> Result<SocketAddrUnix, SocketError> {
    SocketAddrUnix::new(path).map_err(|source| match source {
        Errno::NAMETOOLONG => {
            SocketError::PathTooLong { path: path.to_owned(), found: path.as_os_str().len() }
        }
        source => SocketError::Connect { path: path.to_owned(), source },
    })
}

/// The lock file beside the socket, locked for us.
fn lock(path: &Path) -> Result<File, SocketError> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let name = PathBuf::from(name);
    let io = |source| SocketError::Directory { path: name.clone(), source };
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(i32::try_from(rustix::fs::OFlags::NOFOLLOW.bits()).unwrap_or(0))
        .open(&name)
        .map_err(io)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::AGAIN) => {
            let pid = Connection::connect(path).and_then(|live| live.peer()).ok().and_then(|peer| peer.pid);
            let written = || {
                let mut text = String::new();
                file.read_to_string(&mut text).ok()?;
                text.trim().parse().ok()
            };
            return Err(SocketError::AlreadyRunning { path: path.to_owned(), pid: pid.or_else(written) });
        }
        Err(source) => return Err(io(source.into())),
    }
    file.set_len(0).map_err(io)?;
    file.rewind().map_err(io)?;
    writeln!(file, "{}", std::process::id()).map_err(io)?;
    Ok(file)
}

/// Make the socket's directory (0700) or see that nobody else can put a socket into it.
fn prepare_directory(directory: &Path) -> Result<(), SocketError> {
    let io = |source| SocketError::Directory { path: directory.to_owned(), source };
    match std::fs::DirBuilder::new().mode(0o700).recursive(true).create(directory) {
        Ok(()) => {}
        Err(source) => return Err(io(source)),
    }
    let found = std::fs::metadata(directory).map_err(io)?;
    let wanted_uid = rustix::process::geteuid().as_raw();
    let (uid, mode) = (found.uid(), found.mode() & 0o7777);
    // In a sticky directory (/tmp) only the owner of a file can replace it, and clients look at the owner.
    let closed = mode & 0o022 == 0 || mode & 0o1000 != 0;
    if (uid != wanted_uid && uid != 0) || !closed {
        return Err(SocketError::UnsafeDirectory { path: directory.to_owned(), wanted_uid, uid, mode });
    }
    Ok(())
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
