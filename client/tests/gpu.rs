//! The client's end of a ring on a GPU, against the contract: a daemon in miniature with a simulated device.
#![expect(clippy::unwrap_used, reason = "test code: a failure here is the test's")]

mod mini;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mini::{Mini, Script, state_of, task_of};
use robocache::gpu::{GpuKind, Stream};
use robocache::{
    Batch, ColumnError, ConnectError, DType, GpuError, LateReads, Loader, LoaderBuilder, LoaderError,
    Position, RefusalCode,
};

fn builder(mini: &Mini) -> LoaderBuilder {
    Loader::builder("mini").batch_size(4).device("sim:0").socket(&mini.socket)
}

/// The rows of `state`, read back from the device.
fn states(batch: &Batch) -> Vec<[f32; 3]> {
    let bytes = batch.device_tensor("state").unwrap().to_host().unwrap();
    let (values, rest) = bytes.as_chunks::<4>();
    assert!(rest.is_empty());
    let values: Vec<f32> = values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    values.as_chunks::<3>().0.to_vec()
}

fn byes(mini: &Mini) -> u32 {
    mini.seen.byes.load(Ordering::SeqCst)
}

/// Stops the daemon, which waits for what its clients say, and returns what it saw.
fn stopped(mini: Mini) -> Arc<mini::Seen> {
    let seen = Arc::clone(&mini.seen);
    drop(mini);
    seen
}

#[test]
fn epochs_come_in_order_and_read_back_from_the_device() {
    let mini = Mini::start(Script { anchors: 10, backwards: true, ..Script::default() });
    let mut loader = builder(&mini).connect().unwrap();
    for _ in 0..20 {
        let mut seen = Vec::new();
        while let Some(batch) = loader.next_batch().unwrap() {
            batch.use_on(Stream::LEGACY).unwrap();
            assert_eq!(states(&batch), batch.ids().into_iter().map(state_of).collect::<Vec<_>>());
            assert_eq!(batch.text("task").unwrap(), batch.ids().into_iter().map(task_of).collect::<Vec<_>>());
            seen.extend(batch.ids());
        }
        assert_eq!(seen, (0..10).collect::<Vec<_>>());
    }
}

#[test]
fn a_device_tensor_knows_its_place_and_the_host_views_say_where_it_is() {
    let mini = Mini::start(Script { anchors: 10, ..Script::default() });
    let mut loader = builder(&mini).connect().unwrap();
    assert_eq!(loader.gpu().unwrap().kind, GpuKind::Sim);
    let batch = loader.next_batch().unwrap().unwrap();
    let half = batch.device_tensor("half").unwrap();
    assert_eq!((half.dtype(), half.shape(), half.len_bytes()), (DType::BFloat16, vec![4, 2, 2], 32));
    assert_eq!(half.address() % 64, 0);
    assert_eq!(half.gpu(), batch.gpu().unwrap());
    assert_eq!(batch.device_tensor("state_is_pad").unwrap().to_host().unwrap(), [0, 1, 0, 1]);
    let error = batch.tensor("half").unwrap_err();
    assert!(matches!(&error, ColumnError::OnDevice { name, .. } if name == "half"), "{error}");
    assert!(error.to_string().contains("to_host()"), "{error}");
    batch.raw("half").unwrap_err();
    assert!(matches!(batch.device_tensor("task"), Err(ColumnError::IsText { .. })));
    assert!(matches!(batch.device_tensor("x"), Err(ColumnError::Missing { .. })));

    let mut on_host = builder(&mini).device("cpu").connect().unwrap();
    assert!(on_host.gpu().is_none());
    let batch = on_host.next_batch().unwrap().unwrap();
    batch.use_on(Stream::LEGACY).unwrap();
    assert!(matches!(batch.device_tensor("half"), Err(ColumnError::OnHost { .. })));
}

#[test]
fn done_is_recorded_when_a_used_batch_is_dropped_and_not_before() {
    let mini = Mini::start(Script { anchors: 4000, ..Script::default() });
    let mut loader = builder(&mini).connect().unwrap();
    let unused = loader.next_batch().unwrap().unwrap();
    drop(unused);
    assert_eq!(mini.seen.gpu.done_records(), 0);
    for n in 1..200 {
        let batch = loader.next_batch().unwrap().unwrap();
        batch.use_on(Stream::LEGACY).unwrap();
        batch.use_on(Stream::LEGACY).unwrap();
        batch.use_on(Stream::PER_THREAD).unwrap();
        assert_eq!(mini.seen.gpu.done_records(), n - 1);
        drop(batch);
        assert_eq!(mini.seen.gpu.done_records(), n);
    }
}

#[test]
fn a_slot_is_not_written_while_the_kernels_of_a_dropped_batch_still_read_it() {
    let mini = Mini::start(Script { anchors: 4000, ..Script::default() });
    let found = Arc::new(Mutex::new(LateReads::default()));
    let late = builder(&mini).slots(3).late_reads(Duration::from_millis(2), Arc::clone(&found));
    let mut loader = late.connect().unwrap();
    for n in 0..100 {
        let batch = loader.next_batch().unwrap().unwrap();
        batch.use_on(Stream::LEGACY).unwrap();
        assert_eq!(states(&batch)[0], state_of(4 * n));
    }
    drop(loader); // waits for the late reads
    let found = found.lock().unwrap();
    assert_eq!((found.checked, &found.overwritten), (100, &vec![]));
}

#[test]
fn a_batch_that_was_used_and_released_unfenced_would_be_seen_as_overwritten() {
    // The test above would pass with a check that sees nothing. Here the daemon ignores `done`.
    let mini = Mini::start(Script { anchors: 4000, ignore_done: true, ..Script::default() });
    let found = Arc::new(Mutex::new(LateReads::default()));
    let late = builder(&mini).slots(2).late_reads(Duration::from_millis(20), Arc::clone(&found));
    let mut loader = late.connect().unwrap();
    for _ in 0..20 {
        loader.next_batch().unwrap().unwrap().use_on(Stream::LEGACY).unwrap();
    }
    drop(loader);
    assert!(!found.lock().unwrap().overwritten.is_empty());
}

#[test]
fn bye_comes_after_the_last_batch_of_a_dropped_loader() {
    let mini = Mini::start(Script { anchors: 100, ..Script::default() });
    let mut loader = builder(&mini).connect().unwrap();
    let (first, second) = (loader.next_batch().unwrap().unwrap(), loader.next_batch().unwrap().unwrap());
    second.use_on(Stream::LEGACY).unwrap();
    drop(loader);
    drop(first);
    // Still attached: the memory is open, and its slots are read.
    assert_eq!(states(&second)[0], state_of(4));
    assert_eq!(second.text("task").unwrap()[0], task_of(4));
    robocache::admin::status(&mini.socket).unwrap();
    assert_eq!(byes(&mini), 0);
    drop(second);
    let seen = stopped(mini);
    assert_eq!(seen.byes.load(Ordering::SeqCst), 1);
    assert_eq!(seen.leased_at_bye.load(Ordering::SeqCst), 0);
    assert_eq!(seen.gpu.done_records(), 1);
}

#[test]
fn a_loader_without_batches_in_hand_says_bye_at_once() {
    let mini = Mini::start(Script { anchors: 100, mute: true, ..Script::default() });
    drop(builder(&mini).connect().unwrap());
    let seen = stopped(mini);
    assert_eq!((seen.byes.load(Ordering::SeqCst), seen.deaths.load(Ordering::SeqCst)), (1, 0));
}

#[test]
fn readers_that_nobody_names_are_waited_for_and_the_slots_go_round() {
    let mini = Mini::start(Script { anchors: 4000, ..Script::default() });
    let mut loader = builder(&mini).slots(2).connect().unwrap();
    let mut seen = Vec::new();
    while let Some(batch) = loader.next_batch().unwrap() {
        batch.use_anywhere().unwrap();
        seen.extend(batch.ids());
    }
    assert_eq!(seen, (0..4000).collect::<Vec<_>>());
    assert_eq!(mini.seen.gpu.done_records(), 0);
    drop(loader);
    let seen = stopped(mini);
    assert_eq!((seen.byes.load(Ordering::SeqCst), seen.leased_at_bye.load(Ordering::SeqCst)), (1, 0));
}

#[test]
fn batches_are_dropped_in_any_thread() {
    let mini = Mini::start(Script { anchors: 4000, ..Script::default() });
    let mut loader = builder(&mini).slots(4).connect().unwrap();
    let (send, receive) = std::sync::mpsc::sync_channel::<Batch>(1);
    let reader = std::thread::Builder::new()
        .name("reader".to_owned())
        .spawn(move || {
            let mut ids = Vec::new();
            for batch in receive {
                batch.use_on(Stream::PER_THREAD).unwrap();
                ids.extend(batch.ids());
                assert_eq!(states(&batch)[0], state_of(batch.ids()[0]));
            }
            ids
        })
        .unwrap();
    while let Some(batch) = loader.next_batch().unwrap() {
        batch.use_on(Stream::LEGACY).unwrap();
        send.send(batch).unwrap();
    }
    drop((send, loader));
    assert_eq!(reader.join().unwrap(), (0..4000).collect::<Vec<_>>());
    assert_eq!(stopped(mini).byes.load(Ordering::SeqCst), 1);
}

#[test]
fn a_daemon_that_dies_leaves_what_it_published() {
    let mini = Mini::start(Script { anchors: 100, hang_up_at: Some(3), ..Script::default() });
    let mut loader = builder(&mini).connect().unwrap();
    let mut held = Vec::new();
    let position = loop {
        match loader.next_batch() {
            Ok(batch) => held.push(batch.unwrap()),
            Err(LoaderError::DaemonGone { position, .. }) => break position,
            Err(other) => panic!("{other}"),
        }
    };
    assert_eq!(position, Position { epoch: 0, consumed: 12 });
    drop(mini);
    for (n, batch) in (0..).zip(&held) {
        batch.use_on(Stream::LEGACY).unwrap();
        assert_eq!(states(batch)[0], state_of(4 * n));
    }
}

#[test]
fn a_ring_may_have_more_slots_than_were_asked_for_and_on_the_host_may_not() {
    let mini = Mini::start(Script { anchors: 400, more_slots: 3, ..Script::default() });
    let mut loader = builder(&mini).slots(2).connect().unwrap();
    assert_eq!(loader.info().slots, 5);
    let held: Vec<_> = (0..5).map(|_| loader.next_batch().unwrap().unwrap()).collect();
    let error = loader.next_batch().unwrap_err();
    assert!(matches!(error, LoaderError::AllSlotsHeld { slots: 5 }), "{error}");
    drop(held);
    loader.next_batch().unwrap().unwrap();
}

#[test]
fn a_batch_that_is_published_before_it_is_made_is_the_daemons_error() {
    let mini = Mini::start(Script { anchors: 400, unready: true, ..Script::default() });
    let mut loader = builder(&mini).connect().unwrap();
    let batch = loader.next_batch().unwrap().unwrap();
    let error = batch.use_on(Stream::LEGACY).unwrap_err();
    assert!(error.to_string().contains("before its batch was made"), "{error}");
    batch.device_tensor("state").unwrap().to_host().unwrap_err();
}

#[test]
fn memory_that_is_smaller_than_told_is_refused_and_the_daemon_told_bye() {
    let mini = Mini::start(Script { anchors: 400, larger_by: 1, ..Script::default() });
    let error = builder(&mini).connect().unwrap_err();
    assert!(matches!(error, ConnectError::Gpu(GpuError::Ring { .. })), "{error}");
    let seen = stopped(mini);
    assert_eq!((seen.byes.load(Ordering::SeqCst), seen.deaths.load(Ordering::SeqCst)), (1, 0));
}

#[test]
fn a_device_that_the_daemon_has_not_is_told_by_its_code() {
    let mini = Mini::start(Script { anchors: 400, ..Script::default() });
    let error = builder(&mini).device("sim:9").connect().unwrap_err();
    assert!(matches!(error, ConnectError::Refused { code: RefusalCode::UnsupportedDevice, .. }), "{error}");
}

#[test]
fn a_device_that_is_none_is_refused_before_anything_is_sent() {
    let error = Loader::builder("x").batch_size(1).device("tpu").socket("/nonexistent/x.sock").connect();
    let error = error.unwrap_err();
    assert!(matches!(&error, ConnectError::Gpu(GpuError::Name { found }) if found == "tpu"), "{error}");
}

#[test]
fn a_cuda_device_of_this_process_is_a_uuid_or_an_error_that_says_what_is_missing() {
    match (robocache::gpu::available(), robocache::gpu::resolve("cuda:0")) {
        (Ok(count), Ok(device)) if count > 0 => assert!(device.starts_with("cuda:GPU-"), "{device}"),
        (Ok(0), Err(GpuError::NotVisible { .. }))
        | (Err(GpuError::Call { .. }), Err(GpuError::Call { .. })) => {}
        (Err(GpuError::NoDriver), Err(error @ GpuError::NoDriver)) => {
            assert!(error.to_string().contains("libcuda"), "{error}");
        }
        other => panic!("{other:?}"),
    }
}
