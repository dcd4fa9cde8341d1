//! Amounts of memory as people write them: `8GiB`, `512MiB`, `1.5GB`, or plain bytes.

use std::fmt;
use std::str::FromStr;

use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize};

/// A number of bytes. Parses `4096`, `64KiB`, `8GiB` (powers of 1024) and `64kB`, `8GB` (powers of 1000).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Bytes(pub u64);

/// Text that is no amount of memory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{found:?} is no size; write bytes (1048576) or a number with a unit: {}", units())]
pub struct SizeError {
    pub found: String,
}

const UNITS: [(&str, u64); 9] = [
    ("B", 1),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("kB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
];

fn units() -> String {
    UNITS.map(|(name, _)| name).join(", ")
}

impl FromStr for Bytes {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let refuse = || SizeError { found: text.to_owned() };
        let trimmed = text.trim();
        let digits = trimmed.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(digits);
        let unit = unit.trim();
        let factor = if unit.is_empty() {
            1
        } else {
            UNITS.into_iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)).ok_or_else(refuse)?.1
        };
        // Whole and fractional part apart, so that no size loses bytes to rounding.
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() || fraction.len() > 9 || (number.ends_with('.')) {
            return Err(refuse());
        }
        let whole: u64 = whole.parse().map_err(|_no_number| refuse())?;
        let mut bytes = u128::from(whole) * u128::from(factor);
        if !fraction.is_empty() {
            let digits: u32 = fraction.parse().map_err(|_no_number| refuse())?;
            let scale = 10_u128.pow(u32::try_from(fraction.len()).map_err(|_too_long| refuse())?);
            bytes += u128::from(digits) * u128::from(factor) / scale;
        }
        u64::try_from(bytes).map(Self).map_err(|_too_large| refuse())
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = UNITS[..5].iter().rev().find(|(_, factor)| self.0 >= *factor);
        match unit {
            None | Some((_, 1)) => write!(f, "{} B", self.0),
            #[expect(clippy::cast_precision_loss, reason = "shown with one decimal")]
            Some((name, factor)) => write!(f, "{:.1} {name}", self.0 as f64 / *factor as f64),
        }
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Sizes;
        impl Visitor<'_> for Sizes {
            type Value = Bytes;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size such as \"8GiB\", or a number of bytes")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Bytes, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<Bytes, E> {
                u64::try_from(bytes)
                    .map(Bytes)
                    .map_err(|_negative| E::invalid_value(de::Unexpected::Signed(bytes), &self))
            }

            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<Bytes, E> {
                Ok(Bytes(bytes))
            }
        }
        deserializer.deserialize_any(Sizes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("8GiB", 8 << 30),
            ("8 gib", 8 << 30),
            ("1.5MiB", 3 << 19),
            ("1.5GB", 1_500_000_000),
            ("64kB", 64_000),
        ] {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused_with_the_units_there_are() {
        for text in ["", "GiB", "8G", "-1", "1.2.3", "1.", "99999999999TiB", "8 apples"] {
            let error = text.parse::<Bytes>().unwrap_err().to_string();
            assert!(error.contains("GiB"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn plain_bytes_are_themselves(bytes: u64) {
            prop_assert_eq!(bytes.to_string().parse(), Ok(Bytes(bytes)));
        }
    }
}
