//! What needs real processes: a daemon that is killed, a client that forks, an embedded daemon.
#![expect(unsafe_code, reason = "fork")]
#![expect(clippy::unwrap_used, reason = "test code: a failure here is the test's")]

mod mini;

use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use mini::{Mini, Script};
use robocache::gpu::Stream;
use robocache::{ConnectError, GpuError, Loader, LoaderError};

/// What the other tests run as a process of its own: a daemon on `$MINI_SOCKET`.
#[test]
#[ignore = "run by the other tests as a child process"]
fn daemon_child() {
    let socket = std::env::var("MINI_SOCKET").expect("set by the parent test");
    mini::serve_forever(Path::new(&socket), Script { anchors: 100, ..Script::default() });
}

/// Start this test binary as a daemon and wait until it listens.
fn spawn(socket: &Path) -> Child {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "daemon_child", "--ignored", "--nocapture"])
        .env("MINI_SOCKET", socket)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    while robocache::admin::status(socket).is_err() {
        assert!(child.try_wait().unwrap().is_none(), "the child daemon ended");
        std::thread::yield_now();
    }
    child
}

#[test]
fn a_killed_daemon_is_told_and_the_next_one_goes_on_at_the_exact_batch() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("robocached.sock");
    let mut daemon = spawn(&socket);
    let connect = || Loader::builder("mini").batch_size(4).socket(&socket);
    let mut loader = connect().connect().unwrap();
    let mut seen: Vec<u64> = Vec::new();
    for _ in 0..5 {
        seen.extend(loader.next_batch().unwrap().unwrap().ids());
    }
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    // What was ready still comes; then the error, with the position behind the last batch that came.
    let position = loop {
        match loader.next_batch() {
            Ok(batch) => seen.extend(batch.unwrap().ids()),
            Err(LoaderError::DaemonGone { pid, position }) => {
                assert_eq!(pid, daemon.id());
                break position;
            }
            Err(other) => panic!("{other}"),
        }
    };
    assert_eq!(position, loader.position());
    // The dead one's socket file is still there: the next daemon replaces it.
    let mut daemon = spawn(&socket);
    let mut next = connect().start(position).connect().unwrap();
    while let Some(batch) = next.next_batch().unwrap() {
        seen.extend(batch.ids());
    }
    assert_eq!(seen, (0..100).collect::<Vec<_>>());
    daemon.kill().unwrap();
    daemon.wait().unwrap();
}

#[test]
fn a_forked_child_may_read_but_neither_iterate_nor_release() {
    let mini = Mini::start(Script { anchors: 100, ..Script::default() });
    let mut loader = Loader::builder("mini").batch_size(4).socket(&mini.socket).connect().unwrap();
    let batch = loader.next_batch().unwrap().unwrap();
    // SAFETY: the child calls nothing that needs another thread of ours, and ends with _exit.
    match unsafe { nix::unistd::fork() }.unwrap() {
        nix::unistd::ForkResult::Child => {
            let first = batch.tensor("index").ok().and_then(|t| t.as_slice::<i64>().ok()).map(<[i64]>::len);
            let code = match (first, loader.next_batch()) {
                (Some(4), Err(LoaderError::Forked)) => {
                    drop(batch);
                    drop(loader);
                    0
                }
                _ => 1,
            };
            // SAFETY: ends the process at once; no destructor and no handler of the parent runs.
            unsafe { nix::libc::_exit(code) };
        }
        nix::unistd::ForkResult::Parent { child } => {
            let status = nix::sys::wait::waitpid(child, None).unwrap();
            assert!(matches!(status, nix::sys::wait::WaitStatus::Exited(_, 0)), "{status:?}");
        }
    }
    // The child's drops took nothing from us: the lease is there, and the daemon still talks to us.
    assert_eq!(loader.occupancy().leased, 1);
    for n in 1..20 {
        assert_eq!(loader.next_batch().unwrap().unwrap().ids()[0], 4 * n);
        assert_eq!(batch.ids(), [0, 1, 2, 3]);
    }
}

#[test]
fn a_forked_child_touches_no_device_and_leaves_the_parents_ring_alone() {
    let mini = Mini::start(Script { anchors: 100, ..Script::default() });
    let builder = Loader::builder("mini").batch_size(4).device("sim:0").socket(&mini.socket);
    let mut loader = builder.connect().unwrap();
    let batch = loader.next_batch().unwrap().unwrap();
    batch.use_on(Stream::LEGACY).unwrap();
    // SAFETY: the child calls nothing that needs another thread of ours, and ends with _exit.
    match unsafe { nix::unistd::fork() }.unwrap() {
        nix::unistd::ForkResult::Child => {
            let used = batch.use_on(Stream::PER_THREAD);
            let read = batch.device_tensor("state").map(|tensor| tensor.to_host());
            let code = i32::from(used != Err(GpuError::Forked) || read != Ok(Err(GpuError::Forked)));
            drop(batch);
            drop(loader);
            // SAFETY: ends the process at once; no destructor and no handler of the parent runs.
            unsafe { nix::libc::_exit(code) };
        }
        nix::unistd::ForkResult::Parent { child } => {
            let status = nix::sys::wait::waitpid(child, None).unwrap();
            assert!(matches!(status, nix::sys::wait::WaitStatus::Exited(_, 0)), "{status:?}");
        }
    }
    // No fence was recorded and no Bye said: batches go on, and ours is where it was.
    assert_eq!(mini.seen.gpu.done_records(), 0);
    assert_eq!(loader.occupancy().leased, 1);
    for n in 1..20 {
        assert_eq!(loader.next_batch().unwrap().unwrap().ids()[0], 4 * n);
    }
    drop(batch);
    assert_eq!(mini.seen.gpu.done_records(), 1);
}

/// A shell script that runs this binary's daemon as `robocached serve --exit-with-parent --socket PATH` would.
fn program(directory: &Path, body: &str) -> std::path::PathBuf {
    let path = directory.join("robocached");
    std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// The default socket path is the process's, so this runs in a child with an empty environment.
#[test]
#[ignore = "run by embedded tests as a child process"]
fn embedded_child() {
    let program = std::env::var("MINI_PROGRAM").expect("set by the parent test");
    let builder = Loader::builder("mini").batch_size(4).embedded(&program);
    let mut loader = match builder.connect() {
        Ok(loader) => loader,
        Err(error) => {
            println!("error: {error}");
            return;
        }
    };
    let second = builder.connect().unwrap();
    assert_eq!(loader.socket(), second.socket(), "loaders of a process share one daemon");
    assert_eq!(loader.next_batch().unwrap().unwrap().ids(), [0, 1, 2, 3]);
    let (socket, pid) = (loader.socket().to_owned(), loader.info().daemon_pid);
    println!("daemon: {pid}");
    drop(loader);
    assert!(socket.exists(), "the second loader still uses it");
    drop(second);
    assert!(!socket.parent().unwrap().exists(), "its directory is removed");
    println!("stopped");
}

fn run_embedded(program: &Path, runtime: &Path) -> Vec<String> {
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "embedded_child", "--ignored", "--nocapture"])
        .env_remove("ROBOCACHE_SOCKET")
        .env("XDG_RUNTIME_DIR", runtime)
        .env("MINI_PROGRAM", program)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    BufReader::new(&output.stdout[..]).lines().map(Result::unwrap).collect()
}

#[test]
fn an_embedded_daemon_starts_serves_and_is_stopped_with_its_last_loader() {
    let directory = tempfile::tempdir().unwrap();
    let exe = std::env::current_exe().unwrap();
    // $1 is serve, $2 --exit-with-parent, $3 --socket, $4 the path; `read` returns at the end of stdin.
    let body = format!(
        "MINI_SOCKET=\"$4\" '{}' --exact daemon_child --ignored >/dev/null &\nread -r _\nkill $!\nwait $!",
        exe.display()
    );
    let lines = run_embedded(&program(directory.path(), &body), directory.path());
    let pid = lines.iter().find_map(|line| line.strip_prefix("daemon: ")).expect("it served");
    assert!(lines.iter().any(|line| line == "stopped"), "{lines:?}");
    // The daemon's process goes, if it has not gone already.
    let start = Instant::now();
    while Path::new(&format!("/proc/{pid}/exe")).exists() {
        assert!(start.elapsed() < Duration::from_secs(60), "the embedded daemon runs on");
        std::thread::yield_now();
    }
}

#[test]
fn an_embedded_daemon_that_ends_at_once_is_quoted() {
    let directory = tempfile::tempdir().unwrap();
    let lines = run_embedded(&program(directory.path(), "echo 'no room' >&2\nexit 3"), directory.path());
    let error = lines.iter().find(|line| line.starts_with("error: ")).expect("an error");
    assert!(error.contains("ended at once (exit status: 3)"), "{error}");
}

#[test]
fn a_named_socket_is_never_replaced_by_an_embedded_daemon() {
    let directory = tempfile::tempdir().unwrap();
    let error = Loader::builder("mini")
        .batch_size(4)
        .socket(directory.path().join("none.sock"))
        .embedded("/bin/true")
        .connect()
        .unwrap_err();
    assert!(matches!(error, ConnectError::NoDaemon { .. }), "{error}");
}
