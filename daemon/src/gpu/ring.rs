//! The part of a ring that lies in a GPU's memory, and the events that fence its slots. Contract: `docs/segment.md`.
//!
//! What must stay true: a slot is written only after the client's `done` event of it has happened, and published only
//! after our `ready` event of it has. The allocation holds nothing else, since its handle opens it whole; it is freed
//! only when the client has closed it or is gone, which whoever owns the ring waits for.

use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};

use robocache_wire::spec::{GpuRing, IpcHandle};

use crate::gpu::device::{Device, DeviceError, Event, EventId, Memory, Progress, RingShare, Span};

/// An IPC handle opens the whole page its allocation lies in.
const PAGE: u64 = 2 << 20;
/// Slots begin on lines of the GPU.
const SLOT_ALIGN: u64 = 256;

/// Bytes of one slot's part on the GPU.
pub fn slot_bytes(columns_end: u64) -> u64 {
    columns_end.max(1).next_multiple_of(SLOT_ALIGN)
}

/// A ring's memory and events.
#[derive(Debug)]
pub struct DeviceRing {
    device: Arc<dyn Device>,
    memory: Arc<Memory>,
    slots: u32,
    slot_bytes: u64,
    share: RingShare,
    ready: Vec<Event>,
    /// The client's, once it has attached.
    done: OnceLock<Vec<Event>>,
}

impl DeviceRing {
    /// Makes a ring of `slots` slots whose columns end at `columns_end`, and what its client is told of it.
    pub fn create(
        device: &Arc<dyn Device>,
        slots: u32,
        columns_end: u64,
    ) -> Result<(Self, GpuRing, Vec<OwnedFd>), DeviceError> {
        let slot_bytes = slot_bytes(columns_end);
        let bytes = (slot_bytes * u64::from(slots)).next_multiple_of(PAGE);
        let memory = Memory::allocate(device, bytes)?;
        let share = device.share(slots)?;
        let (mut ready, mut handles) = (Vec::new(), Vec::new());
        for slot in 0..slots {
            let (event, handle) = device.ready_event(&share, slot)?;
            ready.push(Event::adopt(device, event));
            handles.push(handle);
        }
        let facts = device.facts();
        let told = GpuRing {
            kind: facts.kind,
            uuid: facts.uuid.clone(),
            name: facts.name.clone(),
            slot_bytes,
            bytes,
            memory: device.export_memory(memory.at())?,
            ready: handles,
        };
        let fds = device.fds(&share, memory.at())?;
        let device = Arc::clone(device);
        Ok((Self { device, memory, slots, slot_bytes, share, ready, done: OnceLock::new() }, told, fds))
    }

    /// Opens the client's events. What it sent is a peer's word.
    pub fn attach(&self, done: &[IpcHandle]) -> Result<(), DeviceError> {
        let refused = |what: String| DeviceError::Unsupported { what, cure: "this is a bug of the client's" };
        if done.len() != self.slots as usize {
            return Err(refused(format!("{} done events for {} slots", done.len(), self.slots)));
        }
        let open =
            |handle| self.device.open_event(&self.share, handle).map(|id| Event::adopt(&self.device, id));
        let events = done.iter().map(open).collect::<Result<_, _>>()?;
        self.done.set(events).map_err(|_events| refused("it attached twice".to_owned()))
    }

    /// The slot's bytes.
    pub fn slot(&self, slot: usize) -> Span {
        let start = slot as u64 * self.slot_bytes;
        Span::whole(&self.memory).part(start..start + self.slot_bytes)
    }

    /// Whether the client is done with what it had leased in this slot.
    pub fn is_done(&self, slot: usize) -> Result<bool, DeviceError> {
        self.done(slot).map_or(Ok(true), |event| event.query().map(|progress| progress == Progress::Done))
    }

    /// The client's event of a slot, once it has attached.
    pub fn done(&self, slot: usize) -> Option<&Event> {
        self.done.get().and_then(|events| events.get(slot))
    }

    /// Our event of a slot.
    pub fn ready(&self, slot: usize) -> EventId {
        self.ready[slot].id()
    }

    pub fn bytes(&self) -> u64 {
        self.memory.bytes()
    }
}
