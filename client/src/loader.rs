//! The iterator: leases batches in order, waits, notices who is alive, and knows where it is.
//!
//! ```text
//!   next ── the epoch has no batch left ──▶ EpochEnd, the next epoch begins
//!     └─ try to lease (run, seq) ── ready ─▶ Batch
//!          └─ not ready ─▶ spin, sleep on `published` for 50 ms at most ─▶ try again
//!                            └─ nothing came: read the socket: Failed, Draining, hang-up
//! ```
//!
//! What ends production is told only after everything published before it was delivered. On the path of a ready batch
//! there is no system call and no allocation.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use robocache_wire::batch::BatchHeader;
use robocache_wire::consumer::{Consumer, Lease};
use robocache_wire::epoch::Share;
use robocache_wire::fds::{Connection, Receive, Received, SocketError};
use robocache_wire::message::{ToClient, ToDaemon};
use robocache_wire::ring::{Occupancy, TryLease};
use robocache_wire::segment::Forked;
use robocache_wire::spec::{ColumnInfo, LoaderInfo, Position};
use robocache_wire::sync::Waited;
use robocache_wire::words::DaemonState;

use crate::batch::{Batch, Shared};
use crate::builder::LoaderBuilder;
use crate::connect::SEND_PATIENCE;
use crate::embedded::Embedded;
use crate::error::LoaderError;
use crate::gpu::{Gpu, Ring};
use crate::text::TextTable;

/// How long a sleep lasts before somebody looks whether the daemon lives.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How long all slots may be held before that is an error: another thread may be about to give one back.
const HELD_GRACE: Duration = Duration::from_millis(500);
/// How long a wait for a batch on a GPU spins before it sleeps.
const SPIN_ON_GPU: Duration = Duration::from_micros(200);
/// Longest wait of one `next_timeout` call inside `next_batch`.
const LONG: Duration = Duration::from_secs(3600);

/// A stream of batches from the daemon: this rank's share of one epoch after the other.
#[derive(Debug)]
pub struct Loader {
    shared: Arc<Shared>,
    consumer: Arc<Consumer>,
    connection: Arc<Connection>,
    socket: PathBuf,
    run: u32,
    /// Number of the next batch within the run.
    seq: u64,
    /// The epoch of the next batch, and where the run entered it.
    entered: Position,
    /// Number of the next batch within the epoch, counted from `entered`.
    batch: u64,
    ends: Ends,
    last_look: Option<Instant>,
    held_since: Option<Instant>,
    /// Last, so that the connection is closed before the daemon is stopped.
    _embedded: Option<Arc<Embedded>>,
}

/// What the daemon said or did that ends production.
#[derive(Debug, Default)]
struct Ends {
    failed: Option<(u64, String)>,
    draining: Option<String>,
    gone: bool,
}

/// What a wait with a limit brought.
#[derive(Debug)]
pub enum Next {
    Batch(Batch),
    /// The epoch is over; the next call begins the next one.
    EpochEnd,
    TimedOut,
}

impl Loader {
    /// Say what the loader is made of. `dataset` is a path if it exists or contains a `/`, else the name of a dataset
    /// that the daemon serves.
    pub fn builder(dataset: impl AsRef<Path>) -> LoaderBuilder {
        LoaderBuilder::new(dataset.as_ref())
    }

    pub(crate) fn attached(
        shared: Arc<Shared>,
        consumer: Arc<Consumer>,
        connection: Arc<Connection>,
        start: Position,
        socket: PathBuf,
        embedded: Option<Arc<Embedded>>,
    ) -> Self {
        Self {
            shared,
            consumer,
            connection,
            socket,
            run: 0,
            seq: 0,
            entered: start,
            batch: 0,
            ends: Ends::default(),
            last_look: None,
            held_since: None,
            _embedded: embedded,
        }
    }

    /// What the daemon said of this loader.
    pub fn info(&self) -> &LoaderInfo {
        &self.shared.info
    }

    /// The columns of every batch, in order.
    pub fn columns(&self) -> &[ColumnInfo] {
        &self.shared.info.columns
    }

    /// The device that batches are on; `None` where they are in host memory.
    pub fn gpu(&self) -> Option<&Gpu> {
        self.shared.ring.as_ref().map(Ring::gpu)
    }

    /// The socket of the daemon, an embedded one's included.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The `i`-th text table of [`LoaderInfo::text_tables`].
    pub fn text_table(&self, i: usize) -> Option<&TextTable> {
        self.shared.texts.get(i)
    }

    /// The state of the ring's slots.
    pub fn occupancy(&self) -> Occupancy {
        self.consumer.occupancy()
    }

    /// Batches left in this rank's epoch.
    pub fn batches(&self) -> u64 {
        self.share().batches().saturating_sub(self.batch)
    }

    /// The epoch the next batch belongs to.
    pub const fn epoch(&self) -> u64 {
        self.entered.epoch
    }

    /// Where a new loader goes on with exactly the batch this one would deliver next.
    pub fn position(&self) -> Position {
        self.here()
    }

    /// [`Self::position`], by a name that [`Iterator::position`] does not hide from `&mut self`.
    fn here(&self) -> Position {
        let consumed =
            if self.batch == 0 { self.entered.consumed } else { self.share().consumed_after(self.batch) };
        Position { epoch: self.entered.epoch, consumed }
    }

    /// Go on at `position`. Batches in hand stay valid.
    pub fn seek(&mut self, position: Position) -> Result<(), LoaderError> {
        self.check_process()?;
        let anchors = self.shared.info.anchors;
        if position.consumed > anchors {
            return Err(LoaderError::Position { consumed: position.consumed, anchors });
        }
        if position == self.here() && self.ends.failed.is_none() {
            return Ok(());
        }
        let run = self.run.wrapping_add(1);
        match self.connection.send(&ToDaemon::Seek { run, position }, &[], SEND_PATIENCE) {
            Ok(()) => {}
            Err(SocketError::Closed) => {
                self.ends.gone = true;
                return Err(self.gone());
            }
            Err(error) => return Err(error.into()),
        }
        self.run = run;
        self.seq = 0;
        self.entered = position;
        self.batch = 0;
        self.ends.failed = None;
        self.held_since = None;
        Ok(())
    }

    /// The next batch, waiting as long as the daemon lives; `None` at the end of the epoch, after which the next
    /// call begins the next epoch.
    pub fn next_batch(&mut self) -> Result<Option<Batch>, LoaderError> {
        loop {
            match self.next_timeout(LONG)? {
                Next::Batch(batch) => return Ok(Some(batch)),
                Next::EpochEnd => return Ok(None),
                Next::TimedOut => {}
            }
        }
    }

    /// As [`Self::next_batch`], waiting `limit` at most.
    pub fn next_timeout(&mut self, limit: Duration) -> Result<Next, LoaderError> {
        self.check_process()?;
        let share = self.share();
        if self.batch >= share.batches() {
            self.entered = Position { epoch: self.entered.epoch.saturating_add(1), consumed: 0 };
            self.batch = 0;
            return Ok(Next::EpochEnd);
        }
        // The usual case asks neither clock nor kernel.
        let mut seen = self.consumer.published();
        let mut tried = self.consumer.try_lease(self.run, self.seq);
        let mut start = None;
        loop {
            match tried {
                TryLease::Leased(lease) => return self.accept(lease, &share).map(Next::Batch),
                TryLease::NotReady { filling } => {
                    self.held_since = None;
                    self.retry_releases();
                    self.check_ends(filling)?;
                }
                TryLease::AllHeld => {
                    self.retry_releases();
                    self.check_held()?;
                }
            }
            let left = limit.saturating_sub(start.get_or_insert_with(Instant::now).elapsed());
            let waited = if left.is_zero() {
                Waited::TimedOut
            } else if self.shared.ring.is_some() && self.comes_soon(seen, left.min(SPIN_ON_GPU)) {
                Waited::Woken
            } else {
                self.consumer.wait(seen, left.min(LOOK_EVERY))
            };
            if waited == Waited::TimedOut || self.consumer.daemon_state() != Some(DaemonState::Serving) {
                self.look()?;
            }
            seen = self.consumer.published();
            tried = self.consumer.try_lease(self.run, self.seq);
            if left.is_zero() && !matches!(tried, TryLease::Leased(_)) {
                return Ok(Next::TimedOut);
            }
        }
    }

    /// Batches of a GPU that were dropped while they could not be given back.
    fn retry_releases(&self) {
        if let Some(ring) = &self.shared.ring {
            ring.retry();
        }
    }

    /// Spins until the daemon has done something since `seen` was read, `limit` at most: going to sleep and being woken
    /// takes longer than a batch on a GPU.
    fn comes_soon(&self, seen: u32, limit: Duration) -> bool {
        let start = Instant::now();
        while start.elapsed() < limit {
            for _ in 0..64 {
                if self.consumer.published() != seen {
                    return true;
                }
                std::hint::spin_loop();
            }
        }
        false
    }

    fn share(&self) -> Share {
        let LoaderInfo { anchors, rank, world_size, batch_size, drop_last, .. } = self.shared.info;
        Share { anchors, consumed: self.entered.consumed, rank, world_size, batch_size, drop_last }
    }

    #[inline]
    fn check_process(&self) -> Result<(), LoaderError> {
        match self.consumer.forked() {
            Forked::Same => Ok(()),
            Forked::Child => Err(LoaderError::Forked),
        }
    }

    /// Take a leased batch, if it is the one that must come next.
    fn accept(&mut self, lease: Lease, share: &Share) -> Result<Batch, LoaderError> {
        self.held_since = None;
        let header = lease.header().map_err(|error| LoaderError::Protocol { what: error.to_string() })?;
        let batches = share.batches();
        let wanted = BatchHeader {
            seq: self.seq,
            epoch: self.entered.epoch,
            batch: self.batch,
            rows: share.rows(self.batch),
            last_of_epoch: self.batch + 1 == batches,
            run: self.run,
            consumed_before: self.here().consumed,
            assemble_ns: header.assemble_ns,
        };
        if header != wanted {
            let what = format!("the next batch must be {wanted:?}, it is {header:?}");
            return Err(LoaderError::Protocol { what });
        }
        self.seq += 1;
        self.batch += 1;
        Ok(Batch::new(lease, Arc::clone(&self.shared), header, self.here()))
    }

    /// Whether the batch that is not ready will never come. Called after a look at the slots that came after
    /// whatever told us so.
    fn check_ends(&self, filling: u32) -> Result<(), LoaderError> {
        let position = self.here();
        if let Some((seq, message)) = &self.ends.failed
            && self.seq >= *seq
        {
            return Err(LoaderError::Failed { message: message.clone(), position });
        }
        match &self.ends.draining {
            Some(reason) if filling == 0 || self.ends.gone => {
                Err(LoaderError::Draining { reason: reason.clone(), position })
            }
            None if self.ends.gone => Err(self.gone()),
            _ => Ok(()),
        }
    }

    fn gone(&self) -> LoaderError {
        LoaderError::DaemonGone { pid: self.shared.info.daemon_pid, position: self.here() }
    }

    fn check_held(&mut self) -> Result<(), LoaderError> {
        if self.held_since.get_or_insert_with(Instant::now).elapsed() < HELD_GRACE {
            return Ok(());
        }
        self.held_since = None;
        Err(LoaderError::AllSlotsHeld { slots: self.shared.info.slots })
    }

    /// Read what the daemon has said, and see whether it is still there.
    fn look(&mut self) -> Result<(), LoaderError> {
        // A caller with a short limit asks often; the daemon's state word says when there is something to read.
        let due = self.last_look.is_none_or(|last| last.elapsed() >= LOOK_EVERY);
        if self.ends.gone || (!due && self.consumer.daemon_state() == Some(DaemonState::Serving)) {
            return Ok(());
        }
        self.last_look = Some(Instant::now());
        loop {
            match self.connection.receive::<ToClient>(Receive::Now)? {
                Received::Nothing => return Ok(()),
                Received::Closed => {
                    self.ends.gone = true;
                    return Ok(());
                }
                Received::Message(ToClient::Failed { run, seq, message }, _) => {
                    // An older run's failure is of no interest any more.
                    if run == self.run {
                        self.ends.failed = Some((seq, message));
                    }
                }
                Received::Message(ToClient::Draining { reason }, _) => self.ends.draining = Some(reason),
                Received::Message(ToClient::Refused { code, message }, _) => {
                    return Err(LoaderError::Refused { code, message });
                }
                Received::Message(other, _) => {
                    let what = format!("it said {other:?} to a loader");
                    return Err(LoaderError::Protocol { what });
                }
            }
        }
    }
}

/// One epoch, then `None`, then the next epoch.
impl Iterator for Loader {
    type Item = Result<Batch, LoaderError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_batch().transpose()
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        // A ring on a GPU is closed with its last batch, and says it then ([`crate::gpu::Ring`]).
        if self.shared.ring.is_none() && self.consumer.forked() == Forked::Same && !self.ends.gone {
            // A courtesy: the close that follows says the same. In a forked child the connection is the parent's.
            self.connection.send(&ToDaemon::Bye, &[], Duration::ZERO).ok();
        }
    }
}
