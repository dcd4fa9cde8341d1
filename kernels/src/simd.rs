//! The blending bodies of `blend.rs`, compiled for the instruction sets a CPU may have, and stores past the caches.
//!
//! Owns the choice, made once for each field and not for each row. Every version must give the same bits: the
//! bodies hold no reduction and fuse only where they say `mul_add`, so a wider register changes nothing but
//! speed, and the tests compare them bit for bit. Why this file may be unsafe: docs/adr/0002-simd-in-kernels.md.

#![expect(
    unsafe_code,
    reason = "calling a function compiled for more than the baseline CPU; streaming stores"
)]

use robocache_types::DType;

use crate::blend;
use crate::bracket::Pick;
use crate::float::{Bf16, F16, Float};

/// `(data, dim, picks, out)`; see [`blend::linear`].
pub(crate) type Blend = fn(&[u8], usize, &[Pick], &mut [u8]);
/// `(data, out)`; see [`blend::cast`].
pub(crate) type Cast = fn(&[u8], &mut [u8]);

/// The functions of one pair of floating dtypes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ops {
    pub linear: Blend,
    pub cast: Cast,
    pub slerp: Blend,
}

/// An instruction set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Level {
    /// What every CPU of the target has; `mul_add` is a library call where it has no such instruction.
    Baseline,
    #[cfg(target_arch = "x86_64")]
    Avx2,
}

impl Level {
    /// The best this CPU has.
    pub(crate) fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        if Self::avx2() {
            return Self::Avx2;
        }
        Self::Baseline
    }

    #[cfg(target_arch = "x86_64")]
    fn avx2() -> bool {
        is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
    }
}

/// The functions from `from` to `to`; `None` unless both are floating.
pub(crate) fn ops(from: DType, to: DType, level: Level) -> Option<Ops> {
    match from {
        DType::Float16 => ops_from::<F16>(to, level),
        DType::BFloat16 => ops_from::<Bf16>(to, level),
        DType::Float32 => ops_from::<f32>(to, level),
        DType::Float64 => ops_from::<f64>(to, level),
        _ => None,
    }
}

fn ops_from<From: Float>(to: DType, level: Level) -> Option<Ops> {
    Some(match to {
        DType::Float16 => ops_of::<From, F16>(level),
        DType::BFloat16 => ops_of::<From, Bf16>(level),
        DType::Float32 => ops_of::<From, f32>(level),
        DType::Float64 => ops_of::<From, f64>(level),
        _ => return None,
    })
}

fn ops_of<From: Float, To: Float>(level: Level) -> Ops {
    let slerp = blend::slerp::<From, To>;
    match level {
        Level::Baseline => Ops { linear: blend::linear::<From, To>, cast: blend::cast::<From, To>, slerp },
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => Ops { linear: avx2::linear::<From, To>, cast: avx2::cast::<From, To>, slerp },
    }
}

/// Copies `rows`, one behind the other, to `out`, which is as long as all of them. Where the CPU can, the bytes go
/// to memory past the caches: nothing is read that is written, and nothing is pushed out of a cache.
///
/// The bytes are there for other threads as after any store, once this has returned.
pub(crate) fn stream<'a>(rows: impl Iterator<Item = &'a [u8]> + Clone, out: &mut [u8]) {
    #[cfg(target_arch = "x86_64")]
    sse2::stream(rows, out);
    #[cfg(not(target_arch = "x86_64"))]
    {
        let mut out = out;
        for row in rows {
            let (to, rest) = out.split_at_mut(row.len());
            to.copy_from_slice(row);
            out = rest;
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod sse2 {
    use std::arch::x86_64::{
        __m128i, _MM_HINT_T0, _mm_prefetch, _mm_set_epi64x, _mm_sfence, _mm_stream_si128,
    };

    pub(super) fn stream<'a>(rows: impl Iterator<Item = &'a [u8]> + Clone, out: &mut [u8]) {
        // SAFETY: it asks only for a CPU with SSE2, which is part of x86-64.
        unsafe { stream_rows(rows, out) }
    }

    #[target_feature(enable = "sse2")]
    fn stream_rows<'a>(rows: impl Iterator<Item = &'a [u8]> + Clone, mut out: &mut [u8]) {
        let _fence = Fence;
        let mut later = rows.clone();
        for row in later.by_ref().take(ROWS_AHEAD) {
            prefetch(row);
        }
        for row in rows {
            if let Some(row) = later.next() {
                prefetch(row);
            }
            let (to, rest) = std::mem::take(&mut out).split_at_mut(row.len());
            stream_row(row, to);
            out = rest;
        }
    }

    /// Streaming stores are ordered with nothing, a release store included. Its end orders them before whatever comes
    /// later, a panic's unwinding too, so that callers need to know nothing of it.
    struct Fence;

    impl Drop for Fence {
        fn drop(&mut self) {
            // SAFETY: it asks only for a CPU with SSE, which is part of x86-64.
            unsafe { _mm_sfence() }
        }
    }

    /// Asks for a row. While streaming stores are under way the CPU reads ahead too little by itself.
    #[inline]
    #[target_feature(enable = "sse2")]
    fn prefetch(row: &[u8]) {
        for line in row.chunks(LINE) {
            _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast());
        }
    }

    /// Leaves stores behind that are not ordered: `stream_rows` fences.
    #[inline]
    #[target_feature(enable = "sse2")]
    fn stream_row(from: &[u8], to: &mut [u8]) {
        let unaligned = to.as_ptr().align_offset(LINE).min(to.len());
        let (head, to) = to.split_at_mut(unaligned);
        let (from_head, from) = from.split_at(unaligned);
        head.copy_from_slice(from_head);
        let (lines, tail) = to.as_chunks_mut::<LINE>();
        let (from_lines, from_tail) = from.as_chunks::<LINE>();
        for (to, from) in lines.iter_mut().zip(from_lines) {
            for (to, from) in to.as_chunks_mut::<16>().0.iter_mut().zip(from.as_chunks::<16>().0) {
                let (place, value) = (to.as_mut_ptr().cast::<__m128i>(), register(*from));
                // SAFETY: it writes 16 bytes, which `to` is and which it borrows mutably. The place is a multiple
                // of 16, as it asks: `lines` begins at a multiple of 64 (`unaligned`, or there are no lines), and
                // steps by 64 and 16. `stream_rows`, the only caller, fences before it returns or unwinds.
                unsafe { _mm_stream_si128(place, value) };
            }
        }
        tail.copy_from_slice(from_tail);
    }

    /// The bytes as they lie in memory.
    #[inline]
    #[target_feature(enable = "sse2")]
    fn register(bytes: [u8; 16]) -> __m128i {
        let [low, high] = [0, 8].map(|at| i64::from_le_bytes(std::array::from_fn(|i| bytes[at + i])));
        _mm_set_epi64x(high, low)
    }

    /// Bytes that leave the CPU together, if all are written.
    const LINE: usize = 64;

    /// Measured at 1, 2, 4, 8 and 16 rows of 1 KiB.
    const ROWS_AHEAD: usize = 2;
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::{Float, Level, Pick, blend};

    #[target_feature(enable = "avx2,fma")]
    fn linear_avx2<From: Float, To: Float>(data: &[u8], dim: usize, picks: &[Pick], out: &mut [u8]) {
        blend::linear::<From, To>(data, dim, picks, out);
    }

    #[target_feature(enable = "avx2,fma")]
    fn cast_avx2<From: Float, To: Float>(data: &[u8], out: &mut [u8]) {
        blend::cast::<From, To>(data, out);
    }

    pub(super) fn linear<From: Float, To: Float>(data: &[u8], dim: usize, picks: &[Pick], out: &mut [u8]) {
        assert!(Level::avx2(), "chosen for a CPU without AVX2 and FMA");
        // SAFETY: linear_avx2 asks only for a CPU with AVX2 and FMA, and the line above made sure of it (the
        // standard library caches the answer, so that it costs a load).
        unsafe { linear_avx2::<From, To>(data, dim, picks, out) }
    }

    pub(super) fn cast<From: Float, To: Float>(data: &[u8], out: &mut [u8]) {
        assert!(Level::avx2(), "chosen for a CPU without AVX2 and FMA");
        // SAFETY: cast_avx2 asks only for a CPU with AVX2 and FMA, and the line above made sure of it.
        unsafe { cast_avx2::<From, To>(data, out) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FLOATS: [DType; 4] = [DType::Float16, DType::BFloat16, DType::Float32, DType::Float64];

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Over every bit pattern: NaN, infinities and subnormals too.
        #[test]
        fn every_instruction_set_gives_the_same_bits(
            from in prop::sample::select(FLOATS.to_vec()), to in prop::sample::select(FLOATS.to_vec()),
            dim in 1_usize..70, bytes in prop::collection::vec(any::<u8>(), 70 * 8 * 4),
            picks in prop::collection::vec((0_usize..3, prop_oneof![Just(0.0), 0.0..1.0_f64]), 1..40), skew in 0_usize..8,
        ) {
            let rows = bytes.len().saturating_sub(skew) / (dim * from.size_bytes());
            let data = &bytes[skew..][..rows * dim * from.size_bytes()];
            let picks: Vec<Pick> = picks.into_iter().map(|(row, weight)| Pick { row: row.min(rows - 2), weight }).collect();
            let run = |level: Level, poison: u8| {
                let ops = ops(from, to, level).unwrap();
                let mut linear = vec![poison; picks.len() * dim * to.size_bytes()];
                (ops.linear)(data, dim, &picks, &mut linear);
                let mut cast = vec![poison; rows * dim * to.size_bytes()];
                (ops.cast)(data, &mut cast);
                (linear, cast)
            };
            prop_assert_eq!(run(Level::Baseline, 0xa5), run(Level::best(), 0x5a));
        }
    }

    proptest! {
        #[test]
        fn streamed_rows_are_the_rows_and_nothing_beside_them(
            bytes in prop::collection::vec(any::<u8>(), 2000), skew in 0_usize..70,
            rows in prop::collection::vec((0_usize..1500, 0_usize..400), 0..5),
        ) {
            let rows: Vec<&[u8]> = rows.iter().map(|&(start, len)| &bytes[start..start + len]).collect();
            let mut wanted = vec![0xa5; skew];
            wanted.extend(rows.concat());
            let mut out = vec![0xa5; wanted.len() + 70];
            let end = wanted.len();
            stream(rows.into_iter(), &mut out[skew..end]);
            prop_assert_eq!(&out[..end], &wanted);
            prop_assert!(out[end..].iter().all(|&byte| byte == 0xa5));
        }
    }

    #[test]
    fn this_machine_tests_more_than_the_baseline() {
        // Elsewhere the comparison above compares the baseline with itself.
        #[cfg(target_arch = "x86_64")]
        assert_eq!(
            Level::best() == Level::Avx2,
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
        );
        assert!(ops(DType::Int32, DType::Int32, Level::best()).is_none());
    }
}
