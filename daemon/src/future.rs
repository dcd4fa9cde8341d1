//! What a loader will need and when: the part of its order that it has looked at, for the store to evict by.
//!
//! Batches are numbered as the loader dispatches them. An episode's distance is the number of batches until it is
//! needed next, as far as the loader has looked; beyond that it is none.

use std::collections::{HashMap, VecDeque};

use parking_lot::{Mutex, MutexGuard};

/// One loader's known future on one dataset.
#[derive(Debug)]
pub struct Future {
    dataset: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    now: u64,
    /// Batches that need an episode, ascending.
    needs: HashMap<u32, VecDeque<u64>>,
}

impl Future {
    pub fn new(dataset: u64) -> Self {
        Self { dataset, state: Mutex::default() }
    }

    /// Batch `batch`, later than any told before, needs these episodes (each named once).
    pub fn expect(&self, batch: u64, episodes: &[u32]) {
        let mut state = self.state.lock();
        for &episode in episodes {
            state.needs.entry(episode).or_default().push_back(batch);
        }
    }

    /// Batch `batch` has all it needs.
    pub fn done(&self, batch: u64, episodes: &[u32]) {
        let mut state = self.state.lock();
        state.now = batch + 1;
        for episode in episodes {
            let Some(needs) = state.needs.get_mut(episode) else { continue };
            while needs.front().is_some_and(|&need| need <= batch) {
                needs.pop_front();
            }
            if needs.is_empty() {
                state.needs.remove(episode);
            }
        }
    }

    /// Forgets everything: the loader goes on elsewhere.
    pub fn clear(&self) {
        self.state.lock().needs.clear();
    }

    /// A look at it that nobody changes meanwhile.
    pub fn look(&self) -> Look<'_> {
        Look { dataset: self.dataset, state: self.state.lock() }
    }
}

/// A future, held still.
#[derive(Debug)]
pub struct Look<'a> {
    dataset: u64,
    state: MutexGuard<'a, State>,
}

impl Look<'_> {
    /// Batches until the episode is needed; none if that is not known to happen.
    pub fn distance(&self, dataset: u64, episode: u32) -> Option<u64> {
        if dataset != self.dataset {
            return None;
        }
        let next = self.state.needs.get(&episode)?.front()?;
        Some(next.saturating_sub(self.state.now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distance_counts_batches_until_the_next_need() {
        let future = Future::new(1);
        let distances = |episodes: [u32; 2]| {
            let look = future.look();
            episodes.map(|episode| look.distance(1, episode))
        };
        future.expect(0, &[7, 8]);
        future.expect(3, &[7]);
        assert_eq!(distances([7, 8]), [Some(0), Some(0)]);
        future.done(0, &[7, 8]);
        assert_eq!(distances([7, 8]), [Some(2), None]);
        assert_eq!(future.look().distance(2, 7), None);
        future.clear();
        assert_eq!(distances([7, 8]), [None, None]);
    }
}
