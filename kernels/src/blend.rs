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
            cast_row::<From, To>(before, out);
        } else {
            let after = &data[start + dim..start + 2 * dim];
            lerp_row::<From, To>(before, after, From::Wide::weight(pick.weight), out);
        }
    }
}

#[inline(always)]
fn lerp_row<From: Float, To: Float>(
    before: &[From::Raw],
    after: &[From::Raw],
    weight: From::Wide,
    out: &mut [To::Raw],
) {
    let sixteens = out.len() / 16 * 16;
    let fours = out.len() / 4 * 4;
    lerp_blocks::<16, From, To>(&before[..sixteens], &after[..sixteens], weight, &mut out[..sixteens]);
    lerp_blocks::<4, From, To>(
        &before[sixteens..fours],
        &after[sixteens..fours],
        weight,
        &mut out[sixteens..fours],
    );
    lerp_blocks::<1, From, To>(&before[fours..], &after[fours..], weight, &mut out[fours..]);
}

/// Blocks of `N`; the lengths are equal, and multiples of it.
///
/// A block is loaded, computed and stored, each for itself: it overlaps nothing and has a known length, so that
/// it compiles to full registers, without checks.
#[inline(always)]
fn lerp_blocks<const N: usize, From: Float, To: Float>(
    before: &[From::Raw],
    after: &[From::Raw],
    weight: From::Wide,
    out: &mut [To::Raw],
) {
    let (befores, afters) = (before.as_chunks::<N>().0, after.as_chunks::<N>().0);
    for ((out, before), after) in out.as_chunks_mut::<N>().0.iter_mut().zip(befores).zip(afters) {
        let (a, b) = (load_block::<N, From>(before), load_block::<N, From>(after));
        let mut made = [To::Bits::default(); N];
        for i in 0..N {
            made[i] = From::Wide::lerp(From::wide(a[i]), From::wide(b[i]), weight).cast::<To>();
        }
        store_block::<N, To>(&made, out);
    }
}

#[inline(always)]
fn cast_row<From: Float, To: Float>(row: &[From::Raw], out: &mut [To::Raw]) {
    let sixteens = out.len() / 16 * 16;
    let fours = out.len() / 4 * 4;
    cast_blocks::<16, From, To>(&row[..sixteens], &mut out[..sixteens]);
    cast_blocks::<4, From, To>(&row[sixteens..fours], &mut out[sixteens..fours]);
    cast_blocks::<1, From, To>(&row[fours..], &mut out[fours..]);
}

/// As [`lerp_blocks`].
#[inline(always)]
fn cast_blocks<const N: usize, From: Float, To: Float>(row: &[From::Raw], out: &mut [To::Raw]) {
    for (out, row) in out.as_chunks_mut::<N>().0.iter_mut().zip(row.as_chunks::<N>().0) {
        let values = load_block::<N, From>(row);
        let mut made = [To::Bits::default(); N];
        for i in 0..N {
            made[i] = From::wide(values[i]).cast::<To>();
        }
        store_block::<N, To>(&made, out);
    }
}

#[inline(always)]
fn load_block<const N: usize, From: Float>(raw: &[From::Raw; N]) -> [From::Bits; N] {
    let mut bits = [From::Bits::default(); N];
    for i in 0..N {
        bits[i] = From::load(raw[i]);
    }
    bits
}

#[inline(always)]
fn store_block<const N: usize, To: Float>(bits: &[To::Bits; N], out: &mut [To::Raw; N]) {
    for i in 0..N {
        out[i] = To::store(bits[i]);
    }
}

/// Casts `data` to `out`, element by element.
#[inline(always)]
pub(crate) fn cast<From: Float, To: Float>(data: &[u8], out: &mut [u8]) {
    cast_row::<From, To>(From::split(data), To::split_mut(out));
}

/// As [`linear`], on the great circle between unit quaternions. Rows have 4 elements.
///
/// In `f64`: the angle is `2 atan2(|a - b|, |a + b|)`, which is exact where `acos` of the product is not. A row
/// that is no pick's blend is copied as it is, not normalised.
pub(crate) fn slerp<From: Float, To: Float>(data: &[u8], _dim: usize, picks: &[Pick], out: &mut [u8]) {
    let (data, out) = (From::split(data), To::split_mut(out));
    for (pick, out) in picks.iter().zip(out.chunks_exact_mut(4)) {
        let row = |row: usize| -> [f64; 4] {
            std::array::from_fn(|element| From::wide(From::load(data[row * 4 + element])).to_f64())
        };
        if pick.weight == 0.0 {
            cast_row::<From, To>(&data[pick.row * 4..pick.row * 4 + 4], out);
        } else {
            let quaternion = great_circle(row(pick.row), row(pick.row + 1), pick.weight);
            for (out, value) in out.iter_mut().zip(quaternion) {
                *out = To::store(To::from_f64(value));
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
