//! Stamps as files have them, made `i64` nanoseconds; and what becomes of rows whose stamps are out of order or equal.
//!
//! Nothing is lost: integers are multiplied exactly or refused, floats are the nanosecond nearest to the exact value
//! of the stored float (ties to even, computed on its bits, never by a float multiplication). Whatever leaves this
//! file ascends strictly. Nothing here opens files; a [`Site`] only says where a column came from, for errors.

use std::path::{Path, PathBuf};

use arrow::array::{Array, AsArray, PrimitiveArray};
use arrow::datatypes::{
    ArrowPrimitiveType, DataType, Float16Type, Float32Type, Float64Type, Int8Type, Int16Type, Int32Type,
    Int64Type, TimeUnit, TimestampMicrosecondType, TimestampMillisecondType, TimestampNanosecondType,
    TimestampSecondType, UInt8Type, UInt16Type, UInt32Type, UInt64Type,
};
use serde::Deserialize;

/// What one count of a stamp column is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unit {
    S,
    Ms,
    Us,
    Ns,
}

impl Unit {
    /// Nanoseconds in one count.
    pub const fn ns(self) -> i64 {
        match self {
            Self::S => 1_000_000_000,
            Self::Ms => 1_000_000,
            Self::Us => 1_000,
            Self::Ns => 1,
        }
    }

    /// The name a manifest uses.
    pub const fn name(self) -> &'static str {
        match self {
            Self::S => "s",
            Self::Ms => "ms",
            Self::Us => "us",
            Self::Ns => "ns",
        }
    }
}

/// What to do with stamps that run backwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Order {
    #[default]
    Error,
    /// Sort by stamp; rows of equal stamps keep their order.
    Sort,
}

/// What to do with rows of equal stamps, once rows are in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Duplicates {
    #[default]
    Last,
    First,
    /// Element by element, in f64; floating streams only.
    Mean,
    Error,
}

/// Where a column came from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Site<'a> {
    pub(crate) path: &'a Path,
    pub(crate) column: &'a str,
}

/// Why a column is not a clock. Rows are counted from 0, as in the file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TimeError {
    #[error(
        "{path:?}: column {column:?} is {found}, which holds no stamps; wanted an integer, a float or an Arrow timestamp"
    )]
    NotStamps { path: PathBuf, column: String, found: String },
    #[error(
        "{path:?}: column {column:?} is {found}: the manifest must say its unit (\"s\", \"ms\", \"us\" or \"ns\")"
    )]
    NoUnit { path: PathBuf, column: String, found: String },
    #[error(
        "{path:?}: column {column:?} is {found}, but the manifest says unit = {declared:?}; leave the unit out"
    )]
    UnitContradicts { path: PathBuf, column: String, found: String, declared: &'static str },
    #[error("{path:?}: column {column:?} has no stamp (null) at row {row}")]
    Null { path: PathBuf, column: String, row: usize },
    #[error("{path:?}: column {column:?} has {value} at row {row}, which is no time")]
    NotFinite { path: PathBuf, column: String, row: usize, value: f64 },
    #[error(
        "{path:?}: column {column:?} has {value} {unit} at row {row}, which does not fit 64-bit nanoseconds; is the unit right?"
    )]
    Overflow { path: PathBuf, column: String, row: usize, value: String, unit: &'static str },
    #[error(
        "{path:?}: column {column:?}: stamps go back at row {row}: {before_ns} ns, then {after_ns} ns; \
         order = \"sort\" in the manifest sorts them"
    )]
    Backwards { path: PathBuf, column: String, row: usize, before_ns: i64, after_ns: i64 },
    #[error(
        "{path:?}: column {column:?}: rows {first} and {second} have the same stamp, {t_ns} ns, \
         and the manifest says duplicates = \"error\""
    )]
    Duplicate { path: PathBuf, column: String, first: usize, second: usize, t_ns: i64 },
    #[error(
        "{path:?}: column {column:?}: all {rows} stamps are {t_ns} ns: declare time = {{ rate = .. }} or leave the stream out"
    )]
    AllEqual { path: PathBuf, column: String, rows: usize, t_ns: i64 },
}

/// Which rows make up a stream, in its order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Pick {
    /// Every row, as stored.
    All,
    /// These rows.
    Rows(Vec<usize>),
    /// One row for each run of `order`: run `i` is `order[starts[i]..starts[i + 1]]`.
    Runs { order: Vec<usize>, starts: Vec<usize> },
}

/// The stamps of a column in nanoseconds. `row_of` gives the row in the file of an element, for errors.
///
/// `unit` must be given for integers and floats, and must be absent or agree for Arrow timestamps, which carry their
/// own; a time zone is how a timestamp is shown, not what it is, so it is ignored.
pub(crate) fn stamps_ns(
    array: &dyn Array,
    unit: Option<Unit>,
    site: Site<'_>,
    row_of: &dyn Fn(usize) -> usize,
) -> Result<Vec<i64>, TimeError> {
    let column = Column { site, row_of };
    if let DataType::Timestamp(own, _) = array.data_type() {
        let own = match own {
            TimeUnit::Second => Unit::S,
            TimeUnit::Millisecond => Unit::Ms,
            TimeUnit::Microsecond => Unit::Us,
            TimeUnit::Nanosecond => Unit::Ns,
        };
        if let Some(declared) = unit.filter(|unit| *unit != own) {
            return Err(TimeError::UnitContradicts {
                path: site.path.into(),
                column: site.column.into(),
                found: array.data_type().to_string(),
                declared: declared.name(),
            });
        }
        return match own {
            Unit::S => column.integers(array.as_primitive::<TimestampSecondType>(), own),
            Unit::Ms => column.integers(array.as_primitive::<TimestampMillisecondType>(), own),
            Unit::Us => column.integers(array.as_primitive::<TimestampMicrosecondType>(), own),
            Unit::Ns => column.integers(array.as_primitive::<TimestampNanosecondType>(), own),
        };
    }
    if !can_be_stamps(array.data_type()) {
        return Err(TimeError::NotStamps {
            path: site.path.into(),
            column: site.column.into(),
            found: array.data_type().to_string(),
        });
    }
    let Some(unit) = unit else {
        return Err(TimeError::NoUnit {
            path: site.path.into(),
            column: site.column.into(),
            found: array.data_type().to_string(),
        });
    };
    match array.data_type() {
        DataType::Int8 => column.integers(array.as_primitive::<Int8Type>(), unit),
        DataType::Int16 => column.integers(array.as_primitive::<Int16Type>(), unit),
        DataType::Int32 => column.integers(array.as_primitive::<Int32Type>(), unit),
        DataType::Int64 => column.integers(array.as_primitive::<Int64Type>(), unit),
        DataType::UInt8 => column.integers(array.as_primitive::<UInt8Type>(), unit),
        DataType::UInt16 => column.integers(array.as_primitive::<UInt16Type>(), unit),
        DataType::UInt32 => column.integers(array.as_primitive::<UInt32Type>(), unit),
        DataType::UInt64 => column.integers(array.as_primitive::<UInt64Type>(), unit),
        DataType::Float16 => column.floats(array.as_primitive::<Float16Type>(), unit),
        DataType::Float32 => column.floats(array.as_primitive::<Float32Type>(), unit),
        _ => column.floats(array.as_primitive::<Float64Type>(), unit),
    }
}

/// Whether [`stamps_ns`] can read a column of this type.
pub(crate) fn can_be_stamps(data_type: &DataType) -> bool {
    data_type.is_integer() || data_type.is_floating() || matches!(data_type, DataType::Timestamp(..))
}

struct Column<'a> {
    site: Site<'a>,
    row_of: &'a dyn Fn(usize) -> usize,
}

impl Column<'_> {
    fn integers<T>(&self, array: &PrimitiveArray<T>, unit: Unit) -> Result<Vec<i64>, TimeError>
    where
        T: ArrowPrimitiveType,
        T::Native: Into<i128> + Copy,
    {
        self.no_nulls(array)?;
        let scale = i128::from(unit.ns());
        let convert = |(i, value): (usize, &T::Native)| {
            let value: i128 = (*value).into();
            i64::try_from(value * scale).map_err(|_out_of_range| self.overflow(i, value.to_string(), unit))
        };
        array.values().iter().enumerate().map(convert).collect()
    }

    fn floats<T>(&self, array: &PrimitiveArray<T>, unit: Unit) -> Result<Vec<i64>, TimeError>
    where
        T: ArrowPrimitiveType,
        T::Native: Into<f64> + Copy,
    {
        self.no_nulls(array)?;
        let convert = |(i, value): (usize, &T::Native)| {
            let value: f64 = (*value).into();
            if !value.is_finite() {
                return Err(TimeError::NotFinite {
                    path: self.site.path.into(),
                    column: self.site.column.into(),
                    row: (self.row_of)(i),
                    value,
                });
            }
            float_ns(value, unit).ok_or_else(|| self.overflow(i, value.to_string(), unit))
        };
        array.values().iter().enumerate().map(convert).collect()
    }

    fn no_nulls(&self, array: &dyn Array) -> Result<(), TimeError> {
        match array.nulls().and_then(|nulls| (0..nulls.len()).find(|&i| nulls.is_null(i))) {
            None => Ok(()),
            Some(i) => Err(TimeError::Null {
                path: self.site.path.into(),
                column: self.site.column.into(),
                row: (self.row_of)(i),
            }),
        }
    }

    fn overflow(&self, i: usize, value: String, unit: Unit) -> TimeError {
        TimeError::Overflow {
            path: self.site.path.into(),
            column: self.site.column.into(),
            row: (self.row_of)(i),
            value,
            unit: unit.name(),
        }
    }
}

/// The nanosecond nearest to `value` counts of `unit`, ties to even; `None` where there is none in `i64`.
///
/// Exact: a float is `mantissa * 2^exponent`, and mantissa (53 bits) times 10^9 (30 bits) fits `i128`.
pub(crate) fn float_ns(value: f64, unit: Unit) -> Option<i64> {
    if !value.is_finite() {
        return None;
    }
    let bits = value.to_bits();
    let biased = i32::try_from((bits >> 52) & 0x7ff).ok()?;
    let fraction = i128::from(bits & ((1 << 52) - 1));
    let (mantissa, exponent) =
        if biased == 0 { (fraction, -1074) } else { (fraction | (1 << 52), biased - 1075) };
    let exact = mantissa * i128::from(unit.ns()); // times 2^exponent
    let magnitude = match exponent {
        _ if exact == 0 => 0,
        12.. => return None, // at least 2^52 * 2^12
        0..12 => exact << exponent,
        -126..0 => {
            let shift = exponent.unsigned_abs();
            let (whole, rest, half) = (exact >> shift, exact & ((1 << shift) - 1), 1 << (shift - 1));
            whole + i128::from(rest > half || (rest == half && whole & 1 == 1))
        }
        _ => 0, // less than 2^83 * 2^-127: nowhere near half a nanosecond
    };
    i64::try_from(if value.is_sign_negative() { -magnitude } else { magnitude }).ok()
}

/// Puts rows in order and settles equal stamps. The stamps that come back ascend strictly; [`Pick`] says which rows
/// they stand for. `stamps` must not be empty. `row_of` gives the row in the file of an element, for errors.
pub(crate) fn settle(
    stamps: Vec<i64>,
    order: Order,
    duplicates: Duplicates,
    site: Site<'_>,
    row_of: &dyn Fn(usize) -> usize,
) -> Result<(Vec<i64>, Pick), TimeError> {
    if stamps.windows(2).all(|pair| pair[0] < pair[1]) {
        return Ok((stamps, Pick::All));
    }
    if stamps.windows(2).all(|pair| pair[0] == pair[1]) {
        return Err(TimeError::AllEqual {
            path: site.path.into(),
            column: site.column.into(),
            rows: stamps.len(),
            t_ns: stamps[0],
        });
    }
    let mut rows: Vec<usize> = (0..stamps.len()).collect();
    if let Some(before) = stamps.windows(2).position(|pair| pair[0] > pair[1]) {
        match order {
            Order::Sort => rows.sort_by_key(|&row| stamps[row]),
            Order::Error => {
                return Err(TimeError::Backwards {
                    path: site.path.into(),
                    column: site.column.into(),
                    row: row_of(before + 1),
                    before_ns: stamps[before],
                    after_ns: stamps[before + 1],
                });
            }
        }
    }
    let mut starts: Vec<usize> = Vec::with_capacity(rows.len() + 1);
    for (i, &row) in rows.iter().enumerate() {
        if i == 0 || stamps[rows[i - 1]] != stamps[row] {
            starts.push(i);
        } else if duplicates == Duplicates::Error {
            return Err(TimeError::Duplicate {
                path: site.path.into(),
                column: site.column.into(),
                first: row_of(rows[i - 1]),
                second: row_of(row),
                t_ns: stamps[row],
            });
        }
    }
    let settled: Vec<i64> = starts.iter().map(|&start| stamps[rows[start]]).collect();
    starts.push(rows.len());
    let pick = match duplicates {
        _ if settled.len() == rows.len() => Pick::Rows(rows),
        Duplicates::Last => Pick::Rows(starts[1..].iter().map(|&end| rows[end - 1]).collect()),
        Duplicates::First => {
            Pick::Rows(starts[..starts.len() - 1].iter().map(|&start| rows[start]).collect())
        }
        Duplicates::Mean | Duplicates::Error => Pick::Runs { order: rows, starts },
    };
    Ok((settled, pick))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{
        ArrayRef, Float32Array, Float64Array, Int32Array, Int64Array, StringArray, TimestampMicrosecondArray,
        UInt64Array,
    };
    use proptest::prelude::*;

    use super::*;

    const SITE: fn() -> Site<'static> = || Site { path: Path::new("imu.parquet"), column: "t" };

    fn stamps(array: ArrayRef, unit: Option<Unit>) -> Result<Vec<i64>, TimeError> {
        stamps_ns(&array, unit, SITE(), &|row| row + 100)
    }

    #[test]
    fn float_seconds_are_the_nanosecond_nearest_to_the_stored_float() {
        // Expected values: Python, round(Fraction(x) * 10**9).
        for (seconds, ns) in [
            (0.1, 100_000_000),
            (1_531_684_193.123_456_7, 1_531_684_193_123_456_717),
            (1_531_684_193.0, 1_531_684_193_000_000_000),
            (-0.25, -250_000_000),
            (5e-10, 1),  // the float is above a half
            (1.5e-9, 1), // below one and a half
            (2.5e-9, 3), // the float is above two and a half
            (5e-324, 0),
            (0.0, 0),
            (-0.0, 0),
            (9_223_372_036.854_775, 9_223_372_036_854_774_475),
        ] {
            assert_eq!(float_ns(seconds, Unit::S), Some(ns), "{seconds:e}");
        }
        let tie = 1.0 / 1024.0; // 976,562.5 ns exactly
        assert_eq!(float_ns(tie, Unit::S), Some(976_562));
        assert_eq!(float_ns(3.0 * tie, Unit::S), Some(2_929_688));
        for beyond in [9_223_372_037.0, -9_223_372_037.0, 1e300, f64::NAN, f64::INFINITY] {
            assert_eq!(float_ns(beyond, Unit::S), None, "{beyond:e}");
        }
        assert_eq!(float_ns(-9_223_372_036_854_775_808.0, Unit::Ns), Some(i64::MIN));
        assert_eq!(float_ns(9_223_372_036_854_775_808.0, Unit::Ns), None);
        assert_eq!(float_ns(f64::from(0.1_f32), Unit::S), Some(100_000_001));
    }

    #[test]
    fn integers_of_any_width_are_multiplied_exactly_or_refused() {
        let max = i64::MAX / 1000;
        let unsigned: ArrayRef = Arc::new(UInt64Array::from(vec![0, u64::try_from(max).unwrap()]));
        assert_eq!(stamps(unsigned, Some(Unit::Us)).unwrap(), [0, max * 1000]);
        let narrow: ArrayRef = Arc::new(Int32Array::from(vec![i32::MIN, i32::MAX]));
        assert_eq!(
            stamps(narrow, Some(Unit::S)).unwrap(),
            [-2_147_483_648_000_000_000, 2_147_483_647_000_000_000]
        );
        let beyond: ArrayRef = Arc::new(UInt64Array::from(vec![0, u64::MAX]));
        let error = stamps(beyond, Some(Unit::Ns)).unwrap_err();
        assert!(matches!(error, TimeError::Overflow { row: 101, .. }), "{error}");
        let stamp: ArrayRef = Arc::new(TimestampMicrosecondArray::from(vec![7]).with_timezone("Asia/Tokyo"));
        assert_eq!(stamps(Arc::clone(&stamp), None).unwrap(), [7_000]);
        assert!(matches!(stamps(stamp, Some(Unit::Ns)), Err(TimeError::UnitContradicts { .. })));
    }

    #[test]
    fn what_is_no_stamp_is_refused_with_its_row() {
        let null: ArrayRef = Arc::new(Int64Array::from(vec![Some(1), None]));
        assert!(matches!(stamps(null, Some(Unit::S)), Err(TimeError::Null { row: 101, .. })));
        let nan: ArrayRef = Arc::new(Float64Array::from(vec![1.0, 2.0, f64::NAN]));
        assert!(matches!(stamps(nan, Some(Unit::S)), Err(TimeError::NotFinite { row: 102, .. })));
        let huge: ArrayRef = Arc::new(Float32Array::from(vec![3e38_f32]));
        assert!(matches!(stamps(huge, Some(Unit::S)), Err(TimeError::Overflow { row: 100, .. })));
        let text: ArrayRef = Arc::new(StringArray::from(vec!["noon"]));
        assert!(matches!(stamps(text, Some(Unit::S)), Err(TimeError::NotStamps { .. })));
        let bare: ArrayRef = Arc::new(Int64Array::from(vec![1]));
        let error = stamps(bare, None).unwrap_err().to_string();
        assert!(error.contains("\"imu.parquet\"") && error.contains("unit"), "{error}");
    }

    fn settled(stamps: &[i64], order: Order, duplicates: Duplicates) -> Result<(Vec<i64>, Pick), TimeError> {
        settle(stamps.to_vec(), order, duplicates, SITE(), &|row| row + 100)
    }

    #[test]
    fn equal_stamps_are_settled_as_declared() {
        let stamps = [1, 2, 2, 2, 5];
        let rows = |duplicates| settled(&stamps, Order::Error, duplicates).unwrap();
        assert_eq!(rows(Duplicates::Last), (vec![1, 2, 5], Pick::Rows(vec![0, 3, 4])));
        assert_eq!(rows(Duplicates::First), (vec![1, 2, 5], Pick::Rows(vec![0, 1, 4])));
        let runs = Pick::Runs { order: vec![0, 1, 2, 3, 4], starts: vec![0, 1, 4, 5] };
        assert_eq!(rows(Duplicates::Mean), (vec![1, 2, 5], runs));
        let error = settled(&stamps, Order::Error, Duplicates::Error).unwrap_err();
        assert!(matches!(error, TimeError::Duplicate { first: 101, second: 102, t_ns: 2, .. }), "{error}");
        assert_eq!(settled(&[1, 2], Order::Error, Duplicates::Error).unwrap().1, Pick::All);
    }

    #[test]
    fn backward_stamps_are_refused_unless_sorting_is_declared() {
        let error = settled(&[10, 30, 20, 40], Order::Error, Duplicates::Last).unwrap_err();
        assert!(
            matches!(error, TimeError::Backwards { row: 102, before_ns: 30, after_ns: 20, .. }),
            "{error}"
        );
        assert_eq!(
            settled(&[10, 30, 20, 30], Order::Sort, Duplicates::Last).unwrap(),
            (vec![10, 20, 30], Pick::Rows(vec![0, 2, 3]))
        );
    }

    #[test]
    fn a_clock_that_stands_still_is_refused_with_the_cure() {
        let error = settled(&[0, 0, 0], Order::Sort, Duplicates::Last).unwrap_err().to_string();
        assert!(error.contains("all 3 stamps are 0 ns: declare time = { rate = .. }"), "{error}");
        assert_eq!(settled(&[0], Order::Error, Duplicates::Last).unwrap(), (vec![0], Pick::All));
    }

    proptest! {
        /// Against the exact decimal digits that Rust prints of a float.
        #[test]
        fn float_seconds_round_as_their_decimal_digits_do(seconds in -9.2e9..9.2e9_f64, small in any::<bool>()) {
            let seconds = if small { seconds / 9.2e12 } else { seconds };
            let digits = format!("{:.120}", seconds.abs());
            let (whole, rest) = digits.split_once('.').unwrap();
            let floor: i64 = format!("{whole}{}", &rest[..9]).parse().unwrap();
            let up = match rest[9..].trim_end_matches('0') {
                "5" => floor % 2, // a tie: to even
                rest => i64::from(rest >= "5"),
            };
            let sign = if seconds < 0.0 { -1 } else { 1 };
            prop_assert_eq!(float_ns(seconds, Unit::S), Some(sign * (floor + up)));
        }

        #[test]
        fn settled_stamps_ascend_and_belong_to_their_rows(
            stamps in prop::collection::vec(0_i64..50, 2..60), last in any::<bool>()
        ) {
            prop_assume!(stamps.iter().any(|stamp| *stamp != stamps[0]));
            let duplicates = if last { Duplicates::Last } else { Duplicates::First };
            let (settled, pick) = settled(&stamps, Order::Sort, duplicates).unwrap();
            prop_assert!(settled.windows(2).all(|pair| pair[0] < pair[1]));
            let rows = match pick { Pick::Rows(rows) => rows, _ => (0..stamps.len()).collect() };
            prop_assert_eq!(rows.len(), settled.len());
            for (row, stamp) in rows.iter().zip(&settled) {
                let equal = || stamps.iter().enumerate().filter(|(_, other)| *other == stamp).map(|(row, _)| row);
                prop_assert_eq!(Some(*row), if last { equal().next_back() } else { equal().next() });
            }
            let mut distinct = stamps;
            distinct.sort_unstable();
            distinct.dedup();
            prop_assert_eq!(distinct, settled);
        }
    }
}
