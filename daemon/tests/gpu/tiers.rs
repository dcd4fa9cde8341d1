//! Episodes on their way to a device: what cannot be had cuts a tier, and every byte arrives whatever the path.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use robocache_formats::{Stream, Values};
use robocache_types::{Clock, DType};
use robocached::gpu::device::{Device, DeviceError, Event, Progress, Upload};
use robocached::gpu::sim::{Fault, SimDevice, SimOptions};
use robocached::gpu::staging::Staging;
use robocached::gpu::tiers::{Held, TierCounters, Tiers, Wanted};

use crate::bench::Bench;

fn bytes(len: usize, seed: u64) -> Vec<u8> {
    let next = |x: &mut u64| {
        *x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        Some((*x >> 56) as u8)
    };
    std::iter::successors(Some(seed), |x| Some(x.wrapping_add(1)))
        .scan(seed, |x, _| next(x))
        .take(len)
        .collect()
}

/// A device that takes orders to fail.
fn simulated() -> (Arc<SimDevice>, Bench) {
    let device = SimDevice::new(SimOptions::default());
    let bench = Bench::on(Arc::clone(&device) as Arc<dyn Device>);
    (device, bench)
}

fn staging(bench: &Bench) -> Staging {
    Staging::new(&bench.device, bench.device.stream().unwrap(), Arc::default())
}

/// Waits for what was sent.
fn arrive(sent: Option<Arc<Event>>) {
    while sent.as_ref().is_some_and(|sent| sent.query().unwrap() == Progress::Pending) {
        std::thread::yield_now();
    }
}

/// Uploads pieces of all sizes to places beside each other and apart; they must arrive as they were, and nothing else.
fn upload_everywhere(bench: &Bench, staging: &mut Staging) {
    let whole = bench.memory(3 << 20);
    let before = bench.get(&whole);
    let mut wanted = before.clone();
    let mut at = 0;
    for (number, len) in [1_usize, 255, 256, 257, 4096, 100_000, 700_001, 16, 300_000].into_iter().enumerate()
    {
        let piece = bytes(len, number as u64 + 1);
        staging.upload(&piece, &whole.part(at as u64..(at + len) as u64)).unwrap();
        wanted[at..at + len].copy_from_slice(&piece);
        at = (at + len).next_multiple_of(256) + if number % 3 == 0 { 4096 } else { 0 };
    }
    staging.flush().unwrap();
    arrive(staging.sent().unwrap());
    let found = bench.get(&whole);
    let mut start = 0;
    for (number, len) in [1_usize, 255, 256, 257, 4096, 100_000, 700_001, 16, 300_000].into_iter().enumerate()
    {
        assert!(found[start..start + len] == wanted[start..start + len], "piece {number} of {len} bytes");
        start = (start + len).next_multiple_of(256) + if number % 3 == 0 { 4096 } else { 0 };
    }
    assert!(found[start + 256..] == before[start + 256..], "what lies behind is as it was");
}

#[test]
fn pieces_of_any_size_arrive_wherever_they_go() {
    let bench = Bench::new();
    let mut staging = staging(&bench);
    for _ in 0..4 {
        upload_everywhere(&bench, &mut staging);
    }
}

#[test]
fn what_follows_is_there_with_all_that_was_sent_before_it() {
    let bench = Bench::new();
    let mut staging = staging(&bench);
    let (first, then) = (bench.memory(8 << 20), bench.memory(5000));
    for round in 0..4 {
        let (large, small) = (bytes(8 << 20, round), bytes(5000, 100 + round));
        staging.upload(&large, &first).unwrap();
        staging.flush().unwrap();
        let pinned = bench.pinned(&small);
        arrive(Some(staging.follow(Upload::new(&*pinned, 0..5000, &then)).unwrap()));
        assert!(bench.get(&first) == large && bench.get(&then) == small, "round {round}");
    }
}

#[test]
fn what_was_to_follow_and_failed_is_not_under_way() {
    let (device, bench) = simulated();
    let mut staging = staging(&bench);
    let (first, pinned) = (bench.memory(1 << 20), bench.pinned(&bytes(5000, 1)));
    staging.upload(&bytes(1 << 20, 2), &first).unwrap();
    staging.flush().unwrap();
    device.inject(Fault::Upload(0));
    let then = bench.memory(5000);
    assert!(staging.follow(Upload::new(&*pinned, 0..5000, &then)).is_err());
    assert!(staging.sent().unwrap().is_none(), "all is there, and nobody waits for what failed");
    assert!(bench.get(&first) == bytes(1 << 20, 2));
}

#[test]
fn uploads_go_through_smaller_buffers_where_large_ones_cannot_be_pinned() {
    let (device, bench) = simulated();
    let mut staging = staging(&bench);
    device.inject(Fault::Pins(2)); // 32 MiB and 4 MiB: the pieces are larger than what is left
    upload_everywhere(&bench, &mut staging);
    upload_everywhere(&bench, &mut staging);
}

fn stream(rows: u16, dim: usize, seed: u64) -> Stream {
    let stamps: Vec<i64> = (0..i64::from(rows)).map(|row| row * 1_000_003).collect();
    let rows = usize::from(rows);
    let values = Values { dtype: DType::Float32, dim, rows, buffer: bytes(rows * dim * 4, seed).into() };
    Stream { clock: Clock::from_stamps(stamps).unwrap(), values }
}

fn tiers(bench: &Bench, cache: u64, pinned: u64) -> (Tiers, Arc<TierCounters>) {
    let counters = Arc::new(TierCounters::default());
    let transfers = bench.device.stream().unwrap();
    (Tiers::new(&bench.device, transfers, cache, pinned, Arc::clone(&counters)), counters)
}

/// Prepares a batch of which every sample reads the same stream of `episode`, and these rows of it.
fn prepare_rows(
    tiers: &mut Tiers,
    episode: u32,
    stream: &Stream,
    rows: &[Range<usize>],
) -> Result<Held, DeviceError> {
    let mut held = Held::default();
    let wanted = Wanted {
        dataset: 0,
        positions: &[0],
        episodes: &vec![episode; rows.len()],
        stream: &|_, _| stream,
        rows: &|sample, _| rows[sample].clone(),
    };
    tiers.prepare(wanted, &mut held).map_err(|(_, error)| error)?;
    Ok(held)
}

fn prepare(tiers: &mut Tiers, episode: u32) -> Result<Held, DeviceError> {
    prepare_rows(tiers, episode, &stream(1000, 8, u64::from(episode)), std::slice::from_ref(&(100..200)))
}

fn count(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

#[test]
fn a_gpu_cache_that_cannot_grow_is_cut_to_what_it_has_and_pinned_memory_serves() {
    let (device, bench) = simulated();
    let (mut tiers, counters) = tiers(&bench, 1 << 30, 1 << 20);
    device.inject(Fault::Allocations(1));
    prepare(&mut tiers, 0).unwrap();
    prepare(&mut tiers, 1).unwrap();
    assert_eq!((count(&counters.gpu_budget), count(&counters.gpu_hits)), (0, 0));
    assert_eq!((count(&counters.pinned_hits), count(&counters.passing)), (2, 0));
}

#[test]
fn what_neither_tier_can_hold_passes_and_fails_only_without_any_memory() {
    let (device, bench) = simulated();
    let (mut tiers, counters) = tiers(&bench, 0, 1 << 30);
    device.inject(Fault::Pins(1));
    prepare(&mut tiers, 0).unwrap();
    assert_eq!((count(&counters.pinned_budget), count(&counters.passing)), (0, 1), "pinned memory was cut");
    device.inject(Fault::Allocations(2));
    // The slab that is there already has room, so even now nothing fails.
    prepare(&mut tiers, 1).unwrap();
    bench.device.finish(bench.stream).unwrap();
    let (mut empty, _) = self::tiers(&bench, 0, 0);
    let error = prepare(&mut empty, 2).unwrap_err();
    assert!(matches!(error, DeviceError::OutOfMemory { .. }), "{error}");
    prepare(&mut empty, 2).unwrap();
}

#[test]
fn of_pinned_episodes_large_windows_are_copied_once_and_small_ones_are_left_to_the_kernel() {
    let bench = Bench::new();
    let (mut tiers, counters) = tiers(&bench, 0, 64 << 20);
    let small = prepare(&mut tiers, 0).unwrap();
    tiers.flush().unwrap();
    assert_eq!((small.bytes(), count(&counters.uploaded_bytes)), (0, 0), "100 rows of 32 bytes");
    let large = stream(1000, 1024, 1);
    let held = prepare_rows(&mut tiers, 1, &large, &[400..500, 100..200, 150..260, 100..110]).unwrap();
    arrive(tiers.flush().unwrap());
    let rows = (260 - 100) + (500 - 400);
    assert_eq!((held.bytes(), count(&counters.uploaded_bytes)), (rows * 4096, rows * 4096));
    assert_eq!((count(&counters.pinned_hits), count(&counters.passing)), (5, 0));
}

#[test]
fn what_passes_is_the_rows_that_are_read_and_the_stamps() {
    let bench = Bench::new();
    let (mut tiers, counters) = tiers(&bench, 0, 0);
    let held = prepare_rows(&mut tiers, 0, &stream(1000, 8, 0), &[900..1000, 0..1]).unwrap();
    arrive(tiers.flush().unwrap());
    let bytes = 101 * 32 + 1000 * 8;
    assert_eq!((held.bytes(), count(&counters.passing)), (bytes, 2));
    assert!(
        (bytes..bytes + 3 * 256).contains(&count(&counters.uploaded_bytes)),
        "with padding between pieces"
    );
}

#[test]
fn what_an_upload_that_failed_should_have_brought_is_brought_again() {
    let (device, bench) = simulated();
    let (mut tiers, counters) = tiers(&bench, 64 << 20, 0);
    device.inject(Fault::Upload(0));
    prepare(&mut tiers, 0).unwrap();
    let error = tiers.flush().unwrap_err();
    assert!(matches!(error, DeviceError::Call { call: "upload", .. }), "{error}");
    assert_eq!(count(&counters.uploaded_bytes), 0);
    for _ in 0..2 {
        prepare(&mut tiers, 0).unwrap();
        tiers.flush().unwrap();
        assert_eq!(count(&counters.uploaded_bytes), 1000 * 32 + 1000 * 8, "once, and now it is here");
    }
    assert_eq!(count(&counters.gpu_hits), 3);
}

#[test]
fn an_upload_that_fails_while_a_batch_is_prepared_fails_the_burst_and_no_later_one() {
    let (device, bench) = simulated();
    let (mut tiers, counters) = tiers(&bench, 0, 0);
    device.inject(Fault::Pins(2)); // the first buffer has 256 KiB, and is sent when it is full
    device.inject(Fault::Upload(0));
    let large = stream(1000, 256, 1);
    assert!(prepare_rows(&mut tiers, 0, &large, std::slice::from_ref(&(0..1000))).is_err());
    assert!(tiers.flush().is_err());
    let before = count(&counters.uploaded_bytes);
    prepare_rows(&mut tiers, 0, &large, std::slice::from_ref(&(0..100))).unwrap();
    tiers.flush().unwrap();
    assert!(count(&counters.uploaded_bytes) >= before + 100 * 1024);
    bench.device.finish(bench.stream).unwrap();
}
