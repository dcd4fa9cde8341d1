//! Memory: what is decoded once, what a budget holds, and that nothing grows.

use std::path::Path;

use crate::support::{Daemon, data};
use robocache::{Loader, Position};

/// Bytes the decoded columns of `g1_v30_conv` take that the loaders below ask for: 35,965 rows of 26 float32 (action),
/// 4 int64 and a float32 (index columns).
const DECODED: u64 = 35_965 * (26 * 4 + 4 * 8 + 4);

fn store(daemon: &Daemon, what: &str) -> u64 {
    daemon.status()["store"][what].as_u64().unwrap()
}

/// Of a column of each batch of an epoch, with its samples.
pub(crate) fn checksums(loader: &mut Loader, column: &str) -> Vec<(Vec<u64>, u64)> {
    loader
        .map(|batch| {
            let batch = batch.unwrap();
            let values = batch.tensor(column).unwrap();
            let sum = values.bytes().chunks_exact(4).fold(0_u64, |sum, four| {
                sum.rotate_left(1) ^ u64::from(u32::from_le_bytes(four.try_into().unwrap()))
            });
            (batch.ids(), sum)
        })
        .collect()
}

#[test]
fn a_dataset_is_decoded_once_for_all_its_loaders() {
    let daemon = Daemon::start(&[]);
    let build = |seed| daemon.loader(data("g1_v30_conv")).features(["action"]).shuffle(true).seed(seed);
    let mut first = build(1).connect().unwrap();
    checksums(&mut first, "action");
    assert_eq!(store(&daemon, "bytes_decoded"), DECODED);
    for seed in 2..5 {
        checksums(&mut build(seed).connect().unwrap(), "action");
    }
    checksums(&mut first, "action");
    assert_eq!(store(&daemon, "bytes_decoded"), DECODED);
    assert_eq!(store(&daemon, "evictions"), 0);
}

#[test]
fn a_loader_that_asks_for_more_decodes_only_what_others_have_not() {
    let daemon = Daemon::start(&[]);
    let build = |features: &[&str]| daemon.loader(data("g1_v30_conv")).features(features.to_vec());
    checksums(&mut build(&["action"]).connect().unwrap(), "action");
    assert_eq!(store(&daemon, "bytes_decoded"), DECODED);
    checksums(&mut build(&["action", "observation.state"]).connect().unwrap(), "action");
    // 26 float32 of each row.
    assert_eq!(store(&daemon, "bytes_decoded"), DECODED + 35_965 * 26 * 4);
}

#[test]
fn with_a_budget_of_a_tenth_of_the_dataset_the_batches_are_the_same() {
    let plenty = Daemon::start(&[]);
    let budget = DECODED / 10;
    let little = Daemon::start(&["--memory", &budget.to_string()]);
    for (name, shuffle) in [("g1_v30_conv", false), ("g1_v21", true), ("g1_v30_conv", true)] {
        let build = |daemon: &Daemon| daemon.loader(data(name)).features(["action"]).shuffle(shuffle).seed(4);
        let wanted = checksums(&mut build(&plenty).connect().unwrap(), "action");
        let mut loader = build(&little).connect().unwrap();
        assert_eq!(checksums(&mut loader, "action"), wanted, "{name}, shuffle {shuffle}");
    }
    assert!(store(&little, "evictions") > 0);
    // One batch of 64 shuffled samples needs up to 64 of the 100 episodes at once, and two are in hand; that is
    // why a daemon may go over a budget this small, and says so.
    assert!(little.log().contains("memory budget does not hold"), "{}", little.log());
}

#[test]
fn episodes_in_order_are_read_once_even_in_a_tenth_of_the_memory() {
    let daemon = Daemon::start(&["--memory", &(DECODED / 10).to_string()]);
    for name in ["g1_v21", "g1_v30_conv"] {
        let before = store(&daemon, "episodes_read");
        let mut loader = daemon.loader(data(name)).features(["action"]).connect().unwrap();
        assert_eq!((&mut loader).map(Result::unwrap).count(), 562);
        let read = store(&daemon, "episodes_read") - before;
        // The ring reads on into the next epoch: some of its first episodes come again.
        assert!((100..=125).contains(&read), "{read} episodes of 100 were read in {name}");
        assert!(daemon.status()["memory"]["used"].as_u64().unwrap() <= DECODED / 10);
    }
}

fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn the_daemons_memory_stays_flat_over_a_hundred_thousand_batches() {
    let daemon = Daemon::start(&[]);
    let builder =
        daemon.loader(data("g1_v30_conv")).batch_size(1).features(["action"]).shuffle(true).slots(16);
    let mut loader = builder.connect().unwrap();
    let mut take = |batches: usize| {
        for _ in 0..batches {
            while loader.next_batch().unwrap().is_none() {}
        }
    };
    take(20_000);
    let before = resident_kib(daemon.child.id());
    take(100_000);
    let after = resident_kib(daemon.child.id());
    assert!(after <= before + 4096, "{before} KiB, then {after} KiB");
}

#[test]
fn clients_that_come_and_go_leave_nothing_behind() {
    let daemon = Daemon::start(&[]);
    let builder = daemon.loader(data("g1_v30_conv")).features(["action"]).start(Position::default());
    let come_and_go = |times: usize| {
        for _ in 0..times {
            builder.clone().connect().unwrap().next_batch().unwrap().unwrap();
        }
        daemon.wait_until("all rings are gone", || daemon.status()["loaders"].as_array().unwrap().is_empty());
    };
    let descriptors = || std::fs::read_dir(format!("/proc/{}/fd", daemon.child.id())).unwrap().count();
    let threads = || std::fs::read_dir(format!("/proc/{}/task", daemon.child.id())).unwrap().count();
    come_and_go(50);
    let (before, fds) = (resident_kib(daemon.child.id()), descriptors());
    come_and_go(300);
    daemon.wait_until("threads of gone clients have ended", || threads() <= 1 + 2 * 2 + 2);
    // A ring leaves the status a moment before the thread of its client closes what it had open.
    daemon.wait_until("descriptors of gone clients are closed", || descriptors() <= fds + 2);
    let after = resident_kib(daemon.child.id());
    assert!(after <= before + 8192, "{before} KiB, then {after} KiB");
}
