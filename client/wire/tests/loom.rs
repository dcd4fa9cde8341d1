//! Every interleaving (up to a bound) of the ring's protocol, and the memory orders behind it.
//!
//! `RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom cargo test -p robocache-wire --release --test loom`
//!
//! The bytes of slots are loom `UnsafeCell`s: an access that is not ordered behind the other side's fails the test. A wait has no
//! time limit here, so a lost wake-up is a deadlock, which loom reports. Each of these was weakened once and seen to fail:
//!
//! | weakened | fails |
//! | --- | --- |
//! | `replace` Relaxed, or `load` Relaxed (slot-bytes) | `bytes_pass_from_fill_to_lease_...` |
//! | `held` taken Relaxed, or given back Relaxed (fill-lock) | `a_client_that_scribbles_free_...` |
//! | a counter moved Relaxed, or read Relaxed (published-counter, freed-counter) | deadlock in `bytes_pass_...` |
//! | the fence of `notify`, or of `wait`, left out (sleepers) | deadlock in `bytes_pass_...` |
//! | the fence of `begin_run`, or of `publish`, left out (run-begin) | `no_batch_of_an_old_run_...` |
//! | `publish` lets go of the slot after it moved the word | deadlock in `a_filler_that_waits_...` |
//! | no notice after a claim that came to nothing | deadlock in `a_look_that_came_to_nothing_...` |
//! | `held` not asked at all | `a_client_that_scribbles_free_...` |
//!
//! At most three preemptions a run (two where that shows the same failures): with two, the deadlock of a late `let_go` was not
//! seen. The whole takes some 30 s of one core, nearly all of it in `a_look_...`, whose three threads claim one slot.
#![cfg(loom)]
#![expect(unsafe_code, reason = "loom's UnsafeCell hands out raw pointers")]

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;
use robocache_wire::ring::{Claim, Claimed, ConsumerRing, Leased, ProducerRing, Published, TryLease};
use robocache_wire::slot::{Owner, State, Word};
use robocache_wire::words::{Line, Memory, Words};

/// A ring's memory on loom's heap, with one number for the bytes of each slot.
#[derive(Debug)]
struct Heap {
    words: Words,
    lines: Vec<Line>,
    bytes: Vec<UnsafeCell<u64>>,
}

#[derive(Debug, Clone)]
struct Shared(Arc<Heap>);

// SAFETY: `bytes` is only touched through `write` and `read`, by the holder of the slot's token; whether that is enough is
// what loom checks here.
unsafe impl Sync for Heap {}
// SAFETY: nothing in it belongs to a thread.
unsafe impl Send for Heap {}

impl Memory for Shared {
    fn words(&self) -> &Words {
        &self.0.words
    }

    fn lines(&self) -> &[Line] {
        &self.0.lines
    }
}

impl Shared {
    fn new(slots: usize) -> Self {
        Self(Arc::new(Heap {
            words: Words::new(),
            lines: (0..slots).map(|_| Line::new()).collect(),
            bytes: (0..slots).map(|_| UnsafeCell::new(0)).collect(),
        }))
    }

    fn write(&self, claimed: &Claimed, value: u64) {
        // SAFETY: loom fails the test if anyone else may access it now.
        self.0.bytes[claimed.slot()].with_mut(|bytes| unsafe { *bytes = value });
    }

    fn read(&self, leased: &Leased) -> u64 {
        // SAFETY: loom fails the test if anyone may write it now.
        self.0.bytes[leased.slot()].with(|bytes| unsafe { *bytes })
    }
}

const FOREVER: Duration = Duration::MAX;

fn ring(slots: usize) -> (Shared, Arc<ProducerRing<Shared>>, ConsumerRing<Shared>) {
    let shared = Shared::new(slots);
    let owner = Owner::client(1).unwrap();
    let producer = Arc::new(ProducerRing::new(shared.clone(), owner));
    (shared.clone(), producer, ConsumerRing::new(shared, owner))
}

fn model(preemptions: usize, test: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(test);
}

fn claim(producer: &ProducerRing<Shared>, run: u32) -> Claimed {
    match producer.claim(run, FOREVER) {
        Claim::Claimed(claimed) => claimed,
        other => panic!("{other:?}"),
    }
}

/// The consumer's loop, as in the client.
fn lease(consumer: &ConsumerRing<Shared>, run: u32, seq: u64) -> Leased {
    loop {
        let seen = consumer.published();
        match consumer.try_lease(run, seq) {
            TryLease::Leased(leased) => return leased,
            TryLease::NotReady { .. } => consumer.wait(seen, FOREVER),
            TryLease::AllHeld => panic!("nothing is held"),
        };
    }
}

#[test]
fn bytes_pass_from_fill_to_lease_and_back_and_nobody_sleeps_through_a_change() {
    model(3, || {
        let (shared, producer, consumer) = ring(1);
        let filler = {
            let shared = shared.clone();
            thread::spawn(move || {
                for seq in 0..2 {
                    let claimed = claim(&producer, 0);
                    shared.write(&claimed, 10 + seq);
                    assert_eq!(producer.publish(claimed, seq), Published::Ready);
                }
            })
        };
        for seq in 0..2 {
            let leased = lease(&consumer, 0, seq);
            assert_eq!(shared.read(&leased), 10 + seq);
            consumer.release(leased).unwrap();
        }
        filler.join().unwrap();
    });
}

#[test]
fn a_batch_published_out_of_turn_is_not_taken_for_another() {
    model(3, || {
        let (shared, producer, consumer) = ring(2);
        let filler = {
            let shared = shared.clone();
            thread::spawn(move || {
                for seq in [1, 0] {
                    let claimed = claim(&producer, 0);
                    shared.write(&claimed, 10 + seq);
                    producer.publish(claimed, seq);
                }
            })
        };
        if let TryLease::Leased(leased) = consumer.try_lease(0, 0) {
            assert_eq!(shared.read(&leased), 10);
        }
        filler.join().unwrap();
    });
}

#[test]
fn two_fillers_hand_each_other_slots_and_lose_no_wake_up() {
    model(2, || {
        let (shared, producer, _consumer) = ring(1);
        let other = {
            let (shared, producer) = (shared.clone(), Arc::clone(&producer));
            thread::spawn(move || {
                let claimed = claim(&producer, 0);
                shared.write(&claimed, 1);
                producer.abandon(claimed);
            })
        };
        let claimed = claim(&producer, 0);
        shared.write(&claimed, 2);
        producer.abandon(claimed);
        other.join().unwrap();
        assert_eq!(producer.occupancy().free, 1);
    });
}

#[test]
fn a_filler_that_waits_gets_the_slot_that_another_published_and_the_client_released() {
    model(3, || {
        let (shared, producer, consumer) = ring(1);
        let claimed = claim(&producer, 0);
        shared.write(&claimed, 10);
        let publisher = {
            let producer = Arc::clone(&producer);
            thread::spawn(move || assert_eq!(producer.publish(claimed, 0), Published::Ready))
        };
        let next = {
            let (shared, producer) = (shared.clone(), Arc::clone(&producer));
            thread::spawn(move || {
                let claimed = claim(&producer, 0);
                shared.write(&claimed, 11);
                producer.abandon(claimed);
            })
        };
        let leased = lease(&consumer, 0, 0);
        assert_eq!(shared.read(&leased), 10);
        consumer.release(leased).unwrap();
        publisher.join().unwrap();
        next.join().unwrap();
    });
}

#[test]
fn a_look_that_came_to_nothing_hides_no_free_slot_from_a_filler_that_waits() {
    model(3, || {
        let (_shared, producer, consumer) = ring(1);
        let filler = {
            let producer = Arc::clone(&producer);
            thread::spawn(move || {
                let claimed = claim(&producer, 0);
                producer.publish(claimed, 0);
                producer.abandon(claim(&producer, 0));
            })
        };
        // Sees the slot free, takes it after somebody else had it, and finds it leased.
        let late = {
            let producer = Arc::clone(&producer);
            thread::spawn(move || {
                if let Claim::Claimed(claimed) = producer.try_claim(0) {
                    producer.abandon(claimed);
                }
            })
        };
        consumer.release(lease(&consumer, 0, 0)).unwrap();
        filler.join().unwrap();
        late.join().unwrap();
    });
}

#[test]
fn a_client_that_scribbles_free_gives_no_two_fillers_the_same_bytes() {
    model(2, || {
        let (shared, producer, _consumer) = ring(1);
        let scribbler = {
            let shared = shared.clone();
            thread::spawn(move || {
                shared.lines()[0].scribble(Word::new(State::Free, Owner::NOBODY, 0).bits(), Relaxed);
            })
        };
        let other = {
            let (shared, producer) = (shared.clone(), Arc::clone(&producer));
            thread::spawn(move || {
                if let Claim::Claimed(claimed) = producer.try_claim(0) {
                    shared.write(&claimed, 1);
                    producer.publish(claimed, 0);
                }
            })
        };
        if let Claim::Claimed(claimed) = producer.try_claim(0) {
            shared.write(&claimed, 2);
            producer.publish(claimed, 1);
        }
        scribbler.join().unwrap();
        other.join().unwrap();
    });
}

#[test]
fn a_release_after_a_reap_is_refused_and_frees_nothing() {
    model(3, || {
        let (shared, producer, consumer) = ring(1);
        let claimed = claim(&producer, 0);
        shared.write(&claimed, 1);
        producer.publish(claimed, 0);
        let leased = lease(&consumer, 0, 0);
        assert_eq!(shared.read(&leased), 1);
        let late = thread::spawn(move || consumer.release(leased));
        let reaped = producer.reap();
        // Whoever won, the slot is claimed again, and the late release must not free it while it is filled.
        let again = claim(&producer, 0);
        shared.write(&again, 2);
        let released = late.join().unwrap();
        assert_eq!(usize::from(released.is_ok()) + reaped, 1);
        assert_eq!(producer.occupancy().filling, 1);
        assert_eq!(producer.publish(again, 1), Published::Ready);
    });
}

#[test]
fn no_batch_of_an_old_run_stays_ready_after_a_seek() {
    model(3, || {
        let (shared, producer, _consumer) = ring(1);
        let filler = {
            let (shared, producer) = (shared.clone(), Arc::clone(&producer));
            thread::spawn(move || match producer.try_claim(0) {
                Claim::Claimed(claimed) => {
                    shared.write(&claimed, 1);
                    producer.publish(claimed, 0);
                }
                Claim::Stale => {}
                Claim::Full => panic!("the ring was empty"),
            })
        };
        producer.begin_run(1);
        filler.join().unwrap();
        assert_eq!(producer.occupancy().free, 1);
        // And the next run can use the slot.
        let claimed = claim(&producer, 1);
        shared.write(&claimed, 2);
        assert_eq!(producer.publish(claimed, 0), Published::Ready);
    });
}
