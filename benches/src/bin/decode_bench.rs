//! Reads every numeric stream of every episode of a dataset with some threads, page cache warm, and prints how long it
//! took as one JSON object.
//!
//!     decode_bench DATASET [--threads 1] [--reps 5]
//!
//! Work is cut as the daemon's store cuts it: units of up to 32 MiB whole, others an episode at a time. What was read is
//! kept until the next repetition has read it again, as the store keeps it and as `baselines/pyarrow_read.py` does.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::Context;
use clap::Parser;
use robocache_benches::{figures, ns};
use robocache_formats::{Dataset, OpenOptions, Stream, StreamKind};
use serde_json::json;

#[derive(Debug, Parser)]
struct Args {
    dataset: PathBuf,
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Repetitions, after one that is not counted
    #[arg(long, default_value_t = 5)]
    reps: usize,
}

const WHOLE_UNIT_BYTES: usize = 32 << 20;

fn main() -> anyhow::Result<()> {
    robocached::allocator::keep_large_buffers(); // as the daemon does
    let args = Args::parse();
    let (mut open_ms, mut read_ms, mut bytes, mut kept) = (Vec::new(), Vec::new(), 0, Vec::new());
    for rep in 0..=args.reps {
        let start = Instant::now();
        let dataset = Dataset::open(&args.dataset, &OpenOptions::default())?;
        let opened = ns(start) / 1e6;
        let (jobs, streams) = (jobs(&dataset), numeric(&dataset));
        let start = Instant::now();
        let streams = read(&dataset, &jobs, &streams, args.threads)?;
        let read = ns(start) / 1e6;
        bytes =
            streams.iter().map(|s| (s.values.rows * s.values.dim * s.values.dtype.size_bytes()) as u64).sum();
        drop(std::mem::replace(&mut kept, streams));
        if rep > 0 {
            open_ms.push(opened);
            read_ms.push(read);
        }
    }
    let (open_ms, read_ms) = (figures(open_ms), figures(read_ms));
    println!(
        "{}",
        json!({ "open_ms": open_ms, "read_ms": read_ms, "bytes": bytes, "threads": args.threads })
    );
    Ok(())
}

fn numeric(dataset: &Dataset) -> Vec<usize> {
    let streams = dataset.streams().iter().enumerate();
    streams.filter(|(_, stream)| stream.kind == StreamKind::Numeric).map(|(position, _)| position).collect()
}

/// What is read together, as positions of episodes.
fn jobs(dataset: &Dataset) -> Vec<Vec<usize>> {
    let row: usize = dataset.streams().iter().map(|stream| stream.dim() * stream.dtype.size_bytes()).sum();
    let frames = |episode: &usize| dataset.episodes()[*episode].frames.unwrap_or(0);
    let mut jobs = Vec::new();
    for unit in dataset.units() {
        if unit.iter().map(frames).sum::<usize>() * row <= WHOLE_UNIT_BYTES {
            jobs.push(unit);
        } else {
            jobs.extend(unit.into_iter().map(|episode| vec![episode]));
        }
    }
    jobs
}

/// Returns all that was decoded.
fn read(
    dataset: &Dataset,
    jobs: &[Vec<usize>],
    streams: &[usize],
    threads: usize,
) -> anyhow::Result<Vec<Stream>> {
    let next = AtomicUsize::new(0);
    let work = || -> anyhow::Result<Vec<Stream>> {
        let mut read = Vec::new();
        while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
            let episodes = dataset.read(job, streams).with_context(|| format!("reading episodes {job:?}"))?;
            read.extend(episodes.into_iter().flatten());
        }
        Ok(read)
    };
    std::thread::scope(|scope| {
        let readers: Result<Vec<_>, _> = (0..threads.max(1))
            .map(|n| std::thread::Builder::new().name(format!("read-{n}")).spawn_scoped(scope, work))
            .collect();
        let mut all = Vec::new();
        for reader in readers? {
            all.extend(reader.join().map_err(|_panic| anyhow::anyhow!("a reader panicked"))??);
        }
        Ok(all)
    })
}
