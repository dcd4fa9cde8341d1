//! What a window asks for, as offsets from the anchor: times in ns, or frames.
//!
//! Owns the checks of a client's numbers, and the one rounding between its seconds and our integers.

use robocache_wire::spec::{OffsetsSpec, WindowSpec};

use crate::plan::{Limits, PlanError};

/// The offsets of a window in ns, in the order given.
pub(crate) fn of_window(key: &str, window: &WindowSpec, limits: Limits) -> Result<Box<[i64]>, PlanError> {
    let bad = |what, wanted, found| PlanError::Window { stream: key.to_owned(), what, wanted, found };
    let too_many = |steps| PlanError::TooManySteps { stream: key.to_owned(), steps, limit: limits.steps };
    if let Some(gap) = window.max_gap
        && !(gap > 0.0 && gap.is_finite())
    {
        return Err(bad("max_gap", "a positive number of seconds", gap.to_string()));
    }
    let offsets: Box<[i64]> = match &window.offsets {
        OffsetsSpec::Grid { hz, steps, start } => {
            if *steps == 0 {
                return Err(bad("steps", "at least 1", "0".to_owned()));
            }
            if *steps > limits.steps {
                return Err(too_many(*steps));
            }
            if !(hz.is_finite() && *hz > 0.0) {
                return Err(bad("hz", "a positive number", hz.to_string()));
            }
            #[expect(clippy::cast_precision_loss, reason = "steps are far below 2^53")]
            let offset = |k: u64| seconds_to_ns(start + k as f64 / hz);
            (0..*steps).map(offset).collect::<Option<_>>().ok_or_else(|| {
                bad(
                    "start and hz",
                    "offsets within 292 years",
                    format!("start {start} s, {steps} steps at {hz} Hz"),
                )
            })?
        }
        OffsetsSpec::At(at) => {
            if at.is_empty() {
                return Err(bad("at", "at least one offset", "none".to_owned()));
            }
            if at.len() as u64 > limits.steps {
                return Err(too_many(at.len() as u64));
            }
            at.iter()
                .map(|&seconds| {
                    seconds_to_ns(seconds)
                        .ok_or_else(|| bad("at", "finite seconds within 292 years", seconds.to_string()))
                })
                .collect::<Result<_, _>>()?
        }
    };
    Ok(offsets)
}

/// LeRobot's `delta_timestamps` as frames: round(seconds * fps), refused where that is off the grid of frames.
pub(crate) fn of_deltas(
    key: &str,
    deltas: &[f64],
    fps: f64,
    limits: Limits,
) -> Result<Box<[i64]>, PlanError> {
    let bad =
        |wanted, found| PlanError::Window { stream: key.to_owned(), what: "delta_timestamps", wanted, found };
    if deltas.is_empty() {
        return Err(bad("at least one offset", "none".to_owned()));
    }
    if deltas.len() as u64 > limits.steps {
        let steps = deltas.len() as u64;
        return Err(PlanError::TooManySteps { stream: key.to_owned(), steps, limit: limits.steps });
    }
    let frame = |&seconds: &f64| {
        if !(seconds.is_finite() && (seconds * fps).abs() < 9e15) {
            return Err(bad("finite seconds", seconds.to_string()));
        }
        let frames = (seconds * fps).round_ties_even();
        // LeRobot's own tolerance (tolerance_s) and test, check_delta_timestamps.
        if (frames / fps - seconds).abs() > 1e-4 {
            return Err(PlanError::OffGrid { stream: key.to_owned(), seconds, fps });
        }
        #[expect(clippy::cast_possible_truncation, reason = "whole and below 2^53")]
        Ok(frames as i64)
    };
    deltas.iter().map(frame).collect()
}

/// Seconds to the nearest nanosecond; none for what 64 bits cannot hold.
fn seconds_to_ns(seconds: f64) -> Option<i64> {
    let ns = (seconds * 1e9).round();
    #[expect(clippy::cast_possible_truncation, reason = "in range and whole")]
    (ns.is_finite() && ns.abs() < 9.2e18).then_some(ns as i64)
}
