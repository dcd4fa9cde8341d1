//! Trains a small policy in Rust: from two states, the next second of actions.
//!
//!     cargo run --release -p robocache-examples --bin train -- DATASET [SECONDS]
//!
//! The policy is linear (normalised least mean squares). The last line is JSON, for the demo's table.

use std::time::{Duration, Instant};

use anyhow::Context;
use robocache::{Anchors, ColumnInfo, ColumnRole, DType, Loader, Window};

const HZ: f64 = 50.0;
const RATE: f32 = 0.2;

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let dataset = args.next().context("usage: train DATASET [SECONDS]")?;
    let seconds: f64 = args.next().map_or(Ok(5.0), |s| s.parse()).context("SECONDS must be a number")?;
    let (state, action) = features(&dataset)?;
    let mut loader = Loader::builder(&dataset)
        .batch_size(64)
        .anchors(Anchors::Every(HZ))
        .window(&state, Window::new(HZ, 2).start(-1.0 / HZ))
        .window(&action, Window::new(HZ, 50))
        .shuffle(true)
        .connect()?;
    println!("{} batches of 64 an epoch: {state} -> {action}, 50 steps at 50 Hz", loader.batches());

    let mut weights: Vec<Vec<f32>> = Vec::new();
    let (mut samples, mut waited, mut report) = (0, Duration::ZERO, Instant::now());
    let start = Instant::now();
    while start.elapsed().as_secs_f64() < seconds {
        let asked = Instant::now();
        let Some(batch) = loader.next_batch()? else { continue }; // the epoch is over; the next call begins another
        waited += asked.elapsed();
        let (x, y) = (batch.tensor(&state)?, batch.tensor(&action)?);
        let pads = batch.tensor(&format!("{action}_is_pad"))?.as_slice::<bool>()?;
        let (inputs, outputs) = (x.as_slice::<f32>()?, y.as_slice::<f32>()?);
        let (i, o) = (inputs.len() / batch.rows(), outputs.len() / batch.rows());
        weights.resize(i + 1, vec![0.0; o]); // the last row is the bias
        let (mut squares, mut steps) = (0.0, 0);
        for ((x, y), pads) in inputs.chunks(i).zip(outputs.chunks(o)).zip(pads.chunks(50)) {
            let norm = 1.0 + x.iter().map(|x| x * x).sum::<f32>();
            let mut error = y.to_vec();
            for (w, x) in weights.iter().zip(x.iter().chain([&1.0])) {
                error.iter_mut().zip(w).for_each(|(e, w)| *e -= w * x);
            }
            error.chunks_mut(o / 50).zip(pads).filter(|(_, pad)| **pad).for_each(|(e, _)| e.fill(0.0));
            for (w, x) in weights.iter_mut().zip(x.iter().chain([&1.0])) {
                w.iter_mut().zip(&error).for_each(|(w, e)| *w += RATE / norm * x * e);
            }
            squares += error.iter().map(|e| e * e).sum::<f32>();
            steps += pads.iter().filter(|pad| !**pad).count();
        }
        samples += batch.rows();
        if report.elapsed() > Duration::from_secs(1) || samples == batch.rows() {
            let error = squares / (steps * o / 50).max(1) as f32;
            println!("epoch {} batch {:4}: mean squared error {error:.5}", batch.epoch(), batch.index());
            report = Instant::now();
        }
    }
    let row = |c: &ColumnInfo| c.shape.iter().product::<u64>() * c.dtype.size_bytes() as u64;
    let bytes = samples as u64 * loader.columns().iter().map(row).sum::<u64>();
    let (seconds, waited) = (start.elapsed().as_secs_f64(), waited.as_secs_f64());
    println!(r#"{{"samples":{samples},"bytes":{bytes},"seconds":{seconds:.3},"waited_s":{waited:.4}}}"#);
    Ok(())
}

/// The floating streams to learn from and to learn, by their names.
fn features(dataset: &str) -> anyhow::Result<(String, String)> {
    let all = Loader::builder(dataset).batch_size(1).slots(2).anchors(Anchors::Episodes).connect()?;
    let floats = all.columns().iter().filter(|c| c.role == ColumnRole::Data && c.dtype == DType::Float32);
    let mut names: Vec<String> = floats.map(|c| c.name.clone()).collect();
    anyhow::ensure!(names.len() > 1, "two floating streams are needed, {dataset} has {names:?}");
    let find = |all: &[String], parts: &[&str]| all.iter().position(|n| parts.iter().any(|p| n.contains(p)));
    let action = names.remove(find(&names, &["action", "command", "cmd"]).unwrap_or(names.len() - 1));
    let state = names.swap_remove(find(&names, &["state", "joint", "pose"]).unwrap_or(0));
    Ok((state, action))
}
