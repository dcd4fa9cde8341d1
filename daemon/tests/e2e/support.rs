//! A real `robocached` process for a test, and the data it reads. Killed when dropped.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use robocache::{Loader, LoaderBuilder};

/// How long anything may take before a test gives up on it: generous, since nothing here measures speed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

const PROGRAM: &str = env!("CARGO_BIN_EXE_robocached");

pub(crate) fn own() -> Command {
    Command::new(PROGRAM)
}

/// What runs a program in a PID namespace of its own, as containers do; `None` where that is not allowed here.
pub(crate) fn contained() -> Option<Command> {
    let user: &[&str] =
        if rustix::process::geteuid().is_root() { &[] } else { &["--user", "--map-root-user"] };
    let unshare = || {
        let mut command = Command::new("unshare");
        command.args(user).args(["--pid", "--fork", "--kill-child", "--mount-proc", "--"]);
        command
    };
    let allowed = unshare().arg("true").stderr(Stdio::null()).status().is_ok_and(|status| status.success());
    if !allowed {
        eprintln!("not tested: no PID namespace may be made here (unshare --pid --mount-proc)");
    }
    allowed.then(unshare)
}

/// What runs the daemon so.
pub(crate) fn contained_daemon() -> Option<Command> {
    let mut command = contained()?;
    command.arg(PROGRAM);
    Some(command)
}

/// The process that one made by [`contained`] runs, as seen from here.
pub(crate) fn inside(unshare: &Child) -> rustix::process::Pid {
    let id = unshare.id();
    let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap();
    pid(children.trim().parse().unwrap())
}

/// A running daemon with a socket of its own.
#[derive(Debug)]
pub(crate) struct Daemon {
    pub(crate) child: Child,
    directory: tempfile::TempDir,
}

impl Daemon {
    /// Starts a daemon and waits until it listens.
    pub(crate) fn start(arguments: &[&str]) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), arguments, None, own())
    }

    /// A daemon that another program runs.
    pub(crate) fn start_by(runner: Command, arguments: &[&str]) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), arguments, None, runner)
    }

    /// A daemon whose first simulated GPU has a fault.
    pub(crate) fn start_with_fault(fault: &str, arguments: &[&str]) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), arguments, Some(fault), own())
    }

    fn start_in(
        directory: tempfile::TempDir,
        arguments: &[&str],
        fault: Option<&str>,
        mut command: Command,
    ) -> Self {
        let log =
            std::fs::File::options().create(true).append(true).open(directory.path().join("log")).unwrap();
        let child = command
            .arg("serve")
            .arg("--socket")
            .arg(directory.path().join("d.sock"))
            .args(arguments)
            .envs(fault.map(|fault| ("ROBOCACHE_SIMULATE_FAULT", fault)))
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let daemon = Self { child, directory };
        daemon.wait_until("it answers", || robocache::admin::status(&daemon.socket()).is_ok());
        daemon
    }

    /// Another daemon on the socket of one that is gone.
    pub(crate) fn restart(mut self, arguments: &[&str]) -> Self {
        self.kill();
        let directory = std::mem::replace(&mut self.directory, tempfile::tempdir().unwrap());
        Self::start_in(directory, arguments, None, own())
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("d.sock")
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap()
    }

    pub(crate) fn loader(&self, dataset: impl AsRef<Path>) -> LoaderBuilder {
        Loader::builder(dataset).batch_size(64).socket(self.socket())
    }

    pub(crate) fn status(&self) -> serde_json::Value {
        robocache::admin::status(&self.socket()).unwrap()
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        rustix::process::kill_process(pid(self.child.id()), signal).unwrap();
    }

    /// `kill -9`, and waits until it is gone.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits for the daemon to end by itself.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < PATIENCE, "the daemon does not end; its log:\n{}", self.log());
            std::thread::yield_now();
        }
    }

    /// Waits until something holds.
    pub(crate) fn wait_until(&self, what: &str, holds: impl Fn() -> bool) {
        let start = Instant::now();
        while !holds() {
            assert!(start.elapsed() < PATIENCE, "waited in vain until {what}; the log:\n{}", self.log());
            std::thread::yield_now();
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended already; either way nothing is left running.
        let ended = self.child.try_wait();
        self.child.kill().ok();
        self.child.wait().ok();
        if std::thread::panicking() {
            eprintln!("the daemon: {ended:?}; its log:\n{}", self.log());
        }
    }
}

pub(crate) fn pid(id: u32) -> rustix::process::Pid {
    rustix::process::Pid::from_raw(i32::try_from(id).unwrap()).unwrap()
}

/// Real recordings: `$ROBOCACHE_TEST_DATA`, else `shared/data` beside the checkout.
pub(crate) fn data(name: &str) -> PathBuf {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data");
    let root = std::env::var_os("ROBOCACHE_TEST_DATA").map_or(beside, PathBuf::from);
    let path = root.join(name);
    assert!(path.exists(), "{path:?} is missing: tests read real recordings there; set ROBOCACHE_TEST_DATA");
    path
}

/// A copy of a LeRobot dataset that a test may break.
pub(crate) fn copy(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            std::fs::create_dir_all(&target).unwrap();
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}
