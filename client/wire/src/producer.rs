//! The daemon's end of a ring, with guards: a slot that was claimed is published or abandoned, never forgotten.
//!
//! ```text
//! Producer::create ─▶ (Arc<Producer>, RingFds to send)
//!   claim(run, limit) ─▶ Filling ── bytes_mut, set_ids ──▶ publish(header)
//!                          └─ dropped: abandoned
//! ```
//!
//! Claim in order of `seq`: the lowest number without a slot is the one to claim for. Filling and publishing may then
//! happen in any order and on any thread.

use std::sync::Arc;
use std::time::Duration;

use crate::batch::{BatchHeader, HEADER_BYTES};
use crate::ring::{Claim, Claimed, Occupancy, ProducerRing, Published};
use crate::segment::{DaemonSegment, RingFds, SegmentError, Shape};
use crate::slot::Owner;
use crate::words::DaemonState;

/// A ring that this process fills.
#[derive(Debug)]
pub struct Producer {
    ring: ProducerRing<DaemonSegment>,
}

impl Producer {
    /// Make a ring and the descriptors to send to its client.
    pub fn create(shape: Shape) -> Result<(Arc<Self>, RingFds), SegmentError> {
        let owner = Owner::client(shape.client).ok_or(SegmentError::Client { found: shape.client })?;
        let (segment, fds) = DaemonSegment::create(shape)?;
        Ok((Arc::new(Self { ring: ProducerRing::new(segment, owner) }), fds))
    }

    pub fn shape(&self) -> &Shape {
        self.ring.memory().shape()
    }

    /// The run being produced; 0 at first.
    pub fn run(&self) -> u32 {
        self.ring.run()
    }

    /// Begin run `run` (a seek): frees what is `Ready` of others, and makes what is being filled for others stale. Returns
    /// how many slots it freed. Threads that wait in [`Self::claim`] for an older run return [`Claim::Stale`].
    pub fn begin_run(&self, run: u32) -> usize {
        let expired = self.ring.begin_run(run);
        self.ring.interrupt_producers();
        expired
    }

    /// Claim any free slot for the next batch of `run`, waiting up to `limit` (zero: not at all).
    pub fn claim(self: &Arc<Self>, run: u32, limit: Duration) -> Claim<Filling> {
        let claim = if limit.is_zero() { self.ring.try_claim(run) } else { self.ring.claim(run, limit) };
        match claim {
            Claim::Claimed(claimed) => {
                Claim::Claimed(Filling { producer: Arc::clone(self), claimed: Some(claimed) })
            }
            Claim::Full => Claim::Full,
            Claim::Stale => Claim::Stale,
        }
    }

    /// Take back what the client holds. Only once its process is gone.
    pub fn reap(&self) -> usize {
        self.ring.reap()
    }

    /// Say how the daemon is, and make a waiting client look at its socket. Send the message first.
    pub fn set_state(&self, state: DaemonState) {
        self.ring.set_state(state);
    }

    /// Make a waiting client look: at its socket, after a message was sent, or out for a batch that comes soon.
    pub fn notify(&self) {
        self.ring.notify();
    }

    /// Wake threads that wait in [`Self::claim`], to end early with [`Claim::Full`] or [`Claim::Stale`] or to go on.
    pub fn interrupt(&self) {
        self.ring.interrupt_producers();
    }

    pub fn occupancy(&self) -> Occupancy {
        self.ring.occupancy()
    }
}

/// A slot being filled. Dropped unpublished, it is abandoned: the slot is free again.
#[derive(Debug)]
#[must_use = "dropping it abandons the slot"]
pub struct Filling {
    producer: Arc<Producer>,
    /// `None` only after `publish`.
    claimed: Option<Claimed>,
}

impl Filling {
    /// Which slot this is.
    pub fn slot(&self) -> usize {
        self.claimed.as_ref().map_or(usize::MAX, Claimed::slot)
    }

    pub(crate) fn segment(&self) -> &DaemonSegment {
        self.producer.ring.memory()
    }

    /// Write the sample ids. More than `batch_size` are a bug of the caller's; what is too much is left out.
    pub fn set_ids(&mut self, ids: impl ExactSizeIterator<Item = u64>) {
        let room = self.producer.shape().batch_size as usize;
        debug_assert!(ids.len() <= room, "{} ids for a batch of {room}", ids.len());
        let bytes = self.bytes_mut().get_mut(HEADER_BYTES..HEADER_BYTES + 8 * room).unwrap_or_default();
        for (field, id) in bytes.chunks_exact_mut(8).zip(ids.chain(std::iter::repeat(0))) {
            field.copy_from_slice(&id.to_le_bytes());
        }
    }

    /// Write the header and hand the slot to the client. `header.run` is the run that was claimed for.
    pub fn publish(mut self, header: &BatchHeader) -> Published {
        if let Some(place) = self.bytes_mut().first_chunk_mut::<HEADER_BYTES>() {
            *place = header.encode();
        }
        match self.claimed.take() {
            Some(claimed) => self.producer.ring.publish(claimed, header.seq),
            None => Published::Stale,
        }
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        if let Some(claimed) = self.claimed.take() {
            self.producer.ring.abandon(claimed);
        }
    }
}
