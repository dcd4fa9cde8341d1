//! Streams, events, copies and allocations.

use robocached::gpu::device::{DeviceError, Event, EventId, Memory, Progress, Span, StreamId, Upload};

use crate::bench::{Bench, until, until_done};
use crate::random::Random;

#[test]
fn work_on_a_stream_is_done_in_order() {
    let bench = Bench::new();
    let large = Bench::large();
    let (first, last) = (bench.pinned(&vec![1; large as usize]), bench.pinned(&[2; 4096]));
    let span = bench.memory(large);
    for round in 0..20 {
        let at = round * 4096;
        bench.upload(bench.stream, &*first, &span);
        bench.upload(bench.stream, &*last, &span.part(at..at + 4096));
        bench.device.finish(bench.stream).unwrap();
        assert_eq!(bench.get(&span.part(at..at + 4096)), [2; 4096], "round {round}");
        assert_eq!(bench.get(&span.part(at + 4096..at + 4097)), [1], "round {round}");
    }
}

#[test]
fn an_event_is_done_when_the_work_before_it_is() {
    let bench = Bench::new();
    let span = bench.memory(Bench::large());
    let event = bench.event();
    let sources = [3, 4].map(|byte| bench.pinned(&vec![byte; span.bytes() as usize]));
    let mut was_pending = false;
    for round in 0..20_usize {
        bench.upload(bench.stream, &*sources[round % 2], &span);
        bench.record(&event, bench.stream);
        was_pending |= event.query().unwrap() == Progress::Pending;
        until_done(&event);
        let end = bench.get(&span.part(span.bytes() - 64..span.bytes()));
        assert_eq!(end, [sources_byte(round); 64], "round {round}");
    }
    assert!(was_pending, "of 20 large copies none was under way when it was asked for");
}

#[test]
fn timed_events_tell_the_time_between_them_and_others_none() {
    let bench = Bench::new();
    let (span, pinned) = (bench.memory(Bench::large()), bench.pinned(&vec![1; Bench::large() as usize]));
    let [begin, end] = [(); 2].map(|()| Event::timed(&bench.device).unwrap());
    let started = std::time::Instant::now();
    for _ in 0..3 {
        bench.record(&begin, bench.stream);
        bench.upload(bench.stream, &*pinned, &span);
        bench.record(&end, bench.stream);
        until_done(&end);
        let elapsed = end.since(&begin).unwrap();
        assert!(!elapsed.is_zero() && elapsed <= started.elapsed(), "{elapsed:?}");
    }
    let plain = bench.event();
    bench.record(&plain, bench.stream);
    until_done(&plain);
    let refused = plain.since(&begin).unwrap_err();
    assert!(matches!(refused, DeviceError::Call { .. }), "{refused}");
}

fn sources_byte(round: usize) -> u8 {
    if round.is_multiple_of(2) { 3 } else { 4 }
}

#[test]
fn an_event_is_done_before_its_first_record_and_holds_no_stream() {
    let bench = Bench::new();
    let event = bench.event();
    assert_eq!(event.query().unwrap(), Progress::Done);
    bench.device.wait(bench.stream, event.id()).unwrap();
    bench.device.finish(bench.stream).unwrap();
}

#[test]
fn an_event_follows_its_latest_record() {
    let bench = Bench::new();
    let other = bench.device.stream().unwrap();
    let (span, event) = (bench.memory(Bench::large()), bench.event());
    let (small, large) = (bench.pinned(&[5; 64]), bench.pinned(&vec![6; span.bytes() as usize]));
    for _ in 0..10 {
        bench.upload(other, &*small, &span.part(0..64));
        bench.record(&event, other);
        bench.upload(bench.stream, &*large, &span);
        bench.record(&event, bench.stream);
        until_done(&event);
        // The last bytes of a copy: the small one, if it came second, is elsewhere.
        assert_eq!(bench.get(&span.part(span.bytes() - 64..span.bytes())), [6; 64]);
        bench.device.finish(other).unwrap();
        bench.upload(bench.stream, &*small, &span.part(span.bytes() - 64..span.bytes()));
        bench.device.finish(bench.stream).unwrap();
    }
}

#[test]
fn a_stream_that_waits_comes_after_the_other() {
    let bench = Bench::new();
    let other = bench.device.stream().unwrap();
    let (span, event) = (bench.memory(Bench::large()), bench.event());
    let (large, small) = (bench.pinned(&vec![7; span.bytes() as usize]), bench.pinned(&[8; 64]));
    let end = span.part(span.bytes() - 64..span.bytes());
    for round in 0..20 {
        for _ in 0..4 {
            bench.upload(bench.stream, &*large, &span);
        }
        bench.record(&event, bench.stream);
        bench.device.wait(other, event.id()).unwrap();
        bench.upload(other, &*small, &end);
        bench.device.finish(other).unwrap();
        assert_eq!(bench.get(&end), [8; 64], "round {round}");
        bench.device.finish(bench.stream).unwrap();
        assert_eq!(bench.get(&end), [8; 64], "round {round}: the large copy came later");
    }
}

#[test]
fn a_wait_is_for_what_was_recorded_before_it() {
    let bench = Bench::new();
    let other = bench.device.stream().unwrap();
    let (span, event) = (bench.memory(Bench::large()), bench.event());
    let large = bench.pinned(&vec![9; span.bytes() as usize]);
    bench.device.wait(other, event.id()).unwrap();
    // The other stream's own work stands behind the wait; ours behind the other's, so this would be a circle.
    let theirs = bench.event();
    bench.record(&theirs, other);
    bench.device.wait(bench.stream, theirs.id()).unwrap();
    bench.upload(bench.stream, &*large, &span);
    bench.record(&event, bench.stream);
    bench.device.finish(other).unwrap();
    bench.device.finish(bench.stream).unwrap();
    assert_eq!(event.query().unwrap(), Progress::Done);
}

#[test]
fn copies_of_any_size_and_place_are_exact() {
    [Bench::new, Bench::with_old_driver].into_iter().for_each(|bench| copy_sizes(&bench()));
}

fn copy_sizes(bench: &Bench) {
    let mut random = Random::from_environment().unwrap();
    for size in [1, 2, 3, 63, 255, 4097, (1 << 20) - 1, (1 << 20) + 1, 3_000_001] {
        let (skew, lead) = (random.below(70), random.below(70));
        let bytes: Vec<u8> = (0..size + skew).map(|_| random.bits().to_le_bytes()[3]).collect();
        let around = bench.put(&vec![0xa5; lead + size + 33]);
        let inner = around.part(lead as u64..(lead + size) as u64);
        let pinned = bench.pinned(&bytes);
        bench.device.upload(bench.stream, &*pinned, skew as u64..(skew + size) as u64, &inner).unwrap();
        bench.device.finish(bench.stream).unwrap();
        let got = bench.get(&around);
        assert!(got[lead..lead + size] == bytes[skew..], "{size} bytes from {skew} to {lead}");
        assert!(
            got[..lead].iter().chain(&got[lead + size..]).all(|&byte| byte == 0xa5),
            "beside {size} bytes"
        );
    }
}

#[test]
fn tens_of_thousands_of_copies_at_once_are_exact() {
    [Bench::new, Bench::with_old_driver].into_iter().for_each(|bench| copy_many(&bench()));
}

fn copy_many(bench: &Bench) {
    const COUNT: usize = 70_000;
    let mut random = Random::from_environment().unwrap();
    let bytes: Vec<u8> = (0..COUNT * 64).map(|_| random.bits().to_le_bytes()[3]).collect();
    let (span, pinned) = (bench.memory(bytes.len() as u64), bench.pinned(&bytes));
    let part = |at: usize, len: usize| at as u64 * 64..at as u64 * 64 + len as u64;
    // From the other end, and some of nothing.
    let uploads: Vec<Upload> = (0..COUNT)
        .map(|at| (COUNT - 1 - at, at, if at % 7 == 0 { 0 } else { 64 }))
        .map(|(from, to, len)| Upload::new(&*pinned, part(from, len), &span.part(part(to, len))))
        .collect();
    let before = bench.get(&span);
    bench.device.upload_all(bench.stream, &uploads).unwrap();
    bench.device.finish(bench.stream).unwrap();
    for (at, (got, before)) in bench.get(&span).chunks(64).zip(before.chunks(64)).enumerate() {
        let wanted = if at % 7 == 0 { before } else { &bytes[(COUNT - 1 - at) * 64..][..64] };
        assert!(got == wanted, "copy {at}");
    }
}

#[test]
fn what_does_not_fit_is_refused_and_the_device_goes_on() {
    let bench = Bench::new();
    let (_, total) = bench.device.memory().unwrap();
    for bytes in [total * 2, u64::MAX, u64::MAX - (2 << 20)] {
        let refused = Memory::allocate(&bench.device, bytes).unwrap_err();
        assert!(
            matches!(refused, DeviceError::OutOfMemory { bytes: said, .. } if said == bytes),
            "{refused:?}"
        );
    }
    for bytes in [u64::MAX, 1 << 60] {
        let refused = bench.device.pin(bytes).unwrap_err();
        assert!(
            matches!(refused, DeviceError::HostMemory { bytes: said, .. } if said == bytes),
            "{refused:?}"
        );
        assert!(refused.to_string().contains("pinned_cache"), "{refused}");
    }
    assert_eq!(bench.get(&bench.put(b"it goes on")), b"it goes on");
}

#[test]
fn allocations_are_apart_and_aligned_and_large_ones_in_pages_of_their_own() {
    let bench = Bench::new();
    let sizes = [1, 3, 256, 1000, 1 << 20, (1 << 20) + 1, 5 << 20];
    let spans: Vec<Span> = sizes.iter().map(|&bytes| bench.memory(bytes)).collect();
    let mut places: Vec<(u64, u64)> = spans.iter().map(|span| (span.address().0, span.bytes())).collect();
    for &(at, bytes) in &places {
        assert_eq!(at % 256, 0, "{bytes} bytes");
        assert!(bytes < 1 << 20 || at % (2 << 20) == 0, "{bytes} bytes at {at:#x}");
    }
    places.sort_unstable();
    for two in places.windows(2) {
        assert!(two[0].0 + two[0].1 <= two[1].0);
        assert!(two[0].1 < 1 << 20 || two[0].0.div_euclid(2 << 20) < two[1].0.div_euclid(2 << 20));
    }
}

#[test]
fn what_is_none_of_the_devices_is_an_error_and_not_a_loss() {
    let bench = Bench::new();
    let event = bench.event();
    let call = |result: Result<(), DeviceError>| {
        assert!(matches!(result, Err(DeviceError::Call { .. })), "{result:?}");
    };
    call(bench.device.record(EventId(u64::MAX), bench.stream));
    call(bench.device.record(event.id(), StreamId(u64::MAX)));
    call(bench.device.wait(bench.stream, EventId(0)));
    call(bench.device.query(EventId(u64::MAX)).map(drop));
    call(bench.device.finish(StreamId(1 << 40)));
    call(bench.device.export_memory(bench.memory(1000).address()).map(drop));
    let gone = event.id();
    drop(event);
    call(bench.device.query(gone).map(drop));
    assert_eq!(bench.get(&bench.put(b"it goes on")), b"it goes on");
}

#[test]
fn every_thread_may_call() {
    let bench = Bench::new();
    std::thread::scope(|scope| {
        for thread in 0..8_u8 {
            let bench = &bench;
            scope.spawn(move || {
                let stream = bench.device.stream().unwrap();
                let event = bench.event();
                for round in 0..20 {
                    let byte = thread * 16 + round % 16;
                    let (pinned, span) = (bench.pinned(&vec![byte; 70_000]), bench.memory(70_000));
                    bench.upload(stream, &*pinned, &span);
                    bench.record(&event, stream);
                    until("a thread's event", || event.query().unwrap() == Progress::Done);
                    assert!(bench.get(&span).iter().all(|&found| found == byte));
                }
            });
        }
    });
}
