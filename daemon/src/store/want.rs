//! The loaders' side of the store: asking for episodes ahead of time, and waiting for those that are needed now.
//!
//! What is needed now is always taken, and is the only thing anybody waits for. A wish for later may be turned down,
//! and is then made again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use robocache_formats::ReadError;

use super::dataset::{Columns, DatasetStore};
use super::ledger::Ledger;

/// Units up to this many bytes are read whole, even when one episode is wanted: seeking costs more.
const WHOLE_UNIT_BYTES: u64 = 32 << 20;

/// How soon an episode is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// A batch waits for it.
    Now,
    /// In about this many batches.
    In(u64),
}

/// Whether the store took a wish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// It is resident or being read.
    Taken,
    /// There is no room for what is not needed now.
    Full,
}

/// Why a wait for an episode ended without it.
#[derive(Debug, Clone)]
pub enum WaitError {
    Read(Arc<ReadError>),
    /// The waiter was told to stop.
    Stopped,
}

impl DatasetStore {
    /// Asks for episodes. Those of one unit are read together; the whole unit, where that is cheap and fits.
    pub fn want(self: &Arc<Self>, episodes: &[u32], streams: &[usize], need: Need) -> Admission {
        if episodes.iter().all(|&episode| self.get(episode, streams).is_some()) {
            return Admission::Taken;
        }
        let mut ledger = self.store.ledger.lock();
        let mut by_unit: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for &episode in episodes {
            if streams.iter().any(|&stream| self.absent(&ledger, episode, stream)) {
                by_unit.entry(self.unit_of[episode as usize]).or_default().push(episode);
            }
        }
        for (unit, wanted) in by_unit {
            if self.want_of_unit(&mut ledger, unit, wanted, streams, need) == Admission::Full {
                return Admission::Full;
            }
        }
        Admission::Taken
    }

    /// Whether a stream of an episode is neither resident nor on its way.
    fn absent(&self, ledger: &Ledger, episode: u32, stream: usize) -> bool {
        self.get(episode, &[stream]).is_none() && !ledger.is_loading(self.id(), episode, stream)
    }

    fn want_of_unit(
        self: &Arc<Self>,
        ledger: &mut Ledger,
        unit: u32,
        wanted: Vec<u32>,
        streams: &[usize],
        need: Need,
    ) -> Admission {
        let store = &self.store;
        // Others may have brought, or be bringing, some of the streams: those of all that is wanted are left out.
        let missing = |stream: &usize| wanted.iter().any(|&e| self.absent(ledger, e, *stream));
        let streams: Vec<usize> = streams.iter().copied().filter(missing).collect();
        let streams = &*streams;
        if matches!(need, Need::In(_))
            && !wanted.iter().all(|&episode| self.sizes_are_known(episode, streams))
        {
            return Admission::Full;
        }
        let number = |&e: &usize| u32::try_from(e).expect("episodes are numbered in u32");
        let unit = self.units[unit as usize].iter().map(number);
        let absent = |&episode: &u32| streams.iter().any(|&stream| self.absent(ledger, episode, stream));
        let whole: Vec<u32> = unit.filter(absent).collect();
        let bytes = |episodes: &[u32]| episodes.iter().map(|&e| self.expected_bytes(e, streams)).sum::<u64>();
        let free = store.budget().saturating_sub(ledger.spoken_for());
        let cheap = bytes(&whole) <= WHOLE_UNIT_BYTES || matches!(need, Need::In(_));
        let episodes = if bytes(&whole) <= free && cheap { whole } else { wanted };
        let incoming = bytes(&episodes);
        match (store.make_room(ledger, incoming, Some(need)), need) {
            (Admission::Full, Need::In(_)) => return Admission::Full,
            (Admission::Full, Need::Now) if !ledger.warned_over_budget => {
                ledger.warned_over_budget = true;
                tracing::warn!(
                    budget = store.budget(),
                    used = ledger.used(),
                    incoming,
                    "the memory budget does not hold what the next batches need at once; going over it for them"
                );
            }
            _ => {}
        }
        store.enqueue(ledger, self, episodes, streams, need);
        Admission::Taken
    }

    /// Waits for an episode that was wanted; wants it again if it went meanwhile. `stop` is asked now and then.
    pub fn wait(
        self: &Arc<Self>,
        episode: u32,
        streams: &[usize],
        stop: &dyn Fn() -> bool,
    ) -> Result<Arc<Columns>, WaitError> {
        if let Some(columns) = self.get(episode, streams) {
            self.store.counters.hits.fetch_add(1, Ordering::Relaxed);
            return Ok(columns);
        }
        self.store.counters.misses.fetch_add(1, Ordering::Relaxed);
        loop {
            self.want(&[episode], streams, Need::Now); // what is needed now is always taken
            let mut ledger = self.store.ledger.lock();
            loop {
                if stop() || self.store.closing.load(Ordering::SeqCst) {
                    return Err(WaitError::Stopped);
                }
                if let Some(error) = ledger.take_failure(self.id(), episode, streams) {
                    return Err(WaitError::Read(error));
                }
                if let Some(columns) = self.get(episode, streams) {
                    return Ok(columns);
                }
                if !streams.iter().any(|&stream| ledger.is_loading(self.id(), episode, stream)) {
                    break; // evicted before we looked
                }
                self.store.promote(&mut ledger, self.id(), episode);
                self.store.settled.wait_for(&mut ledger, Duration::from_millis(100));
            }
        }
    }
}
