//! What of a dataset a device can read already, and where: the tiers' index, found without hashing or following.
//!
//! Owns the memory of what it names: entries and memory go together, when the whole dataset goes.

use std::sync::Arc;

use crate::gpu::arena::Block;
use crate::gpu::describe::View;
use crate::gpu::device::Memory;

/// What of a dataset is here. It is looked at for every sample, so that it is found without hashing or following.
#[derive(Debug, Default)]
pub(super) struct Resident {
    /// By stream (its place in the dataset), and then by episode.
    streams: Vec<(usize, Vec<Option<Entry>>)>,
    /// Their memory.
    keep: Vec<Box<dyn Keep>>,
}

impl Resident {
    pub(super) fn add(&mut self, position: usize, episode: u32, entry: Entry, keep: Box<dyn Keep>) {
        let known = self.streams.iter().position(|(place, _)| *place == position);
        let known = known.unwrap_or_else(|| {
            self.streams.push((position, Vec::new()));
            self.streams.len() - 1
        });
        let (episodes, episode) = (&mut self.streams[known].1, episode as usize);
        if episodes.len() <= episode {
            episodes.resize(episode + 1, None);
        }
        episodes[episode] = Some(entry);
        self.keep.push(keep);
    }

    /// An entry whose bytes never came. Its memory stays until the dataset goes.
    pub(super) fn forget(&mut self, position: usize, episode: u32) {
        let stream = self.streams.iter_mut().find(|(place, _)| *place == position);
        if let Some(entry) = stream.and_then(|(_, episodes)| episodes.get_mut(episode as usize)) {
            *entry = None;
        }
    }

    /// By episode.
    pub(super) fn stream(&self, position: usize) -> &[Option<Entry>] {
        self.streams.iter().find(|(place, _)| *place == position).map_or(&[], |(_, episodes)| episodes)
    }
}

/// Where one stream of one episode lies.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    pub(super) view: View,
    pub(super) tier: Tier,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tier {
    Cache,
    Pinned,
    Passing,
}

/// Memory that stays as it is while this is held.
pub(super) trait Keep: std::fmt::Debug + Send + Sync {}
impl<M: std::fmt::Debug + Send + Sync> Keep for Block<M> {}
impl Keep for Arc<Memory> {}
