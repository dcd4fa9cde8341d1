//! The ring's two sides against a plain model: a list of what each slot is. One thread, any order of events.
#![cfg(not(loom))]

use std::sync::Arc;

use proptest::prelude::*;
use robocache_wire::ring::{
    Claim, Claimed, ConsumerRing, Leased, Occupancy, ProducerRing, Published, TryLease,
};
use robocache_wire::slot::Owner;
use robocache_wire::words::{Line, Memory, Words};

#[derive(Debug)]
struct Heap(Words, Vec<Line>);

#[derive(Debug, Clone)]
struct Shared(Arc<Heap>);

impl Memory for Shared {
    fn words(&self) -> &Words {
        &self.0.0
    }

    fn lines(&self) -> &[Line] {
        &self.0.1
    }
}

#[derive(Debug, Clone)]
enum Act {
    Claim,
    /// Of what is being filled, the n-th.
    Publish(usize),
    Abandon(usize),
    Lease,
    /// Of what is leased, the n-th.
    Release(usize),
    Seek,
    Reap,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => Just(Act::Claim),
        4 => (0_usize..8).prop_map(Act::Publish),
        1 => (0_usize..8).prop_map(Act::Abandon),
        4 => Just(Act::Lease),
        3 => (0_usize..8).prop_map(Act::Release),
        1 => Just(Act::Seek),
        1 => Just(Act::Reap),
    ]
}

/// What a slot is, said plainly.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Plain {
    Free,
    Filling,
    Ready { run: u32, seq: u64 },
    Leased,
}

proptest! {
    #[test]
    fn the_ring_does_what_a_plain_list_of_slots_would(
        slots in 2_usize..5, acts in proptest::collection::vec(act(), 0..200)
    ) {
        let owner = Owner::client(9).unwrap();
        let lines = (0..slots).map(|_| Line::new()).collect();
        let shared = Shared(Arc::new(Heap(Words::new(), lines)));
        let producer = ProducerRing::new(shared.clone(), owner);
        let consumer = ConsumerRing::new(shared, owner);

        let mut plain = vec![Plain::Free; slots];
        let mut filling: Vec<(Claimed, u32, u64)> = Vec::new();
        let mut leased: Vec<(Leased, bool)> = Vec::new();
        let (mut run, mut claimed_seq, mut wanted_seq) = (0_u32, 0_u64, 0_u64);

        for act in acts {
            match act {
                Act::Claim => match producer.try_claim(run) {
                    Claim::Claimed(claimed) => {
                        prop_assert_eq!(plain[claimed.slot()], Plain::Free);
                        plain[claimed.slot()] = Plain::Filling;
                        filling.push((claimed, run, claimed_seq));
                        claimed_seq += 1;
                    }
                    Claim::Full => prop_assert!(!plain.contains(&Plain::Free)),
                    Claim::Stale => prop_assert!(false, "the run was the ring's"),
                },
                Act::Publish(n) if !filling.is_empty() => {
                    let (claimed, its_run, seq) = filling.swap_remove(n % filling.len());
                    let slot = claimed.slot();
                    let found = producer.publish(claimed, seq);
                    if its_run == run {
                        prop_assert_eq!(found, Published::Ready);
                        plain[slot] = Plain::Ready { run, seq };
                    } else {
                        prop_assert_eq!(found, Published::Stale);
                        plain[slot] = Plain::Free;
                    }
                }
                Act::Abandon(n) if !filling.is_empty() => {
                    // A real producer would fill the number again; here it goes missing, as after a failure.
                    let (claimed, ..) = filling.swap_remove(n % filling.len());
                    plain[claimed.slot()] = Plain::Free;
                    producer.abandon(claimed);
                }
                Act::Lease => {
                    let wanted = Plain::Ready { run, seq: wanted_seq };
                    match consumer.try_lease(run, wanted_seq) {
                        TryLease::Leased(lease) => {
                            prop_assert_eq!(plain[lease.slot()], wanted);
                            plain[lease.slot()] = Plain::Leased;
                            leased.push((lease, true));
                            wanted_seq += 1;
                        }
                        TryLease::NotReady { filling } => {
                            prop_assert!(!plain.contains(&wanted));
                            let now = plain.iter().filter(|slot| **slot == Plain::Filling).count();
                            prop_assert_eq!(filling as usize, now);
                        }
                        TryLease::AllHeld => {
                            prop_assert!(plain.iter().all(|slot| *slot == Plain::Leased));
                        }
                    }
                }
                Act::Release(n) if !leased.is_empty() => {
                    let (lease, ours) = leased.swap_remove(n % leased.len());
                    let slot = lease.slot();
                    prop_assert_eq!(consumer.release(lease).is_ok(), ours);
                    if ours {
                        plain[slot] = Plain::Free;
                    }
                }
                Act::Seek => {
                    run += 1;
                    (claimed_seq, wanted_seq) = (0, 0);
                    let expired = producer.begin_run(run);
                    let mut ready = 0;
                    for slot in &mut plain {
                        if matches!(slot, Plain::Ready { .. }) {
                            *slot = Plain::Free;
                            ready += 1;
                        }
                    }
                    prop_assert_eq!(expired, ready);
                    prop_assert!(matches!(producer.try_claim(run - 1), Claim::Stale));
                }
                Act::Reap => {
                    let ours = leased.iter_mut().filter(|(_, ours)| *ours);
                    let reaped = ours.map(|(_, ours)| *ours = false).count();
                    prop_assert_eq!(producer.reap(), reaped);
                    for slot in &mut plain {
                        if *slot == Plain::Leased {
                            *slot = Plain::Free;
                        }
                    }
                }
                Act::Publish(_) | Act::Abandon(_) | Act::Release(_) => {}
            }
            let count = |f: fn(&Plain) -> bool| u32::try_from(plain.iter().filter(|slot| f(slot)).count()).unwrap();
            prop_assert_eq!(producer.occupancy(), Occupancy {
                free: count(|slot| *slot == Plain::Free),
                filling: count(|slot| *slot == Plain::Filling),
                ready: count(|slot| matches!(slot, Plain::Ready { .. })),
                leased: count(|slot| *slot == Plain::Leased),
                scribbled: 0,
            });
        }
    }
}
