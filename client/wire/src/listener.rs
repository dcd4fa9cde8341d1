//! The daemon's end of the socket: who may reach it, the file it is bound to, and the lock beside that.
//!
//! What must stay true: the socket file is never reachable by others, not even between `bind` and a `chmod`; its
//! directory is one that nobody else can put a socket into; whoever holds the lock is the only one who may remove
//! the file of a dead daemon, and removes nothing that is not a socket. The lock is held as long as the listener
//! lives, and its file stays behind: removing it would let two daemons lock two files of one name.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode};
use rustix::io::Errno;
use rustix::net::SocketFlags;

use crate::fds::{Connection, SocketError, address, socket};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

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
                Ok(fd) => return Ok(Some(Connection::accepted(fd))),
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
