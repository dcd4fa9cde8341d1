//! The next batches of one rank, in order: which anchors, in which episodes.
//!
//! Walks the epoch order from a position on, over epoch ends, and keeps what it has looked at so that nothing is
//! permuted twice. The front is the batch to be made next. What it sees it tells the [`Future`] that the store
//! evicts by.

use std::collections::VecDeque;
use std::sync::Arc;

use robocache_wire::batch::BatchHeader;
use robocache_wire::epoch::Share;
use robocache_wire::spec::{LoaderSpec, Position};

use crate::anchors::Place;
use crate::future::Future;
use crate::plan::Plan;

/// One batch to be made.
#[derive(Debug, Clone)]
pub struct Planned {
    pub header: BatchHeader,
    /// Anchor number and place of every sample.
    pub samples: Vec<(u64, Place)>,
    /// The episodes of the samples, each once, ascending.
    pub episodes: Vec<u32>,
}

/// Where one run of one loader is in its order, and what lies ahead.
#[derive(Debug)]
pub struct Lookahead {
    plan: Arc<Plan>,
    future: Arc<Future>,
    ahead: VecDeque<Planned>,
    share: Share,
    run: u32,
    epoch: u64,
    /// Next batch to look at: within this rank's part of the epoch, and within the run.
    batch: u64,
    seq: u64,
    /// How many of `ahead` the store was asked for.
    asked: usize,
}

/// Batches asked for together, so that episodes of one file are read together.
const TOGETHER: usize = 8;

impl Lookahead {
    pub fn new(plan: Arc<Plan>, spec: &LoaderSpec, future: Arc<Future>) -> Self {
        let share = Share {
            anchors: plan.anchors.len(),
            consumed: 0,
            rank: spec.rank,
            world_size: spec.world_size,
            batch_size: spec.batch_size,
            drop_last: spec.drop_last,
        };
        Self { plan, future, ahead: VecDeque::new(), share, run: 0, epoch: 0, batch: 0, seq: 0, asked: 0 }
    }

    /// Whether there will ever be a batch: an epoch may be too small for a rank.
    pub fn is_endless(&self) -> bool {
        Share { consumed: 0, ..self.share }.batches() > 0
    }

    /// Starts run `run` at `position`.
    pub fn begin(&mut self, run: u32, position: Position) {
        self.ahead.clear();
        self.future.clear();
        self.run = run;
        self.epoch = position.epoch;
        self.share.consumed = position.consumed;
        self.batch = 0;
        self.seq = 0;
        self.asked = 0;
    }

    /// Looks ahead until `batches` are known, or more than `samples` samples.
    pub fn extend_to(&mut self, batches: usize, samples: usize) {
        let per_batch = self.share.batch_size as usize;
        let enough = batches.min((samples / per_batch).max(2));
        while self.is_endless() && self.ahead.len() < enough {
            let planned = self.look();
            self.future.expect(planned.header.seq, &planned.episodes);
            self.ahead.push_back(planned);
        }
    }

    /// The episodes of the batch to be made next.
    pub fn next_episodes(&self) -> &[u32] {
        self.ahead.front().map_or(&[], |planned| &planned.episodes)
    }

    /// The episodes of the next batches that the store was not asked for, and how far off the last of these is:
    /// nothing needed sooner than that may go for them.
    pub fn to_ask(&self) -> Option<(u64, Vec<u32>)> {
        let first = self.asked.max(1);
        let last = (first + TOGETHER).min(self.ahead.len());
        let group = self.ahead.range(first.min(last)..last);
        let mut episodes: Vec<u32> = group.flat_map(|planned| planned.episodes.iter().copied()).collect();
        if episodes.is_empty() {
            return None;
        }
        episodes.sort_unstable();
        episodes.dedup();
        Some((last as u64 - 1, episodes))
    }

    /// The store took what [`Lookahead::to_ask`] named.
    pub fn asked(&mut self) {
        self.asked = (self.asked.max(1) + TOGETHER).min(self.ahead.len());
    }

    /// Takes the next batch, which [`Lookahead::extend_to`] has looked at.
    pub fn pop(&mut self) -> Option<Planned> {
        self.asked = self.asked.saturating_sub(1);
        self.ahead.pop_front()
    }

    fn look(&mut self) -> Planned {
        while self.batch >= self.share.batches() {
            self.epoch += 1;
            self.share.consumed = 0;
            self.batch = 0;
        }
        let order = self.plan.order.epoch(self.epoch);
        let rows = self.share.rows(self.batch);
        let mut samples = Vec::with_capacity(rows as usize);
        let mut episodes: Vec<u32> = Vec::with_capacity(rows as usize);
        for row in 0..rows {
            let anchor = order.anchor(self.share.position(self.batch, row));
            let place = self.plan.anchors.place(anchor);
            samples.push((anchor, place));
            episodes.push(place.episode);
        }
        episodes.sort_unstable();
        episodes.dedup();
        let header = BatchHeader {
            seq: self.seq,
            epoch: self.epoch,
            batch: self.batch,
            rows,
            last_of_epoch: self.batch + 1 == self.share.batches(),
            run: self.run,
            consumed_before: self.share.consumed_after(self.batch),
            assemble_ns: 0,
        };
        self.batch += 1;
        self.seq += 1;
        Planned { header, samples, episodes }
    }
}
