//! The poll loop: one thread that listens, reads messages, watches for deaths and signals, and waits for nothing else.
//!
//! ```text
//!   Serving ── SIGTERM, SIGINT, Stop, end of stdin, idle ──▶ Draining ── all taken, or too late ──▶ stopped
//!      └────────── second signal, Stop now ──────────────────────┴──────────────────────────────────▶ stopped
//! ```
//!
//! It owns the sessions. Whatever may take time happens elsewhere: opening and producing on a session's own thread,
//! decoding on the readers, filling on the assemblers. Dropping the listener removes the socket file; a daemon that
//! is killed leaves it behind, and the next one takes its place (`docs/protocol.md`).

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use robocache_wire::fds::{Access, Connection, Listener, Peer, SocketError, default_socket_path};
use robocache_wire::message::{RefusalCode, ToClient};

use crate::assemblers::Assemblers;
use crate::catalog::{Catalog, Trust};
use crate::config::{Config, ServeOptions};
use crate::gpu::host::Gpus;
use crate::host::Memory;
use crate::open::Host;
use crate::report;
use crate::session::{Haste, Outcome, Session};
use crate::store::Store;

/// Clients at once; each takes a thread and a few descriptors.
const SESSIONS: usize = 1024;
/// How long clients may take to collect what is ready when the daemon drains.
const DRAIN: Duration = Duration::from_secs(5);

/// Why the daemon cannot serve.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error("{what}")]
    System { what: &'static str, source: std::io::Error },
    #[error("no group {name:?} on this host; name one that exists in `group`, or leave it out")]
    NoGroup { name: String },
}

/// Serves until told to stop.
///
/// # Errors
///
/// Another daemon serves the socket ([`SocketError::AlreadyRunning`]), or the host refuses a socket, a thread or a
/// signal handler.
pub fn run(options: ServeOptions) -> Result<(), ServeError> {
    // Before any thread starts, so that all of them leave signals to the poll loop.
    let signals = block_signals()?;
    let config = &options.config;
    let group = config.group.as_deref().map(group_id).transpose()?;
    let path = config.socket.clone().unwrap_or_else(default_socket_path);
    let listener = Listener::bind(&path, group.map_or(Access::Owner, Access::Group))?;

    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let readers = config.threads.readers.map_or(cpus, usize::from);
    let assemblers = config.threads.assemblers.map_or(cpus, usize::from);
    let budget = budget(config);
    let store = Store::new(budget);
    let reader_threads = (0..readers)
        .map(|number| {
            let store = Arc::clone(&store);
            std::thread::Builder::new()
                .name(format!("read-{number}"))
                .spawn(move || store.read_until_closed())
        })
        .collect::<Result<Vec<_>, _>>()
        .map_err(|source| ServeError::System { what: "cannot start reader threads", source })?;
    let host = Arc::new(Host {
        catalog: Catalog::new(Arc::clone(&store), config.datasets.clone()),
        assemblers: Assemblers::start(assemblers)
            .map_err(|source| ServeError::System { what: "cannot start assembler threads", source })?,
        gpus: Gpus::new(config.gpu, budget),
        stopping: AtomicBool::new(false),
        store: Arc::clone(&store),
    });
    tracing::info!(socket = ?path, pid = std::process::id(), memory = budget, readers, assemblers, "serving");
    let mut server = Server {
        options,
        listener,
        signals,
        group,
        host,
        sessions: BTreeMap::new(),
        next_client: 1,
        leaving: Vec::new(),
        draining: None,
        started: Instant::now(),
        idle_since: Instant::now(),
    };
    server.serve();
    let Server { listener, host, sessions, mut leaving, .. } = server;
    drop(listener); // no more clients from here on
    host.stopping.store(true, Ordering::SeqCst);
    leaving.extend(sessions.into_values().filter_map(Session::close));
    store.nudge();
    for thread in leaving {
        join(thread);
    }
    store.close();
    for thread in reader_threads {
        join(thread);
    }
    match Arc::try_unwrap(host) {
        Ok(host) => {
            host.gpus.finish();
            host.assemblers.finish();
        }
        Err(_held) => tracing::error!("a session outlived its thread; this is a bug"),
    }
    tracing::info!("stopped");
    Ok(())
}

fn join(thread: JoinHandle<()>) {
    let name = thread.thread().name().unwrap_or("a thread").to_owned();
    if thread.join().is_err() {
        tracing::error!(thread = name, "a thread panicked; this is a bug");
    }
}

fn budget(config: &Config) -> u64 {
    config.memory.map_or_else(|| Memory::now().default_budget(), |bytes| bytes.0)
}

fn block_signals() -> Result<SignalFd, ServeError> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        set.add(signal);
    }
    let system = |what| move |errno: nix::Error| ServeError::System { what, source: errno.into() };
    set.thread_block().map_err(system("cannot block signals"))?;
    SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
        .map_err(system("cannot make a signalfd"))
}

fn group_id(name: &str) -> Result<u32, ServeError> {
    match nix::unistd::Group::from_name(name) {
        Ok(Some(group)) => Ok(group.gid.as_raw()),
        Ok(None) => Err(ServeError::NoGroup { name: name.to_owned() }),
        Err(errno) => Err(ServeError::System { what: "cannot look up the group", source: errno.into() }),
    }
}

/// The state of the poll loop.
struct Server {
    options: ServeOptions,
    listener: Listener,
    signals: SignalFd,
    group: Option<u32>,
    host: Arc<Host>,
    sessions: BTreeMap<u32, Session>,
    next_client: u32,
    /// Threads of sessions that are gone.
    leaving: Vec<JoinHandle<()>>,
    /// Since when, if at all.
    draining: Option<Instant>,
    started: Instant,
    idle_since: Instant,
}

/// Whether the loop goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    GoOn,
    Leave,
}

/// What a polled descriptor belongs to.
#[derive(Debug, Clone, Copy)]
enum Source {
    Listener,
    Signals,
    Stdin,
    Socket(u32),
    Process(u32),
}

impl Server {
    fn serve(&mut self) {
        loop {
            for source in self.wait() {
                if self.handle(source) == Next::Leave {
                    return;
                }
            }
            self.leaving = std::mem::take(&mut self.leaving)
                .into_iter()
                .filter_map(|thread| {
                    if thread.is_finished() {
                        join(thread);
                        None
                    } else {
                        Some(thread)
                    }
                })
                .collect();
            if self.is_drained() {
                return;
            }
            self.look_at_idleness();
        }
    }

    fn wait(&self) -> Vec<Source> {
        let stdin = std::io::stdin();
        let mut sources = vec![Source::Listener, Source::Signals];
        let mut fds = vec![readable(self.listener.as_fd()), readable(self.signals.as_fd())];
        if self.options.exit_with_parent && self.draining.is_none() {
            sources.push(Source::Stdin);
            fds.push(readable(stdin.as_fd()));
        }
        for (&client, session) in &self.sessions {
            sources.push(Source::Socket(client));
            fds.push(readable(session.socket()));
            if let Some(pidfd) = session.pidfd() {
                sources.push(Source::Process(client));
                fds.push(readable(pidfd));
            }
        }
        let tick: u16 = if self.draining.is_some() { 10 } else { 1000 };
        match poll(&mut fds, PollTimeout::from(tick)) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(errno) => {
                tracing::error!(%errno, "poll failed");
                std::thread::yield_now();
            }
        }
        let ready = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
        sources.into_iter().zip(&fds).filter(|(_, fd)| ready(fd)).map(|(source, _)| source).collect()
    }

    fn handle(&mut self, source: Source) -> Next {
        match source {
            Source::Listener => self.accept(),
            Source::Signals => return self.signalled(),
            Source::Stdin => return self.parent(),
            Source::Process(client) => self.close(client),
            Source::Socket(client) => return self.message(client),
        }
        Next::GoOn
    }

    fn accept(&mut self) {
        loop {
            match self.listener.accept() {
                Ok(Some(connection)) => self.admit(connection),
                Ok(None) => return,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a client");
                    return;
                }
            }
        }
    }

    fn admit(&mut self, connection: Connection) {
        let refuse = |code, message: String| {
            tracing::warn!(message, "refused a client");
            let refused = ToClient::Refused { code, message };
            if let Err(error) = connection.send(&refused, &[], Duration::ZERO) {
                tracing::debug!(%error, "the refused client did not wait for the reason");
            }
        };
        let peer = match connection.peer() {
            Ok(peer) => peer,
            Err(error) => return refuse(RefusalCode::Internal, error.to_string()),
        };
        let Some(trust) = self.trust(&peer) else {
            let own = nix::unistd::geteuid();
            let message = format!(
                "user {} may not use this daemon, which is user {own}'s; run one of your own, or have its owner set `group`",
                peer.uid
            );
            return refuse(RefusalCode::NotAllowed, message);
        };
        if self.sessions.len() >= SESSIONS {
            return refuse(
                RefusalCode::Busy,
                format!("{SESSIONS} clients are connected, which is the limit"),
            );
        }
        let client = self.free_number();
        tracing::debug!(client, pid = peer.pid, "connected");
        self.sessions.insert(client, Session::new(connection, peer, trust, client));
    }

    /// Owner numbers fit 24 bits and are not those of anyone connected.
    fn free_number(&mut self) -> u32 {
        loop {
            let number = self.next_client;
            self.next_client = if number >= (1 << 24) - 1 { 1 } else { number + 1 };
            if !self.sessions.contains_key(&number) {
                return number;
            }
        }
    }

    fn trust(&self, peer: &Peer) -> Option<Trust> {
        let own = nix::unistd::geteuid().as_raw();
        if peer.uid == own || peer.uid == 0 {
            return Some(Trust::Owner);
        }
        let group = self.group?;
        (peer.gid == group || in_group(peer.uid, group)).then_some(Trust::Group)
    }

    fn message(&mut self, client: u32) -> Next {
        let Some(session) = self.sessions.get_mut(&client) else { return Next::GoOn };
        match session.readable(&self.host) {
            Outcome::Keep => {}
            Outcome::Close => self.close(client),
            Outcome::Status => {
                let status =
                    report::status(self.started, self.listener.path(), &self.host, self.sessions.values());
                if let Some(session) = self.sessions.get(&client) {
                    session.shared().send(&ToClient::StatusReply(status), &[]);
                }
            }
            Outcome::Stop(haste) => {
                let shared = session.shared();
                if shared.trust != Trust::Owner {
                    let message = "only the daemon's own user may stop it".to_owned();
                    shared.refuse(RefusalCode::NotAllowed, message);
                    return Next::GoOn;
                }
                shared.send(&ToClient::Stopping { pid: std::process::id() }, &[]);
                match haste {
                    Haste::Now => return Next::Leave,
                    Haste::Drain => self.drain("robocached was asked to stop"),
                }
            }
        }
        Next::GoOn
    }

    fn close(&mut self, client: u32) {
        if let Some(session) = self.sessions.remove(&client) {
            self.leaving.extend(session.close());
            self.host.store.nudge();
        }
        self.idle_since = Instant::now();
    }

    fn signalled(&mut self) -> Next {
        while let Ok(Some(info)) = self.signals.read_signal() {
            match i32::try_from(info.ssi_signo).ok().and_then(|number| Signal::try_from(number).ok()) {
                Some(Signal::SIGHUP) => self.reload(),
                Some(signal) if self.draining.is_some() => {
                    tracing::warn!(%signal, "second signal; stopping at once");
                    return Next::Leave;
                }
                Some(signal) => self.drain(&format!("robocached got {signal}")),
                None => {}
            }
        }
        Next::GoOn
    }

    /// Something, or the end, is on standard input: only the end counts.
    fn parent(&mut self) -> Next {
        let mut scratch = [0; 64];
        match nix::unistd::read(std::io::stdin().as_fd(), &mut scratch) {
            Ok(0) | Err(nix::Error::EBADF | nix::Error::EIO) => {
                tracing::info!("the program that started this daemon is gone; stopping");
                Next::Leave
            }
            _ => Next::GoOn,
        }
    }

    fn drain(&mut self, reason: &str) {
        if self.draining.is_some() {
            return;
        }
        tracing::info!(reason, sessions = self.sessions.len(), "draining");
        self.draining = Some(Instant::now());
        for loader in self.sessions.values().filter_map(|session| session.shared().loader()) {
            loader.drain(reason);
        }
        self.host.store.nudge();
    }

    fn is_drained(&self) -> bool {
        let Some(since) = self.draining else { return false };
        let taken = self.sessions.values().filter_map(|session| session.shared().loader()).all(|loader| {
            let occupancy = loader.producer.occupancy();
            loader.is_drained() && occupancy.ready == 0 && occupancy.filling == 0
        });
        let late = since.elapsed() > DRAIN;
        if late && !taken {
            tracing::warn!("some clients did not collect what was ready for them; leaving all the same");
        }
        taken || late
    }

    fn look_at_idleness(&mut self) {
        let Some(seconds) = self.options.config.idle_exit else { return };
        if self.sessions.is_empty() && self.idle_since.elapsed() >= Duration::from_secs(seconds) {
            self.drain("robocached was idle");
        }
    }

    fn reload(&mut self) {
        let new = match self.options.reload() {
            Ok(new) => new,
            Err(error) => {
                tracing::error!(
                    error = crate::loader::chain(&error),
                    "cannot re-read the config; going on with the old one"
                );
                return;
            }
        };
        let old = std::mem::replace(&mut self.options.config, new);
        let new = &self.options.config;
        if new.datasets != old.datasets {
            self.host.catalog.rename(new.datasets.clone());
        }
        if new.memory != old.memory {
            self.host.store.set_budget(budget(new));
        }
        let restart =
            |config: &Config| (config.socket.clone(), config.group.clone(), config.threads, config.gpu);
        if restart(new) != restart(&old) {
            tracing::warn!("socket, group, threads and gpu take effect when the daemon starts again");
        }
        tracing::info!(datasets = ?self.host.catalog.names(), memory = self.host.store.budget(), "config re-read");
    }
}

fn readable(fd: BorrowedFd<'_>) -> PollFd<'_> {
    PollFd::new(fd, PollFlags::POLLIN)
}

/// Whether a user is a member of a group by the host's own lists.
fn in_group(uid: u32, group: u32) -> bool {
    let Ok(Some(user)) = nix::unistd::User::from_uid(uid.into()) else { return false };
    let Ok(name) = std::ffi::CString::new(user.name) else { return false };
    nix::unistd::getgrouplist(&name, user.gid)
        .is_ok_and(|groups| groups.iter().any(|gid| gid.as_raw() == group))
}
