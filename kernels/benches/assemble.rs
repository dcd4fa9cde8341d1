//! What a sample costs on the CPU, beside the copy of as many bytes: `cargo bench -p robocache-kernels`.
//!
//! Sources and outputs rotate over more memory than the caches hold, as a daemon's do; the `cached` group stays
//! in the first-level cache and shows the cost of a call.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use robocache_kernels::{Anchor, Field, FieldKernel, Offsets, StreamView};
use robocache_types::{Clock, DType, Interp, UniformClock};

/// More than any cache.
const POOL_BYTES: usize = 512 << 20;

fn values(bytes: usize) -> Vec<u8> {
    (0..bytes / 4).flat_map(|i| ((i % 1013) as f32 * 0.37 - 100.0).to_le_bytes()).collect()
}

fn uniform(hz: f64, rows: usize) -> Clock {
    Clock::Uniform(UniformClock::new(0, hz, rows).expect("a clock of the bench"))
}

/// The same stamps, as a clock that has to be searched.
fn stamps(clock: &Clock) -> Clock {
    let stamps: Vec<i64> = (0..clock.rows()).map(|row| clock.t_ns(row)).collect();
    Clock::from_stamps(stamps).expect("they ascend")
}

fn kernel(offsets: Offsets, dim: usize, to: DType) -> FieldKernel {
    let field = Field { offsets, interp: Interp::Linear, max_gap_ns: None, dim, from: DType::Float32, to };
    FieldKernel::new(field).expect("a field of the bench")
}

fn calls(c: &mut Criterion) {
    let mut group = c.benchmark_group("cached");
    for (dim, steps) in [(14, 1), (14, 50), (256, 1), (256, 50)] {
        let clock = uniform(30.0, 100);
        let data = values(100 * dim * 4);
        let mut mask = vec![0; steps];
        let mut out = vec![0; steps * dim * 4];
        let steps_i64 = i64::try_from(steps).expect("few");
        let name = format!("{steps}x{dim}");
        group.bench_function(BenchmarkId::new("memcpy", &name), |b| {
            b.iter(|| {
                out.copy_from_slice(black_box(&data[dim * 4..][..steps * dim * 4]));
                mask.fill(0);
                black_box(&mut mask);
                black_box(&mut out);
            });
        });
        let rows = kernel(Offsets::Rows((0..steps_i64).collect()), dim, DType::Float32);
        let times = Offsets::Times((0..steps_i64).map(|k| k * 1_000_000_000 / 30).collect());
        let times = kernel(times, dim, DType::Float32);
        let stamped = stamps(&clock);
        let shifts = || (0..steps_i64).map(|k| k * 1_000_000_000 / 30 + 9_000_000);
        let between = kernel(Offsets::Times(shifts().collect()), dim, DType::Float32);
        let between_bf16 = kernel(Offsets::Times(shifts().collect()), dim, DType::BFloat16);
        let between_f16 = kernel(Offsets::Times(shifts().collect()), dim, DType::Float16);
        let rows_bf16 = kernel(Offsets::Rows((0..steps_i64).collect()), dim, DType::BFloat16);
        for (label, kernel, clock) in [
            ("times between, bfloat16", &between_bf16, &clock),
            ("times between, float16", &between_f16, &clock),
            ("rows, bfloat16", &rows_bf16, &clock),
            ("rows", &rows, &clock),
            ("times on the grid", &times, &clock),
            ("times on stamps", &times, &stamped),
            ("times between", &between, &clock),
            ("times between stamps", &between, &stamped),
        ] {
            out.resize(kernel.out_bytes(), 1);
            group.bench_function(BenchmarkId::new(label, &name), |b| {
                b.iter(|| {
                    let stream = StreamView { clock, data: black_box(&data) };
                    let anchor = Anchor { t_ns: black_box(clock.t_ns(1)), row: black_box(1) };
                    kernel.assemble(stream, anchor, &mut out, Some(&mut mask));
                    black_box(&mut mask);
                    black_box(&mut out);
                });
            });
        }
    }
    group.finish();
}

fn large(c: &mut Criterion) {
    let mut group = c.benchmark_group("500x256 f32 at 100 Hz to 250 at 50 Hz");
    let (rows, dim, steps) = (500, 256, 250);
    let clock = uniform(100.0, rows);
    let source = rows * dim * 4;
    let sources = values(POOL_BYTES / source * source);
    for (label, shift_ns, to) in [
        ("on the grid", 0, DType::Float32),
        ("between rows", 3_000_000, DType::Float32),
        ("between rows, bfloat16", 3_000_000, DType::BFloat16),
        ("between rows, float16", 3_000_000, DType::Float16),
    ] {
        let offsets = Offsets::Times((0..250).map(|k| k * 20_000_000 + shift_ns).collect());
        let kernel = kernel(offsets, dim, to);
        let mut outs = vec![1_u8; POOL_BYTES / kernel.out_bytes() * kernel.out_bytes()];
        let mut mask = vec![0; steps];
        let mut next = 0;
        let read = if shift_ns == 0 { source / 2 } else { source };
        group.throughput(Throughput::Bytes((read + kernel.out_bytes()) as u64));
        group.bench_function(label, |b| {
            b.iter(|| {
                next += 1;
                let data = &sources[next % (sources.len() / source) * source..][..source];
                let out = next % (outs.len() / kernel.out_bytes()) * kernel.out_bytes();
                let out = &mut outs[out..][..kernel.out_bytes()];
                let stream = StreamView { clock: &clock, data };
                kernel.assemble(stream, Anchor { t_ns: 0, row: 0 }, out, Some(&mut mask));
            });
        });
    }
    // Ones, so that every page is there before the clock runs.
    let mut outs = vec![1_u8; POOL_BYTES / source * source];
    let mut next = 0;
    group.throughput(Throughput::Bytes(2 * source as u64));
    group.bench_function("memcpy of the source", |b| {
        b.iter(|| {
            next += 1;
            let at = next % (sources.len() / source) * source;
            outs[at..][..source].copy_from_slice(&sources[at..][..source]);
        });
    });
    group.finish();
}

criterion_group!(benches, calls, large);
criterion_main!(benches);
