//! What the GPU path does for a Rust client, timed. Prints one JSON object.
//!
//!     ROBOCACHE_SOCKET=... gpu_bench throughput DATASET [--workload resample-off-grid]
//!     gpu_bench hand-off [--batches 20000]
//!
//! `throughput` is a client of a running daemon that makes its stream wait for each batch and gives it back at once:
//! nothing reads the batches, so it is the daemon and the hand-over that are measured. `hand-off` needs no daemon: see
//! [`hand_off`].

mod hand_off;

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, ensure};
use clap::{Parser, Subcommand};
use cudarc::driver::{CudaContext, CudaStream};
use robocache::gpu::{GpuKind, Stream};
use robocache::{DType, Loader};
use robocache_benches::{Workload, figures};
use serde_json::{Value, json};

use crate::hand_off::{HandOff, Take};

#[derive(Debug, Parser)]
struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Batches of bfloat16 on a GPU, to a client that only waits on them
    Throughput(Of),
    /// From a slot's publication to the batch being usable on the client's stream, in nanoseconds
    HandOff(HandOff),
    /// The client of `hand-off`, in a process of its own
    #[command(hide = true)]
    Take(Take),
}

#[derive(Debug, clap::Args)]
struct Of {
    dataset: String,
    #[arg(long, value_enum, default_value = "resample-off-grid")]
    workload: Workload,
    #[arg(long, default_value = "cuda:0")]
    device: String,
    #[arg(long, default_value_t = 4)]
    slots: u32,
    /// Repetitions, after one that is not counted
    #[arg(long, default_value_t = 5)]
    reps: usize,
    /// Length of one repetition
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
}

fn main() -> anyhow::Result<()> {
    let result = match Args::parse().what {
        What::Throughput(of) => throughput(&of)?,
        What::HandOff(of) => hand_off::hand_off(&of)?,
        What::Take(of) => hand_off::take(&of)?,
    };
    println!("{result}");
    Ok(())
}

/// The legacy default stream, torch's own, to wait for. A simulated device has none.
struct Waiting(Option<Arc<CudaStream>>);

impl Waiting {
    fn on(loader: &Loader) -> anyhow::Result<Self> {
        let gpu = loader.gpu().context("the loader's batches are in host memory")?;
        Ok(Self(match gpu.kind {
            GpuKind::Sim => None,
            GpuKind::Cuda => Some(CudaContext::new(gpu.ordinal as usize)?.default_stream()),
        }))
    }

    /// Until all that was enqueued is done.
    fn wait(&self) -> anyhow::Result<()> {
        Ok(self.0.as_ref().map_or(Ok(()), |stream| stream.synchronize())?)
    }
}

#[expect(clippy::cast_precision_loss, reason = "rates for people")]
fn throughput(of: &Of) -> anyhow::Result<Value> {
    let builder = of.workload.builder(&of.dataset).dtype(DType::BFloat16).device(&of.device).slots(of.slots);
    let mut loader = builder.connect()?;
    let waiting = Waiting::on(&loader)?;
    let column = &loader.columns().first().context("a batch has no columns")?;
    ensure!(column.dtype == DType::BFloat16, "the first column is of {}", column.dtype);
    let column = json!({ "name": column.name, "shape": column.shape, "dtype": column.dtype.to_string() });
    while loader.next_batch()?.is_some() {} // one epoch: everything is decoded, and where it will stay
    let mut rates = Vec::new();
    for rep in 0..=of.reps {
        let mut samples = 0;
        let start = Instant::now();
        while start.elapsed().as_secs_f64() < of.seconds {
            let Some(batch) = loader.next_batch()? else { continue };
            batch.use_on(Stream::LEGACY)?;
            samples += batch.rows();
        }
        waiting.wait()?;
        if rep > 0 {
            rates.push(samples as f64 / start.elapsed().as_secs_f64());
        }
    }
    let info = loader.info();
    Ok(json!({
        "samples_per_s": figures(rates),
        "batch_size": info.batch_size,
        "slots": info.slots,
        "column": column,
        "workload": format!("{:?}", of.workload),
    }))
}
