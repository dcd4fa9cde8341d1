//! One client's connection: what it may say when, and what it holds.
//!
//! ```text
//!   Idle ── Open ──▶ Opening ── planned ──▶ Serving ── hang-up ──▶ (gone)
//!     ▲                 │ refused
//!     └─────────────────┘
//! ```
//!
//! The poll thread owns sessions and never waits for one: opening and producing happen on the session's own thread,
//! sending never blocks. A peer that says what makes no sense is told so, or dropped where it cannot be told.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use parking_lot::Mutex;
use robocache_wire::fds::{Connection, Peer, Receive, Received};
use robocache_wire::message::{RefusalCode, ToClient, ToDaemon};
use robocache_wire::spec::LoaderSpec;

use crate::catalog::Trust;
use crate::loader::Loader;
use crate::open::{self, Host};

/// How often, in milliseconds, a wait for a client's end looks whether the daemon stops.
const SLICE: u16 = 50;
/// How long a client that hung up is given to end where its end cannot be seen.
const UNSEEN: Duration = Duration::from_secs(10);

/// One connected client.
#[derive(Debug)]
pub struct Session {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What the session's thread and the poll thread share.
#[derive(Debug)]
pub struct Shared {
    pub socket: Connection,
    pub peer: Peer,
    pub trust: Trust,
    /// The daemon's number for this client; the owner in its slot words.
    pub client: u32,
    /// Fires when the client's process is gone, even if a child of it still holds the socket.
    pidfd: Option<OwnedFd>,
    loader: Mutex<Option<Arc<Loader>>>,
    gone: AtomicBool,
    /// The client said that it is done with its ring.
    said_bye: AtomicBool,
}

/// What the poll thread does after a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Keep,
    /// The client is gone, or must go.
    Close,
    /// It asked for the daemon's status.
    Status,
    /// It asked the daemon to stop.
    Stop(Haste),
}

/// How to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Haste {
    Drain,
    Now,
}

impl Session {
    pub fn new(socket: Connection, peer: Peer, trust: Trust, client: u32) -> Self {
        let pidfd = socket.peer_pidfd();
        if pidfd.is_none() {
            tracing::debug!(
                client,
                pid = peer.pid,
                "no pidfd for this client; its death shows when its socket closes"
            );
        }
        let (loader, gone, said_bye) = (Mutex::new(None), AtomicBool::new(false), AtomicBool::new(false));
        let shared = Shared { socket, peer, trust, client, pidfd, loader, gone, said_bye };
        Self { shared: Arc::new(shared), thread: None }
    }

    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    pub fn socket(&self) -> BorrowedFd<'_> {
        self.shared.socket.as_fd()
    }

    pub fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        self.shared.pidfd.as_ref().map(AsFd::as_fd)
    }

    /// Reads and answers one message.
    pub fn readable(&mut self, host: &Arc<Host>) -> Outcome {
        let client = self.shared.client;
        let message = match self.shared.socket.receive::<ToDaemon>(Receive::Now) {
            Ok(Received::Message(message, _fds)) => message,
            Ok(Received::Nothing) => return Outcome::Keep,
            Ok(Received::Closed) => return Outcome::Close,
            Err(error) => {
                let error = crate::loader::chain(&error);
                tracing::warn!(client, error, "a client sent what is no message; dropping it");
                self.shared.refuse(RefusalCode::BadRequest, error);
                return Outcome::Close;
            }
        };
        match message {
            ToDaemon::Open(spec) => self.open(*spec, host),
            ToDaemon::Seek { run, position } => {
                match self.shared.loader() {
                    Some(loader) => loader.seek(run, position),
                    None => self.shared.refuse(RefusalCode::BadRequest, "Seek came before Open".to_owned()),
                }
                Outcome::Keep
            }
            ToDaemon::Status => Outcome::Status,
            ToDaemon::Stop { now } => Outcome::Stop(if now { Haste::Now } else { Haste::Drain }),
            ToDaemon::Attached { done } => {
                match self.shared.loader() {
                    Some(loader) => loader.attach(done),
                    None => {
                        self.shared.refuse(RefusalCode::BadRequest, "Attached came before Open".to_owned())
                    }
                }
                Outcome::Keep
            }
            ToDaemon::Bye => {
                self.shared.said_bye.store(true, Ordering::SeqCst);
                Outcome::Close
            }
        }
    }

    fn open(&mut self, spec: LoaderSpec, host: &Arc<Host>) -> Outcome {
        if self.thread.as_ref().is_some_and(|thread| !thread.is_finished()) {
            let message = "this connection has a loader already; connect again for another".to_owned();
            self.shared.refuse(RefusalCode::BadRequest, message);
            return Outcome::Keep;
        }
        let (shared, host) = (Arc::clone(&self.shared), Arc::clone(host));
        let name = format!("loader-{}", shared.client);
        match std::thread::Builder::new().name(name).spawn(move || open::serve(&shared, spec, &host)) {
            Ok(thread) => self.thread = Some(thread),
            Err(error) => {
                self.shared.refuse(RefusalCode::Busy, format!("the daemon cannot start a thread: {error}"));
            }
        }
        Outcome::Keep
    }

    /// Ends the client's loader, whose thread the caller joins when it has time.
    ///
    /// What it leased is not taken back into the ring: a client that closed its loader may go on reading the batches
    /// it holds, and a slot freed here would be filled again before the thread sees that it is to stop. The ring
    /// itself goes with the loader, and its pages when the client lets go of its mapping or dies.
    pub fn close(self) -> Option<JoinHandle<()>> {
        self.shared.gone.store(true, Ordering::SeqCst);
        if let Some(loader) = self.shared.loader() {
            tracing::debug!(client = self.shared.client, "client gone");
            loader.stop();
        }
        self.thread
    }
}

impl Shared {
    pub fn loader(&self) -> Option<Arc<Loader>> {
        self.loader.lock().clone()
    }

    /// Puts a loader in place; it is told to stop at once if the client has gone meanwhile.
    pub fn set_loader(&self, loader: Option<Arc<Loader>>) {
        (*self.loader.lock()).clone_from(&loader);
        if let Some(loader) = loader
            && self.gone.load(Ordering::SeqCst)
        {
            loader.stop();
        }
    }

    /// Waits until nothing of the client's can touch the GPU memory of its ring any more: it said that it closed it, or
    /// its process, whose kernels may run until its end, is gone. Ends early when `stopping` says so.
    pub fn wait_until_unmapped(&self, stopping: &AtomicBool) {
        let mut waiting = Duration::ZERO;
        while !self.said_bye.load(Ordering::SeqCst) && !stopping.load(Ordering::SeqCst) {
            match &self.pidfd {
                Some(pidfd) => {
                    let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
                    // An interrupted wait is asked again.
                    if poll(&mut fds, PollTimeout::from(SLICE)).is_ok_and(|ready| ready > 0) {
                        return;
                    }
                }
                // Without one (another PID namespace, before Linux 6.5) there is no end to see, so long enough must do.
                None if waiting > UNSEEN => return,
                None => std::thread::sleep(Duration::from_millis(u64::from(SLICE))),
            }
            waiting += Duration::from_millis(u64::from(SLICE));
        }
    }

    pub fn refuse(&self, code: RefusalCode, message: String) {
        self.send(&ToClient::Refused { code, message }, &[]);
    }

    /// Sends a message, or logs why not: a client that does not read must not hold up the daemon.
    pub fn send(&self, message: &ToClient, fds: &[BorrowedFd<'_>]) {
        if let Err(error) = self.socket.send(message, fds, Duration::ZERO) {
            let error = crate::loader::chain(&error);
            tracing::warn!(client = self.client, pid = self.peer.pid, error, "cannot send to a client");
        }
    }
}
