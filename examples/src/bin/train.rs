//! Reads one epoch of a LeRobot dataset from a running `robocached`, as a trainer in Rust would.
//!
//!     cargo run --release --example-bin train -- PATH [--socket PATH] [--batches N]
//!
//! Prints what arrives and how fast. The daemon is found as every client finds it: `$ROBOCACHE_SOCKET`, else the
//! default path, else one is started for this process.

use std::time::Instant;

use anyhow::Context;
use robocache::{ColumnRole, DType, Loader};

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let dataset = args.next().context("usage: train PATH [BATCHES]")?;
    let limit: u64 = args.next().map_or(Ok(u64::MAX), |n| n.parse()).context("BATCHES is a number")?;

    let mut loader = Loader::builder(&dataset)
        .batch_size(64)
        .delta_timestamps("action", (0..50).map(|k| f64::from(k) / 30.0))
        .shuffle(true)
        .seed(7)
        .connect()?;
    for column in loader.columns() {
        println!("{:28} {:9} [B{}]", column.name, column.dtype, column.shape.iter().map(|n| format!(", {n}")).collect::<String>());
    }
    println!("{} batches an epoch", loader.batches());

    let (mut samples, mut bytes, mut sum, start) = (0, 0, 0.0, Instant::now());
    for (count, batch) in (1..).zip(&mut loader) {
        let batch = batch?;
        samples += batch.rows();
        for column in batch.columns() {
            let tensor = batch.raw(&column.name)?;
            bytes += tensor.bytes().len();
            if column.role == ColumnRole::Data && column.dtype == DType::Float32 {
                sum += f64::from(tensor.as_slice::<f32>()?[0]);
            }
        }
        if count == limit {
            break;
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    println!("{samples} samples in {seconds:.3} s: {:.0} samples/s, {:.2} GB/s (checksum {sum:.6})", samples as f64 / seconds, bytes as f64 / seconds / 1e9);
    Ok(())
}
