//! The shared words of a ring: the part of `control` that both sides write, as types over the mapped bytes.
//!
//! Every field is an atomic, so a reference to [`Words`] or [`Line`] claims nothing about values another process may
//! change. Layout: `docs/segment.md`; the assertions at the bottom hold it. What is read here is a peer's word.

use std::time::Duration;

use crate::slot::{Owner, SlotWord, State, Word};
use crate::sync::{AtomicU32, AtomicU64, Futex, Ordering, Waited, fence};

/// A value on a cache line of its own, so that waiting on one word does not slow writers of another.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Padded<T>(pub T);

/// The words at 512 of `control`.
#[derive(Debug)]
#[repr(C)]
pub struct Words {
    pub(crate) published: Padded<Futex>,
    pub(crate) freed: Padded<Futex>,
    pub(crate) consumer_waiting: Padded<AtomicU32>,
    pub(crate) producer_waiting: Padded<AtomicU32>,
    pub(crate) daemon_state: Padded<AtomicU32>,
    pub(crate) run: Padded<AtomicU32>,
}

/// One slot's line, from 4096 of `control`.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Line {
    pub(crate) word: SlotWord,
    pub(crate) seq: AtomicU64,
    pub(crate) run: AtomicU32,
}

/// Where the words of a ring are kept: mapped memory, or the heap in tests.
pub trait Memory: Send + Sync {
    fn words(&self) -> &Words;
    fn lines(&self) -> &[Line];
}

/// What the daemon says about itself in `daemon_state`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum DaemonState {
    Serving = 0,
    /// A `Failed` message is on its way: production stopped.
    Failed = 1,
    /// A `Draining` message is on its way: nothing new will be claimed.
    Draining = 2,
    /// The daemon gave the ring up.
    Gone = 3,
}

impl DaemonState {
    pub const fn from_code(code: u32) -> Option<Self> {
        Some(match code {
            0 => Self::Serving,
            1 => Self::Failed,
            2 => Self::Draining,
            3 => Self::Gone,
            _ => return None,
        })
    }
}

impl Words {
    #[expect(clippy::new_without_default, reason = "made in place by mapping; this is for tests and loom")]
    pub fn new() -> Self {
        Self {
            published: Padded(Futex::new(0)),
            freed: Padded(Futex::new(0)),
            consumer_waiting: Padded(AtomicU32::new(0)),
            producer_waiting: Padded(AtomicU32::new(0)),
            daemon_state: Padded(AtomicU32::new(0)),
            run: Padded(AtomicU32::new(0)),
        }
    }

    /// Make consumers look again: a slot became `Ready`, or a message waits on their socket.
    pub fn notify_consumer(&self) {
        notify(&self.published.0, &self.consumer_waiting.0);
    }

    /// Make producers look again: a slot became `Free`.
    pub fn notify_producer(&self) {
        notify(&self.freed.0, &self.producer_waiting.0);
    }

    /// The counter to read *before* looking at the slots, and to hand to [`Words::wait_published`] after.
    #[inline]
    pub fn published(&self) -> u32 {
        // SYNC published-counter: Acquire, so that slots are looked at after it was read.
        self.published.0.load(Ordering::Acquire)
    }

    /// As [`Words::published`], for producers.
    #[inline]
    pub fn freed(&self) -> u32 {
        // SYNC freed-counter: Acquire, so that slots are looked at after it was read.
        self.freed.0.load(Ordering::Acquire)
    }

    /// Sleep until `published` is no longer `seen`, `limit` at most.
    pub fn wait_published(&self, seen: u32, limit: Duration) -> Waited {
        wait(&self.published.0, &self.consumer_waiting.0, seen, limit)
    }

    /// Sleep until `freed` is no longer `seen`, `limit` at most.
    pub fn wait_freed(&self, seen: u32, limit: Duration) -> Waited {
        wait(&self.freed.0, &self.producer_waiting.0, seen, limit)
    }
}

fn notify(counter: &Futex, sleepers: &AtomicU32) {
    // SYNC published-counter, freed-counter: Release, so that who reads the new count sees the slot word set before.
    counter.fetch_add(1, Ordering::Release);
    // SYNC sleepers: between our count and the look at the flag; the waiter's fence stands between its flag and
    // its look at the count. One of the two sees the other, so nobody sleeps through a change.
    fence(Ordering::SeqCst);
    if sleepers.load(Ordering::Relaxed) != 0 {
        counter.wake_all();
    }
}

fn wait(counter: &Futex, sleepers: &AtomicU32, seen: u32, limit: Duration) -> Waited {
    sleepers.fetch_add(1, Ordering::Relaxed);
    // SYNC sleepers: see `notify`.
    fence(Ordering::SeqCst);
    let waited = counter.wait(seen, limit);
    sleepers.fetch_sub(1, Ordering::Relaxed);
    waited
}

impl Line {
    #[expect(clippy::new_without_default, reason = "made in place by mapping; this is for tests and loom")]
    pub fn new() -> Self {
        Self {
            word: SlotWord::new(Word::new(State::Free, Owner::NOBODY, 0)),
            seq: AtomicU64::new(0),
            run: AtomicU32::new(0),
        }
    }

    /// Overwrite the slot's word, as a peer that breaks the protocol can.
    #[cfg(loom)]
    pub fn scribble(&self, bits: u64, ordering: Ordering) {
        self.word.scribble(bits, ordering);
    }
}

/// Where [`Words`] begin in `control`.
pub const WORDS_OFFSET: usize = 512;
/// Where the slot lines begin in `control`.
pub const LINES_OFFSET: usize = 4096;
/// Bytes of one slot line.
pub const LINE_BYTES: usize = 64;

#[cfg(not(loom))]
const _: () = {
    use core::mem::{align_of, offset_of, size_of};
    assert!(cfg!(target_endian = "little"), "the segment is little-endian");
    assert!(WORDS_OFFSET + offset_of!(Words, published) == 512);
    assert!(WORDS_OFFSET + offset_of!(Words, freed) == 576);
    assert!(WORDS_OFFSET + offset_of!(Words, consumer_waiting) == 640);
    assert!(WORDS_OFFSET + offset_of!(Words, producer_waiting) == 704);
    assert!(WORDS_OFFSET + offset_of!(Words, daemon_state) == 768);
    assert!(WORDS_OFFSET + offset_of!(Words, run) == 832);
    assert!(WORDS_OFFSET + size_of::<Words>() == 896);
    assert!(size_of::<Line>() == LINE_BYTES && align_of::<Line>() == LINE_BYTES);
    assert!(offset_of!(Line, word) == 0 && offset_of!(Line, seq) == 8 && offset_of!(Line, run) == 16);
};
