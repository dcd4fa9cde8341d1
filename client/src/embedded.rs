//! A daemon of this process's own: started as a child when there is none, stopped when its last loader is dropped.
//!
//! The child's standard input is a pipe that we hold; it exits at the pipe's end, so it does not outlive us however we die.
//! Loaders of one process share one. In a forked child the daemon is the parent's: it can be used but is not stopped.

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError, TryLockError, Weak};
use std::time::{Duration, Instant};

use robocache_wire::fds::Connection;

use crate::error::EmbeddedError;

const START_LIMIT: Duration = Duration::from_secs(20);
const STOP_LIMIT: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(2);
/// Lines of the child's stderr that an error quotes.
const QUOTED: usize = 20;

type Lines = Arc<Mutex<VecDeque<String>>>;

/// A running embedded daemon.
#[derive(Debug)]
pub(crate) struct Embedded {
    program: PathBuf,
    socket: PathBuf,
    directory: PathBuf,
    /// The process that started it; only that one stops it.
    starter: u32,
    child: Mutex<Child>,
}

static RUNNING: Mutex<Weak<Embedded>> = Mutex::new(Weak::new());

impl Embedded {
    /// The embedded daemon that runs already, or a new one.
    pub(crate) fn start(program: &Path) -> Result<Arc<Self>, EmbeddedError> {
        let mut running = match RUNNING.try_lock() {
            Ok(running) => running,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            // Another thread starts one, or held the lock when this process was forked: have our own.
            Err(TryLockError::WouldBlock) => return Self::launch(program).map(Arc::new),
        };
        if let Some(embedded) = running.upgrade()
            && embedded.program == program
            && Connection::connect(&embedded.socket).is_ok()
        {
            return Ok(embedded);
        }
        let embedded = Arc::new(Self::launch(program)?);
        *running = Arc::downgrade(&embedded);
        Ok(embedded)
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    fn launch(program: &Path) -> Result<Self, EmbeddedError> {
        let directory = private_directory()?;
        let socket = directory.join("robocached.sock");
        let spawned = spawn(program, &socket);
        let (child, lines) = spawned.inspect_err(|_| {
            std::fs::remove_dir_all(&directory).ok();
        })?;
        // From here on Drop stops the child and removes the directory.
        let embedded = Self {
            program: program.to_owned(),
            socket,
            directory,
            starter: std::process::id(),
            child: Mutex::new(child),
        };
        embedded.wait_until_it_listens(&lines)?;
        Ok(embedded)
    }

    fn wait_until_it_listens(&self, lines: &Lines) -> Result<(), EmbeddedError> {
        let start = Instant::now();
        loop {
            if Connection::connect(&self.socket).is_ok() {
                return Ok(());
            }
            let program = self.program.clone();
            let ended = self.child.lock().unwrap_or_else(PoisonError::into_inner).try_wait();
            if let Ok(Some(status)) = ended {
                let stderr = said(lines);
                return Err(EmbeddedError::Ended { program, status: status.to_string(), stderr });
            }
            if start.elapsed() > START_LIMIT {
                return Err(EmbeddedError::TimedOut { program, limit: START_LIMIT, stderr: said(lines) });
            }
            std::thread::sleep(POLL);
        }
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        if self.starter != std::process::id() {
            return;
        }
        let child = self.child.get_mut().unwrap_or_else(PoisonError::into_inner);
        drop(child.stdin.take());
        let start = Instant::now();
        while matches!(child.try_wait(), Ok(None)) {
            if start.elapsed() > STOP_LIMIT {
                child.kill().ok();
                child.wait().ok();
                break;
            }
            std::thread::sleep(POLL);
        }
        std::fs::remove_dir_all(&self.directory).ok();
    }
}

/// `$ROBOCACHE_DAEMON`, or `robocached` on PATH.
pub(crate) fn find_program() -> Option<PathBuf> {
    if let Some(program) = std::env::var_os("ROBOCACHE_DAEMON").filter(|value| !value.is_empty()) {
        return Some(program.into());
    }
    std::env::split_paths(&std::env::var_os("PATH")?)
        .map(|directory| directory.join("robocached"))
        .find(|program| program.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0))
}

fn spawn(program: &Path, socket: &Path) -> Result<(Child, Lines), EmbeddedError> {
    let failed = |source| EmbeddedError::Spawn { program: program.to_owned(), source };
    let mut command = Command::new(program);
    command
        .args(["serve", "--exit-with-parent", "--socket"])
        .arg(socket)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        // Ctrl-C in the terminal is for the trainer; the daemon ends with it, not before it.
        .process_group(0);
    if std::env::var_os("ROBOCACHE_LOG").is_none() {
        command.env("ROBOCACHE_LOG", "warn");
    }
    let mut child = command.spawn().map_err(failed)?;
    let lines = Lines::default();
    if let Some(stderr) = child.stderr.take() {
        let kept = Arc::clone(&lines);
        let forward = move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                writeln!(std::io::stderr(), "{line}").ok();
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                if kept.len() == QUOTED {
                    kept.pop_front();
                }
                kept.push_back(line);
            }
        };
        std::thread::Builder::new().name("robocached-stderr".to_owned()).spawn(forward).map_err(failed)?;
    }
    Ok((child, lines))
}

fn said(lines: &Lines) -> String {
    let lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
    if lines.is_empty() { "nothing".to_owned() } else { Vec::from(lines.clone()).join("\n") }
}

/// A new directory that only this user can enter, with a name short enough for a socket path.
fn private_directory() -> Result<PathBuf, EmbeddedError> {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let base = runtime.filter(|dir| dir.is_dir() && dir.as_os_str().len() < 60);
    let base = base.unwrap_or_else(|| PathBuf::from("/tmp"));
    let failed = |source| EmbeddedError::Directory { path: base.clone(), source };
    let mut last = std::io::ErrorKind::AlreadyExists.into();
    for number in 0..100 {
        let directory = base.join(format!("robocache-embedded-{}-{number}", std::process::id()));
        match std::fs::DirBuilder::new().mode(0o700).create(&directory) {
            Ok(()) => return Ok(directory),
            // A leftover of a process that had our number, or another thread's.
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => last = error,
            Err(error) => return Err(failed(error)),
        }
    }
    Err(failed(last))
}
