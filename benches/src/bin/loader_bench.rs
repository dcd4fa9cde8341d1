//! A client of a running daemon, timed: ready batches, attaching, throughput. Prints one JSON object.
//!
//!     ROBOCACHE_SOCKET=... loader_bench ready DATASET [--workload lerobot]
//!
//! `memcpy` is the machine's own figure to compare with.

use std::hint::black_box;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::{Parser, Subcommand};
use robocache::Loader;
use robocache_benches::{Workload, figures, ns};
use serde_json::{Value, json};

#[derive(Debug, Parser)]
struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Args)]
struct Of {
    dataset: String,
    #[arg(long, value_enum, default_value = "lerobot")]
    workload: Workload,
    #[arg(long, default_value_t = 4)]
    slots: u32,
    /// Repetitions, after one that is not counted
    #[arg(long, default_value_t = 5)]
    reps: usize,
    /// Length of one repetition of `throughput`
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
}

#[derive(Debug, Subcommand)]
enum What {
    /// `next_batch` and the drop of the batch, each with the whole ring full, in nanoseconds
    Ready(Of),
    /// From `connect` to the first batch in hand, in milliseconds
    Attach(Of),
    /// A consumer that does nothing but `next_batch`
    Throughput(Of),
    /// Copying memory, bytes read + written, in GB/s
    Memcpy {
        #[arg(long, default_value_t = 2)]
        threads: usize,
        #[arg(long, default_value_t = 5)]
        reps: usize,
    },
}

fn main() -> anyhow::Result<()> {
    let result = match Args::parse().what {
        What::Ready(of) => ready(&of)?,
        What::Attach(of) => attach(&of)?,
        What::Throughput(of) => throughput(&of)?,
        What::Memcpy { threads, reps } => memcpy(threads, reps)?,
    };
    println!("{result}");
    Ok(())
}

/// 500 ready batches a repetition.
fn ready(of: &Of) -> anyhow::Result<Value> {
    let mut loader = of.workload.builder(&of.dataset).slots(of.slots).connect()?;
    let (mut next_ns, mut both_ns, mut medians) = (Vec::new(), Vec::new(), Vec::new());
    for rep in 0..=of.reps {
        let mut this = Vec::with_capacity(500);
        while this.len() < 500 {
            wait_until_full(&loader, of.slots)?;
            let start = Instant::now();
            let batch = loader.next_batch()?;
            let next = ns(start);
            let Some(batch) = batch else { continue };
            drop(black_box(batch));
            let both = ns(start);
            if rep > 0 {
                next_ns.push(next);
                both_ns.push(both);
            }
            this.push(both);
        }
        if rep > 0 {
            medians.push(figures(this)["median"].clone());
        }
    }
    Ok(
        json!({ "next_ns": figures(next_ns), "next_and_drop_ns": figures(both_ns), "next_and_drop_ns_medians": medians }),
    )
}

/// Until every slot is ready, or as many as the epoch has left.
fn wait_until_full(loader: &Loader, slots: u32) -> anyhow::Result<()> {
    let limit = Instant::now();
    while u64::from(loader.occupancy().ready) < u64::from(slots).min(loader.batches()) {
        ensure!(limit.elapsed() < Duration::from_secs(30), "the ring did not fill: {:?}", loader.occupancy());
        std::thread::sleep(Duration::from_micros(200));
    }
    Ok(())
}

fn attach(of: &Of) -> anyhow::Result<Value> {
    let mut ms = Vec::new();
    for rep in 0..=of.reps {
        let start = Instant::now();
        let mut loader = of.workload.builder(&of.dataset).slots(of.slots).connect()?;
        let batch = loader.next_batch()?.context("the first epoch is empty")?;
        let took = ns(start) / 1e6;
        black_box(batch.rows());
        if rep > 0 {
            ms.push(took);
        }
    }
    Ok(json!({ "attach_to_first_batch_ms": figures(ms) }))
}

#[expect(clippy::cast_precision_loss, reason = "rates for people")]
fn throughput(of: &Of) -> anyhow::Result<Value> {
    let mut loader = of.workload.builder(&of.dataset).slots(of.slots).connect()?;
    let batch_bytes: u64 = loader
        .columns()
        .iter()
        .map(|c| c.shape.iter().product::<u64>() * c.dtype.size_bytes() as u64)
        .sum::<u64>()
        * u64::from(loader.info().batch_size);
    let (mut rates, mut assemble_us) = (Vec::new(), Vec::new());
    while loader.next_batch()?.is_some() {} // one epoch: everything is decoded
    for rep in 0..=of.reps {
        let (mut samples, mut batches, mut assemble) = (0, 0, 0);
        let start = Instant::now();
        while start.elapsed().as_secs_f64() < of.seconds {
            let Some(batch) = loader.next_batch()? else { continue };
            samples += batch.rows();
            batches += 1;
            assemble += batch.assemble_ns();
            black_box(batch.rows());
        }
        if rep > 0 {
            rates.push(samples as f64 / start.elapsed().as_secs_f64());
            assemble_us.push(assemble as f64 / 1e3 / f64::from(batches));
        }
    }
    let samples_per_s = figures(rates);
    Ok(
        json!({ "samples_per_s": samples_per_s, "batch_bytes": batch_bytes, "assemble_us": figures(assemble_us) }),
    )
}

/// Each thread copies 128 MiB, far more than a cache holds, all at once.
#[expect(clippy::cast_precision_loss, reason = "rates for people")]
fn memcpy(threads: usize, reps: usize) -> anyhow::Result<Value> {
    const BYTES: usize = 128 << 20;
    const ROUNDS: usize = 8;
    ensure!(threads > 0, "--threads must be at least 1");
    let barrier = Barrier::new(threads);
    let copy = || -> Vec<f64> {
        let (from, mut to) = (vec![1_u8; BYTES], vec![2_u8; BYTES]);
        (0..=reps)
            .map(|_| {
                barrier.wait();
                let start = Instant::now();
                for _ in 0..ROUNDS {
                    to.copy_from_slice(black_box(&from));
                    black_box(&mut to);
                }
                barrier.wait();
                (threads * ROUNDS * 2 * BYTES) as f64 / ns(start)
            })
            .skip(1)
            .collect()
    };
    let rates = std::thread::scope(|scope| {
        let spawned: Result<Vec<_>, _> = (0..threads)
            .map(|n| std::thread::Builder::new().name(format!("copy-{n}")).spawn_scoped(scope, copy))
            .collect();
        let joined = spawned?
            .into_iter()
            .map(|t| t.join().map_err(|_panic| anyhow::anyhow!("a copying thread panicked")));
        joined.collect::<anyhow::Result<Vec<_>>>()
    })?;
    Ok(
        json!({ "gb_per_s": figures(rates.into_iter().next().context("no thread copied")?), "threads": threads }),
    )
}
