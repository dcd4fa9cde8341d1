//! What only the simulation catches: work whose memory goes or changes under it; and faults on order.

use std::sync::Arc;

use robocache_kernels::{Anchor, AssemblePlan, DeviceStream, Field, FieldKernel, Offsets};
use robocache_types::{Clock, DType, Interp, UniformClock};
use robocache_wire::sim::{Events, Region};
use robocached::gpu::device::{Device, DeviceError, Launch, Memory, Output, Progress, Span};
use robocached::gpu::sim::{Fault, SimDevice, SimOptions};

use crate::bench::{Bench, lost, until, until_done};

fn simulated() -> (Arc<SimDevice>, Bench) {
    let device = SimDevice::new(SimOptions::default());
    let bench = Bench::on(Arc::clone(&device) as Arc<dyn Device>);
    (device, bench)
}

#[test]
fn an_event_is_pending_while_the_stream_is_held_and_done_after() {
    let (device, bench) = simulated();
    let (event, span, pinned) = (bench.event(), bench.memory(64), bench.pinned(&[1; 64]));
    device.hold();
    bench.upload(bench.stream, &*pinned, &span);
    bench.record(&event, bench.stream);
    assert_eq!(event.query().unwrap(), Progress::Pending);
    assert_eq!(bench.get(&span), [0xcd; 64], "nothing was written yet, and fresh memory holds no zeros");
    device.go_on();
    until_done(&event);
    assert_eq!(bench.get(&span), [1; 64]);
}

#[test]
fn memory_that_goes_before_the_work_on_it_is_caught() {
    let (device, bench) = simulated();
    let (span, pinned) = (bench.memory(64), bench.pinned(&[1; 64]));
    device.hold();
    bench.upload(bench.stream, &*pinned, &span);
    drop(span);
    device.go_on();
    assert!(lost(bench.device.finish(bench.stream)).contains("was freed"));
    lost(bench.device.memory());
    lost(bench.device.allocate(1));
}

#[test]
fn pinned_memory_that_goes_before_the_copy_from_it_is_caught() {
    let (device, bench) = simulated();
    let (span, pinned) = (bench.memory(64), bench.pinned(&[1; 64]));
    device.hold();
    bench.upload(bench.stream, &*pinned, &span);
    drop(pinned);
    device.go_on();
    assert!(lost(bench.device.finish(bench.stream)).contains("was freed"));
}

#[test]
fn staging_that_is_written_again_too_early_is_caught() {
    let (device, bench) = simulated();
    let (span, mut pinned) = (bench.memory(64), bench.pinned(&[1; 1024]));
    device.hold();
    bench.device.upload(bench.stream, &*pinned, 256..320, &span).unwrap();
    pinned.write(0, &[2; 256]);
    pinned.write(512, &[2; 512]);
    device.go_on();
    bench.device.finish(bench.stream).unwrap();
    assert_eq!(bench.get(&span), [1; 64], "writes to other lines are fine");
    device.hold();
    bench.device.upload(bench.stream, &*pinned, 256..320, &span).unwrap();
    pinned.write(319, &[1]);
    device.go_on();
    assert!(lost(bench.device.finish(bench.stream)).contains("under way"));
}

#[test]
fn freeing_twice_is_caught() {
    let (_, bench) = simulated();
    let at = bench.device.allocate(100).unwrap();
    bench.device.free(at);
    bench.device.free(at);
    assert!(lost(bench.device.memory()).contains("is no allocation"));
}

#[test]
fn whoever_has_freed_memory_open_sees_poison() {
    let (_, bench) = simulated();
    let memory = Memory::allocate(&bench.device, 2 << 20).unwrap();
    let share = bench.device.share(2).unwrap();
    let fds = bench.device.fds(&share, memory.at()).unwrap();
    let opened = Region::open("memory", fds.into_iter().next().unwrap()).unwrap();
    drop(memory);
    let mut bytes = [0; 4];
    opened.read(12345, &mut bytes).unwrap();
    assert_eq!(bytes, [0xdb; 4]);
}

/// A launch of one column that copies a row, with `rows` rows said to be at a source that has two.
fn launch(bench: &Bench, rows: usize, offset_on_device: i64) -> Result<(), DeviceError> {
    let offsets = Offsets::Rows([0].into());
    let (interp, dtype) = (Interp::Previous, DType::Int64);
    let field = Field { offsets, interp, max_gap_ns: None, dim: 1, from: dtype, to: dtype };
    let kernel = FieldKernel::new(field).unwrap();
    let source = bench.put(&[7; 16]);
    let values = bench.put(&[0; 8]);
    let offsets = bench.put(&offset_on_device.to_le_bytes());
    let outputs = [Output { kernel: &kernel, offsets, values, mask: None }];
    let plan = AssemblePlan::new(&[outputs[0].column(1)], 1, 132).unwrap();
    let mut bytes = plan.fields().to_vec();
    let clock = Clock::Uniform(UniformClock::new(0, 30.0, rows).unwrap());
    DeviceStream { data: source.address(), clock: &clock, stamps: None }.encode(&mut bytes).unwrap();
    Anchor { t_ns: 0, row: 1 }.encode(&mut bytes);
    let descriptors = bench.put(&bytes);
    bench.device.assemble(bench.stream, &Launch::new(&plan, &outputs, &descriptors)).unwrap();
    bench.device.finish(bench.stream)?;
    assert_eq!(bench.get(&outputs[0].values), [7; 8]);
    Ok(())
}

#[test]
fn a_launch_that_reads_past_its_source_is_caught() {
    let (_, bench) = simulated();
    launch(&bench, 2, 0).unwrap();
    let what = lost(launch(&bench, 3, 0));
    assert!(what.contains("data") && what.contains("ends at 16"), "{what}");
}

#[test]
fn a_launch_whose_offsets_were_not_uploaded_is_caught() {
    let (_, bench) = simulated();
    assert!(lost(launch(&bench, 2, 1)).contains("offsets"));
}

#[test]
fn a_launch_whose_descriptors_were_not_uploaded_is_caught() {
    let (_, bench) = simulated();
    let offsets = Offsets::Rows([0].into());
    let (interp, dtype) = (Interp::Previous, DType::Int64);
    let kernel =
        FieldKernel::new(Field { offsets, interp, max_gap_ns: None, dim: 1, from: dtype, to: dtype })
            .unwrap();
    let (offsets, values) = (bench.put(&[0; 8]), bench.put(&[0; 8]));
    let outputs = [Output { kernel: &kernel, offsets, values, mask: None }];
    let plan = AssemblePlan::new(&[outputs[0].column(1)], 1, 132).unwrap();
    let descriptors = bench.memory(4096);
    bench.device.assemble(bench.stream, &Launch::new(&plan, &outputs, &descriptors)).unwrap();
    assert!(lost(bench.device.finish(bench.stream)).contains("fields"));
}

#[test]
fn ordered_allocations_find_no_memory_and_the_next_one_does() {
    let (device, bench) = simulated();
    device.inject(Fault::Allocations(2));
    for _ in 0..2 {
        let refused = bench.device.allocate(10).unwrap_err();
        assert!(matches!(refused, DeviceError::OutOfMemory { bytes: 10, .. }), "{refused:?}");
    }
    bench.device.allocate(10).unwrap();
    device.inject(Fault::Pins(1));
    assert!(matches!(bench.device.pin(10), Err(DeviceError::HostMemory { bytes: 10, .. })));
    bench.device.pin(10).unwrap();
}

#[test]
fn memory_in_all_is_limited_and_comes_back() {
    let (device, bench) = simulated();
    device.inject(Fault::MemoryBytes(8 << 20));
    assert_eq!(bench.device.memory().unwrap(), (8 << 20, 8 << 20));
    let spans: Vec<Span> = (0..4).map(|_| bench.memory(1 << 20)).collect();
    assert_eq!(device.used(), 8 << 20, "large ones take whole pages");
    assert!(matches!(bench.device.allocate(1), Err(DeviceError::OutOfMemory { .. })));
    drop(spans);
    assert_eq!(bench.device.memory().unwrap(), (8 << 20, 8 << 20));
}

#[test]
fn an_ordered_upload_is_refused_and_nothing_is_lost() {
    let (device, bench) = simulated();
    let (span, pinned) = (bench.memory(4), bench.pinned(&[1; 4]));
    device.inject(Fault::Upload(1));
    bench.upload(bench.stream, &*pinned, &span);
    let refused = bench.device.upload(bench.stream, &*pinned, 0..4, &span);
    assert!(matches!(refused, Err(DeviceError::Call { call: "upload", .. })), "{refused:?}");
    bench.upload(bench.stream, &*pinned, &span);
    bench.device.finish(bench.stream).unwrap();
}

#[test]
fn an_ordered_launch_breaks_the_device_when_its_turn_comes() {
    let (device, bench) = simulated();
    device.inject(Fault::Launch(1));
    launch(&bench, 2, 0).unwrap();
    assert!(lost(launch(&bench, 2, 0)).contains("ordered"));
    lost(bench.device.event());
}

#[test]
fn a_lost_device_says_so_to_every_call_and_ends() {
    let (device, bench) = simulated();
    let (event, span, pinned) = (bench.event(), bench.memory(4), bench.pinned(&[1; 4]));
    device.hold();
    bench.upload(bench.stream, &*pinned, &span);
    bench.record(&event, bench.stream);
    device.inject(Fault::Lost);
    lost(event.query());
    lost(bench.device.finish(bench.stream));
    lost(bench.device.record(event.id(), bench.stream));
    lost(bench.device.upload(bench.stream, &*pinned, 0..4, &span));
    lost(bench.device.download(&span, &mut [0; 4]));
    lost(bench.device.stream());
    drop((event, span, pinned, bench, device));
}

#[test]
fn a_stream_that_waits_for_a_dead_client_hangs_alone_and_ends_with_the_device() {
    let (device, bench) = simulated();
    let share = bench.device.share(1).unwrap();
    let memory = bench.memory(2 << 20);
    let fds = bench.device.fds(&share, memory.address()).unwrap();
    let theirs = Events::open(fds.into_iter().nth(1).unwrap()).unwrap();
    theirs.record(1).unwrap(); // and never completed
    let done = bench.device.open_event(&share, &robocache_wire::sim::handle(1)).unwrap();
    assert_eq!(bench.device.query(done).unwrap(), Progress::Pending);
    let hangs = bench.device.stream().unwrap();
    let behind = bench.event();
    bench.device.wait(hangs, done).unwrap();
    bench.record(&behind, hangs);
    let free = bench.event();
    bench.record(&free, bench.stream);
    until("the other stream", || free.query().unwrap() == Progress::Done);
    bench.let_pass();
    assert_eq!(behind.query().unwrap(), Progress::Pending);
    drop((behind, free, memory, bench, device));
}
