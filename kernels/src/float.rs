//! The four floating element types: widening, casting and the line between two values.
//!
//! Every function here is straight-line integer and float arithmetic without a branch that depends on data, so
//! that the compiler can vectorise it wherever `simd.rs` inlines it, and so that every width gives the same bits.
//! Widening is exact; a cast rounds once, to nearest even; a NaN stays a NaN.

/// A floating element type of a stream or a batch. Values are little-endian bytes, of any alignment.
pub(crate) trait Float: 'static {
    /// One element's bytes.
    type Raw: Copy;
    /// The same as a number. Loops load, compute and store apart: bytes among arithmetic keep the compiler from
    /// vectorising.
    type Bits: Copy + Default;
    /// The type its arithmetic is done in.
    type Wide: Wide;

    /// `bytes` as elements; a rest shorter than an element is left out.
    fn split(bytes: &[u8]) -> &[Self::Raw];
    fn split_mut(bytes: &mut [u8]) -> &mut [Self::Raw];
    fn load(raw: Self::Raw) -> Self::Bits;
    fn store(bits: Self::Bits) -> Self::Raw;
    /// The value, exactly.
    fn wide(bits: Self::Bits) -> Self::Wide;
    fn from_f32(value: f32) -> Self::Bits;
    fn from_f64(value: f64) -> Self::Bits;
}

/// What values are blended in.
pub(crate) trait Wide: Copy {
    /// The weight, rounded to this type.
    fn weight(weight: f64) -> Self;
    /// `a + weight * (b - a)`, as `fma(weight, b, fma(-weight, a, a))`: at most 2 ulps of the larger neighbour off.
    fn lerp(a: Self, b: Self, weight: Self) -> Self;
    fn to_f64(self) -> f64;
    /// Rounds to `To`, once.
    fn cast<To: Float>(self) -> To::Bits;
}

impl Wide for f32 {
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "the formula rounds the weight to f32")]
    fn weight(weight: f64) -> Self {
        weight as Self
    }

    #[inline(always)]
    fn lerp(a: Self, b: Self, weight: Self) -> Self {
        weight.mul_add(b, (-weight).mul_add(a, a))
    }

    #[inline(always)]
    fn to_f64(self) -> f64 {
        f64::from(self)
    }

    #[inline(always)]
    fn cast<To: Float>(self) -> To::Bits {
        To::from_f32(self)
    }
}

impl Wide for f64 {
    #[inline(always)]
    fn weight(weight: f64) -> Self {
        weight
    }

    #[inline(always)]
    fn lerp(a: Self, b: Self, weight: Self) -> Self {
        weight.mul_add(b, (-weight).mul_add(a, a))
    }

    #[inline(always)]
    fn to_f64(self) -> f64 {
        self
    }

    #[inline(always)]
    fn cast<To: Float>(self) -> To::Bits {
        To::from_f64(self)
    }
}

macro_rules! split {
    ($bits:ty) => {
        type Raw = [u8; size_of::<$bits>()];
        type Bits = $bits;

        #[inline(always)]
        fn split(bytes: &[u8]) -> &[Self::Raw] {
            bytes.as_chunks().0
        }

        #[inline(always)]
        fn split_mut(bytes: &mut [u8]) -> &mut [Self::Raw] {
            bytes.as_chunks_mut().0
        }

        #[inline(always)]
        fn load(raw: Self::Raw) -> $bits {
            <$bits>::from_le_bytes(raw)
        }

        #[inline(always)]
        fn store(bits: $bits) -> Self::Raw {
            bits.to_le_bytes()
        }
    };
}

#[derive(Debug)]
pub(crate) enum F16 {}
#[derive(Debug)]
pub(crate) enum Bf16 {}

impl Float for f32 {
    type Wide = Self;
    split!(u32);

    #[inline(always)]
    fn wide(bits: Self::Bits) -> Self {
        Self::from_bits(bits)
    }

    #[inline(always)]
    fn from_f32(value: f32) -> Self::Bits {
        value.to_bits()
    }

    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "rounding is what is asked for")]
    fn from_f64(value: f64) -> Self::Bits {
        (value as Self).to_bits()
    }
}

impl Float for f64 {
    type Wide = Self;
    split!(u64);

    #[inline(always)]
    fn wide(bits: Self::Bits) -> Self {
        Self::from_bits(bits)
    }

    #[inline(always)]
    fn from_f32(value: f32) -> Self::Bits {
        Self::from(value).to_bits()
    }

    #[inline(always)]
    fn from_f64(value: f64) -> Self::Bits {
        value.to_bits()
    }
}

impl Float for F16 {
    type Wide = f32;
    split!(u16);

    #[inline(always)]
    fn wide(bits: Self::Bits) -> f32 {
        let half = u32::from(bits);
        // Exponent and mantissa in f32's places, then the exponents' bias by one exact product, which also
        // makes f16's subnormals normal. Infinity and NaN come out as 2^16 and more, and get f32's exponent.
        let scaled = f32::from_bits((half & 0x7fff) << 13) * f32::from_bits((254 - 15) << 23);
        let exponent = if scaled >= 65536.0 { 0x7f80_0000 } else { 0 };
        f32::from_bits(scaled.to_bits() | exponent | ((half & 0x8000) << 16))
    }

    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "each result has 16 bits")]
    fn from_f32(value: f32) -> Self::Bits {
        let bits = value.to_bits();
        let (magnitude, sign) = (bits & 0x7fff_ffff, (bits >> 16) & 0x8000);
        // Normal: rebias, add just under half of what is cut off, and 1 more where the kept part is odd.
        let odd = (magnitude >> 13) & 1;
        let normal = (magnitude.wrapping_add(0xc800_0fff).wrapping_add(odd)) >> 13;
        // Subnormal: a sum whose last bit is worth f16's last bit rounds for us.
        let magic = 0x3f00_0000_u32; // 0.5: its ulp is 2^-24
        let small = (f32::from_bits(magnitude) + f32::from_bits(magic)).to_bits().wrapping_sub(magic);
        let special = if magnitude > 0x7f80_0000 { 0x7e00 } else { 0x7c00 };
        let finite = if magnitude < 113 << 23 { small } else { normal };
        let half = if magnitude >= 143 << 23 { special } else { finite };
        (half | sign) as u16
    }

    #[inline(always)]
    fn from_f64(value: f64) -> Self::Bits {
        Self::from_f32(odd_f32(value))
    }
}

impl Float for Bf16 {
    type Wide = f32;
    split!(u16);

    #[inline(always)]
    fn wide(bits: Self::Bits) -> f32 {
        f32::from_bits(u32::from(bits) << 16)
    }

    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "each result has 16 bits")]
    fn from_f32(value: f32) -> Self::Bits {
        let bits = value.to_bits();
        let odd = (bits >> 16) & 1;
        let rounded = bits.wrapping_add(0x7fff).wrapping_add(odd) >> 16;
        let nan = (bits >> 16) | 0x40;
        let brain = if bits & 0x7fff_ffff > 0x7f80_0000 { nan } else { rounded };
        brain as u16
    }

    #[inline(always)]
    fn from_f64(value: f64) -> Self::Bits {
        Self::from_f32(odd_f32(value))
    }
}

/// `value` rounded to odd: what lies between two `f32` becomes the one whose last bit is 1, so that a second
/// rounding, to fewer bits, gives what one rounding of `value` would have given.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the rounding is put right below")]
fn odd_f32(value: f64) -> f32 {
    let near = value as f32;
    let back = f64::from(near);
    let bits = near.to_bits();
    let inward = if back.abs() > value.abs() { bits.wrapping_sub(1) } else { bits.wrapping_add(1) };
    let inexact = back != value && !value.is_nan();
    f32::from_bits(if inexact && bits & 1 == 0 { inward } else { bits })
}

#[cfg(test)]
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "small numbers of the tests' own"
)]
mod tests {
    use super::*;
    use half::{bf16, f16};
    use proptest::prelude::*;

    #[test]
    fn every_16_bit_value_widens_as_the_half_crate_says_and_comes_back() {
        for bits in 0..=u16::MAX {
            for (ours, theirs, back) in [
                (F16::wide(bits), f16::from_bits(bits).to_f32_const(), F16::from_f32(F16::wide(bits))),
                (Bf16::wide(bits), bf16::from_bits(bits).to_f32(), Bf16::from_f32(Bf16::wide(bits))),
            ] {
                if theirs.is_nan() {
                    assert!(ours.is_nan(), "{bits:#x}");
                } else {
                    assert_eq!((ours.to_bits(), back), (theirs.to_bits(), bits), "{bits:#x}");
                }
            }
        }
    }

    /// The nearest of all finite 16-bit values, even on ties, by search over values and not by bits.
    fn nearest_by_search(value: f64, widen: impl Fn(u16) -> f64, infinity: u16) -> u16 {
        let (mut low, mut high) = (0, infinity);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if widen(middle) <= value.abs() { low = middle } else { high = middle }
        }
        // Where infinity stands, the next power of two would: that is where its half-way point is measured to.
        let after = if high == infinity { 2.0 * widen(high - 1) - widen(high - 2) } else { widen(high) };
        let (below, above) = (value.abs() - widen(low), after - value.abs());
        let up = if below == above { low & 1 == 1 } else { above < below };
        let magnitude = if value.is_infinite() || up { high } else { low };
        magnitude | if value.is_sign_negative() { 0x8000 } else { 0 }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]
        #[test]
        fn casts_round_once_to_nearest_even(
            bits: u64, small in -26_i32..18, near: u16, off in -2_i64..3, brain: bool
        ) {
            let around = if brain { f64::from(Bf16::wide(near)) } else { f64::from(F16::wide(near)) };
            // Half-way points of neighbours, and an f64 ulp or two beside them, are where rounding twice shows.
            let next = near.wrapping_add(1);
            let next = if brain { f64::from(Bf16::wide(next)) } else { f64::from(F16::wide(next)) };
            let middle = f64::from_bits(((around + next) / 2.0).to_bits().wrapping_add_signed(off));
            let scaled = f64::from_bits(bits & 0x800f_ffff_ffff_ffff | ((1023 + i64::from(small)) as u64) << 52);
            for value in [f64::from_bits(bits), middle, scaled, f64::from(f32::from_bits(bits as u32))] {
                if value.is_nan() {
                    prop_assert!(F16::wide(F16::from_f64(value)).is_nan() && Bf16::wide(Bf16::from_f64(value)).is_nan());
                    continue;
                }
                let f16_wanted = nearest_by_search(value, |bits| f16::from_bits(bits).to_f64_const(), 0x7c00);
                let bf16_wanted = nearest_by_search(value, |bits| bf16::from_bits(bits).to_f64(), 0x7f80);
                prop_assert_eq!(F16::from_f64(value), f16_wanted, "f16 of {:e}", value);
                prop_assert_eq!(Bf16::from_f64(value), bf16_wanted, "bf16 of {:e}", value);
                let single = value as f32;
                if f64::from(single) == value {
                    prop_assert_eq!(F16::from_f32(single), f16_wanted);
                    prop_assert_eq!(Bf16::from_f32(single), bf16_wanted);
                }
            }
        }
    }
}
