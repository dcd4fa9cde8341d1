//! A ring between two real processes: handles, events both ways, and a client's death.

use robocache_wire::spec::{GpuRing, IpcHandle};
use robocached::gpu::device::{DeviceError, Event, Progress, RingShare, Span};

use crate::bench::{Bench, until_done};
use crate::client::Client;
use crate::random::Random;

const SLOTS: u32 = 4;
const SLOT_BYTES: u64 = 70_144;

/// The daemon's side of a ring, by the device's own calls, and a client that has it open.
struct Shared {
    client: Client,
    memory: Span,
    share: RingShare,
    ready: Vec<Event>,
    done: Vec<Event>,
    bench: Bench,
}

impl Shared {
    fn new() -> Self {
        let bench = Bench::new();
        let mut client = Client::start();
        let memory = bench.memory((SLOT_BYTES * u64::from(SLOTS)).next_multiple_of(2 << 20));
        let share = bench.device.share(SLOTS).unwrap();
        let ready = (0..SLOTS).map(|slot| bench.device.ready_event(&share, slot).unwrap());
        let (ready, handles): (Vec<Event>, Vec<IpcHandle>) =
            ready.map(|(id, handle)| (Event::adopt(&bench.device, id), handle)).unzip();
        let facts = bench.device.facts();
        let told = GpuRing {
            kind: facts.kind,
            uuid: facts.uuid.clone(),
            name: facts.name.clone(),
            slot_bytes: SLOT_BYTES,
            bytes: memory.bytes(),
            memory: bench.device.export_memory(memory.address()).unwrap(),
            ready: handles,
        };
        let fds = bench.device.fds(&share, memory.address()).unwrap();
        let handles = client.open(told, facts.ordinal, &fds);
        let done = handles.iter().map(|handle| bench.device.open_event(&share, handle).unwrap());
        let done = done.map(|id| Event::adopt(&bench.device, id)).collect();
        Self { client, memory, share, ready, done, bench }
    }

    fn slot(&self, slot: usize) -> Span {
        let start = slot as u64 * SLOT_BYTES;
        self.memory.part(start..start + SLOT_BYTES)
    }

    /// Writes a slot behind the client's `done`, and publishes it when `ready` has happened.
    fn fill(&self, slot: usize, bytes: &[u8]) {
        let (device, stream) = (&self.bench.device, self.bench.stream);
        let pinned = self.bench.pinned(bytes);
        device.wait(stream, self.done[slot].id()).unwrap();
        device.upload(stream, &*pinned, 0..SLOT_BYTES, &self.slot(slot)).unwrap();
        device.record(self.ready[slot].id(), stream).unwrap();
        until_done(&self.ready[slot]);
    }
}

fn pattern(random: &mut Random) -> Vec<u8> {
    (0..SLOT_BYTES).map(|_| random.bits().to_le_bytes()[2]).collect()
}

#[test]
fn a_client_reads_what_is_in_each_slot_and_what_comes_after_it() {
    let (mut shared, mut random) = (Shared::new(), Random::from_environment().unwrap());
    for round in 0..3 {
        let patterns: Vec<Vec<u8>> = (0..SLOTS).map(|_| pattern(&mut random)).collect();
        for (slot, bytes) in patterns.iter().enumerate() {
            shared.fill(slot, bytes);
        }
        for (slot, bytes) in patterns.iter().enumerate() {
            assert!(shared.client.read(slot) == *bytes, "slot {slot} of round {round}");
        }
    }
    shared.client.close();
}

#[test]
fn the_clients_event_is_followed_from_record_to_record() {
    let mut shared = Shared::new();
    for round in 0..3 {
        for slot in [1, 2] {
            let done = |shared: &Shared| shared.done[slot].query().unwrap();
            assert_eq!(done(&shared), Progress::Done, "before the record, round {round}");
            shared.client.begin(slot);
            assert_eq!(done(&shared), Progress::Pending, "while the client works, round {round}");
            assert_eq!(shared.done[0].query().unwrap(), Progress::Done, "another slot's");
            shared.client.end();
            until_done(&shared.done[slot]);
        }
    }
    shared.client.close();
}

#[test]
fn a_stream_that_waits_for_the_client_goes_on_when_it_is_done() {
    let (mut shared, mut random) = (Shared::new(), Random::from_environment().unwrap());
    let bytes = pattern(&mut random);
    let end = shared.bench.event();
    shared.client.begin(3);
    shared.bench.device.wait(shared.bench.stream, shared.done[3].id()).unwrap();
    shared.bench.record(&end, shared.bench.stream);
    shared.bench.let_pass();
    assert_eq!(end.query().unwrap(), Progress::Pending);
    shared.client.end();
    until_done(&end);
    assert_eq!(shared.done[3].query().unwrap(), Progress::Done);
    shared.fill(3, &bytes);
    assert!(shared.client.read(3) == bytes);
}

#[test]
fn a_client_killed_at_work_leaves_its_event_pending_and_the_device_goes_on() {
    let (mut shared, mut random) = (Shared::new(), Random::from_environment().unwrap());
    shared.client.begin(0);
    assert_eq!(shared.done[0].query().unwrap(), Progress::Pending);
    shared.client.kill();
    assert_eq!(shared.done[0].query().unwrap(), Progress::Pending, "nobody completes it any more");
    assert_eq!(shared.done[1].query().unwrap(), Progress::Done, "what it never recorded");
    let bytes = pattern(&mut random);
    shared.fill(1, &bytes);
    assert!(shared.bench.get(&shared.slot(1)) == bytes);
    let Shared { bench, memory, share, ready, done, .. } = shared;
    drop((memory, share, ready, done));
    assert_eq!(bench.get(&bench.put(b"it goes on")), b"it goes on");
}

#[test]
fn a_client_killed_idle_leaves_its_events_done() {
    let mut shared = Shared::new();
    shared.client.begin(0);
    shared.client.end();
    until_done(&shared.done[0]);
    shared.client.kill();
    for done in &shared.done {
        assert_eq!(done.query().unwrap(), Progress::Done);
        shared.bench.device.wait(shared.bench.stream, done.id()).unwrap();
    }
    shared.bench.device.finish(shared.bench.stream).unwrap();
}

#[test]
fn a_handle_that_is_no_event_is_refused_and_the_device_goes_on() {
    let (mut shared, mut random) = (Shared::new(), Random::from_environment().unwrap());
    for handle in [[0; 64], [0xff; 64], std::array::from_fn(|_| random.bits().to_le_bytes()[1])] {
        let refused = shared.bench.device.open_event(&shared.share, &IpcHandle(handle));
        assert!(matches!(refused, Err(DeviceError::Call { .. })), "{refused:?}");
    }
    let bytes = pattern(&mut random);
    shared.fill(2, &bytes);
    assert!(shared.client.read(2) == bytes);
}
