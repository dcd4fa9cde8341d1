//! The `where` of a stream: which rows of a table are its own.
//!
//! A filter is a conjunction of equalities. A null equals nothing. A column that could never equal what it is compared
//! with is an error, so that a typing slip does not become an empty stream.

use std::path::PathBuf;

use arrow::array::{Array, ArrayRef, AsArray, PrimitiveArray, StringArray};
use arrow::compute::cast;
use arrow::datatypes::{ArrowPrimitiveType, DataType, Float64Type, Int64Type, UInt64Type};
use serde::Deserialize;

use crate::time::Site;

/// What a column is compared with.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged, expecting = "a boolean, an integer, a float or a string")]
pub enum Wanted {
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
}

impl std::fmt::Display for Wanted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Bool(value) => write!(f, "{value}"),
            Self::Int(value) => write!(f, "{value}"),
            Self::Float(value) => write!(f, "{value:?}"),
            Self::Text(value) => write!(f, "{value:?}"),
        }
    }
}

/// Why a filter cannot be applied.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FilterError {
    #[error("{path:?}: the filter where {column:?} = {wanted} cannot hold: the column is {found}")]
    Type { path: PathBuf, column: String, wanted: String, found: String },
    #[error("{path:?}: column {column:?} cannot be compared")]
    Arrow { path: PathBuf, column: String, source: arrow::error::ArrowError },
}

/// Whether a column of this type can be compared with `wanted`.
pub(crate) fn check(data_type: &DataType, wanted: &Wanted, site: Site<'_>) -> Result<(), FilterError> {
    let inner = match data_type {
        DataType::Dictionary(_, values) => values,
        other => other,
    };
    let fits = match wanted {
        Wanted::Bool(_) => *inner == DataType::Boolean,
        Wanted::Int(_) => inner.is_integer() || inner.is_floating(),
        Wanted::Float(_) => inner.is_floating(),
        Wanted::Text(_) => matches!(inner, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View),
    };
    if fits {
        return Ok(());
    }
    Err(FilterError::Type {
        path: site.path.into(),
        column: site.column.into(),
        wanted: wanted.to_string(),
        found: data_type.to_string(),
    })
}

/// Clears `keep[i]` where `array[i]` is not `wanted`. `keep` and `array` have the same length.
pub(crate) fn narrow(
    array: &ArrayRef,
    wanted: &Wanted,
    site: Site<'_>,
    keep: &mut [bool],
) -> Result<(), FilterError> {
    check(array.data_type(), wanted, site)?;
    let to = |data_type: DataType| {
        cast(array, &data_type).map_err(|source| FilterError::Arrow {
            path: site.path.into(),
            column: site.column.into(),
            source,
        })
    };
    match wanted {
        Wanted::Bool(wanted) => {
            let array = to(DataType::Boolean)?;
            let array = array.as_boolean();
            retain(keep, |i| array.is_valid(i) && array.value(i) == *wanted);
        }
        // Integers beyond i64 and floats are compared as what they are: neither may round into equality.
        Wanted::Int(wanted) => match array.data_type() {
            DataType::UInt64 => match u64::try_from(*wanted) {
                Ok(wanted) => equal(array.as_primitive::<UInt64Type>(), keep, |value| value == wanted),
                Err(_negative) => keep.fill(false),
            },
            other if other.is_floating() => {
                let array = to(DataType::Float64)?;
                #[expect(clippy::cast_precision_loss, reason = "checked by the comparison of integers")]
                let (float, wanted) = (*wanted as f64, i128::from(*wanted));
                #[expect(
                    clippy::cast_possible_truncation,
                    reason = "a saturated value is out of range of i64"
                )]
                equal(array.as_primitive::<Float64Type>(), keep, |value| {
                    value == float && value as i128 == wanted
                });
            }
            _ => equal(to(DataType::Int64)?.as_primitive::<Int64Type>(), keep, |value| value == *wanted),
        },
        Wanted::Float(wanted) => {
            equal(to(DataType::Float64)?.as_primitive::<Float64Type>(), keep, |value| value == *wanted);
        }
        Wanted::Text(wanted) => {
            let array = to(DataType::Utf8)?;
            let array: &StringArray = array.as_string();
            retain(keep, |i| array.is_valid(i) && array.value(i) == wanted);
        }
    }
    Ok(())
}

fn equal<T: ArrowPrimitiveType>(
    array: &PrimitiveArray<T>,
    keep: &mut [bool],
    is_wanted: impl Fn(T::Native) -> bool,
) {
    retain(keep, |i| array.is_valid(i) && is_wanted(array.value(i)));
}

fn retain(keep: &mut [bool], is_wanted: impl Fn(usize) -> bool) {
    for (i, keep) in keep.iter_mut().enumerate() {
        *keep = *keep && is_wanted(i);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use arrow::array::{BooleanArray, Float32Array, Int8Array, LargeStringArray, UInt64Array};

    use super::*;

    const SITE: fn() -> Site<'static> = || Site { path: Path::new("a.parquet"), column: "I" };

    fn kept(array: ArrayRef, wanted: Wanted) -> Result<Vec<usize>, FilterError> {
        let mut keep = vec![true; array.len()];
        narrow(&array, &wanted, SITE(), &mut keep)?;
        Ok((0..keep.len()).filter(|&i| keep[i]).collect())
    }

    #[test]
    fn rows_are_kept_where_the_column_equals_and_never_where_it_is_null() {
        let ints: ArrayRef = Arc::new(Int8Array::from(vec![Some(0), None, Some(1), Some(0)]));
        assert_eq!(kept(ints, Wanted::Int(0)).unwrap(), [0, 3]);
        let big: ArrayRef = Arc::new(UInt64Array::from(vec![u64::MAX, 1]));
        assert_eq!(kept(Arc::clone(&big), Wanted::Int(-1)).unwrap(), Vec::<usize>::new());
        assert_eq!(kept(big, Wanted::Int(1)).unwrap(), [1]);
        let floats: ArrayRef = Arc::new(Float32Array::from(vec![0.5, 2.0, f32::NAN]));
        assert_eq!(kept(Arc::clone(&floats), Wanted::Float(0.5)).unwrap(), [0]);
        assert_eq!(kept(floats, Wanted::Int(2)).unwrap(), [1]);
        let flags: ArrayRef = Arc::new(BooleanArray::from(vec![true, false]));
        assert_eq!(kept(flags, Wanted::Bool(false)).unwrap(), [1]);
        let names: ArrayRef = Arc::new(LargeStringArray::from(vec!["left", "right"]));
        assert_eq!(kept(names, Wanted::Text("right".to_owned())).unwrap(), [1]);
    }

    #[test]
    fn a_comparison_that_can_never_hold_is_refused() {
        let ints: ArrayRef = Arc::new(Int8Array::from(vec![0]));
        let error = kept(ints, Wanted::Text("0".to_owned())).unwrap_err().to_string();
        assert!(error.contains("where \"I\" = \"0\" cannot hold: the column is Int8"), "{error}");
    }
}
