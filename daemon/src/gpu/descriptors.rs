//! What the launches of a burst are told: encoded into pinned memory, to be copied to the device as one piece.
//!
//! Owns the rooms for it, which bursts take in turn. A room is written only while no copy of it is under way whose
//! outcome still counts: it comes back here when its burst is over, or will never be.

use std::sync::Arc;

use robocache_kernels::{AssemblePlan, DevicePtr, PlanError};

use crate::assemblers::Job;
use crate::gpu::describe::View;
use crate::gpu::device::{Device, DeviceError, Launch, Memory, Output, Pinned, Span, StreamId, Upload};

/// Rooms are made of whole pages of a GPU. One is enough for a burst of common batches, 13 KB each.
const PAGE: u64 = 2 << 20;
/// Descriptors of a batch begin on lines of the GPU.
const ALIGN: u64 = 64;

/// Rooms that no burst has.
#[derive(Debug)]
pub(super) struct Rooms {
    device: Arc<dyn Device>,
    free: Vec<Room>,
    /// How many bursts there are at once.
    count: usize,
    begun: bool,
}

/// As many bytes here as there.
#[derive(Debug)]
struct Room {
    pinned: Box<dyn Pinned>,
    device: Arc<Memory>,
}

/// The descriptors of a burst.
#[derive(Debug)]
pub(super) struct Described {
    room: Room,
    bytes: u64,
    /// Of each batch: its launch's shape, and where its descriptors begin.
    batches: Vec<(AssemblePlan, u64)>,
}

impl Rooms {
    /// For `count` bursts at once.
    pub(super) fn new(device: &Arc<dyn Device>, count: usize) -> Self {
        Self { device: Arc::clone(device), free: Vec::new(), count, begun: false }
    }

    /// Describes batches: each a job, and `[samples][positions of its recipe]` of where its streams lie.
    pub(super) fn describe<'a>(
        &mut self,
        batches: impl Iterator<Item = (&'a Job, &'a [View])> + Clone,
    ) -> Result<Described, DeviceError> {
        let mut bytes = 0;
        let mut place = |job: &Job| {
            let (recipe, rows) = (&job.loader.on_gpu().recipe, job.samples.len());
            let plan = recipe.plan(&outputs(job), rows);
            let plan = plan.expect("columns, of fewer tiles than 2^31: they fit the memory of a GPU");
            let at = bytes;
            bytes += recipe.bytes(&plan).next_multiple_of(ALIGN);
            (plan, at)
        };
        let placed: Vec<_> = batches.clone().map(|(job, _)| place(job)).collect();
        let room = self.take(bytes)?;
        let mut described = Described { room, bytes, batches: placed };
        match described.encode(batches) {
            Ok(()) => Ok(described),
            Err(error) => {
                self.give_back(described);
                let (device, call) = (self.device.facts().name.clone(), "describing a batch");
                Err(DeviceError::Call { device, call, what: error.to_string() })
            }
        }
    }

    /// Takes the room of a burst that is over.
    pub(super) fn give_back(&mut self, described: Described) {
        self.free.push(described.room);
    }

    fn take(&mut self, bytes: u64) -> Result<Room, DeviceError> {
        if let Some(found) = self.free.iter().position(|free| free.pinned.bytes() >= bytes) {
            return Ok(self.free.swap_remove(found));
        }
        self.free.pop(); // too small for what comes now
        let room = self.make(bytes)?;
        if !std::mem::replace(&mut self.begun, true) {
            // All of them, so that what the daemon has of the device changes no more. One that cannot be had now is asked
            // for again when it is wanted.
            let others = (1..self.count).map_while(|_| self.make(bytes).ok());
            self.free = others.collect();
        }
        Ok(room)
    }

    fn make(&self, bytes: u64) -> Result<Room, DeviceError> {
        let bytes = bytes.next_multiple_of(PAGE);
        let (pinned, device) = (self.device.pin(bytes)?, Memory::allocate(&self.device, bytes)?);
        Ok(Room { pinned, device })
    }
}

impl Described {
    /// The copy that brings them to the device.
    pub(super) fn upload(&self) -> Upload {
        let range = 0..self.bytes;
        Upload::new(&*self.room.pinned, range.clone(), &Span::whole(&self.room.device).part(range))
    }

    /// Enqueues the making of batch `nth`, behind that copy.
    pub(super) fn launch(
        &self,
        nth: usize,
        job: &Job,
        device: &dyn Device,
        stream: StreamId,
    ) -> Result<(), DeviceError> {
        let (plan, at) = &self.batches[nth];
        let outputs = outputs(job);
        let span = Span::whole(&self.room.device).part(*at..self.bytes);
        device.assemble(stream, &Launch::new(plan, &outputs, &span))
    }

    fn encode<'a>(&mut self, batches: impl Iterator<Item = (&'a Job, &'a [View])>) -> Result<(), PlanError> {
        let start = self.room.device.at().0;
        let mut encoded: Vec<u8> = Vec::with_capacity(usize::try_from(self.bytes).unwrap_or(0));
        for ((job, views), (plan, at)) in batches.zip(&self.batches) {
            encoded.resize(usize::try_from(*at).expect("descriptors fit memory"), 0);
            let (recipe, dataset) = (&job.loader.on_gpu().recipe, job.loader.dataset.dataset());
            recipe.encode(dataset, plan, &job.samples, DevicePtr(start + at), views, &mut encoded)?;
        }
        encoded.resize(usize::try_from(self.bytes).expect("descriptors fit memory"), 0);
        self.room.pinned.write(0, &encoded);
        Ok(())
    }
}

/// A batch's columns in its slot.
fn outputs(job: &Job) -> Vec<Output<'_>> {
    let gpu = job.loader.on_gpu();
    gpu.recipe.outputs(&gpu.ring.slot(job.filling.slot()), job.samples.len())
}
