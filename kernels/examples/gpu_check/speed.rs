//! Times of the kernels, beside a thread for each element and the device's copy of as many bytes.
//!
//! Every time is the median of graph replays; a graph holds several launches over buffers that together are more
//! than the L2 cache, so that inputs come from memory.

use anyhow::Result;
use robocache_kernels::{
    Anchor, AssemblePlan, Column, DevicePtr, DeviceStream, Field, FieldKernel, FusePlan, FuseStream,
    FuseTargets, Offsets,
};
use robocache_types::{Clock, DType, Interp, UniformClock};

use crate::gpu::{Buffer, Gpu};
use crate::random::Random;

/// Several times any L2 cache.
const POOL_BYTES: usize = 512 << 20;

pub(crate) fn measure(gpu: &Gpu, random: &mut Random) -> Result<()> {
    println!("\n{:<64} {:>9} {:>9} {:>9} {:>9}", "", "ours us", "naive us", "copy us", "GB/s");
    for [batch, rows, dim, steps] in
        [[32, 500, 256, 250], [512, 500, 256, 250], [64, 1000, 512, 512], [64, 4096, 32, 1024]]
    {
        resample(gpu, random, [batch, rows, dim, steps])?;
    }
    for batch in [4, 256] {
        fuse(gpu, random, batch)?;
    }
    for (uniform, on_grid) in [(true, false), (false, false), (true, true)] {
        assemble(gpu, random, uniform, on_grid)?;
    }
    Ok(())
}

fn row(name: &str, bytes: usize, ours: f64, naive: Option<f64>, copy: Option<f64>) {
    let shown = |time: Option<f64>| time.map_or_else(String::new, |time| format!("{time:.2}"));
    println!(
        "{name:<64} {ours:>9.2} {:>9} {:>9} {:>9.0}",
        shown(naive),
        shown(copy),
        bytes as f64 / ours / 1e3
    );
}

/// `[batch, n]` float32 times, `per_second` of them a second, with jitter.
fn times(random: &mut Random, batch: usize, n: usize, per_second: f64, jitter: f64) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..batch {
        for k in 0..n {
            bytes.extend((((k as f64 + jitter * random.unit()) / per_second) as f32).to_le_bytes());
        }
    }
    bytes
}

fn resample(gpu: &Gpu, random: &mut Random, shape: [usize; 4]) -> Result<()> {
    let [batch, rows, dim, steps] = shape;
    let (src_bytes, out_bytes) = (batch * rows * dim * 2, batch * steps * dim * 2);
    let n = (POOL_BYTES / (src_bytes + out_bytes)).clamp(4, 64);
    // Values are the same in every buffer: what counts is where they lie.
    let values = random.values(DType::BFloat16, batch * rows * dim, false);
    let stamps = times(random, batch, rows, rows as f64 / 5.0, 0.3);
    let targets = times(random, batch, steps, steps as f64 / 5.0, 0.3);
    let sets: Vec<[Buffer; 4]> = (0..n)
        .map(|_| {
            Ok([
                gpu.buffer(out_bytes, 0xa5)?,
                gpu.upload(&values)?,
                gpu.upload(&stamps)?,
                gpu.upload(&targets)?,
            ])
        })
        .collect::<Result<_>>()?;
    let plans: Vec<FusePlan> = sets
        .iter()
        .map(|[out, src, times, targets]| {
            let stream = FuseStream { src: src.at(0), times: times.at(0), rows, dim };
            let (out, targets) = (out.at(0), targets.at(0));
            let (values, times) = (DType::BFloat16, DType::Float32);
            let onto = FuseTargets { out, targets, batch, steps, values, times };
            Ok(FusePlan::new(&[stream], onto, gpu.multiprocessors())?)
        })
        .collect::<Result<_>>()?;
    let ours = gpu.time(n, |i| gpu.fuse(&plans[i]))?;
    let counts = [u32::try_from(batch)?, u32::try_from(rows)?, u32::try_from(dim)?, u32::try_from(steps)?];
    let naive = gpu.time(n, |i| gpu.naive(counts, sets[i].each_ref().map(|buffer| buffer.at(0))))?;
    // The bytes that must move: every row of the source at most once, every output once.
    let read = batch * rows.min(2 * steps) * dim * 2;
    let bytes = read + out_bytes;
    let pool = gpu.buffer(2 * n * (bytes / 2), 1)?;
    let half = bytes / 2;
    let copy = gpu.time(n, |i| gpu.copy(pool.at(2 * i * half), pool.at((2 * i + 1) * half), half))?;
    row(&format!("resample {batch}x{rows}x{dim} -> {steps}, bfloat16"), bytes, ours, Some(naive), Some(copy));
    Ok(())
}

/// Output, streams of values and times, targets.
type Set = (Buffer, Vec<(Buffer, Buffer)>, Buffer);

fn fuse(gpu: &Gpu, random: &mut Random, batch: usize) -> Result<()> {
    let (shapes, steps) = ([[30, 512], [100, 64], [200, 12]], 50);
    let width: usize = shapes.iter().map(|shape| shape[1]).sum();
    for dtype in [DType::BFloat16, DType::Float32] {
        let size = dtype.size_bytes();
        let bytes: usize =
            batch * size * (shapes.iter().map(|[rows, dim]| rows * dim).sum::<usize>() + steps * width);
        let n = (POOL_BYTES / bytes).clamp(4, 64);
        let mut sets: Vec<Set> = Vec::new();
        for _ in 0..n {
            let mut streams = Vec::new();
            for [rows, dim] in shapes {
                let stamps = times(random, batch, rows, rows as f64, 0.3);
                streams.push((
                    gpu.upload(&random.values(dtype, batch * rows * dim, false))?,
                    gpu.upload(&stamps)?,
                ));
            }
            let targets = times(random, batch, steps, steps as f64, 0.3);
            sets.push((gpu.buffer(batch * steps * width * size, 0xa5)?, streams, gpu.upload(&targets)?));
        }
        let plan = |(out, streams, targets): &Set, which: &[usize]| {
            let described: Vec<FuseStream> = which
                .iter()
                .map(|&k| {
                    let [rows, dim] = shapes[k];
                    FuseStream { src: streams[k].0.at(0), times: streams[k].1.at(0), rows, dim }
                })
                .collect();
            let (out, targets) = (out.at(0), targets.at(0));
            let onto = FuseTargets { out, targets, batch, steps, values: dtype, times: DType::Float32 };
            FusePlan::new(&described, onto, gpu.multiprocessors())
        };
        let whole = sets.iter().map(|set| Ok(plan(set, &[0, 1, 2])?)).collect::<Result<Vec<_>>>()?;
        let apart = sets
            .iter()
            .map(|set| Ok([plan(set, &[0])?, plan(set, &[1])?, plan(set, &[2])?]))
            .collect::<Result<Vec<_>>>()?;
        let ours = gpu.time(n, |i| gpu.fuse(&whole[i]))?;
        let three = gpu.time(n, |i| apart[i].iter().try_for_each(|plan| gpu.fuse(plan)))?;
        row(
            &format!("fuse 30x512, 100x64, 200x12 -> {steps}, batch {batch}, {dtype}"),
            bytes,
            ours,
            None,
            None,
        );
        println!("{:<64} {three:>9.2}", "  the same in three launches");
    }
    Ok(())
}

/// 500 x 256 float32 at 100 Hz, resident, to 250 at 50 Hz in bfloat16, 32 samples, through episodes' descriptors.
fn assemble(gpu: &Gpu, random: &mut Random, uniform: bool, on_grid: bool) -> Result<()> {
    let (batch, rows, dim, steps) = (32, 500, 256, 250);
    let shift_ns = if on_grid { 0 } else { 3_000_000 };
    let offsets = Offsets::Times((0..steps).map(|k| k * 20_000_000 + shift_ns).collect());
    let (interp, max_gap_ns, from, to) = (Interp::Linear, None, DType::Float32, DType::BFloat16);
    let kernel = FieldKernel::new(Field { offsets, interp, max_gap_ns, dim, from, to })?;
    let grid = UniformClock::new(0, 100.0, rows)?;
    let stamps: Vec<i64> = (0..rows as i64).map(|row| grid.t_ns(row)).collect();
    let clock = if uniform { Clock::Uniform(grid) } else { Clock::from_stamps(stamps.clone())? };
    let stamps_on_gpu = gpu.upload(&stamps.iter().flat_map(|t| t.to_le_bytes()).collect::<Vec<_>>())?;
    let Offsets::Times(offsets) = &kernel.field().offsets else { anyhow::bail!("times were given") };
    let offsets = gpu.upload(&offsets.iter().flat_map(|t| t.to_le_bytes()).collect::<Vec<_>>())?;
    let values = random.values(from, rows * dim, false);
    let mut launches = Vec::new();
    for _ in 0..16 {
        let sources = (0..batch).map(|_| gpu.upload(&values)).collect::<Result<Vec<_>>>()?;
        let (out, mask) =
            (gpu.buffer(batch * kernel.out_bytes(), 0xa5)?, gpu.buffer(batch * kernel.steps(), 0xa5)?);
        let column =
            Column { kernel: &kernel, offsets: offsets.at(0), out: out.at(0), mask: Some(mask.at(0)) };
        let plan = AssemblePlan::new(&[column], batch, gpu.multiprocessors())?;
        let (mut described, mut anchors) = (Vec::new(), Vec::new());
        for data in &sources {
            let stamps: Option<DevicePtr> = (!uniform).then(|| stamps_on_gpu.at(0));
            DeviceStream { data: data.at(0), clock: &clock, stamps }.encode(&mut described)?;
            Anchor { t_ns: 0, row: 0 }.encode(&mut anchors);
        }
        let arguments = [gpu.upload(plan.fields())?, gpu.upload(&described)?, gpu.upload(&anchors)?];
        launches.push((plan, arguments, sources, out, mask));
    }
    let ours = gpu.time(launches.len(), |i| {
        let (plan, [fields, sources, anchors], ..) = &launches[i];
        gpu.assemble(plan, fields, sources, anchors)
    })?;
    let read = if on_grid { kernel.steps() } else { rows };
    let bytes = batch * (read * dim * 4 + kernel.out_bytes());
    let clock = if uniform { "uniform clock" } else { "stamps" };
    let place = if on_grid { "on the grid" } else { "between rows" };
    row(&format!("assemble {batch}x500x256 f32 -> 250 bfloat16, {clock}, {place}"), bytes, ours, None, None);
    Ok(())
}
