//! One loader's way to its GPU: slots are claimed when the client's kernels are done with them, batches go in bursts.
//!
//! ```text
//!   ring full ──▶ refilling: claim what comes free ── room for a burst, or the client has nothing to read ──▶ filling
//!       ▲                                                                                                        │
//!       └──────────────────────────────── nothing is free any more ◀─────────────────────────────────────────────┘
//! ```
//!
//! A claimed slot whose `done` has not happened is held here, in `Filling`, and asked about again; another one is taken
//! meanwhile. Dropping a feed sends what was collected and gives the held slots back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use robocache_wire::producer::Filling;
use robocache_wire::ring::Claim;

use crate::assemblers::Job;
use crate::gpu::device::DeviceError;
use crate::gpu::host::GpuLoader;
use crate::loader::{Interrupt, Loader};

/// How long to rest between two looks at a slot whose kernels still run.
const REST: Duration = Duration::from_micros(200);
/// How long to rest where the client may run out of batches meanwhile: taking one wakes nobody.
const REFILL_REST: Duration = Duration::from_millis(2);
/// How long to rest where only a freed slot changes anything.
const LONG: Duration = Duration::from_millis(50);

/// The batches of one run on their way to the GPU.
#[derive(Debug)]
pub struct Feed<'a> {
    loader: &'a Arc<Loader>,
    gpu: &'a GpuLoader,
    burst: usize,
    collected: Vec<Job>,
    held: Vec<Filling>,
    refilling: bool,
}

impl<'a> Feed<'a> {
    pub fn new(loader: &'a Arc<Loader>, gpu: &'a GpuLoader) -> Self {
        let slots = loader.producer.shape().slots;
        let burst = gpu.gpu.burst.min(slots / 2).max(1) as usize;
        Self { loader, gpu, burst, collected: Vec::new(), held: Vec::new(), refilling: false }
    }

    /// A slot that may be written, for batch `seq` of `run`.
    pub(crate) fn claim(&mut self, run: u32, seq: u64) -> Result<Filling, Interrupt> {
        let started = Instant::now();
        loop {
            if self.refilling && (self.held.len() >= self.burst || self.client_is_hungry()) {
                self.refilling = false;
            }
            if !self.refilling {
                let lost = |error: DeviceError| Interrupt::Failed { seq, message: error.to_string() };
                if let Some(filling) = self.take_done().map_err(lost)? {
                    self.loader.metrics.waited_for_slot(started.elapsed());
                    return Ok(filling);
                }
            }
            let claim = match self.loader.producer.claim(run, Duration::ZERO) {
                Claim::Full => {
                    self.flush();
                    self.refilling |= self.held.is_empty();
                    let rest = match (self.refilling, self.held.is_empty()) {
                        (true, true) => LONG,
                        (true, false) => REFILL_REST,
                        (false, _) => REST,
                    };
                    self.loader.producer.claim(run, rest)
                }
                claim => claim,
            };
            match claim {
                Claim::Claimed(filling) => self.held.push(filling),
                Claim::Full => {}
                Claim::Stale => return Err(Interrupt::Seek),
            }
            if let Some(interrupt) = self.loader.interrupted() {
                return Err(interrupt);
            }
        }
    }

    fn take_done(&mut self) -> Result<Option<Filling>, DeviceError> {
        for nth in 0..self.held.len() {
            if self.gpu.ring.is_done(self.held[nth].slot())? {
                return Ok(Some(self.held.swap_remove(nth)));
            }
        }
        Ok(None)
    }

    fn client_is_hungry(&self) -> bool {
        self.loader.producer.occupancy().ready == 0
    }

    /// Takes a batch to be made, with others.
    pub fn push(&mut self, job: Job) {
        self.collected.push(job);
        if self.collected.len() >= self.burst || self.client_is_hungry() {
            self.flush();
        }
    }

    /// Sends what was collected: something will take a while now.
    pub fn flush(&mut self) {
        if self.collected.is_empty() {
            return;
        }
        if let Err(jobs) = self.gpu.gpu.submit(std::mem::take(&mut self.collected)) {
            for Job { loader, header, filling, .. } in jobs {
                drop(filling);
                loader
                    .fail(header.seq, "the thread of the GPU is gone: a bug in robocached, please report it");
                loader.landed();
            }
        }
    }
}

impl Drop for Feed<'_> {
    fn drop(&mut self) {
        self.flush();
    }
}
