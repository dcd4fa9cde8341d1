//! What one launch is told: where every column of every sample is read and written, in the kernels' own layout.
//!
//! ```text
//!   descriptors of a batch:  fields | sources [columns][batch] | anchors [batch] | values of index columns [index][batch]
//! ```
//!
//! Columns computed from the anchor (`frame_index`, `t_ns`, ...) become streams of one row each, read from the end of
//! the descriptors themselves, so that one launch writes the whole batch. Built on the host, uploaded as one piece.

use std::ops::Range;
use std::sync::Arc;

use robocache_formats::Dataset;
use robocache_kernels::{
    Anchor, AssemblePlan, DevicePtr, DeviceStream, Field, FieldKernel, Offsets, PlanError,
};
use robocache_types::{Clock, DType, Interp, UniformClock};
use robocache_wire::spec::Place;

use crate::assemble::{Sample, index_value};
use crate::gpu::device::{Device, DeviceError, Memory, Output, Span, StreamId, descriptor_bytes};
use crate::plan::{Index, Plan, Source};

/// Bytes of one value of an index column among the descriptors.
const VALUE_BYTES: u64 = 8;

/// A loader's columns as launches write them. Made once.
#[derive(Debug)]
pub struct Recipe {
    plan: Arc<Plan>,
    columns: Vec<Target>,
    /// All offsets, one column's after another.
    offsets: Span,
    /// The streams that are read on the device, by their places in the dataset.
    pub positions: Vec<usize>,
    one_row: Clock,
    multiprocessors: u32,
}

#[derive(Debug)]
struct Target {
    /// Which of the plan's columns.
    column: usize,
    /// Which of the recipe's streams it reads, where it reads one.
    stream: Option<usize>,
    /// For a column computed from the anchor.
    index: Option<(Index, FieldKernel)>,
    offsets: Range<u64>,
}

/// Where a stream of an episode lies for the device; by default nowhere.
#[derive(Debug, Clone, Copy, Default)]
pub struct View {
    /// Where row 0 is, or would be if there were more than the rows that are read.
    pub data: DevicePtr,
    /// Where its clock has stamps.
    pub stamps: Option<DevicePtr>,
}

impl Recipe {
    /// Lays the columns out and uploads their offsets on `stream`, waiting for it.
    pub fn new(plan: &Arc<Plan>, device: &Arc<dyn Device>, stream: StreamId) -> Result<Self, DeviceError> {
        let (mut columns, mut bytes, mut positions) = (Vec::new(), Vec::new(), Vec::new());
        for (column, planned) in
            plan.columns.iter().enumerate().filter(|(_, column)| column.place == Place::Device)
        {
            let start = bytes.len() as u64;
            let mut push = |kernel: &FieldKernel| {
                let (Offsets::Rows(offsets) | Offsets::Times(offsets)) = &kernel.field().offsets;
                bytes.extend(offsets.iter().flat_map(|offset| offset.to_le_bytes()));
            };
            let (stream, index) = match &planned.source {
                Source::Stream { nth, kernel } => {
                    push(kernel);
                    let position = plan.streams[*nth];
                    let known = positions.iter().position(|&known| known == position);
                    let stream = known.unwrap_or(positions.len());
                    if known.is_none() {
                        positions.push(position);
                    }
                    (Some(stream), None)
                }
                Source::Index(index) => {
                    let kernel = index_kernel(*index);
                    push(&kernel);
                    (None, Some((*index, kernel)))
                }
                Source::TaskText { .. } => unreachable!("text codes lie on the host"),
            };
            columns.push(Target { column, stream, index, offsets: start..bytes.len() as u64 });
        }
        let length = bytes.len() as u64;
        let mut staging = device.pin(length)?;
        staging.write(0, &bytes);
        let offsets = Span::whole(&Memory::allocate(device, length)?);
        device.upload(stream, &*staging, 0..length, &offsets)?;
        device.finish(stream)?;
        let clock = UniformClock::new(0, 1.0, 1).expect("one row at one hertz is a clock");
        Ok(Self {
            plan: Arc::clone(plan),
            columns,
            offsets,
            positions,
            one_row: Clock::Uniform(clock),
            multiprocessors: device.facts().multiprocessors,
        })
    }

    fn kernel<'a>(&'a self, target: &'a Target) -> &'a FieldKernel {
        match (&target.index, &self.plan.columns[target.column].source) {
            (Some((_, kernel)), _) | (None, Source::Stream { kernel, .. }) => kernel,
            (None, _) => unreachable!("every column without an index is a stream's"),
        }
    }

    /// The columns of `rows` samples, in the device's part of a slot.
    pub fn outputs<'a>(&'a self, slot: &Span, rows: usize) -> Vec<Output<'a>> {
        let output = |target: &'a Target| {
            let column = &self.plan.columns[target.column];
            let span = |offset: usize, bytes: usize| slot.part(offset as u64..(offset + bytes * rows) as u64);
            Output {
                kernel: self.kernel(target),
                offsets: self.offsets.part(target.offsets.clone()),
                values: span(column.offset, column.bytes),
                mask: column.mask.map(|(offset, bytes)| span(offset, bytes)),
            }
        };
        self.columns.iter().map(output).collect()
    }

    /// The launch's shape for these columns.
    pub fn plan(&self, outputs: &[Output<'_>], rows: usize) -> Result<AssemblePlan, PlanError> {
        let columns: Vec<_> = outputs.iter().map(|output| output.column(rows)).collect();
        AssemblePlan::new(&columns, rows, self.multiprocessors)
    }

    /// Bytes of the descriptors of a batch of that shape.
    pub fn bytes(&self, plan: &AssemblePlan) -> u64 {
        let (fields, sources, anchors) = descriptor_bytes(plan);
        let indices = self.columns.iter().filter(|target| target.index.is_some()).count();
        fields + sources + anchors + (indices * plan.batch()) as u64 * VALUE_BYTES
    }

    /// The rows that a sample is made of, of one of the recipe's streams.
    pub fn rows(&self, sample: &Sample, position: usize) -> Range<usize> {
        let clock = &sample.columns.stream(self.positions[position]).clock;
        let (anchor, _) = self.anchor(sample);
        let of_stream = self.columns.iter().filter(|target| target.stream == Some(position));
        let rows = of_stream.map(|target| self.kernel(target).rows(clock, anchor));
        rows.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end)).expect("each stream is some column's")
    }

    fn anchor<'a>(&self, sample: &'a Sample) -> (Anchor, Option<&'a Clock>) {
        let clock = self.plan.frame_clock.map(|nth| &sample.columns.stream(self.plan.streams[nth]).clock);
        (self.plan.anchors.anchor(sample.place, clock), clock)
    }

    /// Appends the descriptors of a batch that will lie at `at` of the device's memory. `views` `[samples][positions]`
    /// says where the streams lie.
    pub fn encode(
        &self,
        dataset: &Dataset,
        plan: &AssemblePlan,
        samples: &[Sample],
        at: DevicePtr,
        views: &[View],
        to: &mut Vec<u8>,
    ) -> Result<(), PlanError> {
        let (fields, sources, anchors) = descriptor_bytes(plan);
        let mut values_at = at.0 + fields + sources + anchors;
        to.extend_from_slice(plan.fields());
        for target in &self.columns {
            if let Some(stream) = target.stream {
                let position = self.positions[stream];
                for (sample, views) in samples.iter().zip(views.chunks_exact(self.positions.len())) {
                    let View { data, stamps } = views[stream];
                    DeviceStream { data, clock: &sample.columns.stream(position).clock, stamps }
                        .encode(to)?;
                }
            } else {
                for _ in samples {
                    DeviceStream { data: DevicePtr(values_at), clock: &self.one_row, stamps: None }
                        .encode(to)?;
                    values_at += VALUE_BYTES;
                }
            }
        }
        let anchors: Vec<_> = samples.iter().map(|sample| (sample, self.anchor(sample))).collect();
        for (_, (anchor, _)) in &anchors {
            anchor.encode(to);
        }
        for (index, _) in self.columns.iter().filter_map(|target| target.index.as_ref()) {
            for (sample, (anchor, clock)) in &anchors {
                to.extend(index_value(&self.plan, dataset, *index, sample, *anchor, *clock));
            }
        }
        Ok(())
    }
}

/// A copy of the one row that a computed column's "stream" has.
fn index_kernel(index: Index) -> FieldKernel {
    let dtype = if index == Index::Timestamp { DType::Float32 } else { DType::Int64 };
    let field = Field {
        offsets: Offsets::Rows([0].into()),
        interp: Interp::Previous,
        max_gap_ns: None,
        dim: 1,
        from: dtype,
        to: dtype,
    };
    FieldKernel::new(field).expect("a copy of one value is a field")
}
