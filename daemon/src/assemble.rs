//! Builds one batch in a slot: every column of every sample, in place.
//!
//! Pure: bytes in, bytes out. Everything was checked when the plan was made and the columns were read; what is
//! written is every byte of the first `samples.len()` rows of every column and mask, and nothing else.

use std::sync::Arc;

use robocache_formats::Dataset;
use robocache_kernels::{Anchor, StreamView};
use robocache_types::Clock;
use robocache_wire::spec::Place as ColumnPlace;

use crate::anchors::Place;
use crate::plan::{Column, Index, Plan, Source};
use crate::store::Columns;

/// One sample of a batch, its episode's columns in memory.
#[derive(Debug, Clone)]
pub struct Sample {
    /// Number of its anchor.
    pub anchor: u64,
    pub place: Place,
    pub columns: Arc<Columns>,
}

/// Fills the columns of `slot` with these samples: those that lie on the host.
pub fn assemble(plan: &Plan, dataset: &Dataset, samples: &[Sample], slot: &mut [u8]) {
    if plan.columns.iter().all(|column| column.place != ColumnPlace::Host) {
        return;
    }
    for (row, sample) in samples.iter().enumerate() {
        let clock = plan.frame_clock.map(|nth| &sample.columns.stream(plan.streams[nth]).clock);
        let anchor = plan.anchors.anchor(sample.place, clock);
        for column in plan.columns.iter().filter(|column| column.place == ColumnPlace::Host) {
            fill(plan, dataset, column, sample, anchor, clock, row, slot);
        }
    }
}

#[expect(clippy::too_many_arguments, reason = "one sample's facts, computed once for all its columns")]
fn fill(
    plan: &Plan,
    dataset: &Dataset,
    column: &Column,
    sample: &Sample,
    anchor: Anchor,
    clock: Option<&Clock>,
    row: usize,
    slot: &mut [u8],
) {
    let start = column.offset + row * column.bytes;
    match &column.source {
        Source::Stream { nth, kernel } => {
            let stream = sample.columns.stream(plan.streams[*nth]);
            let view = StreamView { clock: &stream.clock, data: stream.values.buffer.as_slice() };
            match column.mask {
                None => kernel.assemble(view, anchor, &mut slot[start..start + column.bytes], None),
                Some((offset, bytes)) => {
                    // A mask lies behind its column.
                    let (columns, masks) = slot.split_at_mut(offset);
                    let mask = &mut masks[row * bytes..(row + 1) * bytes];
                    kernel.assemble(view, anchor, &mut columns[start..start + column.bytes], Some(mask));
                }
            }
        }
        Source::TaskText { nth, tasks } => {
            let values = &sample.columns.stream(plan.streams[*nth]).values;
            let at = usize::try_from(anchor.row).unwrap_or(0) * size_of::<i64>();
            let bytes: [u8; 8] = values.buffer.as_slice()[at..at + 8].try_into().expect("eight bytes");
            // Columns hold the host's own byte order, and wire refuses to be built for another than little-endian.
            let task = usize::try_from(i64::from_le_bytes(bytes)).ok().filter(|task| task < tasks);
            let code = task.and_then(|task| i32::try_from(task).ok()).unwrap_or(-1);
            slot[start..start + 4].copy_from_slice(&code.to_le_bytes());
        }
        Source::Index(index) => {
            let value = index_value(plan, dataset, *index, sample, anchor, clock);
            slot[start..start + column.bytes].copy_from_slice(&value[..column.bytes]);
        }
    }
}

/// A computed index column's value, in the first bytes.
pub fn index_value(
    plan: &Plan,
    dataset: &Dataset,
    index: Index,
    sample: &Sample,
    anchor: Anchor,
    clock: Option<&Clock>,
) -> [u8; 8] {
    let unsigned = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    let value = match index {
        Index::Anchor => unsigned(sample.anchor),
        Index::Episode => dataset.episodes()[sample.place.episode as usize].index,
        Index::Frame => unsigned(sample.place.nth),
        Index::Task => 0,
        Index::TimeNs => anchor.t_ns,
        Index::Timestamp => {
            let since = i128::from(anchor.t_ns) - i128::from(plan.anchors.origin_ns(sample.place, clock));
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_precision_loss,
                reason = "LeRobot's float32 seconds; t_ns is exact"
            )]
            let seconds = (since as f64 / 1e9) as f32;
            let [a, b, c, d] = seconds.to_le_bytes();
            return [a, b, c, d, 0, 0, 0, 0];
        }
    };
    value.to_le_bytes()
}
