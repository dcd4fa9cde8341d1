//! The work of `assemble` on a simulated device: the CPU twin, on bytes that are read out of simulated memory.
//!
//! Reads the descriptors when the stream comes to the launch, as the kernel does, by the layout that
//! `kernels/src/device.rs` encodes. What the kernel would take for granted is checked: addresses and their alignment,
//! clocks, and that the plan's fields and the columns' offsets lie where the launch says.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use robocache_kernels::{
    ANCHOR_BYTES, Anchor, AssemblePlan, DevicePtr, FieldKernel, Offsets, SOURCE_BYTES, StreamView,
};
use robocache_types::{Clock, UniformClock};

use super::memory::Memory;
use crate::gpu::device::Launch;

/// A launch, as it was enqueued.
#[derive(Debug)]
pub(super) struct Work {
    plan: AssemblePlan,
    columns: Vec<Target>,
    fields: u64,
    sources: u64,
    anchors: u64,
}

/// Where a column goes.
#[derive(Debug)]
struct Target {
    kernel: FieldKernel,
    offsets: u64,
    values: u64,
    mask: Option<u64>,
}

/// `Source` of `cuda/assemble.cu`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Source {
    data: u64,
    stamps: u64,
    first_ns: i64,
    num: i64,
    den: i64,
    rows: u64,
}

impl Work {
    pub(super) fn new(launch: &Launch<'_>) -> Self {
        let columns = launch.columns.iter().map(|output| Target {
            kernel: output.kernel.clone(),
            offsets: output.offsets.address().0,
            values: output.values.address().0,
            mask: output.mask.as_ref().map(|mask| mask.address().0),
        });
        let [DevicePtr(fields), DevicePtr(sources), DevicePtr(anchors)] =
            [launch.fields, launch.sources, launch.anchors];
        Self { plan: launch.plan.clone(), columns: columns.collect(), fields, sources, anchors }
    }

    /// Makes the batch. `since`: the host's writes when it was enqueued.
    pub(super) fn run(&self, memory: &Memory, since: u64) -> Result<(), String> {
        let read = |what: &str, at: u64, bytes: usize, align: usize| {
            if !at.is_multiple_of(align as u64) {
                return Err(format!("{what} at {at:#x} are not aligned to {align}"));
            }
            memory.read(at, bytes as u64, since).map_err(|error| format!("{what}: {error}"))
        };
        let batch = self.plan.batch();
        if read("fields", self.fields, self.plan.fields().len(), 8)? != self.plan.fields() {
            return Err("its fields are not the plan's: they were not uploaded, or written over".to_owned());
        }
        let sources = read("sources", self.sources, self.columns.len() * batch * SOURCE_BYTES, 8)?;
        let anchors = read("anchors", self.anchors, batch * ANCHOR_BYTES, 8)?;
        let anchors: Vec<Anchor> = anchors
            .chunks_exact(ANCHOR_BYTES)
            .map(|bytes| Anchor { t_ns: word(bytes, 0).cast_signed(), row: word(bytes, 8).cast_signed() })
            .collect();
        let mut clocks: HashMap<Source, Clock> = HashMap::new();
        for (target, sources) in self.columns.iter().zip(sources.chunks_exact(batch * SOURCE_BYTES)) {
            let field = target.kernel.field();
            let (Offsets::Rows(offsets) | Offsets::Times(offsets)) = &field.offsets;
            let found = read("offsets", target.offsets, offsets.len() * 8, 8)?;
            if !found.chunks_exact(8).map(|bytes| word(bytes, 0).cast_signed()).eq(offsets.iter().copied()) {
                return Err("a column's offsets are not its kernel's: they were not uploaded".to_owned());
            }
            let row_bytes = field.dim * field.from.size_bytes();
            let (steps, size) = (target.kernel.steps(), target.kernel.out_bytes());
            let (mut values, mut mask) = (vec![0; batch * size], vec![0; batch * steps]);
            let outs = values.chunks_exact_mut(size).zip(mask.chunks_exact_mut(steps));
            for ((bytes, anchor), (values, mask)) in
                sources.chunks_exact(SOURCE_BYTES).zip(&anchors).zip(outs)
            {
                let source = Source::decode(bytes);
                // Samples of one clock may have their rows in different places.
                let clock = match clocks.entry(Source { data: 0, ..source }) {
                    Entry::Occupied(found) => found.into_mut(),
                    Entry::Vacant(empty) => empty.insert(source.clock(&read)?),
                };
                let bytes = clock.rows().checked_mul(row_bytes).ok_or("a source larger than memory")?;
                // As the kernel, it touches no rows but these: others need not be there.
                let rows = target.kernel.rows(clock, *anchor);
                let mut data = vec![0; bytes];
                let part = &mut data[rows.start * row_bytes..rows.end * row_bytes];
                let at = source.data.wrapping_add((rows.start * row_bytes) as u64);
                part.copy_from_slice(&read("data", at, part.len(), field.from.size_bytes())?);
                target.kernel.assemble(StreamView { clock, data: &data }, *anchor, values, Some(mask));
            }
            if !target.values.is_multiple_of(field.to.size_bytes() as u64) {
                return Err(format!("values at {:#x} are not aligned", target.values));
            }
            memory.write(target.values, &values).map_err(|error| format!("values: {error}"))?;
            if let Some(at) = target.mask {
                memory.write(at, &mask).map_err(|error| format!("mask: {error}"))?;
            }
        }
        Ok(())
    }
}

/// Little-endian word at `at` of `bytes`, which is long enough.
fn word(bytes: &[u8], at: usize) -> u64 {
    bytes[at..].first_chunk().map_or(0, |word| u64::from_le_bytes(*word))
}

impl Source {
    fn decode(bytes: &[u8]) -> Self {
        Self {
            data: word(bytes, 0),
            stamps: word(bytes, 8),
            first_ns: word(bytes, 16).cast_signed(),
            num: word(bytes, 24).cast_signed(),
            den: word(bytes, 32).cast_signed(),
            rows: word(bytes, 40),
        }
    }

    fn clock(
        &self,
        read: &impl Fn(&str, u64, usize, usize) -> Result<Vec<u8>, String>,
    ) -> Result<Clock, String> {
        let rows = usize::try_from(self.rows).ok().filter(|rows| (1..1 << 32).contains(rows));
        let rows = rows.ok_or_else(|| format!("a source of {} rows", self.rows))?;
        if self.stamps == 0 {
            let clock = UniformClock::from_period(self.first_ns, (self.num, self.den), rows);
            return clock.map(Clock::Uniform).map_err(|error| error.to_string());
        }
        let stamps = read("stamps", self.stamps, rows * 8, 8)?;
        let stamps: Vec<i64> = stamps.chunks_exact(8).map(|bytes| word(bytes, 0).cast_signed()).collect();
        Clock::from_stamps(stamps).map_err(|error| error.to_string())
    }
}
