//! Which samples of an epoch are whose: arithmetic that the daemon and its clients must agree on.
//!
//! An epoch is a sequence of `anchors` samples in a global order. From `consumed` on, rank `r` of `w` takes the
//! positions `consumed + r + k * w` and cuts them into batches of `b`. After `n` whole batches each, all ranks
//! together have taken exactly the next `n * b * w` positions; hence one number says where every rank is.

/// One rank's part of one epoch, from a given position on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Samples of the whole epoch.
    pub anchors: u64,
    /// Positions of the global order that are done with.
    pub consumed: u64,
    pub rank: u32,
    pub world_size: u32,
    pub batch_size: u32,
    /// Leave out what does not fill a batch on every rank, so that all ranks see as many batches.
    pub drop_last: bool,
}

impl Share {
    /// Samples left for this rank.
    pub fn samples(&self) -> u64 {
        let left = self.anchors.saturating_sub(self.consumed);
        let world = u64::from(self.world_size);
        if self.drop_last {
            let group = world * u64::from(self.batch_size);
            return left / group * u64::from(self.batch_size);
        }
        left.saturating_sub(u64::from(self.rank)).div_ceil(world)
    }

    /// Batches left for this rank.
    pub fn batches(&self) -> u64 {
        self.samples().div_ceil(u64::from(self.batch_size))
    }

    /// Rows of this rank's batch `batch`; 0 past the end.
    pub fn rows(&self, batch: u64) -> u32 {
        let before = batch.saturating_mul(u64::from(self.batch_size));
        let left = self.samples().saturating_sub(before).min(u64::from(self.batch_size));
        u32::try_from(left).unwrap_or(self.batch_size)
    }

    /// Position in the global order of row `row` of this rank's batch `batch`.
    pub fn position(&self, batch: u64, row: u32) -> u64 {
        let nth = batch * u64::from(self.batch_size) + u64::from(row);
        self.consumed + u64::from(self.rank) + nth * u64::from(self.world_size)
    }

    /// `consumed` once every rank has taken `batches` batches; never more than `anchors`.
    pub fn consumed_after(&self, batches: u64) -> u64 {
        let group = u64::from(self.batch_size) * u64::from(self.world_size);
        self.consumed.saturating_add(batches.saturating_mul(group)).min(self.anchors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ranks_share_what_is_left_exactly_once(
            anchors in 0_u64..500, consumed in 0_u64..600, world_size in 1_u32..8, batch_size in 1_u32..20
        ) {
            let mut seen: Vec<u64> = Vec::new();
            for rank in 0..world_size {
                let share = Share { anchors, consumed, rank, world_size, batch_size, drop_last: false };
                for batch in 0..share.batches() {
                    prop_assert!(share.rows(batch) > 0);
                    seen.extend((0..share.rows(batch)).map(|row| share.position(batch, row)));
                }
                prop_assert_eq!(share.rows(share.batches()), 0);
            }
            seen.sort_unstable();
            prop_assert_eq!(seen, (consumed..anchors.max(consumed)).collect::<Vec<_>>());
        }

        #[test]
        fn with_drop_last_every_rank_sees_as_many_whole_batches(
            anchors in 0_u64..500, world_size in 1_u32..8, batch_size in 1_u32..20
        ) {
            let share = |rank| Share { anchors, consumed: 0, rank, world_size, batch_size, drop_last: true };
            for rank in 0..world_size {
                prop_assert_eq!(share(rank).batches(), share(0).batches());
                for batch in 0..share(rank).batches() {
                    prop_assert_eq!(share(rank).rows(batch), batch_size);
                    prop_assert!(share(rank).position(batch, batch_size - 1) < anchors);
                }
            }
        }

        #[test]
        fn another_world_size_goes_on_where_the_last_one_stopped(
            anchors in 1_u64..500, old in 1_u32..8, new in 1_u32..8, batch_size in 1_u32..20, done in 0_u64..10
        ) {
            let share = |rank, world_size, consumed| {
                Share { anchors, consumed, rank, world_size, batch_size, drop_last: false }
            };
            let mut seen: Vec<u64> = Vec::new();
            for rank in 0..old {
                let before = share(rank, old, 0);
                for batch in 0..done {
                    seen.extend((0..before.rows(batch)).map(|row| before.position(batch, row)));
                }
            }
            let consumed = share(0, old, 0).consumed_after(done);
            for rank in 0..new {
                let after = share(rank, new, consumed);
                for batch in 0..after.batches() {
                    seen.extend((0..after.rows(batch)).map(|row| after.position(batch, row)));
                }
            }
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..anchors).collect::<Vec<_>>());
        }
    }
}
