//! One loader's way to its GPU: slots are claimed when the client's kernels are done with them, batches go in bursts.
//!
//! ```text
//!   ring full ──▶ refilling: claim what comes free ── room for a burst, or little is left to the client ──▶ filling
//!       ▲                                                                                                     │
//!       └──────────────────────────────── nothing is usable any more ◀────────────────────────────────────────┘
//! ```
//!
//! A claimed slot whose `done` has not happened is held here, in `Filling`, and asked about again. Such a slot also says
//! that the client's GPU has work left: a trainer's host runs far ahead of it, and to make a batch each time that host
//! asks for one would cost the GPU two changes of context a batch (`docs/adr/0007-fences.md`). What counts as left is
//! what is ready, what is being made, and what is not done. Dropping a feed sends what was collected and gives the
//! held slots back.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use robocache_wire::producer::Filling;
use robocache_wire::ring::Claim;

use crate::assemblers::Job;
use crate::gpu::device::DeviceError;
use crate::gpu::host::{GpuLoader, SPARE};
use crate::loader::{Interrupt, Loader};

/// How long to rest between two looks at slots whose kernels still run: with much before the client, and with little.
const REST: Duration = Duration::from_millis(1);
const SHORT: Duration = Duration::from_micros(100);
/// How long to rest where only a freed slot changes anything.
const LONG: Duration = Duration::from_millis(50);

/// The batches of one run on their way to the GPU.
#[derive(Debug)]
pub struct Feed<'a> {
    loader: &'a Arc<Loader>,
    gpu: &'a GpuLoader,
    burst: usize,
    collected: Vec<Job>,
    /// Slots that may be written.
    usable: Vec<Filling>,
    /// Slots whose kernels may still run, in the order they were released.
    pending: VecDeque<Filling>,
    refilling: bool,
    /// Which of `pending` was asked about out of turn.
    asked: usize,
}

impl<'a> Feed<'a> {
    pub fn new(loader: &'a Arc<Loader>, gpu: &'a GpuLoader) -> Self {
        let slots = loader.producer.shape().slots;
        let spare = SPARE.min(slots / 16);
        let burst = gpu.gpu.burst.min((slots - spare) / 2).max(1) as usize;
        let (collected, usable, pending) = (Vec::new(), Vec::new(), VecDeque::new());
        Self { loader, gpu, burst, collected, usable, pending, refilling: false, asked: 0 }
    }

    /// A slot that may be written, for batch `seq` of `run`.
    pub(crate) fn claim(&mut self, run: u32, seq: u64) -> Result<Filling, Interrupt> {
        let started = Instant::now();
        loop {
            self.take_free(run)?;
            self.ask().map_err(|error| Interrupt::Failed { seq, message: error.to_string() })?;
            let left = self.left();
            if self.refilling && (self.usable.len() >= self.burst || left <= self.burst / 4) {
                self.refilling = false;
            }
            if !self.refilling
                && let Some(filling) = self.usable.pop()
            {
                self.loader.metrics.waited_for_slot(started.elapsed());
                return Ok(filling);
            }
            self.flush();
            self.refilling = true;
            let rest = match self.usable.len() + self.pending.len() {
                0 => LONG,
                _ if left > self.burst / 2 => REST,
                _ => SHORT,
            };
            match self.loader.producer.claim(run, rest) {
                Claim::Claimed(filling) => self.pending.push_back(filling),
                Claim::Full => {}
                Claim::Stale => return Err(Interrupt::Seek),
            }
            if let Some(interrupt) = self.loader.interrupted() {
                return Err(interrupt);
            }
        }
    }

    /// Claims whatever is free.
    fn take_free(&mut self, run: u32) -> Result<(), Interrupt> {
        loop {
            match self.loader.producer.claim(run, Duration::ZERO) {
                Claim::Claimed(filling) => self.pending.push_back(filling),
                Claim::Full => return Ok(()),
                Claim::Stale => return Err(Interrupt::Seek),
            }
        }
    }

    /// Asks which slots the client's kernels are done with: the first ones, and one of the others each time, since a
    /// stream of its may be slower than another.
    fn ask(&mut self) -> Result<(), DeviceError> {
        while let Some(first) = self.pending.front() {
            if self.gpu.ring.is_done(first.slot())? {
                self.usable.extend(self.pending.pop_front());
            } else {
                break;
            }
        }
        if self.pending.len() > 1 {
            self.asked = self.asked % (self.pending.len() - 1) + 1;
            if self.gpu.ring.is_done(self.pending[self.asked].slot())? {
                self.usable.extend(self.pending.remove(self.asked));
            }
        }
        Ok(())
    }

    /// Batches that the client has before it: a trainer's GPU has work as long as there are some.
    fn left(&self) -> usize {
        self.loader.producer.occupancy().ready as usize + self.loader.in_flight() + self.pending.len()
    }

    /// Takes a batch to be made, with others.
    pub fn push(&mut self, job: Job) {
        self.collected.push(job);
        if self.collected.len() >= self.burst {
            self.flush();
        }
    }

    /// Sends what was collected: something will take a while now.
    pub fn flush(&mut self) {
        if self.collected.is_empty() {
            return;
        }
        if let Err(jobs) = self.gpu.gpu.submit(std::mem::take(&mut self.collected)) {
            for job in jobs {
                job.fail("the thread of the GPU is gone: a bug in robocached, please report it");
            }
        }
    }
}

impl Drop for Feed<'_> {
    fn drop(&mut self) {
        self.flush();
    }
}
