//! The miniature daemon's simulated device: memory, events, and what it saw of the client's fences.

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};

use robocache_wire::sim::{self, Events, Region};
use robocache_wire::spec::{GpuKind, GpuRing, IpcHandle};

use super::Script;

/// What tests look at.
#[derive(Debug, Default)]
pub(crate) struct SeenGpu {
    /// The events of the last ring: first `ready`, then `done`.
    pub(crate) events: Mutex<Option<Arc<Events>>>,
}

impl SeenGpu {
    /// How often `done` was recorded, all slots of the last ring together.
    pub(crate) fn done_records(&self) -> u64 {
        let events = self.events.lock().unwrap();
        let events = events.as_ref().expect("a ring was made");
        (events.count() / 2..events.count()).map(|event| events.latest(event).unwrap()).sum()
    }
}

#[derive(Debug)]
pub(crate) struct Gpu {
    memory: Region,
    events: Arc<Events>,
    slots: u32,
    slot_bytes: u64,
    script: Script,
    done: Vec<u64>,
}

impl Gpu {
    pub(crate) fn new(slots: u32, slot_bytes: u64, script: Script, seen: &SeenGpu) -> Self {
        let memory = Region::create("memory", u64::from(slots) * slot_bytes).unwrap();
        let events = Arc::new(Events::create(2 * u64::from(slots)).unwrap());
        *seen.events.lock().unwrap() = Some(Arc::clone(&events));
        Self { memory, events, slots, slot_bytes, script, done: Vec::new() }
    }

    pub(crate) fn info(&self) -> GpuRing {
        GpuRing {
            kind: GpuKind::Sim,
            uuid: "SIM-0".to_owned(),
            name: "simulated".to_owned(),
            slot_bytes: self.slot_bytes,
            bytes: self.memory.bytes() + self.script.larger_by,
            memory: sim::handle(0),
            ready: (0..u64::from(self.slots)).map(sim::handle).collect(),
        }
    }

    pub(crate) fn fds(&self) -> [BorrowedFd<'_>; 2] {
        [self.memory.fd(), self.events.fd()]
    }

    pub(crate) fn attached(&mut self, done: &[IpcHandle]) {
        self.done = done.iter().map(sim::number).collect();
        assert_eq!(self.done.len(), self.slots as usize);
    }

    pub(crate) fn is_attached(&self) -> bool {
        !self.done.is_empty()
    }

    /// The slot is ours again once the client's reads are over: waits for them, then scribbles over it.
    pub(crate) fn claimed(&self, slot: usize) {
        let done = self.done[slot];
        while !self.script.ignore_done
            && !self.events.is_complete(done, self.events.latest(done).unwrap()).unwrap()
        {
            std::thread::yield_now();
        }
        self.write(slot, 0, &vec![0xEE; usize::try_from(self.slot_bytes).unwrap()]);
    }

    pub(crate) fn write(&self, slot: usize, offset: u64, bytes: &[u8]) {
        self.memory.write(self.slot_bytes * slot as u64 + offset, bytes).unwrap();
    }

    pub(crate) fn made(&self, slot: usize) {
        let record = self.events.record(slot as u64).unwrap();
        if !self.script.unready {
            self.events.complete(slot as u64, record).unwrap();
        }
    }
}
