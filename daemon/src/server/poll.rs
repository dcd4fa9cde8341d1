//! The poll loop: one thread that listens, reads messages, watches for deaths and signals, and waits for nothing else.
//!
//! ```text
//!   Serving ── SIGTERM, SIGINT, Stop, end of stdin, idle ──▶ Draining ── all taken, or too late ──▶ stopped
//!      └────────── second signal, Stop now ──────────────────────┴──────────────────────────────────▶ stopped
//! ```
//!
//! It owns the sessions. Whatever may take time happens elsewhere: opening and producing on a session's own thread,
//! decoding on the readers, filling on the assemblers.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags};
use nix::sys::signal::Signal;
use robocache_wire::fds::{Connection, Listener};
use robocache_wire::message::{RefusalCode, ToClient};

use super::signals::Signals;
use super::{admit, budget, join, limit_decoding};
use crate::catalog::Trust;
use crate::config::{Config, ServeOptions};
use crate::open::Host;
use crate::report;
use crate::session::{Haste, Outcome, Session};

/// How long clients may take to collect what is ready when the daemon drains.
const DRAIN: Duration = Duration::from_secs(5);

/// How long the listener is left alone when it cannot accept: what is missing, descriptors mostly, comes back with time.
const DEAF: Duration = Duration::from_millis(100);

/// The state of the poll loop.
pub(super) struct Server {
    options: ServeOptions,
    pub(super) listener: Listener,
    signals: Signals,
    group: Option<u32>,
    pub(super) host: Arc<Host>,
    pub(super) sessions: BTreeMap<u32, Session>,
    next_client: u32,
    /// Threads of sessions that are gone.
    pub(super) leaving: Vec<JoinHandle<()>>,
    /// Since when, if at all.
    draining: Option<Instant>,
    /// When accepting last failed, if nothing was accepted since. The kernel keeps those who connect.
    deaf: Option<Instant>,
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
    pub(super) fn new(
        options: ServeOptions,
        listener: Listener,
        signals: Signals,
        group: Option<u32>,
        host: Arc<Host>,
    ) -> Self {
        Self {
            options,
            listener,
            signals,
            group,
            host,
            sessions: BTreeMap::new(),
            next_client: 1,
            leaving: Vec::new(),
            draining: None,
            deaf: None,
            started: Instant::now(),
            idle_since: Instant::now(),
        }
    }

    /// Polls until it is time to leave. What is left of sessions and threads is the caller's to end.
    pub(super) fn serve(&mut self) {
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
        let mut sources = vec![Source::Signals];
        let mut fds = vec![readable(self.signals.as_fd())];
        let deaf = self.deaf.map_or(Duration::ZERO, |since| DEAF.saturating_sub(since.elapsed()));
        if deaf.is_zero() {
            sources.push(Source::Listener);
            fds.push(readable(self.listener.as_fd()));
        }
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
        let tick = match (self.draining, deaf.is_zero()) {
            (Some(_), _) => Duration::from_millis(10),
            (None, false) => deaf + Duration::from_millis(1),
            (None, true) => Duration::from_secs(1),
        };
        if let Err(errno) = self.signals.poll(&mut fds, tick) {
            tracing::error!(%errno, "poll failed");
            std::thread::yield_now();
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
                Ok(Some(connection)) => {
                    if self.deaf.take().is_some() {
                        tracing::info!("clients are accepted again");
                    }
                    self.admit(connection);
                }
                Ok(None) => return,
                Err(error) => {
                    // It stays ready to be read: polled as before, it would keep this thread busy and the log full.
                    if self.deaf.replace(Instant::now()).is_none() {
                        tracing::warn!(
                            %error,
                            sessions = self.sessions.len(),
                            "cannot accept clients now; trying on. If descriptors are short, raise RLIMIT_NOFILE (ulimit -n)"
                        );
                    }
                    return;
                }
            }
        }
    }

    fn admit(&mut self, connection: Connection) {
        let Some((peer, trust)) = admit::admit(&connection, self.group, self.sessions.len()) else { return };
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
        for signal in self.signals.pending() {
            match signal {
                Signal::SIGHUP => self.reload(),
                signal if self.draining.is_some() => {
                    tracing::warn!(%signal, "second signal; stopping at once");
                    return Next::Leave;
                }
                signal => self.drain(&format!("robocached got {signal}")),
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
            let budget = budget(new);
            self.host.store.set_budget(budget);
            limit_decoding(budget);
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
