//! What the benchmark programs share: the workloads, and figures of repeated measurements.
//!
//! Each program prints one JSON object; `benches/run.py` starts them beside their rivals and keeps what they print.

use std::time::Instant;

use robocache::{Anchors, Loader, LoaderBuilder, Window};
use serde_json::{Value, json};

/// What a loader is asked for. `benches/baselines` asks rivals for the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Workload {
    /// LeRobot's: batch 64, `observation.state` x 2, `action` x 50, `observation.tactile` x 2, all index columns.
    Lerobot,
    /// The original RoboCache's: batch 32, whole episodes of `observation.tactile` at 100 Hz to 250 steps at 50 Hz. Every
    /// target is a frame.
    Resample,
    /// The same 3.3 ms later, so that every target lies between two frames.
    ResampleOffGrid,
}

impl Workload {
    /// A loader's builder for it.
    pub fn builder(self, dataset: &str) -> LoaderBuilder {
        let loader = Loader::builder(dataset).shuffle(true).seed(0).no_embedded();
        let start = match self {
            Self::Lerobot => {
                let before = [-1.0 / 50.0, 0.0];
                return loader
                    .batch_size(64)
                    .delta_timestamps("action", (0..50).map(|k| f64::from(k) / 50.0))
                    .delta_timestamps("observation.state", before)
                    .delta_timestamps("observation.tactile", before);
            }
            Self::Resample => 0.0,
            Self::ResampleOffGrid => 0.0033,
        };
        let window = Window::new(50.0, 250).start(start);
        loader.batch_size(32).anchors(Anchors::Episodes).window("observation.tactile", window)
    }
}

/// Sorted measurements as JSON: median, 99th percentile, extremes, and how many there were.
pub fn figures(mut values: Vec<f64>) -> Value {
    values.sort_by(f64::total_cmp);
    let at = |share: f64| {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "a rank"
        )]
        let rank = (share * values.len().saturating_sub(1) as f64).round() as usize;
        values.get(rank).copied()
    };
    json!({ "median": at(0.5), "p99": at(0.99), "min": at(0.0), "max": at(1.0), "n": values.len() })
}

/// Nanoseconds since `start`.
pub fn ns(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e9
}
