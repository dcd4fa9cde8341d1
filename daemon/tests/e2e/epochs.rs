//! Which samples come, in which order, whatever else differs: over real processes and a real dataset.

use crate::support::{Daemon, data};
use robocache::{Loader, Position};

/// Sample ids of one epoch, batch by batch.
fn epoch(loader: &mut Loader) -> Vec<Vec<u64>> {
    loader.map(|batch| batch.unwrap().ids()).collect()
}

#[test]
fn every_anchor_is_seen_exactly_once_by_1_2_and_7_ranks() {
    let daemon = Daemon::start(&[]);
    for world_size in [1, 2, 7] {
        let mut seen = Vec::new();
        for rank in 0..world_size {
            let builder = daemon.loader(data("g1_v30_conv")).features(["action"]).shuffle(true).seed(3);
            let mut loader = builder.rank(rank, world_size).connect().unwrap();
            let wanted = loader.batches();
            let batches = epoch(&mut loader);
            assert_eq!(batches.len() as u64, wanted, "rank {rank} of {world_size}");
            seen.extend(batches.into_iter().flatten());
        }
        assert_ne!(seen[..100], (0..100).collect::<Vec<_>>(), "a shuffle");
        seen.sort_unstable();
        assert!(seen == (0..35_965).collect::<Vec<_>>(), "{world_size} ranks");
    }
}

#[test]
fn with_drop_last_every_rank_gets_as_many_whole_batches() {
    let daemon = Daemon::start(&[]);
    for rank in 0..7 {
        let builder = daemon.loader(data("g1_v30_conv")).features(["action"]).drop_last(true);
        let batches = epoch(&mut builder.rank(rank, 7).connect().unwrap());
        assert_eq!(batches.len(), 35_965 / (7 * 64));
        assert!(batches.iter().all(|ids| ids.len() == 64));
    }
}

#[test]
fn the_order_depends_on_the_seed_alone() {
    let mut orders = Vec::new();
    for (threads, slots) in [("1", 2), ("2", 4), ("7", 33)] {
        let daemon = Daemon::start(&["--threads", threads]);
        let builder =
            daemon.loader(data("g1_v30_conv")).features(["action"]).shuffle(true).seed(11).slots(slots);
        let mut loader = builder.connect().unwrap();
        orders.push([epoch(&mut loader), epoch(&mut loader)]);
    }
    assert!(orders[0] == orders[1] && orders[0] == orders[2]);
    assert!(orders[0][0] != orders[0][1], "epochs differ");
}

#[test]
fn a_loader_goes_on_exactly_where_its_state_says() {
    let daemon = Daemon::start(&[]);
    let builder = daemon.loader(data("g1_v30_conv")).features(["action"]).shuffle(true).seed(5);
    let mut loader = builder.connect().unwrap();
    let first = epoch(&mut loader);
    let second = epoch(&mut loader);
    let whole: Vec<Vec<u64>> = first.iter().chain(&second).cloned().collect();
    // Any batch will do; these are the first ones, the last of the epoch, and some between.
    for done in [0, 1, 2, 77, 300, 561, 562, 563, 900] {
        let mut until = builder.clone().connect().unwrap();
        let mut state = Position::default();
        for _ in 0..done {
            state = loop {
                if let Some(batch) = until.next_batch().unwrap() {
                    break batch.position_after();
                }
            };
        }
        drop(until);
        let mut after = builder.clone().start(state).connect().unwrap();
        let rest: Vec<Vec<u64>> = if done <= 562 { epoch(&mut after) } else { Vec::new() };
        let rest: Vec<Vec<u64>> = rest.into_iter().chain(epoch(&mut after)).collect();
        assert!(rest == whole[done..], "after {done} batches, at {state:?}");

        loader.seek(state).unwrap();
        // After the last batch of an epoch there is its end, and then the next epoch.
        let again = loader.next_batch().unwrap().map(|batch| batch.ids());
        let wanted = (done != 562).then(|| whole[done].clone());
        assert_eq!(again, wanted, "a seek to {state:?}");
    }
}

#[test]
fn another_world_size_goes_on_with_what_is_left() {
    let daemon = Daemon::start(&[]);
    let builder = daemon.loader(data("g1_v30_conv")).features(["action"]).shuffle(true).seed(5);
    let (mut seen, mut state) = (Vec::new(), Position::default());
    for rank in 0..2 {
        let mut loader = builder.clone().rank(rank, 2).connect().unwrap();
        for _ in 0..100 {
            let batch = loader.next_batch().unwrap().unwrap();
            seen.extend(batch.ids());
            state = batch.position_after();
        }
    }
    assert_eq!(state, Position { epoch: 0, consumed: 2 * 100 * 64 });
    for rank in 0..3 {
        let mut loader = builder.clone().rank(rank, 3).start(state).connect().unwrap();
        seen.extend(epoch(&mut loader).into_iter().flatten());
    }
    seen.sort_unstable();
    assert!(seen == (0..35_965).collect::<Vec<_>>());
}

#[test]
fn leaving_a_loop_early_and_seeking_shows_no_batch_of_before() {
    let daemon = Daemon::start(&[]);
    let builder = daemon.loader(data("g1_v30_conv")).features(["action"]).shuffle(true).seed(1);
    let mut loader = builder.connect().unwrap();
    let (first, second) = (epoch(&mut loader), epoch(&mut loader));
    for round in 0..50 {
        loader.seek(Position { epoch: 0, consumed: 0 }).unwrap();
        let held: Vec<_> = (0..round % 3).map(|_| loader.next_batch().unwrap().unwrap()).collect();
        loader.seek(Position { epoch: 1, consumed: 0 }).unwrap();
        let batch = loader.next_batch().unwrap().unwrap();
        assert_eq!((batch.epoch(), batch.ids()), (1, second[0].clone()), "round {round}");
        for (held, ids) in held.iter().zip(&first) {
            assert_eq!(held.ids(), *ids, "a held batch stays as it was");
        }
    }
}
