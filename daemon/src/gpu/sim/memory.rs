//! Simulated memory: what is allocated, what is pinned, and what is wrong about an access.
//!
//! An address is `number << 40 | offset`. Numbers are never used again, so that a stale address is known as one. Freed
//! memory is poisoned: a client that still has it open sees so. Fresh memory is poisoned too, otherwise.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use robocache_kernels::DevicePtr;
use robocache_wire::sim::Region;

use super::stream::Shared;
use crate::gpu::device::Pinned;

const OFFSET_BITS: u32 = 40;
/// Writes to pinned memory are told apart by lines of so many bytes.
const LINE: usize = 256;
/// Bytes of memory that nobody wrote.
const FRESH: u8 = 0xcd;
/// Bytes of memory that is nobody's any more.
const FREED: u8 = 0xdb;

/// All memory of a device.
#[derive(Debug)]
pub(super) struct Memory {
    live: HashMap<u64, Kept>,
    made: u64,
    used: u64,
    limit: u64,
    /// Counts the host's writes to pinned memory.
    writes: u64,
}

enum Kept {
    Device {
        region: Arc<Region>,
        charged: u64,
    },
    /// `written`: the host's last write to each line.
    Pinned {
        bytes: Vec<u8>,
        written: Vec<u64>,
    },
}

impl fmt::Debug for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.bytes())
    }
}

impl Kept {
    fn bytes(&self) -> u64 {
        match self {
            Self::Device { region, .. } => region.bytes(),
            Self::Pinned { bytes, .. } => bytes.len() as u64,
        }
    }
}

impl Memory {
    pub(super) fn new(limit: u64) -> Self {
        Self { live: HashMap::new(), made: 0, used: 0, limit, writes: 0 }
    }

    pub(super) const fn used(&self) -> u64 {
        self.used
    }

    pub(super) const fn limit(&self) -> u64 {
        self.limit
    }

    pub(super) const fn set_limit(&mut self, bytes: u64) {
        self.limit = bytes;
    }

    /// The host's writes so far: what work that is enqueued now must find no newer one than.
    pub(super) const fn now(&self) -> u64 {
        self.writes
    }

    fn keep(&mut self, kept: Kept) -> Result<u64, String> {
        if kept.bytes() >> OFFSET_BITS > 0 || self.made + 1 >= 1 << (64 - OFFSET_BITS) {
            return Err("there are no addresses left for it".to_owned());
        }
        self.made += 1;
        self.live.insert(self.made, kept);
        Ok(self.made << OFFSET_BITS)
    }

    pub(super) fn allocate(&mut self, bytes: u64, charged: u64) -> Result<u64, String> {
        let region = Region::create("simulated", bytes).map_err(|error| error.to_string())?;
        fill(&region, FRESH)?;
        let at = self.keep(Kept::Device { region: Arc::new(region), charged })?;
        self.used += charged;
        Ok(at)
    }

    pub(super) fn free(&mut self, at: u64) -> Result<(), String> {
        let number = at >> OFFSET_BITS;
        if !matches!(self.live.get(&number), Some(Kept::Device { .. })) || at != number << OFFSET_BITS {
            return Err(format!("{at:#x} was freed and is no allocation"));
        }
        if let Some(Kept::Device { region, charged }) = self.live.remove(&number) {
            self.used -= charged;
            fill(&region, FREED)?;
        }
        Ok(())
    }

    /// The memfd of an allocation.
    pub(super) fn region(&self, at: u64) -> Option<Arc<Region>> {
        match self.live.get(&(at >> OFFSET_BITS))? {
            Kept::Device { region, .. } => Some(Arc::clone(region)),
            Kept::Pinned { .. } => None,
        }
    }

    /// What `bytes` bytes at `at` are in, and where there.
    fn find(&self, at: u64, bytes: u64) -> Result<(&Kept, u64), String> {
        let (number, offset) = (at >> OFFSET_BITS, at & ((1 << OFFSET_BITS) - 1));
        let kept = self.live.get(&number).ok_or_else(|| {
            let ever = if (1..=self.made).contains(&number) { "was freed" } else { "never was" };
            format!("{bytes} bytes at {at:#x}: allocation {number} {ever}")
        })?;
        if offset.checked_add(bytes).is_none_or(|end| end > kept.bytes()) {
            return Err(format!("{bytes} bytes at {at:#x}: allocation {number} ends at {}", kept.bytes()));
        }
        Ok((kept, offset))
    }

    /// Reads for work that was enqueued when the host had written `since` times.
    pub(super) fn read(&self, at: u64, bytes: u64, since: u64) -> Result<Vec<u8>, String> {
        let size = usize::try_from(bytes).map_err(|error| error.to_string())?;
        match self.find(at, bytes)? {
            (Kept::Device { region, .. }, offset) => {
                let mut read = vec![0; size];
                region.read(offset, &mut read).map_err(|error| error.to_string())?;
                Ok(read)
            }
            (Kept::Pinned { bytes: kept, written }, offset) => {
                let start = usize::try_from(offset).map_err(|error| error.to_string())?;
                if written[lines(start, size)].iter().any(|&when| when > since) {
                    return Err(format!(
                        "{bytes} bytes of pinned memory at {at:#x} were written while work that reads them was under way"
                    ));
                }
                Ok(kept[start..][..size].to_vec())
            }
        }
    }

    /// What the device writes.
    pub(super) fn write(&self, at: u64, from: &[u8]) -> Result<(), String> {
        match self.find(at, from.len() as u64)? {
            (Kept::Device { region, .. }, offset) => {
                region.write(offset, from).map_err(|error| error.to_string())
            }
            (Kept::Pinned { .. }, _) => {
                Err(format!("{} bytes written to pinned memory at {at:#x}", from.len()))
            }
        }
    }
}

/// The lines that `bytes` bytes from `start` touch.
const fn lines(start: usize, bytes: usize) -> Range<usize> {
    start / LINE..(start + bytes).div_ceil(LINE)
}

fn fill(region: &Region, byte: u8) -> Result<(), String> {
    let piece = [byte; 1 << 16];
    let mut at = 0;
    while at < region.bytes() {
        let size = usize::try_from(region.bytes() - at).map_or(piece.len(), |left| left.min(piece.len()));
        region.write(at, &piece[..size]).map_err(|error| error.to_string())?;
        at += size as u64;
    }
    Ok(())
}

/// Pinned memory, which the device finds by its address while it lives.
#[derive(Debug)]
pub(super) struct SimPinned {
    shared: Arc<Shared>,
    at: u64,
    bytes: u64,
}

impl SimPinned {
    pub(super) fn new(shared: &Arc<Shared>, bytes: u64) -> Result<Self, String> {
        let size = usize::try_from(bytes).ok().filter(|&size| isize::try_from(size).is_ok());
        let size = size.ok_or("more than addresses reach")?;
        let mut kept = Vec::new();
        kept.try_reserve_exact(size).map_err(|error| error.to_string())?;
        kept.resize(size, FRESH);
        let written = vec![0; size.div_ceil(LINE)];
        let at = shared.memory.lock().keep(Kept::Pinned { bytes: kept, written })?;
        Ok(Self { shared: Arc::clone(shared), at, bytes })
    }
}

impl Pinned for SimPinned {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn address(&self) -> DevicePtr {
        DevicePtr(self.at)
    }

    fn write(&mut self, offset: u64, from: &[u8]) {
        let mut memory = self.shared.memory.lock();
        memory.writes += 1;
        let when = memory.writes;
        let Some(Kept::Pinned { bytes, written }) = memory.live.get_mut(&(self.at >> OFFSET_BITS)) else {
            unreachable!("it lives as long as self");
        };
        let start = usize::try_from(offset).expect("inside a buffer");
        bytes[start..][..from.len()].copy_from_slice(from);
        written[lines(start, from.len())].fill(when);
    }
}

impl Drop for SimPinned {
    fn drop(&mut self) {
        self.shared.memory.lock().live.remove(&(self.at >> OFFSET_BITS));
    }
}
