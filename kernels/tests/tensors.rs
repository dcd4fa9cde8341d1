//! `resample` and `fuse` against a plain reference: a linear scan for every target and values in `f64`.

#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test may panic, and knows its numbers"
)]

use half::{bf16, f16};
use proptest::prelude::*;
use robocache_kernels::{Tensor, TensorError, Times, fuse, resample};
use robocache_types::DType;

fn encode(dtype: DType, values: &[f64]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for &value in values {
        match dtype {
            DType::Float16 => bytes.extend(f16::from_f32(value as f32).to_le_bytes()),
            DType::BFloat16 => bytes.extend(bf16::from_f32(value as f32).to_le_bytes()),
            DType::Float32 => bytes.extend((value as f32).to_le_bytes()),
            DType::Float64 => bytes.extend(value.to_le_bytes()),
            DType::Int64 => bytes.extend((value as i64).to_le_bytes()),
            other => panic!("{other}"),
        }
    }
    bytes
}

fn decode(dtype: DType, bytes: &[u8]) -> Vec<f64> {
    bytes
        .chunks_exact(dtype.size_bytes())
        .map(|raw| match dtype {
            DType::Float16 => f16::from_le_bytes(raw.try_into().unwrap()).to_f64_const(),
            DType::BFloat16 => bf16::from_le_bytes(raw.try_into().unwrap()).to_f64(),
            DType::Float32 => f64::from(f32::from_le_bytes(raw.try_into().unwrap())),
            DType::Float64 => f64::from_le_bytes(raw.try_into().unwrap()),
            other => panic!("{other}"),
        })
        .collect()
}

#[derive(Debug, Clone)]
struct Stream {
    rows: usize,
    dim: usize,
    values: Vec<f64>,
    times: Vec<f64>,
}

fn stream(batch: usize) -> impl Strategy<Value = Stream> {
    (1_usize..40, prop::sample::select(vec![1_usize, 3, 4, 14, 26, 33])).prop_flat_map(move |(rows, dim)| {
        let values = prop::collection::vec(-100.0..100.0_f64, batch * rows * dim);
        // Whole numbers, so that every time dtype holds them; steps of 0 make equal times.
        let times = prop::collection::vec(prop::collection::vec(0_i32..5, rows), batch).prop_map(|steps| {
            let running = |steps: &Vec<i32>| {
                steps
                    .iter()
                    .scan(-20, |t, step| {
                        *t += step;
                        Some(f64::from(*t))
                    })
                    .collect::<Vec<_>>()
            };
            steps.iter().flat_map(running).collect::<Vec<f64>>()
        });
        (values, times).prop_map(move |(values, times)| Stream { rows, dim, values, times })
    })
}

fn reference(stream: &Stream, values: &[f64], batch: usize, target: f64, element: usize) -> (f64, f64) {
    let times = &stream.times[batch * stream.rows..][..stream.rows];
    let value = |row: usize| values[(batch * stream.rows + row) * stream.dim + element];
    let Some(row) = times.iter().rposition(|&time| time <= target) else {
        return (value(0), value(0).abs());
    };
    if row + 1 == stream.rows || times[row] == target {
        return (value(row), value(row).abs());
    }
    let share = (target - times[row]) / (times[row + 1] - times[row]);
    let (a, b) = (value(row), value(row + 1));
    (a + share * (b - a), a.abs().max(b.abs()))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn every_stream_is_resampled_into_its_columns(
        (batch, streams, steps, targets) in (1_usize..4).prop_flat_map(|batch| (
            Just(batch), prop::collection::vec(stream(batch), 1..4), Just(30), prop::collection::vec(-30_i32..120, batch * 30))),
        values in prop::sample::select(vec![DType::Float16, DType::BFloat16, DType::Float32, DType::Float64]),
        time in prop::sample::select(vec![DType::Float32, DType::Float64, DType::Int64]),
    ) {
        let targets: Vec<f64> = targets.into_iter().map(f64::from).collect();
        let encoded: Vec<(Vec<u8>, Vec<u8>)> =
            streams.iter().map(|s| (encode(values, &s.values), encode(time, &s.times))).collect();
        let tensors: Vec<(Tensor<'_>, Times<'_>)> = streams.iter().zip(&encoded).map(|(s, (data, times))| (
            Tensor { dtype: values, shape: [batch, s.rows, s.dim], data },
            Times { dtype: time, shape: [batch, s.rows], data: times },
        )).collect();
        let target_bytes = encode(time, &targets);
        let times_tgt = Times { dtype: time, shape: [batch, steps], data: &target_bytes };
        let width: usize = streams.iter().map(|s| s.dim).sum();
        let mut out = vec![0xa5; batch * steps * width * values.size_bytes()];
        fuse(&tensors, times_tgt, &mut out).unwrap();
        let got = decode(values, &out);
        let ulp = match values { DType::Float16 => 2_f64.powi(-10), DType::BFloat16 => 2_f64.powi(-7),
            DType::Float32 => 2_f64.powi(-22), _ => 2_f64.powi(-51) };
        let mut column = 0;
        for (stream, (data, _)) in streams.iter().zip(&encoded) {
            let stored = decode(values, data);
            for b in 0..batch {
                for step in 0..steps {
                    for element in 0..stream.dim {
                        let (wanted, larger) = reference(stream, &stored, b, targets[b * steps + step], element);
                        let got = got[(b * steps + step) * width + column + element];
                        prop_assert!((got - wanted).abs() <= ulp * larger, "{} not {}", got, wanted);
                    }
                }
            }
            column += stream.dim;
        }
        // One stream alone is its part of the fusion.
        let (src, times) = tensors[0];
        let mut alone = vec![0x5a; batch * steps * streams[0].dim * values.size_bytes()];
        resample(src, times, times_tgt, &mut alone).unwrap();
        let row = streams[0].dim * values.size_bytes();
        for (alone, fused) in alone.chunks_exact(row).zip(out.chunks_exact(width * values.size_bytes())) {
            prop_assert_eq!(alone, &fused[..row]);
        }
    }
}

fn one(times: &[f64], targets: &[f64]) -> Result<Vec<f64>, TensorError> {
    let data: Vec<f64> = (0..times.len()).map(|row| row as u32).map(f64::from).collect();
    let (data, times_bytes) = (encode(DType::Float64, &data), encode(DType::Float64, times));
    let target_bytes = encode(DType::Float64, targets);
    let mut out = vec![0; targets.len() * 8];
    resample(
        Tensor { dtype: DType::Float64, shape: [1, times.len(), 1], data: &data },
        Times { dtype: DType::Float64, shape: [1, times.len()], data: &times_bytes },
        Times { dtype: DType::Float64, shape: [1, targets.len()], data: &target_bytes },
        &mut out,
    )?;
    Ok(decode(DType::Float64, &out))
}

#[test]
fn edges_are_held_equal_times_take_the_later_row_and_a_nan_target_is_nan() {
    let got = one(&[0.0, 1.0, 1.0, 2.0], &[-1.0, 0.5, 1.0, 1.5, 9.0, f64::NAN]).unwrap();
    assert_eq!(got[..5], [0.0, 0.5, 2.0, 2.5, 3.0]);
    assert!(got[5].is_nan());
    assert!(one(&[0.0], &[f64::NAN]).unwrap()[0].is_nan());
}

#[test]
fn what_does_not_fit_is_refused_with_the_shapes() {
    let refused = one(&[0.0, 2.0, 1.0], &[0.5]).unwrap_err();
    let (before, after) = ("2".to_owned(), "1".to_owned());
    assert_eq!(refused, TensorError::NotAscending { stream: 0, batch: 0, row: 1, before, after });
    assert!(matches!(one(&[0.0, f64::NAN], &[0.5]), Err(TensorError::NotAscending { row: 0, .. })));
    assert_eq!(one(&[], &[0.5]), Err(TensorError::Empty { stream: 0, src: [1, 0, 1], targets: [1, 1] }));
    let targets = Times { dtype: DType::Float64, shape: [1, 1], data: &[0; 8] };
    assert_eq!(fuse(&[], targets, &mut []), Err(TensorError::NoStreams));
    let src = Tensor { dtype: DType::Float32, shape: [1, 2, 3], data: &[0; 24] };
    let times = Times { dtype: DType::Float64, shape: [1, 2], data: &[0; 16] };
    let mut out = [0; 12];
    assert_eq!(resample(src, times, targets, &mut out), Ok(()));
    let refused = |src, times, targets, out: &mut [u8]| resample(src, times, targets, out).unwrap_err();
    assert_eq!(
        refused(src, times, targets, &mut out[..8]),
        TensorError::Length { what: "out", wanted: 12, found: 8 }
    );
    assert_eq!(
        refused(Tensor { data: &[0; 20], ..src }, times, targets, &mut out),
        TensorError::Length { what: "src", wanted: 24, found: 20 }
    );
    assert!(matches!(
        refused(src, Times { shape: [2, 1], ..times }, targets, &mut out),
        TensorError::Shapes { times: [2, 1], .. }
    ));
    assert!(matches!(
        refused(src, Times { dtype: DType::Int64, ..times }, targets, &mut out),
        TensorError::MixedTimes { found: DType::Int64, .. }
    ));
    assert!(matches!(
        refused(Tensor { dtype: DType::Int32, ..src }, times, targets, &mut out),
        TensorError::Values { found: DType::Int32, .. }
    ));
    let times = Times { dtype: DType::Int32, shape: [1, 2], data: &[0; 8] };
    let targets = Times { dtype: DType::Int32, shape: [1, 1], data: &[0; 4] };
    assert_eq!(refused(src, times, targets, &mut out), TensorError::TimeDtype { found: DType::Int32 });
}
