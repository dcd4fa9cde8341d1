//! Clients and daemons that are killed, stopped or told to go: nothing is lost, nothing comes twice, nobody else
//! notices.

use std::process::{Command, Stdio};
use std::time::Duration;

use crate::support::{Daemon, data, own};
use crate::trainer::{self, lines, trainer};
use robocache::{Batch, Loader, LoaderError, Position};
use robocache_wire::fds::Connection;
use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};

#[test]
fn two_hundred_kills_in_a_row_lose_and_repeat_nothing() {
    let daemon = Daemon::start(&[]);
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("log");
    trainer::create(&log);
    let mut bystander = daemon.loader(data("g1_v21")).features(["action"]).shuffle(true).connect().unwrap();
    trainer::kill_in_a_row(&daemon, "cpu", &log, 200, |_| {
        bystander.next_batch().unwrap();
    });
    trainer::assert_complete(&daemon, &log);
    daemon.wait_until("the killed trainers' loaders are gone", || {
        daemon.status()["loaders"].as_array().unwrap().len() == 1
    });
}

#[test]
fn the_slots_of_a_killed_client_are_free_as_soon_as_it_is_gone() {
    let daemon = Daemon::start(&[]);
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("log");
    trainer::create(&log);
    let mut child = trainer(&daemon, "cpu", &log, Position::default());
    daemon.wait_until("the trainer holds slots", || lines(&log).len() > 5);
    assert_eq!(daemon.status()["loaders"].as_array().unwrap().len(), 1);
    child.kill().unwrap();
    child.wait().unwrap();
    // The kernel closes the socket before `wait` returns, so the daemon learns of it with its next poll.
    daemon.wait_until("its ring is gone", || daemon.status()["loaders"].as_array().unwrap().is_empty());
}

#[test]
fn a_stopped_client_stalls_only_itself() {
    let daemon = Daemon::start(&["--threads", "1"]);
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("log");
    trainer::create(&log);
    let mut child = trainer(&daemon, "cpu", &log, Position::default());
    daemon.wait_until("the trainer works", || lines(&log).len() > 3);
    rustix::process::kill_process(crate::support::pid(child.id()), Signal::STOP).unwrap();
    let mut other = daemon.loader(data("g1_v30_conv")).features(["action"]).connect().unwrap();
    let batches = (&mut other).map(Result::unwrap).count();
    assert_eq!(batches, 562);
    let stalled = lines(&log).len();
    rustix::process::kill_process(crate::support::pid(child.id()), Signal::CONT).unwrap();
    daemon.wait_until("the trainer goes on", || lines(&log).len() > stalled + 3);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_client_of_a_killed_daemon_gets_an_error_and_goes_on_with_the_next_one() {
    let mut daemon = Daemon::start(&[]);
    let make = |daemon: &Daemon, start| {
        daemon
            .loader(data("g1_v30_conv"))
            .features(["action"])
            .shuffle(true)
            .seed(2)
            .start(start)
            .connect()
            .unwrap()
    };
    let whole: Vec<Vec<u64>> = make(&daemon, Position::default()).map(|batch| batch.unwrap().ids()).collect();
    let mut loader = make(&daemon, Position::default());
    let mut seen = Vec::new();
    let held = loader.next_batch().unwrap().unwrap();
    seen.push(held.ids());
    for _ in 0..100 {
        seen.push(loader.next_batch().unwrap().unwrap().ids());
    }
    daemon.kill();
    let error = loop {
        match loader.next_batch() {
            Ok(batch) => seen.push(batch.unwrap().ids()), // what was ready is still delivered
            Err(error) => break error,
        }
    };
    assert!(matches!(error, LoaderError::DaemonGone { .. }), "{error}");
    assert_eq!(held.ids(), seen[0], "a batch in a trainer's hands survives the daemon");
    let state = loader.position();
    let daemon = daemon.restart(&[]);
    seen.extend(make(&daemon, state).map(|batch| batch.unwrap().ids()));
    assert_eq!(seen, whole);
}

/// SIGTERM: a client takes what is ready in `slots` slots of 64 samples, of which it has the `first`; the daemon leaves.
pub(crate) fn drained(daemon: &mut Daemon, loader: &mut Loader, first: &Batch, slots: usize) {
    daemon.signal(Signal::TERM);
    let mut ids = first.ids();
    let error = loop {
        match loader.next_batch() {
            Ok(batch) => ids.extend(batch.unwrap().ids()),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, LoaderError::Draining { .. } | LoaderError::DaemonGone { .. }), "{error}");
    // The daemon may have filled slots that were given back before the signal reached it; none is lost between.
    assert!(ids.len() >= slots * 64, "all that was ready: {} samples", ids.len());
    assert!(ids.iter().copied().eq(0..ids.len() as u64), "nothing lost, nothing twice");
    assert!(daemon.wait().success(), "{}", daemon.log());
}

/// A daemon that is told to leave when a client has a full ring.
fn drains_a_full_ring(mut daemon: Daemon) {
    let mut loader = daemon.loader(data("g1_v30_conv")).features(["action"]).slots(8).connect().unwrap();
    let first = loader.next_batch().unwrap().unwrap();
    daemon.wait_until("the ring is full", || daemon.status()["loaders"][0]["slots"]["ready"] == 7);
    drained(&mut daemon, &mut loader, &first, 8);
    assert!(!daemon.socket().exists(), "the socket is gone");
}

#[test]
fn sigterm_lets_clients_take_what_is_ready_and_then_leaves() {
    drains_a_full_ring(Daemon::start(&[]));
}

/// Seen: under a sanitizer SIGTERM ended the daemon on the spot. Cause: the sanitizer's own thread, started before `main`,
/// had not blocked it. Cure: it has a handler.
#[test]
fn sigterm_drains_when_a_thread_that_is_not_the_daemons_takes_it() {
    let directory = tempfile::tempdir().unwrap();
    let (source, tool) = (directory.path().join("tool.c"), directory.path().join("tool.so"));
    let thread = "#include <pthread.h>\n#include <unistd.h>\n\
        static void *run(void *none) { for (;;) pause(); return none; }\n\
        __attribute__((constructor)) static void start(void) { pthread_t id; pthread_create(&id, 0, run, 0); }\n";
    std::fs::write(&source, thread).unwrap();
    let mut compiler = Command::new("cc");
    let made = compiler.args(["-shared", "-fPIC", "-pthread", "-o"]).args([&tool, &source]).status().unwrap();
    assert!(made.success(), "cc, which links this test too");
    let mut runner = own();
    runner.env("LD_PRELOAD", &tool);
    drains_a_full_ring(Daemon::start_by(runner, &[]));
}

/// As a program may have that starts it.
#[test]
fn sigterm_and_sighup_are_heard_though_they_were_blocked_when_the_daemon_started() {
    let mut runner = Command::new("python3");
    runner.args([
        "-c",
        "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGHUP]); \
        os.execv(sys.argv[1], sys.argv[1:])",
    ]);
    runner.arg(own().get_program());
    let mut daemon = Daemon::start_by(runner, &[]);
    daemon.signal(Signal::HUP);
    daemon.wait_until("it reads its configuration again", || daemon.log().contains("config re-read"));
    daemon.signal(Signal::TERM);
    assert!(daemon.wait().success(), "{}", daemon.log());
}

#[test]
fn sigterm_leaves_even_if_a_client_takes_nothing() {
    for twice in [false, true] {
        let mut daemon = Daemon::start(&[]);
        let loader = daemon.loader(data("g1_v30_conv")).features(["action"]).connect().unwrap();
        daemon.wait_until("the ring is full", || daemon.status()["loaders"][0]["slots"]["ready"] == 4);
        daemon.signal(Signal::TERM);
        if twice {
            // Two that come together are one.
            daemon.wait_until("it drains", || daemon.log().contains("draining"));
            daemon.signal(Signal::TERM);
        }
        assert!(daemon.wait().success(), "{}", daemon.log());
        let log = daemon.log();
        assert_eq!(log.contains("second signal; stopping at once"), twice, "{log}");
        assert_eq!(log.contains("clients did not collect what was ready"), !twice, "{log}");
        drop(loader);
    }
}

#[test]
fn a_daemon_takes_all_the_descriptors_it_may_have() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("d.sock");
    let mut child = Command::new("sh")
        .args([
            "-c",
            "ulimit -Sn 100 && ulimit -Hn 500 && exec \"$@\"",
            "sh",
            env!("CARGO_BIN_EXE_robocached"),
            "serve",
            "--socket",
        ])
        .arg(&socket)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    while robocache::admin::status(&socket).is_err() {
        assert!(child.try_wait().unwrap().is_none(), "it serves");
    }
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", child.id())).unwrap();
    let files = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    assert_eq!(files.split_whitespace().skip(3).take(2).collect::<Vec<_>>(), ["500", "500"]);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_daemon_out_of_descriptors_serves_those_it_has_says_so_and_accepts_again() {
    let daemon = Daemon::start(&[]);
    let mut loader = daemon.loader(data("g1_v30_conv")).features(["action"]).shuffle(true).connect().unwrap();
    assert_eq!((&mut loader).map(Result::unwrap).count(), 562, "one epoch: nothing is left to read");
    let few = Rlimit { current: Some(24), maximum: Some(24) };
    prlimit(Pid::from_child(&daemon.child).into(), Resource::Nofile, few).unwrap();
    let crowd: Vec<_> = (0..24).map(|_| Connection::connect(&daemon.socket()).unwrap()).collect();
    daemon.wait_until("it says so", || daemon.log().contains("cannot accept clients now"));
    for _ in 0..500 {
        loader.next_batch().unwrap();
    }
    drop(crowd);
    daemon.wait_until("it accepts again", || robocache::admin::status(&daemon.socket()).is_ok());
    // Once for each time it ran out: while the crowd stood, and as its last ones were let in to leave.
    let said = daemon.log().matches("cannot accept clients now").count();
    assert!(said <= 10, "said {said} times");
}

#[test]
fn a_daemon_with_a_parent_leaves_when_standard_input_ends() {
    let directory = tempfile::tempdir().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_robocached"))
        .args(["serve", "--exit-with-parent", "--socket"])
        .arg(directory.path().join("d.sock"))
        .stdin(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    assert!(child.try_wait().unwrap().is_none());
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_second_daemon_on_the_same_socket_is_refused_with_the_pid_of_the_first() {
    let daemon = Daemon::start(&[]);
    let second = Command::new(env!("CARGO_BIN_EXE_robocached"))
        .args(["serve", "--socket"])
        .arg(daemon.socket())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8(second.stderr).unwrap();
    assert_eq!(second.status.code(), Some(4), "{said}");
    assert!(said.contains(&daemon.child.id().to_string()), "{said}");
    daemon.status();
}

#[test]
fn sighup_reads_the_config_again() {
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("robocached.toml");
    let write = |name: &str| {
        let text = format!("[datasets]\n{name} = {:?}\n", data("g1_v30_conv"));
        std::fs::write(&config, text).unwrap();
    };
    write("before");
    let daemon = Daemon::start(&["--config", config.to_str().unwrap()]);
    let connect = |name: &str| daemon.loader(name).features(["action"]).connect();
    let mut running = connect("before").unwrap();
    write("after");
    daemon.signal(Signal::HUP);
    daemon.wait_until("the new name is served", || daemon.status()["served"][0] == "after");
    connect("after").unwrap().next_batch().unwrap().unwrap();
    let error = connect("before").unwrap_err().to_string();
    assert!(error.contains("before") && error.contains("after"), "{error}");
    running.next_batch().unwrap().unwrap();
    std::fs::write(&config, "[datasets\n").unwrap();
    daemon.signal(Signal::HUP);
    daemon.wait_until("the daemon complains", || daemon.log().contains("cannot re-read the config"));
    running.next_timeout(Duration::from_secs(5)).unwrap();
}
