//! Trainers and daemons that die, on a GPU: nothing is lost or repeated, and no memory of a GPU stays behind.

use std::path::Path;
use std::process::Child;

use robocache::{Batch, LoaderError, Position};
use rustix::process::{Signal, kill_process};

use super::{device, is_simulated, serve, simulate};
use crate::support::{Daemon, contained, contained_daemon, data, inside};
use crate::trainer::{self, bytes};

fn free_memory(daemon: &Daemon) -> u64 {
    daemon.status()["gpus"][0]["memory"]["free"].as_u64().unwrap()
}

#[test]
fn killed_clients_leave_nothing_behind_on_the_gpu_and_nothing_is_lost_or_repeated() {
    let kills = if is_simulated() { 60 } else { 200 };
    let daemon = serve(&[]);
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("log");
    trainer::create(&log);
    let mut bystander =
        daemon.loader(data("g1_v21")).features(["action"]).device(device()).connect().unwrap();
    bystander.next_batch().unwrap();
    let no_other = || daemon.status()["loaders"].as_array().unwrap().len() == 1;
    let mut free = None;
    trainer::kill_in_a_row(&daemon, &device(), &log, kills, |kill| {
        bystander.next_batch().unwrap();
        if kill == 9 {
            // What the first trainers made the daemon keep (episodes, staging, descriptors) stays.
            daemon.wait_until("its ring is gone", no_other);
            free = Some(free_memory(&daemon));
        }
    });
    daemon.wait_until("the killed trainers' rings are gone", no_other);
    let again = || free_memory(&daemon) >= free.unwrap();
    daemon.wait_until(&format!("{free:?} bytes of its memory are free, as before"), again);
    trainer::assert_complete(&daemon, &log);
}

/// Three trainers of a daemon, killed one after another: nothing is lost or repeated, and their memory is free.
fn kill_three(daemon: &Daemon, start: impl Fn(&Path, Position) -> Child, kill: impl Fn(&mut Child)) {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("log");
    trainer::create(&log);
    let (mut position, mut free) = (Position::default(), None);
    for _ in 0..3 {
        let before = trainer::lines(&log).len();
        let mut child = start(&log, position);
        daemon.wait_until("the trainer works", || trainer::lines(&log).len() > before + 5);
        kill(&mut child);
        child.wait().unwrap();
        trainer::cut_to_whole_lines(&log);
        position = trainer::lines(&log).last().unwrap().0;
        daemon.wait_until("its ring is gone", || daemon.status()["loaders"].as_array().unwrap().is_empty());
        let before = *free.get_or_insert_with(|| free_memory(daemon));
        daemon.wait_until("its memory is free", || free_memory(daemon) >= before);
    }
    trainer::assert_complete(daemon, &log);
}

#[test]
fn a_trainer_in_a_pid_namespace_of_its_own_trains_and_its_death_frees_its_slots() {
    if contained().is_none() {
        return;
    }
    let daemon = serve(&[]);
    let start = |log: &Path, position| {
        let mut runner = contained().unwrap();
        runner.arg(std::env::current_exe().unwrap());
        trainer::trainer_by(runner, &daemon, &device(), log, position)
    };
    kill_three(&daemon, start, |child| kill_process(inside(child), Signal::KILL).unwrap());
}

#[test]
fn a_daemon_in_a_pid_namespace_of_its_own_serves_trainers_that_it_cannot_see() {
    let Some(mut runner) = contained_daemon() else { return };
    runner.env("ROBOCACHE_LOG", "robocached=debug");
    let daemon = Daemon::start_by(runner, simulate());
    let start = |log: &Path, position| trainer::trainer(&daemon, &device(), log, position);
    kill_three(&daemon, start, |child| child.kill().unwrap());
    // Where the kernel tells of any process, each one's end was seen.
    let (ours, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let tells = nix::sys::socket::getsockopt(&ours, nix::sys::socket::sockopt::PeerPidfd).is_ok();
    assert_eq!(daemon.log().contains("no pidfd"), !tells, "{}", daemon.log());
}

#[test]
fn a_killed_daemon_leaves_what_a_trainer_holds_and_the_next_one_goes_on() {
    let mut daemon = serve(&[]);
    let make = |daemon: &Daemon, device: &str, start| {
        // So many batches that the deep rings of all rounds do not hold the epoch's.
        let builder = daemon.loader(data("g1_v30_conv")).features(["action"]).batch_size(12);
        builder.shuffle(true).seed(2).device(device).start(start).connect().unwrap()
    };
    let line = |batch: &Batch| (batch.ids(), bytes(batch, "action"));
    let wanted: Vec<_> =
        make(&daemon, "cpu", Position::default()).map(|batch| line(&batch.unwrap())).collect();
    let mut seen = Vec::new();
    let (mut state, rounds) = (Position::default(), if is_simulated() { 5 } else { 20 });
    for round in 0..rounds {
        let mut loader = make(&daemon, &device(), state);
        let held = loader.next_batch().unwrap().unwrap();
        held.use_on(robocache::gpu::Stream::LEGACY).unwrap();
        seen.push(line(&held));
        for _ in 0..5 + round {
            seen.push(line(&loader.next_batch().unwrap().unwrap()));
        }
        daemon.kill();
        let error = loop {
            match loader.next_batch() {
                Ok(batch) => seen.push(line(&batch.unwrap())), // what was ready is still delivered
                Err(error) => break error,
            }
        };
        assert!(matches!(error, LoaderError::DaemonGone { .. }), "{error}");
        let first = seen.iter().position(|(ids, _)| *ids == held.ids()).unwrap();
        assert_eq!(line(&held), seen[first], "a batch in a trainer's hands survives the daemon");
        state = loader.position();
        daemon = daemon.restart(simulate());
    }
    assert!(seen.len() < wanted.len());
    for (n, (seen, wanted)) in seen.iter().zip(&wanted).enumerate() {
        assert_eq!(seen, wanted, "batch {n}");
    }
}

#[test]
fn sigterm_lets_a_trainer_on_a_gpu_take_what_is_ready() {
    let mut daemon = serve(&[]);
    let builder = daemon.loader(data("g1_v30_conv")).features(["action"]).device(device());
    let mut loader = builder.connect().unwrap();
    let first = loader.next_batch().unwrap().unwrap();
    daemon.wait_until("the ring is full", || daemon.status()["loaders"][0]["slots"]["ready"] == 63);
    crate::deaths::drained(&mut daemon, &mut loader, &first, 64);
    assert_eq!(first.ids(), (0..64).collect::<Vec<_>>());
}
