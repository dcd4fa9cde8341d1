//! The word of one slot: who may touch its bytes, and when.
//!
//! ```text
//!          claim           publish          lease
//!   Free ─────────▶ Filling ──────▶ Ready ─────────▶ Leased
//!    ▲                 │ abandon      │ expire         │ release, or
//!    └─────────────────┴──────────────┴────────────────┘ reap (the client died)
//! ```
//!
//! The daemon drives every edge but `lease` and `release`, which are the client's. Bytes are written only in `Filling`
//! and read only in `Leased`. The generation rises with every claim, so that a word seen before and found again is
//! the same fill, and a release that comes after a reap finds another word and is refused.
//! Nothing here allocates, blocks or logs.

use crate::sync::{AtomicU64, Ordering};

/// Where a slot is in its life. The discriminants are wire codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum State {
    Free = 0,
    Filling = 1,
    Ready = 2,
    Leased = 3,
}

/// What may happen to a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    Claim,
    Publish,
    Abandon,
    Expire,
    Lease,
    Release,
    Reap,
}

impl State {
    pub const ALL: [Self; 4] = [Self::Free, Self::Filling, Self::Ready, Self::Leased];

    /// The state with this code; a scribbled word has none.
    pub const fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            0 => Self::Free,
            1 => Self::Filling,
            2 => Self::Ready,
            3 => Self::Leased,
            _ => return None,
        })
    }

    /// The diagram above, as code: every other pair is refused.
    pub const fn next(self, event: Event) -> Option<Self> {
        Some(match (self, event) {
            (Self::Free, Event::Claim) => Self::Filling,
            (Self::Filling, Event::Publish) => Self::Ready,
            (Self::Filling, Event::Abandon) | (Self::Ready, Event::Expire) => Self::Free,
            (Self::Ready, Event::Lease) => Self::Leased,
            (Self::Leased, Event::Release | Event::Reap) => Self::Free,
            _ => return None,
        })
    }
}

/// A client's number in slot words: 1 to 2^24 - 1. 0 is nobody.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Owner(u32);

impl Owner {
    pub const NOBODY: Self = Self(0);
    const LIMIT: u32 = 1 << 24;

    /// The owner number of client `number`, if it is one.
    pub const fn client(number: u32) -> Option<Self> {
        if number == 0 || number >= Self::LIMIT { None } else { Some(Self(number)) }
    }

    pub const fn number(self) -> u32 {
        self.0
    }
}

/// A slot word: bits 0-7 state, 8-31 owner, 32-63 generation. Any `u64` may be found where a peer can write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Word(u64);

impl Word {
    pub const fn new(state: State, owner: Owner, generation: u32) -> Self {
        Self(state as u64 | (owner.0 as u64) << 8 | (generation as u64) << 32)
    }

    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    pub const fn bits(self) -> u64 {
        self.0
    }

    pub const fn state(self) -> Option<State> {
        let [code, ..] = self.0.to_le_bytes();
        State::from_code(code)
    }

    pub const fn owner(self) -> Owner {
        let [_, a, b, c, ..] = self.0.to_le_bytes();
        Owner(u32::from_le_bytes([a, b, c, 0]))
    }

    pub const fn generation(self) -> u32 {
        let [.., a, b, c, d] = self.0.to_le_bytes();
        u32::from_le_bytes([a, b, c, d])
    }

    /// The word after `event`, brought about by `by`; `None` where that may not happen now.
    pub fn after(self, event: Event, by: Owner) -> Option<Self> {
        let state = self.state()?.next(event)?;
        let generation = match event {
            Event::Claim => self.generation().wrapping_add(1),
            _ => self.generation(),
        };
        let owner = match event {
            Event::Lease => by,
            Event::Release | Event::Reap if self.owner() != by => return None,
            _ => Owner::NOBODY,
        };
        Some(Self::new(state, owner, generation))
    }
}

/// The shared word of a slot.
#[derive(Debug)]
#[repr(transparent)]
pub struct SlotWord(AtomicU64);

impl SlotWord {
    pub fn new(word: Word) -> Self {
        Self(AtomicU64::new(word.bits()))
    }

    /// What the word is now. Whoever acts on it does so ordered behind whoever brought it about.
    #[inline]
    pub fn load(&self) -> Word {
        // SYNC slot-bytes: Acquire takes what the Release of `replace` handed over: the slot's bytes, `seq` and `run`.
        Word(self.0.load(Ordering::Acquire))
    }

    #[cfg(loom)]
    pub(crate) fn scribble(&self, bits: u64, ordering: Ordering) {
        self.0.store(bits, ordering);
    }

    /// Exchange `from` for `to`, if the word still is `from`.
    #[inline]
    pub fn replace(&self, from: Word, to: Word) -> Replaced {
        match self.0.compare_exchange(
            from.0,
            to.0,
            // SYNC slot-bytes: Release hands over what the last owner did with the slot: publish to lease (the fill
            // is seen), release to claim (the reads are over). The next owner acquired it with the `load` that gave
            // it `from`: with a generation in the word, `from` found again is the same write.
            Ordering::Release,
            Ordering::Relaxed, // lost the race: nothing was handed over
        ) {
            Ok(_) => Replaced::Done,
            Err(found) => Replaced::Found(Word(found)),
        }
    }
}

/// What became of a [`SlotWord::replace`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replaced {
    Done,
    /// The word was this; nothing was changed.
    Found(Word),
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const EVENTS: [Event; 7] = [
        Event::Claim,
        Event::Publish,
        Event::Abandon,
        Event::Expire,
        Event::Lease,
        Event::Release,
        Event::Reap,
    ];

    #[test]
    fn exactly_seven_edges_exist() {
        let edges = State::ALL
            .into_iter()
            .flat_map(|state| EVENTS.map(|event| (state, event)))
            .filter(|(state, event)| state.next(*event).is_some())
            .count();
        assert_eq!(edges, 7);
    }

    #[test]
    fn the_word_has_the_documented_bits() {
        let word = Word::new(State::Leased, Owner::client(0x00ab_cdef).unwrap(), 0x1234_5678);
        assert_eq!(word.bits(), 0x1234_5678_abcd_ef03);
        assert_eq!(Owner::client(0), None);
        assert_eq!(Owner::client(1 << 24), None);
    }

    #[test]
    fn only_the_owner_of_this_generation_releases() {
        let (me, other) = (Owner::client(7).unwrap(), Owner::client(8).unwrap());
        let leased = Word::new(State::Leased, me, 5);
        assert_eq!(leased.after(Event::Release, other), None);
        assert_eq!(leased.after(Event::Reap, other), None);
        assert_eq!(leased.after(Event::Release, me), Some(Word::new(State::Free, Owner::NOBODY, 5)));

        let slot = SlotWord::new(Word::new(State::Free, Owner::NOBODY, 6));
        assert_eq!(
            slot.replace(leased, Word::new(State::Free, Owner::NOBODY, 5)),
            Replaced::Found(Word::new(State::Free, Owner::NOBODY, 6))
        );
    }

    proptest! {
        #[test]
        fn any_bits_decode_without_panic_and_only_known_states_move(bits in any::<u64>()) {
            let word = Word::from_bits(bits);
            for event in EVENTS {
                let after = word.after(event, word.owner());
                prop_assert_eq!(
                    after.and_then(Word::state),
                    word.state().and_then(|state| state.next(event))
                );
            }
            if let Some(state) = word.state() {
                prop_assert_eq!(Word::new(state, word.owner(), word.generation()), word);
            }
        }
    }
}
