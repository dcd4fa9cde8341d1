//! Blocks of large slabs of memory, device or pinned: a first-fit allocator, and the guard that gives a block back.
//!
//! Slabs are added while the budget lasts. A block goes back when its last holder drops it, which is when no enqueued
//! work reads it any more; neighbours that are free become one again. Nothing here touches memory.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;

/// Blocks begin at multiples of this: lines of the GPU, and 16-byte accesses.
const ALIGN: u64 = 256;

/// One slab and what of it is free.
#[derive(Debug)]
pub struct Slab<M> {
    pub memory: M,
    free: Mutex<FreeList>,
}

/// A part of a slab. Given back when dropped.
#[derive(Debug)]
pub struct Block<M> {
    slab: Arc<Slab<M>>,
    offset: u64,
    bytes: u64,
}

impl<M> Block<M> {
    pub fn memory(&self) -> &M {
        &self.slab.memory
    }

    pub const fn offset(&self) -> u64 {
        self.offset
    }
}

impl<M> Drop for Block<M> {
    fn drop(&mut self) {
        self.slab.free.lock().give(self.offset, self.bytes);
    }
}

/// Slabs of one kind of memory.
#[derive(Debug)]
pub struct Arena<M> {
    slabs: Vec<Arc<Slab<M>>>,
    budget: u64,
    slab_bytes: u64,
    bytes: u64,
}

impl<M> Arena<M> {
    /// An arena of at most `budget` bytes, in slabs of `slab_bytes`.
    pub const fn new(budget: u64, slab_bytes: u64) -> Self {
        Self { slabs: Vec::new(), budget, slab_bytes, bytes: 0 }
    }

    /// Bytes of all slabs.
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    pub const fn budget(&self) -> u64 {
        self.budget
    }

    /// Bytes in blocks.
    pub fn used(&self) -> u64 {
        self.bytes - self.slabs.iter().map(|slab| slab.free.lock().total()).sum::<u64>()
    }

    /// A block, from a slab there is or from a new one that `make` makes; `None` where the budget is spent.
    pub fn take<E>(
        &mut self,
        bytes: u64,
        make: impl FnOnce(u64) -> Result<M, E>,
    ) -> Result<Option<Block<M>>, E> {
        let bytes = bytes.max(1).next_multiple_of(ALIGN);
        for slab in &self.slabs {
            let found = slab.free.lock().take(bytes);
            if let Some(offset) = found {
                return Ok(Some(Block { slab: Arc::clone(slab), offset, bytes }));
            }
        }
        let left = self.budget - self.bytes;
        let slab_bytes = self.slab_bytes.max(bytes).min(left) / ALIGN * ALIGN;
        if slab_bytes < bytes {
            return Ok(None);
        }
        let memory = make(slab_bytes)?;
        let mut free = FreeList(BTreeMap::from([(0, slab_bytes)]));
        let offset = free.take(bytes).expect("a slab is as long as what it is made for");
        let slab = Arc::new(Slab { memory, free: Mutex::new(free) });
        self.slabs.push(Arc::clone(&slab));
        self.bytes += slab_bytes;
        Ok(Some(Block { slab, offset, bytes }))
    }

    /// No slab is made any more: there is no memory for it, whatever the budget says.
    pub const fn stop_growing(&mut self) {
        self.budget = self.bytes;
    }
}

/// Free ranges by offset, none touching another.
#[derive(Debug, Default)]
struct FreeList(BTreeMap<u64, u64>);

impl FreeList {
    fn total(&self) -> u64 {
        self.0.values().sum()
    }

    fn take(&mut self, bytes: u64) -> Option<u64> {
        let (&offset, &free) = self.0.iter().find(|&(_, &free)| free >= bytes)?;
        self.0.remove(&offset);
        if free > bytes {
            self.0.insert(offset + bytes, free - bytes);
        }
        Some(offset)
    }

    fn give(&mut self, mut offset: u64, mut bytes: u64) {
        if let Some(after) = self.0.remove(&(offset + bytes)) {
            bytes += after;
        }
        if let Some((&before, &free)) = self.0.range(..offset).next_back()
            && before + free == offset
        {
            self.0.remove(&before);
            offset = before;
            bytes += free;
        }
        self.0.insert(offset, bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::convert::Infallible;

    fn make(bytes: u64) -> Result<u64, Infallible> {
        Ok(bytes)
    }

    proptest! {
        /// Blocks never overlap, never leave their slab or the budget, and all come back as whole slabs.
        #[test]
        fn blocks_are_apart_and_come_back(steps in prop::collection::vec((1_u64..5000, any::<bool>(), any::<u16>()), 1..200)) {
            let mut arena = Arena::new(20_000, 8192);
            let mut held: Vec<Block<u64>> = Vec::new();
            for (bytes, drops, which) in steps {
                if drops && !held.is_empty() {
                    held.swap_remove(usize::from(which) % held.len());
                } else if let Ok(Some(block)) = arena.take(bytes, make) {
                    prop_assert!(block.bytes >= bytes && block.offset + block.bytes <= *block.memory());
                    for other in held.iter().filter(|other| Arc::ptr_eq(&other.slab, &block.slab)) {
                        let apart = other.offset + other.bytes <= block.offset || block.offset + block.bytes <= other.offset;
                        prop_assert!(apart);
                    }
                    held.push(block);
                }
                prop_assert!(arena.bytes() <= 20_000);
                prop_assert_eq!(arena.used(), held.iter().map(|block| block.bytes).sum::<u64>());
            }
            held.clear();
            prop_assert_eq!(arena.used(), 0);
            prop_assert!(arena.slabs.iter().all(|slab| slab.free.lock().0.len() == 1));
        }
    }

    #[test]
    fn a_block_larger_than_a_slab_gets_a_slab_of_its_own_within_the_budget() {
        let mut arena = Arena::new(10_240, 1024);
        assert_eq!(arena.take(5000, make).unwrap().map(|block| *block.memory()), Some(5120));
        assert!(arena.take(10_241, make).unwrap().is_none());
        assert!(arena.take::<&str>(6000, |_| Err("none")).unwrap().is_none(), "5120 are left");
        assert_eq!(
            arena.take(5120, |_| Err("none")).map(|block| block.is_some()),
            Ok(true),
            "the block came back"
        );
    }
}
