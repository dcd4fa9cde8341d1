//! The twin against a reference that shares nothing with it: times in `i128`, a linear scan for every target,
//! values in `f64`, one element at a time. Outputs are poisoned, so that what is not written shows.

#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::unwrap_used,
    reason = "small numbers of the tests' own, and a test may panic"
)]

use half::{bf16, f16};
use proptest::prelude::*;
use robocache_kernels::{Anchor, Field, FieldError, FieldKernel, Offsets, StreamView};
use robocache_types::{Clock, DType, Interp, UniformClock};

const FLOATS: [DType; 4] = [DType::Float16, DType::BFloat16, DType::Float32, DType::Float64];
const DIMS: [usize; 8] = [1, 3, 7, 14, 16, 26, 256, 1078];

/// What the specification says a target is.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Target {
    Row(usize),
    /// Between this row and the next, at `since / gap` of the way.
    Between {
        row: usize,
        since: i128,
        gap: i128,
    },
}

fn reference_time(stamps: &[i64], t: i64, interp: Interp, max_gap: Option<i64>) -> (Target, bool) {
    let t = i128::from(t);
    let stamps: Vec<i128> = stamps.iter().map(|&stamp| i128::from(stamp)).collect();
    let mut nearest = 0;
    for row in 0..stamps.len() {
        if (stamps[row] - t).abs() < (stamps[nearest] - t).abs() {
            nearest = row;
        }
    }
    if (stamps[nearest] - t).abs() <= 1000 {
        return (Target::Row(nearest), false);
    }
    if t < stamps[0] {
        return (Target::Row(0), true);
    }
    if t > stamps[stamps.len() - 1] {
        return (Target::Row(stamps.len() - 1), true);
    }
    let row = (0..stamps.len()).rfind(|&row| stamps[row] <= t).unwrap();
    let gap = stamps[row + 1] - stamps[row];
    if max_gap.is_some_and(|max_gap| gap > i128::from(max_gap)) {
        return (Target::Row(row), true);
    }
    match interp {
        Interp::Previous => (Target::Row(row), false),
        Interp::Nearest => (Target::Row(nearest), false),
        Interp::Linear | Interp::Slerp => (Target::Between { row, since: t - stamps[row], gap }, false),
    }
}

fn read(dtype: DType, bytes: &[u8], element: usize) -> f64 {
    let size = dtype.size_bytes();
    let raw = &bytes[element * size..(element + 1) * size];
    match dtype {
        DType::Float16 => f16::from_le_bytes(raw.try_into().unwrap()).to_f64_const(),
        DType::BFloat16 => bf16::from_le_bytes(raw.try_into().unwrap()).to_f64(),
        DType::Float32 => f64::from(f32::from_le_bytes(raw.try_into().unwrap())),
        DType::Float64 => f64::from_le_bytes(raw.try_into().unwrap()),
        other => panic!("{other} is not floating"),
    }
}

/// Half the distance between neighbours of `dtype` around `value`: what one rounding may cost.
fn half_ulp(dtype: DType, value: f64) -> f64 {
    let (bits, smallest) = match dtype {
        DType::Float16 => (11, -24),
        DType::BFloat16 => (8, -133),
        DType::Float32 => (24, -149),
        _ => (53, -1074),
    };
    let exponent = if value == 0.0 { -1074 } else { value.abs().log2().floor() as i32 };
    2_f64.powi((exponent + 1 - bits).max(smallest)) / 2.0
}

fn random_values(dtype: DType, n: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(n * dtype.size_bytes());
    for _ in 0..n {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // Signs and magnitudes over many binades, as sensors in SI units have them.
        let value = (state as i32 as f64) / f64::from(1_u32 << 31) * 2_f64.powi((state >> 60) as i32 - 8);
        match dtype {
            DType::Float16 => bytes.extend(f16::from_f32(value as f32).to_le_bytes()),
            DType::BFloat16 => bytes.extend(bf16::from_f32(value as f32).to_le_bytes()),
            DType::Float32 => bytes.extend((value as f32).to_le_bytes()),
            DType::Float64 => bytes.extend(value.to_le_bytes()),
            other => bytes.extend(&state.to_le_bytes()[..other.size_bytes()]),
        }
    }
    bytes
}

fn check_sample(field: &Field, clock: &Clock, data: &[u8], anchor: Anchor) -> Result<(), TestCaseError> {
    let kernel = FieldKernel::new(field.clone()).unwrap();
    let (mut out, mut mask) = (vec![0xa5; kernel.out_bytes()], vec![0xa5; kernel.steps()]);
    let stream = StreamView { clock, data };
    kernel.assemble(stream, anchor, &mut out, Some(&mut mask));
    let mut without_mask = vec![0x5a; kernel.out_bytes()];
    kernel.assemble(stream, anchor, &mut without_mask, None);
    prop_assert_eq!(&out, &without_mask, "two runs over two poisons");
    let rows = kernel.rows(clock, anchor);
    let row_bytes = data.len() / clock.rows();
    let mut only = vec![0xff; data.len()];
    let bytes = rows.start * row_bytes..rows.end * row_bytes;
    only[bytes.clone()].copy_from_slice(&data[bytes]);
    kernel.assemble(StreamView { clock, data: &only }, anchor, &mut without_mask, None);
    prop_assert_eq!(&out, &without_mask, "from rows {:?} alone", rows);

    let (mut least, mut greatest) = (usize::MAX, 0);
    let stamps: Vec<i64> = (0..clock.rows()).map(|row| clock.t_ns(row)).collect();
    let Field { dim, to, interp, .. } = *field;
    let (Offsets::Rows(offsets) | Offsets::Times(offsets)) = &field.offsets;
    for (step, &offset) in offsets.iter().enumerate() {
        let (target, pad) = if matches!(field.offsets, Offsets::Rows(_)) {
            let wanted = i128::from(anchor.row) + i128::from(offset);
            let row = wanted.clamp(0, stamps.len() as i128 - 1);
            (Target::Row(row as usize), row != wanted)
        } else {
            let t = (i128::from(anchor.t_ns) + i128::from(offset)).clamp(i64::MIN.into(), i64::MAX.into());
            reference_time(&stamps, t as i64, interp, field.max_gap_ns)
        };
        let (Target::Row(row) | Target::Between { row, .. }) = target;
        (least, greatest) = (least.min(row), greatest.max(row));
        prop_assert_eq!(mask[step], u8::from(pad), "mask of step {} ({:?})", step, target);
        check_row(field, data, target, &out[step * dim * to.size_bytes()..][..dim * to.size_bytes()])?;
    }
    prop_assert_eq!(rows, least..(greatest + 2).min(clock.rows()), "no more rows than are needed");
    Ok(())
}

fn check_row(field: &Field, data: &[u8], target: Target, got: &[u8]) -> Result<(), TestCaseError> {
    let Field { dim, from, to, interp, .. } = *field;
    match target {
        Target::Row(row) if from == to => {
            let size = dim * from.size_bytes();
            prop_assert_eq!(got, &data[row * size..(row + 1) * size], "row {}, bit for bit", row);
        }
        Target::Row(row) => {
            for element in 0..dim {
                let wanted = read(from, data, row * dim + element);
                let got = read(to, got, element);
                prop_assert!(
                    (got - wanted).abs() <= half_ulp(to, wanted),
                    "{} of {:e}: {:e}",
                    to,
                    wanted,
                    got
                );
            }
        }
        Target::Between { row, since, gap } if interp == Interp::Linear => {
            let weight = since as f64 / gap as f64;
            for element in 0..dim {
                let (a, b) =
                    (read(from, data, row * dim + element), read(from, data, (row + 1) * dim + element));
                let wanted = a + weight * (b - a);
                let larger = a.abs().max(b.abs());
                let arithmetic = if from == DType::Float64 { DType::Float64 } else { DType::Float32 };
                // 2 ulps of the larger neighbour, then the one rounding to the target.
                let bound = 4.0 * half_ulp(arithmetic, larger) + half_ulp(to, larger);
                let got = read(to, got, element);
                prop_assert!(
                    (got - wanted).abs() <= bound,
                    "{from} {a:e}, {b:e} at {weight}: {got:e}, not {wanted:e}, off by {:e} of {bound:e}",
                    (got - wanted).abs()
                );
            }
        }
        Target::Between { row, since, gap } => {
            let weight = since as f64 / gap as f64;
            let quaternion =
                |row: usize| -> [f64; 4] { std::array::from_fn(|i| read(from, data, row * 4 + i)) };
            // A quaternion stored as f32 is a unit one to 1e-7 only, and each formula takes the rest its own way.
            let unit = if from == DType::Float64 { 1e-12 } else { 1e-7 };
            let wanted = reference_slerp(quaternion(row), quaternion(row + 1), weight);
            for (element, wanted) in wanted.into_iter().enumerate() {
                let got = read(to, got, element);
                prop_assert!(
                    (got - wanted).abs() <= unit + half_ulp(to, wanted),
                    "{:e}, not {:e}",
                    got,
                    wanted
                );
            }
        }
    }
    Ok(())
}

/// By halving the arc, so that no formula is shared: the middle of two unit quaternions is their normalised sum.
fn reference_slerp(mut a: [f64; 4], mut b: [f64; 4], mut weight: f64) -> [f64; 4] {
    let normalised = |v: [f64; 4]| {
        let norm = v.iter().map(|x| x * x).sum::<f64>().sqrt();
        v.map(|x| x / norm)
    };
    if a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>() < 0.0 {
        b = b.map(|x| -x);
    }
    for _ in 0..60 {
        let middle = normalised(std::array::from_fn(|i| a[i] + b[i]));
        weight *= 2.0;
        if weight < 1.0 { b = middle } else { (a, weight) = (middle, weight - 1.0) }
    }
    a
}

fn clocks() -> impl Strategy<Value = Clock> {
    let uniform = (
        prop_oneof![
            Just(30.0),
            Just(100.0),
            Just(29.97),
            Just(1000.0),
            (500_u32..2_000_000).prop_map(|millihertz| f64::from(millihertz) / 1000.0)
        ],
        1_usize..60,
    )
        .prop_flat_map(|(hz, rows)| {
            (-5_000_000_000_i64..5_000_000_000)
                .prop_map(move |first| Clock::Uniform(UniformClock::new(first, hz, rows).unwrap()))
        });
    // Jitter, stamps closer than the snap, and holes.
    let gap =
        prop_oneof![8 => 1_000_000_i64..20_000_000, 1 => 1_i64..3000, 1 => 100_000_000_i64..2_000_000_000];
    let irregular =
        (prop::collection::vec(gap, 0..60), -5_000_000_000_i64..5_000_000_000).prop_map(|(gaps, first)| {
            let mut stamps = vec![first];
            stamps.extend(gaps.iter().scan(first, |t, gap| {
                *t += gap;
                Some(*t)
            }));
            Clock::from_stamps(stamps).unwrap()
        });
    prop_oneof![uniform, irregular]
}

/// Absolute targets on, beside and between stamps and beyond both ends, sorted or not.
fn targets(clock: &Clock) -> impl Strategy<Value = Vec<i64>> + use<> {
    let clock = clock.clone();
    let (first, last) = (clock.first_ns(), clock.last_ns());
    let beside = (0..clock.rows(), prop_oneof![-3_i64..4, -1002_i64..-997, 997_i64..1003])
        .prop_map(move |(row, off)| clock.t_ns(row) + off);
    let anywhere = first - 3_000_000_000..last + 3_000_000_000;
    let extreme = prop_oneof![Just(i64::MIN), Just(i64::MAX)];
    (prop::collection::vec(prop_oneof![6 => beside, 6 => anywhere, 1 => extreme], 1..80), any::<bool>())
        .prop_map(|(mut targets, sorted)| {
            if sorted {
                targets.sort_unstable();
            }
            targets
        })
}

fn offsets_of(targets: &[i64], anchor_ns: i64) -> Offsets {
    Offsets::Times(targets.iter().map(|t| t.saturating_sub(anchor_ns)).collect())
}

fn max_gaps() -> impl Strategy<Value = Option<i64>> {
    prop_oneof![Just(None), Just(Some(0)), (1_000_i64..100_000_000).prop_map(Some), Just(Some(i64::MAX))]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn times_of_floating_streams_are_as_specified(
        (clock, targets) in clocks().prop_flat_map(|clock| (Just(clock.clone()), targets(&clock))),
        interp in prop::sample::select(vec![Interp::Linear, Interp::Nearest, Interp::Previous]),
        from in prop::sample::select(FLOATS.to_vec()), to in prop::sample::select(FLOATS.to_vec()),
        dim in prop::sample::select(DIMS.to_vec()),
        max_gap_ns in max_gaps(), anchor_ns in -1_000_000_000_i64..1_000_000_000, seed: u64,
    ) {
        let data = random_values(from, clock.rows() * dim, seed);
        let field = Field { offsets: offsets_of(&targets, anchor_ns), interp, max_gap_ns, dim, from, to };
        check_sample(&field, &clock, &data, Anchor { t_ns: anchor_ns, row: 0 })?;
    }

    #[test]
    fn quaternions_go_the_short_way_round(
        (clock, targets) in clocks().prop_flat_map(|clock| (Just(clock.clone()), targets(&clock))),
        from in prop::sample::select(vec![DType::Float32, DType::Float64]),
        to in prop::sample::select(FLOATS.to_vec()), max_gap_ns in max_gaps(), seed: u64, step in 0_i32..40,
    ) {
        // Rows that turn by anything between hardly and a lot, with signs flipped at will.
        let mut quaternion = [1.0_f64, 0.0, 0.0, 0.0];
        let noise = random_values(DType::Float64, clock.rows() * 4, seed);
        let mut data = Vec::new();
        for row in 0..clock.rows() {
            for (element, value) in quaternion.iter_mut().enumerate() {
                *value += read(DType::Float64, &noise, row * 4 + element) * 2_f64.powi(-step);
            }
            let norm = quaternion.iter().map(|x| x * x).sum::<f64>().sqrt();
            let sign = if noise[row * 32] & 1 == 0 { norm } else { -norm };
            quaternion = quaternion.map(|x| x / sign);
            for value in quaternion {
                match from {
                    DType::Float32 => data.extend((value as f32).to_le_bytes()),
                    _ => data.extend(value.to_le_bytes()),
                }
            }
        }
        let field = Field { offsets: offsets_of(&targets, 0), interp: Interp::Slerp, max_gap_ns, dim: 4, from, to };
        check_sample(&field, &clock, &data, Anchor { t_ns: 0, row: 0 })?;
    }

    #[test]
    fn streams_that_are_not_floating_are_copied(
        (clock, targets) in clocks().prop_flat_map(|clock| (Just(clock.clone()), targets(&clock))),
        interp in prop::sample::select(vec![Interp::Nearest, Interp::Previous]),
        dtype in prop::sample::select(DType::ALL.to_vec()),
        dim in prop::sample::select(DIMS.to_vec()), max_gap_ns in max_gaps(), seed: u64,
    ) {
        let data = random_values(dtype, clock.rows() * dim, seed);
        let field = Field { offsets: offsets_of(&targets, 0), interp, max_gap_ns, dim, from: dtype, to: dtype };
        check_sample(&field, &clock, &data, Anchor { t_ns: 0, row: 0 })?;
    }

    #[test]
    fn rows_are_clamped_to_the_episode_and_padded_outside(
        rows in 1_usize..60, anchor in prop_oneof![-5_i64..70, Just(i64::MIN), Just(i64::MAX)],
        start in -70_i64..70, steps in 1_i64..70, scattered in prop::collection::vec(any::<i8>(), 0..70),
        (from, to) in prop::sample::select(
            DType::ALL.iter().map(|&d| (d, d)).chain(FLOATS.iter().flat_map(|&f| FLOATS.map(|t| (f, t)))).collect::<Vec<_>>()),
        dim in prop::sample::select(DIMS.to_vec()), seed: u64,
    ) {
        let clock = Clock::Uniform(UniformClock::new(0, 30.0, rows).unwrap());
        let data = random_values(from, rows * dim, seed);
        let deltas: Box<[i64]> = if scattered.is_empty() {
            (start..start + steps).collect()
        } else {
            scattered.iter().map(|&d| d.into()).collect()
        };
        let interp = if from.is_float() { Interp::Linear } else { Interp::Previous };
        let field = Field { offsets: Offsets::Rows(deltas), interp, max_gap_ns: None, dim, from, to };
        check_sample(&field, &clock, &data, Anchor { t_ns: 0, row: anchor })?;
    }

    #[test]
    fn a_uniform_clock_and_its_stamps_give_the_same_bytes(
        (clock, targets) in (prop_oneof![Just(30.0), Just(29.97), (500_u32..2_000_000).prop_map(|millihertz| f64::from(millihertz) / 1000.0)], 1_usize..60)
            .prop_map(|(hz, rows)| Clock::Uniform(UniformClock::new(-77, hz, rows).unwrap()))
            .prop_flat_map(|clock| (Just(clock.clone()), targets(&clock))),
        max_gap_ns in max_gaps(), seed: u64,
    ) {
        let stamps = Clock::from_stamps((0..clock.rows()).map(|row| clock.t_ns(row)).collect::<Vec<_>>()).unwrap();
        let data = random_values(DType::Float32, clock.rows() * 7, seed);
        let (offsets, interp) = (offsets_of(&targets, 0), Interp::Linear);
        let field = Field { offsets, interp, max_gap_ns, dim: 7, from: DType::Float32, to: DType::Float32 };
        let kernel = FieldKernel::new(field).unwrap();
        let run = |clock: &Clock, poison: u8| {
            let (mut out, mut mask) = (vec![poison; kernel.out_bytes()], vec![poison; kernel.steps()]);
            let stream = StreamView { clock, data: &data };
            kernel.assemble(stream, Anchor { t_ns: 0, row: 0 }, &mut out, Some(&mut mask));
            (out, mask)
        };
        prop_assert_eq!(run(&clock, 0xa5), run(&stamps, 0x5a));
    }
}

fn linear(dim: usize, from: DType, to: DType) -> Field {
    let offsets = Offsets::Times(vec![0].into());
    Field { offsets, interp: Interp::Linear, max_gap_ns: None, dim, from, to }
}

#[test]
fn fields_that_make_no_sense_are_refused() {
    let refused = |field: Field| FieldKernel::new(field).unwrap_err();
    let float = || linear(3, DType::Float32, DType::Float32);
    let (from, to) = (DType::Int64, DType::Int64);
    assert_eq!(refused(linear(3, from, to)), FieldError::NotFloating { interp: Interp::Linear, from });
    assert_eq!(
        refused(Field { interp: Interp::Slerp, ..linear(4, from, to) }),
        FieldError::NotFloating { interp: Interp::Slerp, from }
    );
    let (from, to) = (DType::Int64, DType::Float32);
    assert_eq!(
        refused(Field { interp: Interp::Previous, ..linear(3, from, to) }),
        FieldError::Cast { from, to }
    );
    assert_eq!(refused(linear(3, to, from)), FieldError::Cast { from: to, to: from });
    assert_eq!(refused(Field { dim: 0, ..float() }), FieldError::NoElements);
    assert_eq!(refused(Field { offsets: Offsets::Rows(Box::new([])), ..float() }), FieldError::NoOffsets);
    assert_eq!(refused(Field { interp: Interp::Slerp, ..float() }), FieldError::NotAQuaternion { dim: 3 });
    assert_eq!(
        refused(Field { max_gap_ns: Some(-1), ..float() }),
        FieldError::NegativeGap { max_gap_ns: -1 }
    );
    let dim = usize::MAX / 2;
    assert_eq!(refused(Field { dim, ..float() }), FieldError::TooLarge { steps: 1, dim });
}

#[test]
fn a_nan_row_stays_nan_and_its_neighbours_do_not_become_it() {
    let clock = Clock::Uniform(UniformClock::new(0, 100.0, 4).unwrap());
    let data: Vec<u8> = [1.0_f32, f32::NAN, 3.0, 5.0].into_iter().flat_map(f32::to_le_bytes).collect();
    for to in FLOATS {
        let offsets =
            Offsets::Times(vec![0, 5_000_000, 10_000_000, 15_000_000, 20_000_000, 25_000_000].into());
        let kernel = FieldKernel::new(Field { offsets, ..linear(1, DType::Float32, to) }).unwrap();
        let mut out = vec![0; kernel.out_bytes()];
        let stream = StreamView { clock: &clock, data: &data };
        kernel.assemble(stream, Anchor { t_ns: 0, row: 0 }, &mut out, None);
        let got: Vec<f64> = (0..6).map(|step| read(to, &out, step)).collect();
        assert_eq!((got[0], got[4], got[5]), (1.0, 3.0, 4.0), "{to}");
        assert!(got[1..4].iter().all(|value| value.is_nan()), "{to}: {got:?}");
    }
}

#[test]
fn what_f32_cannot_hold_becomes_infinite() {
    let clock = Clock::Uniform(UniformClock::new(0, 100.0, 1).unwrap());
    for (value, wanted) in [(1e300, f32::INFINITY), (-1e300, f32::NEG_INFINITY), (1e-300, 0.0)] {
        let kernel = FieldKernel::new(linear(1, DType::Float64, DType::Float32)).unwrap();
        let mut out = [0xa5; 4];
        let stream = StreamView { clock: &clock, data: &f64::to_le_bytes(value) };
        kernel.assemble(stream, Anchor { t_ns: 0, row: 0 }, &mut out, None);
        assert_eq!(f32::from_le_bytes(out), wanted, "{value}");
    }
}
