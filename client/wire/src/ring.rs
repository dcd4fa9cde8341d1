//! The protocol of the ring over its shared words: what the daemon does, what the client does, and how each waits.
//!
//! No bytes of batches here, and no guards: [`crate::producer`] and [`crate::consumer`] put those around it. It runs
//! over any [`Memory`], so that loom can run it too. Everything the client can write is an allegation: the producer
//! keeps, in its own memory, which slots it fills and their generations, reads each shared word once, and every loop
//! passes over the slots once.

use std::time::{Duration, Instant};

use crate::slot::{Event, Owner, Replaced, State, Word};
use crate::sync::{AtomicU32, Ordering, Waited, fence, spin_hint};
use crate::words::{DaemonState, Memory};

/// The daemon's side.
#[derive(Debug)]
pub struct ProducerRing<M> {
    memory: M,
    client: Owner,
    run: AtomicU32,
    /// The slot to look at first: slots are filled in turn, where they come free in turn.
    next: AtomicU32,
    /// Counts [`ProducerRing::interrupt_producers`].
    interrupts: AtomicU32,
    own: Box<[Own]>,
}

/// What the daemon knows of a slot by itself.
#[derive(Debug)]
struct Own {
    /// 1 while one of our threads has the slot between a claim and its end, whatever the shared word says.
    held: AtomicU32,
    generation: AtomicU32,
    /// Run of the batch last published here.
    run: AtomicU32,
}

/// A slot that the holder of this fills. It ends in [`ProducerRing::publish`] or [`ProducerRing::abandon`].
#[derive(Debug)]
#[must_use = "a claimed slot is lost unless it is published or abandoned"]
pub struct Claimed {
    slot: usize,
    run: u32,
    word: Word,
}

impl Claimed {
    pub fn slot(&self) -> usize {
        self.slot
    }
}

/// What became of a claim.
#[derive(Debug)]
pub enum Claim<T> {
    Claimed(T),
    /// No slot is free (within the time, where there was one, or before an interrupt).
    Full,
    /// The run asked for is not the ring's any more.
    Stale,
}

/// What became of a publish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Published {
    /// The client can lease it.
    Ready,
    /// A later run began meanwhile; the slot is free again.
    Stale,
    /// The client wrote over the slot's word. The slot is out of use until the word is a free one again.
    Scribbled,
}

/// How many slots are in which state, at one glance.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Occupancy {
    pub free: u32,
    pub filling: u32,
    pub ready: u32,
    pub leased: u32,
    /// Words that are none of these: a client scribbled.
    pub scribbled: u32,
}

impl<M: Memory> ProducerRing<M> {
    /// A ring over fresh memory (all words 0), for one client.
    pub fn new(memory: M, client: Owner) -> Self {
        let own = memory
            .lines()
            .iter()
            .map(|_| Own { held: AtomicU32::new(0), generation: AtomicU32::new(0), run: AtomicU32::new(0) })
            .collect();
        let zero = || AtomicU32::new(0);
        Self { memory, client, run: zero(), next: zero(), interrupts: zero(), own }
    }

    pub fn memory(&self) -> &M {
        &self.memory
    }

    pub fn client(&self) -> Owner {
        self.client
    }

    /// The run being produced.
    pub fn run(&self) -> u32 {
        self.run.load(Ordering::Acquire)
    }

    /// From now on only `run` counts: `Ready` slots of others are freed, and what is being filled for others will not
    /// become `Ready`. Returns how many were freed here.
    pub fn begin_run(&self, run: u32) -> usize {
        self.run.store(run, Ordering::Release);
        self.memory.words().run.0.store(run, Ordering::Relaxed);
        // SYNC run-begin: between our new run and the look at the slots; a publisher's fence stands between its
        // `Ready` and its look at the run. One of the two sees the other, so no stale batch stays.
        fence(Ordering::SeqCst);
        let expired = (0..self.own.len()).filter(|slot| self.expire_if_stale(*slot, run)).count();
        if expired > 0 {
            self.memory.words().notify_producer();
        }
        expired
    }

    /// Claim any free slot for a batch of `run`, without waiting.
    pub fn try_claim(&self, run: u32) -> Claim<Claimed> {
        if self.run() != run {
            return Claim::Stale;
        }
        let first = self.next.load(Ordering::Relaxed) as usize;
        for slot in in_turn(first, self.own.len()) {
            if let Some(claimed) = self.claim_slot(slot, run) {
                self.next.store(after(slot), Ordering::Relaxed);
                return Claim::Claimed(claimed);
            }
        }
        Claim::Full
    }

    /// As [`Self::try_claim`], waiting up to `limit` for a slot to come free; [`Self::interrupt_producers`] ends the
    /// wait.
    pub fn claim(&self, run: u32, limit: Duration) -> Claim<Claimed> {
        let start = Instant::now();
        let interrupts = self.interrupts.load(Ordering::Relaxed);
        loop {
            let seen = self.memory.words().freed();
            match self.try_claim(run) {
                Claim::Full => {}
                other => return other,
            }
            let left = limit.saturating_sub(start.elapsed());
            // Read after `seen`: SYNC freed-counter orders it, since an interrupt counts itself before it notifies.
            if left.is_zero() || self.interrupts.load(Ordering::Relaxed) != interrupts {
                return Claim::Full;
            }
            self.memory.words().wait_freed(seen, left);
        }
    }

    fn claim_slot(&self, slot: usize, run: u32) -> Option<Claimed> {
        let (own, line) = (self.own.get(slot)?, self.memory.lines().get(slot)?);
        // Look before taking the lock: most slots are not free, and their line is in another core's cache.
        if !matches!(line.word.load().state(), Some(State::Free)) {
            return None;
        }
        // SYNC fill-lock: Acquire takes what the thread that filled this slot before did with its bytes. The shared
        // word cannot be trusted with that: a client may write `Free` into it at any time.
        own.held.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed).ok()?;
        let generation = own.generation.load(Ordering::Relaxed).wrapping_add(1);
        let found = line.word.load();
        let filling = Word::new(State::Filling, Owner::NOBODY, generation);
        if matches!(found.state(), Some(State::Free)) && line.word.replace(found, filling) == Replaced::Done {
            own.generation.store(generation, Ordering::Relaxed);
            return Some(Claimed { slot, run, word: filling });
        }
        self.let_go(slot);
        // While we held it for nothing, another producer may have passed over it and gone to sleep.
        self.memory.words().notify_producer();
        None
    }

    /// Hand a filled slot to the client as batch `seq` of the run it was claimed for.
    pub fn publish(&self, claimed: Claimed, seq: u64) -> Published {
        let Claimed { slot, run, word } = claimed;
        let (Some(own), Some(line)) = (self.own.get(slot), self.memory.lines().get(slot)) else {
            return Published::Scribbled;
        };
        line.seq.store(seq, Ordering::Relaxed);
        line.run.store(run, Ordering::Relaxed);
        own.run.store(run, Ordering::Relaxed);
        let ready = Word::new(State::Ready, Owner::NOBODY, word.generation());
        // Before the word moves: a slot that the client has released must not look held, or a producer that
        // finds it so would wait for a release that is over.
        self.let_go(slot);
        if line.word.replace(word, ready) != Replaced::Done {
            return Published::Scribbled;
        }
        // SYNC run-begin: see `begin_run`.
        fence(Ordering::SeqCst);
        let current = self.run.load(Ordering::Relaxed);
        if current != run {
            self.expire_if_stale(slot, current);
            self.memory.words().notify_producer();
            return Published::Stale;
        }
        self.memory.words().notify_consumer();
        Published::Ready
    }

    /// Give a claimed slot back unpublished.
    pub fn abandon(&self, claimed: Claimed) {
        let Claimed { slot, word, .. } = claimed;
        self.let_go(slot); // before the word moves, as in `publish`
        if let Some(line) = self.memory.lines().get(slot) {
            // A scribbled word stays as it is: the slot is out of use until it reads `Free` again.
            line.word.replace(word, Word::new(State::Free, Owner::NOBODY, word.generation()));
        }
        self.memory.words().notify_producer();
    }

    fn let_go(&self, slot: usize) {
        if let Some(own) = self.own.get(slot) {
            // SYNC fill-lock: Release, see `claim_slot`.
            own.held.store(0, Ordering::Release);
        }
    }

    /// Whether the slot held a batch of another run than `run` and was freed.
    fn expire_if_stale(&self, slot: usize, run: u32) -> bool {
        let (Some(own), Some(line)) = (self.own.get(slot), self.memory.lines().get(slot)) else {
            return false;
        };
        // Acquire on the word (in `load`) orders the look at `own.run` behind the publish that set both.
        let found = line.word.load();
        if found.state() != Some(State::Ready) || own.run.load(Ordering::Relaxed) == run {
            return false;
        }
        found
            .after(Event::Expire, Owner::NOBODY)
            .is_some_and(|free| line.word.replace(found, free) == Replaced::Done)
    }

    /// Take back what the client leased. Only once its process is gone (or will never read again). Returns how many.
    pub fn reap(&self) -> usize {
        let mut reaped = 0;
        for line in self.memory.lines() {
            let found = line.word.load();
            if let Some(free) = found.after(Event::Reap, self.client)
                && line.word.replace(found, free) == Replaced::Done
            {
                reaped += 1;
            }
        }
        if reaped > 0 {
            self.memory.words().notify_producer();
        }
        reaped
    }

    /// Say how the daemon is, and make a waiting client look.
    pub fn set_state(&self, state: DaemonState) {
        self.memory.words().daemon_state.0.store(state as u32, Ordering::Release);
        self.memory.words().notify_consumer();
    }

    /// Make a waiting client look: at its socket, or out for a batch that comes soon.
    pub fn notify(&self) {
        self.memory.words().notify_consumer();
    }

    /// End the wait of producers for a free slot, so that they look whether they are still wanted. One that begins
    /// to wait just after is not told: look first, and wait for a while only.
    pub fn interrupt_producers(&self) {
        self.interrupts.fetch_add(1, Ordering::Relaxed);
        self.memory.words().notify_producer();
    }

    pub fn occupancy(&self) -> Occupancy {
        occupancy(&self.memory)
    }
}

fn occupancy(memory: &impl Memory) -> Occupancy {
    let mut seen = Occupancy::default();
    for line in memory.lines() {
        *match line.word.load().state() {
            Some(State::Free) => &mut seen.free,
            Some(State::Filling) => &mut seen.filling,
            Some(State::Ready) => &mut seen.ready,
            Some(State::Leased) => &mut seen.leased,
            None => &mut seen.scribbled,
        } += 1;
    }
    seen
}

/// All slots once, from `first` on.
fn in_turn(first: usize, slots: usize) -> impl Iterator<Item = usize> {
    (0..slots).map(move |step| (first % slots + step) % slots)
}

/// The slot that has its turn after this one.
fn after(slot: usize) -> u32 {
    u32::try_from(slot).map_or(0, |slot| slot.wrapping_add(1))
}

/// The client's side.
#[derive(Debug)]
pub struct ConsumerRing<M> {
    memory: M,
    client: Owner,
    /// Where the next batch lies if the daemon fills slots in turn. To look at every slot takes a line each out of
    /// the caches of another core.
    next: AtomicU32,
}

/// A slot that the holder of this reads. It ends in [`ConsumerRing::release`].
#[derive(Debug)]
#[must_use = "a leased slot is lost unless it is released"]
pub struct Leased {
    slot: usize,
    word: Word,
}

impl Leased {
    pub fn slot(&self) -> usize {
        self.slot
    }
}

/// What became of a try to lease.
#[derive(Debug)]
pub enum TryLease<T> {
    Leased(T),
    /// The batch is not there yet. Nothing is being filled either if `filling` is 0.
    NotReady {
        filling: u32,
    },
    /// Nor can it come: this client holds every slot.
    AllHeld,
}

/// A release that came too late: the slot was reaped, and is the daemon's or a later batch's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("slot {slot} is not this lease's any more: it was reaped")]
pub struct ReleaseRefused {
    pub slot: usize,
}

impl<M: Memory> ConsumerRing<M> {
    pub fn new(memory: M, client: Owner) -> Self {
        Self { memory, client, next: AtomicU32::new(0) }
    }

    pub fn memory(&self) -> &M {
        &self.memory
    }

    /// Lease batch `seq` of `run`, if it is ready.
    #[inline]
    pub fn try_lease(&self, run: u32, seq: u64) -> TryLease<Leased> {
        let (mut filling, mut others) = (0, false);
        let lines = self.memory.lines();
        for slot in in_turn(self.next.load(Ordering::Relaxed) as usize, lines.len()) {
            let Some(line) = lines.get(slot) else { continue };
            let found = line.word.load();
            match found.state() {
                Some(State::Ready) => {
                    others = true;
                    // SYNC slot-bytes: these were written before the publish that `load` acquired. A slot taken
                    // again meanwhile may show the next batch's, but then its generation is another and the
                    // exchange fails.
                    if line.seq.load(Ordering::Relaxed) != seq || line.run.load(Ordering::Relaxed) != run {
                        continue;
                    }
                    let word = Word::new(State::Leased, self.client, found.generation());
                    if line.word.replace(found, word) == Replaced::Done {
                        self.next.store(after(slot), Ordering::Relaxed);
                        return TryLease::Leased(Leased { slot, word });
                    }
                }
                Some(State::Leased) => {}
                Some(State::Filling) => {
                    others = true;
                    filling += 1;
                }
                Some(State::Free) | None => others = true,
            }
        }
        if others { TryLease::NotReady { filling } } else { TryLease::AllHeld }
    }

    /// Give a slot back.
    pub fn release(&self, leased: Leased) -> Result<(), ReleaseRefused> {
        let Leased { slot, word } = leased;
        let refused = ReleaseRefused { slot };
        let line = self.memory.lines().get(slot).ok_or(refused)?;
        let free = Word::new(State::Free, Owner::NOBODY, word.generation());
        if line.word.replace(word, free) != Replaced::Done {
            return Err(refused);
        }
        self.memory.words().notify_producer();
        Ok(())
    }

    /// The counter to read before [`Self::try_lease`] and to hand to [`Self::wait`] after.
    #[inline]
    pub fn published(&self) -> u32 {
        self.memory.words().published()
    }

    /// Wait until the daemon has done something since `seen` was read, `limit` at most: spin a few microseconds, then sleep.
    pub fn wait(&self, seen: u32, limit: Duration) -> Waited {
        for _ in 0..SPINS {
            if self.published() != seen {
                return Waited::Woken;
            }
            spin_hint();
        }
        self.memory.words().wait_published(seen, limit)
    }

    /// What the daemon says of itself; `None` for a code this version does not know.
    pub fn daemon_state(&self) -> Option<DaemonState> {
        DaemonState::from_code(self.memory.words().daemon_state.0.load(Ordering::Acquire))
    }

    pub fn occupancy(&self) -> Occupancy {
        occupancy(&self.memory)
    }
}

/// A pause instruction takes some 10 to 40 ns: a few microseconds in all, about what going to sleep costs.
const SPINS: u32 = if cfg!(loom) { 0 } else { 100 };
