//! `assemble` against the twin: every dtype, mode and clock, from device memory and from pinned memory.

use robocache_kernels::{
    Anchor, AssemblePlan, DevicePtr, DeviceStream, Field, FieldKernel, Offsets, StreamView,
};
use robocache_types::{Clock, DType, Interp};
use robocached::gpu::device::{Launch, Output, Pinned, Span, descriptor_bytes};

use crate::bench::{Bench, Under, under};
use crate::random::Random;

const FLOATS: [DType; 4] = [DType::Float16, DType::BFloat16, DType::Float32, DType::Float64];
const DIMS: [usize; 8] = [1, 3, 7, 14, 16, 26, 256, 1078];
const POISON: u8 = 0xa5;

/// Where the bytes of a stream lie for the device.
#[derive(Debug)]
enum Stored {
    Device(Span),
    Pinned(Box<dyn Pinned>),
}

impl Stored {
    fn address(&self) -> DevicePtr {
        match self {
            Self::Device(span) => span.address(),
            Self::Pinned(pinned) => pinned.address(),
        }
    }
}

/// Which memory sources are put in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Device,
    Pinned,
}

#[derive(Debug)]
struct Stream {
    clock: Clock,
    data: Vec<u8>,
    stored: Stored,
    stamps: Option<Stored>,
}

/// One column of a batch; its samples take two streams in turn.
#[derive(Debug)]
struct Case {
    kernel: FieldKernel,
    streams: [Stream; 2],
}

fn le(words: &[i64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

impl Case {
    fn new(bench: &Bench, random: &mut Random, field: Field, uniform: bool, source: Source) -> Self {
        let kernel = FieldKernel::new(field).unwrap();
        let Field { dim, from, interp, .. } = *kernel.field();
        let store = |bytes: &[u8]| match source {
            Source::Device => Stored::Device(bench.put(bytes)),
            Source::Pinned => Stored::Pinned(bench.pinned(bytes)),
        };
        let mut stream = || {
            let rows = [1, 2, 40, 255, 300][random.below(5)];
            let clock = random.clock(uniform, rows).unwrap();
            let data = match interp {
                Interp::Slerp => random.quaternions(from, rows),
                _ => random.values(from, rows * dim, true),
            };
            let stamps = match &clock {
                Clock::Uniform(_) => None,
                Clock::Stamps(stamps) => Some(store(&le(stamps))),
            };
            Stream { stored: store(&data), clock, data, stamps }
        };
        let streams = [stream(), stream()];
        Self { kernel, streams }
    }
}

/// What came out, by column: values and mask, poisoned before.
type Made = Vec<(Vec<u8>, Vec<u8>)>;

/// Makes a batch of `anchors` in room for `room` samples.
fn make(bench: &Bench, cases: &[Case], anchors: &[Anchor], room: usize) -> Made {
    let outputs: Vec<Output<'_>> = cases
        .iter()
        .map(|case| {
            let (Offsets::Rows(offsets) | Offsets::Times(offsets)) = &case.kernel.field().offsets;
            Output {
                kernel: &case.kernel,
                offsets: bench.put(&le(offsets)),
                values: bench.put(&vec![POISON; room * case.kernel.out_bytes()]),
                mask: Some(bench.put(&vec![POISON; room * case.kernel.steps()])),
            }
        })
        .collect();
    let columns: Vec<_> = outputs.iter().map(|output| output.column(anchors.len())).collect();
    let plan = AssemblePlan::new(&columns, anchors.len(), bench.device.facts().multiprocessors).unwrap();
    let mut bytes = plan.fields().to_vec();
    for case in cases {
        for sample in 0..anchors.len() {
            let stream = &case.streams[sample % 2];
            let stamps = stream.stamps.as_ref().map(Stored::address);
            DeviceStream { data: stream.stored.address(), clock: &stream.clock, stamps }
                .encode(&mut bytes)
                .unwrap();
        }
    }
    anchors.iter().for_each(|anchor| anchor.encode(&mut bytes));
    let (fields, sources, rest) = descriptor_bytes(&plan);
    assert_eq!(bytes.len() as u64, fields + sources + rest);
    // Uploaded in front of the launch on its own stream, as the daemon does.
    let (descriptors, pinned) = (bench.memory(bytes.len() as u64), bench.pinned(&bytes));
    bench.upload(bench.stream, &*pinned, &descriptors);
    bench.device.assemble(bench.stream, &Launch::new(&plan, &outputs, &descriptors)).unwrap();
    bench.device.finish(bench.stream).unwrap();
    let got = |output: &Output<'_>| (bench.get(&output.values), bench.get(output.mask.as_ref().unwrap()));
    outputs.iter().map(got).collect()
}

fn check(case: &Case, anchors: &[Anchor], (values, masks): &(Vec<u8>, Vec<u8>)) {
    let (size, steps) = (case.kernel.out_bytes(), case.kernel.steps());
    for (sample, &anchor) in anchors.iter().enumerate() {
        let stream = &case.streams[sample % 2];
        let (mut wanted, mut mask) = (vec![0x5a; size], vec![0x5a; steps]);
        let view = StreamView { clock: &stream.clock, data: &stream.data };
        case.kernel.assemble(view, anchor, &mut wanted, Some(&mut mask));
        let context =
            || format!("{:?}, {:?} rows, sample {sample}", case.kernel.field(), stream.clock.rows());
        assert!(mask == masks[sample * steps..][..steps], "masks differ: {}", context());
        let got = &values[sample * size..][..size];
        assert_same(case.kernel.field(), &wanted, got, &context);
    }
    let (values, masks) = (&values[anchors.len() * size..], &masks[anchors.len() * steps..]);
    assert!(values.iter().chain(masks).all(|&byte| byte == POISON), "rows past the batch were written");
}

/// Bit for bit, but any NaN is any other, and great circles to an ulp: the GPU has a sine of its own.
fn assert_same(field: &Field, wanted: &[u8], got: &[u8], context: &dyn Fn() -> String) {
    let size = field.to.size_bytes();
    for (at, (wanted, got)) in wanted.chunks_exact(size).zip(got.chunks_exact(size)).enumerate() {
        if wanted == got {
            continue;
        }
        let (a, b) = (value(field.to, wanted), value(field.to, got));
        let ulp = match field.to {
            DType::Float16 => 2_f64.powi(-10),
            DType::BFloat16 => 2_f64.powi(-7),
            DType::Float32 => 2_f64.powi(-23),
            _ => 0.0,
        };
        let near = field.interp == Interp::Slerp && (a - b).abs() <= 1e-12 + ulp * a.abs().max(b.abs());
        assert!(a.is_nan() && b.is_nan() || near, "element {at} is {b:e}, the twin has {a:e}: {}", context());
    }
}

fn value(dtype: DType, bytes: &[u8]) -> f64 {
    match dtype {
        DType::Float16 => half::f16::from_le_bytes(bytes.try_into().unwrap()).to_f64(),
        DType::BFloat16 => half::bf16::from_le_bytes(bytes.try_into().unwrap()).to_f64(),
        DType::Float32 => f64::from(f32::from_le_bytes(bytes.try_into().unwrap())),
        DType::Float64 => f64::from_le_bytes(bytes.try_into().unwrap()),
        _ => 0.0,
    }
}

fn offsets(random: &mut Random, steps: usize) -> Offsets {
    let steps = i64::try_from(steps).unwrap();
    match random.below(4) {
        0 => Offsets::Rows((-3..steps - 3).collect()),
        1 => Offsets::Rows((0..steps).map(|_| random.between(-60, 400)).collect()),
        2 => Offsets::Times((0..steps).map(|k| k * 20_000_000 - 100_000_000).collect()),
        _ => Offsets::Times((0..steps).map(|_| random.between(-3_000_000_000, 6_000_000_000)).collect()),
    }
}

/// Every pair of dtypes with every mode that has it, of `dim` elements, on both kinds of clock.
fn every_case(bench: &Bench, random: &mut Random, dim: usize, source: Source) -> Vec<Case> {
    let steps = (4000 / dim).clamp(3, 60);
    let mut kinds = Vec::new();
    for from in FLOATS {
        for to in FLOATS {
            kinds.extend(
                [Interp::Linear, Interp::Nearest, Interp::Previous].map(|interp| (interp, from, to, dim)),
            );
            if dim == 3 {
                kinds.push((Interp::Slerp, from, to, 4));
            }
        }
    }
    for dtype in DType::ALL.into_iter().filter(|dtype| !dtype.is_float()) {
        kinds.extend([Interp::Nearest, Interp::Previous].map(|interp| (interp, dtype, dtype, dim)));
    }
    let mut cases = Vec::new();
    for uniform in [false, true] {
        for &(interp, from, to, dim) in &kinds {
            let max_gap_ns = [None, Some(0), Some(12_000_000), Some(500_000_000)][random.below(4)];
            let field = Field { offsets: offsets(random, steps), interp, max_gap_ns, dim, from, to };
            cases.push(Case::new(bench, random, field, uniform, source));
        }
    }
    cases
}

/// Near the streams' times, on and beside stamps, and beyond the ends.
fn anchors(random: &mut Random, cases: &[Case], count: usize) -> Vec<Anchor> {
    let mut anchor = || {
        let clock = &cases[random.below(cases.len())].streams[random.below(2)].clock;
        let t_ns = clock.t_ns(random.below(clock.rows())) + random.between(-1500, 1500);
        Anchor { t_ns, row: random.between(-5, 300) }
    };
    (0..count).map(|_| anchor()).collect()
}

#[test]
fn a_batch_has_the_twins_values_and_masks_from_device_memory() {
    agrees(Source::Device);
}

#[test]
fn a_batch_has_the_twins_values_and_masks_from_pinned_memory() {
    agrees(Source::Pinned);
}

fn agrees(source: Source) {
    let (bench, mut random) = (Bench::new(), Random::from_environment().unwrap());
    // A registration costs a GPU's driver some time, a copy the simulation.
    let dims: &[usize] =
        if source == Source::Pinned && under() != Under::Simulation { &DIMS[..5] } else { &DIMS };
    for &dim in dims {
        let cases = every_case(&bench, &mut random, dim, source);
        let anchors = anchors(&mut random, &cases, 5);
        for (case, made) in cases.iter().zip(make(&bench, &cases, &anchors, anchors.len())) {
            check(case, &anchors, &made);
        }
    }
}

#[test]
fn a_batch_that_is_not_full_leaves_the_rest_of_its_room_alone() {
    let (bench, mut random) = (Bench::new(), Random::from_environment().unwrap());
    let cases = every_case(&bench, &mut random, 14, Source::Device);
    for rows in [1, 3] {
        let anchors = anchors(&mut random, &cases, rows);
        for (case, made) in cases.iter().zip(make(&bench, &cases, &anchors, 4)) {
            check(case, &anchors, &made);
        }
    }
}

#[test]
fn the_same_batch_has_the_same_bits() {
    let (bench, mut random) = (Bench::new(), Random::from_environment().unwrap());
    let cases = every_case(&bench, &mut random, 7, Source::Device);
    let anchors = anchors(&mut random, &cases, 6);
    let first = make(&bench, &cases, &anchors, anchors.len());
    assert!(first == make(&bench, &cases, &anchors, anchors.len()));
}
