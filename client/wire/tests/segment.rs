//! Real memfds: what is sealed, what is refused, and what a client that writes where it can achieves (nothing).
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "test code: a failure here is the test's")]

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use robocache_wire::batch::BatchHeader;
use robocache_wire::consumer::Consumer;
use robocache_wire::producer::{Filling, Producer};
use robocache_wire::ring::{Claim, Published, TryLease};
use robocache_wire::segment::{ClientSegment, RingFds, SegmentError, Shape, Texts};
use robocache_wire::spec::LoaderInfo;
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;

const SHAPE: Shape = Shape { slots: 3, slot_bytes: 4096, batch_size: 4, client: 7, daemon_pid: 42 };

fn info(shape: Shape) -> LoaderInfo {
    LoaderInfo {
        client: shape.client,
        daemon_pid: shape.daemon_pid,
        fingerprint: String::new(),
        anchors: 0,
        batch_size: shape.batch_size,
        rank: 0,
        world_size: 1,
        drop_last: false,
        slots: shape.slots,
        slot_bytes: shape.slot_bytes,
        columns: Vec::new(),
        text_tables: Vec::new(),
        warnings: Vec::new(),
        gpu: None,
    }
}

fn ring() -> (Arc<Producer>, Arc<Consumer>, RingFds) {
    let (producer, fds) = Producer::create(SHAPE).unwrap();
    let consumer = Consumer::open(&fds.control, &fds.data, &info(SHAPE)).unwrap();
    (producer, consumer, fds)
}

fn claim(producer: &Arc<Producer>) -> Filling {
    match producer.claim(producer.run(), Duration::ZERO) {
        Claim::Claimed(filling) => filling,
        other => panic!("{other:?}"),
    }
}

fn memfd(bytes: &[u8], len: u64, seals: SealFlags) -> OwnedFd {
    let fd = rustix::fs::memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::io::pwrite(&fd, bytes, 0).unwrap();
    rustix::fs::ftruncate(&fd, len).unwrap();
    rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
    fd
}

const CONTROL: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);
const DATA: SealFlags = CONTROL.union(SealFlags::FUTURE_WRITE);

#[test]
fn what_the_daemon_writes_the_client_reads() {
    let (producer, consumer, _fds) = ring();
    let mut filling = claim(&producer);
    filling.set_ids([11, 12, 13].into_iter());
    filling.bytes_mut()[200..203].copy_from_slice(b"abc");
    let header =
        BatchHeader { seq: 5, epoch: 1, batch: 2, rows: 3, consumed_before: 8, ..BatchHeader::default() };
    assert_eq!(filling.publish(&header), Published::Ready);
    assert!(matches!(consumer.try_lease(0, 4), TryLease::NotReady { filling: 0 }));
    assert!(matches!(consumer.try_lease(1, 5), TryLease::NotReady { .. }));
    let TryLease::Leased(lease) = consumer.try_lease(0, 5) else { panic!("it is ready") };
    assert_eq!(lease.header().unwrap(), header);
    assert_eq!(lease.ids(3).collect::<Vec<_>>(), [11, 12, 13]);
    assert_eq!(&lease.bytes()[200..203], b"abc");
    assert_eq!(lease.bytes().len(), 4096);
    assert_eq!(producer.occupancy().leased, 1);
    lease.release().unwrap();
    assert_eq!(producer.occupancy().free, 3);
}

#[test]
fn a_dropped_filling_is_abandoned_and_a_dropped_lease_released() {
    let (producer, consumer, _fds) = ring();
    drop(claim(&producer));
    assert_eq!(producer.occupancy().free, 3);
    claim(&producer).publish(&BatchHeader { rows: 1, ..BatchHeader::default() });
    drop(consumer.try_lease(0, 0));
    assert_eq!(producer.occupancy().free, 3);
}

#[test]
fn a_lease_reaped_before_its_release_is_refused() {
    let (producer, consumer, _fds) = ring();
    claim(&producer).publish(&BatchHeader { rows: 1, ..BatchHeader::default() });
    let TryLease::Leased(lease) = consumer.try_lease(0, 0) else { panic!("it is ready") };
    assert_eq!(producer.reap(), 1);
    let held: Vec<_> = (0..3).map(|_| claim(&producer)).collect();
    assert!(lease.release().is_err());
    assert_eq!(producer.occupancy().filling, 3);
    drop(held);
}

/// Seen: the first batch after a seek came 40 to 50 ms late. Cause: an interrupted claim, woken with the ring full, went back
/// to sleep for the rest of its time. Harm: a `for` after a `break` began late. Cure: an interrupt ends the claim.
#[test]
fn an_interrupt_ends_a_claim_that_waits() {
    let (producer, _consumer, _fds) = ring();
    let held: Vec<_> = (0..3).map(|_| claim(&producer)).collect();
    let waiting = Arc::clone(&producer);
    let thread = std::thread::Builder::new()
        .spawn(move || matches!(waiting.claim(0, Duration::from_secs(86_400)), Claim::Full))
        .unwrap();
    // Again and again, since the claim may begin after the first.
    while !thread.is_finished() {
        producer.interrupt();
        std::thread::yield_now();
    }
    assert!(thread.join().unwrap());
    drop(held);
}

#[test]
fn a_client_cannot_write_batches_nor_cut_the_files() {
    let (_producer, _consumer, fds) = ring();
    assert_eq!(rustix::io::pwrite(&fds.data, b"x", 0), Err(Errno::PERM));
    for fd in [&fds.control, &fds.data] {
        assert_eq!(rustix::fs::ftruncate(fd, 0), Err(Errno::PERM));
        assert_eq!(rustix::fs::ftruncate(fd, 1 << 30), Err(Errno::PERM));
        assert_eq!(rustix::fs::fcntl_add_seals(fd, SealFlags::WRITE), Err(Errno::PERM));
    }
    let texts = Texts::create(b"abc").unwrap();
    assert_eq!(rustix::io::pwrite(&texts, b"x", 0), Err(Errno::PERM));
    assert_eq!(Texts::open(&texts).unwrap().bytes(), b"abc");
    // A writable mapping is refused too: opening the descriptor anew for writing does not help.
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fds.data));
    let anew = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    assert_eq!(rustix::io::pwrite(&anew, b"x", 0), Err(Errno::PERM));
}

#[test]
fn descriptors_without_their_seals_or_size_are_refused() {
    let header = SHAPE.encode_header().unwrap();
    let data_bytes = SHAPE.data_bytes().unwrap();
    let good = || (memfd(&header, 8192, CONTROL), memfd(&[], data_bytes, DATA));
    let open = |control: &OwnedFd, data: &OwnedFd| ClientSegment::open(control, data, &info(SHAPE)).map(drop);

    let (control, data) = good();
    open(&control, &data).unwrap();
    let unsealed = memfd(&header, 8192, SealFlags::SHRINK);
    assert!(matches!(open(&unsealed, &data), Err(SegmentError::Seals { memfd: "control", .. })));
    assert!(matches!(open(&control, &control), Err(SegmentError::Seals { memfd: "data", .. })));
    let short = memfd(&header, 4096, CONTROL);
    assert!(matches!(open(&short, &data), Err(SegmentError::Size { memfd: "control", .. })));
    let empty = memfd(&[], 0, CONTROL);
    assert!(matches!(open(&empty, &data), Err(SegmentError::Size { memfd: "control", .. })));
    let long = memfd(&[], data_bytes + 4096, DATA);
    assert!(matches!(open(&control, &long), Err(SegmentError::Size { memfd: "data", .. })));
    let file: OwnedFd = std::fs::File::open("/proc/self/exe").unwrap().into();
    assert!(matches!(open(&file, &data), Err(SegmentError::NoMemfd { .. } | SegmentError::Seals { .. })));

    let other = Shape { slots: 2, ..SHAPE };
    let error = ClientSegment::open(&control, &data, &info(other)).unwrap_err();
    assert!(matches!(error, SegmentError::Field { field: "slots", wanted: 2, found: 3 }), "{error}");
    let mut newer = header;
    newer[8] = 2;
    let error = open(&memfd(&newer, 8192, CONTROL), &data).unwrap_err();
    assert!(
        error.to_string().contains("version 2") && error.to_string().contains("upgrade this program"),
        "{error}"
    );
}

#[test]
fn impossible_shapes_are_refused_when_made() {
    for shape in [
        Shape { slots: 1, ..SHAPE },
        Shape { slots: 5000, ..SHAPE },
        Shape { slot_bytes: 0, ..SHAPE },
        Shape { slot_bytes: 4097, ..SHAPE },
        Shape { slot_bytes: u64::MAX - 4095, ..SHAPE },
        Shape { batch_size: 0, ..SHAPE },
        Shape { batch_size: 1000, ..SHAPE },
        Shape { client: 0, ..SHAPE },
        Shape { client: 1 << 24, ..SHAPE },
    ] {
        assert!(Producer::create(shape).is_err(), "{shape:?}");
    }
}

#[test]
fn a_waiting_consumer_is_woken_by_a_publish_and_a_waiting_producer_by_a_release() {
    let (producer, consumer, _fds) = ring();
    let filler = {
        let producer = Arc::clone(&producer);
        let fill = move || {
            for seq in 0..1000 {
                let Claim::Claimed(filling) = producer.claim(0, Duration::from_secs(60)) else {
                    panic!("a slot comes free")
                };
                filling.publish(&BatchHeader { seq, rows: 1, ..BatchHeader::default() });
            }
        };
        std::thread::Builder::new().name("filler".to_owned()).spawn(fill).unwrap()
    };
    for seq in 0..1000 {
        loop {
            let seen = consumer.published();
            match consumer.try_lease(0, seq) {
                TryLease::Leased(lease) => break lease.release().unwrap(),
                _ => consumer.wait(seen, Duration::from_secs(60)),
            };
        }
    }
    filler.join().unwrap();
}

proptest! {
    #[test]
    fn any_header_is_a_shape_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 68), fix in any::<bool>()) {
        let mut header = [0; 68];
        header.copy_from_slice(&bytes);
        if fix {
            header[..12].copy_from_slice(b"ROBOCACH\x01\0\0\0");
        }
        if let Ok(shape) = Shape::decode_header(&header) {
            prop_assert_eq!(shape.encode_header().unwrap(), header);
        }
    }

    /// A client may write anything anywhere in `control`, at any time. The daemon goes on, and never gives out a slot
    /// twice.
    #[test]
    fn a_client_that_scribbles_harms_only_itself(
        writes in proptest::collection::vec((0_u64..8192, any::<u64>(), 0_u8..6), 1..60)
    ) {
        let (producer, consumer, fds) = ring();
        let mut filling: Vec<Filling> = Vec::new();
        let mut leases = Vec::new();
        let mut seq = 0;
        for (at, value, then) in writes {
            rustix::io::pwrite(fds.control.as_fd(), &value.to_le_bytes(), at.min(8184)).unwrap();
            // Half of the writes go where it hurts: a slot word that says Free, or anything.
            let word = if value % 2 == 0 { 0 } else { value };
            rustix::io::pwrite(fds.control.as_fd(), &word.to_le_bytes(), 4096 + 64 * (value % 3)).unwrap();
            match then {
                0 | 1 => if let Claim::Claimed(claimed) = producer.claim(producer.run(), Duration::ZERO) {
                    prop_assert!(filling.iter().all(|other| other.slot() != claimed.slot()));
                    filling.push(claimed);
                },
                2 => if let Some(mut claimed) = filling.pop() {
                    claimed.bytes_mut().fill(1);
                    claimed.publish(&BatchHeader { seq, rows: 1, ..BatchHeader::default() });
                    seq += 1;
                },
                3 => drop(filling.pop()),
                4 => if let TryLease::Leased(lease) = consumer.try_lease(0, seq) {
                    leases.push(lease);
                },
                _ => {
                    producer.begin_run(producer.run() + 1);
                    producer.reap();
                    leases.pop();
                }
            }
            let seen = producer.occupancy();
            prop_assert_eq!(seen.free + seen.filling + seen.ready + seen.leased + seen.scribbled, 3);
        }
    }
}
