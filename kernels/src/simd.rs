//! The blending bodies of `blend.rs`, compiled for the instruction sets a CPU may have.
//!
//! Owns the choice, made once for each field and not for each row. Every version must give the same bits: the
//! bodies hold no reduction and fuse only where they say `mul_add`, so a wider register changes nothing but
//! speed, and the tests compare them bit for bit. Why this file may be unsafe: docs/adr/0002-simd-in-kernels.md.

#![expect(unsafe_code, reason = "calling a function compiled for more than the baseline CPU")]

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
