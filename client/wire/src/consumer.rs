//! The client's end of a ring, with a guard: a slot that was leased is released once, by the process that leased it.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use crate::batch::{BatchHeader, BatchHeaderError, HEADER_BYTES};
use crate::ring::{ConsumerRing, Leased, Occupancy, ReleaseRefused, TryLease};
use crate::segment::{ClientSegment, Forked, SegmentError, Shape};
use crate::slot::Owner;
use crate::spec::LoaderInfo;
use crate::sync::Waited;
use crate::words::DaemonState;

/// A ring that this process reads.
#[derive(Debug)]
pub struct Consumer {
    ring: ConsumerRing<ClientSegment>,
}

impl Consumer {
    /// Map and check what came with `Opened`.
    pub fn open(control: impl AsFd, data: impl AsFd, info: &LoaderInfo) -> Result<Arc<Self>, SegmentError> {
        let owner = Owner::client(info.client).ok_or(SegmentError::Client { found: info.client })?;
        let segment = ClientSegment::open(control, data, info)?;
        Ok(Arc::new(Self { ring: ConsumerRing::new(segment, owner) }))
    }

    pub fn shape(&self) -> &Shape {
        self.ring.memory().shape()
    }

    /// Lease batch `seq` of `run`, if it is ready. No system call, no allocation.
    #[inline]
    pub fn try_lease(self: &Arc<Self>, run: u32, seq: u64) -> TryLease<Lease> {
        match self.ring.try_lease(run, seq) {
            TryLease::Leased(leased) => {
                TryLease::Leased(Lease { consumer: Arc::clone(self), leased: Some(leased) })
            }
            TryLease::NotReady { filling } => TryLease::NotReady { filling },
            TryLease::AllHeld => TryLease::AllHeld,
        }
    }

    /// The counter to read before [`Self::try_lease`] and to hand to [`Self::wait`] after.
    #[inline]
    pub fn published(&self) -> u32 {
        self.ring.published()
    }

    /// Wait until the daemon has done something since `seen` was read, `limit` at most.
    pub fn wait(&self, seen: u32, limit: Duration) -> Waited {
        self.ring.wait(seen, limit)
    }

    pub fn daemon_state(&self) -> Option<DaemonState> {
        self.ring.daemon_state()
    }

    pub fn occupancy(&self) -> Occupancy {
        self.ring.occupancy()
    }

    /// Whether this process is a forked child of the one that opened the ring. No system call.
    #[inline]
    pub fn forked(&self) -> Forked {
        self.ring.memory().forked()
    }
}

/// A leased slot: its bytes stay as they are until this is dropped. In a forked child a drop releases nothing.
#[derive(Debug)]
#[must_use = "dropping it gives the slot back"]
pub struct Lease {
    consumer: Arc<Consumer>,
    /// `None` only after `release`.
    leased: Option<Leased>,
}

impl Lease {
    /// Which slot this is.
    pub fn slot(&self) -> usize {
        self.leased.as_ref().map_or(usize::MAX, Leased::slot)
    }

    pub(crate) fn segment(&self) -> &ClientSegment {
        self.consumer.ring.memory()
    }

    pub fn consumer(&self) -> &Arc<Consumer> {
        &self.consumer
    }

    /// The batch header, checked.
    pub fn header(&self) -> Result<BatchHeader, BatchHeaderError> {
        BatchHeader::decode(self.bytes(), self.consumer.shape().batch_size)
    }

    /// The sample ids of the first `rows` rows.
    pub fn ids(&self, rows: u32) -> impl ExactSizeIterator<Item = u64> + '_ {
        let rows = rows.min(self.consumer.shape().batch_size) as usize;
        let bytes = self.bytes().get(HEADER_BYTES..HEADER_BYTES + 8 * rows).unwrap_or_default();
        bytes.chunks_exact(8).map(|field| {
            let mut id = [0; 8];
            id.copy_from_slice(field);
            u64::from_le_bytes(id)
        })
    }

    /// Give the slot back and learn whether it still was ours. Dropping does the same without telling.
    pub fn release(mut self) -> Result<(), ReleaseRefused> {
        self.give_back()
    }

    /// End the lease and leave the slot as it is, never to be filled again: for a reader that cannot tell when it is done.
    pub fn forfeit(mut self) {
        self.leased = None;
    }

    fn give_back(&mut self) -> Result<(), ReleaseRefused> {
        match (self.leased.take(), self.consumer.forked()) {
            (Some(leased), Forked::Same) => self.consumer.ring.release(leased),
            // In a forked child the lease is the parent's to end.
            (Some(_), Forked::Child) | (None, _) => Ok(()),
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // A refusal means that the daemon took the slot back already: nothing is left to do.
        self.give_back().ok();
    }
}
