//! Episodes on their way to a device: what cannot be had cuts a tier, and every byte arrives whatever the path.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use robocache_formats::{Stream, Values};
use robocache_types::{Clock, DType};
use robocached::gpu::device::{Device, DeviceError};
use robocached::gpu::sim::{Fault, SimDevice, SimOptions};
use robocached::gpu::staging::Staging;
use robocached::gpu::tiers::{Held, TierCounters, Tiers};

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
    staging.wait(bench.stream).unwrap();
    bench.device.finish(bench.stream).unwrap();
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
    let counters = Arc::new(TierCounters::default());
    let transfers = bench.device.stream().unwrap();
    let mut staging = Staging::new(&bench.device, transfers, counters);
    for _ in 0..4 {
        upload_everywhere(&bench, &mut staging);
    }
}

#[test]
fn uploads_go_through_smaller_buffers_where_large_ones_cannot_be_pinned() {
    let device = SimDevice::new(SimOptions::default());
    let bench = Bench::on(Arc::clone(&device) as Arc<dyn Device>);
    let transfers = bench.device.stream().unwrap();
    let mut staging = Staging::new(&bench.device, transfers, Arc::new(TierCounters::default()));
    device.inject(Fault::Pins(2)); // 32 MiB and 4 MiB: the pieces are larger than what is left
    upload_everywhere(&bench, &mut staging);
    upload_everywhere(&bench, &mut staging);
}

fn stream(rows: u16, seed: u64) -> Stream {
    let stamps: Vec<i64> = (0..i64::from(rows)).map(|row| row * 1_000_003).collect();
    let rows = usize::from(rows);
    let values = Values { dtype: DType::Float32, dim: 8, rows, buffer: bytes(rows * 32, seed).into() };
    Stream { clock: Clock::from_stamps(stamps).unwrap(), values }
}

fn tiers(bench: &Bench, cache: u64, pinned: u64) -> (Tiers, Arc<TierCounters>) {
    let counters = Arc::new(TierCounters::default());
    let transfers = bench.device.stream().unwrap();
    (Tiers::new(&bench.device, transfers, cache, pinned, Arc::clone(&counters)), counters)
}

fn prepare(tiers: &mut Tiers, episode: u32) -> Result<(), DeviceError> {
    let stream = stream(1000, u64::from(episode));
    let mut held = Held::default();
    tiers.prepare(0, &[0], &[episode], &|_, _| &stream, &mut held).map(drop).map_err(|(_, error)| error)
}

fn count(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

#[test]
fn a_gpu_cache_that_cannot_grow_is_cut_to_what_it_has_and_pinned_memory_serves() {
    let device = SimDevice::new(SimOptions::default());
    let bench = Bench::on(Arc::clone(&device) as Arc<dyn Device>);
    let (mut tiers, counters) = tiers(&bench, 1 << 30, 1 << 20);
    device.inject(Fault::Allocations(1));
    prepare(&mut tiers, 0).unwrap();
    prepare(&mut tiers, 1).unwrap();
    assert_eq!((count(&counters.gpu_budget), count(&counters.gpu_hits)), (0, 0));
    assert_eq!((count(&counters.pinned_hits), count(&counters.passing)), (2, 0));
}

#[test]
fn what_neither_tier_can_hold_passes_and_fails_only_without_any_memory() {
    let device = SimDevice::new(SimOptions::default());
    let bench = Bench::on(Arc::clone(&device) as Arc<dyn Device>);
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
