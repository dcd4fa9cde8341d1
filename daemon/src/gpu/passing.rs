//! Device memory for what is there for one batch only: windows of streams, given back when the batch is made.
//!
//! Owns the arena they are cut from. A window that is copied from where it is pinned lies at the same place within a line
//! as its rows do there; one that is packed first begins a line.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::gpu::arena::Arena;
use crate::gpu::device::{Device, DeviceError, Memory, Span};
use crate::gpu::resident::Keep;

/// Device memory for windows: a share of all, so much at least and at most. Beyond it each is an allocation.
const SHARE: u64 = 64;
const BUDGET: [u64; 2] = [64 << 20, 1 << 30];
/// The slabs it is made of.
const SLAB: u64 = 64 << 20;
/// Lines of the GPU.
const ALIGN: u64 = 256;
/// How long to leave the device alone after it had no memory.
const LATER: Duration = Duration::from_secs(1);

/// What passes for a batch, held until it is made.
#[derive(Debug, Default)]
pub struct Held {
    blocks: Vec<Box<dyn Keep>>,
    bytes: u64,
}

impl Held {
    /// Bytes of it.
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn join(&mut self, mut other: Self) {
        self.blocks.append(&mut other.blocks);
        self.bytes += other.bytes;
    }
}

/// The memory that windows are cut from.
#[derive(Debug)]
pub(super) struct Passing {
    device: Arc<dyn Device>,
    arena: Arena<Arc<Memory>>,
    budget: u64,
    /// When the device last had no memory for a slab.
    refused: Option<Instant>,
}

impl Passing {
    pub(super) fn new(device: &Arc<dyn Device>) -> Self {
        let budget = (device.facts().memory_bytes / SHARE).clamp(BUDGET[0], BUDGET[1]);
        Self { device: Arc::clone(device), arena: Arena::new(budget, SLAB), budget, refused: None }
    }

    /// Bytes of windows to have at once, that all may be copied while as many are read.
    pub(super) const fn at_once(&self) -> u64 {
        self.budget / 2
    }

    /// Memory for `bytes` bytes that are pinned at `offset` of a line or some lines; `None` where the arena has no room.
    pub(super) fn take(
        &mut self,
        bytes: u64,
        offset: u64,
        held: &mut Held,
    ) -> Result<Option<Span>, DeviceError> {
        let (skew, device) = (offset % ALIGN, &self.device);
        if self.refused.is_some_and(|when| when.elapsed() < LATER) {
            return Ok(None);
        }
        let block = match self.arena.take(skew + bytes, |slab| Memory::allocate(device, slab)) {
            Ok(Some(block)) => block,
            Ok(None) => return Ok(None),
            Err(error @ DeviceError::Lost { .. }) => return Err(error),
            Err(error) => {
                if self.refused.is_none() {
                    tracing::warn!(
                        device = device.facts().name,
                        wanted = SLAB,
                        has = self.arena.bytes(),
                        %error,
                        "the GPU has no memory for what passes through it for a batch; kernels read what is pinned over \
                         the bus, which takes time from a trainer's"
                    );
                }
                self.refused = Some(Instant::now());
                return Ok(None);
            }
        };
        let at = block.offset() + skew;
        let span = Span::whole(block.memory()).part(at..at + bytes);
        held.bytes += bytes;
        held.blocks.push(Box::new(block));
        Ok(Some(span))
    }

    /// Memory for `bytes` bytes that are packed first; an allocation of its own where the arena has no room.
    pub(super) fn must_take(&mut self, bytes: u64, held: &mut Held) -> Result<Span, DeviceError> {
        if let Some(span) = self.take(bytes, 0, held)? {
            return Ok(span);
        }
        let memory = Memory::allocate(&self.device, bytes)?;
        let span = Span::whole(&memory);
        held.bytes += bytes;
        held.blocks.push(Box::new(memory));
        Ok(span)
    }
}

/// Rows of one stream of one episode, and which samples are made of them.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Window {
    pub(super) rows: Range<usize>,
    pub(super) samples: Vec<usize>,
}

/// Windows of samples as they are to be copied: those that overlap as one.
pub(super) fn joined(mut wanted: Vec<(Range<usize>, usize)>) -> Vec<Window> {
    wanted.sort_unstable_by_key(|(rows, sample)| (rows.start, *sample));
    let mut windows: Vec<Window> = Vec::with_capacity(wanted.len());
    for (rows, sample) in wanted {
        match windows.last_mut() {
            Some(last) if rows.start < last.rows.end => {
                last.rows.end = last.rows.end.max(rows.end);
                last.samples.push(sample);
            }
            _ => windows.push(Window { rows, samples: vec![sample] }),
        }
    }
    windows
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Every sample has a window that holds its rows, and no row is copied twice, nor one that nobody wants.
        #[test]
        fn windows_hold_what_is_wanted_once(wanted in prop::collection::vec((0_usize..200, 1_usize..30), 0..40)) {
            let wanted: Vec<_> = wanted.into_iter().enumerate().map(|(n, (at, len))| (at..at + len, n)).collect();
            let windows = joined(wanted.clone());
            for (rows, sample) in &wanted {
                let has = |window: &&Window| window.samples.contains(sample);
                let window = windows.iter().find(has).expect("every sample has one");
                prop_assert!(window.rows.start <= rows.start && rows.end <= window.rows.end);
            }
            prop_assert_eq!(windows.iter().map(|window| window.samples.len()).sum::<usize>(), wanted.len());
            prop_assert!(windows.windows(2).all(|two| two[0].rows.end <= two[1].rows.start));
            let copied: usize = windows.iter().map(|window| window.rows.len()).sum();
            let rows = (0..300).filter(|row| wanted.iter().any(|(rows, _)| rows.contains(row))).count();
            prop_assert_eq!(copied, rows);
        }
    }
}
