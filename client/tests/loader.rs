//! The client against the contract: a daemon in miniature, in threads of this process.
#![expect(clippy::unwrap_used, reason = "test code: a failure here is the test's")]

mod mini;

use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use mini::{Mini, Script, state_of, task_of};
use robocache::{
    Anchors, ColumnError, ConnectError, DType, Interp, Loader, LoaderBuilder, LoaderError, Next, Position,
    RefusalCode, Window,
};
use robocache_wire::spec::{AnchorSpec, DatasetRef, OffsetsSpec};

fn builder(mini: &Mini) -> LoaderBuilder {
    Loader::builder("mini").batch_size(4).socket(&mini.socket)
}

fn ids_of_one_epoch(loader: &mut Loader) -> Vec<u64> {
    loader.flat_map(|batch| batch.unwrap().ids()).collect()
}

#[test]
fn an_epoch_has_every_sample_once_and_none_ends_it() {
    let mini = Mini::start(Script { anchors: 10, ..Script::default() });
    let mut loader = builder(&mini).connect().unwrap();
    for epoch in 0..3 {
        assert_eq!((loader.epoch(), loader.batches()), (epoch, 3));
        let mut rows = Vec::new();
        while let Some(batch) = loader.next_batch().unwrap() {
            assert_eq!(batch.epoch(), epoch);
            assert_eq!(batch.index(), rows.len() as u64);
            rows.push(batch.rows());
            for (id, state) in
                batch.ids().iter().zip(batch.tensor("state").unwrap().as_slice::<f32>().unwrap().chunks(3))
            {
                assert_eq!(state, state_of(*id));
            }
        }
        assert_eq!(rows, [4, 4, 2]);
    }
}

#[test]
fn batches_published_out_of_order_come_in_order() {
    let mini = Mini::start(Script { anchors: 40, backwards: true, ..Script::default() });
    let mut loader = builder(&mini).connect().unwrap();
    for _ in 0..3 {
        assert_eq!(ids_of_one_epoch(&mut loader), (0..40).collect::<Vec<_>>());
    }
}

#[test]
fn ranks_share_an_epoch_exactly_once() {
    let mini = Mini::start(Script { anchors: 103, ..Script::default() });
    for world in [1, 2, 7] {
        let mut ids = Vec::new();
        for rank in 0..world {
            ids.extend(ids_of_one_epoch(&mut builder(&mini).rank(rank, world).connect().unwrap()));
        }
        assert_eq!(ids.len(), 103);
        assert_eq!(ids.into_iter().collect::<HashSet<_>>(), (0..103).collect());
    }
}

#[test]
fn typed_views_check_their_type_and_know_their_shape() {
    let mini = Mini::start(Script { anchors: 10, ..Script::default() });
    let mut loader = builder(&mini).connect().unwrap();
    let batch = loader.next_batch().unwrap().unwrap();
    let half = batch.tensor("half").unwrap();
    assert_eq!((half.dtype(), half.shape()), (DType::BFloat16, vec![4, 2, 2]));
    assert_eq!(half.bytes().len(), 4 * 4 * 2);
    assert_eq!(half.as_slice::<half::bf16>().unwrap()[5], half::bf16::from_bits(0x0101));
    assert_eq!(
        half.as_slice::<half::f16>().unwrap_err(),
        ColumnError::DType { name: "half".to_owned(), wanted: DType::Float16, found: DType::BFloat16 }
    );
    let mask = batch.tensor("state_is_pad").unwrap();
    assert_eq!((mask.shape(), mask.as_slice::<bool>().unwrap()), (vec![4], &[false, true, false, true][..]));
    assert_eq!(batch.tensor("index").unwrap().as_slice::<i64>().unwrap(), [0, 1, 2, 3]);
    assert_eq!(batch.text("task").unwrap(), (0..4).map(task_of).collect::<Vec<_>>());
    assert!(matches!(batch.tensor("task"), Err(ColumnError::IsText { .. })));
    assert!(matches!(batch.text("state"), Err(ColumnError::NotText { .. })));
    let missing = batch.tensor("stat").unwrap_err().to_string();
    assert!(missing.contains("\"stat\"") && missing.contains("\"state_is_pad\""), "{missing}");
    assert_eq!(loader.text_table(0).unwrap().iter().collect::<Vec<_>>(), ["pick", "pläce"]);
}

#[test]
fn position_resumes_at_the_exact_batch_by_seek_and_by_a_new_loader() {
    let mini = Mini::start(Script { anchors: 30, ..Script::default() });
    let mut loader = builder(&mini).connect().unwrap();
    let mut seen = Vec::new();
    for _ in 0..3 {
        let batch = loader.next_batch().unwrap().unwrap();
        seen.extend(batch.ids());
        assert_eq!(batch.position_after(), loader.position());
    }
    let position = loader.position();
    assert_eq!(position, Position { epoch: 0, consumed: 12 });
    let mut other = builder(&mini).start(position).connect().unwrap();
    assert_eq!(other.batches(), 5);
    let rest = ids_of_one_epoch(&mut other);
    assert_eq!([&seen[..], &rest].concat(), (0..30).collect::<Vec<_>>());

    assert_eq!(ids_of_one_epoch(&mut loader), rest);
    loader.seek(position).unwrap();
    assert_eq!(ids_of_one_epoch(&mut loader), rest);
    assert_eq!(loader.epoch(), 1);
    loader.seek(Position { epoch: 7, consumed: 0 }).unwrap();
    assert_eq!(loader.next_batch().unwrap().unwrap().epoch(), 7);
    assert!(matches!(
        loader.seek(Position { epoch: 0, consumed: 31 }),
        Err(LoaderError::Position { consumed: 31, anchors: 30 })
    ));
}

#[test]
fn a_seek_in_the_middle_of_a_stream_delivers_no_batch_of_the_old_run() {
    let mini = Mini::start(Script { anchors: 4000, backwards: true, ..Script::default() });
    let mut loader = builder(&mini).slots(3).connect().unwrap();
    for epoch in 1..200 {
        let held = loader.next_batch().unwrap().unwrap();
        loader.seek(Position { epoch, consumed: 4 * epoch }).unwrap();
        let first = loader.next_batch().unwrap().unwrap();
        assert_eq!((first.epoch(), first.ids()[0]), (epoch, 4 * epoch));
        drop(held);
    }
    assert_eq!(mini.seen.seeks.load(Ordering::SeqCst), 199);
}

#[test]
fn a_seek_to_where_the_loader_is_asks_the_daemon_nothing() {
    let mini = Mini::start(Script { anchors: 30, ..Script::default() });
    let mut loader = builder(&mini).connect().unwrap();
    drop(loader.next_batch().unwrap());
    loader.seek(loader.position()).unwrap();
    assert_eq!(loader.next_batch().unwrap().unwrap().ids(), [4, 5, 6, 7]);
    assert_eq!(mini.seen.seeks.load(Ordering::SeqCst), 0);
}

#[test]
fn the_end_of_an_epoch_is_a_position_too() {
    let mini = Mini::start(Script { anchors: 10, ..Script::default() });
    let mut loader = builder(&mini).start(Position { epoch: 2, consumed: 10 }).connect().unwrap();
    assert_eq!(loader.batches(), 0);
    assert!(loader.next_batch().unwrap().is_none());
    assert_eq!(loader.next_batch().unwrap().unwrap().epoch(), 3);
}

#[test]
fn a_loader_without_batches_ends_every_epoch_at_once() {
    let mini = Mini::start(Script { anchors: 3, ..Script::default() });
    let mut loader = builder(&mini).drop_last(true).connect().unwrap();
    for epoch in 0..5 {
        assert_eq!(loader.epoch(), epoch);
        assert!(loader.next_batch().unwrap().is_none());
    }
}

#[test]
fn old_batches_may_be_held_while_the_stream_goes_on() {
    let mini = Mini::start(Script { anchors: 4000, ..Script::default() });
    let mut loader = builder(&mini).slots(3).connect().unwrap();
    let first = loader.next_batch().unwrap().unwrap();
    for n in 1..500 {
        assert_eq!(loader.next_batch().unwrap().unwrap().ids()[0], 4 * n);
        assert_eq!(first.ids(), [0, 1, 2, 3]);
    }
}

#[test]
fn holding_every_slot_is_an_error_that_says_so_and_dropping_one_goes_on() {
    let mini = Mini::start(Script { anchors: 400, ..Script::default() });
    let mut loader = builder(&mini).slots(2).connect().unwrap();
    let mut held: Vec<_> = (0..2).map(|_| loader.next_batch().unwrap().unwrap()).collect();
    let error = loader.next_batch().unwrap_err();
    assert!(matches!(error, LoaderError::AllSlotsHeld { slots: 2 }), "{error}");
    assert!(error.to_string().contains("slots="), "{error}");
    held.remove(0);
    assert_eq!(loader.next_batch().unwrap().unwrap().ids()[0], 8);
}

#[test]
fn a_batch_outlives_its_loader_and_the_daemon() {
    let mini = Mini::start(Script { anchors: 10, ..Script::default() });
    let mut loader = builder(&mini).connect().unwrap();
    let batch = loader.next_batch().unwrap().unwrap();
    drop(loader);
    drop(mini);
    assert_eq!(batch.tensor("state").unwrap().as_slice::<f32>().unwrap()[3..6], state_of(1));
    assert_eq!(batch.text("task").unwrap()[2], "pläce");
}

#[test]
fn batches_travel_between_threads_and_every_lease_ends_once() {
    let mini = Mini::start(Script { anchors: 4000, ..Script::default() });
    let mut loader = builder(&mini).slots(4).connect().unwrap();
    let (send, receive) = std::sync::mpsc::sync_channel::<robocache::Batch>(1);
    let reader = std::thread::Builder::new()
        .name("reader".to_owned())
        .spawn(move || receive.into_iter().flat_map(|batch| batch.ids()).collect::<Vec<_>>())
        .unwrap();
    while let Some(batch) = loader.next_batch().unwrap() {
        send.send(batch).unwrap();
    }
    drop(send);
    assert_eq!(reader.join().unwrap(), (0..4000).collect::<Vec<_>>());
    assert_eq!(loader.occupancy().leased, 0);
    drop(loader);
    drop(mini);
}

#[test]
fn a_failure_comes_after_the_batches_before_it_and_a_seek_tries_again() {
    let mini = Mini::start(Script { anchors: 100, fail_at: Some(3), ..Script::default() });
    let mut loader = builder(&mini).connect().unwrap();
    for n in 0..3 {
        assert_eq!(loader.next_batch().unwrap().unwrap().ids()[0], 4 * n);
    }
    for _ in 0..2 {
        let error = loader.next_batch().unwrap_err();
        assert!(matches!(error, LoaderError::Failed { .. }), "{error}");
        assert!(error.to_string().contains("ep_3.parquet"), "{error}");
    }
    loader.seek(loader.position()).unwrap();
    assert_eq!(loader.next_batch().unwrap().unwrap().ids()[0], 12);
}

#[test]
fn a_draining_daemon_delivers_what_it_has_and_then_says_why() {
    let mini = Mini::start(Script { anchors: 100, drain_at: Some(2), ..Script::default() });
    let mut loader = builder(&mini).connect().unwrap();
    for n in 0..2 {
        assert_eq!(loader.next_batch().unwrap().unwrap().ids()[0], 4 * n);
    }
    let error = loader.next_batch().unwrap_err();
    assert!(
        matches!(&error, LoaderError::Draining { reason, position } if reason == "SIGTERM" && position.consumed == 8),
        "{error}"
    );
}

#[test]
fn a_hang_up_is_told_with_pid_and_position_after_the_ready_batches() {
    let mini = Mini::start(Script { anchors: 100, hang_up_at: Some(3), ..Script::default() });
    let mut loader = builder(&mini).connect().unwrap();
    for n in 0..3 {
        assert_eq!(loader.next_batch().unwrap().unwrap().ids()[0], 4 * n);
    }
    let error = loader.next_batch().unwrap_err();
    assert!(
        matches!(error, LoaderError::DaemonGone { pid, position: Position { epoch: 0, consumed: 12 } } if pid == std::process::id()),
        "{error}"
    );
}

#[test]
fn a_wait_with_a_limit_ends() {
    let mini = Mini::start(Script { anchors: 100, mute: true, ..Script::default() });
    let mut loader = builder(&mini).connect().unwrap();
    let start = Instant::now();
    assert!(matches!(loader.next_timeout(Duration::from_millis(120)).unwrap(), Next::TimedOut));
    assert!(start.elapsed() >= Duration::from_millis(120));
    assert!(matches!(loader.next_timeout(Duration::ZERO).unwrap(), Next::TimedOut));
}

#[test]
fn a_dropped_loader_says_bye() {
    let mini = Mini::start(Script { anchors: 100, mute: true, ..Script::default() });
    let seen = std::sync::Arc::clone(&mini.seen);
    drop(builder(&mini).connect().unwrap());
    drop(mini); // joins the daemon's threads
    assert_eq!(seen.byes.load(Ordering::SeqCst), 1);
}

#[test]
fn a_refusal_carries_its_code_and_text() {
    let mini = Mini::start(Script::default());
    let error = Loader::builder("nowhere").batch_size(1).socket(&mini.socket).connect().unwrap_err();
    assert!(matches!(&error, ConnectError::Refused { code: RefusalCode::NotFound, .. }), "{error}");
    assert!(error.to_string().contains("served are [\"mini\"]"), "{error}");
}

#[test]
fn no_daemon_is_an_error_that_names_the_socket_and_the_cure() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("none.sock");
    let error = Loader::builder("x").batch_size(1).socket(&socket).connect().unwrap_err();
    assert!(matches!(error, ConnectError::NoDaemon { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("none.sock") && text.contains("robocached serve --socket"), "{text}");
}

#[test]
fn impossible_arguments_are_refused_before_anything_is_sent() {
    let socket = "/nonexistent/robocached.sock";
    let base = || Loader::builder("x").socket(socket);
    for (builder, what) in [
        (base(), "batch_size"),
        (base().batch_size(1).slots(1), "slots"),
        (base().batch_size(1).rank(2, 2), "rank"),
        (base().batch_size(1).rank(0, 0), "world_size"),
    ] {
        let error = builder.connect().unwrap_err();
        assert!(matches!(error, ConnectError::Argument { what: found, .. } if found == what), "{error}");
    }
    let mini = Mini::start(Script::default());
    let nan = Loader::builder("mini")
        .batch_size(1)
        .window("a", Window::new(f64::NAN, 2))
        .socket(&mini.socket)
        .connect()
        .unwrap_err();
    assert!(nan.to_string().contains("window \"a\": hz"), "{nan}");
}

#[test]
fn status_and_stop_need_no_loader() {
    let mini = Mini::start(Script::default());
    assert_eq!(robocache::admin::status(&mini.socket).unwrap()["pid"], std::process::id());
    let pid = robocache::admin::stop(&mini.socket, robocache::admin::When::Now).unwrap();
    assert_eq!(pid, std::process::id());
}

#[test]
fn a_builder_becomes_the_spec_it_says() {
    let directory = tempfile::tempdir().unwrap();
    let spec = Loader::builder(directory.path())
        .batch_size(8)
        .window("action", Window::new(50.0, 10).start(-0.1).interp(Interp::Nearest).max_gap(0.5))
        .window("g", Window::at([0.0, 0.5]))
        .delta_timestamps("state", [-1.0 / 30.0, 0.0])
        .features(["x"])
        .anchors(Anchors::Every(10.0))
        .anchor_stream("imu")
        .dtype(DType::BFloat16)
        .dtype_of("g", DType::Float64)
        .shuffle(true)
        .seed(9)
        .drop_last(true)
        .episodes([1, 2])
        .rank(1, 4)
        .slots(6)
        .manifest("layout = \"frames\"")
        .start(Position { epoch: 1, consumed: 2 })
        .spec()
        .clone();
    assert_eq!(spec.dataset, DatasetRef::Path(directory.path().to_owned()));
    let windows = spec.windows.unwrap();
    assert_eq!(windows[0].1.offsets, OffsetsSpec::Grid { hz: 50.0, steps: 10, start: -0.1 });
    assert_eq!((windows[0].1.interp, windows[0].1.max_gap), (Some(Interp::Nearest), Some(0.5)));
    assert_eq!(windows[1].1.offsets, OffsetsSpec::At(vec![0.0, 0.5]));
    assert_eq!(spec.delta_timestamps.unwrap()[0], ("state".to_owned(), vec![-1.0 / 30.0, 0.0]));
    assert_eq!(spec.anchors, AnchorSpec::Every { hz: 10.0 });
    assert_eq!(Loader::builder("name").spec().dataset, DatasetRef::Name("name".to_owned()));
    let relative = Loader::builder("some/where").spec().dataset.clone();
    assert_eq!(relative, DatasetRef::Path(std::env::current_dir().unwrap().join("some/where")));
}
