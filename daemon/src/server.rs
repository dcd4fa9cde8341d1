//! A daemon's life: what it needs is set up, the poll loop serves, and all of it is taken down again.
//!
//! What must stay true of the order: signals are blocked before any thread starts, and the socket is bound before it
//! too, for binding sets the umask. At the end the listener goes first, so that nobody comes; then the sessions, who
//! use the store; then its readers; then the GPUs and assemblers, which every session must have let go of. Dropping
//! the listener removes the socket file; a daemon that is killed leaves it behind, and the next one takes its place
//! (`docs/protocol.md`).

mod admit;
mod poll;
mod signals;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use robocache_wire::fds::{Access, Listener, SocketError, default_socket_path};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::assemblers::Assemblers;
use crate::catalog::Catalog;
use crate::config::{Config, ServeOptions};
use crate::gpu::host::Gpus;
use crate::host::Memory;
use crate::open::Host;
use crate::session::Session;
use crate::store::Store;

use poll::Server;
use signals::Signals;

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
    raise_descriptors();
    // Before any thread starts, so that all of them leave signals to the poll loop.
    let signals =
        Signals::take().map_err(|source| ServeError::System { what: "cannot take signals", source })?;
    let config = &options.config;
    let group = config.group.as_deref().map(admit::group_id).transpose()?;
    let path = config.socket.clone().unwrap_or_else(default_socket_path);
    let listener = Listener::bind(&path, group.map_or(Access::Owner, Access::Group))?;

    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let readers = config.threads.readers.map_or(cpus, usize::from);
    let assemblers = config.threads.assemblers.map_or(cpus, usize::from);
    let budget = budget(config);
    let store = Store::new(budget);
    limit_decoding(budget);
    let reader_threads = start_readers(&store, readers)?;
    let host = Arc::new(Host {
        catalog: Catalog::new(Arc::clone(&store), config.datasets.clone()),
        assemblers: Assemblers::start(assemblers)
            .map_err(|source| ServeError::System { what: "cannot start assembler threads", source })?,
        gpus: Gpus::new(config.gpu, budget),
        stopping: AtomicBool::new(false),
        store: Arc::clone(&store),
    });
    tracing::info!(socket = ?path, pid = std::process::id(), memory = budget, readers, assemblers, "serving");
    let mut server = Server::new(options, listener, signals, group, host);
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

fn start_readers(store: &Arc<Store>, count: usize) -> Result<Vec<JoinHandle<()>>, ServeError> {
    (0..count)
        .map(|number| {
            let store = Arc::clone(store);
            std::thread::Builder::new()
                .name(format!("read-{number}"))
                .spawn(move || store.read_until_closed())
        })
        .collect::<Result<_, _>>()
        .map_err(|source| ServeError::System { what: "cannot start reader threads", source })
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

/// What is needed now is read whatever the budget says, but no file may take more than the host has left, or than the
/// user says that there is.
fn limit_decoding(budget: u64) {
    if let Some(usable) = Memory::now().usable() {
        robocache_formats::limit_decoding(budget.max(usable / 2));
    }
}

/// Takes all descriptors that this process may have: each client, ring and file under way needs some, and the usual
/// soft limit, 1024, stands for programs that call `select`, which none does here.
fn raise_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })
    {
        tracing::warn!(%error, ?limit, "cannot raise the limit of open files to the hard limit");
    }
}
