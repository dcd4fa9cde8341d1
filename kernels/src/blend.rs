//! Values of targets: rows copied, cast, put on a line or on a great circle.
//!
//! The bodies that `simd.rs` compiles for each instruction set. They take [`Pick`]s, so that one call makes many
//! rows; what a row is made of was decided in `bracket.rs`.

use crate::bracket::Pick;
use crate::float::{Float, Wide};

/// Writes one row of `dim` elements for each pick, from `data`, rows of `dim` elements: linear, cast to `To`.
///
/// `out` holds exactly the picks' rows; every pick lies inside `data`.
#[inline(always)]
pub(crate) fn linear<From: Float, To: Float>(data: &[u8], dim: usize, picks: &[Pick], out: &mut [u8]) {
    let (data, out) = (From::split(data), To::split_mut(out));
    for (pick, out) in picks.iter().zip(out.chunks_exact_mut(dim)) {
        let start = pick.row * dim;
        let before = &data[start..start + dim];
        if pick.weight == 0.0 {
            for (out, &a) in out.iter_mut().zip(before) {
                *out = From::wide(a).cast::<To>();
            }
        } else {
            let after = &data[start + dim..start + 2 * dim];
            let weight = From::Wide::weight(pick.weight);
            for ((out, &a), &b) in out.iter_mut().zip(before).zip(after) {
                *out = From::Wide::lerp(From::wide(a), From::wide(b), weight).cast::<To>();
            }
        }
    }
}

/// Casts `data` to `out`, element by element.
#[inline(always)]
pub(crate) fn cast<From: Float, To: Float>(data: &[u8], out: &mut [u8]) {
    for (out, &raw) in To::split_mut(out).iter_mut().zip(From::split(data)) {
        *out = From::wide(raw).cast::<To>();
    }
}

/// As [`linear`], on the great circle between unit quaternions. Rows have 4 elements.
///
/// In `f64`: the angle is `2 atan2(|a - b|, |a + b|)`, which is exact where `acos` of the product is not. A row
/// that is no pick's blend is copied as it is, not normalised.
pub(crate) fn slerp<From: Float, To: Float>(data: &[u8], _dim: usize, picks: &[Pick], out: &mut [u8]) {
    let (data, out) = (From::split(data), To::split_mut(out));
    for (pick, out) in picks.iter().zip(out.chunks_exact_mut(4)) {
        let row = |row: usize| -> [f64; 4] {
            std::array::from_fn(|element| From::wide(data[row * 4 + element]).to_f64())
        };
        if pick.weight == 0.0 {
            for (out, &raw) in out.iter_mut().zip(&data[pick.row * 4..pick.row * 4 + 4]) {
                *out = From::wide(raw).cast::<To>();
            }
        } else {
            let quaternion = great_circle(row(pick.row), row(pick.row + 1), pick.weight);
            for (out, value) in out.iter_mut().zip(quaternion) {
                *out = To::from_f64(value);
            }
        }
    }
}

/// Under this angle between the quaternions, in radians, the weights are those of the line.
const SMALL_ANGLE: f64 = 1e-6;

/// The unit quaternion a share `weight` of the shorter way from `a` to `b`.
fn great_circle(a: [f64; 4], b: [f64; 4], weight: f64) -> [f64; 4] {
    let product: f64 = a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3];
    let b = if product < 0.0 { b.map(|value| -value) } else { b };
    let length = |v: [f64; 4]| (v[0] * v[0] + v[1] * v[1] + v[2] * v[2] + v[3] * v[3]).sqrt();
    let difference = std::array::from_fn(|i| a[i] - b[i]);
    let sum = std::array::from_fn(|i| a[i] + b[i]);
    let angle = 2.0 * length(difference).atan2(length(sum));
    let (of_a, of_b) = if angle < SMALL_ANGLE {
        (1.0 - weight, weight)
    } else {
        (((1.0 - weight) * angle).sin() / angle.sin(), (weight * angle).sin() / angle.sin())
    };
    let blend: [f64; 4] = std::array::from_fn(|i| of_a * a[i] + of_b * b[i]);
    let norm = length(blend);
    blend.map(|value| value / norm)
}
